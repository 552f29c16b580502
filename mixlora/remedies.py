"""Errors of the machine as errors that name their remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixlora import ranks
from mixlora.errors import ResourceError
from mixlora.records import disk_errors

SCORING = (
    "out of memory outside a training step. Go on by the same command with less than eval.batch_size and "
    "eval.batch_tokens (under int8 that is another run), or begin another run with model.quantization=nf4 or "
    "model.dtype=bfloat16 where the model itself does not fit"
)
FITTING = (
    "out of memory: the model does not fit. Free the device, or hide it to answer on the CPU: CUDA_VISIBLE_DEVICES="
)
ANSWERING = "out of memory. Give fewer tokens: shorter or fewer prompts, or a smaller max_new_tokens"


@contextmanager
def with_remedies(folder: Path, memory: str = SCORING) -> Iterator[None]:
    """Raise a full disk, a folder that may not be written to and memory that is out as a MixloraError.

    Args:
        folder: what is written into.
        memory: what to say where memory is out.
    """
    try:
        with disk_errors(folder):
            yield
    except (RuntimeError, MemoryError) as error:
        if not ranks.is_out_of_memory(error):
            raise
        raise ResourceError(memory) from error

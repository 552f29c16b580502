"""One model on many devices: a copy on each (DDP), or a part on each (FSDP2, with Accelerate's `use_fsdp`).

FSDP2 is called here rather than by Accelerate, which would want the optimizer first and knows no FSDP on a CPU.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mixlora.environment import switched_on
from mixlora.errors import ConfigError
from mixlora.models.base import decoder_layers


def distribute(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model to call in training; parameters of `model` itself are replaced where it is cut into parts."""
    if accelerator.num_processes == 1:  # it lies where it should; under FSDP's settings Accelerate would ask for more
        return model
    if not switched_on("ACCELERATE_USE_FSDP"):
        return accelerator.prepare(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = switched_on("FSDP_RESHARD_AFTER_FORWARD", "true")
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    return model


def require_one_dtype(adapter: Iterable[nn.Module], processes: int) -> None:
    """Nothing that FSDP would refuse to cut. Routers stay in float32 beside factors in bfloat16.

    Raises:
        ConfigError: an adapter of more than one dtype, where FSDP will cut them.
    """
    own = (p for wrapper in adapter for name, p in wrapper.named_parameters() if not name.startswith("base_layer."))
    found = {parameter.dtype for parameter in own}
    if len(found) > 1 and processes > 1 and switched_on("ACCELERATE_USE_FSDP"):
        dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ConfigError(f"FSDP cuts parameters of one dtype, not {dtypes}. Set method.adapter_dtype=float32")


@contextmanager
def synchronised(model: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
    """Add gradients up over ranks in the last micro-batch of a step alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif last or accelerator.num_processes == 1:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def apart_again(model: nn.Module) -> None:
    """Let the next forward gather the parts anew: with reshard_after_forward=false (zero2.yaml) a forward without
    backward leaves the layers whole, and what is then written into the parts would not be seen."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

"""train.torch_compile: the same steps, from as many graphs whatever the packs look like."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from built import METHODS, busy, composed
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from mixlora import losses
from mixlora.checks import check
from mixlora.config.schema import Train
from mixlora.errors import ConfigError
from mixlora.models.base import decoder_layers
from mixlora.models.compiled import compiled, require_layers
from mixlora.models.packing import Segments
from mixlora.tasks.collate import Row
from mixlora.training.loop import Trainer

# The compiler looks at .grad of every tensor, and hides the warning from all but a filter that makes it an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
EXACT = (
    "model.dtype=float64",
    "method.adapter_dtype=float64",
    "model.random.num_hidden_layers=2",
    "method.lora_dropout=0",
)
# Packs of another length and of another number of rows in each step.
DRAWS = [[(5, 3), (1, 1), (9, 4)], [(2, 7), (6, 1), (4, 4), (11, 2), (3, 3)], [(3, 1), (12, 5)]]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(before)


@pytest.fixture
def as_traced(monkeypatch):
    """Forward and backward graphs as the compiler sees them, each operator run by itself: equal to the last digits.

    Machine code rounds otherwise, and transformers' norms compute in float32, so a token may choose another expert.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def rows(lengths: list[tuple[int, int]], step: int) -> list[Row]:
    generator = torch.Generator().manual_seed(step)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 256, (n,), generator=generator).tolist())

    return [Row(f"{step}-{i}", "ab"[i % 2], ids(p), ids(a)) for i, (p, a) in enumerate(lengths)]


def trained(
    config, folder, *, torch_compile: bool, seed=0, **options
) -> tuple[list[dict], dict[str, torch.Tensor], list[int]]:
    """The lines of all steps, the adapter after them, and the number of graphs after each."""
    model, adapter = busy(config)
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "warmup_ratio": 0.0, **options}
    trainer = Trainer(
        model=model, aux=losses.build(config.aux_loss), tasks=["a", "b"], pad_id=0, folder=folder, steps=len(DRAWS),
        rows=lambda first, number: rows(DRAWS[first // number], first // number), seed=seed,
        train=Train(torch_compile=torch_compile, learning_rate=1e-3, **settings), accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    model.train()
    lines, graphs = [], []
    for step in range(1, len(DRAWS) + 1):
        lines.append(trainer.step(step)[0])
        graphs.append(counters["stats"]["unique_graphs"])
    return lines, {name: tensor.detach().clone() for name, tensor in adapter.items()}, graphs


def same_steps(config, folder, tolerance: float, **options) -> None:
    want, want_adapter, _ = trained(config, folder, torch_compile=False, **options)
    found, adapter, graphs = trained(config, folder, torch_compile=True, **options)
    for line, wanted in zip(found, want, strict=True):
        for key in ("loss", "task_losses", "aux_losses", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=tolerance, abs=tolerance)
        for key in ("expert_load", "tokens"):
            assert line[key] == wanted[key]
    torch.testing.assert_close(adapter, want_adapter, rtol=tolerance, atol=tolerance)
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, f"a pack of another shape made another graph: {graphs}"


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_compiled_layers_train_as_the_plain_ones(name, tmp_path, as_traced):
    """Losses, auxiliary losses, gradients' norm, loads, and the adapter after three steps, whatever the packs."""
    same_steps(composed(name, *EXACT), tmp_path, 1e-9)


@pytest.mark.full
def test_layers_share_their_graphs_and_linears_that_read_one_input_their_products(tmp_path, monkeypatch):
    """As many graphs for four layers as for three; q, k and v choose experts in one topk, gate and up in another."""
    chosen: list[int] = []

    def counting(graph, inputs):
        chosen.append(sum("topk" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=aot_autograd(fw_compiler=counting)))
    found = []
    for layers in (3, 4):
        torch._dynamo.reset()
        counters.clear()
        chosen.clear()
        config = composed("mole", *EXACT[:2], f"model.random.num_hidden_layers={layers}", "method.lora_dropout=0")
        *_, graphs = trained(config, tmp_path, torch_compile=True)
        found.append((graphs[-1], sorted(chosen)))
    assert found[0] == found[1]
    # q, k and v; o; gate and up; down. At most twice: the first layer, whose input has no gradient, is another graph.
    assert 0 < sum(found[0][1]) <= 2 * 4


@pytest.mark.full
def test_padded_batches_compile_too(tmp_path, as_traced):
    same_steps(composed("mole", *EXACT), tmp_path, 1e-9, packing=False)


@pytest.mark.full
def test_in_machine_code_as_well(tmp_path):
    same_steps(composed("lora", *EXACT), tmp_path, 1e-5)


@pytest.mark.full
def test_dropout_is_drawn_anew_in_every_step(tmp_path, as_traced):
    """A graph that had kept its masks would repeat the loss of a step that is done again with another seed."""
    config = composed("lora", *EXACT[:-1], "method.lora_dropout=0.5")
    (first, *_), _, _ = trained(config, tmp_path, torch_compile=True)
    (again, *_), _, _ = trained(config, tmp_path, torch_compile=True)
    (other, *_), _, _ = trained(config, tmp_path, torch_compile=True, seed=1)
    assert first["loss"] == again["loss"] != other["loss"]


def test_the_layers_are_as_they_were_outside_a_step():
    model, _ = busy(composed("mole", *EXACT))
    layers, in_effect = decoder_layers(model), compiled(model)
    assert len(layers) == 2
    with in_effect():
        assert all("forward" in vars(layer) for layer in layers)
    assert not any("forward" in vars(layer) for layer in layers)


def test_rows_of_a_pack_are_no_part_of_a_graph():
    def layer(x_T, segments):
        return of_each_row(2 * x_T, segments) + 1

    @torch.compiler.disable
    def of_each_row(x_T, segments):
        return torch.cat([part.cumsum(0) for part in x_T.split(list(segments))])

    run, graphs = torch.compile(layer, dynamic=True, backend="eager"), []
    for lengths in ((2, 3), (4, 5, 6), (3,), (2, 2, 2, 2)):
        x_T = torch.rand(sum(lengths))
        torch.testing.assert_close(run(x_T, Segments(lengths)), layer(x_T, lengths))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0


def test_a_model_that_names_no_layers_is_refused():
    with pytest.raises(ConfigError, match=r"Linear does not name its decoder layers.*train\.torch_compile=false"):
        require_layers(torch.nn.Linear(2, 2))


def test_checkpointing_would_leave_nothing_to_compile():
    config = composed("lora", "train.torch_compile=true", "model.gradient_checkpointing=true")
    with pytest.raises(ConfigError, match=r"torch_compile=true compiles nothing .*gradient_checkpointing=true"):
        check(config)


@pytest.mark.full
def test_without_a_compiler_a_run_ends_before_anything_is_loaded(tmp_path):
    """In a process of its own: a compiler that was found once is not looked for again."""
    command = [sys.executable, "-m", "mixlora.train", "+method=lora", "+tasks=arc", "model=tiny", "train.max_steps=1"]
    surroundings = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "data.source=sample", f"output_root={tmp_path}", "train.torch_compile=true"],
        env=surroundings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == ConfigError.status
    assert "train.torch_compile=true does not work here" in done.stderr
    assert "Install g++, or set it to false" in done.stderr
    assert "Loading" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr

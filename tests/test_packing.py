"""Packed rows: the same step as padded ones, and no token sees another example."""

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from accelerate import Accelerator
from built import composed, load_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mixlora
from mixlora import gates, losses
from mixlora.adapters.attach import attach
from mixlora.config.schema import Method, Train
from mixlora.config.typed import typed
from mixlora.models import likelihood, packing
from mixlora.models.likelihood import AnswerLosses, ChunkedNats, packs_rows, pads_rows, plain_head
from mixlora.tasks.collate import Row, collate, pack, packs, packs_within, padded_batches
from mixlora.training.loop import Trainer

CONFIGS = Path(__file__).parents[1] / "configs" / "method"
METHODS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SIZES = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
OURS, THEIRS = str(Path(mixlora.__file__).parent), str(Path(transformers.__file__).parent)


def rows(*lengths: tuple[int, int], on_prompt: bool = False) -> list[Row]:
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 256, (n,), generator=generator).tolist())

    return [Row(f"r{i}", "ab"[i % 2], ids(p), ids(a), on_prompt) for i, (p, a) in enumerate(lengths)]


ROWS = rows((5, 3), (1, 1), (9, 4), (2, 7), (6, 3))  # two neighbours of one length


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False)).to(dtype).eval()


def adapted(name: str, dtype: torch.dtype = torch.float64, std: float = 0.2):
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    model = llama(dtype)
    method = typed(Method, values.get("method", values) | {"lora_dropout": 0.0, "adapter_dtype": "auto"})
    adapter = attach(model, method)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.values():
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
    return model, adapter


# ---- the same step


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_packed_and_padded_rows_give_the_same_losses_gradients_and_loads(name, on_prompt):
    """Row by row: what is wrong in two rows could cancel in their sum."""
    model, adapter = adapted(name)
    trained = [tensor for tensor in adapter.values() if tensor.requires_grad]
    some = rows((5, 3), (1, 1), (9, 4), (2, 7), on_prompt=on_prompt)
    found = []
    for batch in (pack(some), collate(some, 0)):
        with packing.by_row():
            nats_B = AnswerLosses(model)(model, batch)
        loads = {name: load_of(r, batch.mask_BS) for name, r in gates.pop_routings(model).items()}
        gradients = [torch.autograd.grad(nats, trained, retain_graph=True) for nats in nats_B]
        found.append((nats_B, batch.label_tokens, loads, gradients))
    (nats, count, loads, gradients), (nats_padded, count_padded, loads_padded, gradients_padded) = found
    assert count == count_padded
    torch.testing.assert_close(nats, nats_padded, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients, gradients_padded, rtol=1e-7, atol=1e-12)
    assert all(torch.equal(loads[gate], loads_padded[gate]) for gate in loads)


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_does_not_depend_on_packing(name, cut, tmp_path):
    """To 1e-5 in float32, through the loop: losses of every task, gradient norm, tokens; and the gradient.

    An auxiliary loss is of a micro-batch, and packs are cut into others than rows of like length: it is left out there.
    Factors are a quarter as large as elsewhere here: with those, float32 itself leaves 1.06e-5 of hydralora's gradient.
    """
    lines, gradients = [], []
    aux = losses.build(composed(name).aux_loss) if cut == 1 else {}
    some = [*ROWS, *rows((4, 4))]
    for packed in (True, False):
        model, adapter = adapted(name, torch.float32, std=0.05)
        sizes = {"per_device_train_batch_size": 6 // cut, "gradient_accumulation_steps": cut}
        trainer = Trainer(
            model=model, aux=aux, rows=lambda first, number: list(some), tasks=["a", "b"], steps=1, seed=0, pad_id=0,
            train=Train(packing=packed, max_steps=1, max_grad_norm=1e9, **sizes), folder=tmp_path,
            accelerator=Accelerator(cpu=True),
        )  # fmt: skip
        assert trainer.packed is packed
        assert [len(b.ids) for b in trainer.batches(1)] == [6 // cut] * cut
        assert all(b.packed is packed for b in trainer.batches(1))
        seen: dict[str, torch.Tensor] = {}
        for key, tensor in adapter.items():
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(
                    lambda t, key=key, seen=seen: seen.update({key: t.grad.clone()})
                )
        lines.append(trainer.step(1)[0])
        assert seen
        gradients.append(torch.cat([seen[key].flatten() for key in sorted(seen)]))
    for key in ("loss", "grad_norm", "task_losses"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-5)
    for key in ("tokens", "label_tokens", "expert_load"):
        assert lines[0][key] == lines[1][key]
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


READS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "repeat_interleave"}


class Waiting(TorchDispatchMode):
    """Where our own code asks for what a device would have to be waited for. No device is at hand, so it is told by the
    operators and calls that read from one, or bring it a tensor from the host. transformers' own are not counted: it
    asks of each forward whether its mask is needed."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.lines: list[str] = []
        for owner, name in [(torch.Tensor, "cpu"), (torch.Tensor, "tolist"), (torch.Tensor, "to"), (torch, "tensor")]:
            monkeypatch.setattr(owner, name, self.heard(getattr(owner, name)))

    def heard(self, call):
        def noted(*args, **options):
            moves = any(isinstance(value, torch.device) for value in (*args, *options.values()))
            if moves or call.__name__ in ("cpu", "tolist"):
                self.note()
            return call(*args, **options)

        return noted

    def __torch_dispatch__(self, operator, types, args=(), options=None):
        name = operator.name().removeprefix("aten::").split(".")[0]
        picked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if name in READS or picked:
            self.note()
        return operator(*args, **(options or {}))

    def note(self) -> None:
        frame = next(f for f in reversed(traceback.extract_stack()) if f.filename.startswith((OURS, THEIRS)))
        if frame.filename.startswith(OURS):
            self.lines.append(f"{Path(frame.filename).name} {frame.name}")


@pytest.mark.parametrize(("name", "packed"), [*((name, True) for name in METHODS), ("mole", False)])
def test_a_step_waits_for_the_device_as_often_however_it_is_cut(name, packed, tmp_path, monkeypatch):
    found = {}
    for micro_batches in (1, 3):
        model, _ = adapted(name, torch.float32)
        train = Train(
            packing=packed, per_device_train_batch_size=6 // micro_batches, gradient_accumulation_steps=micro_batches
        )
        some = rows((5, 3), (1, 1), (9, 4), (2, 7), (6, 3), (4, 2))
        aux = losses.build({"load_balance": {}, "router_z": {}} if gates.gates_of(model) else {})
        trainer = Trainer(
            model=model, aux=aux, rows=lambda first, number, some=some: some, tasks=["a", "b"], train=train,
            steps=1, seed=0, pad_id=0, folder=tmp_path, accelerator=Accelerator(cpu=True),
        )  # fmt: skip
        given = trainer.batches(1)  # brought to the device before the first forward
        monkeypatch.setattr(trainer, "batches", lambda step, given=given: given)
        assert len(given) == micro_batches
        with monkeypatch.context() as patch, Waiting(patch) as seen:
            trainer.step(1)
        # A feed-forward mixture counts the rows of its experts in each forward: they are the shapes of its products.
        found[micro_batches] = Counter(line for line in seen.lines if not line.endswith(" rows_of_experts"))
    assert found[3] == found[1]
    assert found[1]["tally.py reduce"] > 0


# ---- no leak


# By row, and by transformers' mask from the positions alone, as a model computes that hands no `segments` on.
@pytest.mark.parametrize("attention", [packing.by_row, contextlib.nullcontext])
@pytest.mark.parametrize("name", METHODS)
def test_no_token_sees_another_row(name, attention):
    """Perturb each row: every other row's hidden states stay bit for bit, and their gradient on it is exactly zero."""
    model, _ = adapted(name)
    batch = pack(ROWS)
    embedded = model.get_input_embeddings()(batch.input_ids_BS).detach()
    places = torch.arange(len(ROWS)).repeat_interleave(torch.tensor(batch.lengths))

    def run(x_1SD: torch.Tensor) -> torch.Tensor:
        with attention():
            positions, segments = batch.position_ids_BS, batch.lengths
            return model.get_decoder()(inputs_embeds=x_1SD, position_ids=positions, segments=segments)[0]

    before = run(embedded)
    for changed in range(len(ROWS)):
        other = embedded.clone()
        other[0, places == changed] += torch.randn(int((places == changed).sum()), 32, dtype=torch.float64)
        after = run(other)
        assert torch.equal(after[0, places != changed], before[0, places != changed])
        assert not torch.equal(after[0, places == changed], before[0, places == changed])
        leaf = embedded.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run(leaf)[0, places != changed].square().sum(), leaf)
        assert torch.all(gradient[0, places == changed] == 0)
        assert torch.all(gradient[0, places != changed].abs().sum(-1) > 0)


def test_a_pack_costs_attention_within_rows_alone_and_neighbours_of_one_length_one_call(monkeypatch):
    seen = []

    def spy(module, query, *rest, **options):
        seen.append((len(query), query.shape[2]))
        return real(module, query, *rest, **options)

    real = packing.sdpa_attention_forward
    monkeypatch.setattr(packing, "sdpa_attention_forward", spy)
    model = llama()
    with packing.by_row():
        model(**likelihood.model_inputs(pack(ROWS)))
        assert seen == 2 * [(1, 8), (1, 2), (1, 13), (2, 9)]
    seen.clear()
    model(**likelihood.model_inputs(pack(ROWS)))
    assert seen == []


@pytest.mark.parametrize(("lengths", "copies"), [((6, 6, 6), 0), ((18,), 0), ((6, 6, 6, 2), 1)])
def test_a_pack_of_rows_of_one_length_has_no_copy_of_its_attention(lengths, copies):
    """What reads the output, such as an adapter of o_proj, keeps the tensor that attention itself keeps."""
    torch.manual_seed(0)
    module, n, S, kept = nn.Module(), lengths.count(lengths[0]), sum(lengths), dict[int, int]()
    qkv = [torch.randn(1, S, 4, 8, requires_grad=True).transpose(1, 2) for _ in range(3)]  # as linears leave it

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y_1SHd, _ = packing.attention_by_row(module, *qkv, None, segments=lengths, is_causal=True)
        before = sum(kept.values())
        read = y_1SHd.square()
    assert sum(kept.values()) - before == copies * y_1SHd.nbytes
    del read
    runs, outputs = [(lengths[0], n), *((length, 1) for length in lengths[n:])], []
    parts = zip(*(x_1HSd.split([size * number for size, number in runs], dim=2) for x_1HSd in qkv), strict=True)
    for run, part in zip(runs, parts, strict=True):
        rows_nHsd = (x_1HSd.unflatten(2, run[::-1])[0].transpose(0, 1) for x_1HSd in part)
        outputs.append(packing.sdpa_attention_forward(module, *rows_nHsd, None, is_causal=True)[0].flatten(0, 1))
    joined_1SHd, dy_1SHd = torch.cat(outputs)[None], torch.randn(1, S, 4, 8)
    assert torch.equal(y_1SHd, joined_1SHd)
    pairs = zip(*(torch.autograd.grad(y, qkv, dy_1SHd) for y in (y_1SHd, joined_1SHd)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def narrow(name: str) -> nn.Module:
    """A model of two layers of which one at least sees four tokens back, or within four, and no further."""
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    sizes = SIZES | {"use_cache": False}  # as base models are loaded
    made: dict[str, Callable[[], nn.Module]] = {
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
        ),
        "qwen2_moe": lambda: Qwen2MoeForCausalLM(  # its attention is not told of the window
            Qwen2MoeConfig(**sizes, **experts, use_sliding_window=True, sliding_window=4, max_window_layers=2)
        ),
        "llama4": lambda: Llama4ForCausalLM(  # chunks
            Llama4TextConfig(**sizes, intermediate_size_mlp=48, head_dim=8, attention_chunk_size=4, moe_layers=[])
        ),
    }
    return made[name]().eval()


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen2_moe", "llama4"])
def test_a_window_or_chunk_shorter_than_a_row_is_kept(name):
    model, batch = narrow(name), pack(ROWS)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def found(logits: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
        return logits.detach(), torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)

    with packing.by_row():
        together = found(model(**likelihood.model_inputs(batch)).logits[0])
    alone = found(torch.cat([model(input_ids=torch.tensor([row.tokens])).logits[0] for row in ROWS]))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_flash_attention_is_told_where_rows_end(monkeypatch):
    """One call for a pack, and none that looks for rows in positions. Flash attention itself needs a GPU: in its place
    stands one that goes by what it is told alone."""
    told = []

    def flash(
        module, query_1HSd, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **options
    ):
        lengths = cu_seq_lens_q.diff().tolist()
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        assert (cu_seq_lens_q.dtype, max_length_q, max_length_k) == (torch.int32, max(lengths), max(lengths))
        told.append(lengths)
        return packing.attention_by_row(module, query_1HSd, key, value, None, segments=lengths, is_causal=True)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    torch.manual_seed(0)
    model, batch = LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), pack(ROWS)
    with packing.by_row():
        want = AnswerLosses(model)(model, batch)
    losses_of = AnswerLosses(model)
    model.config._attn_implementation = "flash_attention_2"
    losses_of.flash = True
    torch.testing.assert_close(losses_of(model, batch), want)
    assert told == 2 * [list(batch.lengths)]


def test_transformers_sees_no_other_attention_than_before():
    """Its models ask whether their attention is "sdpa", and would compute something else under another name."""
    model = llama()
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with packing.by_row():
        assert model.config._attn_implementation == "sdpa"
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is packing.attention_by_row
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.parametrize("packed", [True, False])
def test_every_gate_sees_every_token_where_last_layers_could_leave_some_out(packed):
    """Gemma 4's last layers read the keys of earlier ones; told how many positions to keep, they compute no others."""
    torch.manual_seed(0)
    sizes = SIZES | {"use_cache": False, "layer_types": 2 * ["full_attention"]}
    model = Gemma4ForCausalLM(
        Gemma4TextConfig(**sizes, head_dim=8, num_kv_shared_layers=1, hidden_size_per_layer_input=0)
    ).eval()
    attach(model, Method(name="m", r=2, num_experts=3, top_k=2, gate={"kind": "topk"}, target_modules=["up_proj"]))
    batch = pack(ROWS) if packed else collate(ROWS, 0)
    with packing.by_row():
        model(**likelihood.model_inputs(batch, keep_logits=True))
    seen = {r.logits_TS.shape[:-1].numel() for r in gates.pop_routings(model).values()}
    assert seen == {batch.input_ids_BS.numel()}


def test_models_that_cannot_pack_are_found_by_trying():
    with packing.by_row():
        assert packs_rows(llama())
    mamba = MambaConfig(vocab_size=256, hidden_size=32, state_size=4, num_hidden_layers=1)
    assert not packs_rows(MambaForCausalLM(mamba).eval())
    assert packs_rows(llama())  # transformers' own block mask


def test_models_that_padding_changes_are_found_by_trying():
    assert pads_rows(llama())
    assert pads_rows(MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=32, state_size=4)).eval())
    small = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    assert not pads_rows(RwkvForCausalLM(RwkvConfig(vocab_size=256, **small)).eval())


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_leak_is_told_from_rounding(monkeypatch, dtype, noise):
    """Rows of other lengths may be multiplied by other routines: noise that is the same beside any neighbour."""
    model = llama().to(dtype)
    forward = model.forward

    def noisy(input_ids, **options):
        found = forward(input_ids, **options)
        found.logits *= 1 + noise / input_ids.shape[1]
        return found

    def leaky(input_ids, position_ids=None, segments=(), **options):
        return forward(input_ids, **options)

    with packing.by_row():
        monkeypatch.setattr(model, "forward", noisy)
        assert packs_rows(model)
        monkeypatch.setattr(model, "forward", leaky)
        assert not packs_rows(model)


# ---- the loss


@pytest.mark.parametrize("bias", [False, True])
def test_chunked_nats_are_cross_entropy(bias, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", 3 * 50)
    torch.manual_seed(0)
    head, target_N = nn.Linear(8, 50, bias=bias).double().requires_grad_(False), torch.randint(0, 50, (11,))
    hidden_ND = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    weights_N = torch.rand(11, dtype=torch.float64)
    nats_N = ChunkedNats.apply(hidden_ND, head.weight, head.bias, target_N)
    expected_N = nn.functional.cross_entropy(head(hidden_ND), target_N, reduction="none")
    torch.testing.assert_close(nats_N, expected_N)
    found, expected = (torch.autograd.grad(n @ weights_N, hidden_ND)[0] for n in (nats_N, expected_N))
    torch.testing.assert_close(found, expected)


def test_full_logits_never_exist(monkeypatch):
    model = llama(torch.float32)
    some, widest = rows(*[(30, 2)] * 8), []
    losses = AnswerLosses(model)

    def spy(hidden_nD, W, b=None):
        if len(W) == 256:
            widest.append(hidden_nD.shape[:-1].numel())
        return real(hidden_nD, W, b)

    real = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", spy)
    monkeypatch.setattr(likelihood, "CHUNK", 4 * 256)
    for batch in (pack(some), collate(some, 0)):
        losses(model, batch)
    assert widest == [4] * 8


def test_labels_stand_where_they_are_predicted():
    """By hand, for a row with loss on its answer, one with loss on all of it, and a prompt of one token."""
    some = [Row("a", "t", (5, 6), (7, 8)), Row("b", "t", (9,), (10, 11), True), Row("c", "t", (12,), (13,))]
    line, padded = pack(some), collate(some, 0)
    assert line.input_ids_BS.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert padded.input_ids_BS.tolist() == [[5, 6, 7, 8], [0, 9, 10, 11], [0, 0, 12, 13]]
    for batch in (line, padded):
        assert batch.target_N.tolist() == [7, 8, 10, 11, 13]
        assert batch.row_N.tolist() == [0, 0, 1, 1, 2]
        assert (batch.lengths, batch.label_tokens) == ((4, 3, 2), (2, 2, 1))
    assert (line.kept_K.tolist(), line.source_N.tolist()) == ([1, 2, 4, 5, 7], [0, 1, 2, 3, 4])
    assert (padded.kept_K.tolist(), padded.source_N.tolist()) == ([1, 2], [0, 1, 2, 3, 5])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_models_that_cannot_leave_positions_out_give_the_same_losses(packed, keeps):
    model, batch = llama(), pack(ROWS) if packed else collate(ROWS, 0)
    losses = AnswerLosses(model)
    assert losses.nats.keep_logits
    with packing.by_row():
        expected = losses(model, batch)
        losses.nats.keep_logits = keeps
        torch.testing.assert_close(losses(model, batch), expected)
        losses.nats.head = None
        torch.testing.assert_close(losses(model, batch), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_a_soft_cap_on_the_logits_is_kept(packed):
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": 8, "final_logit_softcapping": 0.5, "attn_logit_softcapping": None}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, use_cache=False)).eval()
    assert plain_head(llama()) is not None
    assert plain_head(model) is None
    batch = pack(ROWS) if packed else collate(ROWS, 0)
    with torch.no_grad():
        found = AnswerLosses(model)(model, batch)
    for i, row in enumerate(ROWS):
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0]
        nats = nn.functional.cross_entropy(
            logits[row.silent - 1 : -1], torch.tensor(row.tokens[row.silent :]), reduction="sum"
        )
        assert float(found[i]) == pytest.approx(float(nats.detach()), rel=1e-5)
        assert batch.label_tokens[i] == len(row.answer_ids)


# ---- which rows stand together


def test_packs_are_even_whole_and_the_same_for_any_order():
    some = rows(*[(1 + 7 * i % 23, 1 + i % 4) for i in range(24)])
    for count in (1, 2, 4, 24):
        found = packs(some, count)
        assert sorted(row.id for pack in found for row in pack) == sorted(row.id for row in some)
        tokens = [sum(map(len, pack)) for pack in found]
        assert max(tokens) - min(tokens) <= max(map(len, some))
        assert [[r.id for r in p] for p in packs(some[::-1], count)] == [[r.id for r in p] for p in found]


@pytest.mark.parametrize("ranks", [1, 3])
def test_packs_keep_within_a_budget_and_are_as_many_on_every_rank(ranks):
    some = rows(*[(1 + 7 * i % 23, 1 + i % 4) for i in range(24)])
    for budget in (30, 60, 1000):
        found = packs_within(some, budget, ranks)
        assert len(found) % ranks == 0
        assert max(sum(map(len, pack)) for pack in found) <= budget
    assert len(packs_within(some, 1000, ranks)) == ranks


def test_padded_batches_hold_rows_of_like_length():
    for size, ranks in ((2, 1), (2, 2), (3, 2), (5, 4), (8, 1)):
        cut = padded_batches(ROWS, size, ranks)
        assert len(cut) % ranks == 0  # or one would wait for the others' forward
        assert 0 < max(map(len, cut)) <= size
        assert [row for batch in cut for row in batch] == sorted(ROWS, key=len)
        assert len(ROWS) < ranks or all(cut)
    found = padded_batches(ROWS, 2)
    assert [[len(row) for row in batch] for batch in found] == [[2, 8], [9, 9], [13]]

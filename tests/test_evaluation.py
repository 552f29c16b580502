"""Laws of scoring: the same scores however the work is split, and the standard harness's own on its prompts."""

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from built import busy, composed
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from mixlora import tasks
from mixlora.config.load import plain
from mixlora.config.schema import Answer, Backend, Config, Data, Eval, Mixture, Protocol, Splits, Style, Task, Template
from mixlora.config.typed import typed
from mixlora.errors import ConfigError, DataError, NumericsError
from mixlora.evaluation import harness, protocols
from mixlora.evaluation.batches import batches
from mixlora.evaluation.generation import GENERATION_VERSION, generate, own_ends
from mixlora.evaluation.likelihood import OptionScorer
from mixlora.evaluation.protocols import BY_STYLE, PROTOCOLS
from mixlora.evaluation.report import notes
from mixlora.evaluation.routing import expert_loads
from mixlora.evaluation.run import Evaluator, digest, in_order, result
from mixlora.evaluation.sandbox import Verdict
from mixlora.models import base, likelihood
from mixlora.parts import Parts
from mixlora.tasks import TaskData, fewshot
from mixlora.tasks.collate import Row
from mixlora.tasks.example import Example
from mixlora.tasks.parse import Reader, examples
from mixlora.tasks.prompts import Choice, Formatter, Prompt
from mixlora.tasks.styles import STYLES
from mixlora.tasks.table import table_of

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
GOLDEN, HUB = SHARED / "golden", SHARED / "data" / "hub"
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "lm_eval_parity.json").is_file() or not HUB.is_dir(),
    reason="needs ../shared/golden and ../shared/data",
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def task(name: str, **values) -> Task:
    read = typed(Task, yaml.safe_load((ROOT / "configs" / "task" / f"{name}.yaml").read_text(encoding="utf-8")))
    return replace(read, **values)


@lru_cache
def tiny() -> base.Base:
    """The tiny model of configs/model, with random weights and a byte tokenizer."""
    from mixlora.config.schema import Model

    keys = yaml.safe_load((ROOT / "configs" / "model" / "tiny.yaml").read_text(encoding="utf-8"))
    return base.load(typed(Model, keys), seed=3)


def evaluator(data: Data | None = None, shots=None, **options) -> Evaluator:
    loaded = tiny()
    return Evaluator(loaded.model, loaded.tokenizer, Eval(**options), data or Data(), shots or {})


ARC_ROW = {
    "question": "Which is warm?",
    "choices": {"text": ["the moon", "the sun at noon", "a stone"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
LETTERED = ARC_ROW | {"choices": ARC_ROW["choices"] | {"label": ["A", "B", "C"]}, "answerKey": "B"}
ROWS = {  # the hub's columns
    "arc_easy": ARC_ROW,
    "arc_challenge": ARC_ROW,
    "commonsense_qa": LETTERED,
    "openbookqa": {"question_stem" if k == "question" else k: v for k, v in LETTERED.items()},
    "boolq": {"question": "is it warm", "answer": True, "passage": "The sun shines."},
    "piqa": {"goal": "Get warm", "sol1": "Sit in the sun.", "sol2": "Sit on the moon.", "label": 0},
    "siqa": {
        "context": "Ann froze.", "question": "What will Ann do?", "answerA": "move", "answerB": "sleep",
        "answerC": "sing", "label": "3",
    },
    "hellaswag": {
        "activity_label": "Sun", "ctx": "A man sits. he", "ctx_a": "A man sits.", "ctx_b": "he",
        "endings": ["runs.", "eats.", "naps.", "flies"], "label": "3",
    },
    "winogrande": {"sentence": "Ann met Eve and _ smiled.", "option1": "Ann", "option2": "Eve", "answer": "2"},
}  # fmt: skip
WORDED = [(name, style) for name in ROWS for style in task(name).wordings]


def example_of(name: str, id: str | None = None) -> Example:
    return Reader.of(task(name))(ROWS[name], id or f"{name}/test/0")


def questions(number: int, seed: int = 0) -> list[Example]:
    """Questions and options of many lengths."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 60, (number, 5), generator=draw).tolist()
    alphabet = "abcdefghij klmnop"

    def text(size: int, start: int) -> str:
        return "x" + "".join(alphabet[(start * 7 + i * i) % len(alphabet)] for i in range(size))

    return [
        Example(
            id=f"t/test/{i}", task="t", question=text(row[0], i), answer="",
            options=tuple(text(size % 19, i + j) for j, size in enumerate(row[1 : 3 + i % 3], start=1)), gold=0,
        )
        for i, row in enumerate(sizes)
    ]  # fmt: skip


CHOICE = replace(task("arc_easy"), name="t")
TEXT = Task(
    name="t", path="x", question="{q}", answer="a", answer_kind=Answer.text, metric="exact_match", max_new_tokens=8
)


# ---- the same scores however the work is split


def slow_nats(model, choice: Choice) -> float:
    """One forward over one prompt and one option."""
    ids = [*choice.prompt.ids, *choice.answer_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    first = len(choice.prompt.ids)
    return sum(float(logits[i - 1, ids[i]]) for i in range(first, len(ids)))


def asked_of_all_kinds() -> list[list[Choice]]:
    """With one prompt, with prompts that differ at their end, and with prompts that share nothing."""
    form = Formatter(tiny().tokenizer, Data())
    return [
        *(form.choices(example) for example in questions(6)),
        [Choice(Prompt((9, 8, 7, 6, *end)), (11, 12, 13)[:n], "") for end, n in (((1, 2), 3), ((3,), 1), ((), 2))],
        [Choice(Prompt(start), (11, 12), "") for start in ((9, 8, 7), (5, 4, 3, 2))],
    ]


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "use_cache": False}
MODELS: dict[str, Callable[[int], Any]] = {
    # Its attention adds its mask, and its logits are more than its head's product.
    "gemma2": lambda V: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, vocab_size=V, head_dim=8, final_logit_softcapping=0.5, attn_logit_softcapping=5.0)
    ),
    "window": lambda V: MistralForCausalLM(MistralConfig(**SIZES, vocab_size=V, sliding_window=8)),
    "chunks": lambda V: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES, vocab_size=V, intermediate_size_mlp=48, head_dim=8, attention_chunk_size=8, moe_layers=[]
        )
    ),
    "gpt_neo": lambda V: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["local", "global"], 1]],
            window_size=8, max_position_embeddings=2048,
        )
    ),
    # Distances are counted in the line: one refuses the mask of a tree, the other takes it.
    "bloom": lambda V: BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)),
    "mpt": lambda V: MptForCausalLM(MptConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4, use_cache=False)),
    # Layers that go through the line; the last goes through its padding too.
    "mamba": lambda V: MambaForCausalLM(
        MambaConfig(vocab_size=V, hidden_size=32, state_size=4, num_hidden_layers=2, use_cache=False)
    ),
    "recurrent_gemma": lambda V: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            lru_width=32, use_cache=False,
        )
    ),
    "rwkv": lambda V: RwkvForCausalLM(
        RwkvConfig(
            vocab_size=V, hidden_size=32, attention_hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            use_cache=False,
        )
    ),
}  # fmt: skip
READ_TREES = ("gemma2", "window", "chunks")  # rows that are no longer than window and chunk


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name](len(tiny().tokenizer)).eval()


@pytest.mark.parametrize("name", ["tiny", *MODELS])
def test_a_tree_scores_as_one_forward_an_option(name):
    model, asked = tiny().model if name == "tiny" else model_of(name), asked_of_all_kinds()
    scorer, short = OptionScorer(model), asked[-2:]  # of at most 7 tokens, which windows and chunks leave whole
    for some in (asked, short):
        found = scorer(some, batch_size=3, batch_tokens=300, pad_id=0)
        for choices, nats in zip(some, found, strict=True):
            assert nats == pytest.approx([slow_nats(model, choice) for choice in choices], abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_attention_reads_no_trees_are_found_by_trying(name):
    scorer = OptionScorer(model_of(name))
    assert (scorer.masks is not None) is (name in READ_TREES)
    assert scorer.pads is (name != "rwkv")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma2", "mamba", "mpt"])
def test_they_are_found_in_half_precision_too(name, dtype):
    assert (OptionScorer(model_of(name).to(dtype)).masks is not None) is (name in READ_TREES)


def test_only_questions_longer_than_the_window_are_asked_one_option_a_row():
    scorer, asked = OptionScorer(model_of("window")), asked_of_all_kinds()
    longest = [max(len(c.prompt.ids) + len(c.answer_ids) for c in choices) for choices in asked]
    assert min(longest) <= scorer.reach == 8 < max(longest)
    for choices, length in zip(asked, longest, strict=True):
        if choices is not asked[-1]:  # whose prompts share nothing
            assert len(scorer.planted(choices)) == (1 if length <= 8 else len(choices))


def test_scores_of_another_attention_are_of_another_protocol():
    """Those of eager attention were wrong, and must not be taken from an earlier version's results."""
    usual = evaluator().describe(CHOICE)
    assert "attention" not in usual
    eager = replace(evaluator(), model=model_of("gemma2"))
    assert eager.describe(CHOICE) | {"max_length": usual["max_length"]} == usual | {"attention": "eager"}
    assert "attention" not in eager.describe(TEXT)


def test_logits_are_computed_for_the_tokens_of_options_alone(monkeypatch):
    model, asked, computed = tiny().model, asked_of_all_kinds(), []
    scorer, head = OptionScorer(model), model.get_output_embeddings().weight

    def spy(x, W, b=None):
        if W is head:
            computed.append(x.shape[:-1].numel())
        return real(x, W, b)

    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    monkeypatch.setattr(likelihood, "CHUNK", 4 * len(head))
    scorer(asked, batch_size=3, batch_tokens=300, pad_id=0)
    assert sum(computed) == sum(len(choice.answer_ids) for choices in asked for choice in choices)
    assert max(computed) == 4


def test_option_scores_do_not_depend_on_the_batch():
    runs = [evaluator(batch_size=size)(CHOICE, questions(20), "") for size in (1, 3, 16)]
    runs.append(evaluator(batch_tokens=500)(CHOICE, questions(20), ""))
    for run in runs[1:]:
        assert [p["prediction"] for p in run] == [p["prediction"] for p in runs[0]]
        for one, other in zip(run, runs[0], strict=True):
            assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}])
def test_generations_do_not_depend_on_the_batch(options):
    examples = [replace(example, options=(), gold=None, answer="a") for example in questions(11)]
    runs = [[p["prediction"] for p in evaluator(batch_size=size, **options)(TEXT, examples, "")] for size in (1, 3, 16)]
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0])) > 5
    if options:
        some = [p["prediction"] for p in evaluator(**options)(TEXT, examples[5:8], "")]
        assert some == runs[0][5:8]


@pytest.mark.parametrize("name", MODELS)
def test_generations_of_other_models_do_not_depend_on_the_batch(name):
    model, prompts = model_of(name), [(5, 6, 7), (9,), (8, 3) * 6, (3, 4)]  # shorter and longer than window and chunk
    pads = OptionScorer(model).pads
    alone, together = (
        generate(model, tiny().tokenizer, prompts, max_new_tokens=8, batch_size=size, pads=pads)
        for size in (1, len(prompts))
    )
    assert together == alone
    assert len(set(alone)) > 2


def test_answers_follow_the_rules_given_and_none_that_a_model_brings():
    """As of Qwen2.5, whose file penalises repetition, and asks for samples."""
    prompts, ask = [(5, 6), (9, 10, 11)], partial(generate, tokenizer=tiny().tokenizer, max_new_tokens=12, batch_size=2)
    model = copy.deepcopy(tiny().model)
    model.generation_config.update(repetition_penalty=1.9, no_repeat_ngram_size=1, do_sample=True, temperature=0.7)
    brought = model.generation_config.to_dict()
    for options in ({}, {"beams": 2}, {"temperature": 0.8, "seeds": (1, 2)}):
        assert ask(model, prompts=prompts, **options) == ask(tiny().model, prompts=prompts, **options)
    assert model.generation_config.to_dict() == brought


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}])
def test_an_answer_ends_where_the_template_ends_it_whatever_the_model_knows(options):
    """A base model with a chat template, as Qwen2.5's, ends a text with another token than an answer. Here that token
    is one that the model says, and an ordinary one, which the text must not show."""
    (example,) = (replace(example, options=(), gold=None, answer="a") for example in questions(1))
    asked = evaluator(**options)
    (whole,) = asked(TEXT, [example], "")
    end = next(c for c in whole["prediction"] if c.isascii())  # of the others some are parts of a character
    before, _, after = whole["prediction"].partition(end)
    (token,) = tiny().tokenizer(end)["input_ids"]
    assert token not in (*asked.formatter.end_ids, *own_ends(tiny().model, tiny().tokenizer))
    assert before
    assert after
    asked.formatter.layout.end_ids = [token]
    (ended,) = asked(TEXT, [example], "")
    assert ended["prediction"] == before
    assert asked.describe(TEXT)["generation"] == GENERATION_VERSION
    assert "generation" not in asked.describe(CHOICE)


def test_rows_are_not_padded_where_that_changes_them():
    model, examples = model_of("rwkv"), questions(7)
    runs = [replace(evaluator(batch_size=size), model=model) for size in (1, 16)]
    nats = [[p["log_likelihoods"] for p in run(CHOICE, examples, "")] for run in runs]
    for one, other in zip(*nats, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    asked = [replace(example, options=(), gold=None, answer="a") for example in examples]
    assert len({len(example.question) for example in asked}) > 1
    one, other = ([p["prediction"] for p in run(TEXT, asked, "")] for run in runs)
    assert one == other


def test_a_sample_is_the_one_that_transformers_draws_after_its_seed():
    """However many are drawn together, and without a trace in the generator that training uses."""
    loaded, prompts, seeds = tiny(), [[5, 6, 7], [9], [8, 8, 8, 8, 8], [3, 4]], [11, 12, 13, 14]
    state = torch.get_rng_state()
    found = generate(
        loaded.model, loaded.tokenizer, prompts, max_new_tokens=12, batch_size=3, temperature=0.7, seeds=seeds
    )
    assert torch.equal(torch.get_rng_state(), state)
    for prompt, seed, text in zip(prompts, seeds, found, strict=True):
        torch.manual_seed(seed)
        ids = torch.tensor([prompt])
        keys = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 12}
        keys |= {"attention_mask": torch.ones_like(ids), "pad_token_id": loaded.tokenizer.pad_token_id}
        out = loaded.model.generate(ids, **keys)[0, len(prompt) :]
        assert text == loaded.tokenizer.decode(out, skip_special_tokens=True)


CODE = Task(
    name="t", path="x", question="{q}", answer="a", answer_kind=Answer.code, metric="pass@1", tests="x",
    max_new_tokens=6,
)  # fmt: skip


class Judge:
    """Stands for the sandbox: a program passes where its letters add up to an even number."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def judge(self, pairs):
        passed = [sum(map(ord, program)) % 2 == 0 for _, program in pairs]
        return [Verdict("", p, "passed" if p else "failed", 0.0, "none") for p in passed]


def code(number: int) -> list[Example]:
    return [
        replace(e, options=(), gold=None, answer="a", tests="assert f() == 1", entry_point="f")
        for e in questions(number)
    ]


def test_every_sample_is_judged_and_depends_on_nothing_but_its_seed(monkeypatch):
    monkeypatch.setattr("mixlora.evaluation.code.Sandbox", Judge)
    examples = code(5)
    runs = [evaluator(num_samples=10, temperature=0.9, batch_size=size)(CODE, examples, "") for size in (1, 3, 16)]
    assert runs[0] == runs[1] == runs[2]
    assert evaluator(num_samples=10, temperature=0.9)(CODE, examples[1::2], "") == runs[0][1::2]  # of two processes
    one = evaluator(temperature=0.9)(CODE, examples, "")
    for row, single in zip(runs[0], one, strict=True):
        replies = [sample["reply"] for sample in row["samples"]]
        assert len(set(replies)) > 5
        assert replies[0] == row["prediction"] == single["prediction"]
        right = sum(sample["verdict"] == "passed" for sample in row["samples"])
        assert row["pass@1"] == pytest.approx(right / 10)
        assert row["pass@10"] == float(right > 0)
        assert "pass@100" not in row
        assert [s["verdict"] for s in single["samples"]] == [["failed", "passed"][int(single["pass@1"])]]
        assert "pass@10" not in single
    scorer = evaluator(num_samples=10, temperature=0.9)
    found = result(CODE, runs[0], scorer.protocol)
    shares = torch.tensor([row["pass@1"] for row in runs[0]], dtype=torch.float64)
    assert found["metric"] == "pass@1"
    assert found["n"] == 5
    assert found["value"] == pytest.approx(float(shares.mean()))
    assert found["stderr"] == found["stderrs"]["pass@1"] == pytest.approx(float(shares.std() / 5**0.5))
    assert found["metrics"].keys() == found["stderrs"].keys() == {"pass@1", "pass@10"}
    assert 0 < found["value"] < found["metrics"]["pass@10"] == 1
    assert scorer.describe(CODE)["num_samples"] == 10
    told = notes({"t": found | {"protocol": scorer.describe(CODE)}})[-1]
    assert re.fullmatch(r"t, 10 samples: pass@1 [\d.]+ ± [\d.]+, pass@10 100\.0 ± 0\.0", told)
    assert "num_samples" not in scorer.describe(TEXT)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["humaneval"], {"num_samples": 0, "temperature": 0.8}, r"eval\.num_samples must be at least 1"),
        (["humaneval"], {"temperature": -1.0}, r"eval\.temperature must be at least 0"),
        (["humaneval"], {"num_samples": 10}, r"same greedy answer 10 times.*eval\.temperature=0\.8"),
        (["arc_easy", "gsm8k"], {"num_samples": 10, "temperature": 0.8}, r"none is scored here: arc_easy, gsm8k"),
    ],
)
def test_samples_that_would_be_of_no_use_are_refused(names, options, message):
    mixture = {name: task(name) for name in names}
    with pytest.raises(ConfigError, match=message):
        protocols.check(Config(tasks=Mixture(name="mix", mixture=mixture), eval=Eval(**options)))


def test_pass_at_10_needs_ten_samples():
    mixture = {"boolq": task("boolq"), "mbpp": task("mbpp", metric="pass@10")}
    config = Config(tasks=Mixture(name="mix", mixture=mixture), eval=Eval(num_samples=9, temperature=0.8))
    with pytest.raises(ConfigError, match=r"task mbpp: pass@10 needs eval\.num_samples of at least 10, got 9"):
        protocols.check(config)
    config.eval.num_samples = 10
    protocols.check(config)


def test_batches_keep_to_both_limits_and_lose_nothing():
    lengths = [5, 90, 7, 7, 30, 200, 3, 3, 3, 3]
    found = list(batches(lengths, 3, 100))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100


def test_a_batch_has_no_more_padding_than_is_spared():
    lengths = [5, 90, 7, 7, 30, 200, 3, 3, 3, 3]
    for spare in (0, 1, 2, 10, 1000):
        found = list(batches(lengths, 4, 400, spare))
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
        padding = [len(batch) * max(lengths[i] for i in batch) - sum(lengths[i] for i in batch) for batch in found]
        assert max(padding) <= spare
    assert found == list(batches(lengths, 4, 400))
    assert list(batches([3, 9, 3, 7, 9], 4, 400, 0)) == [[1, 4], [3], [0, 2]]


def broken(*ids: int) -> Any:
    """The tiny model, in which nothing after one of these tokens is a number; after any where none are given."""
    model = copy.deepcopy(tiny().model)
    with torch.no_grad():
        model.get_input_embeddings().weight[list(ids) if ids else slice(None)] = float("nan")
    return model


def test_scores_that_are_no_numbers_are_refused_in_place_of_taking_the_first_option():
    examples, mark = questions(3), tiny().tokenizer("?")["input_ids"][-1]
    last = examples[2] = replace(examples[2], question="Is it?")
    assert not any("?" in example.question for example in examples[:2])
    with pytest.raises(NumericsError, match=rf"{last.id} are not finite \(nan, nan.*model.dtype=bfloat16"):
        replace(evaluator(), model=broken(mark))(CHOICE, examples, "")
    with pytest.raises(NumericsError, match="not finite, even of a few tokens"):
        OptionScorer(broken())
    with pytest.raises(NumericsError, match="document 1 are not finite"):
        harness.predictions(CHOICE, [sample(0, -1.0), sample(1, math.nan)])


def sample(document: int, nats: float) -> dict[str, Any]:
    """As lm-evaluation-harness logs it."""
    return {"doc_id": document, "arguments": [("Is it?", " a")], "resps": [[(nats, False)]], "target": 0, "acc": 1.0}


@pytest.mark.parametrize("options", [{}, {"beams": 2}, {"temperature": 1.0, "seeds": range(3)}])
def test_texts_of_logits_that_are_no_numbers_are_refused(options):
    prompts = [(5, 6), (7, 8), (9, 10, 11)]
    ask = partial(generate, tokenizer=tiny().tokenizer, max_new_tokens=2, batch_size=2, **options)
    assert len(ask(tiny().model, prompts=prompts)) == 3
    with pytest.raises(NumericsError, match="logits were not finite after one of 2 prompts"):
        ask(broken(10), prompts=prompts)


def test_a_model_says_how_many_tokens_it_was_made_for_or_nothing():
    assert base.window(tiny().model) == 2048
    assert base.window(model_of("gpt_neo")) == 2048
    assert {base.window(model_of(name)) for name in ("bloom", "mpt", "mamba")} == {None}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    config = MistralConfig(**SIZES, max_position_embeddings=64, rope_parameters=yarn)
    assert base.window(SimpleNamespace(config=config)) == 256
    # Llama 3.2's: turned as if for 32 times 8,192 tokens, trained for a half of that.
    llama = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 16}
    llama |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(**SIZES, max_position_embeddings=256, rope_parameters=llama)
    assert base.window(SimpleNamespace(config=config)) == 256


@pytest.mark.parametrize(("name", "asked", "length"), [
    ("tiny", None, 2048), ("tiny", 4096, 2048), ("tiny", 512, 512), ("mpt", None, 2048),
    ("mpt", 4096, 4096), ("mpt", 9, 9),
])  # fmt: skip
def test_what_is_asked_for_is_the_length_within_a_window_that_a_model_names(name, asked, length):
    model = tiny().model if name == "tiny" else model_of(name)
    assert replace(evaluator(max_length=asked), model=model).max_length == length


def test_a_missing_prediction_is_an_error():
    examples = questions(3)
    predictions = [{"id": example.id} for example in reversed(examples)]
    assert [p["id"] for p in in_order(predictions, examples)] == [e.id for e in examples]
    for wrong, message in (
        (predictions[1:], "1 examples have no prediction: t/test/2"),
        ([*predictions, {"id": "t/test/9"}], "1 predictions have no example: t/test/9"),
        ([*predictions, predictions[0]], "t/test/2 has two predictions"),
    ):
        with pytest.raises(DataError, match=message):
            in_order(wrong, examples)


def test_a_process_without_examples_has_nothing_to_do():
    """A set smaller than the number of processes leaves some of them with none."""
    for kind in (CHOICE, TEXT):
        assert evaluator()(kind, [], "") == []


def test_loads_of_experts_count_tokens_and_no_padding():
    """However rows share a batch: each token chooses two of the eight experts."""
    model, _ = busy(composed("mole"))
    rows = {
        "long": [Row(str(n), "long", tuple(range(3, 3 + n)), (7, 8)) for n in (1, 30, 4)],
        "short": [Row("", "short", (5, 6), (7,))],
    }
    one, together = (expert_loads(model, rows, Eval(batch_size=size), 0, pads=True) for size in (1, 3))
    assert one == together
    assert one.keys() == {"long", "short"}
    for task_name, tokens in (("long", 35 + 6), ("short", 3)):
        assert {sum(load) for load in one[task_name].values()} == {2 * tokens}
        assert {len(load) for load in one[task_name].values()} == {8}


# ---- protocols


def test_every_protocol_is_in_the_table_and_every_style_has_one():
    assert {*PROTOCOLS, Protocol.auto} == set(Protocol)
    assert set(BY_STYLE) == set(Style) == set(STYLES)
    assert BY_STYLE[Style.letters].name is Protocol.letters


@pytest.mark.parametrize(("name", "style"), WORDED)
def test_a_wording_trains_what_its_protocol_reads(name, style):
    """The right answer as training spells it is read as right; a wrong one as wrong."""
    example, kind = example_of(name), STYLES[Style(style)]
    protocol = BY_STYLE[Style(style)]
    form = Formatter(tiny().tokenizer, Data(style=Style(style)))
    turns = kind.turns(example)
    assert kind.right(example) == turns[example.gold]
    assert len(turns) == len(example.options)
    assert "{" not in turns[0].question
    shown = form.show(example)
    assert turns[example.gold].answer in shown
    assert "<|start|>" not in shown
    if protocol.name is Protocol.llm_adapters:
        labels, known = kind.labels(example)
        read = [protocol.extract(turn.answer, known, example.options) for turn in turns]
        assert read == list(labels)
    if protocol.name is Protocol.moe_peft:
        assert {turn.answer for turn in turns} <= set(kind.labels(example)[1])


@pytest.mark.parametrize("protocol", Protocol)
def test_a_protocol_scores_and_says_what_it_did(protocol):
    scorer = evaluator(protocol=protocol)
    arc = task("arc_easy", max_new_tokens=8)
    predictions = scorer(arc, [example_of("arc_easy", f"arc_easy/test/{i}") for i in range(3)], "")
    found = result(arc, predictions, scorer.protocol)
    assert found["n"] == 3
    assert found["metric"] in found["metrics"]
    assert scorer.describe(arc)["name"] == (protocol.value if protocol is not Protocol.auto else "loglikelihood")
    assert json.loads(json.dumps(predictions)) == predictions


def test_no_two_protocols_share_a_fingerprint():
    arc = task("arc_easy")
    forms = {p: evaluator(protocol=p).fingerprint(arc) for p in PROTOCOLS if p is not Protocol.generate}
    assert len(set(forms.values())) == len(forms)
    shot = {"arc_easy": [example_of("arc_easy", "arc_easy/train/0")]}
    assert evaluator(protocol=Protocol.lm_eval, shots=shot).fingerprint(arc) != forms[Protocol.lm_eval]


def test_prompts_that_end_in_a_line_break_have_another_fingerprint_than_without():
    """And no others: those of options, and of cues with words at the end, are what recipes have pinned."""
    scorer, known = evaluator(Data(template=Template.plain)), []
    for name, cue in [("mbpp", "\nAnswer:\n"), ("mbpp", "\nAnswer:"), ("arc_easy", "\nAnswer:\n")]:
        asked = replace(task(name), cue=cue)
        words = {key: plain(asked)[key] for key in ("question", "cue", "options", "wordings")}
        known.append(scorer.fingerprint(asked) == digest([scorer.formatter.fingerprint, words, [], scorer.max_length]))
    assert known == [False, True, True]


def test_llm_adapters_prints_its_frame():
    turn = STYLES[Style.llm_adapters].turns(example_of("winogrande"))[1]
    blanks = " " * 16
    assert turn.question + turn.cue + turn.answer == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        f"{blanks}### Instruction:\n{blanks}Please choose the correct answer to fill in the blank to complete the "
        "given sentence: Ann met Eve and _ smiled.\n\nOption1: Ann Option2: Eve Answer format: option1/option2\n\n"
        f"{blanks}### Response:\n{blanks}the correct answer is option2"
    )
    piqa = STYLES[Style.llm_adapters].turns(example_of("piqa"))[0].question
    assert "Solution1: Sit in the sun.\n\nSolution2: Sit on the moon.\n\nAnswer format: solution1/solution2" in piqa


def test_moe_peft_takes_the_likeliest_label_token():
    example, scorer = example_of("arc_easy"), evaluator(protocol=Protocol.moe_peft)
    (prediction,) = scorer(task("arc_easy"), [example], "")
    listed = "(1) the moon (2) the sun at noon (3) a stone"
    prompt = f"Please choose the correct answer to the question: Which is warm? {listed}\nAnswer:"
    ids = tiny().tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = tiny().model(torch.tensor([ids])).logits[0, -1]
    known = ["1", "2", "3", "4", "A", "B", "C", "D", "E"]
    last = [tiny().tokenizer(" " + label)["input_ids"][-1] for label in known]
    assert prediction["prediction"] == known[int(logits[last].argmax())]
    assert prediction["target"] == "2"


def test_a_task_without_options_is_asked_in_its_own_words():
    example = replace(questions(1)[0], options=(), gold=None)
    for style in Style:
        form = Formatter(tiny().tokenizer, replace(Data(), style=style))
        assert STYLES[style].turns(example)[0].question == example.question
        assert tiny().tokenizer.decode(form.prompt(example).ids).count(example.question) == 1


# ---- solved examples before the question


def shots_of(number: int) -> list[Example]:
    return [
        replace(q, id=f"t/train/{i}", answer="yes", options=("yes", "no")) for i, q in enumerate(questions(number, 9))
    ]


def test_shots_are_drawn_by_seed_and_never_from_what_is_scored():
    train = shots_of(40)
    scored = [replace(train[i], id=f"t/test/{i}") for i in range(0, 40, 2)]
    drawn = fewshot.draw("t", train, scored, 5, 0)
    assert len({shot.id for shot in drawn}) == 5
    assert all(int(shot.id.rpartition("/")[2]) % 2 for shot in drawn)
    assert fewshot.draw("t", train, scored, 5, 0) == drawn
    assert fewshot.draw("t", train, scored, 3, 0) == drawn[2:]
    assert fewshot.draw("t", train, scored, 5, 1) != drawn
    with pytest.raises(DataError, match=r"num_fewshot=21, but task t has 20"):
        fewshot.draw("t", train, scored, 21, 0)


@pytest.mark.parametrize("template", ["auto", "plain"])
@pytest.mark.parametrize("style", [Style.cloze, Style.letters])
def test_what_does_not_fit_loses_shots_first_and_never_the_end(template, style):
    form = Formatter(tiny().tokenizer, Data(style=style, template=Template(template)))
    example, shots = replace(questions(1)[0], question="the question " * 3), shots_of(3)
    whole = form.choices(example, shots=shots)[0].prompt
    bare = form.choices(example)[0].prompt
    text = tiny().tokenizer.decode(whole.ids)
    assert all(shot.question in text for shot in shots)
    assert text.index(shots[0].question) < text.index(shots[2].question) < text.index(example.question)
    longest = max(len(choice.answer_ids) for choice in form.choices(example))
    for room in range(len(whole.ids), len(bare.ids) // 2, -1):
        cut = form.choices(example, shots=shots, max_length=room + longest)[0].prompt
        assert len(cut.ids) <= room
        assert cut.ids[-5:] == whole.ids[-5:]
        assert cut.tokens_cut == 0 or cut.shots_cut == 3
        assert cut.tokens_cut == (max(0, len(bare.ids) - room) if cut.shots_cut == 3 else 0)
    assert cut.tokens_cut > 0


def test_answers_that_have_no_end_are_counted_and_said():
    task, examples = replace(TEXT, max_new_tokens=5), [replace(one, options=(), gold=None) for one in questions(4)]
    scorer = evaluator()
    predictions = scorer(task, examples, "")
    found = result(task, predictions, scorer.protocol)["cut"]["replies"]
    endless = []
    prompts = [scorer.formatter.prompt(one).ids for one in examples]
    ends = {"ends": scorer.formatter.end_ids, "max_new_tokens": 5, "batch_size": 2}
    said = generate(scorer.model, scorer.tokenizer, prompts, on_cut=endless.append, **ends)
    assert [p["replies_cut"] for p in predictions] == [int(i in endless) for i in range(4)]
    assert found == len(endless) > 0  # a model of random weights
    stopped = generate(
        scorer.model, scorer.tokenizer, prompts, on_cut=pytest.fail, stop=[*{t[:1] for t in said}], **ends
    )
    assert stopped == [""] * 4
    told = notes(
        {"t": {"metric": "acc", "value": 0.5, "n": 4, "cut": {"replies": 3}, "protocol": {"max_new_tokens": 5}}}
    )
    assert "t: 3 of 4 answers had no end within 5 tokens (max_new_tokens of the task)" in told


BEAMS = {"protocol": Protocol.llm_adapters}
NUMBER = replace(TEXT, answer_kind=Answer.number, metric="flexible", stop=["\nQuestion:"])


@pytest.mark.parametrize(
    ("kind", "options", "stop", "stop_after_shots", "beams", "temperature", "new"),
    [
        (CHOICE, {"protocol": Protocol.generate}, [], ["\n\n"], 1, 0.0, 64),
        (CHOICE, BEAMS, [], ["\n\n"], 4, 0.0, 32),
        (TEXT, {}, [], ["\n\n"], 1, 0.8, 8),
        (replace(TEXT, stop=["."]), BEAMS, ["."], [".", "\n\n"], 1, 0.8, 8),
        (NUMBER, BEAMS, ["\nQuestion:"], ["\nQuestion:"], 1, 0.8, 8),
    ],
)
def test_an_answer_is_generated_as_its_kind_is_and_as_results_say(
    monkeypatch, kind, options, stop, stop_after_shots, beams, temperature, new
):
    """Options greedily, by the protocol's beams; short answers end where a next example would begin, reasoning not."""
    seen: list[dict[str, Any]] = []

    def spy(model, tokenizer, prompts, **keys):
        seen.append(keys | {"prompts": prompts})
        return ["#### 1"] * len(prompts)

    monkeypatch.setattr("mixlora.evaluation.run.generate", spy)
    asked = example_of("arc_easy") if kind is CHOICE else replace(example_of("arc_easy"), options=(), gold=None)
    asked, solved = replace(asked, question="Is it? " * 100), replace(asked, id="t/train/0")
    for shots, ends in (({}, stop), ({"t": [solved]}, stop_after_shots)):
        scorer = evaluator(shots=shots, temperature=0.8, max_length=200, **options)
        scorer(kind, [asked], "")
        keys, said = seen[-1], scorer.describe(kind)
        by = {"stop": ends, "temperature": temperature, "max_new_tokens": new}
        assert {name: keys[name] for name in by} == {name: said[name] for name in by} == by
        assert (keys["beams"], keys["seeds"]) == (beams, [scorer.sample_seed(asked)])
        assert keys["ends"] == scorer.formatter.end_ids
        assert [len(prompt) for prompt in keys["prompts"]] == [200 - new]


def test_a_sample_is_of_its_seed_and_its_example():
    examples = [replace(one, options=(), gold=None, answer="a") for one in questions(2)]
    scorer = evaluator(temperature=0.9)
    seeds = [
        replace(scorer, seed=seed).sample_seed(one, sample) for seed in (0, 1) for one in examples for sample in (0, 1)
    ]
    assert len({*seeds}) == 8
    one, again, other = (
        [p["prediction"] for p in replace(scorer, seed=seed)(TEXT, examples, "")] for seed in (0, 0, 1)
    )
    assert one == again
    assert not {*one} & {*other}


def test_an_option_is_weighed_by_its_bytes_and_by_its_tokens():
    """The tokenizer has a token a byte, and one more for the blank before an option."""
    examples = [replace(one, options=("\u65e5\u672c", "a", "caf\u00e9 au lait"), gold=1) for one in questions(8)]
    for row in evaluator(data=Data(template=Template.plain))(CHOICE, examples, ""):
        nats, lengths, tokens = row["log_likelihoods"], [6, 1, 13], [7, 2, 14]
        assert (row["lengths"], row["tokens"]) == (lengths, tokens)
        for name, sizes in (("acc", [1] * 3), ("acc_norm", lengths), ("acc_token", tokens)):
            best = max(range(3), key=lambda i: nats[i] / sizes[i])
            assert row[name] == float(best == 1)


def test_what_was_cut_is_counted():
    scorer = evaluator(shots={"t": shots_of(3)}, max_length=64)
    predictions = scorer(CHOICE, questions(8), "")
    found = result(CHOICE, predictions, scorer.protocol)["cut"]
    assert found["shots"] == sum(p["shots_cut"] for p in predictions) > 0
    assert found["tokens"] == sum(p["tokens_cut"] for p in predictions) > 0
    assert 0 < found["prompts"] <= 8
    told = notes({"t": {"metric": "acc", "value": 0.5, "n": 8, "cut": found}})
    assert f"t: {found['prompts']} of 8 prompts were too long and lost shots or their beginning" in told
    assert scorer.describe(CHOICE)["shots"] == ["t/train/0", "t/train/1", "t/train/2"]


def test_the_printed_results_say_that_the_first_rows_were_scored():
    whole, part = ({"metric": "acc", "value": 0.5, "n": n, "limit": limit} for n, limit in ((4, None), (3, 3)))
    short = part | {"n": 2}  # all that there are
    assert not [line for line in notes({"t": whole, "u": short}) if "the first" in line]
    assert "n=3: the first 3 rows (eval.limit)" in notes({"t": part, "u": short, "v": part})


# ---- parity with lm-evaluation-harness


@lru_cache
def golden() -> tuple[dict, base.Base, base.Base]:
    recorded = json.loads((GOLDEN / "lm_eval_parity.json").read_text(encoding="utf-8"))["tasks"]
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny_model", dtype=torch.float32).eval()
    with_bos, without = (AutoTokenizer.from_pretrained(GOLDEN / "tiny_model") for _ in range(2))
    from tokenizers.processors import ByteLevel

    without.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    assert without("a")["input_ids"] == with_bos("a")["input_ids"][1:]
    return recorded, base.Base(model, with_bos), base.Base(model, without)


HARNESS = ("arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande", "boolq")


@needs_golden
@pytest.mark.parametrize("bos", ["", "_no_bos"])
@pytest.mark.parametrize("name", HARNESS)
def test_scores_are_those_of_lm_evaluation_harness(name, bos):
    recorded, with_bos, without = golden()
    loaded = without if bos else with_bos
    chosen = task(name, eval_only=True)
    if name == "boolq":  # the harness reads SuperGLUE's copy
        chosen = replace(chosen, **SUPER_GLUE)
    chosen = replace(chosen, splits=Splits(test=recorded[name]["split"]))
    data = tasks.load_task(chosen, Data(source=str(HUB)))
    assert data.fingerprints["test"] == recorded[name]["data_sha256"]
    scorer = Evaluator(loaded.model, loaded.tokenizer, Eval(protocol=Protocol.lm_eval, batch_size=7), Data())
    predictions = scorer(chosen, data.test[:50], "")
    for prediction, doc in zip(predictions, recorded[name]["examples"], strict=True):
        wanted = doc[f"ll{bos}"]
        assert prediction["target"] == doc["gold"]
        for found, ll in zip(prediction["log_likelihoods"], wanted, strict=True):
            assert abs(found - ll) <= 1e-4 + 1e-6 * abs(ll), (name, doc["doc_id"])
        assert (prediction["acc"], prediction["acc_norm"]) == (doc[f"acc{bos}"], doc[f"acc_norm{bos}"]), doc["doc_id"]
    scores = result(chosen, predictions, scorer.protocol)["metrics"]
    assert (scores["acc"], scores["acc_norm"]) == (recorded[name][f"acc{bos}"], recorded[name][f"acc_norm{bos}"])


# The harness's own file of each task, under its folder of tasks; boolq is SuperGLUE's copy there.
HARNESS_FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "siqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}
SUPER_GLUE = {"path": "aps/super_glue", "config": "boolq", "answer": "label", "answer_values": [0, 1]}
MARKED = {  # as WikiHow's marks stand in the original set
    "activity_label": "Home and Garden", "ctx_a": " [header] How to sow [title] Find  a   pot. [step] Fill it. ",
    "ctx_b": "with EARTH",
    "endings": [" [substeps] Any will do.  ", "[title] Wait. [step] Go on.", "a] b [c", "It  is."],
}  # fmt: skip


def real_rows(chosen: Task) -> list[dict]:
    """Some rows of the split that is scored, and all with marks."""
    rows = pq.read_table(HUB / chosen.path / chosen.config / f"{chosen.splits.test}.parquet").to_pylist()
    marked = [row for row in rows if "[" in str(row.get("ctx", row.get("endings", ""))) and "endings" in row]
    extra = [rows[0] | MARKED] if chosen.name == "hellaswag" else []
    return [*rows[:: len(rows) // 60], *marked, *extra]


def requests_of_the_harness(name: str, path: Path, split: str) -> list[list[tuple[str, str]]]:
    """(context, continuation) of every option of every row, as the harness builds them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    file = Path(lm_eval.__file__).parent / "tasks" / HARNESS_FILES[name]
    local = path.with_suffix(".yaml")
    local.write_text(
        f"include: {file}\ntask: local_{name}\ndataset_path: parquet\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{{split}: {path}}}}}\ntraining_split: null\nfewshot_split: null\n"
        f"test_split: {split}\nvalidation_split: null\n"
    )
    harness_task = TaskManager(include_defaults=False).load(str(local))["tasks"][f"local_{name}"]
    harness_task.build_all_requests()
    found: dict[int, list[tuple[str, str]]] = {}
    for request in harness_task.instances:
        found.setdefault(request.doc_id, []).append(request.args)
    return [found[i] for i in range(len(found))]


def requests_of_ours(example: Example) -> list[tuple[str, str]]:
    turns = STYLES[Style.lm_eval].turns(example)
    return [(t.question + t.cue, ("" if t.cue[-1:].isspace() else " ") + t.answer) for t in turns]


@pytest.mark.skipif(not HUB.is_dir(), reason="needs ../shared/data/hub")
@pytest.mark.parametrize("name", HARNESS_FILES)
def test_requests_are_those_of_lm_evaluation_harness(name, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chosen = task(name, **(SUPER_GLUE if name == "boolq" else {}))
    rows = real_rows(chosen)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found, _ = examples(chosen, table_of(rows, "rows"), "test")
    theirs = requests_of_the_harness(name, path, "test")
    assert len(theirs) == len(found) >= 60
    for example, requests in zip(found, theirs, strict=True):
        assert requests_of_ours(example) == requests, example.id
        if name != "winogrande":  # the harness divides by its continuation's characters, without the blank before it
            turns = STYLES[Style.lm_eval].turns(example)
            assert [turn.length for turn in turns] == [len(continuation) - 1 for _, continuation in requests]


def test_every_task_that_the_harness_knows_is_compared_with_it():
    names = [path.stem for path in (ROOT / "configs" / "task").glob("*.yaml")]
    wordings = {name: task(name).wordings.get("lm_eval") for name in names}
    assert {name for name, worded in wordings.items() if worded and worded.harness_task} == set(HARNESS_FILES)


def test_what_a_task_cannot_do_is_refused_before_anything_is_loaded():
    def check(*names: str, data: Data | None = None, **options):
        mixture = Mixture(name="mix", mixture={name: task(name) for name in names})
        protocols.check(Config(tasks=mixture, data=data or Data(), eval=Eval(**options)))

    check("boolq", "hellaswag", "gsm8k", "humaneval", protocol=Protocol.llm_adapters)
    with pytest.raises(ConfigError, match=r"eval\.protocol=llm_adapters: task medqa has no wording.*it has: none"):
        check("boolq", "medqa", protocol=Protocol.llm_adapters)
    with pytest.raises(ConfigError, match=r"data\.style=lm_eval: task commonsense_qa.*it has: moe_peft"):
        check("commonsense_qa", data=Data(style=Style.lm_eval))
    with pytest.raises(ConfigError, match=r"eval\.num_fewshot must be at least 0"):
        check("boolq", num_fewshot=-1)
    with pytest.raises(ConfigError, match=r"no metric 'accc'.*Did you mean 'acc'"):
        protocols.check(Config(tasks=Mixture(name="mix", mixture={"boolq": task("boolq", metric="accc")})))
    with pytest.raises(ConfigError, match=r"eval\.protocol.*loglikelihood"):
        typed(Eval, {"protocol": "nothing"}, "eval")
    for key in ("max_length", "fewshot_seed"):
        with pytest.raises(ConfigError, match=rf"goes by the harness's own, not by eval\.{key}=64"):
            check("boolq", backend=Backend.lm_eval, **{key: 64})
    with pytest.raises(ConfigError, match=r"not by eval\.protocol=letters"):
        check("boolq", backend=Backend.lm_eval, protocol=Protocol.letters)
    with pytest.raises(ConfigError, match=r"task gsm8k: eval\.max_length allows 512 tokens.*leaves no room"):
        check("gsm8k", max_length=512)
    check("gsm8k", "boolq", max_length=600)
    with pytest.raises(ConfigError, match=r"task gsm8k has answer_kind=number, and only options.*eval\.backend=own"):
        harness.require({"gsm8k": task("gsm8k")}, Eval(backend=Backend.lm_eval), "hub")
    with pytest.raises(ConfigError, match="no metric acc_token, which is task boolq's"):
        harness.require({"boolq": task("boolq", metric="acc_token")}, Eval(backend=Backend.lm_eval), "hub")
    with pytest.raises(
        ConfigError, match=r"eval\.backend=lm_eval with data\.source=sample.*reads its data from the hub"
    ):
        check("boolq", backend=Backend.lm_eval, data=Data(source="sample"))
    for options in ({"protocol": Protocol.lm_eval}, {"protocol": Protocol.moe_peft}):
        with pytest.raises(ConfigError, match=r"data\.template=chat, but eval\.protocol=.*Set data\.template=auto"):
            check("boolq", data=Data(template=Template.chat), **options)
    check("boolq", data=Data(template=Template.chat), protocol=Protocol.letters)


def test_what_the_harness_scores_otherwise_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    """A group has no samples of its own, and of a text that was generated there is no log-likelihood."""
    harness_tasks = pytest.importorskip("lm_eval.tasks")
    pq.write_table(pa.Table.from_pylist([{"q": "Is it?", "a": "yes"}]), tmp_path / "rows.parquet")
    body = {
        "dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.parquet")}},
        "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
    }  # fmt: skip
    files = {
        "choose": body | {"task": "choose", "output_type": "multiple_choice", "doc_to_choice": ["yes", "no"]},
        "speak": body | {"task": "speak", "output_type": "generate_until"},
        "several": {"group": "several", "task": ["choose", "speak"]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    manager = harness_tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(harness_tasks, "TaskManager", lambda: manager)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def require(name: str) -> None:
        wording = replace(CHOICE.wordings["lm_eval"], harness_task=name)
        harness.require_data([replace(CHOICE, wordings={"lm_eval": wording})])

    require("choose")
    for name, kind in (("speak", "of output_type generate_until"), ("several", "a group"), ("chose", "no task")):
        with pytest.raises(ConfigError, match=rf"{name} is {kind}.*tasks\.mixture\.t\.wordings\.lm_eval\.harness_task"):
            require(name)


def test_the_harness_is_refused_on_several_processes_before_a_model_is_loaded():
    parts = Parts(Config(eval=Eval(backend=Backend.lm_eval)))
    parts.__dict__["accelerator"] = SimpleNamespace(num_processes=2)
    with pytest.raises(ConfigError, match=r"scores on one process, not on 2\. Use eval\.protocol=lm_eval"):
        parts.require_prerequisites()


def test_scores_of_answers_that_end_or_are_judged_otherwise_are_not_comparable():
    scorer = evaluator()
    sums, program = task("gsm8k"), task("humaneval")
    assert scorer.describe(sums) != scorer.describe(replace(sums, stop=["Question:"]))
    for changes in ({"tests": "assert True"}, {"prefix": "x"}, {"fixtures": "y = 1"}):
        assert scorer.describe(program) != scorer.describe(replace(program, **changes))
    assert "stop" not in scorer.describe(task("boolq"))


def test_shots_are_asked_for_only_where_they_are_shown():
    """HumanEval has no training rows, and is not scored where its programs may not be run."""
    parts = Parts(Config(eval=Eval(num_fewshot=2)))
    rows = shots_of(3)
    parts.__dict__["evaluated"] = {
        "t": TaskData(name="t", task=CHOICE, train=rows),
        "code": TaskData(name="code", task=replace(task("humaneval"), name="code")),
    }
    assert {name: len(shots) for name, shots in parts.shots.items()} == {"t": 2}


def test_an_option_that_leaves_no_room_is_said_before_anything_is_trained():
    """Wherever scoring would meet it, with what is asked around the question."""
    some, refused = example_of("arc_easy"), 0
    for most in range(15, 80):
        scored = evaluator(max_length=most)
        try:
            scored.formatter.choices(some, max_length=most)
        except DataError as error:
            refused += 1
            with pytest.raises(DataError, match=re.escape(str(error))):
                scored.require_room(task("arc_easy"), [some])
        else:
            scored.require_room(task("arc_easy"), [some])
    assert 0 < refused < 40

"""How fast options are scored: our scorer against lm-evaluation-harness's HFLM, on one model, rows and machine.

The two take turns, task by task. The bound is what shared prompts save in products with weights: tokens that the
harness feeds to the model over tokens that a tree feeds, with the logits of each. Both see the prompts of
`eval.protocol=lm_eval`; log-likelihoods and choices are compared. On an accelerator both run in bfloat16.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import sub
from typing import Any

import yaml
from common import Row, arguments, interleaved, ratio, say, write
from training import CONFIGS, config, data_source

from mixlora import tasks
from mixlora.config.schema import Data, Eval, Protocol, Task
from mixlora.config.typed import typed
from mixlora.evaluation.likelihood import OptionScorer, trees_of
from mixlora.evaluation.run import Evaluator
from mixlora.models import base
from mixlora.tasks.prompts import Choice

NAMES = ("arc_challenge", "openbookqa", "siqa")
Scores = Callable[[str], list[float]]


def main() -> None:
    options = arguments(__doc__, model="", limit=60, rounds=6, batch_size=16, batch_tokens=Eval().batch_tokens)
    options.model = options.model or ("tiny" if options.quick else "smollm2_135m")
    options.limit = min(options.limit, 4) if options.quick else options.limit
    loaded = base.load(config("lora", options.model).model, device=options.device)
    own = Evaluator(loaded.model, loaded.tokenizer, Eval(protocol=Protocol.lm_eval), Data())
    asked = {name: choices_of(own, name, options) for name in NAMES}
    sides = {"ours": ours(loaded, asked, own.options.batch_size, options), "lm_eval": harness(loaded, asked, options)}
    agreement = agree(asked, *sides.values())
    rows = rates(loaded, asked, sides, options)
    print(json.dumps(agreement))
    extra = {"model": options.model, "dtype": str(loaded.model.dtype), **agreement}
    print(f"written: {write('eval_speed', rows, options, **extra)}")


def ours(loaded: base.Base, asked: dict[str, list[list[Choice]]], batch_size: int, options) -> Scores:
    scorer = OptionScorer(loaded.model)

    def score(name: str) -> list[float]:
        found = scorer(
            asked[name],
            batch_size=batch_size,
            batch_tokens=options.batch_tokens,
            pad_id=int(loaded.tokenizer.pad_token_id),
        )
        return [nats for row in found for nats in row]

    return score


def harness(loaded: base.Base, asked: dict[str, list[list[Choice]]], options) -> Scores:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=options.batch_size)

    def score(name: str) -> list[float]:
        pairs = [(loaded.tokenizer.decode(c.prompt.ids), " " + c.text) for row in asked[name] for c in row]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [nats for nats, _ in model.loglikelihood(requests, disable_tqdm=True)]

    return score


def agree(asked: dict[str, list[list[Choice]]], mine: Scores, theirs: Scores) -> dict[str, Any]:
    """How far the log-likelihoods of the two are apart, and for how many questions they choose differently."""
    largest, others = 0.0, 0
    for name, rows in asked.items():
        a, b = iter(mine(name)), iter(theirs(name))
        for row in rows:
            x, y = [next(a) for _ in row], [next(b) for _ in row]
            others += x.index(max(x)) != y.index(max(y))
            largest = max(largest, *map(abs, map(sub, x, y)))
    return {"largest_difference": largest, "other_choices": others}


def rates(loaded: base.Base, asked: dict[str, list[list[Choice]]], sides: dict[str, Scores], options) -> list[Row]:
    """Examples a second of ours over the harness's, for each task and for all, beside the bound by FLOPs."""
    seconds, rows = {}, []
    for name, questions in asked.items():
        runs = {who: partial(score, name) for who, score in sides.items()}
        seconds[name] = interleaved(runs, 2 if options.quick else options.rounds, options.device)
        rows += compared(loaded.model, name, questions, **seconds[name])
    total = {who: [sum(each) for each in zip(*(seconds[n][who] for n in asked), strict=True)] for who in sides}
    everything = [row for questions in asked.values() for row in questions]
    return rows + compared(loaded.model, "all three", everything, **total, goal=2.5, at_least=True)


def compared(
    model: Any, name: str, questions: list[list[Choice]], ours: list[float], lm_eval: list[float], **goal: Any
) -> list[Row]:
    setting = f"{name}, {len(questions)} examples"
    rows = [
        ratio("scoring: examples a second / lm-eval's HFLM", setting, lm_eval, ours, **goal),
        Row("scoring: bound of that by FLOPs", setting, bound(model, questions)),
    ]
    say(rows[1])
    return rows


def choices_of(own: Evaluator, name: str, options) -> list[list[Choice]]:
    read = typed(Task, yaml.safe_load((CONFIGS / "task" / f"{name}.yaml").read_text(encoding="utf-8")))
    data = tasks.load_task(replace(read, eval_only=True), Data(source=data_source()))
    return [own.formatter.choices(example, max_length=own.max_length) for example in data.test[: options.limit]]


def bound(model: Any, asked: Sequence[Sequence[Choice]]) -> float:
    """FLOPs of the harness over ours: products with weights alone, each token once, logits where each computes them.

    The harness computes logits at every position it feeds; ours at the last position of a trunk and along its branches.
    """
    head = model.get_output_embeddings().weight.numel()
    body = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n
    )
    trees = [tree for row in asked for tree in trees_of(row)]
    fed = sum(len(c.prompt.ids) + len(c.answer_ids) - 1 for row in asked for c in row)
    predicted = sum(len(tree) - len(tree.trunk) + 1 for tree in trees)
    return fed * (body + head) / (sum(map(len, trees)) * body + predicted * head)


if __name__ == "__main__":
    main()

"""How fast options are scored: our scorer against lm-evaluation-harness's HFLM, on one model, rows and machine.

    python benchmarks/eval_speed.py --data FOLDER [--limit 100] [--rounds 3] [--device cpu] [--out FILE.json]

The two take turns, task by task, and medians are printed. The bound is what shared prompts save in products with
weights: tokens that the harness feeds to the model over tokens that a tree feeds, with the logits of each. Both see the
prompts of `eval.protocol=lm_eval`; log-likelihoods and choices are compared. On an accelerator both run in bfloat16.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from operator import sub
from pathlib import Path
from typing import Any

import torch
import yaml
from common import machine

from mixlora import tasks
from mixlora.config.schema import Data, Eval, Protocol, Task
from mixlora.config.typed import typed
from mixlora.evaluation.likelihood import score_choices, trees_of
from mixlora.evaluation.run import Evaluator
from mixlora.models import base
from mixlora.tables.study import composed
from mixlora.tasks.prompts import Choice

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = ("arc_challenge", "openbookqa", "siqa")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = torch.device(arguments.device)
    loaded = base.load(composed(("method=lora", "tasks=arc", f"model={arguments.model}"), None).model, device=device)
    own = Evaluator(loaded.model, loaded.tokenizer, Eval(protocol=Protocol.lm_eval), Data())
    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=arguments.batch_size)
    asked = {name: choices_of(own, name, arguments) for name in NAMES}

    def ours(name: str) -> list[float]:
        scores = score_choices(
            loaded.model,
            asked[name],
            batch_size=own.options.batch_size,
            batch_tokens=arguments.batch_tokens,
            pad_id=int(loaded.tokenizer.pad_token_id),
        )
        return [nats for row in scores for nats in row]

    def theirs(name: str) -> list[float]:
        pairs = [(loaded.tokenizer.decode(c.prompt.ids), " " + c.text) for row in asked[name] for c in row]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [nats for nats, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    seconds: dict[str, dict[str, list[float]]] = {"ours": {n: [] for n in NAMES}, "lm_eval": {n: [] for n in NAMES}}
    agreement: dict[str, Any] = {"largest_difference": 0.0, "other_choices": 0}
    for name in NAMES:  # once unmeasured, and the scores compared
        mine, other = iter(ours(name)), iter(theirs(name))
        for row in asked[name]:
            a, b = [next(mine) for _ in row], [next(other) for _ in row]
            agreement["other_choices"] += a.index(max(a)) != b.index(max(b))
            agreement["largest_difference"] = max(agreement["largest_difference"], *map(abs, map(sub, a, b)))
    for turn in range(arguments.rounds):
        for name in NAMES:
            order = [("ours", ours), ("lm_eval", theirs)]
            for who, score in order if turn % 2 == 0 else order[::-1]:
                seconds[who][name].append(timed(lambda s=score, n=name: s(n), device))
    report(arguments, loaded, asked, seconds, agreement)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Option scoring: ours against lm-evaluation-harness's HFLM.")
    made.add_argument("--data", required=True, help="a folder laid out like the hub")
    made.add_argument("--model", default="smollm2_135m", help="a name of configs/model")
    made.add_argument("--limit", type=int, default=100, help="examples a task")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--batch-size", type=int, default=16, help="of the harness")
    made.add_argument("--batch-tokens", type=int, default=Eval().batch_tokens, help="of ours")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--out", type=Path)
    return made


def choices_of(own: Evaluator, name: str, arguments: argparse.Namespace) -> list[list[Choice]]:
    read = typed(Task, yaml.safe_load((CONFIGS / "task" / f"{name}.yaml").read_text(encoding="utf-8")))
    data = tasks.load_task(replace(read, eval_only=True), Data(source=arguments.data))
    return [own.formatter.choices(example, max_length=own.max_length) for example in data.test[: arguments.limit]]


def timed(work: Any, device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


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


def report(arguments: argparse.Namespace, loaded: base.Base, asked: Any, seconds: Any, agreement: Any) -> None:
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(argparse.Namespace(**vars(arguments), threads=torch.get_num_threads(), clock="wall")),
        "model": arguments.model,
        "dtype": str(loaded.model.dtype),
        "rounds": arguments.rounds,
        **agreement,
        "tasks": {},
    }
    totals = dict.fromkeys(seconds, 0.0)
    for name in NAMES:
        medians = {who: statistics.median(times[name]) for who, times in seconds.items()}
        rates = {who: len(asked[name]) / s for who, s in medians.items()}
        totals = {who: totals[who] + medians[who] for who in totals}
        found["tasks"][name] = {
            "examples": len(asked[name]),
            "examples_per_second": {who: round(rate, 2) for who, rate in rates.items()},
            "speedup": round(rates["ours"] / rates["lm_eval"], 2),
            "bound": round(bound(loaded.model, asked[name]), 2),
        }
    everything = [row for name in NAMES for row in asked[name]]
    found["speedup"] = round(totals["lm_eval"] / totals["ours"], 2)
    found["bound"] = round(bound(loaded.model, everything), 2)
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

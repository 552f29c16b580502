"""Run folders written by hand, for tables whose numbers must not depend on a machine."""

import json
from pathlib import Path

from mixlora.config import load as configs
from mixlora.records import write_json, write_lines, write_text
from mixlora.tables.recipe import Point
from mixlora.tables.study import Study

PROTOCOL = {"name": "loglikelihood", "version": 1, "split": "test"}


def right(n: int, share: float, turn: int) -> list[float]:
    """n examples, a share of them right, which ones turning with the seed."""
    hits = round(n * share)
    return [float((i + turn) % n < hits) for i in range(n)]


def write_run(study: Study, point: Point, scores: dict[str, list[float]], **changes: object) -> Path:
    """A finished run with these scores; `changes` go into run.json, those named task_* into every result."""
    folder = configs.run_folder(study.config(point))
    record = {
        "status": "finished",
        "git_commit": "0123abc",
        "git_dirty": False,
        "packages": {"torch": "2.13.0"},
        "device": "cpu",
        "parameters": {"trainable": 1234567, "activated": 234567, "total": 10**7},
        "tokens_per_second": 100.0 + point.seed,
        "peak_memory_bytes": 3 * 2**29,
        "weights_sha256": "w",
    } | {k: v for k, v in changes.items() if not k.startswith("task_")}
    results = {}
    for task, values in scores.items():
        result = {"metric": "acc", "value": sum(values) / len(values), "n": len(values), "protocol": PROTOCOL}
        result |= {"data": {"test": f"sha of {task}"}, "prompts": "p", "stderr": 0.0, "complete": True}
        results[task] = result | {k.removeprefix("task_"): v for k, v in changes.items() if k.startswith("task_")}
        rows = [{"id": f"{task}-{i}", "prompt": "?", "target": 0, "acc": v} for i, v in enumerate(values)]
        write_lines(folder / "predictions" / f"{task}.jsonl", rows)
    write_json(folder / "results.json", results)
    write_text(folder / "config.yaml", json.dumps(configs.plain(study.config(point))))
    write_json(folder / "run.json", record)
    return folder

"""python scripts/kill_test.py [KILLS] [SEED]: kill a training run at random moments, compare what it leaves by bytes.

A tiny run is started, killed with SIGKILL after a random time, and started again by the same command, until it ends;
then the next run begins, until KILLS kills are done. Every run must leave the same adapter, optimizer, metrics (times
aside) and predictions as one that nobody disturbed.
"""

import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_runs import Started, contents, task_folder, train


def main(kills: int = 50, seed: int = 0) -> int:
    draw, done, runs, differing = random.Random(seed), 0, 0, 0
    where: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        configs = task_folder(Path(scratch) / "configs")
        began = time.monotonic()
        whole = Path(scratch) / "whole"
        assert train(configs, whole, "method=smora").returncode == 0
        seconds, expected = time.monotonic() - began, contents(whole)
        while done < kills:
            folder = Path(scratch) / f"run-{runs}" / "whole"
            while True:
                started = Started(configs, folder, "method=smora")
                if done >= kills or started.wait(draw.uniform(0, seconds)) is not None:
                    assert started.done().returncode == 0, started.done().stderr
                    break
                started.send(signal.SIGKILL)
                started.wait()
                done += 1
                where[stage(folder)] += 1
            different = {key for key in expected if contents(folder).get(key) != expected[key]}
            differing += bool(different)
            print(f"run {runs}: {done} of {kills} kills, differing: {sorted(different) or 'nothing'}", flush=True)
            shutil.rmtree(folder.parent)
            runs += 1
    places = ", ".join(f"{number} {place}" for place, number in where.most_common())
    print(f"{done} kills ({places}) in {runs} runs: {differing} runs differ")
    return int(differing > 0)


def stage(folder: Path) -> str:
    """How far a killed run had come."""
    if not (folder / "config.yaml").is_file():
        return "before the folder was begun"
    if (folder / "adapter").is_dir():
        return "after training"
    return "while training" if (folder / "metrics.jsonl").is_file() else "before the first step"


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))

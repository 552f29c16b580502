"""Kill a training run at random moments and compare every byte of what it leaves with an uninterrupted run.

    python scripts/kill_test.py --kills 50

A tiny model of random weights on a task of its own, on the CPU. Each attempt gets a random time to live, ends by
SIGKILL, and the same command goes on; a run that finishes is compared and a new one begins, until enough were killed.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_runs import Started, contents, task_folder

JOB = (
    "method=mole", "train.max_steps=30", "train.save_steps=3", "train.eval_steps=10", "train.eval_limit=4",
    "train.load_best=true", "report=true",
)  # fmt: skip


def finish(configs: Path, run: Path) -> float:
    """Run to the end; seconds."""
    began = time.monotonic()
    done = Started(configs, run, *JOB).done()
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="kill_test"))
    configs = task_folder(root / "configs")
    finish(configs, root / "warm" / "run")
    length = finish(configs, root / "whole" / "run")
    want = contents(root / "whole" / "run")
    print(f"An uninterrupted run takes {length:.1f} s and leaves {len(want)} things to compare", flush=True)
    kills = runs = differing = 0
    while kills < options.kills:
        runs += 1
        folder, killed = root / f"run{runs}", 0
        while True:
            started = Started(configs, folder / "run", *JOB)
            if started.wait(draw.uniform(0, length)) is not None or kills >= options.kills:
                break
            started.process.kill()
            started.wait()
            kills, killed = kills + 1, killed + 1
        done = started.done()
        if done.returncode:
            raise SystemExit(done.stderr)
        got = contents(folder / "run")
        wrong = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
        differing += len(wrong)
        print(f"run {runs}: killed {killed} times, {len(wrong)} things differ {wrong}", flush=True)
        if "names" in wrong:
            print(f"  files that one of the two lacks: {sorted(set(want['names']) ^ set(got['names']))}", flush=True)
        shutil.rmtree(folder)
    print(f"{kills} kills in {runs} runs: {differing} things differ")
    shutil.rmtree(root)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

"""What `python -m mixlora.train -m ...` does with the points that Hydra's sweeper has laid out."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from mixlora.config.cli import refuse_ranks
from mixlora.config.overrides import spelled
from mixlora.console import say
from mixlora.errors import MixloraError
from mixlora.sweeps import show
from mixlora.sweeps.points import composed
from mixlora.sweeps.running import place_of, run


def launch(loader: Any, master: DictConfig, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    """Run every point that is not finished, then show all of them by their score.

    Returns one JobReturn a point, in order; its value is the mean score, which a sweeper such as Optuna's maximises.

    Raises:
        ConfigError: a point that cannot be, before any starts.
        MixloraError: points failed; the others have run.
        Interrupted: after a signal.
    """
    refuse_ranks(sys.argv[1:])  # -m is refused before; a config of the group `sweep` starts one without it
    points, configs = composed(loader, master, job_overrides)
    first = configs[0]
    place, board = place_of(first), show.Board(points)
    left = [point for point in points if not point.finished]
    done = len(points) - len(left)
    say(f"{count(points)}, {done} finished before; {len(left)} to run, {place.describe()}")
    if first.dry_run:
        for point in points:
            say(f"  {board.states[point]:12} {point.name}  ({point.folder})")
        return returns(points, job_overrides)
    failed = run(left, place, board)
    splits = [config.eval.split.value for config in configs]
    frame = show.summary(points, board.states, splits)
    show.show(frame)
    say(f"Summary: {show.keep(frame, points, Path(first.output_root))}")
    if failed:
        listed = "\n".join(f"  {point.name}: {failure}\n    log: {failure.log}" for point, failure in failed.items())
        raise MixloraError(f"{len(failed)} of {count(left)} failed; the same command tries them again:\n{listed}")
    best = frame.iloc[0]
    if set(splits) == {"validation"} and show.is_one_ranking(frame) and pd.notna(best.score):
        run_it = shlex.join(["python", "-m", "mixlora.evaluate", spelled("run", best.run), "eval.split=test"])
        say(f"The best on test rows: {run_it}")
    return returns(points, job_overrides)


def count(points: Sequence[Any]) -> str:
    return f"{len(points)} point{'' if len(points) == 1 else 's'}"


def returns(points: Sequence[Any], job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    found = []
    for point, overrides in zip(points, job_overrides, strict=True):
        score = show.score(point.folder)
        value = None if score is None else score.mean
        found.append(JobReturn(overrides=list(overrides), working_dir=str(point.folder), _return_value=value))
        found[-1].status = JobStatus.COMPLETED
    return found

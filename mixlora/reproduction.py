"""What `python -m mixlora.reproduce` does: run what a recipe lacks, as a sweep does, then show it.

A point that is done is skipped, an interrupted one goes on, a failed one leaves the others running. With several
learning rates the first round chooses them and the second runs the other seeds.
"""

from mixlora import checks
from mixlora.config.load import digest
from mixlora.config.schema import Launch
from mixlora.console import say
from mixlora.errors import ConfigError, DataError, MixloraError
from mixlora.records import finished_as
from mixlora.sweeps.points import Point as Run
from mixlora.sweeps.running import Failure, place_of, run
from mixlora.sweeps.show import Board
from mixlora.tables.recipe import Point
from mixlora.tables.runs import DIRTY, DONE
from mixlora.tables.study import Study


def reproduce(study: Study, launch: Launch) -> dict[Run, Failure]:
    """Rounds until nothing new can be run; what failed.

    Raises:
        ConfigError, DataError: a point that cannot be run, or was run by other processes than the others would be:
            before the first of them starts.
        Interrupted: after a signal.
    """
    place = place_of(launch)
    for point in study.points():
        check(study, point, launch.processes * launch.slurm.nodes)
    tried: set[Point] = set()
    failed: dict[Run, Failure] = {}
    while lacking := [p for p in study.points() if p not in tried and study.run(p).state not in (DONE, DIRTY)]:
        say(f"{len(lacking)} of {len(study.points())} runs are to be made, {place.describe()}")
        runs = [run_of(study, point) for point in lacking]
        failed |= run(runs, place, Board(runs))
        tried.update(lacking)
        study.forget()
    return failed


def check(study: Study, point: Point, world_size: int) -> None:
    """Raise where a point cannot be run as the others, naming it."""
    found, config = study.run(point), study.config(point)
    try:
        if found.state not in (DONE, DIRTY):
            checks.check_run(config, world_size)
        elif not study.kept_in(point):  # kept records are of runs elsewhere
            finished_as(found.folder, digest(config), world_size)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{point}: {error}") from None


def run_of(study: Study, point: Point) -> Run:
    return Run(str(point), tuple(study.command(point)), study.run(point).folder, study.config(point).train.max_steps)


def complain(failed: dict[Run, Failure]) -> None:
    """Raise for the runs that failed, after everything else has been shown."""
    if failed:
        logs = "\n".join(f"  {run.name}: {failure.log}" for run, failure in failed.items())
        raise MixloraError(f"{len(failed)} runs failed:\n{logs}")

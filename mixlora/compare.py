"""python -m mixlora.compare RUN_A RUN_B: a paired test a task on the same examples, and which were won and lost.

A folder is a run, its `before`, or one of its `evaluations`. `differ` is the share of examples with another prediction,
right or wrong: one run scored with two batch sizes (two folders), say, differs where rounding decides a near-tie.
Exit statuses: 0 done, 2 not comparable, 3 predictions are missing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from mixlora.console import console, say
from mixlora.errors import exit_status
from mixlora.tables.paired import Paired, alone, compare

LISTED = 10


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> its exit status. MIXLORA_DEBUG=1 shows the traceback of an error."""
    arguments = parser().parse_args(argv)
    listed = LISTED if arguments.examples is None else arguments.examples
    return exit_status(lambda: run(arguments.a, arguments.b, listed))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m mixlora.compare", description="Two runs, example by example.")
    made.add_argument("a", metavar="RUN_A", type=Path)
    made.add_argument("b", metavar="RUN_B", type=Path)
    made.add_argument("--examples", metavar="N", type=int, help=f"ids to list a task and side ({LISTED})")
    return made


def run(a: Path, b: Path, listed: int) -> None:
    show(compare(a, b), listed)
    for name, tasks in zip("AB", alone(a, b), strict=True):
        if tasks:
            say(f"Scored by {name} alone: {', '.join(tasks)}")


def show(found: Sequence[Paired], listed: int) -> None:
    table = Table(title="B against A, in percent", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("task", "n", "A", "B", "change", "differ", "won/lost", "p", "p Holm"):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for one in found:
        scores = f"{100 * one.a:.1f}", f"{100 * one.b:.1f}", f"{100 * (one.b - one.a):+.1f}"
        won = f"{len(one.won)}/{len(one.lost)}"
        table.add_row(
            one.task, str(one.n), *scores, f"{100 * one.differ:.1f}", won, f"{one.p:.2g}", f"{one.p_holm:.2g}"
        )
    console.print(table)
    for one in found:
        say(f"{one.task}: {one.metric}, {one.test}")
        for name, ids in (("won", one.won), ("lost", one.lost)):
            more = f", and {len(ids) - listed} more" if len(ids) > listed else ""
            say(f"  {name} by B: {', '.join(ids[:listed]) or 'none'}{more}")


if __name__ == "__main__":
    sys.exit(main())

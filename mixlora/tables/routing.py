"""What `python -m mixlora.routing` does: who does what in one run, layer by layer and in words."""

from pathlib import Path

import numpy as np
from rich.table import Table as Grid

from mixlora.console import console, say
from mixlora.errors import ConfigError
from mixlora.records import is_there
from mixlora.tables import report, specialisation
from mixlora.tables.report import preferences


def show(folder: Path, plots: str | None) -> None:
    """Print the numbers of every layer and their reading; write report.html, and the plots as files when asked."""
    if not is_there(folder / "routing.json"):
        raise ConfigError(f"{folder} has no routing.json: it is not a finished run")
    loads, least = report.routing(folder)
    found = specialisation.gates(loads, least)
    if found:
        console.print(layers(folder.name, found))
    for line in specialisation.reading(found):
        say(line)
    for task, text in preferences(loads):
        say(f"  {task}: {text}")
    report.show(folder, plots)


def layers(name: str, found: list[specialisation.Gate]) -> Grid:
    """A line a layer, means over its gates."""
    grid = Grid(title=name, title_justify="left")
    for column in (
        "layer",
        "gates",
        "experts",
        "top k",
        "effective",
        "I(task; expert) bits",
        "load CV",
        "idle",
        "collapsed",
    ):
        grid.add_column(column, justify="right")
    for layer, gates in specialisation.by_layer(found).items():
        collapsed = sum(g.collapsed for g in gates)
        grid.add_row(
            str(layer),
            str(len(gates)),
            f"{np.mean([g.experts for g in gates]):g}",
            f"{np.mean([g.top_k for g in gates]):g}",
            f"{np.mean([g.effective for g in gates]):.2f}",
            f"{np.mean([g.information for g in gates]):.3f}",
            f"{np.mean([g.variation for g in gates]):.2f}",
            str(sum(g.idle for g in gates)),
            str(collapsed),
        )
    return grid

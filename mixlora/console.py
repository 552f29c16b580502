"""What a person sees: bars with the time left on a terminal, plain lines in a log file, nothing on other ranks."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mixlora.environment import is_main_process

# What is shown comes from users and models: [q_proj] and :x: are themselves, not a style and a picture.
console = Console(quiet=not is_main_process(), soft_wrap=True, markup=False, emoji=False)


def say(text: str) -> None:
    console.print(text, highlight=False)


class Bar:
    """One running task: `advance(n, note)`."""

    def __init__(self, label: str, total: int, progress: Progress | None, done: int = 0):
        self.label, self.total, self.progress = label, total, progress
        self.start = self.done = done  # by processes before this one, for the time of which nobody waits
        self.began, self.told = time.monotonic(), 0.0
        self.task = None if progress is None else progress.add_task(label, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, advance=count, note=note)
        elif self.done >= self.total or time.monotonic() - self.told > 15:
            self.told = time.monotonic()
            spent = self.told - self.began
            left = spent / max(self.done - self.start, 1) * (self.total - self.done)
            say(f"{self.label} {self.done}/{self.total}  {note}  {spent:.0f} s, {left:.0f} s left")


@contextmanager
def bar(label: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A progress bar over `total` pieces; in a log file a line every 15 seconds instead."""
    if console.quiet or not sys.stdout.isatty():
        yield Bar(label, total, None, done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield Bar(label, total, progress, done)

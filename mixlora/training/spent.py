"""What a run has taken so far, in this process and in those before it of whose work it keeps a part."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Spent:
    """Seconds and peak memory of a run.

    Args:
        process_peak: bytes that this process has used at most.
        began: when it began with the run, by time.monotonic.
    """

    process_peak: Callable[[], int] = lambda: 0
    began: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0
    earlier_peak: int = 0

    def add_earlier(self, seconds: float, peak_memory_bytes: int) -> None:
        """What an earlier process kept. Each keeps what was spent up to then, so of several the greatest counts."""
        self.earlier_seconds = max(self.earlier_seconds, seconds)
        self.earlier_peak = max(self.earlier_peak, peak_memory_bytes)

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.began

    @property
    def peak_memory_bytes(self) -> int:
        return max(self.earlier_peak, self.process_peak())

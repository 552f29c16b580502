"""The processes of one job: what they agree on, what ends them, and tensors that lie spread over them.

A rank that fails says so in the job's store; a thread on every other rank reads that and ends its process with the same
exit status, even while it waits for the lost one. A rank that no longer gives signs of life is named in the same way.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from mixlora.errors import ConfigError, Interrupted, MixloraError, first_line

T = TypeVar("T")
BEAT_SECONDS = 0.5
SLEEP_SECONDS = 20 * BEAT_SECONDS  # between two beats: this process itself did not run
# The backend's own timeout comes so much later than the watch, which can name the rank; NCCL's ends a process unnamed.
GRACE_SECONDS = 15.0
# What the backends say when another rank does not answer or is gone.
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|broken pipe", re.IGNORECASE)
TIMED_OUT = re.compile(r"tim(ed|e)[ -]?out", re.IGNORECASE)
# What NCCL says of this rank's own device, network or settings.
NOT_LOST = re.compile(r"(CUDA|unhandled cuda|unhandled system|internal) error|invalid (usage|argument)", re.IGNORECASE)
# What else than torch's own error says so: the CPU's allocator, a driver, and libraries that allocate by themselves.
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|CUDA error: out of memory|Triton Error \[CUDA\]: out of memory"
    r"|CU(BLAS|DNN)_STATUS_ALLOC_FAILED|Cuda failure \d+ 'out of memory'"
)


class LostRank(MixloraError):
    """Another process of the job died, hangs or cannot be reached."""

    status = 1


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


# ---- what the ranks agree on


def agree(value: T) -> T:
    """Rank 0's value, on every rank: ranks must not each look at a disk that is being written to."""
    if world() == 1:
        return value
    arrive()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_rank_0() -> None:
    """The other ranks go on once rank 0 has come here, which does not wait for them."""
    agree(None)


def of_first(work: Callable[[], T]) -> T:
    """What `work` gives, or the MixloraError that it raises, on rank 0; the others do not ask."""
    if world() == 1:
        return work()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = work()
        except Interrupted:  # of this process, which the others hear of as of any
            raise
        except MixloraError as error:
            found[1] = error
    given, raised = agree(found)
    if raised is not None:
        raise raised
    return given


def gathered(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks."""
    if world() == 1:
        return [value]
    arrive()
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world() > 1:
        arrive()
        dist.all_reduce(tensor)
    return tensor


def require_same(what: str, value: Any) -> None:
    """Raise on every rank where the ranks do not see the same value.

    Raises:
        ConfigError: naming the ranks that differ from rank 0.
    """
    values = gathered(value)
    differ = [i for i, other in enumerate(values) if other != values[0]]
    if differ:
        named = ", ".join(f"rank {i}" for i in differ)
        raise ConfigError(f"{named} has another {what} than rank 0. Start every rank with one command on one disk")


def arrive() -> None:
    """This rank waits for the others now: one that does not arrive has not come as far, and can be named."""
    for watch in watching:
        watch.marks += 1


# ---- tensors that FSDP has spread over the ranks


def sharded(model: nn.Module) -> bool:
    """Whether no rank holds all of the model, so that every rank must take part in each forward."""
    # Not by its parameters: without resharding they are whole from a forward to the next backward.
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_as(like: Tensor, value: Tensor) -> Tensor:
    """A full tensor, the same on every rank, laid out as `like`."""
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


# ---- how a job ends


@contextmanager
def together(timeout: float) -> Iterator["Watch"]:
    """What ends the block on one rank ends it on all, with one message and one exit status.

    `timeout` is how many seconds a rank may be silent before the others give it up.
    """
    watch = Watch(timeout)
    if world() == 1:
        yield watch
        return
    watch.start()
    try:
        yield watch
        gathered(None)
    except BaseException as error:
        watch.fail(error)
    finally:
        watch.stop()


watching: list["Watch"] = []  # this process's own, while a job runs


class Watch:
    """Signs of life of this rank, and an eye on the others'."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.marks, self.place = 0, "start"
        self.heard: dict[int, tuple[str, float]] = {}  # what each rank said last, and since when
        self.left_behind: dict[int, tuple[int, float]] = {}  # where it stood when others went on, and since when
        self.stopped = threading.Event()
        self.following = False  # another rank's failure is told, and the thread ends this process
        self.on_failure: Callable[[str, int], None] = lambda message, status: None  # on rank 0, for another rank's

    def at(self, place: str) -> None:
        """Say where this rank is: told to the user should the others wait for it in vain."""
        self.marks, self.place = self.marks + 1, place

    def start(self) -> None:
        self.rank, self.world = rank(), world()
        # A connection of its own: the main thread may hold the other one while it waits.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        # torchrun starts ranks again with the store of the try before, which still says how that one failed.
        self.store = dist.PrefixStore(f"mixlora {agree(uuid.uuid4().hex)}", store)
        self.thread = threading.Thread(target=self.keep_watch, name="mixlora-watch", daemon=True)
        self.thread.start()
        watching.append(self)

    def stop(self) -> None:
        watching.clear()
        self.stopped.set()

    def keep_watch(self) -> None:
        beat, last = 0, time.monotonic()
        while not self.stopped.wait(BEAT_SECONDS):
            beat, now = beat + 1, time.monotonic()
            if now - last > SLEEP_SECONDS:  # a job that was suspended: nobody could have been heard
                self.heard.clear()
                self.left_behind.clear()
            last = now
            try:
                self.store.set(f"rank {self.rank}", json.dumps([beat, self.marks, self.place]))
                if self.store.check(["failed"]):
                    self.follow(json.loads(self.store.get("failed")))
                # Rank 0 looks at all the others and they at it: the store is asked twice a rank, not rank times rank.
                others = range(1, self.world) if self.rank == 0 else [0]
                said = {other: self.said(other) for other in others}
                for other in others:
                    if self.silent_for(other, said[other]) > self.timeout:
                        self.give_up(said, other, "has given no sign of life")
                # A rank that hangs goes on giving signs of life, and not every backend says whom it waits for.
                for other, seconds in self.behind_for(said).items():
                    if seconds > self.timeout:
                        self.give_up(said, other, "has not gone on")
            except RuntimeError:  # the store is gone, and with it the rank or the launcher that held it
                if not self.stopped.is_set():
                    self.end(str(store_gone()), LostRank.status)

    def silent_for(self, other: int, said: str) -> float:
        """Seconds since a rank's last sign of life."""
        now = time.monotonic()
        if other not in self.heard or self.heard[other][0] != said:
            self.heard[other] = said, now
        return now - self.heard[other][1]

    def behind_for(self, said: Mapping[int, str]) -> dict[int, float]:
        """Seconds for which each rank has stood where it is while another one, or this one, was further on."""
        marks = {other: seen(text)[1] for other, text in said.items()}
        furthest, now = max(self.marks, *marks.values()), time.monotonic()
        for other, reached in marks.items():
            if reached == furthest or self.left_behind.get(other, (reached, now))[0] != reached:
                self.left_behind.pop(other, None)
            if reached < furthest:
                self.left_behind.setdefault(other, (reached, now))
        return {other: now - since for other, (_, since) in self.left_behind.items()}

    def said(self, other: int) -> str:
        return self.store.get(f"rank {other}").decode() if self.store.check([f"rank {other}"]) else ""

    def give_up(self, said: Mapping[int, str], other: int, why: str) -> None:
        place = seen(said[other])[2]
        message = f"rank {other} {why} for {self.timeout:.0f} s (last seen: {place}). {REMEDY}"
        told = self.spread(LostRank.status, message, fault=False)
        self.end(message if self.rank == 0 or not told else None, LostRank.status)

    def follow(self, failed: dict[str, Any]) -> None:
        """End this process as the rank that failed ends. Rank 0 speaks for the job."""
        self.following = True
        if self.rank == 0:
            tell(failed["message"])
            if failed["fault"]:
                self.on_failure(failed["message"], failed["status"])
        self.store.set(f"followed {self.rank}", "1")
        self.linger()
        self.end(None, failed["status"])

    def end(self, message: str | None, status: int) -> None:
        if message is not None:
            tell(message)
        os._exit(status)

    def fail(self, error: BaseException) -> None:
        """Tell the others, wait until they have heard, and raise."""
        # A launcher ends the ranks that are left as soon as one has gone: they are on their way, and have a reason.
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.following:
            self.thread.join(60 * BEAT_SECONDS)
        # A store whose process is stopped answers nothing, not even with an error.
        limit = threading.Timer(60 * BEAT_SECONDS, lambda: self.end(str(store_gone()), LostRank.status))
        limit.daemon = True
        limit.start()
        if is_lost(error):
            error = self.lost(error)
        self.stopped.set()
        self.thread.join(2 * BEAT_SECONDS)
        who = "" if isinstance(error, LostRank) else f"rank {self.rank}: "
        message = f"{who}{str(error) or type(error).__name__}"
        told = False
        with suppress(RuntimeError):  # without a store every rank is on its own
            told = self.spread(
                getattr(error, "status", 1), message, fault=not isinstance(error, (Interrupted, LostRank))
            )
        limit.cancel()
        if isinstance(error, MixloraError) and self.rank > 0:
            if not told:
                tell(message)
            sys.exit(error.status)
        raise error

    def spread(self, status: int, message: str, *, fault: bool) -> bool:
        """Let all ranks hear why the job ends; whether rank 0 has, which speaks for the job.

        Only the first failure counts: the others follow from it.

        Args:
            fault: whether the same command would fail again; one that was interrupted or lost a rank would not.
        """
        self.store.compare_set("failed", "", json.dumps({"status": status, "message": message, "fault": fault}))
        self.store.set(f"followed {self.rank}", "1")
        told = self.wait_for_the_others()
        self.linger()
        return told

    def wait_for_the_others(self) -> bool:
        """Whether all have heard of the failure in time."""
        until = time.monotonic() + 10 * BEAT_SECONDS
        names = [f"followed {other}" for other in range(self.world)]
        while not self.store.check(names):
            if time.monotonic() > until:
                return self.store.check(names[:1])
            time.sleep(BEAT_SECONDS / 5)
        return True

    def linger(self) -> None:
        """Rank 0 may hold the store from which the others hear of the end."""
        if self.rank == 0:
            time.sleep(4 * BEAT_SECONDS)

    def lost(self, error: BaseException) -> LostRank:
        """Which rank a broken or endless wait was for: one that is silent, else the one that is furthest behind."""
        try:
            return self.blamed(error)
        except RuntimeError:
            return store_gone()

    def blamed(self, error: BaseException) -> LostRank:
        before = {other: self.said(other) for other in range(self.world) if other != self.rank}
        time.sleep(4 * BEAT_SECONDS)
        silent = [other for other, said in before.items() if self.said(other) == said]
        were = {other: seen(said) for other, said in before.items()} | {self.rank: (0, self.marks, self.place)}
        fewest = min(marks for _, marks, _ in were.values())
        blamed = silent or [other for other, (_, marks, _) in were.items() if marks == fewest and other != self.rank]
        named = " and ".join(f"rank {other} (last seen: {were[other][2]})" for other in sorted(blamed))
        within = f" within {self.timeout:.0f} s" if TIMED_OUT.search(str(error)) else ""
        verb = "died" if silent else f"did not arrive{within}"
        return LostRank(f"{named or 'another rank'} {verb}; {first_line(error)[:200]}. {REMEDY}")


def seen(said: str) -> tuple[int, int, str]:
    """Beats, places passed and the last of them, of a rank that may not have said anything yet."""
    beats, marks, place = json.loads(said or '[0, 0, "start"]')
    return beats, marks, place


REMEDY = "The same command goes on from the last checkpoint; rank_timeout sets how long a rank may take"


def store_gone() -> LostRank:
    return LostRank(f"rank 0, or the launcher that holds the job together, is gone. {REMEDY}")


def tell(message: str) -> None:
    print(f"mixlora: {message}", file=sys.stderr, flush=True)


def is_lost(error: BaseException) -> bool:
    """Whether another rank is gone: this one could have gone on."""
    text = str(error)
    says_so = isinstance(error, RuntimeError) and bool(LOST.search(text)) and not NOT_LOST.search(text)
    return world() > 1 and (says_so or isinstance(error, LostRank))


def is_out_of_memory(error: BaseException) -> bool:
    """An error of its own kind, or one that says so."""
    own = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return own or (isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error))))

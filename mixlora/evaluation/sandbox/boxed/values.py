"""Values on their way between candidate and checker: what Python can compare -> what JSON can carry, and back.

None, bool, int, float and str go as themselves, everything else as [tag, ...]. Decoding builds plain values only, so
nothing that a candidate defines (`__eq__`, `__hash__`, `__reduce__`) ever runs beside the tests. A subclass arrives as
its plain base (a namedtuple as a tuple, a Counter as a dict). An object that is not plain stays where it is and travels
as a number that stands for it. Standard library only: this file runs inside the box.
"""

import builtins
import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

DEEPEST = 200  # levels of nesting in a value
LONGEST_ITERATOR = 100_000
LARGEST_FRAME = 4 << 20  # bytes
UNFIT = "the tests give the program what cannot travel"  # no fault of the program, and none can pass
EXACT = 1 << 4096  # a larger int travels in hex: Python refuses decimal ints of more than 4300 digits


class Remote:
    """The checker's stand-in for what lives in the candidate: a function by name, an object by number."""

    def __init__(self, target: int | str, ask: Callable[..., Any]):
        self.target, self.ask = target, ask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.ask(self.target, args, kwargs)


def refuse(value: Any) -> int:
    raise TypeError(f"a {type(value).__name__} cannot be sent to the other process")


def encode(value: Any, keep: Callable[[Any], int] = refuse, depth: int = 0) -> Any:
    """A value -> what JSON can carry. `keep` turns what is not plain into a number that stands for it."""
    if depth > DEEPEST:
        raise ValueError(f"a value is nested more than {DEEPEST} deep, or holds itself")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        plain = int.__index__(value)
        return plain if -EXACT < plain < EXACT else ["int", hex(plain)]
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Remote):
        return ["ref", value.target]
    for tag, kind, parts in CONTAINERS:
        if isinstance(value, kind):
            return [tag, [encode(part, keep, depth + 1) for part in parts(value)]]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", bytes(value).hex()]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, type) and value in BUILTIN_TYPES:
        return ["type", BUILTIN_TYPES[value]]
    if hasattr(type(value), "__next__"):
        return ["iter", [encode(part, keep, depth + 1) for part in drained(value)]]
    return exotic(value) or ["ref", keep(value)]


def drained(iterator: Iterator[Any]) -> list[Any]:
    """Everything that a generator, map, zip ... still yields; an endless one is an error."""
    parts = list(itertools.islice(iterator, LONGEST_ITERATOR + 1))
    if len(parts) > LONGEST_ITERATOR:
        raise ValueError(f"an iterator yields more than {LONGEST_ITERATOR} values")
    return parts


def exotic(value: Any) -> list[Any] | None:
    """Numbers and dates of the standard library, recognised without importing their modules."""
    name = f"{type(value).__module__}.{type(value).__name__}"
    if name == SPAN:
        return [name, value.days, value.seconds, value.microseconds]
    return [name, str(value)] if name in (*NUMBERS, *DATES) else None


NUMBERS, SPAN = ("fractions.Fraction", "decimal.Decimal"), "datetime.timedelta"
DATES = ("datetime.date", "datetime.time", "datetime.datetime")
BUILTIN_TYPES = {kind: name for name, kind in vars(builtins).items() if isinstance(kind, type)}
# tag, type, what to send; subclasses before their bases, and a subclass that is not named arrives as its base
CONTAINERS: tuple[tuple[str, type, Callable[[Any], Iterable[Any]]], ...] = (
    ("list", list, list.__iter__),
    ("tuple", tuple, tuple.__iter__),
    ("set", set, set.__iter__),
    ("frozenset", frozenset, frozenset.__iter__),
    ("dict", dict, dict.items),
    ("deque", collections.deque, collections.deque.__iter__),
    ("keys", type({}.keys()), iter),
    ("values", type({}.values()), iter),
    ("items", type({}.items()), iter),
)
BUILDERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "deque": collections.deque,
    "keys": lambda parts: dict.fromkeys(parts).keys(),
    "values": lambda parts: dict(enumerate(parts)).values(),
    "items": lambda parts: dict(parts).items(),
    "iter": iter,
}


def decode(node: Any, remote: Callable[[int | str], Any]) -> Any:
    """The reverse of `encode`; `remote` gives what a number stands for. Raises on what `encode` cannot make."""
    if node is None or type(node) in (bool, int, float, str):
        return node
    tag, *parts = node
    if tag in BUILDERS:
        return BUILDERS[tag]([decode(part, remote) for part in parts[0]])
    if tag == "int":
        return int(parts[0], 16)
    if tag in ("bytes", "bytearray"):
        return getattr(builtins, tag).fromhex(parts[0])
    if tag in ("range", "complex"):
        return getattr(builtins, tag)(*parts)
    if tag in (*NUMBERS, *DATES, SPAN):
        module, name = tag.split(".")
        kind = getattr(__import__(module), name)
        return kind(*parts) if tag == SPAN else (kind.fromisoformat if tag in DATES else kind)(str(parts[0]))
    if tag == "type" and parts[0] in BUILTIN_TYPES.values():
        return getattr(builtins, parts[0])
    if tag == "ref":
        return remote(parts[0])
    raise ValueError("malformed value")

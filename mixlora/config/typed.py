"""From a mapping that a user wrote to a typed record: unknown keys, wrong types and missing values are named."""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixlora.errors import ConfigError

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'num_experts'?`, or the list of known names when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known)}."


def typed(record: type[T], values: Mapping[str, Any] | DictConfig, where: str = "") -> T:
    """Build the dataclass `record` from `values`; `where` is the place the user knows them by, e.g. "method.gate".

    Raises:
        ConfigError: naming the key, what was expected and the nearest known name.
    """
    plain = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else dict(values)
    reject_unknown(plain, record, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(record), literal(plain))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{dotted(where, missing[0])} has no value. Give it one: {dotted(where, missing[0])}=...")
        return typing.cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = dotted(where, str(getattr(error, "full_key", "") or ""))
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key.rstrip('.')}: {reason}") from None


def at_least(key: str, value: float | None, least: float) -> None:
    """Raise a ConfigError where a number is given and is not a finite one of at least `least`."""
    if value is not None and not least <= value < math.inf:
        raise ConfigError(f"{key} must be at least {least}, got {value}")


def positive(key: str, value: float | None) -> None:
    """Raise a ConfigError where a number is given and is not a finite one above 0."""
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{key} must be a positive number, got {value}")


def below_one(key: str, value: float) -> None:
    """Raise a ConfigError for a share that is not in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{key} must be in [0, 1), got {value}")


def literal(value: Any) -> Any:
    """Plain data in which `${` stands for itself: what was resolved once, or never was Hydra's, is a text."""
    if isinstance(value, dict):
        return {key: literal(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [literal(one) for one in value]
    if isinstance(value, str):  # OmegaConf reads backslashes in pairs before `${`
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
    return value


def reject_unknown(values: Any, annotation: Any, where: str) -> None:
    """Raise on the first key of `values` that the dataclass in `annotation` does not have, at any depth.

    OmegaConf's own check is passed by Hydra's `+key=value`, which adds keys to a typed node.
    """
    record = dataclass_in(annotation)
    if record is not None and isinstance(values, list):
        for i, value in enumerate(values):
            reject_unknown(value, record, f"{where}[{i}]")
        return
    if record is None or not isinstance(values, Mapping):
        return
    if typing.get_origin(annotation) is dict:
        for key, value in values.items():
            reject_unknown(value, record, dotted(where, str(key)))
        return
    hints = typing.get_type_hints(record)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"There is no key '{dotted(where, str(key))}'. {suggest(str(key), hints)}")
        reject_truth(value, hints[key], dotted(where, str(key)))
        reject_unknown(value, hints[key], dotted(where, str(key)))


def reject_truth(value: Any, annotation: Any, where: str) -> None:
    """Raise where YAML has made a truth value of a text: yes, no, on and off without quotes."""
    if annotation in (list[str], list[str] | None) and isinstance(value, list):
        for i, one in enumerate(value):
            reject_truth(one, str, f"{where}[{i}]")
    elif annotation in (str, str | None) and isinstance(value, bool):
        words = "yes, on and true" if value else "no, off and false"
        raise ConfigError(f"{where} is a text, and to YAML {words} are truth values. Write it in quotes")


def dataclass_in(annotation: Any) -> Any:
    """The dataclass inside `Task`, `Task | None`, `list[Task]` or `dict[str, Task]`; None when there is none."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    inner = (dataclass_in(argument) for argument in typing.get_args(annotation))
    return next((record for record in inner if record is not None), None)


def dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)

"""Hydra's and OmegaConf's errors in one short message: the key, what was expected, the nearest known name."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixlora.config.overrides import config_dir
from mixlora.config.schema import Config
from mixlora.config.typed import dataclass_in, suggest

OPEN = {"method.gate": "gate"}  # mappings whose keys depend on what they hold
WORDS = {"tasks": "a task or mixture"}  # groups whose name is no noun of its own


def hydra_error(error: BaseException, record: type = Config) -> str:
    """One message for an error that was raised while a configuration that fits `record` was composed."""
    text = str(error)
    missing = re.search(r"You must specify '(\w+)'", text)
    if missing:
        return f"Choose {WORDS.get(missing[1], 'a ' + missing[1])}: {missing[1]}=NAME. {suggest('', options(text))}"
    absent = re.search(r"Could not find '([\w./-]+)'", text)
    if absent:
        group, _, name = absent[1].rpartition("/")
        what = WORDS.get(group, group or "config").removeprefix("a ")
        return f"There is no {what} '{name}'. {suggest(name, options(text))}"
    unloaded = re.search(r"Could not load '([\w-]+)/([\w.-]+)'", text)  # one of a list: [a,b]
    if unloaded:
        group, name = unloaded.groups()
        known = {
            path.stem
            for kind in {group, group.removesuffix("s")}
            for path in (Path(config_dir()) / kind).glob("*.yaml")
        }
        return f"There is no {WORDS.get(group, group).removeprefix('a ')} '{name}'. {suggest(name, known)}"
    if re.search(r"(no viable alternative|mismatched input|extraneous input)", text) and "=" in text:
        return "A value that holds '=' goes into double quotes: 'overrides=[\"key=value\",\"other=value\"]'"
    unassigned = re.search(r"Error parsing override '(.*)'\s+missing EQUAL", text)
    if unassigned:
        return f"'{unassigned[1]}' is not of the form key=value, such as train.max_steps=100"
    there = re.search(r"Could not append to config\. An item is already at '([^']+)'", text)
    if there and there[1] in leaves(record):
        return f"The key '{there[1]}' is there already, and + adds one that is not. Write {there[1]}=..."
    key = override_key(error)
    if key:
        return f"There is no key '{key}'. {near(key, record)}"
    return " ".join(text.split())


def options(text: str) -> list[str]:
    """The names under Hydra's 'Available options'."""
    return re.findall(r"^\t(\S+)$", text.partition("Available options")[2], flags=re.MULTILINE)


def override_key(error: BaseException) -> str | None:
    found = re.search(
        r"Could not override '([^']+)'|Could not append to config\. An item is already at '([^']+)'", str(error)
    )
    return (found[1] or found[2]) if found else None


def near(key: str, record: type = Config) -> str:
    """The nearest full key of `record`, by spelling or by initials (train.lr is train.learning_rate); else a list."""
    keys = list(leaves(record))
    if inside := [full for full in keys if full.startswith(f"{key}.")]:
        return suggest("", inside)
    section, _, name = key.rpartition(".")
    if section in OPEN:
        return f"An option that the YAML of this {OPEN[section]} does not show is added: +{key}=..."
    short = [full for full in keys if full.rpartition(".")[0] == section and initials(full.rpartition(".")[2]) == name]
    if short:
        return f"Did you mean '{short[0]}'?"
    by_leaf: dict[str, list[str]] = {}
    for full in keys:
        by_leaf.setdefault(full.rpartition(".")[2], []).append(full)
    found = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    leaf = difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=0.6)
    if found or leaf:
        return f"Did you mean '{found[0] if found else by_leaf[leaf[0]][0]}'?"
    return suggest(key, {full.partition(".")[0] for full in keys})


def initials(name: str) -> str:
    return "".join(part[0] for part in name.split("_"))


def leaves(record: Any, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        inner = dataclass_in(hints[field.name])
        if inner is not None and typing.get_origin(hints[field.name]) is not dict:
            yield from leaves(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"

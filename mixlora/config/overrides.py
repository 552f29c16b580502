"""What was typed, as Hydra reads it: paths and prompts that its grammar does not know, and short ways to say a thing.

Hydra itself allows either `+method=x` (no default) or `method=x` (a default), never both; `normalise` drops the plus of
known groups before Hydra looks, so both spellings work, in sweeps too.
"""

import os
import re
from collections.abc import Sequence, Set
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from mixlora.config.typed import literal
from mixlora.errors import ConfigError

MULTIRUN = frozenset({"-m", "--multirun"})
WITH_VALUE = frozenset(
    {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c"}
    | {"--experimental-rerun"}
)
INFO = frozenset({"--info", "-i"})
PATHS = frozenset({"run", "to", "run_dir", "output_root", "records", "resume", "data.source", "model.path", "recipe"})
GROUPS = frozenset({"model", "method", "tasks", "aux_loss", "experiment", "sweep"})


def config_dir() -> str:
    """configs/ inside an installed wheel, or at the top of the repository."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise ConfigError("This installation of mixlora has no configs/ folder. Install it again.")


def config_dirs(argv: Sequence[str]) -> list[Path]:
    """Ours, and the user's own that --config-dir names."""
    folders = [Path(config_dir())]
    for i, argument in enumerate(argv):
        if argument in ("--config-dir", "-cd") and i + 1 < len(argv):
            folders.append(Path(argv[i + 1]))
        elif argument.startswith("--config-dir="):
            folders.append(Path(argument.partition("=")[2]))
    return folders


def normalise(argv: Sequence[str], more_folders: Sequence[Path] = (), *, of_a_run: bool = True) -> list[str]:
    """`+method=x` -> `method=x`; `model=owner/name` and `model.path=...` -> `model=path model.path=...`; `~` -> a path.

    Args:
        more_folders: with configs, besides ours and those that --config-dir names.
        of_a_run: whether a run's configuration is composed, of groups.

    Raises:
        ConfigError: a sweep over hub ids or folders and over names of configs/model.
    """
    argv = [quoted(argument) for argument in argv]
    if not of_a_run:
        return switches_first(argv)
    keys = {argument.lstrip("+").partition("=")[0] for argument in argv}
    folders = [*config_dirs(argv), *more_folders]
    out = [one for argument in argv for one in respelled(argument, keys, folders)]
    return switches_first(left_to_points(out))


def respelled(argument: str, keys: Set[str], folders: Sequence[Path]) -> list[str]:
    """One argument as `normalise` hands it on, beside others with these keys."""
    override = parsed(argument)
    if override is None:
        return [argument]
    group = override.key_or_group in GROUPS and override.package is None
    if group and override.type in (OverrideType.ADD, OverrideType.FORCE_ADD):
        argument = argument.lstrip("+")
    key, value = override.key_or_group, argument.partition("=")[2]
    if group and key == "model" and is_path(value, folders):
        if override.is_sweep_override() and not all("/" in one for one in value.split(",")):
            raise ConfigError(
                f"model={value} sweeps over names of configs/model and over hub ids or folders. Give what has no name "
                "there one: a file model/NAME.yaml in a folder for --config-dir, with the keys of model/path.yaml"
            )
        return ["model=path", f"model.path={value}"]
    if key == "model.path" and "model" not in keys:
        return ["model=path", argument.lstrip("+")]
    names = override.value()
    if group and key == "tasks" and isinstance(names, list) and names and "tasks.name" not in keys:
        return [argument, f"tasks.name={'-'.join(map(str, names))}"]  # not what the last of them is called
    return [argument]


def is_path(model: str, folders: Sequence[Path]) -> bool:
    """Whether `model=` was given a hub id or a folder, and no name of a file under model/."""
    named = any((folder / "model" / f"{model}.yaml").is_file() for folder in folders)
    return ("/" in model or Path(model).is_dir()) and not named


def switches_first(argv: list[str]) -> list[str]:
    """Hydra takes a switch only where no override stands before it and another after it."""
    switches, overrides, last, left = list[str](), list[str](), list[str](), list(argv)
    while left:
        argument = left.pop(0)
        if argument in INFO and not (left and "=" not in left[0]):  # its value may be left out
            last.append(argument)
        elif argument.startswith("-"):
            switches += [argument, *([left.pop(0)] if argument in WITH_VALUE | INFO and left else [])]
        else:
            overrides.append(argument)
    return [*switches, *overrides, *last]


def quoted(argument: str) -> str:
    """`prompt=Hello, world` and `run=jürgen/x` in quotes: a prompt is a text whatever Hydra would read in it, and of a
    path Hydra's grammar knows the letters of English alone."""
    key, _, value = argument.partition("=")
    read = parsed(argument)
    place = value if read is None else read.value()
    if key.lstrip("+") in PATHS | {"model"} and isinstance(place, str) and place.startswith("~"):
        return spelled(key, os.path.expanduser(place))
    if key.lstrip("+") == "prompt" and value and not (read is not None and value[0] in "'\"" and value[-1] == value[0]):
        return spelled(key, literal(value))
    if read is None and value:
        if key.lstrip("+") in PATHS:
            return spelled(key, value)
        if key.lstrip("+") == "model" and "/" in value:
            return spelled("model.path", value)
    return argument


def left_to_points(argv: list[str]) -> list[str]:
    """In a sweep over a group, `key=value` -> `key=choice(value)`: a sweep over one value, the same for every point.

    Hydra composes a sweep once without what is swept over. `method.gate.renormalize` has no place there where no method
    is chosen, so it would be refused; what is swept over is left to the points.
    """
    overrides = {argument: override for argument in argv if (override := parsed(argument)) is not None}
    groups = {override.key_or_group: override for override in overrides.values() if override.key_or_group in GROUPS}
    is_sweep = bool(MULTIRUN & set(argv)) or "sweep" in groups
    if not is_sweep or not any(override.is_sweep_override() for override in groups.values()):
        return argv
    return [of_one(argument, overrides[argument]) if argument in overrides else argument for argument in argv]


def of_one(argument: str, override: Override) -> str:
    key, _, value = argument.partition("=")
    section = (override.key_or_group or "").partition(".")
    if not section[1] or section[0] == "hydra" or not value or override.is_sweep_override():
        return argument
    left = parsed(f"{key}=choice({value})")
    if left is None:  # of null there is no choice
        return argument
    # A choice drops quotes: of '1' it would make the number.
    kept = [one and one.value() for one in map(parsed, (f"{key}={text}" for text in left.sweep_string_iterator()))]
    return str(left.input_line) if kept == [override.value()] else argument


def spelled(key: str, value: str) -> str:
    """`key=value`, in quotes where Hydra would read it as something else."""
    read = parsed(f"{key}={value}")
    return f"{key}={value}" if read is not None and read.value() == value else f"{key}={in_quotes(value)}"


def in_quotes(value: str) -> str:
    """Hydra takes backslashes for what they are, but for those before a quote or at the end."""
    inside = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + (r"\"" if found[2] else ""), value)
    return f'"{inside}"'


def parsed(argument: str) -> Override | None:
    """None for a switch, or a mistake that Hydra will report."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def store_single_tasks(argv: Sequence[str]) -> None:
    """Let `tasks=NAME` mean the mixture of the one task in task/NAME.yaml, ours or one in --config-dir."""
    folders = config_dirs(argv)
    names = {path.stem for folder in folders for path in (folder / "task").glob("*.yaml")}
    mixtures = {path.stem for folder in folders for path in (folder / "tasks").glob("*.yaml")}
    for name in sorted(names - mixtures):
        node = {"defaults": [{f"/task@mixture.{name}": name}, "_self_"], "name": name}
        ConfigStore.instance().store(group="tasks", name=name, node=node)

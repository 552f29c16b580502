"""The door of every command: Hydra composes, the result is typed, a mistake is one message and an exit status.

Hydra itself allows either `+method=x` (no default) or `method=x` (a default), never both; `normalise` drops the plus of
known groups before Hydra looks, so both spellings work, in sweeps too.
"""

import functools
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mixlora.config import explain
from mixlora.config.schema import Config
from mixlora.config.typed import literal
from mixlora.errors import ConfigError, MixloraError

RANK_SECONDS = 10.0  # that other ranks leave rank 0 to say what is wrong
HELP = frozenset({"-h", "--help"})
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


def door(config_name: str, record: type = Config) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make `run(cfg)` a command: `configs/<config_name>.yaml`, whose keys `record` has, with the command line."""

    def decorate(run: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(run)
        def main() -> None:
            if HELP & set(sys.argv[1:]):
                print(help_of(run, config_name))
                sys.exit(0)
            try:
                refuse_tasks(sys.argv[1:], in_ranks=record is Config)
                if MULTIRUN & set(sys.argv):
                    refuse_ranks(sys.argv[1:])
                sys.argv[1:] = normalise(sys.argv[1:])
            except ConfigError as error:
                leave(error, met_by_all=True)
            # With this set Hydra raises instead of printing its own traceback; the messages below are ours.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            if not sys.stderr.isatty():
                os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries fill a log file with noise
            # torch reports a lost connection with a stack of its own besides; mixlora.ranks says which rank is gone.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            store_single_tasks(sys.argv[1:])
            try:
                hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)(guarded)()
            except Exception as error:
                leave(error, record)

        @functools.wraps(run)
        def guarded(cfg: DictConfig) -> None:
            try:
                run(cfg)
            except MixloraError as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise  # the other points of a sweep go on
                leave(error, record)

        return main

    return decorate


def help_of(run: Callable[[DictConfig], None], config_name: str) -> str:
    """Hydra's own would compose first, and say what is not chosen yet."""
    folder = Path(config_dir())
    lines = [str(sys.modules[run.__module__].__doc__).strip(), ""]
    composes = config_name in ("train", "evaluate")
    for group in ("method", "tasks", "task", "model", "aux_loss", "sweep") if composes else ():
        names = sorted(path.stem for path in (folder / group).glob("*.yaml"))
        lines.append(f"{'tasks' if group == 'task' else group}=  {', '.join(names)}")
    shown = "trunk" if composes else config_name
    return "\n".join([*lines, f"Every key: {folder / shown}.yaml   Hydra's switches (--cfg job, ...): --hydra-help"])


def leave(error: Exception, record: type = Config, *, met_by_all: bool = False) -> NoReturn:
    """Print what a user can mend in one message and exit with its status; everything else is a bug and raises.

    Args:
        met_by_all: every process of the job meets the same, so the first alone says it.
    """
    if os.environ.get("MIXLORA_DEBUG"):
        raise error
    if isinstance(error, yaml.YAMLError):  # which names the file, the line and the column
        error = ConfigError(f"A file is no YAML: {' '.join(str(error).split())}")
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not isinstance(error, MixloraError):
        error = ConfigError(explain.hydra_error(error, record))
    if not isinstance(error, MixloraError):
        raise error
    if not is_main_process():
        # Rank 0 meets the same mistake and says it; its launcher then ends this process during the wait.
        time.sleep(RANK_SECONDS)
        if met_by_all:
            sys.exit(error.status)
    place = "" if is_main_process() else f"rank {os.environ.get('RANK', '?')}: "
    print(f"mixlora: {place}{error}", file=sys.stderr)
    sys.exit(error.status)


def refuse_ranks(argv: Sequence[str]) -> None:
    """Every rank would run a sweep of its own.

    Raises:
        ConfigError: inside a process group, with the command to use instead.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a sweep inside torchrun or accelerate launch would run once on every rank. Start it as one process, "
            f"which gives each point its devices: python -m {module_name()} {shlex.join(argv)}"
        )


def refuse_tasks(argv: Sequence[str], *, in_ranks: bool) -> None:
    """Without a process group every task of a SLURM step would be a run of its own, in one folder.

    Args:
        in_ranks: whether this command can run as the ranks of one job.

    Raises:
        ConfigError: srun started several, with the command to use instead.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    # Of `srun --pty bash` the first task alone has the terminal, and a command typed there runs once.
    if tasks == 1 or "WORLD_SIZE" in os.environ or "SLURM_PTY_PORT" in os.environ:
        return
    line = f"-m {module_name()} {shlex.join(argv)}"
    if in_ranks and not MULTIRUN & set(argv):
        one = f"srun --ntasks=1 torchrun --nproc-per-node={tasks} {line}"
        remedy = f"On one machine: {one}. On several: -m launcher=slurm, or torchrun --nnodes on each"
    else:
        remedy = f"Use one: srun --ntasks=1 python {line}"
    raise ConfigError(f"srun started {tasks} tasks that know nothing of each other. {remedy}")


def module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else "mixlora.train"


def is_main_process() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def normalise(argv: Sequence[str]) -> list[str]:
    """`+method=x` -> `method=x`; `model=owner/name` and `model.path=...` -> `model=path model.path=...`.

    Raises:
        ConfigError: a sweep over hub ids or folders and over names of configs/model.
    """
    out: list[str] = []
    argv = [quoted(argument) for argument in argv]
    folders = config_dirs(argv)
    names_model = any(argument.lstrip("+").startswith("model=") for argument in argv)
    for argument in argv:
        override = parsed(argument)
        if override is None:
            out.append(argument)
            continue
        group = override.key_or_group in GROUPS and override.package is None
        if group and override.type in (OverrideType.ADD, OverrideType.FORCE_ADD):
            argument = argument.lstrip("+")
        value = argument.partition("=")[2]
        named = any((folder / "model" / f"{value}.yaml").is_file() for folder in folders)
        is_path = override.key_or_group == "model" and group and ("/" in value or Path(value).is_dir()) and not named
        if is_path and override.is_sweep_override() and not all("/" in one for one in value.split(",")):
            raise ConfigError(
                f"model={value} sweeps over names of configs/model and over hub ids or folders. Give what has no name "
                "there one: a file model/NAME.yaml in a folder for --config-dir, with the keys of model/path.yaml"
            )
        if is_path:
            out += ["model=path", f"model.path={value}"]
        elif override.key_or_group == "model.path" and not names_model:
            out += ["model=path", argument.lstrip("+")]
        else:
            out.append(argument)
    return switches_first(left_to_points(out))


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
    if read is not None and read.value() == value:
        return f"{key}={value}"
    # Hydra takes backslashes for what they are, but for those before a quote or at the end.
    inside = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + (r"\"" if found[2] else ""), value)
    return f'{key}="{inside}"'


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

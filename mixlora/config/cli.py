"""The door of every command: Hydra composes, the result is typed, a mistake is one message and an exit status."""

import functools
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mixlora.config import explain
from mixlora.config.overrides import MULTIRUN, config_dir, normalise, store_single_tasks
from mixlora.config.schema import Config
from mixlora.environment import is_main_process, world_size
from mixlora.errors import ConfigError, MixloraError, wrapped

RANK_SECONDS = 10.0  # that other ranks leave rank 0 to say what is wrong
HELP = frozenset({"-h", "--help"})


def door(config_name: str, record: type = Config) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make `run(cfg)` a command: `configs/<config_name>.yaml`, whose keys `record` has, with the command line."""

    def decorate(run: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(run)
        def main() -> None:
            if HELP & set(sys.argv[1:]):
                print(help_of(run, config_name))
                sys.exit(0)
            sys.argv[1:] = checked(sys.argv[1:], record)
            leave_errors_to_us()
            store_single_tasks(sys.argv[1:])
            try:
                hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)(guarded)()
            except KeyboardInterrupt:
                interrupted()
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
            except Exception as error:
                if wrapped(error, KeyboardInterrupt):
                    interrupted()
                raise

        return main

    return decorate


def checked(argv: Sequence[str], record: type) -> list[str]:
    """What was typed, as Hydra reads it; the process ends where it cannot be meant so."""
    try:
        refuse_tasks(argv, in_ranks=record is Config)
        if MULTIRUN & set(argv):
            refuse_ranks(argv)
        return normalise(argv, of_a_run=issubclass(record, Config))
    except ConfigError as error:
        leave(error, met_by_all=True)


def leave_errors_to_us() -> None:
    """Let Hydra raise instead of printing its own traceback, and keep other libraries quiet."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries fill a log file with noise
    # torch reports a lost connection with a stack of its own besides; mixlora.ranks says which rank is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


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
    if wrapped(error, KeyboardInterrupt):  # a library took it for a fault of what it was reading
        interrupted()
    if isinstance(error, yaml.YAMLError):  # which names the file, the line and the column
        error = ConfigError(f"A file is not valid YAML: {' '.join(str(error).split())}")
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


def interrupted() -> NoReturn:
    """End where Ctrl-C came before anything was begun: later it is heard by `mixlora.signals`."""
    print("mixlora: interrupted before anything was begun", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def refuse_ranks(argv: Sequence[str]) -> None:
    """Every rank would run a sweep of its own.

    Raises:
        ConfigError: inside a process group, with the command to use instead.
    """
    if world_size() > 1:
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
    """Of this command, be it started as `python -m mixlora.generate` or as the script mixlora-generate."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = re.fullmatch(r"mixlora-([a-z-]+)", Path(sys.argv[0]).stem)
    return spec.name if spec else f"mixlora.{script[1].replace('-', '_') if script else 'train'}"

"""A tiny job for tests: sums as a task of its own, the model of random weights, the real command line."""

import functools
import importlib
import json
import multiprocessing
import multiprocessing.context
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (REPOSITORY / "configs" / "method").glob("*.yaml"))
SHORT = (
    "tasks=sums", "model=tiny", "model.random.num_hidden_layers=2", "train.max_steps=6", "train.save_steps=2",
    "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2", "method.lora_dropout=0.1",
    "report=false",
)  # fmt: skip
TIMES = {"seconds", "training_seconds", "checkpoint_seconds", "tokens_per_second", "peak_memory_bytes"}
TYPED = {"command", "overrides"}  # which name the folder


def task_folder(folder: Path) -> Path:
    """A --config-dir with the task `sums` over a file of its own."""
    (folder / "task").mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    rows = []
    for _ in range(60):
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        asked = f"What is {a} plus {b}?" + " Please." * draw.randint(0, 4)
        rows.append({"q": asked, "options": [str(a + b), str(a + b + 1), str(a * b + 20)], "right": 0})
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "sums",
        "path": str(folder / "sums.jsonl"),
        "splits": {"train": "[:44]", "validation": "[44:50]", "test": "[50:]"},
        "question": "{q}",
        "options": {"field": "options"},
        "answer": "right",
    }
    (folder / "task" / "sums.yaml").write_text(yaml.safe_dump(task))
    return folder


def command(configs: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Arguments after `python` or `torchrun`."""
    where = [f"run_dir={run_dir}", f"output_root={run_dir.parent}"]
    return ["-m", "mixlora.train", "--config-dir", str(configs), *SHORT, *where, *overrides]


@dataclass
class Done:
    """What subprocess.run would say."""

    returncode: int
    stdout: str
    stderr: str


class Started:
    """`python -m mixlora.DOOR` in a process of its own, forked off a server that has imported torch before."""

    def __init__(self, door: str, arguments: Sequence[str], env: Mapping[str, str]):
        self.folder = Path(tempfile.mkdtemp())
        argv = [f"mixlora.{door}", *arguments]
        self.process = server().Process(target=main, args=(argv, dict(env), self.folder))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = 150) -> int | None:
        """The exit status; None while the process is still alive."""
        self.process.join(seconds)
        return self.process.exitcode

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def done(self, seconds: float = 150) -> Done:
        status = self.wait(seconds)
        if status is None:
            self.send(signal.SIGKILL)
            self.wait()
            raise TimeoutError((self.folder / "stdout").read_text() + (self.folder / "stderr").read_text())
        return Done(status, (self.folder / "stdout").read_text(), (self.folder / "stderr").read_text())


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same test on every machine
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixlora.experiment", "mixlora.train", "transformers.models.llama.modeling_llama"])
    return context


def main(argv: list[str], env: dict[str, str], folder: Path) -> None:
    os.environ |= env
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = argv
    from mixlora import console
    from mixlora.environment import is_main_process

    console.console.quiet = not is_main_process()  # decided at import, here before the rank was known
    importlib.import_module(argv[0]).main()


def start(configs: Path, run_dir: Path, *overrides: str, **env: str) -> Started:
    return Started("train", command(configs, run_dir, *overrides)[2:], env)


def train(configs: Path, run_dir: Path, *overrides: str, **env: str) -> Done:
    return start(configs, run_dir, *overrides, **env).done()


def evaluate(*arguments: str, **env: str) -> Done:
    return Started("evaluate", arguments, env).done()


def ranks(configs: Path, run_dir: Path, *overrides: str, processes: int = 2, **env: str) -> list[Started]:
    """As `srun` would start them: nobody ends the other ranks when one dies."""
    return [start(configs, run_dir, *overrides, **env, **place) for place in environments(processes)]


def environments(processes: int) -> list[dict[str, str]]:
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    return [job | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def train_on(configs: Path, run_dir: Path, *overrides: str, processes: int = 2, **env: str) -> list[Done]:
    return [rank.done() for rank in ranks(configs, run_dir, *overrides, processes=processes, **env)]


def first_of(started: list[Started]) -> Done:
    """Rank 0's end; the others are ended then, as launchers do."""
    done = started[0].done()
    for other in started[1:]:
        other.process.terminate()
        other.wait()
    return done


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launched(
    launcher: list[str], configs: Path, run_dir: Path, *overrides: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """A real command: `python -m torch.distributed.run ...` or `python -m accelerate.commands.launch ...`."""
    line = [sys.executable, *launcher, *command(configs, run_dir, *overrides)]
    more = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    more["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(line, env=os.environ | more | env, capture_output=True, text=True, timeout=300)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def contents(run_dir: Path) -> dict[str, object]:
    """What a run leaves, without times: adapter and predictions as bytes, metrics line by line."""
    found: dict[str, object] = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for folder in ("adapter", "predictions", "before", "results.json", "routing.json")
        for path in ([run_dir / folder] if (run_dir / folder).is_file() else sorted((run_dir / folder).rglob("*")))
        if path.is_file()
    }
    last = max((run_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    found |= {f"last {name}": (last / name).read_bytes() for name in ("adapter.safetensors", "optimizer.safetensors")}
    found["metrics"] = [
        without_times(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    found["run"] = without_times(json.loads((run_dir / "run.json").read_text()))
    found["names"] = sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))
    return found


def without_times(values: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if key not in TIMES | TYPED}

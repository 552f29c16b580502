"""Sweeps through a real SLURM on loopback: `make test-slurm`."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster, lacking
from tiny_runs import REPOSITORY, contents, task_folder

pytestmark = pytest.mark.slurm
LONG = ("train.max_steps=1500", "train.save_steps=100", "train.logging_steps=50")
either = pytest.mark.parametrize("number", [1, 2], ids=["one process", "two processes"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if lacking():  # whoever asks for these tests must not take a skip for a success
        pytest.fail(f"no SLURM can be started here: {lacking()}", pytrace=False)
    with Cluster(tmp_path_factory.mktemp("slurm")) as up:
        task_folder(up.folder / "own")
        yield up


class Sweep:
    """A sweep that goes through the cluster, in a process of its own."""

    def __init__(self, cluster: Cluster, folder: Path, *overrides: str, launcher: str = "slurm") -> None:
        self.cluster, self.root = cluster, folder / "runs"
        self.waits: dict[str, float] = {}  # since when a job is seen to wait
        line = [
            sys.executable, "-m", "mixlora.train", "-m",
            f"--config-dir={cluster.folder / 'own'}", "tasks=sums", "model=tiny",
            "model.random.num_hidden_layers=1", "train.max_steps=4", "train.per_device_train_batch_size=2",
            "train.gradient_accumulation_steps=1", "slurm.gpus_per_node=0", f"launcher={launcher}",
            f"output_root={self.root}", *overrides,
        ]  # fmt: skip
        if launcher == "local":
            line = [entry for entry in line if not entry.startswith("slurm")]
        env = cluster.env | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        # A profile as one finds them, which must not win over what is asked for.
        env |= {"SBATCH_JOB_NAME": "mine", "SBATCH_NO_REQUEUE": "1", "SBATCH_TIMELIMIT": "1", "SBATCH_OUTPUT": "mine"}
        self.process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(self, seconds: float = 400) -> str:
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            self.hurry()
            time.sleep(1)
        said, _ = self.process.communicate(timeout=1)
        print(said)
        return said

    def hurry(self) -> None:
        """SLURM lets a requeued job wait for two minutes. In the second in which it ended it must not start again."""
        waiting = self.cluster("squeue", "-h", "-t", "PD", "-o", "%i").split()
        self.waits = {number: self.waits.get(number, time.monotonic()) for number in waiting}
        for number, since in self.waits.items():
            if time.monotonic() - since > 4:
                self.cluster("scontrol", "update", f"JobId={number}", "StartTime=now")

    @property
    def folders(self) -> list[Path]:
        return sorted(path.parent for path in self.root.glob("*/config.yaml"))

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait_for(lambda: any(last_step(folder) >= step for folder in self.folders), f"step {step}", 200)

    @property
    def job(self) -> str:
        return self.cluster("squeue", "-h", "-o", "%i").split()[0]


def last_step(folder: Path) -> int:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def record(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """What the long run of so many processes leaves when nobody disturbs it, outside SLURM."""

    @functools.cache
    def run(number: int) -> dict[str, object]:
        whole = tmp_path_factory.mktemp("whole")
        sweep = Sweep(cluster, whole, "method=smora", *LONG, f"processes={number}", launcher="local")
        sweep.end()
        assert sweep.process.returncode == 0
        return contents(sweep.folders[0])

    return run


@pytest.fixture
def uninterrupted(undisturbed):
    return undisturbed(1)


def test_four_points_are_four_jobs_and_the_same_command_runs_none(cluster, tmp_path):
    sweep = Sweep(cluster, tmp_path, "method=lora,smora", "seed=0,1")
    said = sweep.end()
    assert sweep.process.returncode == 0
    assert said.count("\nDone ") == 4
    assert len(sweep.folders) == 4
    again = Sweep(cluster, tmp_path, "method=lora,smora", "seed=0,1")
    assert "4 finished before; 0 to run" in again.end()
    local = Sweep(cluster, tmp_path / "local", "method=smora", "seed=1", launcher="local")
    local.end()
    (twin,) = (folder for folder in sweep.folders if folder.name == local.folders[0].name)
    assert (
        contents(twin)["adapter/adapter_model.safetensors"]
        == contents(local.folders[0])["adapter/adapter_model.safetensors"]
    )


@pytest.mark.parametrize("layout", [("processes=2",), ("slurm.nodes=2",)], ids=["two on a node", "two nodes"])
def test_a_point_of_two_processes(cluster, tmp_path, layout):
    sweep = Sweep(cluster, tmp_path, "method=smora", *layout)
    sweep.end()
    assert sweep.process.returncode == 0
    assert record(sweep.folders[0])["world_size"] == 2


def test_at_most_so_many_jobs_are_in_the_queue(cluster, tmp_path):
    sweep = Sweep(cluster, tmp_path, "method=lora", "seed=0,1,2", "jobs=1")
    most = 0
    while sweep.process.poll() is None:
        most = max(most, len(cluster("squeue", "-h", "-o", "%i", "-t", "PD,R,CF").split()))
        time.sleep(0.5)
    sweep.end()
    assert sweep.process.returncode == 0
    assert most == 1


@either
def test_a_job_that_is_requeued_goes_on_to_the_same_bytes(cluster, tmp_path, undisturbed, number):
    sweep = Sweep(cluster, tmp_path, "method=smora", *LONG, f"processes={number}")
    sweep.wait_for_step(150)
    cluster("scontrol", "requeue", sweep.job)
    said = sweep.end()
    assert sweep.process.returncode == 0
    assert "Going on after step" in (sweep.root / "logs" / f"{sweep.folders[0].name}.log").read_text()
    assert "FAILED" not in said
    assert contents(sweep.folders[0]) == undisturbed(number)


@either
def test_the_warning_before_the_time_limit_saves_and_requeues(cluster, tmp_path, undisturbed, number):
    """The warning as SLURM sends it, to every process of the job."""
    sweep = Sweep(cluster, tmp_path, "method=smora", *LONG, f"processes={number}")
    sweep.wait_for_step(150)
    cluster("scancel", "--signal=USR2", sweep.job)
    sweep.end()
    assert sweep.process.returncode == 0
    log = (sweep.root / "logs" / f"{sweep.folders[0].name}.log").read_text()
    assert "Going on after step" in log
    assert contents(sweep.folders[0]) == undisturbed(number)


def test_a_run_longer_than_its_time_limit_goes_on_again_and_again(cluster, tmp_path):
    """A limit of two minutes, which SLURM itself warns of and keeps; the warning may come a minute early."""
    job = ("method=smora", "train.max_steps=100000", "train.save_steps=1000", "train.logging_steps=100")
    sweep = Sweep(cluster, tmp_path, *job, "slurm.time_min=2", "slurm.signal_delay_s=40")
    sweep.wait_for_step(100)
    first = sweep.job
    log = sweep.root / "logs" / f"{sweep.folders[0].name}.log"

    def went_on_twice() -> bool:
        sweep.hurry()
        return log.read_text().count("Going on after step") == 2

    cluster.wait_for(went_on_twice, "two requeues", 600)
    assert sweep.job == first
    assert len(list((sweep.root / "logs" / "slurm").glob("*_submission.sh"))) == 1
    cluster("scancel", sweep.job)
    assert "FAILED" in sweep.end(60)


@either
def test_a_preempted_job_comes_back(cluster, tmp_path, undisturbed, number):
    """The partition gives it a time of grace, in which it saves and must not end as failed."""
    sweep = Sweep(cluster, tmp_path, "method=smora", *LONG, "slurm.partition=low", f"processes={number}")
    sweep.wait_for_step(150)
    taken = cluster(
        "sbatch", "--parsable", "-o", "/dev/null", "-p", "high", "-N2", "-n4", "--wrap", "srun sleep 5"
    ).strip()
    cluster.wait_for(lambda: cluster("squeue", "-h", "-j", taken, "-o", "%T").strip() == "RUNNING", "preemption", 60)
    said = sweep.end()
    assert sweep.process.returncode == 0
    assert "FAILED" not in said
    assert contents(sweep.folders[0]) == undisturbed(number)


def test_srun_with_several_tasks_is_refused_once_with_what_to_type(cluster, tmp_path):
    line = ["srun", "-n2", sys.executable, "-m", "mixlora.train", "+method=lora", "+tasks=arc", "model=tiny"]
    env = cluster.env | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*line, "data.source=sample"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("srun started 2 tasks") == 1
    assert "srun --ntasks=1 torchrun --nproc-per-node=2 -m mixlora.train +method=lora" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_reported_and_the_same_command_goes_on(cluster, tmp_path, uninterrupted):
    sweep = Sweep(cluster, tmp_path, "method=smora", *LONG)
    sweep.wait_for_step(150)
    kill_run(sweep.folders[0])
    said = sweep.end()
    assert sweep.process.returncode == 1
    assert "FAILED" in said
    again = Sweep(cluster, tmp_path, "method=smora", *LONG)
    again.end()
    assert again.process.returncode == 0
    assert contents(sweep.folders[0]) == uninterrupted


def kill_run(folder: Path) -> None:
    subprocess.run(["pkill", "-9", "-f", f"mixlora.train.*output_root={folder.parent} .*hydra.mode=RUN"], check=True)


def test_a_cancelled_job_is_reported(cluster, tmp_path):
    sweep = Sweep(cluster, tmp_path, "method=smora", *LONG)
    sweep.wait_for_step(50)
    cluster("scancel", sweep.job)
    said = sweep.end()
    assert sweep.process.returncode == 1
    assert "FAILED" in said


def test_a_sweep_that_was_left_finds_its_jobs_again(cluster, tmp_path):
    sweep = Sweep(cluster, tmp_path, "method=smora", *LONG)
    sweep.wait_for_step(50)
    number = sweep.job
    sweep.process.send_signal(2)
    said = sweep.end(60)
    assert sweep.process.returncode == 130
    assert f"scancel {number} ends them" in said
    again = Sweep(cluster, tmp_path, "method=smora", *LONG)
    again.end()
    assert again.process.returncode == 0
    assert cluster("squeue", "-h") == ""
    assert len(list((sweep.root / "logs" / "slurm").glob("*_submission.sh"))) == 1


def test_a_recipe_runs_its_points_as_jobs(cluster, tmp_path):
    line = [sys.executable, "-m", "mixlora.reproduce", "recipe=tiny", f"output_root={tmp_path}", "include_dirty=true"]
    env = cluster.env | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*line, "launcher=slurm", "slurm.gpus_per_node=0"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "logs" / "slurm").glob("*_submission.sh"))) == 4
    assert (tmp_path / "tables" / "tiny" / "table.md").is_file()

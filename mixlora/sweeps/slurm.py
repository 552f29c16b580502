"""Points as SLURM jobs, submitted by submitit and watched through squeue.

A job is named after its run folder, so that a sweep which is started again finds the jobs that still wait or run.
SLURM's warning before the time limit lets the run save; the job is requeued and goes on.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixlora import signals
from mixlora.config.schema import Launch
from mixlora.errors import ConfigError, MixloraError
from mixlora.sweeps.points import Point
from mixlora.sweeps.processes import Machine, Refused, command, last_line, size_of, spawn, threads

ENDING = "completing"  # of a job that was cancelled, and of one that is being requeued
QUEUE_SECONDS = 5.0  # between two looks at the queue, whatever the number of points
REQUEUE_SECONDS = 30.0  # of SLURM's warning that are left for bringing the job back
LEAST_SAVE_SECONDS = 5.0  # that a run gets, however late the warning comes
REFUSED_SECONDS = 60.0  # before sbatch is asked again
# Variables of sbatch that are not named as its parameters, and those of what submitit and this module rely on.
VARIABLES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE"}
RELIED_ON = (
    "array_inx", "clusters", "error", "export", "gpus", "gpus_per_node", "gpus_per_task", "gres", "no_requeue",
    "open_mode", "output", "signal", "wait",
)  # fmt: skip
HOLD_SECONDS = 3600.0  # that a job which was told to end waits for SLURM to end it, or to requeue it


class Slurm:
    """A job for each point; at most `jobs` of them in the queue at a time."""

    pause = 0.5

    def __init__(self, launch: Launch) -> None:
        try:
            import submitit
        except ImportError:
            raise ConfigError("launcher=slurm needs submitit: pip install submitit") from None
        self.submitit, self.launch = submitit, launch
        self.queue = Queue()
        self.running: set[str] = set()  # numbers of jobs
        self.refused = float("-inf")  # when sbatch last refused a job

    def describe(self) -> str:
        asked, processes = self.launch.slurm, self.launch.processes
        limit = "all at once" if self.launch.jobs is None else f"{self.launch.jobs} in the queue at a time"
        return f"SLURM jobs of {asked.nodes} node(s) with {processes} process(es) each, {limit}"

    def room(self) -> bool:
        open_again = time.monotonic() - self.refused >= REFUSED_SECONDS
        return open_again and (self.launch.jobs is None or len(self.running) < self.launch.jobs)

    def knows(self, point: Point) -> bool:
        return self.queue.find(point.folder) is not None or bool(point.in_use)

    def start(self, point: Point, log: Path) -> "Job":
        number = self.queue.find(point.folder) or self.submit(point, log)
        self.running.add(number)
        return Job(self, point, number, log)

    def submit(self, point: Point, log: Path) -> str:
        executor = self.submitit.SlurmExecutor(
            folder=log.parent / "slurm", max_num_timeout=self.launch.slurm.max_requeues
        )
        asked = parameters(self.launch, point.folder, self.queue.ending(point.folder))
        executor.update_parameters(**asked)
        utils = self.submitit.core.utils
        try:
            # A Ctrl-C would reach sbatch as well, and nobody would know whether it got through.
            with signals.held(), without_rivals(asked):
                job = executor.submit(Node(point.arguments, self.launch, log.absolute()))
        except (OSError, utils.FailedJobError, utils.FailedSubmissionError) as error:
            why = str(error).strip()[-500:]
            remedy = "Where a user may submit so many jobs and no more, set jobs to that number"
            self.refused = time.monotonic()
            raise Refused(f"sbatch refused {point.name}: {why}\n{remedy}") from None
        self.queue.add(str(job.job_id), point.folder)
        return str(job.job_id)

    def leave(self, handles: "Sequence[Job]") -> str:
        numbers = " ".join(handle.number for handle in handles)
        if not handles:
            return "no job was in the queue; the same command goes on from there"
        return (
            f"{len(handles)} jobs go on in SLURM (scancel {numbers} ends them); the same command watches them again "
            "and submits what was not yet submitted"
        )


class Job:
    """One point in SLURM's hands."""

    def __init__(self, place: Slurm, point: Point, number: str, log: Path) -> None:
        self.place, self.point, self.number = place, point, number
        self.state = f"job {number}"
        self.silence = f"it printed nothing; what SLURM said is in {log.parent / 'slurm' / number}_0_log.out"

    def poll(self) -> int | None:
        """None while the job is in the queue or another run at the point; then whether one finished, by its folder."""
        found = self.place.queue.state(self.number)
        if found is not None:
            self.state = f"job {self.number} {found}"
            if found == ENDING and self.point.finished:  # a node that does not let go of it does not hold the sweep
                self.place.running.discard(self.number)
                return 0
            return None
        self.place.running.discard(self.number)
        if self.point.finished:
            return 0
        if not self.place.queue.gone_for(self.number, 3 * QUEUE_SECONDS):
            return None  # a shared disk may show the last file late
        if self.point.in_use is not False:
            self.state = "runs elsewhere"
            return None
        return 0 if self.point.finished else 1


class Queue:
    """What squeue says about this user's jobs, asked at most every QUEUE_SECONDS."""

    def __init__(self) -> None:
        self.asked = float("-inf")
        self.tried = float("-inf")
        self.jobs: dict[str, tuple[str, str]] = {}  # number -> (state, name)
        self.gone: dict[str, float] = {}

    def add(self, number: str, folder: Path) -> None:
        """A job that was just submitted is in the queue, whatever the last look has seen."""
        self.jobs[number] = "pending", job_name(folder)

    def state(self, number: str) -> str | None:
        self.look()
        found = self.jobs.get(number)
        if found is None:
            self.gone.setdefault(number, time.monotonic())
            return None
        self.gone.pop(number, None)
        return found[0]

    def gone_for(self, number: str, seconds: float) -> bool:
        """Whether the job has been missing that long. A requeued job is away from the queue at no time."""
        return number in self.gone and self.asked - self.gone[number] >= seconds

    def find(self, folder: Path) -> str | None:
        """The job of an earlier sweep for this run folder that still waits or runs."""
        self.look()
        return next((number for number, state in self.named(folder) if state != ENDING), None)

    def ending(self, folder: Path) -> str | None:
        """The job for this run folder that was cancelled and is not gone, or is on its way back into the queue."""
        return next((number for number, state in self.named(folder) if state == ENDING), None)

    def named(self, folder: Path) -> Iterator[tuple[str, str]]:
        return ((number, state) for number, (state, name) in self.jobs.items() if name == job_name(folder))

    def look(self) -> None:
        if time.monotonic() - self.tried < QUEUE_SECONDS:
            return
        # All of the user's jobs, in hidden partitions too, whatever a profile has narrowed squeue to.
        shown = ["squeue", "--all", "--noheader", "--user", str(os.getuid()), "--format", "%i|%T|%r|%j"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
        try:
            said = subprocess.run(
                shown, env=env, capture_output=True, text=True, errors="replace", check=True, timeout=120
            ).stdout
        except FileNotFoundError:
            raise ConfigError(
                "launcher=slurm: there is no squeue here. Start the sweep on a node of the cluster"
            ) from None
        except (subprocess.SubprocessError, OSError) as error:
            self.tried = time.monotonic()
            if self.asked == float("-inf"):  # a job of an earlier sweep would be submitted twice
                why = str(getattr(error, "stderr", None) or error).strip()
                raise MixloraError(f"squeue does not answer, so nothing was submitted: {why[-500:]}") from None
            return  # a controller that is busy or restarts: what was known stands until it answers
        self.jobs = {}
        for line in said.splitlines():
            number, state, reason, name = line.split("|", 3)
            self.jobs[number] = f"{state.lower()} ({reason})" if state == "PENDING" else state.lower(), name
        self.asked = self.tried = time.monotonic()


def job_name(folder: Path) -> str:
    return f"mixlora:{folder.absolute()}"


def parameters(launch: Launch, folder: Path, after: str | None = None) -> dict[str, Any]:
    """Of submitit's SlurmExecutor: one task a node, which starts the node's processes.

    Args:
        after: the job whose end this one must wait for.
    """
    asked = launch.slurm
    gpus = gpus_of_node(launch)
    # srun, which starts the job's task, does not go by sbatch's own from SLURM 22.05 to 23.02.
    cpus = [] if asked.cpus_per_task is None else [f"export SRUN_CPUS_PER_TASK={asked.cpus_per_task}"]
    wanted = {
        "job_name": job_name(folder),
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "time": asked.time_min,
        "nodes": asked.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": gpus or None,
        "cpus_per_task": asked.cpus_per_task,
        "mem": None if asked.mem_gb is None else f"{round(asked.mem_gb * 1024)}M",
        "constraint": asked.constraint,
        "dependency": None if after is None else f"afterany:{after}",
        "signal_delay_s": asked.signal_delay_s,
        "setup": [*cpus, *asked.setup] or None,
        "stderr_to_stdout": True,
        # Without it a cluster whose default is otherwise would not bring back a preempted job.
        "additional_parameters": {"requeue": True, **asked.additional_parameters},
    }
    return {name: value for name, value in wanted.items() if value is not None}


def gpus_of_node(launch: Launch) -> int:
    return launch.processes if launch.slurm.gpus_per_node is None else launch.slurm.gpus_per_node


def own_threads(launch: Launch) -> dict[str, str]:
    """Of each process of a node that computes on its CPUs."""
    return {} if gpus_of_node(launch) else threads(launch.processes)


@contextlib.contextmanager
def without_rivals(asked: Mapping[str, Any]) -> Iterator[None]:
    """Out of the environment goes what a profile sets of sbatch and is said here, for it would win over the script."""
    said = (*asked, *asked.get("additional_parameters", ()), *RELIED_ON)
    names = {f"SBATCH_{VARIABLES.get(name, name.replace('-', '_').upper())}" for name in said}
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


class Node:
    """What one node of a job does: start its processes, and pass on SLURM's warning. submitit pickles it."""

    def __init__(self, arguments: Sequence[str], launch: Launch, log: Path) -> None:
        self.arguments, self.launch, self.log = tuple(arguments), launch, log
        self.told_to_end = False

    def __call__(self) -> int:
        import submitit

        here = submitit.JobEnvironment()
        port = 20000 + int(here.raw_job_id) % 20000
        machine = Machine(here.node, here.num_nodes, here.hostnames[0], port)
        # Node 0 has the log; what the others say is seldom wanted and never mixed in.
        log = self.log if here.node == 0 else self.log.with_suffix(f".node{here.node}.log")
        begins = size_of(log)
        # SLURM gives its warning to every process of the job. Here it is passed on as SIGTERM, once, so the run must
        # not be killed by it; what is ignored before exec stays ignored.
        warning = here._usr_sig()
        handler = signal.signal(warning, signal.SIG_IGN)
        self.listen(signal.SIGTERM)
        with open(log, "ab") as output:
            line = command(self.arguments, self.launch, machine)
            self.process = spawn(line, output, save_seconds(self.launch), own_threads(self.launch))
        signal.signal(warning, handler)
        self.listen(warning)
        status = self.process.wait()
        if status and self.told_to_end:
            time.sleep(HOLD_SECONDS)  # whoever ended the job (scancel, a preemption) says whether it comes back
        if status:
            raise RuntimeError(f"exit status {status}: {last_line(log, begins) or 'it printed nothing'}")
        return status

    def listen(self, number: signal.Signals) -> None:
        """Note that the signal came: the status of torchrun and of accelerate launch, which is 1, does not tell of it.

        Of the warning too: the first node saves and requeues, and another that ends as failed before that may end it.
        """
        before = signal.getsignal(number)

        def note(number: int, frame: Any) -> None:
            self.told_to_end = True
            if callable(before):
                before(number, frame)

        signal.signal(number, note)

    def checkpoint(self) -> Any:
        """submitit calls this on the warning, then requeues the job, which has to be done before the time limit."""
        import submitit

        # This runs in a signal handler inside self.process.wait(), which holds the lock that Popen's methods need.
        number, until = self.process.pid, time.monotonic() + save_seconds(self.launch)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(number, signal.SIGTERM)
            while os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                if time.monotonic() > until:
                    os.killpg(number, signal.SIGKILL)  # the run goes on from its last whole checkpoint
                    break
                time.sleep(0.2)
        return submitit.helpers.DelayedSubmission(Node(self.arguments, self.launch, self.log))


def save_seconds(launch: Launch) -> float:
    """That a run may take to save after the warning."""
    return max(LEAST_SAVE_SECONDS, launch.slurm.signal_delay_s - REQUEUE_SECONDS)

"""Sweeps: all points are checked first, each has its devices, none is run twice, a failure stands alone."""

import copy
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from built import composed
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from tiny_runs import task_folder

from mixlora import scoring, signals, train
from mixlora.checks import check_run
from mixlora.config import load
from mixlora.config.overrides import config_dir, left_to_points
from mixlora.config.schema import Answer, Config, Launch, Launcher, Slurm, Task
from mixlora.config.typed import typed
from mixlora.errors import ConfigError, DataError, Interrupted, MixloraError
from mixlora.records import in_use, owned, read_json, read_lines, write_json, write_lines
from mixlora.sweeps import launch, local, points, processes, running, show, slurm
from mixlora.sweeps.processes import Machine

TINY = (
    "tasks=sums", "model=tiny", "model.random.num_hidden_layers=1", "train.max_steps=2", "eval.before=false",
    "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1", "report=false",
)  # fmt: skip


@pytest.fixture
def sweep(monkeypatch, tmp_path, capsys):
    """`python -m mixlora.train -m ...` in this process; the points are processes of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    configs = task_folder(tmp_path / "own")

    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mixlora.train", "--config-dir", str(configs), *TINY, *argv])
        GlobalHydra.instance().clear()
        status = 0
        try:
            train.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def checked(sweep, monkeypatch, *argv: str) -> tuple[list[points.Point], list[Config]]:
    """The points of a sweep and their configurations, none of them run."""
    found = []
    with monkeypatch.context() as here:
        here.setattr(launch, "composed", lambda *given: found.append(points.composed(*given)) or found[-1])
        status, said = sweep(*argv, "dry_run=true")
    assert status == 0, said
    return found[0]


def test_a_mistake_in_one_point_stops_the_sweep_before_any_starts(sweep, tmp_path):
    status, said = sweep("-m", "method=smora,mole", "method.top_k=2,65")
    assert status == 2
    assert "method=smora method.top_k=65: method.top_k=65 is above" in said
    assert said.count("mixlora: ") == 1
    assert not (tmp_path / "runs").exists()


def test_a_source_that_is_not_there_stops_the_sweep_before_any_starts(sweep, tmp_path):
    status, said = sweep("-m", "method=lora", "tasks=arc", "data.source=sample,./nothing")
    assert status == 3
    assert "data.source=./nothing: data.source=nothing: There is no such folder" in said
    assert not (tmp_path / "runs").exists()


def test_two_points_that_would_be_one_run_are_refused(sweep):
    status, said = sweep("-m", "method=lora", "train.save_steps=10,20")
    assert status == 2
    assert "two points would be one run" in said
    status, said = sweep("-m", "method=lora", "seed=0,1", "run_dir=here")
    assert status == 2
    assert "set output_root in place of run_dir" in said


@pytest.mark.full
def test_every_method_gets_the_same_rates_scored_on_validation_rows(sweep):
    status, said = sweep("method=lora,smora", "sweep=learning_rate", "dry_run=true")
    assert status == 0
    found = [
        re.search(r"method=(\w+) .*learning_rate=(\S+)|learning_rate=(\S+) method=(\w+)", line)
        for line in said.splitlines()
    ]
    rates = {name: {(m[2] or m[3]) for m in found if m and name in m.groups()} for name in ("lora", "smora")}
    assert rates["lora"] == rates["smora"] == {"0.0001", "0.0002", "0.0005", "0.001", "0.002"}
    assert "10 points, 0 finished before" in said


def test_a_sweep_inside_a_process_group_is_refused(sweep, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for argv in (("-m", "method=lora,smora"), ("method=lora", "sweep=seeds")):
        status, said = sweep(*argv)
        assert status == 2
        assert "would run once on every rank" in said


def test_a_finished_point_is_not_run_again_and_the_summary_has_all(sweep, monkeypatch, tmp_path):
    """With a process in place of training that fails at once; training itself: the test below, and recipes/tiny."""
    grid = ("-m", "method=lora", "seed=0,1")
    some, configs = checked(sweep, monkeypatch, *grid)
    done = {"status": "finished", "config_sha256": load.digest(configs[0])}
    write_json(some[0].folder / "run.json", done)
    write_json(some[0].folder / "results.json", {"sums": {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 10}})
    failing = [sys.executable, "-c", "import sys; print('mixlora: no such data'); sys.exit(3)"]
    monkeypatch.setattr(local, "command", lambda arguments, launch, machine: failing)
    status, said = sweep(*grid)
    assert status == 1, said
    assert "2 points, 1 finished before; 1 to run" in said
    assert said.count("Running ") == said.count("\nFAILED ") == 1
    assert "exit status 3 (data): no such data" in said
    assert "1 of 1 point failed" in said
    (kept,) = (tmp_path / "runs" / "sweeps").glob("*.csv")
    assert list(pd.read_csv(kept).state) == ["done before", "failed"]


@pytest.mark.parametrize("tasks", [("sums", "sums"), ("sums", "others")])
def test_points_that_score_different_tasks_are_not_ranked_and_none_is_recommended(tasks, sweep, monkeypatch, tmp_path):
    grid = ("-m", "method=lora", "seed=0,1", "eval.split=validation")
    some, configs = checked(sweep, monkeypatch, *grid)
    for one, config, task, value in zip(some, configs, tasks, (0.25, 0.75), strict=True):
        write_json(one.folder / "run.json", {"status": "finished", "config_sha256": load.digest(config)})
        write_json(one.folder / "results.json", {task: {"metric": "acc", "value": value, "stderr": 0.1, "n": 10}})
    status, said = sweep(*grid)
    assert status == 0, said
    alike = len(set(tasks)) == 1
    assert ("The best on test rows" in said) is alike
    assert ("Only points that score the same tasks" in said) is not alike
    (kept,) = (tmp_path / "runs" / "sweeps").glob("*.csv")
    frame = pd.read_csv(kept)
    assert list(frame.score) == ([0.75, 0.25] if alike else [0.25, 0.75])
    assert list(frame.tasks) == list(tasks)
    assert set(frame.split) == {"validation"}


def test_the_table_of_a_sweep_holds_points_without_a_score_beside_those_of_different_tasks(tmp_path):
    some = [points.Point(name, (), tmp_path / name) for name in ("a", "b", "failed")]
    for point, task in zip(some, ("sums", "others"), strict=False):
        write_json(point.folder / "run.json", {"status": "finished"})
        write_json(point.folder / "results.json", {task: {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 10}})
    frame = show.summary(some, dict.fromkeys(some, "done"), ["test"] * 3)
    show.show(frame)
    assert list(frame.point) == ["a", "b", "failed"]


def test_what_a_sweeper_is_told_is_in_the_order_of_its_points(tmp_path):
    """The summary has the best first. A mean of two tasks has an error of its own; a task that nobody trained on, none
    of it."""
    some = [points.Point(name, (), tmp_path / name) for name in ("low", "failed", "high")]
    for one, values in ((some[0], (0.25, 0.5)), (some[2], (0.5, 0.75))):
        results = {
            task: {"metric": "acc", "value": value, "stderr": error, "n": 10}
            for task, value, error in zip(("sums", "others"), values, (0.3, 0.4), strict=True)
        }
        results["extra"] = results["sums"] | {"value": 1.0, "trained": False}
        write_json(one.folder / "run.json", {"status": "finished"})
        write_json(one.folder / "results.json", results)
    told = launch.returns(some, [["seed=0"], ["seed=1"], ["seed=2"]])
    assert [(one.overrides, one.return_value) for one in told] == [
        (["seed=0"], 0.375), (["seed=1"], None), (["seed=2"], 0.625),
    ]  # fmt: skip
    frame = show.summary(some, dict.fromkeys(some, "done"), ["test"] * 3)
    assert list(frame.point) == ["high", "low", "failed"]
    assert frame.stderr[0] == pytest.approx((0.3**2 + 0.4**2) ** 0.5 / 2)
    assert (frame.n[0], frame.tasks[0]) == (20, "others sums")


@pytest.mark.parametrize("trained", [True, False])
def test_the_title_of_a_sweep_calls_the_mean_what_it_is_and_one_row_has_no_error(tmp_path, capsys, trained):
    point = points.Point("a", (), tmp_path / "a")
    write_json(point.folder / "run.json", {"status": "finished"})
    one = {"metric": "acc", "value": 0.5, "trained": trained}
    write_json(
        point.folder / "results.json", {"t": one | {"stderr": 0.1, "n": 10}, "u": one | {"stderr": None, "n": 1}}
    )
    frame = show.summary([point], {point: "done"}, ["test"])
    show.show(frame)
    said = capsys.readouterr().out
    assert f"mean{' of trained' if trained else ''}, test split, percent" in said
    assert re.search(r"50\.0 +│", said)
    assert frame.stderr.isna().all()


@pytest.mark.full
def test_points_run_once_one_fails_alone_and_the_same_command_tries_it_again(sweep, tmp_path):
    """The failing point reads a file that has no rows yet."""
    later = tmp_path / "own" / "sums.jsonl"
    (tmp_path / "empty.jsonl").write_bytes(b"")
    grid = ("-m", "method=lora", f"tasks.mixture.sums.path={later},{tmp_path}/empty.jsonl", "jobs=2")
    status, said = sweep(*grid)
    assert status == 1, said
    assert said.count("Running ") == 2
    assert said.count("\nDone ") == 1
    assert said.count("\nFAILED ") == 1
    assert "exit status 3 (data)" in said
    assert "1 of 2 points failed" in said
    (tmp_path / "empty.jsonl").write_bytes(later.read_bytes())
    status, said = sweep(*grid)
    assert status == 0, said
    assert "2 points, 1 finished before; 1 to run" in said
    assert said.count("Running ") == 1
    (kept,) = (tmp_path / "runs" / "sweeps").glob("*.csv")
    frame = pd.read_csv(kept)
    assert len(frame) == 2
    assert list(frame.score) == sorted(frame.score, reverse=True)
    assert {frame.state[0], *frame.state} == {"done", "done before"}


@pytest.mark.full
def test_a_signal_lets_the_points_save_and_the_same_command_goes_on(tmp_path):
    configs = task_folder(tmp_path / "own")
    line = [sys.executable, "-m", "mixlora.train", "--config-dir", str(configs), *TINY, "-m", "method=lora", "seed=0,1"]
    line += ["train.max_steps=3000", "jobs=1", f"output_root={tmp_path / 'runs'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("*/metrics.jsonl")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "goes on from there" in said
    assert said.count("Running ") == 1
    assert list((tmp_path / "runs").glob("*/checkpoints/step-*"))


# ---- devices and commands


def test_each_point_has_devices_of_its_own(monkeypatch, tmp_path):
    """Processes that say what they see, on a machine with four devices (pretended: this one has none)."""
    monkeypatch.setattr(local, "visible_devices", lambda: ["0", "1", "2", "3"])
    code = "import os, time; print('sees', os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1)"
    monkeypatch.setattr(local, "command", pretended(code))
    some = [point(tmp_path, i) for i in range(4)]
    place = local.Local(Launch(processes=2))
    assert len(place.groups) == 2
    assert running.run(some, place, show.Board(some)) == {}
    seen = [running.log_path(point.folder).read_text().split()[1] for point in some]
    assert sorted(seen) == ["0,1", "0,1", "2,3", "2,3"]


def test_points_that_run_beside_each_other_share_the_cores_with_all_their_processes(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local, "visible_devices", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    code = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr(local, "command", pretended(code))
    for number, (asked, each) in enumerate({(2, 3): "2", (3, 1): "4", (1, 2): "6"}.items()):
        one, place = point(tmp_path, number), local.Local(Launch(jobs=asked[0], processes=asked[1]))
        assert running.run([one], place, show.Board([one])) == {}
        assert running.log_path(one.folder).read_text().split() == ["threads", each]


def pretended(code: str):
    """In place of training: `code`, then a finished run in the folder that is the point's only argument."""
    ends = "import json, pathlib, sys; f = pathlib.Path(sys.argv[1]); f.mkdir(exist_ok=True)"
    ends += "; (f / 'run.json').write_text(json.dumps({'status': 'finished'}))"
    return lambda arguments, launch, machine: [sys.executable, "-c", f"{code}\n{ends}", *arguments]


def point(folder: Path, number: int) -> points.Point:
    return points.Point(f"seed={number}", (str(folder / str(number)),), folder / str(number))


def run_one(monkeypatch, folder: Path, code: str) -> running.Failure | None:
    monkeypatch.setattr(local, "command", pretended(code))
    one = point(folder, 0)
    return running.run([one], local.Local(Launch()), show.Board([one])).get(one)


def test_a_failure_is_told_by_what_this_try_said(monkeypatch, tmp_path):
    said = run_one(monkeypatch, tmp_path, "import sys; print('mixlora: no such data'); sys.exit(3)")
    assert str(said) == "exit status 3 (data): no such data"
    said = run_one(monkeypatch, tmp_path, "import os; print('step 7', flush=True); os.kill(os.getpid(), 9)")
    assert str(said) == "exit status -9 (SIGKILL, as from a machine out of memory): step 7"
    said = run_one(monkeypatch, tmp_path, "import os; os.kill(os.getpid(), 11)")
    assert str(said) == "exit status -11 (SIGSEGV): it printed nothing"
    assert "no such data" in said.log.read_text()


def test_a_run_that_ends_well_somewhere_else_has_failed(monkeypatch, tmp_path):
    said = run_one(monkeypatch, tmp_path, "import sys; sys.exit(0)")
    assert said is not None
    assert "no finished run is in" in said.message
    assert run_one(monkeypatch, tmp_path, "pass") is None


def test_a_disk_that_does_not_answer_for_a_while_ends_no_sweep_and_fails_no_point(monkeypatch, tmp_path):
    looks = Counter()

    def stale(look: Callable[[Path], bool]) -> Callable[[Path], bool]:
        def at(folder: Path) -> bool:
            looks[look] += 1
            if looks[look] % 3:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return look(folder)

        return at

    for look in (points.finished, points.in_use):
        monkeypatch.setattr(points, look.__name__, stale(look))
    assert run_one(monkeypatch, tmp_path / "a", "pass") is None
    said = run_one(monkeypatch, tmp_path / "b", "import sys; print('mixlora: no such data'); sys.exit(3)")
    assert str(said) == "exit status 3 (data): no such data"


@pytest.mark.parametrize("end", ["running", "finished"])
@pytest.mark.parametrize("found", ["before it is started", "by the process that was started"])
def test_a_point_that_runs_elsewhere_is_waited_for(monkeypatch, tmp_path, found, end):
    """Two sweeps at once, or one whose starter was killed: the second finds the run of the first in its folder."""
    folder = tmp_path / "0"
    code = (
        f"import sys; from pathlib import Path; from mixlora import records as r; folder = Path({str(folder)!r})\n"
        "with r.owned(folder): print('mine', flush=True); sys.stdin.read(); "
        f"r.write_json(folder / 'run.json', {{'status': {end!r}}})"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"mine\n"
    seen: list[str] = []

    def sees(board: show.Board, point: points.Point, state: str) -> None:
        seen.append(state)
        if seen.count("runs elsewhere") == 3:
            first.communicate()  # the end of its input is the end of its run

    monkeypatch.setattr(show.Board, "sees", sees)
    late = found == "by the process that was started"
    if late:
        looks = iter([False, False])
        monkeypatch.setattr(points, "in_use", lambda folder: next(looks, None) is None and in_use(folder))
    said = run_one(monkeypatch, tmp_path, code)
    assert seen.count("runs elsewhere") >= 3
    assert running.log_path(folder).exists() is late
    why = "in use by another run" if late else "ended before it was finished"
    assert said is None if end == "finished" else said is not None and why in said.message


def test_the_devices_of_a_run_that_was_left_behind_are_not_given_away(monkeypatch, tmp_path):
    """The starter was killed; its run trains on two of four devices until the other points are done."""
    monkeypatch.setattr(local, "visible_devices", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr(local, "command", pretended("import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"))
    some = [point(tmp_path, i) for i in range(3)]
    code = (
        f"import time; from pathlib import Path; from mixlora import records as r; root = Path({str(tmp_path)!r})\n"
        "with r.owned(root / '2'):\n    print('mine', flush=True)\n"
        "    while not all((root / n / 'run.json').exists() for n in '01'): time.sleep(0.1)\n"
        "    r.write_json(root / '2' / 'run.json', {'status': 'finished'})"
    )
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1"}
    left = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert left.stdout is not None
    assert left.stdout.readline() == b"mine\n"
    place = local.Local(Launch(processes=2))
    assert running.run(some, place, show.Board(some)) == {}
    left.communicate(timeout=20)
    assert [running.log_path(point.folder).read_text().split()[1] for point in some[:2]] == ["2,3", "2,3"]
    assert not running.log_path(some[2].folder).exists()
    assert sorted(place.free) == [["0", "1"], ["2", "3"]]


def test_a_terminal_that_is_closed_lets_the_points_save(monkeypatch, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test under nohup would ignore it
    try:
        code = "import os, signal, time; signal.signal(15, signal.SIG_IGN)\n"
        code += "for _ in range(2): os.kill(os.getppid(), 1); time.sleep(0.3)  # the terminal, then the shell"
        with pytest.raises(Interrupted) as stopped:
            run_one(monkeypatch, tmp_path, code)
        assert stopped.value.status == 143
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_of_runs_that_are_stopped_those_that_did_not_save_are_listed(monkeypatch, tmp_path):
    """By status, and where a launcher ends with 1 whatever its ranks did, by the run's last word."""
    ends = {"0": (143, ""), "1": (5, "mixlora: no space left"), "2": (1, f"mixlora: saved; {signals.GOES_ON}")}
    code = (
        "import os, signal, time; from pathlib import Path; folder = Path(sys.argv[1])\n"
        f"status, word = {ends}[folder.name]\n"
        "signal.signal(15, lambda *_: (os.write(1, word.encode()), os._exit(status)))\n"
        "folder.with_suffix('.ready').touch()\n"
        "while len([*folder.parent.glob('*.ready')]) < 3: time.sleep(0.1)\n"
        "os.kill(os.getppid(), 15) if folder.name == '0' else None; time.sleep(60)"
    )
    monkeypatch.setattr(local, "command", pretended(f"import sys\n{code}"))
    some = [point(tmp_path, i) for i in range(3)]
    with pytest.raises(Interrupted) as stopped:
        running.run(some, local.Local(Launch(jobs=3)), show.Board(some))
    said = str(stopped.value).splitlines()
    assert said[1:] == [
        "1 of 3 ended otherwise:",
        "  seed=1: exit status 5: no space left",
        f"    log: {running.log_path(some[1].folder)}",
    ]


def test_a_folder_that_cannot_be_written_is_said_before_any_point_starts(sweep, tmp_path):
    (tmp_path / "file").write_text("")
    long = 300 * "x"
    for root, why in (("file/runs", "file is a file, not a folder"), (long, "cannot be read (file name too long)")):
        status, said = sweep("-m", "method=lora", "seed=0,1", f"output_root={root}")
        assert status == 2
        assert f"{why}. Set output_root" in said
        assert "Running" not in said


def test_a_sweep_that_hydra_refuses_leaves_nothing(sweep, tmp_path):
    status, said = sweep("-m", "method=lora,smorra")
    assert status == 2
    assert "Did you mean 'smora'?" in said
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_one_process_has_its_threads_as_outside_a_sweep(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert processes.threads(1) == {}
    assert processes.threads(10**6) == {"OMP_NUM_THREADS": "1"}


def test_devices_are_named_as_the_user_named_them(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for named, seen in (
        ("3, 5", ["3", "5"]), ("GPU-8f6d,GPU-91a2", ["GPU-8f6d", "GPU-91a2"]), ("0,1,-1,2", ["0", "1"]),
    ):  # fmt: skip
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert local.visible_devices() == seen
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.visible_devices() == []


def test_the_live_table_fits_its_terminal_and_shows_what_runs(monkeypatch, tmp_path):
    some = [points.Point(f"method.target_modules=[q_proj,v{i}] x=[/y]", (), tmp_path / str(i)) for i in range(300)]
    board = show.Board(some)
    for i in range(200):
        board.told(some[i], "started")
        if i >= 3:
            board.told(some[i], "done")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "metrics.jsonl").write_text('{"step": 41, "loss": 1.5}\n{"step": 42, "lo')
    terminal = Console(width=50, height=24, file=io.StringIO(), force_terminal=True, markup=False)
    monkeypatch.setattr(show, "console", terminal)
    terminal.print(board.table())
    lines = terminal.file.getvalue().splitlines()
    assert "sweep: 3 running, 197 done, 100 waiting" in lines[0]
    assert len(lines) <= 24
    assert max(cell_len(line) for line in map(plain, lines)) <= 50
    shown = "".join(re.findall(r"^│([^│]*)│", "\n".join(map(plain, lines)), flags=re.MULTILINE)).replace(" ", "")
    assert "method.target_modules=[q_proj,v2]x=[/y]" in shown
    assert "step 41" in terminal.file.getvalue()


def plain(line: str) -> str:
    return Text.from_ansi(line).plain


def test_devices_are_divided(monkeypatch):
    four = ["4", "5", "6", "7"]
    assert local.groups(four, Launch()) == [["4"], ["5"], ["6"], ["7"]]
    assert local.groups(four, Launch(processes=3)) == [["4", "5", "6"]]
    assert local.groups(four, Launch(jobs=2)) == [["4"], ["5"]]
    assert local.groups([], Launch(jobs=3)) == [[], [], []]
    for asked in (Launch(processes=8), Launch(jobs=3, processes=2), Launch(slurm=Slurm(nodes=2))):
        with pytest.raises(ConfigError):
            local.groups(four, asked)


def test_several_processes_start_through_torchrun_or_accelerate():
    one = processes.command(["seed=1"], Launch(), Machine())
    assert one[1:] == ["-m", "mixlora.train", "seed=1"]
    two = processes.command(["seed=1"], Launch(processes=2), Machine())
    assert two[2:4] == ["torch.distributed.run", "--standalone"]
    node = processes.command(["seed=1"], Launch(processes=2), Machine(1, 3, "first", 20001))
    assert {"--nnodes=3", "--node-rank=1", "--rdzv-endpoint=first:20001", "--nproc-per-node=2"} <= set(node)
    sharded = processes.command(["seed=1"], Launch(processes=2, accelerate="fsdp2"), Machine(1, 3, "first", 20001))
    assert {"--num_processes=6", "--machine_rank=1", "--main_process_ip=first"} <= set(sharded)
    assert "--gpu_ids=all" in sharded  # those that the point was given, whatever the file names
    with pytest.raises(ConfigError, match=r"accelerate=fsdp3: neither a file nor one of ddp, fsdp2, zero2, zero3"):
        processes.command([], Launch(accelerate="fsdp3"), Machine())


def test_slurm_without_its_commands_is_said_with_the_remedy(sweep, monkeypatch):
    pytest.importorskip("submitit", reason="launcher=slurm needs submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    status, said = sweep("-m", "method=lora,smora", "launcher=slurm")
    assert status == 2
    assert "there is no squeue here" in said


def test_the_way_of_accelerate_is_a_key_and_said_before_any_point_starts(sweep, tmp_path):
    status, said = sweep("-m", "method=lora", "seed=0,1", "processes=2", "accelerate=fsdp2", "dry_run=true")
    assert status == 0, said
    assert "2 points" in said
    status, said = sweep("-m", "method=lora", "seed=0,1", "accelerate=fsdp3")
    assert status == 2
    assert "accelerate=fsdp3: neither a file nor one of ddp, fsdp2, zero2, zero3" in said
    assert not (tmp_path / "runs").exists()


def test_a_model_is_not_cut_into_parts_for_one_process(tmp_path):
    """Accelerate ends such a run with a traceback, on a GPU."""
    for path in sorted((Path(config_dir()) / "distributed").glob("*.yaml")):
        running.place_of(Launch(accelerate=path.stem, processes=2))
        processes.check_accelerate(Launch(accelerate=path.stem, slurm=Slurm(nodes=2)))
        if yaml.safe_load(path.read_text())["distributed_type"] == "FSDP":
            with pytest.raises(ConfigError, match=rf"accelerate={path.stem} .* a point has one\. Set processes=N"):
                running.place_of(Launch(accelerate=path.stem))
    (tmp_path / "own.yaml").write_text("no: [yaml")
    with pytest.raises(ConfigError, match=r"own\.yaml is not what `accelerate config` writes"):
        running.place_of(Launch(accelerate=str(tmp_path / "own.yaml")))


def test_no_key_has_the_name_of_a_group():
    """Hydra would take key=value for the choice of a file."""
    folders = {path.name for path in Path(config_dir()).iterdir() if path.is_dir()}
    assert not folders & set(Launch.__dataclass_fields__)


@pytest.mark.full
def test_how_a_sweep_is_run_may_stand_in_its_file(sweep, tmp_path):
    """A point reads the same file and must neither start a sweep again nor refuse what is for sweeps."""
    grids = tmp_path / "own" / "sweep"
    grids.mkdir()
    text = "# @package _global_\njobs: 2\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: range(3,4)\n"
    (grids / "mine.yaml").write_text(text)
    status, said = sweep("method=lora", "sweep=mine")
    assert status == 0, said
    assert "1 point, 0 finished before; 1 to run, 2 at a time" in said
    assert "\nDone " in said


def test_points_that_are_run_in_two_ways_are_refused(sweep, tmp_path):
    (tmp_path / "own" / "experiment").mkdir()
    for name, number in (("small", 1), ("big", 2)):
        text = f"# @package _global_\nseed: {number}\nprocesses: {number}\n"
        (tmp_path / "own" / "experiment" / f"{name}.yaml").write_text(text)
    status, said = sweep("-m", "method=lora", "+experiment=small,big")
    assert status == 2
    assert "processes is not the same in experiment=small and in experiment=big" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.full
def test_what_is_no_sweep_is_refused_with_what_is_meant(sweep, tmp_path):
    status, said = sweep("-m", "method=lora", "sweep=learning_rate,seeds")
    assert status == 2
    assert "For all their keys at once: sweep=[learning_rate,seeds]" in said
    rate = "train.learning_rate=1e-3"  # on the command line: it stands, in place of the grid's
    status, said = sweep("method=lora", "sweep=[learning_rate,seeds]", rate, "dry_run=true")
    assert "3 points" in said
    status, said = sweep("-m", "method=lora", "seed=0,1", "resume=runs/x/checkpoints/step-2")
    assert status == 2
    assert "resume names a checkpoint of one run" in said
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_of_another_configuration_is_not_taken_for_the_point(sweep, tmp_path):
    write_json(tmp_path / "here-0" / "run.json", {"status": "finished", "config_sha256": "of another"})
    status, said = sweep("-m", "method=lora", "seed=0,1", "run_dir=here-${seed}")
    assert status == 2
    assert "seed=0: here-0 holds a finished run of another configuration" in said


def test_a_point_gets_its_overrides_and_its_places_exactly(sweep, monkeypatch, tmp_path):
    """What the point composes from its arguments is what the sweep has checked."""
    (tmp_path / "my own" / "task").mkdir(parents=True)
    task = yaml.safe_load((tmp_path / "own" / "task" / "sums.yaml").read_text())
    (tmp_path / "my own" / "task" / "other.yaml").write_text(yaml.safe_dump(task | {"name": "other"}))
    some, configs = checked(
        sweep, monkeypatch, "-m", "+method=lora", "++train.save_steps=7",
        "method.target_modules=[q_proj,v_proj],attention",
        "tasks.mixture.sums.question=\"{q}, really = [x] 'so'?\"", "seed=range(1,3)", "output_root='a b/c=d'",
        f"hydra.searchpath=['file://{tmp_path}/my own']", "+task@tasks.mixture.other=other",
    )  # fmt: skip
    assert len(some) == 4
    composed = []
    monkeypatch.setattr(load, "config_of", lambda cfg: composed.append(typed(Config, cfg)) or sys.exit())
    for point in some:
        monkeypatch.setattr(sys, "argv", ["mixlora.train", *point.arguments])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit):
            train.main()
    assert composed == configs


def test_a_queue_that_does_not_answer_is_left_in_peace_and_never_taken_for_empty(monkeypatch, tmp_path):
    """A squeue that is down, up, and down again."""
    lists, calls = tmp_path / "jobs", tmp_path / "calls"
    text = f"#!/bin/sh\necho >> {calls}\ncat {lists} || {{ echo Socket timed out >&2; exit 1; }}\n"
    (tmp_path / "squeue").write_text(text)
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 0)
    queue, folder = slurm.Queue(), tmp_path / "a|b c"
    with pytest.raises(MixloraError, match=r"nothing was submitted: [^$]*Socket timed out"):
        queue.find(folder)
    lists.write_text(f"7|PENDING|QOSMaxJobsPerUser|mixlora:{folder}\n8|RUNNING|None|else\n")
    assert queue.find(folder) == "7"
    assert queue.state("7") == "pending (QOSMaxJobsPerUser)"
    assert queue.state("8") == "running"
    lists.unlink()
    assert queue.state("7") == "pending (QOSMaxJobsPerUser)"
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 1000)
    before = calls.read_text()
    assert {queue.state("8") for _ in range(9)} == {"running"}
    assert calls.read_text() == before


def queue_that_says(monkeypatch, tmp_path, jobs: str) -> None:
    """A squeue whose answer is what is said here; what it was asked is in `asked`."""
    (tmp_path / "jobs").write_text(jobs)
    (tmp_path / "squeue").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/jobs\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 0)


def submissions_are_taken(tmp_path: Path) -> None:
    """An sbatch that keeps the script and always gives the job the number 9."""
    lines = "#!/bin/sh\nfor last; do :; done\ncat $last > {0}/script\necho Submitted batch job 9\n"
    for command in ("sbatch", "srun"):
        (tmp_path / command).write_text(lines.format(tmp_path))
        (tmp_path / command).chmod(0o755)


def test_a_job_that_was_just_submitted_counts_though_the_queue_was_looked_at_before(monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="launcher=slurm needs submitit")
    queue_that_says(monkeypatch, tmp_path, "")
    submissions_are_taken(tmp_path)
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 1000)
    place = slurm.Slurm(Launch(launcher=Launcher.slurm, jobs=1))
    job = place.start(point(tmp_path, 0), tmp_path / "logs" / "0.log")
    assert job.poll() is None
    assert job.state == "job 9 pending"
    assert not place.room()
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 0)
    assert job.poll() is None  # gone by now, which may be its end or a disk that is late
    assert place.room()


def test_a_queue_that_a_profile_narrows_is_seen_whole(monkeypatch, tmp_path):
    """squeue takes filters from its environment, and leaves hidden partitions out unless it is asked for all."""
    queue_that_says(monkeypatch, tmp_path, f"7|PENDING|None|{slurm.job_name(tmp_path)}\n")
    asks = '[ -n "$SQUEUE_STATES" ] && exit 0\ncase " $* " in *" --all "*) cat {0}/jobs;; esac\n'
    (tmp_path / "squeue").write_text("#!/bin/sh\n" + asks.format(tmp_path))
    monkeypatch.setenv("SQUEUE_STATES", "R")
    assert slurm.Queue().find(tmp_path) == "7"


def test_a_job_of_an_earlier_sweep_that_waits_counts_before_another_is_submitted(monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="launcher=slurm needs submitit")
    some = [point(tmp_path, i) for i in range(2)]
    queue_that_says(monkeypatch, tmp_path, f"7|PENDING|None|{slurm.job_name(some[1].folder)}\n")
    place, started = slurm.Slurm(Launch(launcher=Launcher.slurm, jobs=1)), []
    monkeypatch.setattr(place, "submit", lambda point, log: started.append(point.name) or "9")

    def finish(board: show.Board, point: points.Point, state: str) -> None:
        assert started == []
        write_json(some[1].folder / "run.json", {"status": "finished"})
        (tmp_path / "jobs").write_text("")
        monkeypatch.setattr(show.Board, "sees", lambda *given: write_json(some[0].folder / "run.json", done))

    done = {"status": "finished"}
    monkeypatch.setattr(show.Board, "sees", finish)
    assert running.run(some, place, show.Board(some)) == {}
    assert started == [some[0].name]


def test_a_refusal_of_sbatch_does_not_end_a_sweep_whose_jobs_run(monkeypatch, tmp_path, capsys):
    """It refuses twice while the first job runs; what it takes is finished at once."""
    pytest.importorskip("submitit", reason="launcher=slurm needs submitit")
    some = [point(tmp_path, i) for i in range(3)]
    queue_that_says(monkeypatch, tmp_path, f"1|RUNNING|None|{slurm.job_name(some[0].folder)}\n")
    calls = tmp_path / "calls"
    (tmp_path / "squeue").write_text(
        f"#!/bin/sh\n[ $(wc -l < {calls}) -ge 4 ] || tail -n $(wc -l < {calls}) {tmp_path}/jobs\n"
    )
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").write_text(
        f"#!/bin/sh\nfor script; do :; done; echo >> {calls}; n=$(wc -l < {calls})\n"
        "case $n in 2|3|6) echo Socket timed out >&2; exit 1;; esac\n"
        "folder=$(sed -n 's/^#SBATCH --job-name=mixlora://p' $script); mkdir -p $folder\n"
        """echo '{"status": "finished"}' > $folder/run.json; echo Submitted batch job $n\n"""
    )
    for command in ("srun", "sbatch"):
        (tmp_path / command).chmod(0o755)
    calls.touch()
    monkeypatch.setattr(slurm, "REFUSED_SECONDS", 0.2)
    place = slurm.Slurm(Launch(launcher=Launcher.slurm))
    assert running.run(some, place, show.Board(some)) == {}
    assert calls.read_text() == "\n" * 5
    assert capsys.readouterr().out.count("Socket timed out") == 1
    with pytest.raises(processes.Refused, match="Socket timed out"):  # nothing runs, so nothing is waited for
        running.run([point(tmp_path, 9)], place, show.Board([]))


def test_a_profile_does_not_win_over_what_is_asked_for(monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="launcher=slurm needs submitit")
    queue_that_says(monkeypatch, tmp_path, "")
    submissions_are_taken(tmp_path)
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/env; echo Submitted batch job 9\n")
    ours = {"JOB_NAME": "mine", "NO_REQUEUE": "1", "TIMELIMIT": "5", "PARTITION": "slow", "WAIT": "1", "OUTPUT": "x"}
    ours |= {"MAIL_TYPE": "END", "EXPORT": "NONE", "GRES": "gpu:4"}
    theirs = {"ACCOUNT": "lab", "RESERVATION": "r", "TIMELIMIT_RAW": "1"}  # what the configuration leaves open
    for name, value in (ours | theirs).items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    options = Slurm(partition="fast", additional_parameters={"mail-type": "FAIL"})
    asked = slurm.Slurm(Launch(launcher=Launcher.slurm, slurm=options))
    asked.start(point(tmp_path, 0), tmp_path / "logs" / "0.log")
    seen = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if line.startswith("SBATCH_")
    )
    assert seen == {f"SBATCH_{name}": value for name, value in theirs.items()}
    assert os.environ["SBATCH_JOB_NAME"] == "mine"


def test_a_signal_is_heard_between_two_submissions(monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="launcher=slurm needs submitit")
    queue_that_says(monkeypatch, tmp_path, "")
    # As a terminal does: to the sweep and to what it has just started.
    code = f"#!{sys.executable}\nimport os\nfor process in (os.getppid(), os.getpid()): os.kill(process, 2)\n"
    submissions_are_taken(tmp_path)
    (tmp_path / "sbatch").write_text(code + "print('Submitted batch job 9')\n")
    some = [point(tmp_path, i) for i in range(3)]
    place = slurm.Slurm(Launch(launcher=Launcher.slurm))
    with pytest.raises(Interrupted, match=r"1 jobs go on in SLURM \(scancel 9 ends them\)"):
        running.run(some, place, show.Board(some))


def test_a_table_that_cannot_be_read_just_now_does_not_end_the_sweep(monkeypatch, tmp_path):
    monkeypatch.setattr(points, "last_row", lambda path: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
    assert point(tmp_path, 0).progress == ""


@pytest.mark.parametrize("launched", [True, False])
def test_a_signal_that_comes_from_slurm_and_from_the_sweep_is_one(tmp_path, launched):
    code = "import time; from mixlora.signals import collected\n"
    code += "with collected() as caught:\n    print('up', flush=True)\n    while not caught: time.sleep(0.01)\n"
    code += "    time.sleep(1)\nprint('saved')"
    env = {k: v for k, v in os.environ.items() if k not in ("MIXLORA_LAUNCHED", "WORLD_SIZE")}
    env |= {"MIXLORA_LAUNCHED": "1"} if launched else {}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    for _ in range(2):
        process.terminate()
        time.sleep(0.2)
    said, _ = process.communicate(timeout=20)
    assert (process.returncode, said) == ((0, b"saved\n") if launched else (-signal.SIGTERM, b""))


def test_a_run_that_other_processes_have_finished_is_not_taken_for_the_point(sweep, monkeypatch, tmp_path):
    some, configs = checked(sweep, monkeypatch, "-m", "method=lora", "seed=0")
    done = {"status": "finished", "config_sha256": load.digest(configs[0]), "world_size": 1}
    write_json(some[0].folder / "run.json", done)
    assert "1 finished before" in sweep("-m", "method=lora", "seed=0", "dry_run=true")[1]
    status, said = sweep("-m", "method=lora", "seed=0", "processes=2", "dry_run=true")
    assert status == 2
    assert "was finished by 1 process(es) and would now be run by 2" in said


def test_a_job_that_was_cancelled_is_not_watched_and_the_next_begins_after_it(monkeypatch, tmp_path):
    """Right after scancel the job still stands in the queue."""
    pytest.importorskip("submitit", reason="launcher=slurm needs submitit")
    one = point(tmp_path, 0)
    name = slurm.job_name(one.folder)
    queue_that_says(monkeypatch, tmp_path, f"7|COMPLETING|None|{name}\n8|RUNNING|None|else\n")
    submissions_are_taken(tmp_path)
    place = slurm.Slurm(Launch(launcher=Launcher.slurm))
    assert place.start(one, tmp_path / "logs" / "0.log").number == "9"
    assert "#SBATCH --dependency=afterany:7\n" in (tmp_path / "script").read_text()
    (tmp_path / "jobs").write_text(f"7|COMPLETING|None|{name}\n9|PENDING|Dependency|{name}\n")
    assert place.start(one, tmp_path / "logs" / "0.log").number == "9"


def test_the_queue_is_asked_for_who_one_is_not_for_who_one_says_one_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGNAME", "nobody-of-this-name")
    queue_that_says(monkeypatch, tmp_path, "")
    slurm.Queue().look()
    assert f"--user {os.getuid()} " in (tmp_path / "asked").read_text()


def test_a_name_in_the_queue_that_is_no_utf_8_ends_no_sweep(monkeypatch, tmp_path):
    queue_that_says(monkeypatch, tmp_path, "")
    name = slurm.job_name(point(tmp_path, 0).folder)
    (tmp_path / "jobs").write_bytes(b"7|RUNNING|None|caf\xe9\n8|RUNNING|None|" + name.encode() + b"\n")
    assert slurm.Queue().find(point(tmp_path, 0).folder) == "8"


def test_a_job_that_found_another_run_at_its_point_waits_for_it(monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="launcher=slurm needs submitit")
    one = point(tmp_path, 0)
    queue_that_says(monkeypatch, tmp_path, f"7|RUNNING|None|{slurm.job_name(one.folder)}\n")
    place = slurm.Slurm(Launch(launcher=Launcher.slurm, jobs=1))
    job = place.start(one, tmp_path / "0.log")
    assert job.poll() is None
    assert not place.room()
    (tmp_path / "jobs").write_text("")
    with owned(one.folder):
        assert [job.poll(), job.poll()] == [None, None]
        assert job.state == "runs elsewhere"
        assert place.room()
        write_json(one.folder / "run.json", {"status": "running"})
    assert job.poll() == 1
    write_json(one.folder / "run.json", {"status": "finished"})
    assert job.poll() == 0


def node_of_a_job(monkeypatch, tmp_path, code: str, delay: int = 120) -> slurm.Node:
    """What runs on a node of a job, with `code` in place of the run."""
    submitit = pytest.importorskip("submitit", reason="launcher=slurm needs submitit")
    here = SimpleNamespace(raw_job_id="7", node=0, num_nodes=1, hostnames=["here"], _usr_sig=lambda: signal.SIGUSR2)
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: here)
    monkeypatch.setattr(slurm, "command", lambda *given: [sys.executable, "-c", f"import os, signal, time\n{code}"])
    return slurm.Node((), Launch(slurm=Slurm(signal_delay_s=delay)), tmp_path / "log")


@pytest.fixture
def signals_of_a_job():
    """The handlers that submitit has for a job's signals; they are put back at the end."""
    heard: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: heard.append(number)) for n in (15, signal.SIGUSR2)}
    yield heard
    for number, earlier in before.items():
        signal.signal(number, earlier)


def test_a_run_that_is_slow_to_save_is_killed_in_time_for_the_job_to_come_back(monkeypatch, tmp_path, signals_of_a_job):
    """Time is left of the warning, and the run whose step takes longer is gone before its job comes back."""
    assert slurm.save_seconds(Launch()) + slurm.REQUEUE_SECONDS == Launch().slurm.signal_delay_s
    monkeypatch.setattr(slurm, "LEAST_SAVE_SECONDS", 0.1)
    deaf = "signal.signal(15, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGUSR2); time.sleep(60)"
    node = node_of_a_job(monkeypatch, tmp_path, deaf, delay=1)
    again: list[slurm.Node] = []

    def requeue(number: int, frame: object) -> None:
        again.append(node.checkpoint().function)
        sys.exit()  # as submitit does

    signal.signal(signal.SIGUSR2, requeue)
    with pytest.raises(SystemExit):
        node()
    assert node.process.wait(timeout=20) == -signal.SIGKILL
    assert again[0].arguments == node.arguments


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 1), (signal.SIGTERM, 143), (signal.SIGUSR2, 1)],
    ids=["torchrun", "one process", "a warned node that is not the first"],
)  # fmt: skip
def test_a_job_that_was_told_to_end_leaves_the_end_to_slurm(monkeypatch, tmp_path, signals_of_a_job, number, status):
    """A job that fails before SLURM has requeued it does not come back; torchrun does not tell of the signal."""
    held: list[float] = []
    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=held.append))
    told = f"time.sleep(0.2); os.kill(os.getppid(), {number:d}); time.sleep(0.2); os._exit({status})"
    with pytest.raises(RuntimeError, match=f"exit status {status}"):
        node_of_a_job(monkeypatch, tmp_path, told)()
    assert held == [slurm.HOLD_SECONDS]
    assert signals_of_a_job == [number]
    with pytest.raises(RuntimeError, match=f"exit status {status}"):
        node_of_a_job(monkeypatch, tmp_path, f"os._exit({status})")()
    assert held == [slurm.HOLD_SECONDS]


def test_torchrun_gives_its_ranks_the_time_to_save(monkeypatch, tmp_path, signals_of_a_job):
    ask = "import os; print(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])"
    node_of_a_job(monkeypatch, tmp_path, ask, delay=600)()
    assert 500 < int((tmp_path / "log").read_text()) < slurm.save_seconds(Launch(slurm=Slurm(signal_delay_s=600)))
    monkeypatch.setattr(local, "command", pretended(ask))
    one = point(tmp_path, 0)
    assert running.run([one], local.Local(Launch()), show.Board([one])) == {}
    assert int(running.log_path(one.folder).read_text()) > 60


def test_an_option_of_the_methods_that_are_swept_over_reaches_each(sweep, monkeypatch):
    """Hydra's first composition has no method yet, so no gate either."""
    found = []
    monkeypatch.setattr(launch, "composed", lambda *given: found.append(points.composed(*given)) or found[-1])
    options = ("method.gate.renormalize=false", "method.gate.kind='topk'", "aux_loss.load_balance.coef=0.5")
    status, said = sweep("-m", "+method=mole,mola", *options, "method.target_modules=[q_proj,v_proj]", "dry_run=true")
    assert status == 0, said
    for config in found[0][1]:
        assert config.method.gate["renormalize"] is False
        assert config.aux_loss["load_balance"]["coef"] == 0.5
        assert config.method.target_modules == ["q_proj", "v_proj"]
    assert [point.name for point in found[0][0]] == ["method=mole", "method=mola"]
    status, said = sweep("-m", "method=mole,mola", "method.gate.renormalise=false")
    assert status == 2
    assert "method.gate.renormalise" in said


def test_a_value_that_is_left_to_the_points_comes_out_as_it_went_in():
    parser = OverridesParser.create()
    for value in ("1e-4", "[a,b]", "{a: 1}", "'x, y'", "a b/c:d", "${seed}", "int('3')", "-1", "[]"):
        (left,) = left_to_points(["-m", "method=a,b", f"++data.x={value}"])[2:]
        assert left == f"++data.x=choice({value})"
        each = parser.parse_override(left).sweep_string_iterator()
        as_it_was = parser.parse_override(f"++data.x={value}").value()
        assert [parser.parse_override(f"++data.x={one}").value() for one in each] == [as_it_was]
    unchanged = ("data.x=1,2", "data.x=null", "data.x='1'", 'data.x="{q} = \\"so\\""', "~data.x", "data.x=", "seed=0")
    for argument in (*unchanged, "hydra.verbose=true", "--config-dir=a.b", "method=a"):
        assert left_to_points(["-m", "method=a,b", argument])[2] == argument
    assert left_to_points(["-m", "method=a", "data.x=1"])[2] == "data.x=1"


def test_what_is_finished_needs_no_source_of_data(tmp_path):
    """A run and the points of a sweep alike: results can be shown where the data no longer are."""
    config = copy.deepcopy(composed("lora", f"data.source={tmp_path}/gone", f"run_dir={tmp_path}/run"))
    config.tasks.mixture["a"] = Task(name="a", path="owner/set", question="{q}", answer="a", answer_kind=Answer.text)
    config.tasks.mixture["a"].metric = "exact_match"
    with pytest.raises(DataError, match="no such folder"):
        check_run(config, world_size=1)
    write_json(tmp_path / "run" / "run.json", {"status": "finished", "config_sha256": load.digest(config)})
    check_run(config, world_size=1)


# ---- the base model's scores, which the runs of a sweep share


def scores(folder: Path, value: float) -> Path:
    write_lines(folder / "predictions" / "sums.jsonl", [{"value": value}] * 9)
    write_json(folder / "results.json", {"sums": {"value": value}})
    return folder


def test_shared_scores_appear_whole_and_the_first_stay(monkeypatch, tmp_path):
    """A third run may look at any moment, and two runs may leave theirs at the same one."""
    first, second, shared = scores(tmp_path / "1", 0.1), scores(tmp_path / "2", 0.2), tmp_path / "base" / "tiny"
    looks: list[bool] = []
    write = scoring.write_bytes

    def slowly(path: Path, data: bytes) -> None:
        looks.append(shared.exists())
        write(path, data)
        looks.append(shared.exists())

    monkeypatch.setattr(scoring, "write_bytes", slowly)
    scoring.share_results(first, shared)
    assert looks == [False, False]
    scoring.share_results(second, shared)
    scoring.copy_results(shared, tmp_path / "3")
    for folder in (shared, tmp_path / "3"):
        assert read_json(folder / "results.json")["sums"]["value"] == 0.1
        assert read_lines(folder / "predictions" / "sums.jsonl") == [{"value": 0.1}] * 9
    assert os.listdir(shared.parent) == ["tiny"]


def test_what_a_killed_run_left_of_its_shared_scores_goes(tmp_path):
    shared = tmp_path / "base" / "tiny"
    old, young, others = (shared.parent / f".{name}.tmp" for name in ("tiny.here.1", "tiny.here.2", "tiny-2.here.1"))
    for folder in (old, young, others):
        folder.mkdir(parents=True)
    for folder in (old, others):
        os.utime(folder, (0, 0))
    gone = shared.parent / ".tiny.here.3.tmp"
    gone.symlink_to(tmp_path / "removed by another process")
    scoring.share_results(scores(tmp_path / "1", 0.1), shared)
    assert set(shared.parent.iterdir()) == {shared, young, others, gone}


def test_scores_that_cannot_be_shared_end_no_run_and_a_part_of_them_is_not_left(monkeypatch, tmp_path):
    said: list[str] = []
    monkeypatch.setattr(scoring, "say", said.append)
    (tmp_path / "file").touch()
    mine, shared, write = scores(tmp_path / "1", 0.1), tmp_path / "base" / "tiny", scoring.write_json
    scoring.share_results(mine, tmp_path / "file" / "tiny")

    def loses(path: Path, values: object) -> None:
        shutil.rmtree(path.parent)
        write(path, values)

    monkeypatch.setattr(scoring, "write_json", loses)
    scoring.share_results(mine, shared)
    assert not shared.exists()
    for line, why in zip(said, ("file is a file, not a folder", "another process removed"), strict=True):
        assert line.startswith("The base model's scores are not shared with other runs: ")
        assert why in line


def test_results_go_before_the_predictions_that_they_are_of(tmp_path):
    """Where a second evaluation is killed, results.json must not stand beside predictions of another."""
    scores(tmp_path, 0.1)
    scored = scoring.Scored(tmp_path, "digest", scoring.Spent())
    assert scored.begin() == []
    assert (tmp_path / "results.json").exists()  # till there is something in its place
    scored.put("sums", [{"id": "a"}])
    assert not (tmp_path / "results.json").exists()
    assert scoring.Scored(tmp_path, "digest", scoring.Spent()).begin() == ["sums"]


def test_scores_are_shared_by_runs_of_the_same_weights_on_the_same_kind_of_device():
    def key(sha256: str, device: str) -> str:
        parts = SimpleNamespace(
            config=composed("lora"), evaluated={}, accelerator=SimpleNamespace(device=SimpleNamespace(type=device))
        )
        run = object.__new__(scoring.Scoring)
        run.parts, run.config, run.loaded = parts, parts.config, SimpleNamespace(sha256=sha256)
        return run.protocol_digest()

    assert key("a", "cpu") == key("a", "cpu")
    assert len({key("a", "cpu"), key("b", "cpu"), key("a", "cuda")}) == 3


def test_nodes_without_gpus_share_their_cores_among_a_point_s_processes(monkeypatch):
    """torchrun would give each of them one thread; and srun is told what sbatch was."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    asked = Slurm(gpus_per_node=0, cpus_per_task=8, setup=["module load x"])
    found = slurm.parameters(Launch(slurm=asked), Path("run"))
    assert found["setup"] == ["export SRUN_CPUS_PER_TASK=8", "module load x"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert slurm.own_threads(Launch(processes=2, slurm=asked)) == {"OMP_NUM_THREADS": "4"}
    assert slurm.own_threads(Launch(processes=2)) == {}

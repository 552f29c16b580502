"""Killed at any moment, the same command ends in the same bytes."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_runs import REPOSITORY, command, contents, start, task_folder, train, train_on

from mixlora.failpoints import POINTS
from mixlora.records import owned
from mixlora.scoring import Scored
from mixlora.training import checkpoint
from mixlora.training.spent import Spent

OFTEN = ["step.before_optimizer@5", "checkpoint.before_rename@2"]
METHOD = ("method=mole", "train.eval_steps=3", "train.load_best=true", "train.eval_limit=4")
REPORTED = (*METHOD, "report=true")
FORMS = ("fast", "lean")  # of a mixture in a block


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    return task_folder(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def whole(configs, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = train(configs, folder, *METHOD)
    assert done.returncode == 0, done.stderr
    assert not (folder / "report.html").exists()
    return folder


@pytest.fixture(scope="module")
def reported(configs, tmp_path_factory) -> Path:
    """The same with its report, whose writing can be interrupted too."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    done = train(configs, folder, *REPORTED)
    assert done.returncode == 0, done.stderr
    return folder


def killed(configs: Path, run: Path, point: str) -> None:
    done = train(configs, run, *METHOD, MIXLORA_FAIL=f"{point}:kill")
    assert done.returncode == -signal.SIGKILL, f"{point} was not reached\n{done.stderr}"


def goes_on_to(whole: Path, configs: Path, run: Path, job: Sequence[str] = METHOD) -> None:
    done = train(configs, run, *job)
    assert done.returncode == 0, done.stderr
    assert_same(contents(run), contents(whole))


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    differ = [name for name in want if got[name] != want[name]]
    assert not differ, differ


@pytest.mark.parametrize("point", OFTEN)
def test_kill_at_a_point(configs, whole, tmp_path, point):
    killed(configs, tmp_path / "run", point)
    goes_on_to(whole, configs, tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize("time", [1, 2, 4])
@pytest.mark.parametrize("point", POINTS)
def test_kill_at_every_point(configs, reported, tmp_path, point, time):
    run = tmp_path / "run"
    done = train(configs, run, *REPORTED, MIXLORA_FAIL=f"{point}@{time}:kill")
    assert done.returncode == -signal.SIGKILL or (time > 1 and done.returncode == 0), done.stderr
    goes_on_to(reported, configs, run, REPORTED)


@pytest.mark.full
def test_kill_again_and_again(configs, reported, tmp_path):
    """One run that dies at every point, one after the other."""
    for point in POINTS:
        train(configs, tmp_path / "run", *REPORTED, MIXLORA_FAIL=f"{point}:kill")
    goes_on_to(reported, configs, tmp_path / "run", REPORTED)


@pytest.mark.full
@pytest.mark.parametrize(("time", "when", "folder"), [(1, "before", "before"), (2, "after", ".")])
def test_a_task_that_was_scored_before_an_interruption_is_not_scored_again(
    configs, whole, tmp_path, time, when, folder
):
    run = tmp_path / "run"
    killed(configs, run, f"evaluate.task@{time}")
    kept, mark = run / folder / "predictions" / "sums.jsonl", run / folder / "scored.json"
    written = kept.stat().st_mtime_ns
    found = json.loads(mark.read_text())
    assert found["tasks"].keys() == {"sums"}
    mark.write_text(json.dumps(found | {"seconds": 5000.0, "peak_memory_bytes": 2**50}))
    done = train(configs, run, *METHOD)
    assert f"{when} sums was scored before the interruption" in " ".join(done.stdout.split())
    assert kept.stat().st_mtime_ns == written
    assert not mark.exists()
    assert_same(contents(run), contents(whole))
    record = json.loads((run / "run.json").read_text())
    assert 5000 < record["seconds"] < 5600
    assert record["peak_memory_bytes"] == 2**50


def test_what_an_interrupted_evaluation_took_counts_where_its_scores_do(tmp_path):
    first = Scored(tmp_path, "weights", Spent(lambda: 7, time.monotonic() - 1000))
    first.put("a", [{}])
    for of, seconds, peak in (("weights", 1500, 7), ("weights", 2000, 7), ("others", 500, 5)):
        spent = Spent(lambda: 5, time.monotonic() - 500)
        assert Scored(tmp_path, of, spent).begin() == (["a"] if of == "weights" else [])
        assert seconds <= spent.seconds < seconds + 100
        assert spent.peak_memory_bytes == peak


@pytest.mark.full
@pytest.mark.parametrize("changed", ["of", "tasks"])
def test_what_was_scored_with_other_weights_or_is_damaged_is_scored_again(configs, whole, tmp_path, changed):
    run = tmp_path / "run"
    killed(configs, run, "evaluate.task@2")
    (run / "predictions" / "sums.jsonl").write_text("{}\n")
    mark = json.loads((run / "scored.json").read_text())
    if changed == "of":
        mark = {"of": "0" * 64, "tasks": {"sums": hashlib.sha256(b"{}\n").hexdigest()}}
    (run / "scored.json").write_text(json.dumps(mark))
    goes_on_to(whole, configs, run)


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["data.load", "step.forward@5", "step.before_optimizer@3", "evaluate.after"])
def test_kill_of_a_rank(configs, tmp_path, point, rank):
    assert [done.returncode for done in train_on(configs, tmp_path / "whole", *METHOD)] == [0, 0]
    dead = train_on(configs, tmp_path / "run", *METHOD, "rank_timeout=20", MIXLORA_FAIL=f"{rank}/{point}:kill")
    assert all(done.returncode for done in dead)
    again = train_on(configs, tmp_path / "run", *METHOD)
    assert [done.returncode for done in again] == [0, 0], again
    assert_same(contents(tmp_path / "run"), contents(tmp_path / "whole"))


def test_the_same_command_twice_gives_the_same_bytes_and_a_finished_run_is_not_run_again(configs, whole, tmp_path):
    other = tmp_path / "run"
    assert train(configs, other, *METHOD, "train.save_steps=5").returncode == 0
    ours, theirs = contents(other), contents(whole)
    del ours["names"], theirs["names"]  # of the checkpoints
    assert_same(ours, theirs)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    done = train(configs, whole, *METHOD)
    assert "finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_finished_run_whose_report_cannot_be_made_shows_its_results(configs, whole, tmp_path):
    """Of a copy that somebody else reads, or that may not be written to."""
    run = shutil.copytree(whole, tmp_path / "run")
    with owned(run):
        done = train(configs, run, *REPORTED)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert said.index("mean of trained") < said.index(f"report.html was not made: {run} is in use by another run")
    failed = train(configs, tmp_path / "new", *REPORTED, MIXLORA_FAIL="report.write:full")
    assert failed.returncode == 5
    assert "mean of trained" in failed.stdout


@pytest.mark.full
def test_a_report_that_was_made_while_the_run_went_on_is_made_again(configs, reported):
    page = reported / "report.html"
    whole = page.read_text(encoding="utf-8")
    page.write_text("not finished")
    os.utime(page, (0, 0))
    assert train(configs, reported, *REPORTED).returncode == 0
    assert page.read_text(encoding="utf-8") == whole


@pytest.fixture
def half(configs, tmp_path) -> Path:
    """A run that was killed after the checkpoint of step 4."""
    killed(configs, tmp_path / "run", "step.forward@10")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-2", "step-4"]
    return tmp_path / "run"


def test_a_damaged_checkpoint(configs, whole, half):
    file = half / "checkpoints" / "step-4" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    asked = train(configs, half, *METHOD, f"resume={file.parent}")
    assert asked.returncode == 4
    assert str(file) in asked.stderr
    assert "Traceback" not in asked.stderr
    by_itself = train(configs, half, *METHOD)
    assert by_itself.returncode == 0, by_itself.stderr
    said = " ".join(by_itself.stdout.split())
    assert f"Not used: {file}" in said
    assert "Going on after step 2" in said
    assert_same(contents(half), contents(whole))


def test_checkpoints_that_are_a_link_to_another_disk_are_the_runs_own(configs, whole, half, tmp_path):
    disk, metrics = tmp_path / "disk" / "ckpt", (half / "metrics.jsonl").read_text()
    (half / "checkpoints").rename(tmp_path / "kept")
    (half / "checkpoints").symlink_to(disk)
    done = train(configs, half, *METHOD)
    assert done.returncode == 4, done.stdout
    assert f"checkpoints is a link to {disk}, which is not there" in done.stderr
    assert (half / "metrics.jsonl").read_text() == metrics
    disk.parent.mkdir()
    (tmp_path / "kept").rename(disk)
    done = train(configs, half, *METHOD)
    assert done.returncode == 0, done.stderr
    assert "Going on after step 4" in done.stdout
    ours, theirs = contents(half), contents(whole)
    del ours["names"], theirs["names"]  # those behind a link are not listed
    assert_same(ours, theirs)


@pytest.mark.full
def test_where_no_checkpoint_is_whole_the_run_starts_over(configs, whole, half):
    for path in (half / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    done = train(configs, half, *METHOD)
    assert done.returncode == 0, done.stderr
    assert "No whole checkpoint is left" in " ".join(done.stdout.split())
    assert_same(contents(half), contents(whole))


@pytest.mark.full
def test_a_run_that_was_sent_back_goes_on_from_its_own_checkpoints(configs, whole, half, tmp_path):
    """The command still names the old checkpoint when a job is started again."""
    asked = f"resume={half / 'checkpoints' / 'step-2'}"
    run = tmp_path / "other"
    first = train(configs, run, *METHOD, asked, MIXLORA_FAIL="adapter.write:kill")
    assert first.returncode == -signal.SIGKILL
    assert "Going on after step 2" in first.stdout
    again = train(configs, run, *METHOD, asked)
    assert again.returncode == 0, again.stderr
    assert "Going on after step 6" in again.stdout
    assert contents(run)["metrics"] == contents(whole)["metrics"]
    assert contents(run)["adapter/adapter_model.safetensors"] == contents(whole)["adapter/adapter_model.safetensors"]


@pytest.mark.full
def test_the_best_adapter_of_the_run_that_was_gone_on_from_is_kept(configs, whole, half, tmp_path):
    """In a folder of its own, which has no checkpoint yet that names it."""
    other = tmp_path / "other"
    done = train(configs, other, *METHOD, f"resume={half / 'checkpoints' / 'step-4'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(other)["adapter/adapter_model.safetensors"] == contents(whole)["adapter/adapter_model.safetensors"]


def test_a_run_whose_best_adapter_is_lost_keeps_its_checkpoints(configs, whole, half):
    best = half / "best" / "step-3"
    kept = best.rename(half / "elsewhere")
    saved = sorted((half / "checkpoints").iterdir())
    (saved[0] / "state.json").unlink()  # the one before is no way out
    for asked in ((), (f"resume={saved[1]}",)):
        done = train(configs, half, *METHOD, *asked)
        assert done.returncode == 4, done.stdout
        assert "step-4 names a best adapter" in done.stderr
        assert sorted((half / "checkpoints").iterdir()) == saved
    kept.rename(best)
    goes_on_to(whole, configs, half)


def test_a_run_that_begins_again_scores_the_base_on_the_rows_of_now(tmp_path):
    """A process scored it and ended before the first checkpoint; then somebody mended a row."""
    configs, run = task_folder(tmp_path / "configs"), tmp_path / "run"
    assert train(configs, run, *METHOD, MIXLORA_FAIL="step.forward:kill").returncode == -signal.SIGKILL
    rows = configs / "sums.jsonl"
    rows.write_text(rows.read_text().replace("plus", "and"))
    done = train(configs, run, *METHOD)
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((run / place / "results.json").read_text()) for place in ("before", "."))
    assert before["sums"]["data"] == after["sums"]["data"]


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_scored_or_written(configs, half, tmp_path):
    before = (half / "run.json").read_bytes()
    done = train(configs, half, *METHOD, f"resume={tmp_path / 'step-50'}")
    assert done.returncode == 4
    assert "step-50 is not there" in done.stderr
    assert (half / "run.json").read_bytes() == before
    done = train(configs, tmp_path / "new", *METHOD, f"resume={tmp_path / 'step-50'}")
    assert done.returncode == 4
    assert not (tmp_path / "new" / "before").exists()


def test_going_on_with_other_versions_is_said_and_time_and_memory_add_to_what_was_spent(configs, whole, half):
    for path in (half / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        state["made_with"]["packages"]["torch"] = "1.0"
        state["totals"] |= {"run_seconds": 5000.0, "peak_memory_bytes": 2**50}
        (path / "state.json").write_text(json.dumps(state))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["state.json"] = checkpoint.fingerprint(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest))
    done = train(configs, half, *METHOD)
    assert done.returncode == 0, done.stderr
    assert f"Going on with torch {torch.__version__}, not 1.0" in " ".join(done.stdout.split())
    record = json.loads((half / "run.json").read_text())
    assert 5000 < record["seconds"] < 5600
    assert record["peak_memory_bytes"] == 2**50


def test_a_run_goes_on_with_less_memory(configs, whole, half):
    """What the messages about memory name; the rows of a step stay the same."""
    less = (
        "train.micro_batch_size=1",
        "model.gradient_checkpointing=true",
        "eval.batch_size=2",
        "eval.batch_tokens=300",
    )
    done = train(configs, half, *METHOD, *less)
    assert done.returncode == 0, done.stderr
    assert "Going on after step 4" in done.stdout
    record = json.loads((half / "run.json").read_text())
    assert record["micro_batch_size"] == 1
    assert record["rows"] == json.loads((whole / "run.json").read_text())["rows"]


def test_a_run_that_goes_on_from_another_folder_keeps_the_commits_of_that(configs, half, tmp_path):
    path = half / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"git_commit": "c0ffee", "git_dirty": True}))
    done = train(configs, tmp_path / "other", *METHOD, f"resume={half / 'checkpoints' / 'step-4'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "other" / "run.json").read_text())
    assert {"git_commit": "c0ffee", "git_dirty": True} in found["earlier_commits"]
    assert found["git_dirty"] is True


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(configs, half, tmp_path):
    saved = half / "checkpoints" / "step-4"
    other = train(configs, tmp_path / "other", *METHOD, "train.learning_rate=0.1", f"resume={saved}")
    assert other.returncode == 4
    assert "train.learning_rate was 0.0005, now 0.1" in other.stderr
    same_folder = train(configs, half, *METHOD, "train.learning_rate=0.1")
    assert same_folder.returncode == 4
    assert "train.learning_rate" in same_folder.stderr

    own = task_folder(tmp_path / "configs")
    text = (own / "sums.jsonl").read_text()
    for path in (own / "task").glob("*.yaml"):  # the same task file, other rows behind it
        path.write_text(path.read_text().replace(str(own), str(configs)))
    shutil.copy(configs / "sums.jsonl", tmp_path / "kept")
    try:
        (configs / "sums.jsonl").write_text(text.replace("What is", "How much is"))
        changed = train(configs, half, *METHOD)
    finally:
        shutil.copy(tmp_path / "kept", configs / "sums.jsonl")
    assert changed.returncode == 4
    assert "data.sums.train" in changed.stderr


@pytest.mark.full
def test_another_world_size_is_refused(configs, half):
    path = half / "checkpoints" / "step-4" / "state.json"
    state = json.loads(path.read_text())
    assert state["origin"]["world_size"] == 1
    done = train_on(configs, half, *METHOD)
    assert [rank.returncode for rank in done] == [4, 4]
    assert "world_size was 1, now 2" in done[0].stderr
    assert done[1].stderr == ""


@pytest.mark.parametrize(("action", "status"), [("term", 143), pytest.param("int", 130, marks=pytest.mark.full)])
def test_a_signal_saves_and_the_run_goes_on(configs, whole, tmp_path, action, status):
    run = tmp_path / "run"
    done = train(configs, run, *METHOD, MIXLORA_FAIL=f"step.forward@6:{action}")
    assert done.returncode == status, done.stderr
    assert "saved after step 3" in done.stderr
    assert (run / "checkpoints" / "step-3" / "manifest.json").is_file()
    assert not (run / ".lock").exists()
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], set(record["computed"]), record["packed"]) == ("running", {"fused"}, True)
    assert train(configs, run, *METHOD).returncode == 0
    ours, theirs = contents(run), contents(whole)
    del ours["names"], theirs["names"]  # the extra checkpoint may still be among the newest two
    assert_same(ours, theirs)


@pytest.mark.full
def test_a_signal_in_the_last_step_is_not_lost(configs, whole, tmp_path):
    run = tmp_path / "run"
    done = train(configs, run, *METHOD, MIXLORA_FAIL="step.metrics@6:term")
    assert done.returncode == 143, done.stderr
    assert "saved after step 6" in done.stderr
    goes_on_to(whole, configs, run)


@pytest.mark.full
@pytest.mark.parametrize(("fail", "status"), [("1/evaluate.after:oom", 5), ("0/checkpoint.before_rename:full", 5)])
def test_the_status_of_what_ends_a_rank_is_that_of_all(configs, tmp_path, fail, status):
    done = train_on(configs, tmp_path / "run", *METHOD, MIXLORA_FAIL=fail)
    assert [rank.returncode for rank in done] == [status, status]
    assert sum(rank.stderr.count("mixlora: ") for rank in done) == 1


@pytest.mark.full
def test_a_second_signal_ends_at_once(configs, tmp_path):
    run = tmp_path / "run"
    process = start(configs, run, *METHOD, MIXLORA_FAIL="step.forward@6:hang")
    wait_for(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") == 2)
    time.sleep(0.5)
    process.send(signal.SIGTERM)
    assert process.wait(1) is None
    process.send(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM


def test_outside_training_a_signal_ends_at_once(configs, tmp_path):
    done = train(configs, tmp_path / "run", *METHOD, MIXLORA_FAIL="evaluate.before:int")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def wait_for(condition, seconds=120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.full
def test_two_runs_in_one_folder(configs, tmp_path):
    run = tmp_path / "run"
    first = start(configs, run, *METHOD, MIXLORA_FAIL="step.forward:hang")
    try:
        wait_for((run / "run.json").is_file)
        second = train(configs, run, *METHOD)
    finally:
        first.send(signal.SIGKILL)
        first.wait()
    assert second.returncode == 2
    assert f'"pid": {first.pid}' in second.stderr
    assert train(configs, run, *METHOD).returncode == 0


@pytest.mark.full
def test_a_disk_that_is_full_at_any_write(configs, tmp_path):
    """At the first write of a run, at the second and so on up to the last; the same command goes on from each."""
    job = ("method=mole", "train.max_steps=2", "train.eval_limit=2", "eval.limit=4")
    assert train(configs, tmp_path / "whole" / "run", *job).returncode == 0
    whole, time = contents(tmp_path / "whole" / "run"), 0
    while True:
        time += 1
        run = tmp_path / str(time) / "run"
        done = train(configs, run, *job, MIXLORA_FAIL=f"write@{time}:full")
        if "scores are not shared" in " ".join(done.stdout.split()):  # a cache, which a run does without
            assert done.returncode == 0, done.stderr
            continue
        if done.returncode == 0:
            break
        assert done.returncode == 5, done.stderr
        assert done.stderr.count("no space left") == done.stderr.count("\n") == 1, done.stderr
        assert not list(run.parent.rglob("*.tmp*")), f"write {time}"
        goes_on = train(configs, run, *job)
        assert goes_on.returncode == 0, goes_on.stderr
        assert_same(contents(run), whole)
    assert time > 15  # writes in a run


@pytest.mark.full
@pytest.mark.parametrize("point", ["step.metrics@3", "checkpoint.before_rename@2"])
def test_a_full_disk_leaves_the_earlier_checkpoint(configs, whole, tmp_path, point):
    run = tmp_path / "run"
    done = train(configs, run, *METHOD, MIXLORA_FAIL=f"{point}:full")
    assert done.returncode == 5, done.stderr
    assert "no space left" in done.stderr
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-2"]
    goes_on_to(whole, configs, run)


@pytest.mark.full
def test_a_disk_that_is_really_full(configs, tmp_path):
    """A tmpfs that holds the first checkpoint and not the second."""
    mount = tmp_path / "small"
    mount.mkdir()
    inner = f"mount -t tmpfs -o size=1500k none {mount} && exec " + " ".join(
        [sys.executable, *(f"'{part}'" for part in command(configs, mount / "run", *METHOD, "eval.before=false"))]
    )
    report = f"; status=$?; ls {mount}/run/checkpoints; exit $status"
    line = ["unshare", "--map-root-user", "--mount", "sh", "-c", inner.replace("exec ", "") + report]
    if not shutil.which("unshare") or subprocess.run([*line[:3], "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "no space left" in done.stderr
    assert "tmp" not in done.stdout.splitlines()[-1]


def test_out_of_memory_is_recorded_and_the_rows_stay_the_same(configs, whole, tmp_path):
    run = tmp_path / "run"
    done = train(configs, run, *METHOD, MIXLORA_FAIL="step.forward@4:oom")
    assert done.returncode == 0, done.stderr
    assert "Out of memory in step 2" in done.stdout
    record = json.loads((run / "run.json").read_text())
    assert record["micro_batch_size"] == 1
    assert record["rows"] == json.loads((whole / "run.json").read_text())["rows"]


def test_a_run_that_turned_lean_says_so_and_goes_on_lean(configs, tmp_path):
    """From a checkpoint after that, to the bytes of the run that wrote it; asked for, lean goes on where fast began."""
    mixture = ("method=mixlora", "train.save_total_limit=3")
    done = train(configs, tmp_path / "whole", *mixture, MIXLORA_FAIL="step.forward@4:oom")
    assert done.returncode == 0, done.stderr
    resumed = f"resume={tmp_path / 'whole' / 'checkpoints' / 'step-4'}"
    for name, form in (("on", "fast"), ("asked", "lean")):
        done = train(configs, tmp_path / name, *mixture, resumed, f"method.compute={form}")
        assert done.returncode == 0, done.stderr
        assert ("Going on with compute lean, not fast" in done.stdout) is (form == "lean")
    weights = Path("adapter", "adapter_model.safetensors")
    for name in ("whole", "on", "asked"):
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert (record["lean_from_step"], record["micro_batch_size"]) == (2, 2)
        assert record["computed"]["lean"]
        assert "fast" not in record["computed"]
        assert (tmp_path / name / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def within(kilobytes: int, configs: Path, run: Path, *overrides: str) -> int:
    """Train in a process that may map no more than so much memory; the most that it mapped."""
    train = [sys.executable, *command(configs, run, *overrides)]
    limited = ["sh", "-c", f'ulimit -v {kilobytes} && exec "$@"', "sh", *train]
    process, most = subprocess.Popen(limited, cwd=REPOSITORY, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = max(most, *map(int, re.findall(r"VmPeak:\s+(\d+)", status)), 0)
        time.sleep(0.1)
    assert process.returncode == 0
    return most


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_where_the_fast_form_really_does_not_fit_a_run_goes_on_lean(configs, tmp_path):
    wide = ("model.random.hidden_size=64", "model.random.intermediate_size=8192", "model.random.num_hidden_layers=4")
    large = ("train.per_device_train_batch_size=48", "train.gradient_accumulation_steps=1", "train.max_steps=1")
    job = ("method=mixlora", *wide, *large, "method.lora_dropout=0.0", "eval.before=false")
    need = {form: within(100_000_000, configs, tmp_path / form, *job, f"method.compute={form}") for form in FORMS}
    assert need["lean"] < 0.9 * need["fast"]
    within((need["fast"] + need["lean"]) // 2, configs, tmp_path / "run", *job)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["lean_from_step"] == 1
    assert record["rows"] == json.loads((tmp_path / "fast" / "run.json").read_text())["rows"]


@pytest.mark.full
@pytest.mark.parametrize(
    "point", ["data.load", "evaluate.before", "step.before_optimizer@2", "adapter.write", "evaluate.task@2"]
)
def test_out_of_memory_anywhere_else_ends_the_run_which_goes_on(configs, whole, tmp_path, point):
    done = train(configs, tmp_path / "run", *METHOD, MIXLORA_FAIL=f"{point}:oom")
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "with less than eval.batch_size" in done.stderr
    goes_on = train(configs, tmp_path / "run", *METHOD, "eval.batch_size=4", "eval.batch_tokens=512")
    assert goes_on.returncode == 0, goes_on.stderr
    weights = "adapter/adapter_model.safetensors"  # scores may round otherwise
    assert contents(tmp_path / "run")[weights] == contents(whole)[weights]


def test_a_rehearsal_writes_nothing(configs, tmp_path):
    done = train(configs, tmp_path / "run", *METHOD, "dry_run=true", "train.max_length=64")
    assert done.returncode == 0, done.stderr
    assert "One step of 4 rows of 64 tokens, 2 in a forward" in done.stdout
    assert "peak memory" in done.stdout
    assert not (tmp_path / "run").exists()
    small = train(configs, tmp_path / "run", *METHOD, "dry_run=true", MIXLORA_FAIL="step.forward:oom")
    assert "1 in a forward" in small.stdout


@pytest.mark.full
def test_strays_of_a_killed_run_go(configs, whole, half):
    (half / "checkpoints" / "step-9.tmp-1").mkdir()
    (half / ".run.json.77.tmp").write_text("{")
    goes_on_to(whole, configs, half)
    assert not [name for name in os.listdir(half / "checkpoints") if "tmp" in name]

"""A recipe from nothing to its table; what is done is skipped, what failed is named, what was stopped goes on."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from invented_runs import write_run

from mixlora import reproduction
from mixlora.config.load import digest
from mixlora.config.schema import Launch
from mixlora.errors import ConfigError, DataError, Interrupted, MixloraError
from mixlora.sweeps import local
from mixlora.tables import recipe as recipes
from mixlora.tables import render, table
from mixlora.tables.runs import DONE, FAILED
from mixlora.tables.study import Study

METHODS = {"lora": None, "mole": {"overrides": ["method=mole", "method.num_experts=3", "method.r=2"]}}


def written(folder: Path, **changes: object) -> Path:
    """A recipe with a task of its own."""
    (folder / "configs" / "task").mkdir(parents=True)
    rows = [{"q": f"Item {i} is", "o": ["red", "blue"], "a": i % 2} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "colours", "path": str(folder / "rows.jsonl"), "question": "{q}", "answer": "a", "metric": "acc"}
    task |= {"splits": {"train": "[:24]", "test": "[24:]"}, "options": {"field": "o"}}
    (folder / "configs" / "task" / "colours.yaml").write_text(yaml.safe_dump(task))
    values = {
        "title": "colours",
        "models": {"tiny": None},
        "mixtures": {"colours": None},
        "methods": METHODS,
        "seeds": [0, 1],
        "protocol": [
            "train.max_steps=2",
            "train.per_device_train_batch_size=2",
            "train.gradient_accumulation_steps=1",
        ],
        "table": {"columns": {"colours": "Colours"}, "extra": ["trainable"]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | changes))
    return folder


def study_of(folder: Path) -> Study:
    return Study(recipes.load(str(folder)), folder, str(folder / "runs"))


@pytest.mark.full  # test_tiny_recipe.py trains in every run of the tests; this one has a config folder of its own
def test_two_methods_and_two_seeds_from_nothing_to_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = written(tmp_path / "colours")
    done = reproduce(folder, "jobs=2", "include_dirty=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Done tiny") == 4
    made = table.build(Study(recipes.load(str(folder)), folder, str(folder / "runs"), include_dirty=True))
    assert [len(c.values) for c in made.cells.values() if not c.untrained] == [2, 2, 2, 2]
    for kind, text in render.FORMATS.items():
        path = folder / "runs" / "tables" / "colours" / f"table.{kind}"
        assert path.read_text(encoding="utf-8") == text(made)
    again = reproduce(folder, "include_dirty=true")
    assert "Running" not in again.stdout
    assert "Done" not in again.stdout


def reproduce(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mixlora.reproduce", f"recipe={folder}", f"output_root={folder / 'runs'}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def pretend(monkeypatch, code: str, written: Callable[[str, int], object] = lambda method, seed: None) -> None:
    """Every run is this Python text, and leaves what is `written`; both know its method and its seed."""

    def command(arguments, launch, machine):
        values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        written(values["method"], int(values["seed"]))
        return [sys.executable, "-c", code, values["method"], values["seed"]]

    monkeypatch.setattr(local, "command", command)


def test_a_failed_point_leaves_the_others_running_and_is_named_with_its_log(tmp_path, monkeypatch):
    study = study_of(written(tmp_path / "colours"))

    def write(method: str, seed: int) -> None:
        for point in study.points():
            if method == "mole" == point.group.method and seed == point.seed:
                write_run(study, point, {"colours": [1.0, 0.0]})

    code = "import sys; print('mixlora: loss not finite'); sys.exit(6 * (sys.argv[1] == 'lora'))"
    pretend(monkeypatch, code, write)
    failed = reproduction.reproduce(study, Launch(jobs=2))
    states = {(p.group.method, p.seed): study.run(p).state for p in study.points()}
    assert states == {("lora", 0): FAILED, ("lora", 1): FAILED, ("mole", 0): DONE, ("mole", 1): DONE}
    assert "exit status 6: loss not finite" in render.markdown(table.build(study))
    with pytest.raises(MixloraError, match=r"2 runs failed:\n.*logs.*\.log"):
        reproduction.complain(failed)


def test_with_several_rates_the_first_round_chooses_them(tmp_path, monkeypatch):
    folder = written(
        tmp_path / "colours",
        learning_rates=[1e-4, 1e-3],
        methods={"lora": None},
        protocol=["train.max_steps=2", "train.eval_steps=2"],
    )
    study, ran = study_of(folder), []

    def run(runs, place, board):
        for point in (p for run in runs for p in study.points() if str(p) == run.name):
            ran.append((point.rate, point.seed))
            made = write_run(study, point, {"colours": [1.0, 0.0]})
            (made / "metrics.jsonl").write_text(json.dumps({"step": 2, "validation_mean": point.rate}) + "\n")
        return {}

    monkeypatch.setattr(reproduction, "run", run)
    reproduction.reproduce(study, Launch(jobs=1))
    assert ran == [(1e-4, 0), (1e-3, 0), (1e-3, 1)]


def test_a_signal_reaches_each_run_once_and_nothing_new_starts(tmp_path, monkeypatch):
    study = study_of(written(tmp_path / "colours"))
    mark = tmp_path / "marks"
    mark.mkdir()
    code = (
        "import signal, sys, time, pathlib\n"
        f"mark = pathlib.Path({str(mark)!r}) / ('-'.join(sys.argv[1:]))\n"
        "def end(*_):\n    mark.write_text(mark.read_text() + 'x'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end); mark.write_text(''); time.sleep(60)"
    )
    pretend(monkeypatch, code)

    def interrupt() -> None:
        while not any(mark.iterdir()):
            pass
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted) as caught:
        reproduction.reproduce(study, Launch(jobs=1))
    assert caught.value.status == 130
    assert [p.read_text() for p in mark.iterdir()] == ["x"]


@pytest.mark.full
def test_a_dry_run_lists_runs_with_parameters_and_hours(tmp_path):
    done = reproduce(written(tmp_path / "colours"), "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "FLOPs =" in done.stdout
    assert "tiny · colours · lora" in done.stdout
    assert not (tmp_path / "colours" / "runs").exists()


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("There is no recipe 'tyni'", ["recipe=tyni"]),
        pytest.param("jbos", ["recipe=tiny", "jbos=2"], marks=pytest.mark.full),
        pytest.param(
            "goes into double quotes", ["recipe=tiny", "overrides=[train.max_steps=3]"], marks=pytest.mark.full
        ),
        pytest.param(
            "'seed=3' is decided by the grid", ["recipe=tiny", 'overrides=["seed=3"]'], marks=pytest.mark.full
        ),
    ],
)
def test_a_wrong_key_or_recipe_ends_with_status_2(tmp_path, says, arguments):
    done = subprocess.run(
        [sys.executable, "-m", "mixlora.table", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_runs_of_other_processes_are_not_mixed_into_one_table(tmp_path, monkeypatch):
    """Their steps are of other rows; nor is a point started where another cannot be run."""
    study = study_of(written(tmp_path / "colours"))
    first = study.points()[0]
    write_run(study, first, {"colours": [1.0, 0.0]}, world_size=1, config_sha256=digest(study.config(first)))
    study.forget()
    monkeypatch.setattr(reproduction, "run", lambda *_: pytest.fail("nothing may start"))
    with pytest.raises(ConfigError, match=r"was finished by 1 process.* and would now be run by 2"):
        reproduction.reproduce(study, Launch(processes=2))
    (tmp_path / "colours" / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"colours · lora.*rows\.jsonl"):
        reproduction.reproduce(study, Launch())


def test_how_runs_are_started_is_for_the_command_line_and_a_tracker_for_the_recipe(tmp_path):
    assert Study(recipes.load(str(written(tmp_path / "a"))), tmp_path, "runs", ["tracker=wandb"]).overrides
    for override in ("processes=4", "slurm.time_min=10", "accelerate=ddp"):
        with pytest.raises(ConfigError, match="is decided by the grid or the command line"):
            Study(recipes.load(str(tmp_path / "a")), tmp_path, "runs", [override])

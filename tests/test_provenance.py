"""Where a run comes from is what it says, and nothing of somebody else's."""

import functools
import json
import operator
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixlora.config.load import decisive
from mixlora.config.schema import Config
from mixlora.errors import CheckpointError
from mixlora.provenance import git_state, same_origin, with_earlier


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_the_code_and_not_of_the_checkout_it_is_installed_in(tmp_path):
    (tmp_path / ".gitignore").write_text(".venv\n")
    own, installed = tmp_path / "own.py", tmp_path / ".venv" / "mixlora" / "provenance.py"
    installed.parent.mkdir(parents=True)
    for path in (own, installed):
        path.write_text("1")
    assert git_state(own) == {"git_commit": None, "git_dirty": None}
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    state = git_state(own)
    assert len(state["git_commit"]) == 40
    assert state["git_dirty"] is False
    own.write_text("2")
    assert git_state(own) == state | {"git_dirty": True}
    assert git_state(installed) == {"git_commit": None, "git_dirty": None}


def state(commit: str | None, dirty: bool | None) -> dict:
    return {"git_commit": commit, "git_dirty": dirty}


def test_a_run_that_goes_on_keeps_the_commits_of_its_parts():
    clean, dirty, later = state("a", False), state("a", True), state("b", False)
    assert with_earlier(clean, clean) == clean
    assert with_earlier(later, clean) == later | {"earlier_commits": [clean]}
    assert with_earlier(clean, dirty) == dirty | {"earlier_commits": [dirty]}
    second = with_earlier(later, dirty)
    assert second == state("b", True) | {"earlier_commits": [dirty]}
    assert with_earlier(state("c", False), second)["earlier_commits"] == [dirty, state("b", True)]
    again = with_earlier(clean, with_earlier(later, clean))
    assert again == clean | {"earlier_commits": [clean, later]}
    assert with_earlier(clean, again) == again
    assert with_earlier(state(None, None), clean)["git_dirty"] is None


def test_a_run_that_builds_on_two_others_keeps_the_commits_of_both():
    now = {"git_commit": "c", "git_dirty": False}
    for earlier in ({"git_commit": "a", "git_dirty": False}, {"git_commit": "b", "git_dirty": True}):
        now = with_earlier(now, earlier)
    assert {part["git_commit"] for part in now["earlier_commits"]} == {"a", "b"}
    assert now["git_dirty"] is True


def test_a_run_that_goes_on_keeps_the_devices_threads_and_versions_of_its_parts():
    here = {"packages": {"torch": "2"}, "python": "3.11", "device": "gpu", "threads": 8}
    now, old = state("a", False) | here, here | {"packages": {"torch": "1"}}
    assert with_earlier(now, now) == now
    for key, value in (("device", "cpu"), ("threads", 1), ("packages", {"torch": "1"}), ("python", "3.12")):
        assert with_earlier(now, now | {key: value}) == now | {"earlier_surroundings": [here | {key: value}]}
    third = with_earlier(now | {"threads": 4}, with_earlier(now, now | old))
    assert third["earlier_surroundings"] == [old, here]
    assert "earlier_commits" not in third


def test_what_differs_is_named_with_both_values():
    saved = {"config": {"train": {"learning_rate": 0.1}, "seed": 1}, "world_size": 2}
    same_origin(Path("here"), saved, {"config": {"seed": 1, "train": {"learning_rate": 0.1}}, "world_size": 2})
    with pytest.raises(
        CheckpointError, match=r"here belongs .*train\.learning_rate was 0\.1, now 0\.2; world_size was 2"
    ):
        same_origin(Path("here"), saved, {"config": {"train": {"learning_rate": 0.2}, "seed": 1}, "world_size": 1})


def leaves(values: dict, *above: str) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield from leaves(value, *above, key) if isinstance(value, dict) and value else [(*above, key)]


def test_every_key_that_decides_a_result_is_refused_when_it_changes():
    saved = {"config": decisive(Config()), "data": {"sums": {"train": "a"}}, "weights": "b", "world_size": 1}
    places = list(leaves(saved))
    assert {("config", "seed"), ("config", "method", "num_experts"), ("data", "sums", "train")} < set(places)
    for place in places:
        now = json.loads(json.dumps(saved))
        functools.reduce(operator.getitem, place[:-1], now)[place[-1]] = "another"
        named = re.escape(".".join(place).removeprefix("config."))
        with pytest.raises(CheckpointError, match=f"{named} was .*, now another"):
            same_origin(Path("here"), saved, now)

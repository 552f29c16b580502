"""Files of a run folder are whole, and one process owns the folder."""

import json
import os
import socket
import subprocess
import sys

import pytest

from mixlora import records
from mixlora.errors import ConfigError


def test_replaces_in_one_step(tmp_path):
    path = tmp_path / "a" / "x.json"
    records.write_json(path, {"n": 1})
    records.write_json(path, {"n": 2})
    assert records.read_json(path) == {"n": 2}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_refuses_numbers_that_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    records.append_line(path, {"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert records.read_lines(path) == [{"step": 1}]


def test_a_living_owner_is_respected_and_a_dead_one_is_not(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": sleeper.pid, "host": socket.gethostname()}))
    with pytest.raises(ConfigError, match=f"process {sleeper.pid}"), records.owned(tmp_path):
        pass
    sleeper.kill()
    sleeper.wait()
    with records.owned(tmp_path):
        assert records.read_json(lock)["pid"] == os.getpid()
    assert not lock.exists()

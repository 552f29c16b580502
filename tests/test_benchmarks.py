"""The README's figures are those of benchmarks/results, and every benchmark runs."""

import argparse
import importlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
MARKED = "a\n<!-- made by benchmarks/report.py -->\nold\n<!-- end -->\nb\n"
NEEDS_PEER = {"peers"}  # an environment of its own
NO_SCRIPTS = {"common", "layers", "training", "report", "run"}
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - NO_SCRIPTS - NEEDS_PEER)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def report(module):
    return module("report")


def row(**values):
    blank = {"figure": "step", "setting": "float32", "value": 0.5, "goal": None, "at_least": False, "low": None}
    blank |= {"high": None, "verdict": "", "note": ""}
    return blank | values


def result(*rows, kind="cpu", quick=False):
    machine = {"device": "a CPU", "threads": 2, "kind": kind, "commit": "0123abc"}
    return {"benchmark": "steps", "machine": machine, "date": "2026-01-02", "quick": quick, "rows": list(rows)}


def test_the_readme_has_what_the_results_say(report):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert report.with_summary(text, report.read(report.RESULTS)) == text


def test_a_summary_says_what_was_met_missed_and_undecided(report):
    rows = [
        row(goal=1.0, verdict="met"),
        row(goal=2.0, at_least=True, verdict="too noisy", least=0.25, most=3.0, note="a note", noisy=True),
        row(goal=1.0, verdict="met", low=0.4, high=0.6, noisy=True),  # from before intervals were kept
        row(figure="no goal"),
        row(goal=0.5, value=0.5004, verdict="not met"),
    ]
    made = report.with_summary(MARKED, [result(*rows)])
    assert made.startswith("a\n<!-- made")
    assert made.endswith("<!-- end -->\nb\n")
    assert "| step | float32 | 0.500 | | ≤ 1 | met |".replace("| |", "|  |") in made
    assert "| step | float32 | 0.500 | 0.250 to 3.000 | ≥ 2 | too noisy, a note |" in made
    assert "| step | float32 | 0.500 | quartiles 0.400 to 0.600 | ≤ 1 | met, ratios far apart |" in made
    assert "| 0.50040 |" in made  # three digits would be on the other side of the goal
    counted = "Of 4 goals: 2 met, 1 too noisy, 1 not met. Not met: step: 0.50040 (float32; goal ≤ 0.5)."
    assert f"**On a CPU.** {counted}\n" in made
    assert "<summary>a CPU, 2 threads: steps 2026-01-02 at 0123abc</summary>" in made
    assert f"**On a GPU.** Of {len(report.GPU_GOALS)} goals: {len(report.GPU_GOALS)} not measured.\n" in made
    assert "<summary>Nothing has been measured yet</summary>" in made
    assert "old" not in made
    assert "no goal" not in made


def test_a_goal_of_a_gpu_is_open_until_a_gpu_has_measured_it(report):
    figures = [row(figure=figure.replace("*", "mole fast"), goal=most) for figure, most in report.GPU_GOALS.items()]
    on_cpu, on_gpu = (report.with_summary(MARKED, [result(*figures, kind=kind)]) for kind in ("cpu", "cuda"))
    assert on_cpu.count("| not measured |") == len(report.GPU_GOALS)
    assert "not measured" not in on_gpu


def test_without_results_the_readme_says_so_and_quick_ones_are_none(report, tmp_path):
    (tmp_path / "linear-cpu-quick.json").write_text(json.dumps(result(row(), quick=True)), encoding="utf-8")
    assert report.read(tmp_path) == []
    assert "\nNothing has been measured yet.\n" in report.with_summary(MARKED, [])
    (tmp_path / "linear-cpu.json").write_text(json.dumps(result(row())), encoding="utf-8")
    assert len(report.read(tmp_path)) == 1


def test_a_goal_is_met_or_not_where_the_interval_of_the_median_says_so(module):
    common = module("common")

    def verdict(*ratios: float, **options) -> str:
        return common.ratio("a", "b", ratios, [1.0] * len(ratios), **options).verdict

    rounds = [0.97, 0.98, 0.99, 1.0, 1.01]
    assert [verdict(*rounds, goal=goal) for goal in (1.02, 1.0, 0.96)] == ["met", "undecided", "not met"]
    assert [verdict(*rounds, goal=goal, at_least=True) for goal in (1.02, 1.0, 0.96)] == ["not met", "undecided", "met"]
    assert verdict(0.5, 0.6, 1.0, 1.5, 1.6, goal=1.0) == "too noisy"
    assert verdict(0.5, 0.6, 1.0, 1.5, 1.6, goal=2.0) == "met"  # noisy, and far below
    assert verdict(*rounds) == ""
    assert common.Row("bytes", "b", 0.5, 0.5).verdict == "met"


def test_an_interval_of_the_median_holds_it_as_often_as_it_says(module):
    interval, generator = module("common").interval, random.Random(0)
    for n, certain in ((5, 0.93), (12, 0.95), (41, 0.95)):
        held = [
            least <= 0 <= most for least, most in (interval([generator.gauss() for _ in range(n)]) for _ in range(4000))
        ]
        assert certain - 0.01 < sum(held) / len(held) < 0.99
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert interval([1.0]) == (1.0, 1.0)


@pytest.mark.parametrize("scale", [1, 10])
def test_noise_is_in_the_ratios_and_not_in_what_a_round_does_to_both_sides(module, scale):
    common = module("common")
    times = [1.0, 2.0 * scale, 1.0, 3.0 * scale, 1.0, 2.0 * scale, 1.0, 4.0]
    alike = common.ratio("a", "b", [0.9 * t for t in times], times)
    assert alike.value == pytest.approx(0.9)
    assert not alike.noisy
    assert common.ratio("a", "b", times, [1.0] * len(times)).noisy


def test_times_of_emulated_products_have_no_goal(module, monkeypatch, capsys):
    common = module("common")
    for supported, goal in ((True, 1.0), (False, None)):
        monkeypatch.setattr(common.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=supported: has)
        assert common.ratio("a", "b", [1.0], [1.0], **common.comparable("bfloat16", "cpu", 1.0)).goal == goal
        assert ("not comparable" in capsys.readouterr().out) is not supported
    assert common.comparable("float32", "cpu", 1.0)["goal"] == 1.0
    assert common.comparable("bfloat16", "cuda", 1.0)["goal"] == 1.0


def test_a_curve_is_judged_round_by_round(module):
    scaling = module("scaling")
    straight = {n: [n * busy for busy in (1.0, 3.0, 9.0)] for n in (1, 2, 3, 4)}
    assert scaling.worst("tokens", straight, "").value == pytest.approx(1.0)
    bent = straight | {3: [1.5 * t for t in straight[3]]}
    found = scaling.worst("tokens", bent, "")
    assert (found.value, found.noisy) == (pytest.approx(1.5), False)
    faster_and_faster = {n: [n**2 * busy for busy in (1.0, 3.0, 9.0)] for n in (2, 4, 8, 16, 32)}
    assert scaling.worst("tokens", faster_and_faster, "").value > 1.5


def test_grouped_rows_are_alike_in_length(module):
    tokens = module("tokens")
    lengths = [10 + 7919 * i % 500 for i in range(tokens.POOL)]
    pool = [range(n) for n in lengths]
    options = argparse.Namespace(steps=3, rounds=5)
    chosen = tokens.grouped(pool, options)
    assert len(chosen) == 18 * tokens.SIZE
    assert tokens.padding(chosen) < 0.1 < tokens.padding(pool)


def test_rounds_that_differ_in_padding_alone_are_alike_at_one_padding(module):
    tokens = module("tokens")
    generator = random.Random(0)
    rows = [range(generator.choice([10, 50, 400])) for _ in range(6 * 16)]  # six rounds of two batches
    chunks = [rows[i : i + 16] for i in range(16, len(rows), 16)]
    positions = [sum(8 * max(map(len, chunk[i : i + 8])) for i in (0, 8)) for chunk in chunks]
    speeds = [sum(map(len, chunk)) / (0.01 * n) for chunk, n in zip(chunks, positions, strict=True)]
    assert max(speeds) > 1.2 * min(speeds)
    assert tokens.at_padding(0.5, speeds, rows, 16) == pytest.approx([50.0] * 5)  # half of 100 positions a second


# ---- whole steps, as a GPU has them


def asked(**values) -> argparse.Namespace:
    options = {"device": "cpu", "methods": "mole,mixlora", "only": "", "compiled": "", "quick": False, "threads": 1}
    options |= {"model": "tiny", "where": ("tiny", "cpu", "float32"), "budget": 0.0, "clock": "wall", "commit": None}
    return argparse.Namespace(**options | values)


def test_what_needs_a_compiler_is_measured_last_and_not_at_all_where_none_is_named(module):
    steps = module("steps")

    def parts(**values) -> list[tuple]:
        found = steps.parts(asked(device="cuda", **values))
        return [(part.func.__name__, part.args[0], part.keywords.get("compiled", False)) for part in found]

    assert all(not compiled for _, _, compiled in parts())
    last = [("times", "mole", True), ("times", "mixlora", True)]
    assert parts(compiled="mole,mixlora") == parts() + last
    assert parts(compiled="mole,mixlora", only="compiled") == last
    assert parts(compiled="mole", only="compiled", methods="mole") == last[:1]
    assert {name for name, _, _ in parts(only="memory")} == {"memory"}


@pytest.fixture
def steps_of_a_gpu(module, monkeypatch):
    """A device that does what is asked at once; steps are real ones, of rows of eight tokens."""
    steps = module("steps")
    long_rows = steps.long_rows
    monkeypatch.setattr(steps, "on_gpu", lambda device: True)
    monkeypatch.setattr(steps, "long_rows", lambda length, number, answer: long_rows(8, number, 4))
    monkeypatch.setattr(steps.torch.cuda, "synchronize", lambda: None)
    return steps


def test_memory_of_a_gpu_is_read_in_one_process_less_what_is_no_variants(steps_of_a_gpu, monkeypatch):
    steps, mebibyte = steps_of_a_gpu, 2**20
    held, most = iter([100, 130, 110, 120]), iter([190, 210])  # without and with each variant; mole's, then PEFT's
    monkeypatch.setattr(steps, "subprocess", None)
    monkeypatch.setattr(steps, "held", lambda gpu: next(held) * mebibyte)
    monkeypatch.setattr(steps.torch.cuda, "max_memory_allocated", lambda: next(most) * mebibyte)
    peak, growth = steps.memory("mole", 0.05, asked())
    assert (peak.value, peak.note, peak.goal) == (0.9, "90 / 100 MiB", 0.6)
    assert (growth.value, growth.note, growth.goal) == (60 / 90, "60 / 90 MiB", None)


class Seen:
    """One profiled step: what a host did, two kernels, and a mark that stands over them."""

    def __init__(self, activities):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def events(self) -> list[SimpleNamespace]:
        kinds = [(DeviceType.CPU, 5000, False), (DeviceType.CUDA, 1500, False), (DeviceType.CUDA, 250, False)]
        kinds.append((DeviceType.CUDA, 9000, True))
        return [
            SimpleNamespace(
                device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda us=us: us), is_user_annotation=mark
            )
            for kind, us, mark in kinds
        ]


@pytest.mark.parametrize("compiled", [False, True])
def test_each_side_of_a_gpus_steps_has_its_time_on_the_device_and_its_kernels(
    steps_of_a_gpu, compiled, monkeypatch, capsys
):
    steps = steps_of_a_gpu
    monkeypatch.setattr(steps, "profile", Seen)
    trainer = steps.trainer
    monkeypatch.setattr(steps, "trainer", lambda *parts, torch_compile=False: trainer(*parts))
    found = {row.figure: row for row in steps.times("mixlora", 0.0, asked(), compiled)}
    sides = ["compiled fast", "compiled peft", "compiled lora"] if compiled else ["fast", "peft", "lean", "lora"]
    busy = {f"step: device busy in ms: mixlora {side}" for side in sides}
    assert {name for name in found if "busy" in name} == busy
    assert {(found[name].value, found[name].note.partition(";")[0]) for name in busy} == {
        (1.75, "2 kernels and copies")
    }
    figure = "step: mixlora / our own LoRA" + ", layers of both compiled" * compiled
    assert found[figure].goal == 1.1
    assert f"step: device busy in ms: mixlora {sides[0]}" in capsys.readouterr().out


def test_sides_that_are_packed_in_two_ways_are_not_compared(module):
    steps = module("steps")
    steps.require_one_way({"fast": True, "peft": True})
    with pytest.raises(AssertionError, match="'peft': False"):
        steps.require_one_way({"fast": True, "peft": False})


def test_no_side_multiplies_zeros(module):
    training = module("training")
    where = "tiny", "cpu", "float32"
    sides = [
        training.ours(*where, "mole"),
        training.peft_like(*where, "mole", 0.0),
        training.lora_like(*where, "mole", 0.0),
    ]
    for _, adapter, _ in sides:
        Bs = [tensor for name, tensor in adapter.items() if name.endswith("B_RO") or "lora_B" in name]
        assert Bs
        assert all(bool(B.any()) for B in Bs)


def test_random_weights_are_made_where_they_are_to_be(module, monkeypatch):
    training = module("training")

    def load(chosen, device) -> SimpleNamespace:
        return SimpleNamespace(model=SimpleNamespace(device=torch.empty(0).device.type))

    monkeypatch.setattr(training.base, "load", load)
    assert training.loaded.__wrapped__("llama_1b", "meta", "bfloat16").model.device == "meta"


def test_parts_of_one_commit_are_put_together_where_no_history_says_which_it_is(module, monkeypatch, tmp_path):
    common = module("common")
    monkeypatch.setattr(common, "commit", lambda: None)

    def written(figure: str, commit: str | None) -> list[str]:
        path = common.write("steps", [common.Row(figure, "s", 1.0)], asked(out=tmp_path, commit=commit))
        return [row["figure"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]

    assert written("a", None) == ["a"]
    assert written("b", None) == ["b"]  # it may be other code
    assert written("a", "0123abc") == ["a"]
    assert written("b", "0123abc") == ["a", "b"]
    assert written("c", "4567def") == ["c"]
    monkeypatch.setattr(common, "commit", lambda: "89abcde")
    assert written("a", "4567def") == ["a"]  # a history knows better


def test_a_readme_without_its_marks_is_said(report):
    with pytest.raises(SystemExit, match="has no"):
        report.with_summary("nothing", [])


@pytest.mark.full
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_runs(name, tmp_path):
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--quick", "--threads", "1", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("*-quick.json")
    rows = json.loads(written.read_text(encoding="utf-8"))["rows"]
    assert rows
    assert all(r["value"] > 0 or (name == "where" and math.isfinite(r["value"])) for r in rows)  # of differences

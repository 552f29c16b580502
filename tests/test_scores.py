"""Results are computed by an evaluate.Metric, which needs no hub, leaves no file and disturbs no generator."""

import math

import evaluate
import pytest
import torch

from mixlora.config.schema import Backend, Data, Eval, Protocol, Task
from mixlora.evaluation import harness
from mixlora.evaluation.metric import MeanScore
from mixlora.evaluation.protocols import protocol_of
from mixlora.evaluation.report import mean_cells, print_results
from mixlora.evaluation.run import result
from mixlora.records import write_json, write_lines

PREDICTIONS = [
    {"id": str(i), "target": i % 2, "acc": float(i < 3), "acc_norm": i / 9, "shots_cut": 0, "tokens_cut": 0}
    for i in range(10)
]


def test_the_metric_says_mean_error_and_interval(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = MeanScore().compute(predictions=[1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert found["n"] == 10
    assert found["value"] == pytest.approx(0.3)
    assert found["stderr"] == pytest.approx(math.sqrt((3 * 0.49 + 7 * 0.09) / 9 / 10))
    for end in found["interval"]:  # Wilson: the shares whose own standard error would put 0.3 just at 1.96
        assert abs(end - 0.3) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 10), rel=1e-5)
    assert not list(tmp_path.iterdir())


def test_results_are_what_the_metric_says(monkeypatch):
    seen = []

    class Spy(MeanScore):
        def _compute(self, predictions):
            seen.append(list(predictions))
            return super()._compute(predictions)

    assert issubclass(Spy, evaluate.Metric)
    monkeypatch.setattr("mixlora.evaluation.run.MeanScore", Spy)
    before = torch.get_rng_state()
    task = Task(name="t", path="t", question="{q}", answer="a", metric="acc_norm")
    found = result(task, PREDICTIONS, protocol_of(Eval(), Data()))
    assert [p["acc_norm"] for p in PREDICTIONS] in seen
    want = MeanScore().compute(predictions=[p["acc_norm"] for p in PREDICTIONS])
    assert {key: found[key] for key in ("value", "stderr", "n")} == {key: want[key] for key in ("value", "stderr", "n")}
    assert found["interval"] == list(want["interval"])
    assert found["metrics"]["acc"] == pytest.approx(0.3)
    assert torch.equal(torch.get_rng_state(), before)


def sample(number: int, target: object, arguments: list[list[str]]) -> dict:
    """A document as the harness returns it."""
    answers = [[(-1.0 - i, False)] for i in range(len(arguments))]
    return {"doc_id": number, "arguments": arguments, "resps": answers, "target": target, "acc": 1.0, "acc_norm": 1.0}


def test_what_the_harness_does_not_tell_is_not_known():
    """Nothing of what was cut; and no constant guess where targets are ends of sentences, as WinoGrande's are."""
    task, protocol = Task(name="t", metric="acc"), protocol_of(Eval(backend=Backend.lm_eval), Data())
    ends = [sample(i, "was big.", [["A", " was big."], ["B", " was big."]]) for i in range(3)]
    found = result(task, harness.predictions(task, ends), protocol)
    assert found["majority"] is found["cut"] is None
    places = [sample(i, i % 3 // 2, [["Q", " yes"], ["Q", " no"]]) for i in range(3)]
    assert result(task, harness.predictions(task, places), protocol)["majority"] == pytest.approx(2 / 3)
    labels = [prediction | {"target": "AAB"[i]} for i, prediction in enumerate(PREDICTIONS[:3])]
    by_label = protocol_of(Eval(protocol=Protocol.moe_peft), Data())
    assert result(task, labels, by_label)["majority"] == pytest.approx(2 / 3)


def test_one_example_has_no_error_and_nor_has_a_mean_that_holds_it(tmp_path, capsys):
    task, protocol = Task(name="t", metric="acc"), protocol_of(Eval(), Data())
    made = {}
    for folder, first in ((tmp_path / "before", 1), (tmp_path, 0)):
        some = {"one": PREDICTIONS[:1], "many": PREDICTIONS[first:]}
        made[folder] = {name: result(task, rows, protocol) for name, rows in some.items()}
        write_json(folder / "results.json", made[folder])
        for name, rows in some.items():
            write_lines(folder / "predictions" / f"{name}.jsonl", rows)
    assert made[tmp_path]["one"]["stderr"] is made[tmp_path]["one"]["stderrs"]["acc"] is None
    print_results(tmp_path)
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "±" not in rows["one"] + rows["mean of trained"]
    assert rows["many"].count("±") == 3
    after, before = ({"many": made[folder]["many"]} for folder in (tmp_path, tmp_path / "before"))
    assert "±" in mean_cells(tmp_path, after, before)[-1]

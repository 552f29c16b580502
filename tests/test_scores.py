"""Results are computed by an evaluate.Metric, which needs no hub, leaves no file and disturbs no generator."""

import math

import evaluate
import pytest
import torch

from mixlora.config.schema import Data, Eval, Task
from mixlora.evaluation.metric import MeanScore
from mixlora.evaluation.protocols import protocol_of
from mixlora.evaluation.run import result

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

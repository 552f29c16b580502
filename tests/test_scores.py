"""Results are computed by an evaluate.Metric, which needs no hub, leaves no file and disturbs no generator."""

import math

import evaluate
import pytest
import torch

from mixlora.config.schema import Answer, Backend, Data, Eval, Protocol, Task
from mixlora.evaluation import harness
from mixlora.evaluation.metric import MeanScore
from mixlora.evaluation.protocols import protocol_of
from mixlora.evaluation.report import mean_cells, notes, print_results
from mixlora.evaluation.run import majority, result
from mixlora.evaluation.scores import choose, mean_and_error
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


def test_each_normaliser_takes_its_own_option():
    """-2, -3 and -4 nats; -1, -1/2 and -1 a byte; -2, -3/2 and -1 a token. Of equals the first."""
    assert choose([-2.0, -3.0, -4.0], [2, 6, 4], [1, 2, 4]) == {"acc": 0, "acc_norm": 1, "acc_token": 2}
    assert choose([-1.0, -1.0], [1, 1], [1, 1]) == {"acc": 0, "acc_norm": 0, "acc_token": 0}


@pytest.mark.parametrize(
    ("kind", "targets", "share"),
    [
        (Answer.options, [0, 1, 1, 2], 0.5),
        (Answer.number, ["so #### 5", "#### 5.0", "#### 1,000", "it is 1000"], 0.5),
        (Answer.text, ["Yes.", " yes", "yes!", "no"], 0.75),
        (Answer.code, ["def f(): pass"] * 2, None),
    ],
)
def test_the_guess_is_the_best_constant_answer(kind, targets, share):
    """Of targets that count as equal, as answers do."""
    task = Task(name="t", path="t", question="{q}", answer="a", answer_kind=kind)
    reading = protocol_of(Eval(), Data()).reads(task)
    assert majority(task, [{"target": target} for target in targets], reading) == share


def scored(folder, metric, **scores):
    """A folder with these scores of each task's questions."""
    results = {}
    for name, values in scores.items():
        rows = [{"id": f"{name}/test/{i}", metric: float(value)} for i, value in enumerate(values)]
        write_lines(folder / "predictions" / f"{name}.jsonl", rows)
        value, stderr = mean_and_error(values)
        found = {"metric": metric, "value": value, "stderr": stderr, "n": len(values), "majority": 0.5}
        results[name] = found | {"trained": name != "other"}
    write_json(folder / "results.json", results)


def printed(folder, capsys) -> list[list[str]]:
    """The cells of each line of the table."""
    print_results(folder)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("┃│").split(line[0])] for line in lines if line[:1] in ("┃", "│")]


def test_a_run_prints_its_scores_before_and_after_and_the_paired_change(tmp_path, capsys):
    """The mean is of the trained tasks; its error that of a sum of independent changes."""
    scored(tmp_path, "acc", arc=[1, 1, 1, 0], other=[1, 1], piqa=[0, 1])
    assert printed(tmp_path, capsys) == [
        ["task", "n", "guess", "score"],
        ["arc", "4", "50.0", "75.0 ± 25.0"],
        ["other*", "2", "50.0", "100.0 ± 0.0"],
        ["piqa", "2", "50.0", "50.0 ± 50.0"],
        ["mean of trained", "6", "", "62.5"],
    ]
    scored(tmp_path / "before", "acc", arc=[1, 0, 0, 0], other=[0, 0], piqa=[0, 0])
    assert printed(tmp_path, capsys) == [
        ["task", "n", "guess", "before", "after", "change"],
        ["arc", "4", "50.0", "25.0 ± 25.0", "75.0 ± 25.0", "+50.0 ± 28.9"],
        ["other*", "2", "50.0", "0.0 ± 0.0", "100.0 ± 0.0", "+100.0 ± 0.0"],
        ["piqa", "2", "50.0", "0.0 ± 0.0", "50.0 ± 50.0", "+50.0 ± 50.0"],
        ["mean of trained", "6", "", "12.5", "62.5", "+50.0 ± 28.9"],
    ]


def test_the_metric_of_each_task_stands_under_the_scores():
    found = {name: {"metric": metric, "value": 0.5, "n": 4} for name, metric in {"a": "acc", "b": "strict"}.items()}
    assert "metric: acc" in notes({"a": found["a"]})
    assert "metric: acc (a, c), strict (b)" in notes(found | {"c": found["a"]})
    assert not [line for line in notes({"a": found["a"] | {"value": None, "reason": "not run"}}) if "metric" in line]


def test_answers_that_name_no_option_are_told_under_the_scores():
    task, protocol = Task(name="t", metric="acc"), protocol_of(Eval(protocol=Protocol.generate), Data())
    told = {}
    for lost in (0, 3):
        rows = [row | {"parsed": float(i >= lost)} for i, row in enumerate(PREDICTIONS[:7])]
        told[lost] = [line for line in notes({"t": result(task, rows, protocol)}) if line.startswith("t: ")]
    assert told == {0: [], 3: ["t: 3 of 7 answers name no option and count as wrong"]}


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
    flipped = [prediction | {"acc": 1 - prediction["acc"]} for prediction in PREDICTIONS]
    for folder, all_rows in ((tmp_path / "before", flipped), (tmp_path, PREDICTIONS)):
        some = {"one": all_rows[:1], "many": all_rows}
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

"""Laws of the paired comparison of two runs."""

import json
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from mixlora.compare import main
from mixlora.evaluation.report import cells, mean_cells
from mixlora.records import read_json, read_lines, write_json, write_lines
from mixlora.tables.paired import compare, mcnemar, sign_flips
from mixlora.tables.statistics import holm

ROOT = Path(__file__).parents[1]


def write(folder, scores, *, task="arc", metric="acc", **changes):
    """A folder with one scored task."""
    rows = [
        {"id": f"{task}/test/{i}", "prompt": f"question {i}", "target": 0, metric: float(s)}
        for i, s in enumerate(scores)
    ]
    result = {
        "metric": metric, "value": sum(scores) / len(scores), "n": len(rows), "prompts": "p1",
        "protocol": {"name": "loglikelihood", "split": "test"}, "data": {"test": "d1", "train": "t1"},
    }  # fmt: skip
    path = folder / "results.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, before | {task: result | changes})
    write_lines(folder / "predictions" / f"{task}.jsonl", rows)
    return folder


def test_mcnemar_by_hand():
    """8 won, 2 lost: 2 (1 + 10 + 45) / 2^10 = 112 / 1024."""
    assert mcnemar(8, 2) == pytest.approx(112 / 1024)
    assert mcnemar(2, 8) == mcnemar(8, 2)
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(3, 3) == pytest.approx(1)
    assert mcnemar(0, 0) == 1


def test_tasks_that_one_run_alone_scored_are_named(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, tasks in ((a, ("arc", "boolq")), (b, ("arc", "piqa", "siqa"))):
        for task in tasks:
            write(folder, [1, 0, 1], task=task)
    assert main([str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert "Scored by A alone: boolq" in said
    assert "Scored by B alone: piqa, siqa" in said


def test_few_examples_prove_little_whatever_they_score():
    """All m of the same sign: 2 of the 2^m flips lie as far out."""
    for m in (1, 2, 3, 6):
        assert sign_flips(np.linspace(0.3, 0.4, m)) == pytest.approx(2 / 2**m)
    assert sign_flips(np.array([0.3, 0.0, 0.0, 0.0])) == 1


def test_flips_are_counted_one_by_one():
    change = np.random.default_rng(2).normal(0.4, 1, 9)
    sums = [abs(np.dot(signs, change)) for signs in product((1, -1), repeat=9)]
    assert sign_flips(change) == pytest.approx(np.mean([s >= abs(change.sum()) - 1e-9 for s in sums]))


def test_sampled_flips_know_a_real_difference_and_repeat_themselves():
    draw = np.random.default_rng(1)
    noise = draw.normal(size=200)
    assert sign_flips(noise + 1, 2000) < 0.01
    assert sign_flips(noise - noise.mean() + 1e-9, 2000) > 0.9
    assert sign_flips(noise, 2000) == sign_flips(noise, 2000)
    assert sign_flips(np.zeros(5)) == 1


def test_won_and_lost_are_listed(tmp_path, capsys):
    a = write(tmp_path / "a", [0, 0, 1, 1, 0])
    b = write(tmp_path / "b", [1, 1, 0, 1, 0])
    write(a, [0.25, 0.5, 0.5], task="bleu", metric="score")
    write(b, [0.5, 0.75, 0.5], task="bleu", metric="score")
    arc, bleu = compare(a, b)
    assert (arc.won, arc.lost) == (("arc/test/0", "arc/test/1"), ("arc/test/2",))
    assert (arc.test, arc.p, arc.n) == ("McNemar", mcnemar(2, 1), 5)
    assert (bleu.test, len(bleu.won), len(bleu.lost)) == ("sign flips", 2, 0)
    assert (arc.p_holm, bleu.p_holm) == tuple(holm([arc.p, bleu.p]))
    assert main([str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert "arc: acc, McNemar" in said
    assert "lost by B: arc/test/2" in said
    assert "+20.0" in said


def test_the_share_of_other_predictions_is_shown(tmp_path, capsys):
    """Two wrong answers can differ; of a program every sample counts; without predictions the scores are compared."""
    folders = [write(tmp_path / name, [0, 0, 1, 1, 0]) for name in "ab"]
    for folder, chosen in zip(folders, ("ABCDE", "AXCDX"), strict=True):
        said(folder, "arc", [{"prediction": letter} for letter in chosen])
    for folder, last in zip(folders, ("y", "z"), strict=True):
        write(folder, [0, 0], task="code", metric="pass@1")
        said(folder, "code", [{"prediction": "x", "samples": [{"reply": "x"}, {"reply": r}]} for r in ("y", last)])
    write(folders[0], [1, 0, 1], task="harness")
    write(folders[1], [1, 1, 1], task="harness")
    assert {pair.task: pair.differ for pair in compare(*folders)} == {
        "arc": 0.4, "code": 0.5, "harness": pytest.approx(1 / 3)
    }  # fmt: skip
    assert main([str(folder) for folder in folders]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    place = next(line for line in lines if line[:1] == ["task"]).index("differ")
    assert {line[0]: line[place] for line in lines if line[1:2] in (["5"], ["2"], ["3"])} == {
        "arc": "40.0", "code": "50.0", "harness": "33.3"
    }  # fmt: skip


def said(folder, task, answers):
    path = folder / "predictions" / f"{task}.jsonl"
    write_lines(path, [row | answer for row, answer in zip(read_lines(path), answers, strict=True)])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompts": "p2"}, "the prompts"),
        ({"data": {"test": "d2", "train": "t1"}}, "the scored data"),
        ({"protocol": {"name": "letters", "split": "test"}}, "protocol.name (loglikelihood and letters)"),
        ({"metric": "acc_norm"}, "metric (acc and acc_norm)"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_named(tmp_path, capsys, changes, named):
    a, b = write(tmp_path / "a", [0, 1]), write(tmp_path / "b", [0, 1], **changes)
    assert main([str(a), str(b)]) == 2
    assert named in capsys.readouterr().err


def test_rows_that_were_only_trained_on_may_differ(tmp_path):
    a, b = write(tmp_path / "a", [0, 1]), write(tmp_path / "b", [1, 1], data={"test": "d1", "train": "t2"})
    assert compare(a, b)[0].won == ("arc/test/0",)


def test_other_examples_and_missing_predictions_are_refused(tmp_path, capsys):
    a, b = write(tmp_path / "a", [0, 1]), write(tmp_path / "b", [0, 1])
    rows = [{"id": f"arc/test/{i}", "prompt": "another", "target": 0, "acc": 1.0} for i in range(2)]
    write_lines(b / "predictions" / "arc.jsonl", rows)
    assert main([str(a), str(b)]) == 2
    assert "arc/test/0" in capsys.readouterr().err
    write_lines(b / "predictions" / "arc.jsonl", rows[:1])
    assert main([str(a), str(b)]) == 3
    assert "has 1 predictions for 2" in capsys.readouterr().err
    assert main([str(a), str(tmp_path)]) == 2
    write_json(b / "results.json", {})
    assert main([str(a), str(b)]) == 2
    assert "no scored task in common" in capsys.readouterr().err


def test_all_pairs_of_equal_runs_show_no_difference(tmp_path):
    folders = [write(tmp_path / name, [0, 1, 1]) for name in "abc"]
    assert all(compare(a, b)[0].p == 1 for a, b in combinations(folders, 2))


def test_a_change_is_said_only_where_all_its_predictions_are_there(tmp_path):
    after = write(tmp_path, [1, 1, 1], stderr=0.1, majority=0.5)
    before = write(tmp_path / "before", [0, 1, 0], stderr=0.1, majority=0.5)

    def changes() -> set[str]:
        results = [read_json(folder / "results.json") for folder in (after, before)]
        return {cells(tmp_path, "arc", *(found["arc"] for found in results))[-1], mean_cells(tmp_path, *results)[-1]}

    assert changes() == {"+66.7 ± 33.3"}
    path = before / "predictions" / "arc.jsonl"
    write_lines(path, read_lines(path)[1:])
    assert changes() == {"–"}
    path.unlink()
    assert changes() == {"–"}


@pytest.mark.parametrize("folder", sorted((ROOT / "recipes" / "learning").glob("*/")), ids=lambda path: path.name)
def test_the_stated_learning_is_what_the_kept_predictions_say(folder):
    """The mean over the trained tasks before, after and changed; the change beyond two standard errors."""
    after, before = read_json(folder / "results.json"), read_json(folder / "before" / "results.json")
    _, n, _, base, mean, changed = mean_cells(folder, after, before)
    stated = (ROOT / "recipes" / "learning" / "README.md").read_text(encoding="utf-8")
    assert int(n) >= 7 * 200
    assert f"| {base} | {mean} | {changed} |" in stated
    change, error = map(float, changed.split(" ± "))
    assert change > 2 * error

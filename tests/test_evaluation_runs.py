"""Whole runs: scored again, by several processes, and inside lm-evaluation-harness, with the same scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixlora.records import read_json, read_lines

ROOT = Path(__file__).parents[1]
TINY = ROOT.parent / "shared" / "data" / "hub_tiny"
pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="needs ../shared/data/hub_tiny")
ARC = ("arc_easy", "arc_challenge")


def call(*arguments: str, status: int = 0, **environment: str) -> str:
    """Run a command of the project; its output."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of a mixture with gates on the tiny model; 13 examples a task, scored as the harness asks."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    call(
        "-m", "mixlora.train", "method=mole", "tasks=arc", "model=tiny", f"data.source={TINY}", "train.max_steps=2",
        "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1", "train.learning_rate=0.05",
        "eval.protocol=lm_eval", "eval.limit=13", "eval.before=false", f"run_dir={folder}",
        f"output_root={folder.parent}",
    )  # fmt: skip
    return folder


def evaluation(folder: Path) -> Path:
    (found,) = (folder / "evaluations").iterdir()
    return found


def test_a_run_that_is_scored_again_gives_the_same(run):
    call("-m", "mixlora.evaluate", f"run={run}")
    again = evaluation(run)
    for name in ARC:
        assert read_lines(again / "predictions" / f"{name}.jsonl") == read_lines(run / "predictions" / f"{name}.jsonl")
    assert read_json(again / "results.json") == read_json(run / "results.json")
    assert "McNemar" in call("-m", "mixlora.compare", str(run), str(again))


def test_two_processes_share_a_set_that_does_not_divide(run, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mixlora.evaluate")
    keys = (f"run={run}", "eval.limit=7", "eval.batch_size=3")
    alone, both = tmp_path / "alone", tmp_path / "both"
    for target, how in ((alone, ("-m", "mixlora.evaluate")), (both, launch)):
        (run / "evaluations").rename(tmp_path / f"old-{target.name}") if (run / "evaluations").is_dir() else None
        call(*how, *keys, ACCELERATE_USE_CPU="true")
        evaluation(run).rename(target)
        (run / "evaluations").rmdir()
    one, two = (read_json(folder / "results.json") for folder in (alone, both))
    assert [one[name]["n"] for name in ARC] == [two[name]["n"] for name in ARC] == [7, 7]
    for name in ARC:
        a, b = (read_lines(folder / "predictions" / f"{name}.jsonl") for folder in (alone, both))
        assert [row["id"] for row in a] == [row["id"] for row in b] == [f"{name}/test/{i}" for i in range(7)]
        assert [row["prediction"] for row in a] == [row["prediction"] for row in b]
        for left, right in zip(a, b, strict=True):
            assert left["log_likelihoods"] == pytest.approx(right["log_likelihoods"], abs=1e-4)


def test_the_harness_scores_a_run_as_we_do(run, tmp_path):
    """The harness's own command line on the run folder, with its ARC task over local rows."""
    pytest.importorskip("lm_eval")
    (tmp_path / "local.yaml").write_text(
        "task: local_arc\n"
        f"dataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {TINY}/allenai/ai2_arc/ARC-Easy/test.parquet}}}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        'doc_to_target: "{{choices.label.index(answerKey)}}"\ndoc_to_choice: "{{choices.text}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    call(
        "-m", "mixlora.lm_eval", "--model", "mixlora", "--model_args", f"run={run}", "--tasks", "local_arc",
        "--include_path", str(tmp_path), "--limit", "13", "--log_samples", "--output_path", str(tmp_path / "out"),
        "--device", "cpu", "--batch_size", "4", HF_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    (path,) = (tmp_path / "out").rglob("samples_local_arc*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    ours = read_lines(run / "predictions" / "arc_easy.jsonl")
    assert len(samples) == len(ours) == 13
    for sample, prediction in zip(samples, ours, strict=True):
        lls = [float(answer[0][0]) for answer in sample["resps"]]
        assert prediction["log_likelihoods"] == pytest.approx(lls, rel=1e-6, abs=1e-4)
        assert (prediction["acc"], prediction["acc_norm"]) == (sample["acc"], sample["acc_norm"])


def test_the_harness_as_a_backend_is_refused_where_it_cannot_work(run):
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    said = call("-m", "mixlora.evaluate", f"run={run}", "eval.backend=lm_eval", status=3, **nowhere)
    assert "eval.protocol=lm_eval" in said
    said = call("-m", "mixlora.evaluate", "model=tiny", "tasks=medqa", "eval.backend=lm_eval", status=2)
    assert "harness_task" in said

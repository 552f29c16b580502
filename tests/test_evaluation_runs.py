"""Whole runs: scored again, by several processes, and inside lm-evaluation-harness, with the same scores."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from mixlora import loading
from mixlora.config import load as configs
from mixlora.config.overrides import store_single_tasks
from mixlora.config.schema import Eval
from mixlora.errors import ConfigError, DataError, ResourceError
from mixlora.evaluation import protocols
from mixlora.evaluation.harness import Harness
from mixlora.experiment import Experiment
from mixlora.models import base
from mixlora.parts import Parts
from mixlora.records import owned, read_json, read_lines
from mixlora.reevaluation import reevaluate
from mixlora.scoring import Scoring
from mixlora.tables.paired import compare

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


def config_of(*overrides: str):
    store_single_tasks([])
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return configs.config_of(compose("train", overrides=["model=tiny", *overrides]))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of a mixture with gates on the tiny model; 13 examples a task, scored as the harness asks."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = config_of(
        "method=mole", "tasks=arc", f"data.source={TINY}", "train.max_steps=2", "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=1", "train.learning_rate=0.05", "eval.protocol=lm_eval", "eval.limit=13",
        "eval.before=false", "report=false", f"run_dir={folder}", f"output_root={folder.parent}",
    )  # fmt: skip
    Experiment(config, "test").run()
    return folder


def score_again(run: Path, **changes) -> Path:
    config = configs.config_of(configs.read(run))
    config.eval = replace(config.eval, **changes)
    return reevaluate(config, str(run))


def test_a_run_that_is_scored_again_gives_the_same(run):
    again = score_again(run)
    for name in ARC:
        assert read_lines(again / "predictions" / f"{name}.jsonl") == read_lines(run / "predictions" / f"{name}.jsonl")
    assert read_json(again / "results.json") == read_json(run / "results.json")
    assert all(pair.p == 1 and not pair.won and not pair.lost for pair in compare(run, again))


def test_two_processes_do_not_score_into_one_folder(run):
    folder = score_again(run, limit=2)
    before = (folder / "results.json").read_bytes()
    with owned(folder), pytest.raises(ConfigError, match=r"in use by another run.*set run_dir to another folder"):
        score_again(run, limit=2)
    assert (folder / "results.json").read_bytes() == before


def test_the_base_model_is_scored_once_for_all_seeds_of_a_sweep(run):
    """A seed is of training; of scores only where answers are drawn."""
    config = configs.config_of(configs.read(run))
    loaded = base.load(config.model).known()

    def digest(**changes) -> str:
        eval_changes = {key: changes.pop(key) for key in ("temperature",) if key in changes}
        changed = replace(config, eval=replace(config.eval, **eval_changes), **changes)
        return Scoring(Parts(changed), loaded).protocol_digest()

    assert digest(seed=0) == digest(seed=1)
    assert digest(seed=0, temperature=0.8) != digest(seed=1, temperature=0.8)


def test_solved_examples_and_protocols_reach_the_results(run):
    found = read_json(score_again(run, num_fewshot=2, max_length=400, limit=4) / "results.json")["arc_easy"]
    assert found["protocol"]["name"] == "lm_eval"
    assert found["protocol"]["num_fewshot"] == len(found["protocol"]["shots"]) == 2
    assert all(shot.startswith("arc_easy/train/") for shot in found["protocol"]["shots"])
    assert found["cut"]["shots"] > 0
    assert (found["n"], found["limit"]) == (4, 4)
    assert found["prompts"] != read_json(run / "results.json")["arc_easy"]["prompts"]


def test_memory_that_is_out_has_its_remedy_and_status_where_a_run_is_scored_again(run, monkeypatch):
    monkeypatch.setattr("mixlora.failpoints.seen", Counter())
    monkeypatch.setenv("MIXLORA_FAIL", "evaluate.task:oom")
    with pytest.raises(ResourceError, match=r"less than eval\.batch_size") as raised:
        score_again(run, limit=3)
    assert raised.value.status == 5


@pytest.mark.full
def test_two_processes_share_a_set_that_does_not_divide(run):
    alone = score_again(run, limit=7, batch_size=3)
    call(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mixlora.evaluate", f"run={run}",
        "eval.limit=7", "eval.batch_size=4", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    (both,) = (
        folder
        for folder in (run / "evaluations").iterdir()
        if read_json(folder / "results.json")["arc_easy"]["n"] == 7 and folder != alone
    )
    one, two = (read_json(folder / "results.json") for folder in (alone, both))
    assert [one[name]["n"] for name in ARC] == [two[name]["n"] for name in ARC] == [7, 7]
    for name in ARC:
        a, b = (read_lines(folder / "predictions" / f"{name}.jsonl") for folder in (alone, both))
        assert [row["id"] for row in a] == [row["id"] for row in b] == [f"{name}/test/{i}" for i in range(7)]
        assert [row["prediction"] for row in a] == [row["prediction"] for row in b]
        for left, right in zip(a, b, strict=True):
            assert left["log_likelihoods"] == pytest.approx(right["log_likelihoods"], abs=1e-4)


@pytest.fixture
def local_arc(tmp_path) -> Path:
    """A folder with the harness's ARC task over local rows."""
    path = TINY / "allenai/ai2_arc/ARC-Easy/test.parquet"
    (tmp_path / "local.yaml").write_text(
        f"task: local_arc\ndataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {path}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        'doc_to_target: "{{choices.label.index(answerKey)}}"\ndoc_to_choice: "{{choices.text}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return tmp_path


@pytest.mark.full
def test_the_harness_scores_a_run_as_we_do(run, local_arc):
    """The harness's own command line on the run folder."""
    pytest.importorskip("lm_eval")
    out = local_arc / "out"
    call(
        "-m", "mixlora.lm_eval", "--model", "mixlora", "--model_args", f"run={run}", "--tasks", "local_arc",
        "--include_path", str(local_arc), "--limit", "13", "--log_samples", "--output_path", str(out),
        "--device", "cpu", "--batch_size", "4", HF_HOME=str(local_arc / "cache"),
    )  # fmt: skip
    (path,) = out.rglob("samples_local_arc*.jsonl")
    same_as_ours(run, [json.loads(line) for line in path.read_text().splitlines()])


def test_the_harness_as_a_backend_scores_as_we_do(run, local_arc, monkeypatch):
    """`eval.backend=lm_eval` on a trained mixture, its hub replaced by local rows."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(local_arc), include_defaults=False)
    evaluate = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **keys: evaluate(**keys, task_manager=manager))
    monkeypatch.setattr("mixlora.evaluation.harness.harness_task", lambda task: "local_arc")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = loading.load(run)
    harness = Harness(loaded.model, loaded.tokenizer, Eval(limit=13))
    task = configs.config_of(configs.read(run)).tasks.mixture["arc_easy"]
    theirs = harness(task, (), "")
    ours = read_lines(run / "predictions" / "arc_easy.jsonl")
    assert len(theirs) == len(ours) == 13
    for one, other in zip(theirs, ours, strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], rel=1e-6, abs=1e-4)
        assert [one[key] for key in ("target", "acc", "acc_norm")] == [other[k] for k in ("target", "acc", "acc_norm")]


def same_as_ours(run: Path, samples: list[dict]) -> None:
    ours = read_lines(run / "predictions" / "arc_easy.jsonl")
    assert len(samples) == len(ours) == 13
    for sample, prediction in zip(sorted(samples, key=lambda s: s["doc_id"]), ours, strict=True):
        lls = [float(answer[0][0]) for answer in sample["resps"]]
        assert prediction["log_likelihoods"] == pytest.approx(lls, rel=1e-6, abs=1e-4)
        assert (prediction["acc"], prediction["acc_norm"]) == (sample["acc"], sample["acc_norm"])


def test_the_harness_as_a_backend_is_refused_where_it_cannot_work(monkeypatch):
    config = config_of("method=lora", "tasks=medqa", "eval.backend=lm_eval")
    with pytest.raises(ConfigError, match="harness_task"):
        protocols.check(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*lm_eval.*eval\.protocol=lm_eval"):
        protocols.check(config)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot be reached.*eval\.protocol=lm_eval"):
        Harness(None, None, Eval())(config.tasks.mixture["medqa"], (), "")

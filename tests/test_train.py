"""The main job end to end on the tiny model and the embedded sample: train, look, load, talk, export, score again."""

import contextlib
import errno
import io
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import tiny_runs
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import mixlora
from mixlora import evaluate, export, generate, loading, train
from mixlora.config import load
from mixlora.evaluation import generation
from mixlora.models import base
from mixlora.records import attempt_path, read_lines, write_json
from mixlora.tasks.example import Example
from mixlora.training.loop import Trainer

SMALL = ("model=tiny", "data.source=sample", "train.max_steps=3", "eval.limit=6", "train.max_length=256")
FILES = {"config.yaml", "run.json", "metrics.jsonl", "results.json", "routing.json"}


def run(door, *argv: str) -> str:
    """What a door prints."""
    before, out = sys.argv, io.StringIO()
    sys.argv = ["mixlora", *argv]
    GlobalHydra.instance().clear()
    try:
        with contextlib.redirect_stdout(out):
            door.main()
    finally:
        sys.argv = before
    return out.getvalue()


def trained(folder: Path, method: str, *more: str) -> Path:
    run(train, f"+method={method}", "+tasks=arc", *SMALL, *more, f"run_dir={folder}")
    return folder


def test_a_rehearsal_steps_as_a_run_does(monkeypatch):
    """In evaluation mode nothing would be dropped, nor computed twice to save memory."""
    modes, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, *given: modes.append(self.model.training) or step(self, *given))
    told = run(train, "+method=lora", "+tasks=arc", *SMALL, "dry_run=true", "method.r=[8,8,8,8,4]")
    assert modes == [True]
    assert "method.r has more entries than the model layers: no layer gets [4]" in " ".join(told.split())


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "lora", "lora")


@pytest.fixture(scope="module")
def smora(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "smora", "smora")


@pytest.fixture(params=["lora", "smora"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


def test_a_run_folder_holds_what_the_contract_says(folder):
    assert {path.name for path in folder.iterdir()} >= FILES
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    method = load.config_of(load.read(folder)).method.name
    assert record["overrides"] == [f"method={method}", "tasks=arc", *SMALL, f"run_dir={folder}"]
    for place, also in (("before", {None}), ("", {0})):  # a base model's scores are shared with runs on other rows
        scores = json.loads((folder / place / "results.json").read_text())
        assert {found.get("also_trained_on") for found in scores.values()} == also
    assert len(record["weights_sha256"]) == 64
    assert record["parameters"]["activated"] <= record["parameters"]["trainable"]
    assert (record["packed"], record["chunked_head"], record["torch_compile"]) == (True, True, False)
    assert set(record["computed"]) == {"fused"}
    routing, gated = json.loads((folder / "routing.json").read_text()), folder.name == "smora"
    assert set(routing["least_experts"].values()) == ({8} if gated else set())
    assert set(routing["loads"]) == ({"arc_easy", "arc_challenge"} if gated else set())
    assert all(set(of) == set(routing["least_experts"]) for of in routing["loads"].values())
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
    for place in (folder, folder / "before"):
        results = json.loads((place / "results.json").read_text())
        for task in ("arc_easy", "arc_challenge"):
            found = results[task]
            predictions = [
                json.loads(line) for line in (place / "predictions" / f"{task}.jsonl").read_text().splitlines()
            ]
            assert found["n"] == len(predictions) == 6
            assert all(p["correct"] == p[found["metric"]] for p in predictions)
            assert found["value"] == sum(p[found["metric"]] for p in predictions) / 6
            assert found["interval"][0] <= found["value"] <= found["interval"][1]
            assert found["fingerprints"] == {"data": found["data"], "prompts": found["prompts"]}
            assert found["data"]
    assert not list(folder.rglob("*.tmp*"))


def test_a_mixture_says_what_each_task_gave(tmp_path):
    """Of four tasks one is only trained on, one only scored, which is left out without leave to run its code, and one
    scored on what it is trained on."""
    short = ("eval.limit=2", "eval.before=false", "tasks.mixture.gsm8k.max_new_tokens=2")
    short += ("tasks.mixture.gsm8k.splits.test=train", "data.overlap=note")
    said = run(train, "+method=lora", "+tasks=math_code_med", *SMALL, *short, f"run_dir={tmp_path}")
    assert "rows from 3 of 4 tasks:" in said
    record = json.loads((tmp_path / "run.json").read_text())
    assert set(record["tokens_by_task"]) == set(record["rows"]) == {"gsm8k", "medqa", "mbpp"}
    assert sum(record["tokens_by_task"].values()) == record["tokens"]
    assert all(record["tokens_by_task"][name] > n for name, n in record["label_tokens"].items())
    after = said.partition("Trained on:")[2]
    for name, tokens in record["tokens_by_task"].items():
        line = next(line for line in after.splitlines() if line.split()[:1] == [name])
        assert line.split()[1:5] == [f"{record['rows'][name]:,}", "rows,", f"{tokens:,}", "tokens,"]
        assert line.endswith(f"{record['passes'][name]:.2f} passes")
    results = json.loads((tmp_path / "results.json").read_text())
    for found in results.values():
        assert {"metric", "value", "stderr", "n", "protocol", "fingerprints"} <= set(found)
    assert results["humaneval"]["value"] is None
    assert {name: found.get("also_trained_on") for name, found in results.items()} == {
        "gsm8k": 2,
        "medqa": 0,
        "humaneval": None,
    }
    assert "gsm8k: 2 of 2 rows were also trained on" in after


def test_what_could_not_be_done_the_quick_way_is_said_and_recorded(lora, tmp_path, monkeypatch):
    monkeypatch.setattr("mixlora.training.loop.packs_rows", lambda model: False)
    monkeypatch.setattr("mixlora.models.likelihood.plain_head", lambda model: None)
    said = run(train, "+method=lora", "+tasks=arc", *SMALL, "eval.before=false", f"run_dir={tmp_path}")
    assert len([line for line in said.splitlines() if "train.packing=true has no effect" in line]) == 1
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["packed"], record["chunked_head"]) == (False, False)
    slow, quick = ([line["loss"] for line in read_lines(place / "metrics.jsonl")] for place in (tmp_path, lora))
    assert slow == pytest.approx(quick, rel=1e-4)


def test_a_run_that_failed_says_so_and_one_that_goes_on_keeps_its_commits(tmp_path, monkeypatch, capsys):
    commits, asked = iter("abc"), []
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + 5000 * len(asked)
    )  # asking takes long, as reading data may

    def git_state(file):
        asked.append({"git_commit": next(commits), "git_dirty": not asked})
        return dict(asked[-1])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mixlora.provenance.git_state", git_state)
    for module in ("experiment", "training.spent"):
        monkeypatch.setattr(f"mixlora.{module}.time", clock)
    argv = ("+method=lora", "+tasks=arc", *SMALL, "eval.before=false", f"run_dir={tmp_path}")
    with monkeypatch.context() as patched:
        patched.setattr("mixlora.experiment.files.save", full)
        with pytest.raises(SystemExit) as stopped:
            run(train, *argv)
    assert stopped.value.code == 5
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["exit_status"]) == ("failed", 5)
    assert record["message"] in capsys.readouterr().err
    write_json(attempt_path(tmp_path), {"status": 5, "message": "of a sweep that started it"})
    run(train, *argv)
    assert not attempt_path(tmp_path).exists()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "finished"
    assert "message" not in record
    assert [record["git_commit"], record["git_dirty"]] == ["b", True]
    assert record["earlier_commits"] == asked[:1]
    assert 10000 < record["seconds"] < 10600  # of both
    assert len(asked) == 2  # once a process: what is committed during a run does not change what it is made of


def test_a_finished_run_is_shown_and_not_run_again(folder, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda *_: pytest.fail("nothing is there to track"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    method = load.config_of(load.read(folder)).method.name
    said = run(train, f"+method={method}", "+tasks=arc", *SMALL, f"run_dir={folder}", "tracker=tensorboard")
    assert "finished" in said
    assert "arc_easy" in said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_training_changed_the_model_that_load_gives_back(folder):
    untouched = base.load(load.config_of(load.read(folder)).model).model
    assert not torch.equal(logits(mixlora.load(folder)), logits(untouched))


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.full), "smora"])
def test_a_run_answers_as_its_trained_model_does_alone(tmp_path, monkeypatch, method):
    """At a rate at which three steps turn a model of random weights round; each line of standard input by itself."""
    folder = trained(tmp_path, method, "train.learning_rate=0.03", "train.warmup_ratio=0", "eval.before=false")
    config = load.config_of(load.read(folder))
    untouched, tokenizer = base.load(config.model), loading.tokenizer(folder)
    formatter = loading.formatter(folder, tokenizer)

    def answer(model, question: str) -> str:
        prompt = formatter.prompt(Example(id="0", task="prompt", question=question, answer=""), max_length=200).ids
        (text,) = generation.generate(
            model, tokenizer, [prompt], max_new_tokens=6, batch_size=1, ends=formatter.end_ids
        )
        return text.strip()

    said = run(generate, f"run={folder}", "prompt=Why is it so?", "max_new_tokens=6")
    assert said == answer(mixlora.load(folder), "Why is it so?") + "\n"
    assert said != answer(untouched.model, "Why is it so?") + "\n"
    lines = ["Why is it so?", "How?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    said = run(generate, f"run={folder}", "max_new_tokens=6")
    assert said == "".join(answer(mixlora.load(folder), line) + "\n" for line in lines)


def test_a_run_is_scored_again_to_the_same_results(folder):
    run(evaluate, f"run={folder}")
    (again,) = (folder / "evaluations").iterdir()
    first, second = (json.loads((place / "results.json").read_text()) for place in (folder, again))
    assert {name: found["value"] for name, found in first.items()} == {n: found["value"] for n, found in second.items()}
    for name in first:
        path = Path("predictions") / f"{name}.jsonl"
        assert (folder / path).read_bytes() == (again / path).read_bytes()


def test_plain_lora_is_a_peft_folder_and_merges(lora, tmp_path):
    model = base.load(load.config_of(load.read(lora)).model).model
    run(export, f"run={lora}", f"to={tmp_path / 'peft'}")
    expected = logits(mixlora.load(lora))
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(model, tmp_path / "peft")), expected)
    assert torch.equal(logits(mixlora.load(tmp_path / "peft")), expected)
    run(export, f"run={lora}", f"to={tmp_path / 'merged'}", "merge=true")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == loading.formatter(lora, tokenizer).end_ids


@pytest.mark.parametrize("merge", ["true", "false"])
def test_an_export_that_is_told_to_stop_leaves_nothing(lora, tmp_path, monkeypatch, capsys, merge):
    save = LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(
        LlamaForCausalLM, "save_pretrained", lambda *given: (save(*given), signal.raise_signal(signal.SIGTERM))
    )
    monkeypatch.setattr("mixlora.failpoints.seen", Counter())
    if merge == "false":
        monkeypatch.setenv("MIXLORA_FAIL", "write:term")
    with pytest.raises(SystemExit) as stopped:
        run(export, f"run={lora}", f"to={tmp_path / 'out'}", f"merge={merge}")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("merge", ["true", "false"])
def test_a_gate_cannot_be_exported_and_says_so(smora, tmp_path, merge, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(export, f"run={smora}", f"to={tmp_path / 'out'}", f"merge={merge}")
    assert stopped.value.code == 2
    assert "gate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_the_same_configuration_twice_gives_the_same_bytes(smora, tmp_path, monkeypatch):
    """Accelerate would divide the loss by a number that `accelerate config` may have left in the environment."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    again = trained(tmp_path / "again", "smora")
    for name in ("adapter/adapter_model.safetensors", "results.json", "routing.json", "predictions/arc_easy.jsonl"):
        assert (again / name).read_bytes() == (smora / name).read_bytes()
    norms = ([line["grad_norm"] for line in read_lines(place / "metrics.jsonl")] for place in (smora, again))
    assert next(norms) == next(norms)


@pytest.mark.full
@pytest.mark.parametrize(("tracker", "left"), [("wandb", "wandb/offline-run-*"), ("tensorboard", "**/events.out.*")])
def test_a_tracker_writes_into_the_run_folder_without_a_network(tmp_path, tracker, left):
    """Metrics stand in metrics.jsonl all the same."""
    configs, said = tiny_runs.task_folder(tmp_path / "own"), ("method=lora", f"tracker={tracker}")
    done = tiny_runs.train(configs, tmp_path / "run", *said, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").glob(left))
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 6


@pytest.mark.full
def test_a_run_that_goes_on_is_the_same_run_to_its_tracker(tmp_path):
    configs, said = tiny_runs.task_folder(tmp_path / "own"), ("method=lora", "tracker=wandb")
    for fail in ("step.forward@8:term", ""):
        tiny_runs.train(
            configs, tmp_path / "run", *said, WANDB_MODE="offline", **({"MIXLORA_FAIL": fail} if fail else {})
        )
    ids = [path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(ids) == 2
    assert len({*ids}) == 1

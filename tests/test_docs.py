"""What the pages say can be typed is composed, and their files are read."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM

from mixlora import tasks
from mixlora.config import load
from mixlora.config.overrides import MULTIRUN, config_dir, normalise, parsed, store_single_tasks
from mixlora.config.schema import Options, Task
from mixlora.models.tokenizer import byte_tokenizer
from mixlora.tables import recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md"]
COMMAND = re.compile(r"^    .*-m mixlora\.(\w+) (.*)$", flags=re.MULTILINE)
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]+$|…|^my")  # what a reader puts in
ROWS = [{"question": f"What is {i}?", "choices": ["ice", f"stone {i}"], "label": i % 2} for i in range(40)]


def commands(door: str) -> list[str]:
    """The arguments of every command of a page that is whole."""
    found = [line for page in PAGES for name, line in COMMAND.findall(page.read_text(encoding="utf-8")) if name == door]
    return [line for line in found if not any(map(PLACEHOLDER.search, re.split(r"[= ]", line)))]


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def composed(*arguments: str, folder: Path | None = None):
    store_single_tasks([] if folder is None else [f"--config-dir={folder}"])
    search = [] if folder is None else [f"hydra.searchpath=[file://{folder}]"]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return load.config_of(compose("train", overrides=[*normalise(arguments), *search]))


def first_point(argument: str) -> str:
    override = parsed(argument)
    assert override is not None, argument
    return (
        f"{override.get_key_element()}={argument.partition('=')[2].split(',')[0]}"
        if override.is_sweep_override()
        else argument
    )


@pytest.mark.parametrize("line", commands("train"))
def test_a_command_to_train_is_composed(line):
    arguments = shlex.split(line, comments=True)
    assert composed(*(first_point(one) for one in arguments if one not in MULTIRUN)).method.name


@pytest.mark.parametrize("door", ["reproduce", "table"])
def test_a_recipe_that_a_command_names_is_there(door):
    lines = commands(door)
    assert lines
    for line in lines:
        (name,) = re.findall(r"\brecipe=(\w+)", line)
        assert recipe.find(name).is_dir()


def test_pages_have_commands_to_train():
    assert len(commands("train")) > 10


@pytest.mark.parametrize("page", ["README.md", "docs/tasks.md"])
def test_a_file_of_ones_own_becomes_a_task(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("chats.csv").write_text("prompt,reply\n" + "".join(f"Say {i},{i}\n" for i in range(40)))
    texts = [text for text in blocks(page, "yaml") if "path:" in text]
    assert texts
    for text in texts:
        name = yaml.safe_load(text)["name"]
        path = tmp_path / "my" / "task" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        config = composed("+method=lora", f"+tasks={name}", folder=tmp_path / "my")
        data = tasks.load(config.tasks, config.data)[name]
        assert (len(data.train), len(data.validation), len(data.test)) == (35, 1, 4)
        assert data.train[0].answer in (*ROWS[0]["choices"], *ROWS[1]["choices"], *(str(i) for i in range(40)))


def test_a_mixture_of_ones_own_is_composed(tmp_path):
    (mixture,) = [text for text in blocks("docs/tasks.md", "yaml") if "defaults:" in text]
    task = next(text for text in blocks("docs/tasks.md", "yaml") if "name: mine" in text)
    for group, name, text in (("task", "mine", task), ("tasks", "ours", mixture)):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    found = composed("+method=lora", "+tasks=ours", folder=tmp_path).tasks
    assert {name: task.weight for name, task in found.mixture.items()} == {"arc_easy": 1.0, "mine": 2.0}


def test_an_adapter_is_attached_to_ones_own_model_trained_saved_and_loaded(tmp_path, monkeypatch):
    """The code of the page, block after block, with folders that are there."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained("base")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained("base")
    first, adapted, trained, saved = blocks("docs/python.md", "python")
    names = {"model": LlamaForCausalLM.from_pretrained("base")}
    exec(adapted, names)
    before = {name: tensor.clone() for name, tensor in names["adapter"].items()}
    assert {name.rpartition(".")[2] for name in before} == {"A_RD", "B_RO", "weight", "bias_E"}
    names["optimizer"] = torch.optim.AdamW([t for t in names["adapter"].values() if t.requires_grad])
    names["batches"] = [tokenizer(["Why?", "Because."], padding=True, return_tensors="pt") for _ in range(2)]
    for batch in names["batches"]:
        batch["labels"] = batch["input_ids"]
    exec(trained, names)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in names["adapter"].items())
    exec(saved.replace("OWNER/NAME", "base"), names)
    (run,) = set(re.findall(r'"(runs/[^"]+)"', first))
    read: dict[str, Any] = {}
    exec(first.replace(run, "mine"), read)
    ids = names["batches"][0]["input_ids"]
    assert torch.equal(read["model"](ids).logits, names["model"].eval()(ids).logits)


def test_every_key_of_a_task_stands_on_its_page():
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    keys = {*Task.__dataclass_fields__} - {"options"} | {f"options.{key}" for key in Options.__dataclass_fields__}
    assert not {key for key in keys if f"`{key}`" not in text}

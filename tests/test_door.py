"""The front door: a mistake is one message with its remedy and an exit status, before anything is loaded or written."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import GPT2Config, GPT2LMHeadModel

from mixlora import evaluate, export, generate, report, reproduce, routing, table, train
from mixlora.config import cli, doors, load
from mixlora.config.explain import leaves
from mixlora.config.overrides import config_dir, normalise, parsed, spelled
from mixlora.config.typed import typed
from mixlora.errors import ConfigError
from mixlora.models.tokenizer import byte_tokenizer

ARC = ("+tasks=arc", "data.source=sample", "model=tiny")


@pytest.fixture
def told(monkeypatch, tmp_path, capsys):
    """Run a door in an empty folder -> (exit status, what it wrote to standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(door, *argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mixlora", *argv])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stopped:
            door.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


MISTAKES = [
    (("tasks=arc",), "Choose a method: method=NAME", "smora"),
    (("+method=smora",), "Choose a task or mixture: tasks=NAME", "commonsense"),
    (("+method=smorra", *ARC), "no method 'smorra'", "Did you mean 'smora'?"),
    (("+method=smora", "+tasks=comonsense"), "no task or mixture 'comonsense'", "Did you mean 'commonsense'?"),
    (("+method=smora", *ARC, "model=tinny"), "no model 'tinny'", "Did you mean 'tiny'?"),
    (("+method=smora", *ARC, "aux_loss=tsalis"), "no aux_loss 'tsalis'", "Did you mean 'tsallis'?"),
    (("+method=smora", *ARC, "train.lr=1"), "no key 'train.lr'", "Did you mean 'train.learning_rate'?"),
    (("+method=smora", *ARC, "train.max_stepps=1"), "train.max_stepps", "Did you mean 'train.max_steps'?"),
    (("+method=smora", *ARC, "+trane.max_steps=1"), "no key 'trane'", "Did you mean 'train'?"),
    (("+method=smora", *ARC, "++method.num_expert=2"), "method.num_expert'", "Did you mean 'num_experts'?"),
    (("+method=smora", *ARC, "+method.compute=eager"), "'method.compute' is there already", "Write method.compute="),
    (("+method=smora", *ARC, "train.max_steps=many"), "train.max_steps", "'many'"),
    (("+method=smora", *ARC, "train.max_steps=0"), "train.max_steps must be at least 1", "got 0"),
    (("+method=smora", *ARC, "train.learning_rate=-1"), "train.learning_rate must be a positive number", "-1"),
    (("+method=smora", *ARC, "train.max_steps=1", "train.epochs=1"), "both set", "choose one"),
    (("+method=smora", *ARC, "method.top_k=65"), "method.top_k=65 is above method.num_experts=64", "Lower top_k"),
    (("+method=smora", *ARC, "method.r=eight"), "method.r", "'eight'"),
    (("+method=lora", *ARC, "method.num_experts=4"), "method.num_experts=4 needs a gate", "method.gate.kind"),
    (("+method=mole", *ARC, "method.gate.kind=topp"), "method.gate.kind='topp'", "Did you mean 'topk'?"),
    (("+method=mole", *ARC, "+method.gate.renorm=1"), "no key 'method.gate.renorm'", "Did you mean 'renormalize'?"),
    (("+method=mole", *ARC, "+aux_loss.load_balance.coeff=1"), "aux_loss.load_balance.coeff", "'coef'"),
    (("+method=lora", *ARC, "launcher=slurm"), "launcher is for a sweep", "-m"),
    (("+method=lora", *ARC, "jobs=2"), "jobs is for a sweep", "-m"),
    (("+method=lora", *ARC, "-m", "slurm.time_min=2"), "slurm.signal_delay_s=120 leaves nothing", "Lower the one"),
    (("+method=lora", *ARC, "-m", "jobs=0"), "jobs must be at least 1", "got 0"),
    (("+method=lora", *ARC, "sweep=learning_rates"), "no sweep 'learning_rates'", "Did you mean 'learning_rate'?"),
    (("+method=lora", *ARC, "model.path=./nothing"), "model.path=./nothing", "no such folder"),
    (("+method=lora", *ARC, "tasks.mixture.arc_easy.nam=1"), "nam", "name"),
    (("+method=mixlora", *ARC, "method.gate.renormalize=false"), "scale the block", "method.gate.renormalize=true"),
    (("+method=mole", *ARC, "method.top_k=8"), "aux_loss.load_balance would be the same", "share=soft"),
    (("+method=mola", *ARC, "method.num_experts=[2,2]"), "aux_loss.load_balance would be the same", "share=soft"),
    (
        ("+method=mola", *ARC, "method.num_experts=[2,4]", "method.top_k=[2,2,4,4]"),
        "aux_loss.load_balance would be the same",
        "share=soft",
    ),
    (("+method=hydralora", *ARC, "aux_loss=load_balance"), "aux_loss.load_balance would be the same", "share=soft"),
    (("+method=lora", *ARC, "train.packing=false", "train.max_tokens=600"), "train.max_tokens=600", "Set it to null"),
    (("+method=mole", *ARC, "aux_loss=[load_balanc]"), "no aux_loss 'load_balanc'", "Did you mean 'load_balance'?"),
    (("+method=lora", "tasks=[boolq,arc_eazy]"), "no task or mixture 'arc_eazy'", "Did you mean 'arc_easy'?"),
    (("+method=lora", *ARC, "one"), "'one' is not of the form key=value", "train.max_steps=100"),
    (
        ("+method=lora", *ARC, f"run_dir={__file__}"),
        f"{__file__} is a file, not a folder",
        "Set output_root or run_dir",
    ),
    (("+method=lora", *ARC, f"output_root={__file__}/x"), f"{__file__} is a file, not a folder", "Set output_root"),
    (("+method=lora", *ARC, "eval.limit=0"), "eval.limit must be at least 1", "got 0"),
    (("+method=lora", *ARC, "train.weight_decay=inf"), "train.weight_decay must be at least 0", "got inf"),
]


@pytest.mark.parametrize(("argv", "what", "remedy"), MISTAKES, ids=[" ".join(argv) for argv, _, _ in MISTAKES])
def test_a_mistake_in_the_configuration_is_one_message_and_status_2(told, argv, what, remedy):
    status, message = told(train, *argv)
    assert status == 2
    assert what in message
    assert remedy in message
    assert "Traceback" not in message
    assert message.startswith("mixlora: ")
    assert len(message.strip().splitlines()) == 1
    assert list(Path().iterdir()) == []


SMALL_DOORS = {
    doors.Export: (export, ("run=.", "to=out")),
    doors.Generate: (generate, ("run=.", "prompt=hello")),
    doors.Report: (report, ("run=.",)),
    doors.Reproduce: (reproduce, ("recipe=smora",)),
    doors.Routing: (routing, ("run=.",)),
    doors.Table: (table, ("recipe=smora",)),
}
SMALL_MISTAKES = [
    (generate, ("run=.", "promt=hi"), "no key 'promt'", "Did you mean 'prompt'?"),
    (generate, ("run=.", "prompt=hi", "max_new_tokens=abc"), "max_new_tokens", "'abc'"),
    (generate, ("run=.", "prompt=hi", "model=tiny"), "no key 'model'", "Known: model.dtype, model.path"),
    (export, ("run=.", "to=out", "model.dtype=bf16"), "model.dtype", "bfloat16"),
    (generate, ("run=.", "prompt=hi", "max_new_tokens=0"), "max_new_tokens must be at least 1", "got 0"),
    (generate, ("run=.", "prompt=hi", "temperature=-1"), "temperature must be at least 0", "got -1"),
    (generate, ("run=nowhere", "prompt=hi"), "run=nowhere", "Give the run folder"),
    (generate, ("run=", "prompt=hi"), "run=: there is no such folder", "Give the run folder"),
    (evaluate, ("run=nowhere",), "run=nowhere", "Give the run folder"),
    (evaluate, ("run=",), "run=: there is no such folder", "Give the run folder"),
    (export, ("run=.", "to=out", "merge=flase"), "merge", "'flase'"),
    (table, ("recipe=smora", "formt=md"), "no key 'formt'", "Did you mean 'format'?"),
    (table, ("recipe=smora", "format=mdd"), "format", "expected one of [md, tex, csv, html"),
    (table, ("recipe=smora", "plots=gif"), "plots", "expected one of [png, pdf]"),
    (routing, ("run=.", "plot=png"), "no key 'plot'", "Did you mean 'plots'?"),
    (routing, ("run=.", "plots=jpg"), "plots", "expected one of [png, pdf]"),
    (reproduce, ("recipe=smora", "tflops=0"), "tflops must be above 0", "got 0"),
    (reproduce, ("recipe=smora", "job=2"), "no key 'job'", "Did you mean 'jobs'?"),
    (reproduce, ("recipe=smora", "format=pins"), "format=pins", "mixlora.table"),
    (evaluate, ("rn=x",), "no key 'rn'", "Did you mean 'run'?"),
]


@pytest.mark.parametrize(
    ("door", "argv", "what", "remedy"), SMALL_MISTAKES, ids=[" ".join(m[1]) for m in SMALL_MISTAKES]
)
def test_each_door_knows_its_own_keys_and_their_types(told, door, argv, what, remedy):
    status, message = told(door, *argv)
    assert status == 2
    assert what in message
    assert remedy in message
    assert len(message.strip().splitlines()) == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("record", SMALL_DOORS, ids=lambda record: record.__name__)
def test_what_a_door_needs_and_was_not_given_is_named(told, record):
    door, needed = SMALL_DOORS[record]
    for left_out in needed:
        key = left_out.partition("=")[0]
        if key == "prompt":  # lines on standard input will do
            continue
        status, message = told(door, *(one for one in needed if one != left_out))
        assert (status, message) == (2, f"mixlora: {key} has no value. Give it one: {key}=...\n")


@pytest.mark.parametrize("record", SMALL_DOORS, ids=lambda record: record.__name__)
def test_the_file_of_a_door_shows_every_key_and_its_default(record):
    folder = Path(config_dir())
    shown = yaml.safe_load((folder / f"{record.__name__.lower()}.yaml").read_text(encoding="utf-8"))
    if "launch" in shown["defaults"]:
        shown |= yaml.safe_load((folder / "launch.yaml").read_text(encoding="utf-8"))
    needed = {one.partition("=")[0] for one in SMALL_DOORS[record][1]} - {"prompt"}
    defaults = load.plain(record(**dict.fromkeys(needed, "???")))
    assert {key: shown[key] for key in shown if key not in ("defaults", "hydra")} == defaults
    assert {key.partition(".")[0] for key in leaves(record)} == set(defaults)


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_autocast_is_refused_with_the_key_to_use_instead(told, monkeypatch, asked):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    status, message = told(train, "+method=smora", *ARC)
    assert status == 2
    assert f"mixed_precision={asked}" in message
    assert "Set model.dtype=" in message
    assert len(message.strip().splitlines()) == 1
    assert list(Path().iterdir()) == []


def test_a_compiler_set_by_accelerate_is_refused_with_the_key_to_use_instead(told, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    status, message = told(train, "+method=smora", *ARC)
    assert status == 2
    assert "dynamo_backend=inductor" in message
    assert "train.torch_compile=true" in message
    assert list(Path().iterdir()) == []


def test_a_loss_of_routers_without_routers_is_refused(told):
    status, message = told(train, "+method=lora", "aux_loss=load_balance", *ARC)
    assert status == 2
    assert "aux_loss.load_balance" in message
    assert "Set aux_loss=none" in message
    assert list(Path().iterdir()) == []


def test_a_target_that_no_linear_has_is_said_before_anything_is_scored_or_written(told):
    status, message = told(train, "+method=lora", *ARC, "method.target_modules=[q_prj]")
    assert status == 2
    assert "Did you mean 'q_proj'?" in message
    assert not list(Path().rglob("*.json*"))


def test_rows_longer_than_a_table_of_positions_are_refused(told, tmp_path_factory):
    """It would end in an error of its lookup, in the step of the first such row."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**sizes, **ids)).save_pretrained(folder)
    arc = ("+tasks=arc", "data.source=sample", f"model={folder}", "train.max_length=65")
    status, message = told(train, "+method=lora", *arc)
    assert status == 2
    assert "train.max_length=65 is more than the 64 tokens that model" in message
    assert "Lower it to 64" in message
    assert not list(Path().rglob("*.json*"))


def test_data_that_are_not_there_are_status_3(told):
    status, message = told(train, "+method=lora", "+tasks=arc", "model=tiny", "data.source=/nowhere")
    assert status == 3
    assert "data.source=/nowhere" in message
    assert "data.source=sample" in message
    assert list(Path().iterdir()) == []


def test_an_unreachable_hub_is_said_with_the_line_that_works(told, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    began = time.monotonic()
    status, message = told(train, "+method=lora", "+tasks=arc", "model=tiny")
    assert status == 3
    assert time.monotonic() - began < 10
    assert "data.source=sample" in message
    assert list(Path().iterdir()) == []


def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused(told, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    status, message = told(train, "+method=lora", *ARC)
    assert status == 2
    assert "srun started 4 tasks" in message
    assert "srun --ntasks=1 torchrun --nproc-per-node=4 -m" in message
    assert "+method=lora +tasks=arc" in message
    for door, argv in ((table, ("recipe=tiny",)), (train, ("-m", "+method=lora", *ARC))):
        status, message = told(door, *argv)
        assert status == 2
        assert "srun --ntasks=1 python -m" in message
    for name in ("WORLD_SIZE", "SLURM_PTY_PORT"):
        with monkeypatch.context() as here:
            here.setenv(name, "1")
            assert "no method 'lorra'" in told(train, "+method=lorra", *ARC)[1]


@pytest.mark.parametrize("script", ["mixlora-train", "mixlora-generate", "mixlora-lm-eval", "my.py"])
def test_a_script_that_pip_made_is_told_its_own_module(monkeypatch, script):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [f"/venv/bin/{script}", "run=x"])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    named = {"mixlora-lm-eval": "mixlora.lm_eval", "my.py": "mixlora.train"}.get(script, script.replace("-", "."))
    with pytest.raises(ConfigError, match=rf"python -m {named} run=x\Z"):
        cli.refuse_tasks(sys.argv[1:], in_ranks=False)


@pytest.mark.parametrize("door", [generate, export, evaluate], ids=["generate", "export", "evaluate"])
def test_the_other_doors_refuse_what_is_no_run_folder(told, door, tmp_path):
    extra = {generate: ["prompt=hello"], export: ["to=out"], evaluate: []}[door]
    status, message = told(door, f"run={tmp_path / 'nothing'}", *extra)
    assert status in (2, 4)
    assert "nothing" in message
    assert "Traceback" not in message


def test_a_config_that_names_python_objects_is_refused(told, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {_target_: os.system}\n", encoding="utf-8")
    status, message = told(generate, f"run={run}", "prompt=hello")
    assert status == 2
    assert "_target_" in message


def test_what_the_trunk_shows_is_said_without_torch(tmp_path):
    """Loading torch alone takes seconds; a typing error must not."""
    program = (
        "import sys; from mixlora.train import main\n"
        "sys.argv = ['train', '+method=smora', '+tasks=arc', 'method.top_k=65']\n"
        "try: main()\n"
        "except SystemExit as stopped: print(stopped.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.split() == ["2", "False", "False"], done.stderr


def test_options_of_gates_and_losses_are_said_without_transformers(tmp_path):
    program = (
        "import sys; from mixlora.train import main\n"
        "sys.argv = ['train', '+method=mole', '+tasks=arc', '+method.gate.renorm=1']\n"
        "try: main()\n"
        "except SystemExit as stopped: print(stopped.code, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_several_tasks_are_called_by_all_their_names():
    assert normalise(["tasks=[arc_easy,boolq]"]) == ["tasks=[arc_easy,boolq]", "tasks.name=arc_easy-boolq"]
    mine = ["tasks=[arc_easy,boolq]", "tasks.name=mine"]
    assert normalise(mine) == mine
    assert normalise(["-m", "tasks=arc_easy,boolq"]) == ["-m", "tasks=arc_easy,boolq"]


def test_a_folder_does_not_hide_the_model_of_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "mine"):
        (tmp_path / name).mkdir()
    assert normalise(["model=tiny"]) == ["model=tiny"]
    assert normalise(["model=mine"]) == ["model=path", "model.path=mine"]
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text("name: mine\n")
    assert normalise(["--config-dir=own", "model=mine"]) == ["--config-dir=own", "model=mine"]


def test_the_command_of_a_run_can_be_typed_again():
    argv = ["tasks=x", "method.target_modules=[q_proj,v_proj]", "tasks.mixture.x.question='{q}, \"really\"'"]
    assert shlex.split(train.command(["mixlora", *argv])) == ["python", "-m", "mixlora.train", *argv]


def test_a_value_is_quoted_where_hydra_would_read_something_else():
    for value in ("runs/a-1", "a b", "/x/lr=1e-4,2", "1", "a]b", 'say "no"', "back\\slash", "null", "${x}"):
        assert parsed(spelled("run", value)).value() == value
    assert spelled("run", "/data/runs/a-1") == "run=/data/runs/a-1"


@pytest.mark.parametrize("there", [True, False])
def test_where_a_runs_model_lies_now_changes_nothing_else_of_it(tmp_path, there):
    """model.path=NEW, as the door spells it, beside a run's configuration. A GGUF file that lies there is read."""
    if there:
        (tmp_path / "some.gguf").touch()
    known = {
        "name": "llama",
        "path": "a/b",
        "revision": "c0ffee",
        "dtype": "bfloat16",
        "quantization": "nf4",
        "random": None,
        "gguf_file": "some.gguf",
    }
    run = OmegaConf.create({"model": known, "tasks": {"name": "arc"}})
    new = str(tmp_path)
    given = OmegaConf.create({"model": {"name": "path", "path": new, "dtype": "auto", "quantization": "none"}})
    found = evaluate.laid_over(run, given, ["model", "model.path"]).model
    assert (found.path, found.revision, found.name) == (new, None, "llama")
    assert found.gguf_file == ("some.gguf" if there else None)
    assert (found.dtype, found.quantization) == ("bfloat16", "nf4")


TEXTS = [
    "Hello, world", "What is 2+2=?", "Is this (right)?", 'It\'s a test: "yes"', "Grüße", "null", "1",
    r"a\b", r"a, \frac{b}", r"a\ b", "a, b\\", '"Yes" or "no"?', "'tis late", 'a \\"b\\", c', "What does ${HOME} mean?",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_a_text_whatever_hydra_would_read_in_it(text):
    (argument,) = normalise([f"prompt={text}"])
    composed = OmegaConf.create({"prompt": parsed(argument).value(), "run": "x"})
    assert composed.prompt == text
    assert typed(doors.Generate, composed).prompt == text


def test_a_path_may_have_letters_of_any_language_and_what_hydra_reads_stays():
    (argument,) = normalise(["run_dir=/home/jürgen/läufe"])
    assert parsed(argument).value() == "/home/jürgen/läufe"
    found = normalise(["model.path=/home/jürgen/llama"])
    assert found == ["model=path", 'model.path="/home/jürgen/llama"'] == normalise(["model=/home/jürgen/llama"])
    kept = ["run_dir=null", "output_root=a/b", "run='a b'", "resume=x", 'prompt="quoted, already"']
    assert normalise(kept) == kept


PLACES = ("run", "to", "run_dir", "output_root", "records", "resume", "data.source", "recipe")


def test_a_home_is_expanded_where_a_place_is_typed(monkeypatch):
    """A shell leaves it after most keys, and to Hydra it is no letter."""
    monkeypatch.setenv("HOME", "/home/jürgen")
    for typed_as in ("~/x", '"~/x"'):
        for key in PLACES:
            (argument,) = normalise([f"{key}={typed_as}"])
            assert parsed(argument).value() == "/home/jürgen/x"
    of_a_run = ["model=path", 'model.path="/home/jürgen/x"']
    assert normalise(["model.path=~/x"]) == of_a_run == normalise(["model=~/x"])
    assert normalise(["model.path=~/x"], of_a_run=False) == of_a_run[1:]
    (prompt,) = normalise(["prompt=~/x"])
    assert parsed(prompt).value() == "~/x"


def test_a_switch_may_stand_anywhere():
    found = normalise(["+method=lora", "--config-dir", "my", "tasks=mine", "-m", "seed=1"])
    assert found[:3] == ["--config-dir", "my", "-m"]
    assert normalise(["--info", "method=lora"]) == ["method=lora", "--info"]
    assert normalise(["method=lora", "--info", "config", "seed=1"])[:2] == ["--info", "config"]


@pytest.mark.parametrize(
    "key", ["method.top_k=2", "method.lora_alpha=nan", "method.lora_alpha=0", "eval.temperature=nan"]
)
def test_what_no_method_or_protocol_can_do_is_refused(told, key):
    status, said = told(train, "+method=lora", *ARC, "model=tiny", key)
    assert (status, key.partition("=")[0] in said) == (2, True)


def test_scores_of_a_run_are_not_written_over(told, tmp_path):
    values = {"model": {"name": "tiny"}, "method": {"name": "lora"}, "tasks": {"name": "none"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    status, said = told(evaluate, f"run={tmp_path}", f"run_dir={tmp_path}")
    assert status == 2
    assert "is a run's own folder" in said


def test_training_is_over_when_a_run_is_scored(told, tmp_path):
    status, said = told(evaluate, f"run={tmp_path}", "train.learning_rate=1")
    assert status == 2
    assert "train.learning_rate is of training" in said
    assert "method.top_k is of training" in told(evaluate, f"run={tmp_path}", "method.top_k=1")[1]
    for key in ("dry_run=true", "resume=x", "tracker=wandb", "report=false"):
        assert told(evaluate, f"run={tmp_path}", key)[1].startswith(f"mixlora: {key.partition('=')[0]} is of training")


@pytest.mark.parametrize("door", [train, evaluate, generate], ids=["train", "evaluate", "generate"])
def test_help_is_given_whatever_is_chosen(monkeypatch, capsys, door):
    monkeypatch.setattr(sys, "argv", ["mixlora", "--help"])
    with pytest.raises(SystemExit) as stopped:
        door.main()
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert said.startswith(f"python -m {door.__name__} ")
    assert ("smora" in said) is (door is not generate)


def test_a_file_that_is_no_yaml_is_named_with_the_place(told, tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "broken.yaml").write_text("name: [x\npath: y\n")
    status, said = told(train, "--config-dir", str(tmp_path), "+method=lora", "+tasks=broken")
    assert status == 2
    assert "not valid YAML" in said
    assert "broken.yaml" in said
    assert "line 2" in said


@pytest.mark.parametrize("wraps", [False, True])
def test_an_interrupt_before_anything_is_begun_is_one_line(told, monkeypatch, wraps):
    """Hydra and OmegaConf take one for a fault of what they were reading."""

    def stopped(*_: object) -> None:
        if wraps:
            raise ValueError("no flags") from KeyboardInterrupt()
        raise KeyboardInterrupt

    monkeypatch.setattr("mixlora.config.load.config_of", stopped)
    status, said = told(train, "+method=lora", *ARC)
    assert (status, said) == (130, "mixlora: interrupted before anything was begun\n")

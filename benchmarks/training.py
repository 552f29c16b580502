"""What whole training steps share: the base model, the rows, and a method beside PEFT's LoRA of the same total rank."""

import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import HERE
from hydra import compose, initialize_config_dir
from layers import filled, products_alone
from peft import LoraConfig, get_peft_model
from torch import nn

from mixlora import losses, tasks
from mixlora.adapters.attach import adapted, adapter_tensors, attach, place, prepared
from mixlora.config.load import config_of
from mixlora.config.schema import Compute, Config, Method, Train
from mixlora.models import base
from mixlora.tasks.collate import Row
from mixlora.tasks.mixture import plan
from mixlora.tasks.prompts import Formatter
from mixlora.training.loop import Trainer

CONFIGS = HERE.parent / "configs"
SHARED = HERE.parents[1] / "shared" / "data" / "hub"
RANDOM = {  # shapes of models with random weights, which need no download
    "llama_1b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "smollm2_135m_shape": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def data_source() -> str:
    return str(SHARED) if SHARED.is_dir() else "sample"


def rows_from() -> str:
    """What a result file says of its rows: their lengths decide how much a padding collator pads."""
    return "public sets" if SHARED.is_dir() else "sample"


@cache
def config(method: str, model: str, *overrides: str) -> Config:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        values = ["method=" + method, "tasks=commonsense", "model=" + model, *overrides]
        return config_of(compose("train", overrides=values))


@cache
def loaded(model: str, device: str, dtype: str) -> base.Base:
    """The base model, once; copied for every variant."""
    if model in RANDOM:
        chosen = config("lora", "tiny", "model.dtype=" + dtype).model
        chosen.random = dict(RANDOM[model])
        with torch.device(device):  # a GPU draws a billion numbers at once
            found = base.load(chosen, device=device)
    else:
        found = base.load(config("lora", model, "model.dtype=" + dtype).model, device=device)
    found.model.is_quantized = False  # a GGUF file was dequantised; transformers' Trainer would refuse it all the same
    return found


@cache
def training_rows(model: str, device: str, dtype: str, number: int) -> list[Row]:
    """Rows as training draws them from the eight commonsense tasks."""
    chosen = config("lora", "tiny" if model in RANDOM else model, "data.source=" + data_source())
    data = {name: d for name, d in tasks.load(chosen.tasks, chosen.data, 0).items() if d.train}
    sizes = {name: len(d.train) for name, d in data.items()}
    drawn = plan(
        sizes, dict.fromkeys(sizes, 1.0), sampling=chosen.tasks.sampling, temperature=2.0, size_cap=None,
        caps=dict.fromkeys(sizes), total=number, seed=0,
    ).draws(0, number)  # fmt: skip
    formatter = Formatter(loaded(model, device, dtype).tokenizer, chosen.data)
    found = []
    for name, index in drawn:
        encoded = formatter.encode(data[name].train[index], max_length=2048)
        found.append(Row(f"{name}-{index}", name, tuple(encoded.prompt_ids), tuple(encoded.answer_ids)))
    return found


def long_rows(length: int, number: int, answer: int) -> list[Row]:
    """Rows of one length of random tokens, of which the last `answer` are trained."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (number, length), generator=generator).tolist()
    return [Row(str(i), "a", tuple(row[:-answer]), tuple(row[-answer:])) for i, row in enumerate(ids)]


def ours(
    model: str, device: str, dtype: str, method: str, compute: Compute = Compute.fast, *overrides: str
) -> tuple[nn.Module, dict, dict]:
    """The model with a method as its file gives it but for `overrides`, its adapter, and its auxiliary losses."""
    chosen = config(method, "tiny" if model in RANDOM else model, *overrides)
    chosen.method.compute = compute
    built = copy.deepcopy(loaded(model, device, dtype).model)
    return built, moved(attach(built, chosen.method)), losses.build(chosen.aux_loss)


@cache
def total_ranks(model: str, device: str, dtype: str, method: str, *overrides: str) -> dict[str, int]:
    """Every linear that the method adapts, with the rank over all its experts."""
    like, _, _ = ours(model, device, dtype, method, Compute.fast, *overrides)
    return {
        name if part == "delta" else f"{name}.{part}": len(module.B_RO)
        for name, wrapper in adapted(like).items()
        for part, module in wrapper.named_children()
        if hasattr(module, "B_RO")
    }


def lora_like(
    model: str, device: str, dtype: str, method: str, dropout: float, *overrides: str
) -> tuple[nn.Module, dict, dict]:
    """Our own LoRA on the same linears with the same total ranks."""
    ranks = total_ranks(model, device, dtype, method, *overrides)
    built = copy.deepcopy(loaded(model, device, dtype).model)
    wrappers = {}
    for r in set(ranks.values()):
        names = [name for name, rank in ranks.items() if rank == r]
        wrappers |= prepared(built, Method(name="lora", r=r, lora_dropout=dropout, target_modules=names))
    place(built, wrappers)
    return built, moved(adapter_tensors(built)), {}


def products_like(
    model: str, device: str, dtype: str, method: str, dropout: float, *overrides: str
) -> tuple[nn.Module, dict, dict]:
    """The method's products, without gates and auxiliary losses: the least that it can take."""
    built, _, _ = ours(model, device, dtype, method, Compute.fast, *overrides)
    return built, adapter_tensors(products_alone(built)), {}


def peft_like(
    model: str, device: str, dtype: str, method: str, dropout: float, *overrides: str
) -> tuple[nn.Module, dict, dict]:
    """PEFT's LoRA on the same linears with the same total ranks; on a bfloat16 base its adapters are bfloat16, and ours
    are float32 masters."""
    ranks = total_ranks(model, device, dtype, method, *overrides)
    most = max(ranks.values())
    lora = LoraConfig(r=most, lora_alpha=2 * most, lora_dropout=dropout, target_modules=list(ranks), rank_pattern=ranks)
    built = get_peft_model(
        copy.deepcopy(loaded(model, device, dtype).model), lora, autocast_adapter_dtype=dtype == "float32"
    )
    return built, moved({name: t for name, t in built.named_parameters() if t.requires_grad}), {}


def moved(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B away from zero on every side, as after some training: a GPU multiplies zeros faster than numbers."""
    filled(tensor for name, tensor in adapter.items() if name.endswith("B_RO") or "lora_B" in name)
    return adapter


def trainer(parts: tuple[nn.Module, dict, dict], rows: list[Row], size: int, micro: int = 1, **options: Any) -> Trainer:
    """Our loop over `rows`, again and again; the learning rate is too small to change anything."""
    model, _, aux = parts
    on_cpu = next(model.parameters()).device.type == "cpu"  # or Accelerate would take the GPU of a machine that has one
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro, "learning_rate": 1e-6}
    return Trainer(
        model=model, aux=aux, tasks=sorted({row.task for row in rows}),
        train=Train(**settings, **options),
        rows=lambda first, number: [rows[(first + i) % len(rows)] for i in range(number)],
        steps=10**6, seed=0, pad_id=0, folder=Path(tempfile.gettempdir()), accelerator=Accelerator(cpu=on_cpu),
    )  # fmt: skip

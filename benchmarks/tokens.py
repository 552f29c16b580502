"""Real (not padding) tokens a second of our loop against transformers' Trainer with PEFT's LoRA and a padding collator.

Commonsense rows, 8 a step, the same rows for both in every round, the same total rank 64. Steps alone are timed.
"""

import copy
import tempfile
import warnings

import common
import torch
from common import Row, arguments, quartiles, ratio, say, write
from training import loaded, ours, peft_like, trainer, training_rows
from transformers import Trainer, TrainerCallback, TrainingArguments

from mixlora.adapters.attach import attach
from mixlora.config.schema import Method
from mixlora.tasks.collate import IGNORED

SIZE = 8


def main() -> None:
    options = arguments(__doc__, model="smollm2_135m", rounds=7, steps=4)
    if options.quick:
        options.model, options.rounds, options.steps = "tiny", 2, 2
    where = options.model, options.device, "bfloat16" if options.device.startswith("cuda") else "float32"
    rows = training_rows(*where, SIZE * options.steps * (options.rounds + 1))
    tokenizer = loaded(*where).tokenizer
    theirs, _, _ = peft_like(*where, "mole")
    loops = {
        "mole": trainer(ours(*where, "mole"), rows, SIZE),
        "mole, padded": trainer(ours(*where, "mole"), rows, SIZE, packing=False),
        "LoRA r 64": trainer(lora64(where), rows, SIZE),
    }
    speeds: dict[str, list[float]] = {}
    for round_ in range(options.rounds + 1):
        first = round_ * options.steps
        chunk = rows[first * SIZE : (first + options.steps) * SIZE]
        tokens = sum(map(len, chunk))
        seconds = {"default": hugging_face(theirs, tokenizer, chunk, "random", options)}
        seconds["grouped"] = hugging_face(theirs, tokenizer, chunk, "group_by_length", options)
        for name, each in loops.items():
            each.model.train()
            began = common.CLOCK[0]()
            for step in range(first + 1, first + options.steps + 1):
                each.step(step)
            common.synchronize(options.device)
            seconds[name] = common.CLOCK[0]() - began
        if round_:
            for name, value in seconds.items():
                speeds.setdefault(name, []).append(tokens / value)
    setting, found = f"{where[0]} {where[2]}", []
    for name in loops:
        for reference in ("default", "grouped"):
            goal = 2.2 if (name, reference) == ("mole", "default") else None
            figure = f"tokens/s: {name} / HF Trainer, PEFT r 64, {reference}"
            found.append(ratio(figure, setting, speeds[name], speeds[reference], goal=goal, at_least=True))
    for name, values in speeds.items():
        low, high = quartiles(values)
        found.append(
            Row(
                f"tokens/s: {name} (depends on the machine)",
                setting,
                sorted(values)[len(values) // 2],
                None,
                low=low,
                high=high,
            )
        )
        say(found[-1])
    padding = 1 - sum(map(len, rows)) / sum(SIZE * max(map(len, rows[i : i + SIZE])) for i in range(0, len(rows), SIZE))
    found.append(Row("tokens/s: share of padding in the default batches", setting, padding))
    say(found[-1])
    print(f"written: {write('tokens', found, options)}")


def lora64(where):
    built = copy.deepcopy(loaded(*where).model)
    return built, attach(built, Method(name="lora", r=64)), {}


class Clock(TrainerCallback):
    """From the beginning of the first step to the end of the last."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self.began = common.CLOCK[0]()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds = common.CLOCK[0]() - self.began


def hugging_face(model, tokenizer, rows, sampling: str, options) -> float:
    """Seconds of one pass over `rows` by transformers' Trainer."""
    clock = Clock()
    examples = [{"input_ids": row.tokens, "labels": row.labels, "length": len(row)} for row in rows]

    def padding(batch: list[dict]) -> dict[str, torch.Tensor]:
        """What DataCollatorForSeq2Seq does: to the longest of the batch."""
        longest = max(len(example["input_ids"]) for example in batch)
        pad = tokenizer.pad_token_id
        filled = [(e["input_ids"], e["labels"], longest - len(e["input_ids"])) for e in batch]
        return {
            "input_ids": torch.tensor([ids + [pad] * n for ids, _, n in filled]),
            "labels": torch.tensor([labels + [IGNORED] * n for _, labels, n in filled]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for ids, _, n in filled]),
        }

    settings = TrainingArguments(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=SIZE, num_train_epochs=1, learning_rate=1e-6,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        train_sampling_strategy=sampling, use_cpu=options.device == "cpu", dataloader_pin_memory=False,
        length_column_name="length", bf16=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = Trainer(model=model, args=settings, train_dataset=examples, data_collator=padding, callbacks=[clock])
        each.train()
    return clock.seconds


if __name__ == "__main__":
    main()

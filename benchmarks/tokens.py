"""Real (not padding) tokens a second of our loop against transformers' Trainer with PEFT's LoRA and a padding collator.

Commonsense rows, 8 a step, the same total rank 64. A pool is drawn once. Each round takes new rows of it, the same for
all sides: some as they were drawn, and some consecutive batches of the pool as the Trainer groups it by length (50
batches are sorted at a time). The sides of a round run in an order that is drawn anew. Steps alone are timed. The two
sides that a goal is of run more rounds than the others.

How much of a batch is padding changes from round to round, and the Trainer computes padding as it computes tokens. So
its seconds of a round go with the positions of its batches, and what is judged is every round's ratio at the padding
that the batches of the whole pool have (`at_padding`); the ratio as it was measured, which says the same of any one
round's rows and spreads by their luck, is printed beside it.
"""

import random
import tempfile
import warnings
from functools import partial
from statistics import median

import common
import torch
from common import Row, arguments, ratio, say, spread, write
from training import loaded, lora_like, ours, peft_like, rows_from, trainer, training_rows
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from mixlora.tasks.collate import Row as Example

IGNORED = -100  # a label without loss, in transformers
SIZE = 8
MEGA_BATCHES = 50  # as many as the Trainer sorts at a time
POOL = 4 * SIZE * MEGA_BATCHES
GOAL = (("mole", "default"), ("HF", "default"))  # the sides that a goal is of


def main() -> None:
    options = arguments(__doc__, model="smollm2_135m", rounds=6, goal_rounds=18, steps=3)
    if options.quick:
        options.model, options.rounds, options.goal_rounds, options.steps = "tiny", 2, 3, 2
    where = options.model, options.device, "bfloat16" if options.device.startswith("cuda") else "float32"
    pool = training_rows(*where, POOL)
    rows = {"default": pool[: (options.goal_rounds + 1) * options.steps * SIZE], "grouped": grouped(pool, options)}
    speeds = measure(where, rows, options)
    setting, found = f"{where[0]} {where[2]}", []
    for name, kind in speeds:
        if name != "HF":
            figure = f"tokens/s: {name} / HF Trainer, PEFT r 64, {kind}"
            mine, theirs = speeds[name, kind], speeds["HF", kind][: len(speeds[name, kind])]
            found.append(ratio(figure, setting, mine, theirs))
            if (name, kind) in GOAL:
                alike = at_padding(padding(pool), theirs, rows[kind], options.steps * SIZE)
                found.append(ratio(f"{figure}, padding of the pool", setting, mine, alike, goal=2.2, at_least=True))
    for (name, kind), values in speeds.items():
        figure = f"tokens/s: {name}, {kind} (depends on the machine)"
        found.append(Row(figure, setting, median(values), **spread(values)))
        say(found[-1])
    for kind, chosen in {**rows, "pool's": pool}.items():
        found.append(Row(f"tokens/s: share of padding in the {kind} batches", setting, padding(chosen)))
        say(found[-1])
    print(f"written: {write('tokens', found, options, rows_from=rows_from())}")


def grouped(pool: list[Example], options) -> list[Example]:
    """Rows for each round: consecutive batches of the pool grouped by length, from a place of their own."""
    generator = torch.Generator().manual_seed(0)
    order = get_length_grouped_indices([len(row) for row in pool], SIZE, MEGA_BATCHES, generator)
    a_round = SIZE * options.steps
    places = random.Random(0).sample(range(len(pool) // a_round), options.rounds + 1)
    return [pool[i] for place in places for i in order[place * a_round : (place + 1) * a_round]]


def measure(where, rows: dict[str, list[Example]], options) -> dict[tuple[str, str], list[float]]:
    """Tokens a second in every round by (side, rows); one round before is not kept."""
    tokenizer = loaded(*where).tokenizer
    theirs, _, _ = peft_like(*where, "mole", 0.0)
    built = {"mole": partial(ours, *where, "mole"), "LoRA r 64": partial(lora_like, *where, "mole", 0.0)}
    loops = {(name, kind): trainer(build(), rows[kind], SIZE) for name, build in built.items() for kind in rows}
    loops["mole, padded", "default"] = trainer(built["mole"](), rows["default"], SIZE, packing=False)
    sides: list[tuple[str, str]] = [*loops, *(("HF", kind) for kind in rows)]
    speeds: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
    shuffled, generator = list(sides), random.Random(0)
    for round_ in range(options.goal_rounds + 1):
        first = round_ * options.steps
        generator.shuffle(shuffled)
        for side in shuffled if round_ <= options.rounds else filter(GOAL.__contains__, shuffled):
            chunk = rows[side[1]][first * SIZE : (first + options.steps) * SIZE]
            if side[0] == "HF":
                seconds = hugging_face(theirs, tokenizer, chunk, options)
            else:
                seconds = own(loops[side], first, options)
            if round_:
                speeds[side].append(sum(map(len, chunk)) / seconds)
    return speeds


def own(loop, first: int, options) -> float:
    """Seconds of the steps after `first` by our loop."""
    loop.model.train()
    common.synchronize(options.device)
    began = common.CLOCK[0]()
    for step in range(first + 1, first + options.steps + 1):
        loop.step(step)
    common.synchronize(options.device)
    return common.CLOCK[0]() - began


def padding(rows: list[Example]) -> float:
    """What part of the batches would be padding."""
    batches = [rows[i : i + SIZE] for i in range(0, len(rows), SIZE)]
    return 1 - sum(map(len, rows)) / sum(SIZE * max(map(len, batch)) for batch in batches)


def at_padding(share: float, speeds: list[float], rows: list[Example], a_round: int) -> list[float]:
    """Tokens a second of a side that pads, in every round after the first, had `share` of its positions been padding:
    a position takes the time it takes, be it a token or not."""
    chunks = [rows[i * a_round : (i + 1) * a_round] for i in range(1, len(speeds) + 1)]
    return [speed * (1 - share) / (1 - padding(chunk)) for speed, chunk in zip(speeds, chunks, strict=True)]


class Clock(TrainerCallback):
    """From the beginning of the first step to the end of the last."""

    def __init__(self, device: str):
        self.device = device

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            common.synchronize(self.device)
            self.began = common.CLOCK[0]()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == state.max_steps:
            common.synchronize(self.device)
        self.seconds = common.CLOCK[0]() - self.began


def hugging_face(model, tokenizer, rows: list[Example], options) -> float:
    """Seconds of one pass over `rows`, in their order, by transformers' Trainer."""
    clock = Clock(options.device)
    examples = [{"input_ids": row.tokens, "labels": [IGNORED] * row.silent + row.tokens[row.silent :]} for row in rows]

    def padded(batch: list[dict]) -> dict[str, torch.Tensor]:
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
        train_sampling_strategy="sequential", use_cpu=options.device == "cpu", dataloader_pin_memory=False, bf16=False,
    )  # fmt: skip
    if options.device.startswith("cuda"):  # on several GPUs it would take all of them at once
        settings.device  # noqa: B018  counts them
        settings._n_gpu = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = Trainer(model=model, args=settings, train_dataset=examples, data_collator=padded, callbacks=[clock])
        each.train()
    return clock.seconds


if __name__ == "__main__":
    main()

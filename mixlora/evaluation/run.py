"""Evaluate a model on a task: predictions example by example, then one result computed from the predictions alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixlora import ranks
from mixlora.config.schema import Answer, Data, Eval, Task
from mixlora.console import bar
from mixlora.evaluation import scores
from mixlora.evaluation.code import judge_code
from mixlora.evaluation.generation import generate
from mixlora.evaluation.likelihood import score_options
from mixlora.tasks.example import Example
from mixlora.tasks.prompts import Formatter

# Raised by one whenever the same predictions would get another score.
PROTOCOL_VERSION = 1

Prediction = dict[str, Any]


@dataclass(frozen=True)
class Evaluator:
    """A model with the formatter it was trained with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    formatter: Formatter
    options: Eval
    data: Data
    max_length: int
    seed: int = 0

    def __call__(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        """One prediction an example, in their order, the same on every rank; each rank works on its share.

        Where the model lies in parts on the ranks, every forward needs all of them, so all do all the work in step.
        """
        predict = {Answer.options: self.choices, Answer.code: self.programs}.get(task.answer_kind, self.texts)
        state = PartialState()
        if ranks.sharded(self.model):
            with evaluating(self.model):
                return predict(task, examples, label)
        with evaluating(self.model):
            mine = predict(task, examples[state.process_index :: state.num_processes], label)
        place = {example.id: i for i, example in enumerate(examples)}
        return sorted(gather_object(mine), key=lambda p: place[p["id"]])

    def choices(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        """The likeliest option under each normaliser."""
        with bar(label, len(examples)) as shown:
            scored = score_options(
                self.model,
                self.formatter,
                examples,
                batch_size=self.options.batch_size,
                pad_id=self.tokenizer.pad_token_id,
                max_length=self.max_length,
                on_done=shown.advance,
            )
        predictions = []
        for example, options in zip(examples, scored, strict=True):
            chosen = scores.choose(options.nats, options.texts, options.tokens)
            predictions.append(
                {
                    "id": example.id,
                    "prompt": example.question,
                    "options": list(options.texts),
                    "log_likelihoods": [round(n, 6) for n in options.nats],
                    "tokens": list(options.tokens),
                    "target": example.gold,
                    "prediction": chosen[task.metric],
                    **{name: float(choice == example.gold) for name, choice in chosen.items()},
                }
            )
        return predictions

    def texts(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        """A generated answer, compared with the right one."""
        compare = number_matches if task.answer_kind is Answer.number else text_matches
        said = self.generated(task, examples, label)
        return [
            {"id": e.id, "prompt": e.question, "target": e.answer, "prediction": text, **compare(text, e.answer)}
            for e, text in zip(examples, said, strict=True)
        ]

    def programs(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        """A generated function, run against its tests in the sandbox."""
        return judge_code(examples, self.generated(task, examples, label))

    def generated(self, task: Task, examples: Sequence[Example], label: str) -> list[str]:
        with bar(label, len(examples)) as shown:
            return generate(
                self.model,
                self.tokenizer,
                [self.formatter.generation_prompt(example, max_length=self.max_length) for example in examples],
                max_new_tokens=task.max_new_tokens,
                batch_size=self.options.batch_size,
                stop=task.stop,
                temperature=self.options.temperature,
                seed=self.seed,
                on_done=shown.advance,
            )


METRICS: dict[Answer, tuple[str, tuple[str, ...]]] = {
    Answer.options: ("option_loglikelihood", ("acc", "acc_norm", "acc_token")),
    Answer.number: ("generate", ("strict", "flexible")),
    Answer.text: ("generate", ("exact_match",)),
    Answer.code: ("generate_and_run", ("pass@1",)),
}


def result(task: Task, predictions: Sequence[Prediction], options: Eval, data: Data) -> dict[str, Any]:
    """Everything a table needs to know about one task; no model is asked."""
    protocol, names = METRICS[task.answer_kind]
    score = scores.mean_score([p[task.metric] for p in predictions])
    return {
        "metric": task.metric,
        "value": score.value,
        "stderr": score.stderr,
        "n": score.n,
        "interval": list(score.interval),
        "majority": majority(task, predictions),
        "metrics": {name: scores.mean_score([p[name] for p in predictions]).value for name in names},
        "protocol": {
            "name": protocol,
            "version": PROTOCOL_VERSION,
            "style": data.style.value,
            "template": data.template.value,
            "split": options.split,
            "temperature": options.temperature,
            "max_new_tokens": task.max_new_tokens,
        },
    }


def majority(task: Task, predictions: Sequence[Prediction]) -> float | None:
    """What the best constant guess would score; None where there is no such guess (code)."""
    if task.answer_kind is Answer.code:
        return None
    keys: dict[Answer, Callable[[Any], Any]] = {
        Answer.options: lambda target: target,
        Answer.number: lambda target: scores.strict_number(target) or scores.last_number(target),
    }
    key = keys.get(task.answer_kind, scores.fold)
    return scores.majority_share([key(p["target"]) for p in predictions])


def number_matches(text: str, answer: str) -> dict[str, float]:
    """GSM8K: `strict` wants the model's own `####`, `flexible` takes its last number where there is none."""
    target = scores.strict_number(answer) or scores.last_number(answer)
    strict, flexible = scores.strict_number(text), scores.last_number(text)
    return {"strict": float(strict == target), "flexible": float((strict or flexible) == target)}


def text_matches(text: str, answer: str) -> dict[str, float]:
    return {"exact_match": float(scores.fold(text) == scores.fold(answer))}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) while the block runs, then what it was before."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)

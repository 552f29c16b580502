"""Evaluate a model on a task: predictions example by example, then one result computed from the predictions alone."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixlora import ranks
from mixlora.config.load import plain
from mixlora.config.schema import Answer, Backend, Data, Eval, Task
from mixlora.console import bar
from mixlora.errors import DataError
from mixlora.evaluation import extract, scores
from mixlora.evaluation.code import judge_code, tell_unfit
from mixlora.evaluation.generation import GENERATION_VERSION, generate
from mixlora.evaluation.harness import Harness
from mixlora.evaluation.likelihood import OptionScorer
from mixlora.evaluation.metric import MeanScore
from mixlora.evaluation.protocols import Protocol, Reading, protocol_of
from mixlora.evaluation.sandbox.completion import COMPLETION_VERSION
from mixlora.models.base import USUAL_WINDOW, attention, window
from mixlora.models.likelihood import evaluating
from mixlora.tasks.example import Example
from mixlora.tasks.mixture import seed_of
from mixlora.tasks.numbers import last_number, strict_number
from mixlora.tasks.prompts import Choice, Formatter, Prompt

# Raised by one whenever the same predictions would get another score.
PROTOCOL_VERSION = 3
AROUND = 256  # tokens: more than stand around any question, a cue and a chat template

Prediction = dict[str, Any]


@dataclass(frozen=True)
class Evaluator:
    """A model with the protocol it is scored by; `shots` are the solved examples of each task, `seed` is of samples."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: Eval
    data: Data
    shots: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    seed: int = 0

    @cached_property
    def protocol(self) -> Protocol:
        return protocol_of(self.options, self.data)

    @cached_property
    def formatter(self) -> Formatter:
        """The protocol's; it is the one of training where the protocol is `auto`."""
        return Formatter(self.tokenizer, replace(self.data, style=self.protocol.style))

    @cached_property
    def score_options(self) -> OptionScorer:
        return OptionScorer(self.model)

    @cached_property
    def max_length(self) -> int:
        """Tokens of prompt and answer: what was asked for, within the model's window where it names one."""
        asked, most = self.options.max_length, window(self.model)
        return min(most or asked or USUAL_WINDOW, asked or most or USUAL_WINDOW)

    def require_room(self, task: Task, examples: Sequence[Example]) -> None:
        """What the model's window has no room for is said before anything is trained: a question for its options, and
        a generated answer. An option has no more tokens than bytes, so few need to be counted.

        Raises:
            ConfigError, DataError: naming the task, or the row.
        """
        if self.protocol.generates(task):
            self.room(task)
        elif self.protocol.reads(task) is Reading.likelihood:
            for example in examples:
                if max(len(option.encode()) for option in example.options) >= self.max_length - AROUND:
                    self.formatter.choices(example, **self.limits(task))

    def __call__(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        """One prediction an example, in their order, the same on every rank; each rank works on its share.

        Where the model lies in parts on the ranks, every forward needs all of them, so all do all the work in step.
        """
        found = self.predictions(task, examples, label)
        if self.protocol.reads(task) is Reading.run:
            tell_unfit(task.name, found)
        return found

    def predictions(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        predict = {
            Reading.likelihood: self.likeliest,
            Reading.label_token: self.label_tokens,
            Reading.generated: self.texts,
            Reading.run: self.programs,
        }[self.protocol.reads(task)]
        state = PartialState()
        if ranks.sharded(self.model):
            with evaluating(self.model):
                return predict(task, examples, label)
        with evaluating(self.model):
            mine = predict(task, examples[state.process_index :: state.num_processes], label)
        return in_order([prediction for share in ranks.gathered(mine) for prediction in share], examples)

    def likeliest(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        """The likeliest option under each normaliser."""

        def read(example: Example, choices: Sequence[Choice], nats: Sequence[float]) -> dict[str, Any]:
            lengths, tokens = [c.length for c in choices], [len(c.answer_ids) for c in choices]
            chosen = scores.choose(nats, lengths, tokens)
            return {
                "lengths": lengths,
                "tokens": tokens,
                "target": example.gold,
                "prediction": chosen[self.protocol.metric(task)],
                **{name: float(choice == example.gold) for name, choice in chosen.items()},
            }

        asked = [self.formatter.choices(example, **self.limits(task)) for example in examples]
        return self.by_likelihood(examples, asked, read, label)

    def label_tokens(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        """The label whose last token is the likeliest next one; it need not be the label of an option."""

        def read(example: Example, choices: Sequence[Choice], nats: Sequence[float]) -> dict[str, Any]:
            labels, _ = self.formatter.style.labels(example)
            chosen = choices[nats.index(max(nats))].text
            target = labels[example.gold or 0]
            return {"target": target, "prediction": chosen, "acc": float(chosen == target)}

        asked = [self.formatter.label_tokens(example, **self.limits(task)) for example in examples]
        return self.by_likelihood(examples, asked, read, label)

    def by_likelihood(
        self,
        examples: Sequence[Example],
        asked: Sequence[Sequence[Choice]],
        read: Callable[[Example, Sequence[Choice], Sequence[float]], dict[str, Any]],
        label: str,
    ) -> list[Prediction]:
        """The log-likelihoods of the choices of each example, and what `read` makes of them."""
        with bar(label, len(asked)) as shown:
            found = self.score_options(
                asked,
                batch_size=self.options.batch_size,
                batch_tokens=self.options.batch_tokens,
                pad_id=int(self.tokenizer.pad_token_id),
                on_done=shown.advance,
            )
        return [
            {
                "id": example.id,
                "prompt": example.question,
                "options": [choice.text for choice in choices],
                "log_likelihoods": scores.finite(nats, example.id),
                **read(example, choices, nats),
                **cuts([choice.prompt for choice in choices]),
            }
            for example, choices, nats in zip(examples, asked, found, strict=True)
        ]

    def texts(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        """A generated answer, read by its rule and compared with the right one."""
        compare = {
            Answer.options: self.option_matches,
            Answer.number: lambda text, example: number_matches(text, example.answer),
            Answer.text: lambda text, example: text_matches(text, example.answer),
        }[task.answer_kind]
        target = (lambda e: e.gold) if task.answer_kind is Answer.options else (lambda e: e.answer)
        prompts = self.prompts(task, examples)
        said, endless = self.generated(task, prompts, [self.sample_seed(example) for example in examples], label)
        return [
            {"id": e.id, "prompt": e.question, "target": target(e), "prediction": text}
            | compare(text, e)
            | cuts([prompt])
            | {"replies_cut": int(i in endless)}
            for i, (e, text, prompt) in enumerate(zip(examples, said, prompts, strict=True))
        ]

    def option_matches(self, text: str, example: Example) -> dict[str, Any]:
        """The label found in a free answer; where there is none the answer is wrong, and counted as not parsed."""
        labels, known = self.formatter.style.labels(example)
        found = self.protocol.extract(text, known, example.options)
        return {
            "options": list(example.options),
            "answer": found,
            "acc": float(found == labels[example.gold or 0]),
            "parsed": float(found is not None),
        }

    def programs(self, task: Task, examples: Sequence[Example], label: str) -> list[Prediction]:
        """Generated functions, `num_samples` of each, run against their tests in the sandbox."""
        prompts, number = self.prompts(task, examples), self.options.num_samples
        repeated = [prompt for prompt in prompts for _ in range(number)]
        seeds = [self.sample_seed(example, sample) for example in examples for sample in range(number)]
        said, endless = self.generated(task, repeated, seeds, label)
        judged = judge_code(examples, [said[i : i + number] for i in range(0, len(said), number)])
        lost = Counter(place // number for place in endless)
        return [
            prediction | cuts([prompt]) | {"replies_cut": lost[i]}
            for i, (prediction, prompt) in enumerate(zip(judged, prompts, strict=True))
        ]

    def prompts(self, task: Task, examples: Sequence[Example]) -> list[Prompt]:
        limits = self.limits(task)
        return [self.formatter.prompt(example, **limits | {"max_length": self.room(task)}) for example in examples]

    def room(self, task: Task) -> int:
        """Tokens of a prompt to be answered. Raises ConfigError where the model's window leaves too few."""
        return self.protocol.room(task, self.max_length, "model and eval.max_length allow")

    def sample_seed(self, example: Example, sample: int = 0) -> int:
        """Of one sample of one example; the first sample's is the same whatever their number."""
        parts = (self.seed, example.id, sample) if sample else (self.seed, example.id)
        return seed_of(*parts) % 2**63

    def generated(
        self, task: Task, prompts: Sequence[Prompt], seeds: Sequence[int], label: str
    ) -> tuple[list[str], set[int]]:
        """The answers, and the places of those that had no end within the tokens that they may have."""
        free, endless = task.answer_kind is not Answer.options, set[int]()
        with bar(label, len(prompts)) as shown:
            said = generate(
                self.model,
                self.tokenizer,
                [prompt.ids for prompt in prompts],
                max_new_tokens=self.protocol.new_tokens(task),
                batch_size=self.options.batch_size,
                batch_tokens=self.options.batch_tokens,
                ends=self.formatter.end_ids,
                stop=self.stop(task),
                temperature=self.temperature(task),
                beams=1 if free else self.protocol.beams,
                seeds=seeds,
                pads=self.score_options.pads,
                on_done=shown.advance,
                on_cut=endless.add,
            )
        return said, endless

    def temperature(self, task: Task) -> float:
        """Of generated answers; an option is chosen greedily, however it is asked."""
        return 0.0 if task.answer_kind is Answer.options else self.options.temperature

    def stop(self, task: Task) -> list[str]:
        """Short answers after solved examples end where the next example would begin."""
        short = task.answer_kind in (Answer.options, Answer.text)
        return [*task.stop, "\n\n"] if short and self.shots.get(task.name) else list(task.stop)

    def limits(self, task: Task) -> dict[str, Any]:
        return {"max_length": self.max_length, "shots": self.shots.get(task.name, ())}

    def describe(self, task: Task) -> dict[str, Any]:
        """How this task is asked and read: all that must be equal for two scores to be comparable."""
        options, formatter, read = self.options, self.formatter, self.protocol.reads(task)
        own = options.backend is Backend.own
        generated = self.protocol.generates(task)
        judged_by = digest([task.tests, task.prefix, task.fixtures])
        code = {"num_samples": options.num_samples, "completion": COMPLETION_VERSION, "judged_by": judged_by}
        # Named where it is not the usual one: options had wrong scores under eager attention (see CHANGELOG), which
        # must not be taken for these.
        unusual = own and task.answer_kind is Answer.options and attention(self.model) != "sdpa"
        return {
            "name": self.protocol.name.value if task.answer_kind is Answer.options else "generate",
            "backend": options.backend.value,
            "reading": read.value,
            "version": PROTOCOL_VERSION,
            "style": self.protocol.style.value,
            "template": formatter.layout.name,
            "split": options.split.value,
            "num_fewshot": options.num_fewshot,
            "shots": [shot.id for shot in self.shots.get(task.name, ())],
            "max_length": self.max_length,
            "temperature": self.temperature(task),
            "max_new_tokens": self.protocol.new_tokens(task),
            **({"generation": GENERATION_VERSION, "stop": self.stop(task)} if generated and own else {}),
            **({"extraction": extract.EXTRACTION_VERSION} if read is Reading.generated and own else {}),
            **(code if task.answer_kind is Answer.code else {}),
            **({"attention": attention(self.model)} if unusual else {}),
        }

    def fingerprint(self, task: Task) -> str:
        """sha256 of everything that turns a row of this task into a prompt, solved examples included."""
        keys = plain(task)
        words = {name: keys[name] for name in ("question", "cue", "options", "wordings")}
        shots = [[shot.question, shot.answer] for shot in self.shots.get(task.name, ())]
        parts = [self.formatter.fingerprint, words, shots, self.max_length]
        # Not by raising FORMAT: prompts of other tasks are as they were, and recipes pin them.
        ends = task.cue.rstrip(" \t")[-1:]
        if task.answer_kind is not Answer.options and self.formatter.layout.name == "plain" and ends in ("", "\n"):
            parts.append("line breaks are kept")
        return digest(parts)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def in_order(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[Prediction]:
    """The predictions in the order of the examples. A missing one is an error, never a wrong answer.

    Raises:
        DataError: an example without prediction, or with two, or a prediction without example.
    """
    found: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction["id"] in found:
            raise DataError(f"{prediction['id']} has two predictions. Score the task again")
        found[prediction["id"]] = prediction
    missing = [example.id for example in examples if example.id not in found]
    extra = sorted(found.keys() - {example.id for example in examples})
    if missing or extra:
        what = f"{len(missing)} examples have no prediction" if missing else f"{len(extra)} predictions have no example"
        raise DataError(f"{what}: {', '.join((missing or extra)[:5])}. Score the task again")
    return [found[example.id] for example in examples]


def cuts(prompts: Sequence[Prompt]) -> dict[str, int]:
    """What the prompts of one example lost to fit."""
    return {"shots_cut": max(p.shots_cut for p in prompts), "tokens_cut": max(p.tokens_cut for p in prompts)}


def result(task: Task, predictions: Sequence[Prediction], protocol: Protocol) -> dict[str, Any]:
    """Everything a table needs to know about one task; no model is asked."""
    metric = protocol.metric(task)
    found = {
        name: MeanScore().compute(predictions=[p[name] for p in predictions])
        for name in protocol.metrics(task)
        if name in predictions[0]
    }
    score = found[metric]
    return {
        "metric": metric,
        "value": score["value"],
        "stderr": score["stderr"],
        "n": score["n"],
        "interval": list(score["interval"]),
        "majority": majority(task, predictions, protocol.reads(task)),
        "metrics": {name: one["value"] for name, one in found.items()},
        "stderrs": {name: one["stderr"] for name, one in found.items()},
        "cut": cut(predictions) if "shots_cut" in predictions[0] else None,  # the harness does not say
    }


def cut(predictions: Sequence[Prediction]) -> dict[str, int]:
    return {
        "prompts": sum(p["shots_cut"] + p["tokens_cut"] > 0 for p in predictions),
        "shots": sum(p["shots_cut"] for p in predictions),
        "tokens": sum(p["tokens_cut"] for p in predictions),
        "replies": sum(p.get("replies_cut", 0) for p in predictions),
    }


def marked(task: Task, predictions: Sequence[Prediction], protocol: Protocol) -> list[Prediction]:
    """Each prediction with `correct`: what it scores under the metric that counts."""
    metric = protocol.metric(task)
    return [prediction | {"correct": prediction[metric]} for prediction in predictions]


def majority(task: Task, predictions: Sequence[Prediction], reading: Reading) -> float | None:
    """What the best constant guess would score; None where there is no such guess (code), or the right option is not
    known: of WinoGrande the harness tells the end of the sentence."""
    unknown = reading is Reading.likelihood and not all(isinstance(p["target"], int) for p in predictions)
    if task.answer_kind is Answer.code or unknown:
        return None
    keys: dict[Answer, Callable[[Any], Any]] = {
        Answer.options: lambda target: target,
        Answer.number: lambda target: strict_number(target) or last_number(target),
    }
    key = keys.get(task.answer_kind, extract.fold)
    return scores.majority_share([key(p["target"]) for p in predictions])


def number_matches(text: str, answer: str) -> dict[str, float]:
    """GSM8K: `strict` wants the model's own `####`, `flexible` takes its last number where there is none."""
    target = strict_number(answer) or last_number(answer)
    strict, flexible = strict_number(text), last_number(text)
    if target is None:  # a row that was read before such rows were refused
        return {"strict": 0.0, "flexible": 0.0}
    return {"strict": float(strict == target), "flexible": float((strict or flexible) == target)}


def text_matches(text: str, answer: str) -> dict[str, float]:
    return {"exact_match": float(extract.fold(text) == extract.fold(answer))}


def scorer(own: Evaluator) -> Callable[[Task, Sequence[Example], str], list[Prediction]]:
    """What predicts for a result: the evaluator itself, or the harness on its model."""
    if own.options.backend is Backend.own:
        return own
    return Harness(own.model, own.tokenizer, own.options)

"""Protocols: how an option task is asked (a style) and how its answer is read.

    name           asked as      read as
    loglikelihood  cloze         the likeliest option text: nats summed, per byte, per token; the task's metric counts
    letters        letters       the likeliest letter
    generate       letters       a letter or an option's text, found in a free answer (`extract.option`)
    llm_adapters   llm_adapters  the first label in an answer of 4 beams and 32 tokens (`extract.first_label`)
    moe_peft       moe_peft      the likeliest next token among the last tokens of " A", " B", ...
    lm_eval        lm_eval       as loglikelihood

Tasks without options are always generated, in their own words and by their own rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from mixlora.config.schema import Answer, Backend, Config, Data, Eval, Style, Task, Template
from mixlora.config.schema import Protocol as Name
from mixlora.config.typed import at_least, suggest
from mixlora.errors import ConfigError
from mixlora.evaluation import extract, harness
from mixlora.evaluation.sandbox.scores import KS
from mixlora.tasks.styles import STYLES


class Reading(Enum):
    likelihood = "option_loglikelihood"
    label_token = "label_token_argmax"
    generated = "generate"
    run = "generate_and_run"


# What is scored under each reading of an option task, and for each other kind of answer.
OPTION_METRICS = {
    Reading.likelihood: ("acc", "acc_norm", "acc_token"),
    Reading.label_token: ("acc",),
    Reading.generated: ("acc", "parsed"),
}
OTHER_METRICS = {
    Answer.number: ("strict", "flexible"),
    Answer.text: ("exact_match",),
    Answer.code: tuple(f"pass@{k}" for k in KS),
}

LEAST_PROMPT = 8  # tokens

Extract = Callable[[str, Sequence[str], Sequence[str]], str | None]  # (answer, labels, texts) -> label


@dataclass(frozen=True)
class Protocol:
    name: Name
    style: Style
    reading: Reading
    extract: Extract = extract.option
    beams: int = 1
    max_new_tokens: int | None = None  # None: the task's own

    def reads(self, task: Task) -> Reading:
        """How an answer to `task` is read."""
        if task.answer_kind is Answer.options:
            return self.reading
        return Reading.run if task.answer_kind is Answer.code else Reading.generated

    def generates(self, task: Task) -> bool:
        return self.reads(task) in (Reading.generated, Reading.run)

    def new_tokens(self, task: Task) -> int:
        """Tokens of a generated answer at the most."""
        own = self.max_new_tokens if task.answer_kind is Answer.options else None
        return task.max_new_tokens if own is None else own

    def room(self, task: Task, max_length: int, source: str) -> int:
        """Tokens that an answer which is generated leaves to its prompt.

        Raises:
            ConfigError: too few for a question; `source` says whose `max_length` it is.
        """
        room, new = max_length - self.new_tokens(task), self.new_tokens(task)
        if room < LEAST_PROMPT:
            own = f", or lower tasks.mixture.{task.name}.max_new_tokens" if new == task.max_new_tokens else ""
            raise ConfigError(
                f"task {task.name}: {source} {max_length} tokens, of which an answer may have {new}, which leaves no "
                f"room for its question. Raise eval.max_length where the model allows it{own}"
            )
        return room

    def metrics(self, task: Task) -> tuple[str, ...]:
        """All that is scored; see `metric` for the one that counts."""
        return OTHER_METRICS.get(task.answer_kind) or OPTION_METRICS[self.reading]

    def metric(self, task: Task) -> str:
        return task.metric if task.metric in self.metrics(task) else self.metrics(task)[0]


TABLE = (
    Protocol(Name.loglikelihood, Style.cloze, Reading.likelihood),
    Protocol(Name.letters, Style.letters, Reading.likelihood),
    Protocol(Name.lm_eval, Style.lm_eval, Reading.likelihood),
    Protocol(Name.moe_peft, Style.moe_peft, Reading.label_token),
    Protocol(Name.llm_adapters, Style.llm_adapters, Reading.generated, extract.first_label, 4, 32),
    Protocol(Name.generate, Style.letters, Reading.generated),
)
PROTOCOLS = {protocol.name: protocol for protocol in TABLE}
BY_STYLE = {protocol.style: protocol for protocol in reversed(TABLE)}  # what `auto` means


def protocol_of(options: Eval, data: Data) -> Protocol:
    if options.backend is Backend.lm_eval:
        return PROTOCOLS[Name.lm_eval]
    return BY_STYLE[data.style] if options.protocol is Name.auto else PROTOCOLS[options.protocol]


def check(config: Config) -> None:
    """Raises ConfigError where a task cannot be asked or scored as the configuration says."""
    options = config.eval
    for key, least in (
        ("batch_size", 1), ("batch_tokens", 1), ("max_length", LEAST_PROMPT), ("num_fewshot", 0),
        ("num_samples", 1), ("temperature", 0),
    ):  # fmt: skip
        at_least(f"eval.{key}", getattr(options, key), least)
    protocol = protocol_of(options, config.data)
    asked_by = "eval.backend" if options.backend is Backend.lm_eval else "eval.protocol"
    require_template(config.data, {"data.style": config.data.style, asked_by: protocol.style})
    if options.backend is Backend.lm_eval:
        harness.require(config.tasks.mixture, options, config.data.source)
    for name, task in config.tasks.mixture.items():
        if task.answer_kind is Answer.options:
            require_wording(name, task, config.data.style, "data.style")
            if not task.train_only:
                require_wording(name, task, protocol.style, "eval.protocol")
        runs = task.answer_kind is not Answer.code or options.allow_code_execution
        if runs and not task.train_only and protocol.generates(task) and options.max_length is not None:
            protocol.room(replace(task, name=name), options.max_length, "eval.max_length allows")
        known = OTHER_METRICS.get(task.answer_kind, OPTION_METRICS[Reading.likelihood])
        if task.metric not in known and not task.train_only:
            raise ConfigError(f"task {name}: there is no metric '{task.metric}'. {suggest(task.metric, known)}")
    check_samples(config)


def require_template(data: Data, styles: Mapping[str, Style]) -> None:
    """Raises ConfigError for a chat template beside a wording that stands in none."""
    for key, style in styles.items():
        if data.template is Template.chat and not STYLES[style].chats:
            raise ConfigError(
                f"data.template=chat, but {key}={style.value} is asked without a chat template. Set "
                "data.template=auto, which uses one where it may, or plain"
            )


def check_samples(config: Config) -> None:
    """Raises ConfigError where several samples of a program would be equal, are of no use, or are too few."""
    number, mixture = config.eval.num_samples, config.tasks.mixture
    code = {name: task for name, task in mixture.items() if task.answer_kind is Answer.code and not task.train_only}
    for name, task in code.items():
        least = int(task.metric.partition("@")[2])
        if number < least:
            raise ConfigError(
                f"task {name}: {task.metric} needs eval.num_samples of at least {least}, got {number}. Raise it, or "
                f"set tasks.mixture.{name}.metric=pass@1"
            )
    if number == 1:
        return
    if not code:
        raise ConfigError(
            f"eval.num_samples={number} is for tasks whose answer is a program, and none is scored here: "
            f"{', '.join(mixture)}. Leave it at 1"
        )
    if config.eval.temperature == 0:
        raise ConfigError(
            f"eval.num_samples={number} with eval.temperature=0 would take the same greedy answer {number} times. "
            "Set eval.temperature=0.8, say, or leave eval.num_samples at 1"
        )


def require_wording(name: str, task: Task, style: Style, key: str) -> None:
    if style not in (Style.cloze, Style.letters) and style.value not in task.wordings:
        known = ", ".join(sorted(task.wordings)) or "none"
        raise ConfigError(
            f"{key}={style.value}: task {name} has no wording for it (it has: {known}). "
            f"Leave the task out, or add wordings.{style.value} to its file"
        )

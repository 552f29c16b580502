"""Styles: how an example is put into words, for training and scoring alike. One class a style; tokens come later.

    cloze         the question alone; the answer is the text of an option
    letters       the options are listed as A. B. ...; the answer is a letter
    lm_eval       lm-evaluation-harness 0.4.13: as cloze, in the words of its task files
    llm_adapters  LLM-Adapters (Hu et al. 2023, arXiv:2304.01933): an instruction that names the labels
    moe_peft      MoE-PEFT (arXiv:2404.15159): labelled options, the answer is a label

A task whose answer is generated (a number, a text, a program) is asked in its own words under every style.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mixlora.config.schema import Style
from mixlora.errors import ConfigError, DataError
from mixlora.tasks.example import Example, Worded
from mixlora.tasks.template import BadField

MOST_OPTIONS = 26  # letters
LETTERS_CUE = "\nAnswer:"


@dataclass(frozen=True)
class Turn:
    """What is asked and one thing that could be answered. `cue` leads to the answer where no chat template does."""

    question: str
    cue: str
    answer: str
    characters: int | None = None  # by which acc_norm divides in place of the answer's bytes
    joined: str | None = None  # signs at a plain prompt's end that go to the answer; None: all blanks and line breaks

    @property
    def length(self) -> int:
        return len(self.answer.encode()) if self.characters is None else self.characters


class Cloze:
    """The base of all styles."""

    name = Style.cloze
    chats = True  # may stand inside a chat template
    cuts_all = False  # too long a prompt may lose what the tokenizer puts before it, as in lm-evaluation-harness

    def turns(self, example: Example) -> list[Turn]:
        """One turn an option, or the only turn of an example without options."""
        if not example.options:
            # A model that was not trained here goes on in the line that it is given, so its answer gets a new one.
            return [Turn(example.question, example.cue, example.answer, joined=" \t")]
        return self.option_turns(example)

    def option_turns(self, example: Example) -> list[Turn]:
        return [Turn(example.question, example.cue, option) for option in example.options]

    def right(self, example: Example) -> Turn:
        """The turn that training teaches."""
        return self.turns(example)[example.gold or 0]

    def check(self, example: Example) -> None:
        """Raises DataError where an example cannot be asked in this style."""

    def labels(self, example: Example) -> tuple[Sequence[str], Sequence[str]]:
        """(the labels of the options, the labels that an answer is sought among)."""
        known = [chr(ord("A") + i) for i in range(len(example.options))]
        return known, known


class Letters(Cloze):
    name = Style.letters

    def check(self, example: Example) -> None:
        """Raises DataError beyond Z."""
        if len(example.options) > MOST_OPTIONS:
            raise DataError(
                f"{example.id} has {len(example.options)} options, letters end at Z. Use data.style=cloze and "
                "eval.protocol=loglikelihood"
            )

    def option_turns(self, example: Example) -> list[Turn]:
        """Raises as `check` does. A list of options is never a sentence to complete, so the cue is fixed."""
        self.check(example)
        letters, _ = self.labels(example)
        listed = (f"{letter}. {option}" for letter, option in zip(letters, example.options, strict=True))
        question = "\n".join([example.question, *listed])
        return [Turn(question, LETTERS_CUE, letter) for letter in letters]


class Published(Cloze):
    """A style that a task words itself, in `wordings`."""

    chats = False

    def check(self, example: Example) -> None:
        """Raises what asking would."""
        self.turns(example)

    def worded(self, example: Example) -> Worded:
        """Raises ConfigError where the task has no such wording."""
        if self.name.value not in example.wordings:
            known = ", ".join(sorted(example.wordings)) or "none"
            raise ConfigError(
                f"task {example.task} has no wording for the {self.name.value} protocol (it has: {known}). "
                f"Give it wordings.{self.name.value}, or choose another data.style or eval.protocol"
            )
        return example.wordings[self.name.value]

    def labels(self, example: Example) -> tuple[Sequence[str], Sequence[str]]:
        """Raises ConfigError where the wording has fewer labels than there are options."""
        worded, number = self.worded(example), len(example.options)
        if worded.keys.labels and len(worded.keys.labels) < number:
            raise ConfigError(
                f"task {example.task}: wordings.{self.name.value}.labels has {len(worded.keys.labels)} labels "
                f"{worded.keys.labels}, and {example.id} has {number} options. Give it {number}"
            )
        own = (worded.keys.labels or example.labels)[:number]
        return own, worded.keys.known or worded.keys.labels or own

    def text(self, example: Example) -> str:
        """Question, listed options, end."""
        worded, (labels, _) = self.worded(example), self.labels(example)
        try:
            question = worded.question(example.row or {}) if worded.question else example.question
        except BadField as error:
            raise DataError(f"{example.id}, field '{error.field}': {error.reason}") from None
        question = worded.clean(question)
        if worded.option is None:
            listed = ""
        else:
            rows = enumerate(zip(labels, map(worded.clean, example.options), strict=True), start=1)
            listed = worded.keys.between.join(worded.option({"number": n, "label": b, "text": t}) for n, (b, t) in rows)
        return question + listed + worded.keys.end.replace("{labels}", "/".join(labels))

    def option_turns(self, example: Example) -> list[Turn]:
        text, cue, (labels, _) = self.text(example), self.worded(example).keys.cue, self.labels(example)
        return [Turn(text, cue, label) for label in labels]


class Harness(Published):
    """lm-evaluation-harness: no chat template, and where a task has a blank, what follows it is what is scored.

    Its acc_norm divides by characters, and with a blank by those of the sentence up to there (api/task.py).
    """

    name = Style.lm_eval
    cuts_all = True

    def option_turns(self, example: Example) -> list[Turn]:
        text, keys = self.text(example), self.worded(example).keys
        options = map(self.worded(example).clean, example.options)
        if keys.blank is None:
            return [Turn(text, keys.cue, option, len(option)) for option in options]
        before, blank, after = text.partition(keys.blank)
        if not blank:
            raise DataError(
                f"{example.id} has no blank {keys.blank!r} for its options. Mend the row, or wordings.lm_eval.blank of "
                f"task {example.task}"
            )
        return [Turn(before + o, "", after.strip(), len(before + o)) for o in options]


class LlmAdapters(Published):
    """LLM-Adapters: the instruction inside the Alpaca frame, indented by 16 blanks as its evaluation prints it.

    Its training prints other blanks than its evaluation; here both see the same. Its prompt ends in a line break and 16
    blanks, which tokenizers join to what follows: here they are the beginning of the answer.
    """

    name = Style.llm_adapters
    indent = " " * 16
    lead = "Below is an instruction that describes a task. Write a response that appropriately completes the request. "

    def option_turns(self, example: Example) -> list[Turn]:
        text, (labels, _) = self.text(example), self.labels(example)
        frame = f"{self.lead}\n\n{self.indent}### Instruction:\n{self.indent}{text}\n\n{self.indent}### Response:"
        return [Turn(frame, f"\n{self.indent}", f"the correct answer is {label}") for label in labels]


class MoePeft(Published):
    name = Style.moe_peft


STYLES: dict[Style, Cloze] = {kind.name: kind() for kind in (Cloze, Letters, Harness, LlmAdapters, MoePeft)}

"""The one formatter that training and evaluation share: from an example to token ids.

    chat    what the model's chat template writes around the question and the answer
    plain   question, the task's cue ("\\nAnswer:"), a blank unless the cue ends in one, the answer, end of sequence

Text of a row never becomes a control token, whatever it spells. Prompt and answer are tokenised together and split
after the prompt's tokens, as lm-evaluation-harness does (HFLM._encode_pair).
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mixlora.config.schema import Data, Style, Template
from mixlora.errors import ConfigError, DataError
from mixlora.tasks import chat
from mixlora.tasks.example import Example

FORMAT = 1  # raised by one whenever the same example would get another prompt
MOST_OPTIONS = 26  # letters
LETTERS_CUE = "\nAnswer:"


@dataclass(frozen=True)
class Encoded:
    """One example for training. `answer_ids` ends in the terminator; `cut` tokens of the question were left out."""

    prompt_ids: list[int]
    answer_ids: list[int]
    cut: int = 0


@dataclass(frozen=True)
class Parts:
    """A prompt before it is cut to length: fixed ids, the user's, fixed ids; and the plain text before an answer."""

    head_ids: list[int]
    user_ids: list[int]
    tail_ids: list[int]
    context: str  # what an answer is tokenised together with
    lead: str  # what stands between the context and the answer

    def cut_to(self, room: int | None) -> tuple[list[int], int]:
        """(ids, tokens cut): too long a prompt loses the beginning of the user's text, at most all but one token."""
        over = 0 if room is None else len(self.head_ids) + len(self.user_ids) + len(self.tail_ids) - room
        cut = min(max(over, 0), max(len(self.user_ids) - 1, 0))
        return [*self.head_ids, *self.user_ids[cut:], *self.tail_ids], cut


class Formatter:
    """Examples as token ids, under one tokenizer, template and style.

    Raises:
        ConfigError: a chat template is asked for or broken, or there is no token to end an answer with.
    """

    def __init__(self, tokenizer: Any, data: Data):
        self.tokenizer, self.style = tokenizer, data.style
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if data.template is Template.chat and not has_chat:
            raise ConfigError("data.template=chat, but the tokenizer has no chat template. Use data.template=plain")
        chats = has_chat and data.template is not Template.plain
        self.layout: ChatLayout | PlainLayout = ChatLayout(tokenizer) if chats else PlainLayout(tokenizer)

    @property
    def end_ids(self) -> list[int]:
        """The terminator: trained after every answer, and what a generation should stop at."""
        return self.layout.end_ids

    def encode(self, example: Example, *, max_length: int | None = None) -> Encoded:
        """A training row of at most `max_length` tokens; the answer is never cut.

        Raises:
            DataError: the answer alone leaves no room for the question; see `fits`.
        """
        parts = self.layout.parts(self.question(example), self.cue(example))
        answer_ids = [*self.answer_ids(parts, self.answer(example)), *self.end_ids]
        prompt_ids, cut = parts.cut_to(None if max_length is None else max_length - len(answer_ids))
        if max_length is not None and len(prompt_ids) + len(answer_ids) > max_length:
            raise DataError(
                f"{example.id}: the answer takes {len(answer_ids)} tokens, which leaves no room for the question in "
                f"train.max_length={max_length}. Raise it, or leave the row out"
            )
        return Encoded(prompt_ids, answer_ids, cut)

    def fits(self, example: Example, max_length: int) -> bool:
        """Whether `encode` can keep the whole answer. Cheap: a short text is not tokenised."""
        parts = self.layout.frame_ids + len(self.end_ids) + 1
        if parts + len(example.answer.encode()) <= max_length:
            return True
        try:
            self.encode(example, max_length=max_length)
        except DataError:
            return False
        return True

    def continuations(
        self, example: Example, *, max_length: int | None = None
    ) -> tuple[list[int], list[list[int]], list[str]]:
        """(prompt ids, ids of each option without terminator, text of each option), to score options by likelihood.

        The prompt leaves room for the longest option within `max_length`.
        """
        parts, texts = self.layout.parts(self.question(example), self.cue(example)), self.answers(example)
        options = [self.answer_ids(parts, text) for text in texts]
        room = None if max_length is None else max_length - max(map(len, options))
        return parts.cut_to(room)[0], options, texts

    def generation_prompt(self, example: Example, *, max_length: int | None = None) -> list[int]:
        """The ids that a generated answer follows."""
        return self.layout.parts(self.question(example), self.cue(example)).cut_to(max_length)[0]

    def question(self, example: Example) -> str:
        """What the user says: the question, with style=letters its options in lines of their own."""
        if self.style is not Style.letters or not example.options:
            return example.question
        letters = zip(self.answers(example), example.options, strict=True)
        return "\n".join([example.question, *(f"{letter}. {option}" for letter, option in letters)])

    def cue(self, example: Example) -> str:
        """A list of options is never a sentence to complete."""
        return LETTERS_CUE if self.style is Style.letters and example.options else example.cue

    def answers(self, example: Example) -> list[str]:
        """What the assistant could say: the options' texts, or their letters. Raises DataError beyond Z."""
        if self.style is not Style.letters:
            return list(example.options)
        if len(example.options) > MOST_OPTIONS:
            raise DataError(f"{example.id} has {len(example.options)} options, letters end at Z. Use data.style=cloze")
        return [chr(ord("A") + i) for i in range(len(example.options))]

    def answer(self, example: Example) -> str:
        return example.answer if example.gold is None else self.answers(example)[example.gold]

    def answer_ids(self, parts: Parts, answer: str) -> list[int]:
        """The ids that the answer adds to the text before it.

        Where it would change the last tokens of that text (it begins with a line break, say), it is tokenised alone:
        the model sees the prompt's own tokens, and none of the answer is lost.
        """
        text, before = parts.lead + answer, self.layout.text_ids(parts.context)
        whole = self.layout.text_ids(parts.context + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.layout.text_ids(text)

    def show(self, example: Example, *, max_length: int | None = None) -> str:
        """The example as the model sees it in training; what carries loss stands between ⟦ and ⟧."""
        encoded = self.encode(example, max_length=max_length)
        prompt, answer = (self.tokenizer.decode(ids) for ids in (encoded.prompt_ids, encoded.answer_ids))
        cut = f"[{encoded.cut} tokens cut] " if encoded.cut else ""
        return f"{cut}{prompt}⟦{answer}⟧"

    @functools.cached_property
    def digest(self) -> str:
        parts = [FORMAT, self.style.value, self.layout.describe(), self.end_ids, tokenizer_sha256(self.tokenizer)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def fingerprint(self) -> str:
        """sha256 of everything that turns an example into ids: template, style, tokenizer, this file's version."""
        return self.digest


class Layout:
    """How texts become ids; what both layouts share."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def text_ids(self, text: str) -> list[int]:
        """Text of a row: what spells a control token stays text."""
        return self.ids(text, split_special_tokens=True)

    def ids(self, text: str, **options: Any) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])

    def eos_ids(self) -> list[int]:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "The tokenizer has no end-of-sequence token, so an answer could not end. Choose another model"
            )
        return [int(self.tokenizer.eos_token_id)]


class PlainLayout(Layout):
    """[BOS where the tokenizer adds one] question + cue, then " answer" and EOS."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self.head_ids, self.end_ids = self.leading_ids(), self.eos_ids()
        self.frame_ids = len(self.head_ids)

    def leading_ids(self) -> list[int]:
        """What the tokenizer by itself puts before a text."""
        bare, whole = self.ids("a"), list(self.tokenizer("a")["input_ids"])
        return whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)]

    def parts(self, question: str, cue: str) -> Parts:
        """Blanks at the end of the prompt go to the answer, which is how they are tokenised in running text."""
        text = question + cue
        context, blank = text.rstrip(), "" if cue[-1:].isspace() else " "
        return Parts(self.head_ids, self.text_ids(context), [], context, text[len(context) :] + blank)

    def describe(self) -> list[Any]:
        return ["plain", self.head_ids]


class ChatLayout(Layout):
    """The template's own tokens around the user's text; it alone decides about BOS.

    The template's plain text next to the user's ("user\\n", "[INST] ") is tokenised together with it.
    """

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self.frame, added = chat.frame(tokenizer), chat.added_tokens(tokenizer)
        after = self.frame.after.rstrip(" ")
        self.lead = self.frame.after[len(after) :]
        control, self.opening = chat.at_last(added, self.frame.before)
        self.closing, rest = chat.at_first(added, after)
        self.context = chat.at_last(added, after)[1]
        self.head_ids, self.tail_ids = self.ids(control), self.ids(rest)
        self.end_ids = self.ids(self.frame.end) or self.eos_ids()
        self.opening_ids, self.closing_ids = self.text_ids(self.opening), self.text_ids(self.closing)
        self.frame_ids = sum(map(len, (self.head_ids, self.opening_ids, self.closing_ids, self.tail_ids)))

    def parts(self, question: str, cue: str) -> Parts:
        text = question.strip() if self.frame.strips else question
        user = self.text_ids(self.opening + text + self.closing)
        head, tail = self.head_ids, self.tail_ids
        before, after = len(self.opening_ids), len(user) - len(self.closing_ids)
        # Only the user's own tokens may be cut, so the template's go to the ends where they stand apart.
        if user[:before] == self.opening_ids:
            head, user, after = [*head, *self.opening_ids], user[before:], after - before
        if user[after:] == self.closing_ids:
            user, tail = user[:after], [*self.closing_ids, *tail]
        return Parts(head, user, tail, self.context, self.lead)

    def describe(self) -> list[Any]:
        return ["chat", self.frame.before, self.frame.after, self.frame.end, self.frame.strips]


def tokenizer_sha256(tokenizer: Any) -> str:
    """Of all that decides how it splits text; padding and truncation settings are not part of it."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        values: Any = sorted(tokenizer.get_vocab().items())
    else:
        values = {k: v for k, v in json.loads(core.to_str()).items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def cut_share(encoded: Iterable[Encoded]) -> tuple[int, int]:
    """(rows whose question was cut, rows), for a report."""
    cuts = [row.cut > 0 for row in encoded]
    return sum(cuts), len(cuts)

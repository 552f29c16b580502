"""The one formatter that training and evaluation share: from an example to token ids.

    chat    what the model's chat template writes around the question and the answer
    plain   question, the task's cue ("\\nAnswer:"), a blank unless the cue ends in one, the answer, end of sequence

Text of a row never becomes a special token, whatever it spells; other added tokens, such as Qwen3's <think>, it may.
Prompt and answer are tokenised together and split after the prompt's tokens, as lm-evaluation-harness does
(HFLM._encode_pair).
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixlora.config.schema import Data, Template
from mixlora.errors import ConfigError, DataError
from mixlora.tasks import chat
from mixlora.tasks.example import Example
from mixlora.tasks.styles import STYLES, Turn

# Raised by one whenever any example would get another prompt. Of a few tasks alone `Evaluator.fingerprint` says it,
# which run.json's `prompts` does not have.
FORMAT = 1


@dataclass(frozen=True)
class Encoded:
    """One example for training. `answer_ids` ends in the terminator; `cut` tokens of the question were left out."""

    prompt_ids: list[int]
    answer_ids: list[int]
    cut: int = 0


@dataclass(frozen=True)
class Prompt:
    """The ids of a prompt, and what was left out of it to fit: solved examples, then tokens of the question."""

    ids: tuple[int, ...]
    shots_cut: int = 0
    tokens_cut: int = 0


@dataclass(frozen=True)
class Choice:
    """One option: its prompt, the ids that it adds, its text, and the length that normalises its score."""

    prompt: Prompt
    answer_ids: tuple[int, ...]
    text: str
    length: int = 1


@dataclass(frozen=True)
class Parts:
    """A prompt before it is cut to length: fixed ids, the user's, fixed ids; and the plain text before an answer."""

    head_ids: list[int]
    user_ids: list[int]
    tail_ids: list[int]
    context: str  # what an answer is tokenised together with
    lead: str  # what stands between the context and the answer

    def __len__(self) -> int:
        return len(self.head_ids) + len(self.user_ids) + len(self.tail_ids)

    def merged(self) -> "Parts":
        """The same with everything open to cutting."""
        return replace(self, head_ids=[], user_ids=[*self.head_ids, *self.user_ids])

    def cut_to(self, room: int | None) -> tuple[list[int], int]:
        """(ids, tokens cut): too long a prompt loses the beginning of the user's text, at most all but one token."""
        over = 0 if room is None else len(self) - room
        cut = min(max(over, 0), max(len(self.user_ids) - 1, 0))
        return [*self.head_ids, *self.user_ids[cut:], *self.tail_ids], cut


class Formatter:
    """Examples as token ids, under one tokenizer, template and style.

    Raises:
        ConfigError: a chat template is asked for or broken, or there is no token to end an answer with.
    """

    def __init__(self, tokenizer: Any, data: Data):
        self.tokenizer, self.style = tokenizer, STYLES[data.style]
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if data.template is Template.chat and not has_chat:
            raise ConfigError("data.template=chat, but the tokenizer has no chat template. Use data.template=plain")
        chats = has_chat and data.template is not Template.plain and self.style.chats
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
        turn = self.style.right(example)
        parts = self.layout.parts(turn)
        answer_ids = [*self.answer_ids(parts, turn.answer), *self.end_ids]
        prompt_ids, cut = parts.cut_to(None if max_length is None else max_length - len(answer_ids))
        if max_length is not None and len(prompt_ids) + len(answer_ids) > max_length:
            raise DataError(
                f"{example.id}: the answer takes {len(answer_ids)} tokens, which leaves no room for the question in "
                f"train.max_length={max_length}. Raise it, or leave the row out"
            )
        return Encoded(prompt_ids, answer_ids, cut)

    def fits(self, example: Example, max_length: int) -> bool:
        """Whether `encode` can keep the whole answer. Cheap: a short text is not tokenised."""
        parts = self.layout.frame_ids + len(self.end_ids) + 2  # a token of the question, and a blank before the answer
        if parts + len(self.style.right(example).answer.encode()) <= max_length:
            return True
        try:
            self.encode(example, max_length=max_length)
        except DataError:
            return False
        return True

    def choices(
        self, example: Example, *, max_length: int | None = None, shots: Sequence[Example] = ()
    ) -> list[Choice]:
        """Each option after its prompt, without terminator, to be scored by likelihood.

        The prompt leaves room for the longest option within `max_length`; solved examples (`shots`) go before it while
        they fit.

        Raises:
            DataError: an option leaves no room for the question.
        """
        turns = self.style.turns(example)
        asked = {turn: self.layout.parts(turn) for turn in turns}
        answers = [self.answer_ids(asked[turn], turn.answer) for turn in turns]
        rooms = [None if max_length is None else max_length - max(map(len, answers))] * len(turns)
        if self.style.cuts_all and max_length is not None:
            # The last token of an option is never read, so the harness gives its place to the prompt.
            rooms = [max_length + 1 - len(ids) for ids in answers]
        fitted = functools.lru_cache(lambda question, cue, room: self.fitted(Turn(question, cue, ""), shots, room))
        choices = [
            Choice(fitted(turn.question, turn.cue, room), tuple(ids), turn.answer, turn.length)
            for turn, room, ids in zip(turns, rooms, answers, strict=True)
        ]
        if any(room is not None and len(c.prompt.ids) > room for c, room in zip(choices, rooms, strict=True)):
            raise DataError(
                f"{example.id}: an option takes {max(map(len, answers))} tokens, which leaves no room for the question "
                f"in {max_length}. Raise eval.max_length where the model allows it, or leave the row out"
            )
        return choices

    def label_tokens(
        self, example: Example, *, max_length: int | None = None, shots: Sequence[Example] = ()
    ) -> list[Choice]:
        """The last token of " A", " B", ... for each label that an answer is sought among."""
        prompt = self.prompt(example, max_length=max_length, shots=shots)
        _, known = self.style.labels(example)
        return [Choice(prompt, tuple(self.layout.text_ids(f" {label}")[-1:]), label) for label in known]

    def prompt(self, example: Example, *, max_length: int | None = None, shots: Sequence[Example] = ()) -> Prompt:
        """What a generated answer follows, in at most `max_length` tokens."""
        return self.fitted(self.style.turns(example)[0], shots, max_length)

    def fitted(self, turn: Turn, shots: Sequence[Example], room: int | None) -> Prompt:
        """The prompt of one turn. What does not fit loses its first shots, then the beginning of the question."""
        whole = self.style.cuts_all
        for lost in range(len(shots) + 1):
            before = "".join(map(self.shot, shots[lost:]))
            parts = self.layout.parts(turn, before)
            if room is None or len(parts) <= room:
                break
        ids, cut = (parts.merged() if whole else parts).cut_to(room)
        return Prompt(tuple(ids), shots_cut=lost, tokens_cut=cut)

    def shot(self, example: Example) -> str:
        """A solved example as plain text, with the blank line that follows it."""
        turn = self.style.right(example)
        blank = "" if turn.cue[-1:].isspace() else " "
        return f"{turn.question}{turn.cue}{blank}{turn.answer}\n\n"

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
    def fingerprint(self) -> str:
        """sha256 of everything that turns an example into ids: template, style, tokenizer, this file's version."""
        parts = [FORMAT, self.style.name.value, self.layout.describe(), self.end_ids, tokenizer_sha256(self.tokenizer)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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

    name = "plain"

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self.head_ids, self.end_ids = self.leading_ids(), self.eos_ids()
        self.frame_ids = len(self.head_ids)

    def leading_ids(self) -> list[int]:
        """What the tokenizer by itself puts before a text."""
        bare, whole = self.ids("a"), list(self.tokenizer("a")["input_ids"])
        return whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)]

    def parts(self, turn: Turn, shots: str = "") -> Parts:
        """Blanks at the end of the prompt go to the answer, which is how they are tokenised in running text."""
        text = shots + turn.question + turn.cue
        context, blank = text.rstrip(turn.joined), "" if turn.cue[-1:].isspace() else " "
        return Parts(self.head_ids, self.text_ids(context), [], context, text[len(context) :] + blank)

    def describe(self) -> list[Any]:
        return ["plain", self.head_ids]


class ChatLayout(Layout):
    """The template's own tokens around the user's text; it alone decides about BOS.

    The template's plain text next to the user's ("user\\n", "[INST] ") is tokenised together with it.
    """

    name = "chat"

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

    def parts(self, turn: Turn, shots: str = "") -> Parts:
        """The user's turn. Solved examples stand in it with their cues, and then the question has its own too."""
        text = f"{shots}{turn.question}{turn.cue.rstrip()}" if shots else turn.question
        text = text.strip() if self.frame.strips else text
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

"""What a chat template writes around a question and its answer, found by rendering it once.

    <before> question <after> answer <end>

`after` reaches up to the answer, with what the template puts there by itself (an empty block of thoughts, a channel).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixlora.errors import ConfigError

USER, ASSISTANT = "\u0001user text\u0001", "\u0001assistant text\u0001"
PADDED = f"\t{USER}\t"  # no template writes tabs of its own
# Templates that print today's date would make a prompt depend on the day it is made.
STANDING_DATE = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class Frame:
    """The texts of a template; `strips` where it takes blanks off the user's text; `end` is "" where it has none."""

    before: str
    after: str
    end: str
    strips: bool


def frame(tokenizer: Any) -> Frame:
    """Read the tokenizer's chat template.

    Raises:
        ConfigError: it cannot be rendered, or does not show the user's text exactly once.
    """
    prompt = render(tokenizer, USER)
    if prompt.count(USER) != 1:
        raise ConfigError(
            f"The chat template shows the user's text {prompt.count(USER)} times. Use data.template=plain"
        )
    before, after = prompt.split(USER)
    whole = render(tokenizer, USER, ASSISTANT)
    between, answered, rest = whole.partition(USER)[2].partition(ASSISTANT)
    if not answered:
        raise ConfigError("The chat template does not show the assistant's text. Use data.template=plain")
    after = between if between.startswith(after) else after
    return Frame(before, after, first_added(tokenizer, rest), PADDED not in render(tokenizer, PADDED))


def render(tokenizer: Any, user: str, assistant: str | None = None) -> str:
    messages = [{"role": "user", "content": user}]
    if assistant is not None:
        messages.append({"role": "assistant", "content": assistant})
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=STANDING_DATE + tokenizer.get_chat_template(),
            add_generation_prompt=assistant is None,
            tokenize=False,
            enable_thinking=False,
        )
    except Exception as error:
        # Jinja's errors, and whatever a template raises by itself.
        raise ConfigError(f"The chat template cannot be rendered ({error}). Use data.template=plain") from None
    return str(text)


def added_tokens(tokenizer: Any) -> "re.Pattern[str] | None":
    """A pattern of the tokens that are more than their text, the longest first."""
    tokens = sorted(tokenizer.get_added_vocab(), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def first_added(tokenizer: Any, text: str) -> str:
    pattern = added_tokens(tokenizer)
    found = pattern.search(text) if pattern else None
    return found[0] if found else ""


def at_first(pattern: "re.Pattern[str] | None", text: str) -> tuple[str, str]:
    """(plain text, the rest from the first added token on)."""
    found = pattern.search(text) if pattern else None
    return (text[: found.start()], text[found.start() :]) if found else (text, "")


def at_last(pattern: "re.Pattern[str] | None", text: str) -> tuple[str, str]:
    """(up to the last added token, the plain text after it)."""
    ends: Sequence[int] = [match.end() for match in pattern.finditer(text)] if pattern else []
    return (text[: ends[-1]], text[ends[-1] :]) if ends else ("", text)

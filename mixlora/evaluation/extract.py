"""Answers found in generated text. Every rule gives None where there is no answer: nothing is guessed."""

import re
import unicodedata
from collections.abc import Sequence

EXTRACTION_VERSION = 4  # raised by one whenever the same text would be read as another answer

# ---- options

BETWEEN = r"[\s:(\[*_\"']*"  # **Answer:** B
STATED = (
    rf"(?:\\boxed\{{(?:\\text\{{)?|answer(?![a-z]){BETWEEN}(?:is{BETWEEN})?"
    rf"|(?:correct|right|best) (?:option|choice)[*_]*\s*(?:is|:){BETWEEN})"
    r"(?:(?:option|choice)\s+[(\[*_\"']*)?([A-Z])(?!'?[A-Za-z0-9])"
)
BRACKETED = r"[(\[]([A-Z])[)\]]"
ALONE = r"\s*(?:[Oo]ption|[Cc]hoice)?\s*[(\[*\"']*([A-Za-z])[)\]*\"'.:,]*\s*"
ANSWERED = r"\banswer\s*(?:is|:)\s*([^\n]+)"
# "A, B and C ..." begins a list; "A, I think" and "D, A cat" do not.
LEADING = (
    r"\s*[(\[*\"']*([A-Z])\s*(?:[.:)\]]+\**|\*\*|\n"
    r"|,(?!\s*(?:and |or )?[A-HJ-Z](?:\s*[,.:)]|\s+(?:and|or)\b|\s*$)))"
)


def option(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The letter that an answer gives, or the letter of the option whose text it is.

    In this order: a letter and nothing else, in either case; "answer is B", the last where there are several; a letter
    that the answer begins with, unless the options are said again; the one letter in brackets; the text of one option,
    alone or after "answer is". Two letters without such a sign are no answer. "The answer is A rock" is the option
    "A rock" where there is one.
    """
    found = re.fullmatch(ALONE, text)
    if found and found[1].upper() in labels:
        return found[1].upper()
    stated = [m for m in re.finditer(STATED, text, re.IGNORECASE) if m[1].isupper() or is_last_word(m, text)]
    stated = [m for m in stated if m[1] != "I" or "I" in labels]  # "the answer I gave"
    if stated and (letter := stated[-1][1].upper()) in labels:
        return named(text[stated[-1].start(1) :], labels, options) or letter
    begins = re.match(LEADING, text)
    if begins and begins[1] in labels and not said_again(text, labels) and not bracketed(text, labels) - {begins[1]}:
        return begins[1]
    letters = bracketed(text, labels)
    if letters:
        return letters.pop() if len(letters) == 1 and not re.search(rf"\bnot\s+{BRACKETED}", text) else None
    said = {fold(text), *(fold(m[1]) for m in re.finditer(ANSWERED, text, re.IGNORECASE))}
    same = [label for label, one in zip(labels, options, strict=True) if fold(one) in said]
    return same[0] if len(same) == 1 else None


def named(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The letter of the longest option that begins with an article and that `text` begins with."""
    said = fold(text)
    spelled = [(fold(one), label) for label, one in zip(labels, options, strict=True)]
    found = [(len(one), label) for one, label in spelled if one[:2] == "a " and re.match(rf"{re.escape(one)}\b", said)]
    longest = [label for length, label in found if length == max(found)[0]]
    return longest[0] if len(longest) == 1 else None


def said_again(text: str, labels: Sequence[str]) -> bool:
    """Whether the options are listed once more: the first lines begin with the first letters."""
    return [m[1] for m in re.finditer(rf"(?m)^{LEADING}", text)][:2] == [*labels[:2]]


def bracketed(text: str, labels: Sequence[str]) -> set[str]:
    return set(re.findall(BRACKETED, text)) & set(labels)


def is_last_word(match: "re.Match[str]", text: str) -> bool:
    """Whether nothing but punctuation follows: "the answer is a." names A, "the answer is a dog" does not."""
    return not re.search(r"\w", text[match.end() :])


def first_label(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """LLM-Adapters: the first place in the text that spells any label, case-sensitive, inside a word or not."""
    found = re.search("|".join(map(re.escape, labels)), text)
    return found[0] if found else None


# ---- texts


def fold(text: str) -> str:
    """Lower case, no punctuation at the ends unless there is nothing else, single blanks, marks joined to letters."""
    lower = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return lower.strip(" .,;:!?\"'") or lower

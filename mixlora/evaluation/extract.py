"""Answers found in generated text. Every rule gives None where there is no answer: nothing is guessed."""

import re
import unicodedata
from collections.abc import Sequence

EXTRACTION_VERSION = 5  # raised by one whenever the same text would be read as another answer

# ---- options

# A base model talks on with another question: one that says so, or lines in one paragraph of which a later one is "A. "
# (not under a heading, which ends in a colon: there the options of this question are weighed).
NEXT = r"(?:^|\n)\s*Question:|\n\s*\n(?=(?:.+\n)*.*[^\s:*][ \t*]*\nA\. )"
FIRST = r"\bA[.):*]+[\s*_]*(.*)"  # its first option
BETWEEN = r"[\s:(\[*_\"']*"  # **Answer:** B
LETTER = r"(?:(?:option|choice)\s+[(\[*_\"']*)?([A-Z])(?!'?[A-Za-z0-9])"
STATED = (
    rf"(?:\\boxed\{{(?:\\text\{{)?|answer(?![a-z])(?:{BETWEEN}is|[\s*_]*:){BETWEEN}"
    rf"|(?:correct|right|best) (?:option|choice)[*_]*\s*(?:is|:){BETWEEN}){LETTER}"
)
DENIED = r"(?:is|was)(?:n't| not| too| wrong| incorrect| false)\b"
CALLED = rf"answer(?![a-z]){BETWEEN}{LETTER}(?!\s+{DENIED})"
BRACKETED = r"[(\[]([A-Z])[)\]]"
ALONE = r"\s*(?:[Oo]ption|[Cc]hoice)?\s*[(\[*\"']*([A-Za-z])[)\]*\"'.:,]*\s*"
ANSWERED = r"\banswer\s*(?:is|:)\s*([^\n]+)"
# "A) is too cold; (B) fits" does not begin with its answer.
LEADING = rf"\s*[*\"']*([A-Z])(?!\W+(?:No,|{DENIED})(?s:.*)\b[A-Z][)\]])\s*(?:[.:)\]]+\**|\*\*|\n|,)"
# An option listed again: "(A)", "Option A:", "a)", "A. ...", or a letter alone in its line.
LISTED = r"^\W*(?:(?:option|choice)\s+)?([A-Z])(?:[.:)\]*]+|\s*$)"
INITIAL = r"[.-]\w|\. [a-z]"  # of a name or a word: "U.S.", "T-cell", "E. coli"
# What makes a letter the first of a list: "A or B", "A, B and C ..."; not "A, I think", "D, A cat", "B and A is wrong".
MORE = (
    rf"[)\]*_\"']*\s*(?:(?:or\b|/)\s*[(\[*_\"']*([A-Z])(?![\w']|{INITIAL})"
    rf"|(?:,\s*(?:and |or )?|and )[(\[*_\"']*([A-Z])(?!{INITIAL})(?:[)\]*_\"']*\s*[,.:)]|\s+(?:and|or)\b|\s*$))"
)


def option(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The letter that an answer gives, or the letter of the option whose text it is.

    What stands before a next question is read first, and what follows only where that has no answer and the question
    is this one said again, with the same first option.

    In this order: a letter alone in the first line, in either case; "answer is B", the last where there are several,
    or else "answer B"; a letter that the answer begins with; the one letter in brackets; the text of one option, alone
    or after "answer is". The first line and the beginning do not count where the options are said again. Two letters
    without such a sign are no answer, nor are "the answer is A or B" and a letter that no option has. "The answer is A
    rock" is the option "A rock" where there is one.
    """
    for question in re.finditer(NEXT, text):
        before = letter_in(text[: question.start()], labels, options)
        if before or not same_question(text[question.end() :], options):
            return before
    return letter_in(text, labels, options)


def same_question(text: str, options: Sequence[str]) -> bool:
    """Whether the first option that is listed is this question's, with or without a remark."""
    first = re.search(FIRST, text)
    return first is not None and re.match(rf"{re.escape(fold(options[0]))}(?!\w)", fold(first[1])) is not None


def letter_in(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """What `option` reads where there is no next question."""
    text = text.strip()
    again = said_again(text, labels)
    first = re.fullmatch(ALONE, text.partition("\n")[0])
    if first and first[1].upper() in labels and not again:
        return first[1].upper()
    stated = statements(STATED, text, labels) or statements(CALLED, text, labels)
    if stated:
        letter, listed = stated[-1][1], goes_on(stated[-1], text, labels)
        if letter.upper() in labels and not listed:
            return named(text[stated[-1].start(1) :], labels, options) or letter.upper()
        if listed or letter.isupper():
            return spelled_out(text, labels, options)
    begins = re.match(LEADING, text)
    if begins and begins[1] in labels and not again and not goes_on(begins, text, labels):
        return named(text[begins.start(1) :], labels, options) or begins[1]
    letters = set(re.findall(BRACKETED, text)) & set(labels)
    if letters:
        return letters.pop() if len(letters) == 1 and not re.search(rf"\bnot\s+{BRACKETED}", text) else None
    return spelled_out(text, labels, options)


def statements(pattern: str, text: str, labels: Sequence[str]) -> "list[re.Match[str]]":
    """Where a letter is said to be the answer. "The answer I gave" and "is E. coli" say so only of a label."""
    found = (m for m in re.finditer(pattern, text, re.IGNORECASE) if m[1].isupper() or is_last_word(m, text))
    return [m for m in found if m[1] in labels or not (m[1] == "I" or re.match(INITIAL, text[m.end(1) :]))]


def goes_on(letter: "re.Match[str]", text: str, labels: Sequence[str]) -> bool:
    """Whether the letter begins a list of labels."""
    more = re.match(MORE, text[letter.end(1) :])
    return more is not None and (more[1] or more[2]) in labels


def spelled_out(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The letter of the one option whose text this is, alone or after "answer is"."""
    said = {fold(text), *(fold(m[1]) for m in re.finditer(ANSWERED, text, re.IGNORECASE))}
    same = [label for label, one in zip(labels, options, strict=True) if fold(one) in said]
    return same[0] if len(same) == 1 else None


def named(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The letter of the longest option that begins with a letter by itself and that `text` begins with."""
    said = fold(text)
    spelled = [(fold(one), label) for label, one in zip(labels, options, strict=True)]
    lettered = [(one, label) for one, label in spelled if re.match(r"\w\W", one)]
    found = [(len(one), label) for one, label in lettered if re.match(rf"{re.escape(one)}\b", said)]
    longest = [label for length, label in found if length == max(found)[0]]
    return longest[0] if len(longest) == 1 else None


def said_again(text: str, labels: Sequence[str]) -> bool:
    """Whether the options are listed once more: the first lines begin with the first letters."""
    return [m[1].upper() for m in re.finditer(LISTED, text, re.IGNORECASE | re.MULTILINE)][:2] == [*labels[:2]]


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

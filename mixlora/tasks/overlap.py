"""Rows that are both trained on and scored.

exact      the same question with the same options or with the same right answer, but for case, punctuation (not the
           signs of numbers, nor pictures) and the order of the options; what "the same question" means is the task's
           `identity`. In the public sets: OpenBookQA 15 test and 8 validation rows, CoLA 19, ARC-Easy 4 and 1, PIQA 4,
           MBPP 3, SST-2 2, ARC-Challenge 1, BoolQ 1.
resembling 13 words in a row in common (question; for code, question and program), as contamination studies count.
           Stock phrases and shared passages resemble too, so it is only said. In the public sets: 53 test rows of
           MBPP, 16 of ARC-Easy and 6 of ARC-Challenge (trained on both), 3 of GSM8K, 415 of MedQA (stock phrases).
"""

import functools
import hashlib
import itertools
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mixlora.tasks.example import Example

WORD = re.compile(r"\w+")
# A word; a sign that is no punctuation; - * / % between numbers or letters that stand alone, and - before a number; the
# % of a number, the # of such a letter (C#), and ! of either before another sign (5!?, n! + 1), for at the end of a
# sentence it says nothing.
ASKED = re.compile(
    r"\w+|!=|[+=<>^≤≥≠]|(?:(?<=[\d)\]])|(?<=\d[a-z])|(?<=\b[a-z])) ?[-*/%](?= ?(?:[$(\[]?\d|[a-z]\b))|(?<![\w)])-(?=\d)"
    r"|(?:(?<=\d)|(?<=\d\))|(?<=\b[a-z]))!(?=\s*[-+*/=<>^?)!\d])|(?<=\d) ?%|(?<=\b[a-z])#"
)
SIGNS = str.maketrans("×÷−·", "*/-*")
LISTED = 5
RUN = 13
REMEDY = "data.overlap=drop leaves them out of training, data.overlap=note only says so"
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


def keys(example: Example) -> tuple[bytes, ...]:
    """Digests by which two examples are the same question: of its text with the options in any order, and of its text
    with the right answer, where other wrong options stand beside it."""
    text, options = folded(example.identity or example.question), sorted(map(folded, example.options))
    asked = [("options", *options), *([("answer", folded(example.answer))] if options else [])]
    return tuple(hashlib.blake2b("|".join([text, *parts]).encode(), digest_size=16).digest() for parts in asked)


def folded(text: str) -> str:
    """Words in small letters, and the signs that make another question of the same words; a text without either as it
    is."""
    pattern, text = ASKED, text.lower()
    if not text.isascii():
        pattern, text = asked_with_marks(), unicodedata.normalize("NFC", text).translate(SIGNS)
    return " ".join(map(str.strip, pattern.findall(text))) or text.strip()


@functools.cache
def asked_with_marks() -> re.Pattern[str]:
    """ASKED for scripts whose vowels are marks beside a letter, which are no part of a word to Python, and for symbols:
    of mathematics and pictures, not those that begin an item of a list or follow a name."""
    kinds = defaultdict(list)
    for character in map(chr, range(sys.maxunicode + 1)):
        kinds[unicodedata.category(character)].append(character)
    marks = "".join(c for kind in ("Mn", "Mc", "Me") for c in kinds[kind] if "VARIATION" not in unicodedata.name(c))
    symbols = "".join(c for c in kinds["Sm"] + kinds["So"] if not c.isascii() and c not in "●■▪◆►✓©®™")
    return re.compile(ASKED.pattern.replace(r"\w", rf"[\w{marks}]", 1) + f"|[{symbols}]")


class Runs:
    """Hashes of all runs of 13 words, in texts whose words are numbered alike."""

    def __init__(self) -> None:
        self.numbers: defaultdict[str, int] = defaultdict(itertools.count(1).__next__)

    def of(self, examples: Sequence[Example]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """(hash of each run, place of its example). h = sum_j w_j F^j modulo 2^64, w a word's spread number."""
        numbers, words, owners = self.numbers, list[int](), []
        for place, example in enumerate(examples):
            found = WORD.findall(text_of(example).lower())
            words += map(numbers.__getitem__, found)
            owners.append(np.full(len(found), place))
        owner_W = np.concatenate([*owners, np.empty(0, dtype=np.int64)]).astype(np.int64)
        if len(words) < RUN:
            return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
        word_W = spread(np.array(words, dtype=np.uint64))
        hash_N = np.zeros(len(words) - RUN + 1, dtype=np.uint64)
        for j in range(RUN):
            hash_N = hash_N * FACTOR + word_W[j : len(words) - RUN + 1 + j]
        within = owner_W[: len(hash_N)] == owner_W[RUN - 1 :]
        return hash_N[within], owner_W[: len(hash_N)][within]


def spread(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Well mixed bits (the finaliser of splitmix64), so that small numbers do not collide."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def text_of(example: Example) -> str:
    """What is compared: the question and, where it asks for a program, the program. Options repeat by their nature."""
    asked = example.identity or example.question
    return f"{asked}\n{example.answer}" if example.entry_point else asked


def resembling(examples: Sequence[Example], trained: Sequence[Example]) -> list[str]:
    """The ids of the examples that share a run of 13 words with a training row."""
    runs = Runs()
    (hash_N, owner_N), (known_M, _) = runs.of(examples), runs.of(trained)
    return [examples[place].id for place in np.unique(owner_N[np.isin(hash_N, known_M)])]


def message(ids: Sequence[str], tested: Sequence[Example], split: str) -> str:
    return f"task {tested[0].task}: {len(ids)} of {len(tested):,} {split} rows are also trained on: {listed(ids)}"


def listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:LISTED]) + (", ..." if len(ids) > LISTED else "")

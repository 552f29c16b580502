"""Rows that are both trained on and scored: the same question with the same options, but for case and punctuation.

Found so in the public sets: OpenBookQA 14 test rows, CoLA 19, ARC-Easy 3, PIQA 2, SST-2 2. What only resembles (a
shared passage, a run of words) is not looked for.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from mixlora.tasks.example import Example

WORD = re.compile(r"\w+")
LISTED = 5


def question(example: Example) -> bytes:
    """A digest of the folded question and its folded options in any order."""
    options = "|".join(sorted(map(folded, example.options)))
    return hashlib.blake2b(f"{folded(example.question)}|{options}".encode(), digest_size=16).digest()


def folded(text: str) -> str:
    return " ".join(WORD.findall(text.lower()))


def questions(examples: Iterable[Example]) -> AbstractSet[bytes]:
    return {question(example) for example in examples}


def among(examples: Sequence[Example], known: AbstractSet[bytes]) -> list[str]:
    """The ids of the examples whose question is `known`."""
    return [example.id for example in examples if question(example) in known]


def message(ids: Sequence[str], tested: Sequence[Example]) -> str:
    listed = ", ".join(ids[:LISTED]) + (", ..." if len(ids) > LISTED else "")
    share = f"{len(ids)} of {len(tested):,} test rows are also trained on: {listed}"
    return f"task {tested[0].task}: {share}. data.overlap=drop leaves them out of training"

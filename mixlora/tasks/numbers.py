"""The number that an answer ends in: what training rows must have, and what replies are read by."""

import math
import re
from decimal import Decimal
from fractions import Fraction

# Digits with commas between them only where thousands stand; a fraction needs a digit on both sides of the slash.
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?!\w))?"
# Not within a word, but behind its full stop: Rs.107, No.5.
VALUE = rf"(?:{DIGITS})(?:\s?/\s?\d+(?:\.\d+)?)?"
# A sign stands at its number: "cost - $18" and a list's "- 18 eggs" are 18. Behind #### there is nothing else to it.
NUMBER = re.compile(rf"(?:(?<![\w.])|(?<=[A-Za-z]\.))(?:(?:(?<!-)-)?(?:\$\s?)?|\$\s?-){VALUE}")
STRICT = re.compile(rf"####\s*((?:(?:-\s?)?(?:\$\s?)?|\$\s?-){VALUE})")
# What makes the last number of an answer a part of another value: a time, a mixed fraction, blanks or a comma between
# digits, a power, a root, a fraction of TeX.
BEFORE = re.compile(
    r"(?:\^\{?|\}\{|\\(?:[dt]?frac|sqrt)\{|√|\d ?(?:[:×x·]|\*{1,2}) ?|\d['’]|[\d)]/|\d[ ,\u00a0\u202f])$"
)
AFTER = re.compile(r"\^\{?-?\d|[½⅓⅔¼¾²³⁰-⁹]|\*\*\d|['’]\d")
MINUS = str.maketrans(dict.fromkeys("−–﹣－", "-"))
TEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d)")
EXACT = 1e15  # up to here every whole number is a float


def plain(text: str) -> str:
    """With one sign for minus and one for thousands."""
    return TEX_COMMA.sub(",", text.translate(MINUS))


def strict_number(text: str) -> str | None:
    """The number after the first `####`, as GSM8K's answers end; None where there is none."""
    found = STRICT.search(plain(text))
    return canonical_number(found[1]) if found else None


def last_number(text: str) -> str | None:
    """The last number anywhere: 1,234 and $18 and 3/4 and -2.50 count, a unit after it does not matter."""
    found = NUMBER.findall(plain(text))
    return canonical_number(found[-1]) if found else None


def more_than_a_number(text: str) -> str | None:
    """The end of an answer whose last number, which `last_number` takes for the whole, is a part of another value."""
    text = plain(text)
    found = [*NUMBER.finditer(text)]
    if not found:
        return None
    before, after = text[: found[-1].start()], text[found[-1].end() :]
    return (before[-8:] + text[found[-1].start() :]).strip() if BEFORE.search(before) or AFTER.match(after) else None


def canonical_number(text: str) -> str:
    """One spelling for equal numbers: "1,234.50" -> "1234.5", "3/4" -> "0.75". Fractions are compared as floats are,
    whole numbers exactly."""
    digits = re.sub(r"[,$\s]", "", text)
    above, _, below = digits.partition("/")
    below = below if below and float(below) else "1"
    value = float(above) / float(below)
    if not math.isfinite(value):  # hundreds of digits
        return digits
    if max(abs(float(above)), abs(value)) >= EXACT:
        exact = Fraction(Decimal(above)) / Fraction(Decimal(below))
        return str(exact.numerator) if exact.denominator == 1 else repr(float(exact))
    return str(int(value)) if value == int(value) else repr(value)

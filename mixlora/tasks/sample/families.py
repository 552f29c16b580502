"""The problems of `programs` that come in families: one a number.

Each is written as the text of its solution and, apart from it, as a function that gives the expected values.

v what the function is called with   k the number that names a family's member
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """`{k}` in a text stands for one of `numbers`, which `solve` gets as k."""

    name: str
    argument: str
    text: str
    body: str
    solve: Callable[..., Any]
    numbers: tuple[int, ...] = ()


P = Problem
FAMILIES = (
    P(
        "add_{k}",
        "items",
        "add {k} to every number of a list",
        "return [item + {k} for item in items]",
        lambda v, k: [k - -i for i in v],
        (2, 3, 5),
    ),
    P(
        "count_above_{k}",
        "items",
        "count the numbers of a list that are larger than {k}",
        "return sum(1 for item in items if item > {k})",
        lambda v, k: len([i for i in v if i > k]),
        (2, 4, 6),
    ),
    P(
        "repeat_{k}_times",
        "text",
        "repeat a text {k} times",
        "return text * {k}",
        lambda v, k: "".join([v] * k),
        (2, 3, 4),
    ),
    P(
        "first_{k}",
        "items",
        "return the first {k} numbers of a list",
        "return items[:{k}]",
        lambda v, k: [i for n, i in enumerate(v) if n < k],
        (2, 3, 4),
    ),
    P("times_{k}", "number", "multiply a number by {k}", "return number * {k}", lambda v, k: sum([v] * k), (3, 4, 6)),
    P(
        "is_multiple_of_{k}",
        "number",
        ("check whether a number can be divided by {k} without remainder"),
        "return number % {k} == 0",
        lambda v, k: v // k * k == v,
        (2, 3, 7),
    ),
    P(
        "scale_{k}",
        "items",
        "multiply every number of a list by {k}",
        "return [item * {k} for item in items]",
        lambda v, k: [sum([i] * k) for i in v],
        (2, 4, 10),
    ),
    P(
        "words_longer_than_{k}",
        "words",
        "keep the words of a list that have more than {k} letters",
        "return [word for word in words if len(word) > {k}]",
        lambda v, k: [w for w in v if w[k:]],
        (2, 3, 5),
    ),
    P(
        "drop_last_{k}",
        "text",
        "cut the last {k} characters off a text",
        "return text[:-{k}]",
        lambda v, k: "".join(c for n, c in enumerate(v) if n < len(v) - k),
        (1, 2, 3),
    ),
    P(
        "power_{k}",
        "number",
        "raise a number to the power {k}",
        "return number ** {k}",
        lambda v, k: math.prod([v] * k),
        (2, 3, 4),
    ),
    P(
        "sum_below_{k}",
        "items",
        "add up the numbers of a list that are smaller than {k}",
        ("total = 0\nfor item in items:\n    if item < {k}:\n        total += item\nreturn total"),
        lambda v, k: sum(i for i in v if i < k),
        (4, 6, 9),
    ),
    P(
        "every_{k}th",
        "items",
        ("take every {k}th number of a list, beginning with the first"),
        "return items[::{k}]",
        lambda v, k: [i for n, i in enumerate(v) if n % k == 0],
        (4, 5, 6),
    ),
    P(
        "pad_to_{k}",
        "text",
        ("fill a text with dots on the right until it has {k} characters"),
        "while len(text) < {k}:\n    text += '.'\nreturn text",
        lambda v, k: v.ljust(k, "."),
        (5, 8, 12),
    ),
    P(
        "cap_at_{k}",
        "items",
        ("replace the numbers of a list that are larger than {k} by {k}"),
        "return [min(item, {k}) for item in items]",
        lambda v, k: [k if i > k else i for i in v],
        (3, 5, 8),
    ),
    P(
        "remainders_{k}",
        "items",
        ("give the remainder of every number of a list on division by {k}"),
        "return [item % {k} for item in items]",
        lambda v, k: [i - i // k * k for i in v],
        (2, 3, 5),
    ),
    P(
        "initials_{k}",
        "words",
        "give the first {k} letters of every word of a list",
        "return [word[:{k}] for word in words]",
        lambda v, k: ["".join(list(w)[:k]) for w in v],
        (1, 2, 3),
    ),
    P("minus_{k}", "number", "subtract {k} from a number", "return number - {k}", lambda v, k: -(k - v), (2, 5, 9)),
    P(
        "any_equal_{k}",
        "items",
        "check whether a list holds the number {k}",
        "return {k} in items",
        lambda v, k: any(i == k for i in v),
        (2, 5, 7),
    ),
    P(
        "count_words_of_{k}",
        "words",
        "count the words of a list that have exactly {k} letters",
        ("count = 0\nfor word in words:\n    if len(word) == {k}:\n        count += 1\nreturn count"),
        lambda v, k: [len(w) for w in v].count(k),
        (2, 3, 5),
    ),
    P(
        "divide_by_{k}",
        "number",
        "divide a number by {k} and round down",
        "return number // {k}",
        lambda v, k: divmod(v, k)[0],
        (2, 3, 5),
    ),
    P(
        "last_{k}",
        "items",
        "return the last {k} numbers of a list",
        "return items[-{k}:]",
        lambda v, k: [*reversed([*reversed(v)][:k])],
        (2, 3, 4),
    ),
    P(
        "has_length_{k}",
        "text",
        "check whether a text has exactly {k} characters",
        "return len(text) == {k}",
        lambda v, k: sum(1 for _ in v) == k,
        (1, 6, 11),
    ),
    P(
        "above_{k}",
        "items",
        "keep the numbers of a list that are larger than {k}",
        "return [item for item in items if item > {k}]",
        lambda v, k: list(filter(lambda i: i > k, v)),
        (2, 4, 6),
    ),
    P(
        "join_with_{k}_dashes",
        "words",
        "join the words of a list with {k} dashes between them",
        "return ('-' * {k}).join(words)",
        lambda v, k: "".join("-" * k * (n > 0) + w for n, w in enumerate(v)),
        (1, 2, 3),
    ),
    P(
        "at_least_{k}",
        "number",
        "return a number, or {k} if the number is smaller",
        "return max(number, {k})",
        lambda v, k: v if v > k else k,
        (1, 5, 10),
    ),
    P(
        "sum_of_first_{k}",
        "items",
        "add up the first {k} numbers of a list",
        "return sum(items[:{k}])",
        lambda v, k: sum(i for n, i in enumerate(v) if n < k),
        (2, 3, 4),
    ),
    P(
        "move_by_{k}",
        "items",
        "move the first {k} numbers of a list to its end",
        "return items[{k}:] + items[:{k}]",
        lambda v, k: v[k:] + v[:k],
        (1, 2, 3),
    ),
    P(
        "count_multiples_of_{k}",
        "items",
        "count the numbers of a list that are multiples of {k}",
        "return len([item for item in items if item % {k} == 0])",
        lambda v, k: sum(i // k * k == i for i in v),
        (3, 4, 5),
    ),
    P(
        "character_{k}",
        "text",
        ("return the character at place {k} of a text, or an empty text if it is too short"),
        "if len(text) <= {k}:\n    return ''\nreturn text[{k}]",
        lambda v, k: "".join(list(v)[k : k + 1]),
        (1, 2, 4),
    ),
    P(
        "distance_to_{k}",
        "number",
        "return how far a number is from {k}",
        "return abs(number - {k})",
        lambda v, k: max(v - k, k - v),
        (3, 6, 10),
    ),
    P(
        "without_{k}",
        "items",
        "remove every {k} from a list",
        "return [item for item in items if item != {k}]",
        lambda v, k: [*filter(k.__ne__, v)],
        (2, 5, 8),
    ),
    P(
        "shorter_than_{k}",
        "words",
        "count the words of a list that have fewer than {k} letters",
        "return sum(len(word) < {k} for word in words)",
        lambda v, k: len([w for w in v if len(w) < k]),
        (3, 4, 6),
    ),
    P(
        "smaller_than_{k}",
        "number",
        "check whether a number is smaller than {k}",
        "return number < {k}",
        lambda v, k: v - k < 0,
        (2, 4, 8),
    ),
)

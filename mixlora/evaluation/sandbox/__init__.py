"""Generated code, run where it can do no harm, and judged where it cannot lie.

    from mixlora.evaluation.sandbox import Problem, Sandbox, completion_of, pass_at_k

    with Sandbox(workers=2) as box:
        verdicts = box.judge([(problem, completion_of(reply, problem)), ...])

The verdict. Two processes, each in a box of its own. The *candidate* has the generated code and answers calls. The
*checker* has the tests and calls through stand-ins. Plain values travel between them, as JSON that the host passes on
unread. So equality, exceptions, exit codes, prints, patched modules and walks through frames of the candidate happen
beside other frames than those of the tests. Only the checker, having come to the end of its tests, says "passed".

The box (bubblewrap, or nothing: without it `require()` raises SandboxError, and no code runs):
  files      the system's shared libraries and a bare Python, read-only; a private folder of 16 MiB that is new for each
             sample. No home, /etc, /proc, /sys, no shell, no packages (so no data sets with reference answers).
  network    an empty network namespace, and no system call that opens a socket.
  processes  a pid namespace that ends with the verdict; one process, up to 32 threads; an allow-list of system calls.
  memory     1 GiB of address space a process, hence 2 GiB a judgement, plus the private folder.
  time       CPU seconds (`timeout`) by the kernel, four times as much on the clock by the host, outside of the box.
  privilege  no environment, no capabilities, no_new_privs, a user namespace; root becomes nobody before it starts.

What it does not cover: a bug in the kernel or in bubblewrap; side channels of the CPU, the clock and the caches; how
many files the private folder holds (the CPU limit bounds it: about 1 KiB of kernel memory each); a candidate that
knows the tests by heart. Nor does it promise fairness: a sample may use all of its CPU seconds.

What a plain value is: None, bool, numbers (also complex, Fraction, Decimal), dates and times, str, bytes, list, tuple,
set, frozenset, dict and its views, deque, range, built-in types, and iterators of up to 100,000 values, nested up to
200 deep, 4 MiB as JSON. A subclass arrives as its base. Any other object stays in the candidate, and the tests hold a
number for it, which they may pass to another call; its attributes and its equality with another object are not theirs
to see. Changes that the candidate makes to an argument do not travel back, and the tests' own objects do not travel at
all: tests that pass a function fail every candidate, and the verdict says so. Honest programs cannot start processes
or use packages.

With `accept_unsandboxed=True` there are still two processes, plain values and limits, but no box; results say so.
"""

from mixlora.evaluation.sandbox.completion import completion_of
from mixlora.evaluation.sandbox.problem import Problem, from_humaneval, from_mbpp, from_row
from mixlora.evaluation.sandbox.sandbox import Sandbox, Verdict, require
from mixlora.evaluation.sandbox.scores import mean_pass_at_k, pass_at_k

__all__ = [
    "Problem",
    "Sandbox",
    "Verdict",
    "completion_of",
    "from_humaneval",
    "from_mbpp",
    "from_row",
    "mean_pass_at_k",
    "pass_at_k",
    "require",
]

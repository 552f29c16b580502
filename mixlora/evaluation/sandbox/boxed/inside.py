"""What runs inside a box: the candidate, which answers calls, or the checker, which makes them.

Frames on standard input and output are `kind (1 byte), length (4 bytes, big endian), payload (JSON or text)`:

    host -> both        P program                      both -> host       H the box runs
    host -> candidate   C call                         candidate -> host  R loaded, F why not, V value, E exception
    host -> checker     V value, E exception           checker -> host    C call, T tests passed, F tests failed

Standard library only: this file runs inside the box.
"""

import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from .values import LARGEST_FRAME, UNFIT, Remote, decode, encode

Program = dict[str, Any]  # role, context, source, entry_point, limits


class CandidateError(Exception):
    """An exception of the candidate that is not one of Python's own, or that must not end the checker."""


class Unsendable(BaseException):
    """The tests give the candidate what cannot travel. Not an Exception, which tests may expect and catch."""


class Port:
    """The two file descriptors to the host, moved away from where `print` and `input` would find them."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.dup(0), os.dup(1)
        quiet = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(quiet, fd)
        os.close(quiet)

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        data = memoryview(kind + len(payload).to_bytes(4, "big") + payload)
        while data:
            data = data[os.write(self.write_fd, data) :]

    def receive(self) -> tuple[bytes, bytes]:
        head = self.exactly(5)
        return head[:1], self.exactly(int.from_bytes(head[1:], "big"))

    def exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.read_fd, min(size, 1 << 16))
            if not part:
                os._exit(0)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class Candidate:
    """The generated code, loaded once, and the objects of its own that the tests hold a number for."""

    def __init__(self, program: Program):
        self.program, self.namespace, self.kept = program, dict[str, Any](), list[Any]()

    def load(self) -> None:
        self.namespace = fresh_module("candidate")
        run(self.program["source"], "<candidate>", self.namespace)
        run(self.program["context"], "<fixtures>", self.namespace)

    def answer(self, message: bytes) -> Any:
        call = json.loads(message)
        args, kwargs = decode(call["args"], self.look_up), decode(call["kwargs"], self.look_up)
        return encode(self.look_up(call["to"])(*args, **kwargs), self.keep)

    def look_up(self, target: int | str) -> Any:
        if isinstance(target, int):
            return self.kept[target]
        if target not in self.namespace:
            raise NameError(f"name '{target}' is not defined")
        return self.namespace[target]

    def keep(self, value: Any) -> int:
        for number, known in enumerate(self.kept):
            if known is value:
                return number
        self.kept.append(value)
        return len(self.kept) - 1


def be_candidate(port: Port, program: Program) -> None:
    """Load the code, then answer calls until the host closes the pipe."""
    candidate, send, receive = Candidate(program), port.send, port.receive
    loaded, payload = outcome(candidate.load)
    if loaded:
        send(b"R")
    else:
        send(b"F", "{type}: {text}".format(**json.loads(payload)).encode(errors="replace"))
    while True:
        good, payload = outcome(candidate.answer, receive()[1])
        send(b"V" if good else b"E", payload)


def outcome(work: Callable[..., Any], *args: Any) -> tuple[bool, bytes]:
    """(True, its value) or (False, its exception), as bytes to send. SystemExit is an exception like any other."""
    try:
        payload = json.dumps(work(*args)).encode()
        if len(payload) > LARGEST_FRAME:
            raise ValueError(f"the reply has {len(payload)} bytes, more than {LARGEST_FRAME}")
        return True, payload
    except BaseException as error:
        return False, json.dumps({"type": type(error).__name__, "text": text_of(error)}).encode()


def text_of(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except Exception:
        return ""


class Checker:
    """The tests, and the stand-ins through which they call the candidate."""

    def __init__(self, port: Port, program: Program):
        self.port, self.program, self.remotes = port, program, dict[int | str, Remote]()

    def check(self) -> None:
        """Run the tests to their end; everything that only the candidate can define is a stand-in."""
        namespace = fresh_module("checker")
        run(self.program["context"], "<context>", namespace)
        tests = compile(self.program["source"], "<tests>", "exec", dont_inherit=True)
        missing = names_in(tests) - set(namespace) - set(dir(builtins))
        namespace.update({name: self.remote(name) for name in missing | {self.program["entry_point"]}})
        seed_random(self.program["source"])
        exec(tests, namespace)

    def remote(self, target: int | str) -> Remote:
        """One stand-in for each object of the candidate, so that `is` and `==` mean what they should."""
        if type(target) not in (int, str):
            raise ValueError("malformed reference")
        return self.remotes.setdefault(target, Remote(target, self.ask))

    def ask(self, target: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call -> the candidate's value, or its exception raised here."""
        try:
            call = {"to": target, "args": encode(args), "kwargs": encode(kwargs)}
        except (TypeError, ValueError) as error:
            raise Unsendable(f"{UNFIT}: {error}") from error
        self.port.send(b"C", json.dumps(call).encode())
        kind, payload = self.port.receive()
        if kind == b"E":
            raise exception_of(json.loads(payload))
        return decode(json.loads(payload), self.remote)


def be_checker(port: Port, program: Program) -> None:
    """Run the tests and tell the host how they ended. Coming to their end is the only way to a pass."""
    try:
        Checker(port, program).check()
    except BaseException as error:
        port.send(b"F", reason(error, program["source"])[:300].encode(errors="replace"))
    else:
        port.send(b"T")


def exception_of(told: dict[str, str]) -> Exception:
    """What the candidate raised, as Python's own exception of that name where there is one that tests may catch."""
    name, text = str(told["type"])[:100], str(told["text"])[:300]
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its like want more than a text
            pass
    return CandidateError(f"{name}: {text}")


def reason(error: BaseException, tests: str) -> str:
    """Why the tests failed, for a person; an assertion without a message is named by its line of the tests."""
    if isinstance(error, CandidateError | Unsendable):
        return str(error)
    if str(error):
        return f"{type(error).__name__}: {error}"
    trace, number = error.__traceback__, 0
    while trace:
        number = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<tests>" else number
        trace = trace.tb_next
    return f"{type(error).__name__}: {tests.splitlines()[number - 1].strip()}" if number else type(error).__name__


def fresh_module(name: str) -> dict[str, Any]:
    """An empty module -> its namespace. dataclasses and typing look modules up by name."""
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name].__dict__


def run(source: str, label: str, namespace: dict[str, Any]) -> None:
    seed_random(source)
    exec(compile(source, label, "exec", dont_inherit=True), namespace)


def seed_random(source: str) -> None:
    """The same verdict tomorrow, without the cost of the import where nobody needs it."""
    if "random" in source:
        import random

        random.seed(0)


def names_in(code: types.CodeType) -> set[str]:
    """Every name that a code object or one within it reads."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


def limit(limits: list[tuple[str, int, int]]) -> None:
    """[[name, soft, hard], ...], for good: a hard limit cannot be raised again without a capability."""
    import resource

    for name, soft, hard in limits:
        resource.setrlimit(getattr(resource, name), (soft, hard))


def main() -> None:
    port = Port()
    port.send(b"H")
    program = json.loads(port.receive()[1])
    limit(program["limits"])
    {"candidate": be_candidate, "checker": be_checker}[program["role"]](port, program)

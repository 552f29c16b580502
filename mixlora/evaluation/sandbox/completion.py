"""From a model's reply to the code that is judged: a pure function of text, and it never parses or runs the text.

1. A fenced block, if there is one: the first that defines the function, else the first of all. Without fences, prose
   before the first line of code goes.
   Up to three blanks before its first word go: a tokenizer spells that word with one, or has taken one of four away.
2. Whole functions: from the first top-level import, definition or assignment on, to the end of the function that is
   asked for. Of the definitions and imports below it, up to a line of another kind (an assignment, `if __name__`,
   `print(...)`, prose) or the function once more, those that it, the tests or one another name: others run for nothing,
   and the last of a reply that was cut off breaks them all.
3. A continuation of the prompt: up to the first line at the left margin, as in the Codex paper's stop sequences
   (arXiv:2107.03374, section 3.2). A lost indentation of the first line or of all lines is given back.

What the rule gets wrong is a failing sample: whatever it returns runs in the sandbox.
"""

import itertools
import re

from mixlora.evaluation.sandbox.problem import Problem

FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*[\w+.-]*[ \t]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
DEFINITION = re.compile(r"(def|class|async def)\s+\w+|@\w")
IMPORT = re.compile(r"import\s+\w[\w., ]*$|import\s+\w[\w.]*(\s+as\s+\w+|\s*,.*)|from\s+[\w.]+\s+import\s")
NAMED = re.compile(r"^(?:async )?(?:def|class)\s+(\w+)", re.MULTILINE)
ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*(\s*:\s*[\w.\[\], ]+)?\s*=[^=]|[A-Za-z_]\w*(\s*,\s*[A-Za-z_]\w*)+\s*=[^=]")
KEYWORD = r"(return|yield|raise|assert|if|for|while|with|try|import|from|del|global|nonlocal)\b"
STATEMENT = re.compile(rf" ({KEYWORD}|[a-z_][\w.\[\], ]*=[^=])")
BEGINS = re.compile(rf"{DEFINITION.pattern}|{IMPORT.pattern}|{ASSIGNMENT.pattern}|{KEYWORD}|[\w.]+\(")
COMPLETION_VERSION = 6  # raised by one whenever the same reply would become another program
BODY = "    pass\n\n\n"


def completion_of(text: str, problem: Problem) -> str:
    """A reply -> what to append to `problem.prefix`; always ends in a newline."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4)
    defines = re.compile(rf"^(async )?def {re.escape(problem.entry_point)}\b", re.MULTILINE)
    code = flush(fenced(text, defines), defines)
    if problem.continues and not defines.search(code):
        return body(code)
    # `check` of HumanEval's tests is their own: one in the reply is another.
    said = words(problem.fixtures) | words(problem.tests) - set(NAMED.findall(problem.tests))
    whole = whole_functions(code, defines, said)
    return f"{BODY}{whole}" if problem.continues else whole


def fenced(text: str, defines: "re.Pattern[str]") -> str:
    """The block of code in a reply: see rule 1. An unclosed fence reaches to the end (the reply was cut)."""
    before = re.split(r"^[ \t]*(?:```|~~~)", text, maxsplit=1, flags=re.MULTILINE)[0]
    first = before.strip("\n")
    if first.startswith("  ") or defines.search(before):  # code from the start; the fence closes it
        return before
    blocks = [match.group(2) for match in FENCE.finditer(text)]
    defining = next((block for block in blocks if defines.search(block)), None)
    if defining is None and STATEMENT.match(first):  # one blank begins many a reply, in words or in code
        return before
    return defining or (blocks[0] if blocks else text)


def flush(code: str, defines: "re.Pattern[str]") -> str:
    """Without up to three blanks before code that begins with them (rule 1). Lines below lose as many where one is no
    deeper than the first. Of a body nothing is kept from the margin on, which could no longer be told from it."""
    first, *rest = code.lstrip("\n").split("\n")
    margin, text = depth(first), first.lstrip(" ")
    if not 0 < margin < 4 or defines.search(code) or not BEGINS.match(text):
        return code
    inside = list(itertools.takewhile(lambda line: not line.strip() or depth(line), rest))
    outside = rest[len(inside) :] if DEFINITION.match(text) or IMPORT.match(text) else []
    if any(line.strip() and depth(line) <= margin for line in inside):
        inside = [line[margin:] for line in inside]
    return "\n".join([text, *inside, *outside])


def depth(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def whole_functions(code: str, defines: "re.Pattern[str]", said: set[str]) -> str:
    """The function with what stands above and what it needs below, without the prose before: see rule 2."""
    lines = code.split("\n")
    begins = (at for at, line in enumerate(lines) if any(kind.match(line) for kind in (DEFINITION, IMPORT, ASSIGNMENT)))
    first = next(begins, 0)
    asked = next((at for at, line in enumerate(lines) if defines.match(line)), None)
    if asked is None:
        return "\n".join(lines[first:]).strip("\n") + "\n"
    function, *below = blocks(lines[asked:], defines)
    whole = "\n".join([*lines[first:asked], function])
    return "\n\n\n".join([whole, *needed(below, words(whole) | said)]) + "\n"


def blocks(lines: list[str], defines: "re.Pattern[str]") -> list[str]:
    """The function that begins here, and the definitions and imports that follow it. A decorator begins what it
    decorates, and comments before the next one go."""
    found: list[list[str]] = []
    for line in lines:
        if found and goes_on(line, found[-1]):
            found[-1].append(line)
        elif (found and defines.match(line)) or not (DEFINITION.match(line) or IMPORT.match(line)):
            break
        elif found and found[-1][0].startswith("@") and not any(map(NAMED.match, found[-1])):
            found[-1].append(line)
        else:
            found.append([line])
    return [re.sub(r"(\n(#.*| *))+\Z", "", "\n".join(block)) for block in found]


def goes_on(line: str, block: list[str]) -> bool:
    """Whether a line belongs to the block above, be it at the left margin: a comment, the end of a bracket, a text."""
    if not line or line[0].isspace() or line[0] in "#)]}":
        return True
    return any("\n".join(block).count(quotes) % 2 for quotes in ('"""', "'''"))


def needed(below: list[str], said: set[str]) -> list[str]:
    """The blocks that bind a word which is said, by one of them too, in their order."""
    while True:
        kept = [block for block in below if binds(block) & said or block.endswith("import *")]
        more = said.union(*map(words, kept))
        if more == said:
            return kept
        said = more


def binds(block: str) -> set[str]:
    """The name of a definition, or those that an import says."""
    named = NAMED.search(block)
    if named:
        return {named.group(1)}
    return set() if block.startswith("@") else words(block) - {"from", "import", "as"}


def words(code: str) -> set[str]:
    return set(re.findall(r"\w+", code))


def body(code: str) -> str:
    """The rest of a function whose head is in the prompt: see rule 3."""
    lines = code.strip("\n").rstrip().split("\n")
    if lines[0] and not lines[0][0].isspace():
        lines = indented(lines)
    kept: list[str] = []
    for line in lines:
        if kept and line and not line[0].isspace() and any(part.strip() for part in kept):
            break
        kept.append(line)
    return "\n".join(kept).rstrip() + "\n"


def indented(lines: list[str]) -> list[str]:
    """Give the lost indentation back: to the first line, or to all where the second shows that all have lost it."""
    depths = [depth(line) for line in lines[1:] if line.strip()]
    opens = lines[0].rstrip().endswith((":", "(", "[", "{"))
    only_first = bool(depths) and depths[0] >= (5 if opens else 4)  # what is opened is often two deeper, not four
    if only_first:
        return [f"    {lines[0]}", *lines[1:]]
    if DEFINITION.match(lines[0]):  # a program of its own, without the function that was asked for
        return lines
    return [f"    {line}" if line.strip() else line for line in lines]

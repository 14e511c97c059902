"""Imports point one way, and each outside library is met in one room."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "engine", "jobs", "benchmarks")
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
FORBIDDEN = {
    "kernels": {"rsr.engine", "rsr.jobs", "vllm", "ray", "click", "transformers", "polars"},
    "engine": {"rsr.jobs", "ray", "click", "polars", "pyarrow"},
    "jobs": {"vllm"},
    "benchmarks": set(),
}

FLOORS = (
    ("errors",),
    ("interrupt",),
    ("storage",),
    ("shards",),
    ("run",),
    ("cluster", "selection", "inspection"),
    ("scoring", "sampling", "evidence", "grading", "export"),
    ("planning", "comparison", "refinement", "demo", "doctor"),
)
"""Of `jobs/`, from the ground: a module imports from its own floor's room or from floors below."""

VLLM_MODULES = {"generation.py", "head.py", "pooler.py", "prefill.py"}


def imports_of(path: Path) -> set[str]:
    """Names of modules, and of things that may be modules, that a file imports anywhere."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def is_command_line(path: Path) -> bool:
    """Whether a module makes or parses commands: it may import from any floor."""
    is_loose = path.parent == ROOT / "jobs"
    return path.name == "cli.py" or (is_loose and path.name in ("command.py", "options.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("rsr", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {name_of(path): path for path in SOURCES}


def floor_of(module: str) -> int | None:
    """The floor of a module of `jobs/`; None of those that belong to the command line."""
    room = module.split(".")[2] if module.count(".") >= 2 else ""
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    return None


@pytest.mark.seconds
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    crossed = {
        module
        for module in imports_of(path)
        for package in FORBIDDEN[path.relative_to(ROOT).parts[0]]
        if is_within(module, package)
    }
    assert not crossed


@pytest.mark.seconds
@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.parts[len(ROOT.parts)] == "jobs"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_jobs_stand_on_floors(path):
    own = name_of(path)
    used = {m for m in imports_of(path) if m in MODULES and is_within(m, "rsr.jobs")}
    if is_command_line(path):
        return
    assert not {m for m in used if is_command_line(MODULES[m])}, "of the command line"
    floor = floor_of(own)
    if floor is None:
        return
    above = {m for m in used if (other := floor_of(m)) is not None and other > floor}
    beside = {m for m in used if floor_of(m) == floor and m.split(".")[2] != own.split(".")[2]}
    assert not above | beside


@pytest.mark.seconds
def test_no_import_comes_back_to_where_it_began():
    graph = {
        name: {m for m in imports_of(path) if m in MODULES and m != name}
        for name, path in MODULES.items()
    }
    # A package's own modules make it up; that it names them is no dependency.
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            graph[name] = {m for m in graph[name] if not is_within(m, name)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.seconds
def test_each_library_is_met_in_one_room():
    def naming(library, room):
        return {
            str(path.relative_to(ROOT))
            for path in SOURCES
            if path.relative_to(ROOT).parts[0] == room
            and any(is_within(module, library) for module in imports_of(path))
        }

    assert all(is_command_line(ROOT / name) for name in naming("click", "jobs"))
    assert {Path(name).parts[1] for name in naming("ray", "jobs")} == {"cluster"}
    assert {Path(name).name for name in naming("vllm", "engine")} == VLLM_MODULES


def test_few_modules_stand_loose_in_jobs():
    loose = {path.name for path in (ROOT / "jobs").glob("*.py")} - {"__init__.py"}
    assert len(loose) <= 7, loose


@pytest.mark.seconds
def test_the_terminal_is_written_to_in_one_file():
    """Whoever prints past `terminal.py` prints markup and control characters of foreign names."""
    past_it = {"rich.console.Console", "rich.table", "rich.text", "rich.markup", "click.echo"}
    printing = set()
    for path in SOURCES:
        used = imports_of(path) | {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        if used & {*past_it, "print"} or any(is_within(m, p) for m in used for p in past_it):
            printing.add(path.relative_to(ROOT).as_posix())
    scripts = {p for p in printing if p.startswith("benchmarks/") and p != "benchmarks/cli.py"}
    assert printing - scripts == {"jobs/terminal.py"}

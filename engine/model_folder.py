"""The folder a student lies in: what must be there, and what a model in it is called.

Knows file names alone, and imports nothing that takes time: a wrong path is refused at once.
"""

import os
from pathlib import Path, PurePath

NUM_TOLD_PARTS = 2
"""Parts of a path that tell a model from others: a checkpoint's, and that of its run."""
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def require_model_folder(model: str, *, with_weights: bool = True) -> None:
    """Raises `ValueError` if `model` is a path and no checkpoint lies there; hub names pass."""
    folder = Path(model)
    if not folder.exists():
        if model.startswith((".", "/", "~")):
            raise ValueError(f"no such model folder: {model}")
        return
    if not folder.is_dir():
        raise ValueError(f"the model {folder} is a file; expected a folder with config.json")
    if not (folder / "config.json").is_file():
        raise ValueError(f"the model folder {folder} has no config.json")
    if with_weights and not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ValueError(
            f"the model folder {folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}"
        )


def told_model(model: str) -> str:
    """What a model is called beside others: its hub name, or the end of its folder's path."""
    return end_of_path(os.path.abspath(model)) if Path(model).is_dir() else model


def end_of_path(path: str) -> str:
    """The last two parts; of models--ORG--NAME/snapshots/COMMIT, in the hub's cache, ORG/NAME."""
    parts = PurePath(path).parts
    cached = [part for part in parts if part.startswith("models--")]
    if cached:
        return cached[-1].removeprefix("models--").replace("--", "/")
    return "/".join(parts[-NUM_TOLD_PARTS:])

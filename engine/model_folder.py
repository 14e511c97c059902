"""The folder a student lies in: what must be there before anything is read from it.

Knows file names alone, and imports nothing that takes time: a wrong path is refused at once.
"""

from pathlib import Path

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

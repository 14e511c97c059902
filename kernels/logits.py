"""What a logit is: the transform from h·w + b to the number that softmax sees.

`raw` below is h·w + b in fp32. The transform is vLLM's LogitsProcessor's: cap, then scale. Knows
nothing of vocabularies, ranks or tiles.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

LogitsDtype = Literal["float32", "model"]


@dataclass(frozen=True)
class LogitTransform:
    """logit = scale · soft_cap · tanh(raw / soft_cap), or scale · raw without a cap.

    Both steps rise strictly, so unrounded logits are *ranked* by `raw`: a saturated tanh then
    cannot tie what the model tells apart. Rounded logits (`round_to`) are ranked as rounded,
    because their ties are what rounding is asked for.
    """

    scale: float = 1.0
    soft_cap: float | None = None
    round_to: torch.dtype | None = None  # None keeps fp32

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {self.scale}")
        if self.soft_cap is not None and not 0 < self.soft_cap < float("inf"):
            raise ValueError(f"soft_cap must be None or positive and finite, got {self.soft_cap}")

    @classmethod
    def of(
        cls,
        model_dtype: torch.dtype,
        scale: float,
        soft_cap: float | None,
        logits_dtype: LogitsDtype,
    ) -> "LogitTransform":
        """The transform for a head in `model_dtype`, which is what "model" stands for."""
        if logits_dtype not in get_args(LogitsDtype):
            raise ValueError(
                f"logits_dtype must be one of {get_args(LogitsDtype)}, got {logits_dtype!r}"
            )
        rounds = logits_dtype == "model" and model_dtype != torch.float32
        return cls(scale, soft_cap, model_dtype if rounds else None)

    @property
    def only_rounds(self) -> bool:
        """Neither cap nor scale: rounding is all that may be left."""
        return self.scale == 1.0 and self.soft_cap is None

    @property
    def is_identity(self) -> bool:
        return self.only_rounds and self.round_to is None

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Logits of `raw`, same shape and dtype; `round_to` rounds the values, not the dtype."""
        logits = raw
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.round_to is not None:
            logits = logits.to(self.round_to).to(raw.dtype)
        return logits

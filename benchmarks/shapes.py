"""Heads of real students, by the names people know them by. Knows nothing of timing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a student's LM head, and of the batch of tokens that a preset scores with it."""

    num_tokens: int
    hidden_size: int
    vocab_size: int

    @property
    def gemm_flops(self) -> int:
        """Multiplications and additions of hidden @ weight.T."""
        return 2 * self.num_tokens * self.hidden_size * self.vocab_size


# Hidden and vocabulary sizes from each checkpoint's config.json.
PRESETS = {
    "smollm2-135m": HeadShape(2048, 576, 49_152),
    "qwen2.5-0.5b": HeadShape(2048, 896, 151_936),
    "qwen2.5-1.5b": HeadShape(1024, 1536, 151_936),
    "gemma-2-2b": HeadShape(8192, 2304, 256_000),
    "gemma-3-1b": HeadShape(8192, 1152, 262_144),
    "qwen2.5-7b": HeadShape(8192, 3584, 152_064),
    "qwen3-8b": HeadShape(8192, 4096, 151_936),
    "llama-3.1-8b": HeadShape(8192, 4096, 128_256),
    "llama-3.1-70b": HeadShape(8192, 8192, 128_256),
}
DEFAULT_PRESETS = {"cpu": ("smollm2-135m",), "cuda": ("qwen3-8b",)}
"""One that takes a minute or two; whoever wants more names it."""

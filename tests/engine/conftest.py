"""Students of any architecture made on the spot, and transformers to hold their scores against.

Classes of transformers are named where they are used: it imports each of them, and what they take
seconds to import, at first use.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
import transformers

from rsr.engine import Trajectory, TrajectoryScore, prefill

MAX_ERROR_NATS = 1e-4
"""Of a surprisal or an entropy. Logits closer to the target's may be on either side of it."""
MIN_DECIDED = 0.95
"""Share of tokens about whose rank that bound must leave no doubt."""
SMALL_KV_CACHE_BYTES = 128 << 20
"""Holds four rows of 32k tokens of a student that is made on the spot."""

SaveStudent = Callable[[transformers.PretrainedConfig, Path], Path]


class AssertLikeTransformers(Protocol):
    """Holds token scores of plain-text trajectories against transformers' float32 logits."""

    def __call__(
        self,
        folder: Path,
        trajectories: Sequence[Trajectory],
        scores: Sequence[TrajectoryScore],
        max_error_nats: float = MAX_ERROR_NATS,
    ) -> None: ...


@pytest.fixture(autouse=True, scope="module")
def small_kv_cache() -> Iterator[None]:
    """vLLM zeroes its whole KV cache, which of the usual 2 GiB takes most of an engine's start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "CPU_KV_CACHE_BYTES", SMALL_KV_CACHE_BYTES)
        yield


@pytest.fixture(autouse=True)
def look_at_model_classes_here(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM imports itself in another process to look at a model class that no cache file tells of.

    On a machine that is new to it that takes a quarter of a minute for each architecture.
    """
    if request.node.get_closest_marker("vllm"):
        prefill.import_vllm()
        from vllm.model_executor.models import registry

        monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look(), raising=False)


@pytest.fixture(scope="session")
def save_student(make_tokenizer: Callable[..., Any]) -> SaveStudent:
    """Saves a random float32 checkpoint of a configuration, with a byte tokenizer, in a folder."""

    def save(config: transformers.PretrainedConfig, folder: Path) -> Path:
        torch.manual_seed(0)
        model = _auto_class(config).from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            # As made, norms are all ones and biases all zeros: forgetting them would not show.
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        make_tokenizer(chat_template=None).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def assert_like_transformers() -> AssertLikeTransformers:
    def check(
        folder: Path,
        trajectories: Sequence[Trajectory],
        scores: Sequence[TrajectoryScore],
        max_error_nats: float = MAX_ERROR_NATS,
    ) -> None:
        # The eager implementation forms all attention scores, 8 GiB for a 32k row; the other leaves
        # out Gemma 2's soft cap on them, and does not exist for GPT-J.
        config = transformers.AutoConfig.from_pretrained(folder)
        attention = "eager" if config.model_type in ("gemma2", "gptj", "mamba2") else "sdpa"
        model = (
            _auto_class(config)
            .from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
            .eval()
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        decided = []
        for trajectory, score in zip(trajectories, scores, strict=True):
            prompt, response = trajectory.prompt or "", trajectory.response or trajectory.text
            ids = tokenizer.encode(prompt + response)
            first = max(1, len(tokenizer.encode(prompt)))
            with torch.inference_mode():
                tokens = {"input_ids": torch.tensor([ids])}
                if config.model_type == "paligemma":
                    # Of no other type of tokens is its attention causal.
                    tokens["token_type_ids"] = torch.ones_like(tokens["input_ids"])
                logits = model(**tokens).logits[0, first - 1 : -1]
            targets = torch.tensor(ids[first:])
            decided += assert_scores_match_logits(score, logits, targets, max_error_nats)
        assert np.mean(decided) > MIN_DECIDED

    return check


def _auto_class(config: transformers.PretrainedConfig) -> Any:
    """What makes a model of `config`: a text model, or one that also takes images."""
    is_text = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return (
        transformers.AutoModelForCausalLM if is_text else transformers.AutoModelForImageTextToText
    )


def assert_scores_match_logits(
    score: TrajectoryScore,
    logits: torch.Tensor,
    targets: torch.Tensor,
    max_error_nats: float = MAX_ERROR_NATS,
) -> list[bool]:
    """Takes (T, V) float32 logits and (T,) targets; returns whose rank rounding cannot change."""
    tokens = score.tokens
    assert tokens is not None
    assert score.num_tokens == len(targets)
    assert tokens.token_ids.tolist() == targets.tolist()
    target_logits = logits.gather(1, targets[:, None])
    lowest = 1 + (logits > target_logits + max_error_nats).sum(1)
    highest = (logits >= target_logits - max_error_nats).sum(1)
    ranks = torch.from_numpy(tokens.ranks)
    assert ((lowest <= ranks) & (ranks <= highest)).all()

    logprobs = logits.log_softmax(1)
    expected = logprobs.gather(1, targets[:, None]).squeeze(1).numpy()
    np.testing.assert_allclose(tokens.logprobs, expected, rtol=0, atol=max_error_nats)
    entropies = -(logprobs.exp() * logprobs).sum(1).numpy()
    np.testing.assert_allclose(tokens.entropies, entropies, rtol=0, atol=max_error_nats)
    return (lowest == highest).tolist()

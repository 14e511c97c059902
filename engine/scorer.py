"""The engine's front door: trajectories in, scores in the same order out.

Knows the order of the steps (encode, prefill, reduce) and none of their insides.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, PretrainedConfig

from rsr.engine.chat import TrajectoryEncoder, load_tokenizer, resolve_chat_template
from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import TrajectoryScore, score_tokens
from rsr.engine.prefill import Prefill, PrefillRequest
from rsr.engine.prefix_reuse import (
    MIN_SHARED_FRACTION,
    clip_spans,
    fill_from_siblings,
    scored_positions,
    shared_fraction,
    wave_order,
)
from rsr.engine.trajectory import EncodedTrajectory, TokenScores, Trajectory

logger = logging.getLogger(__name__)

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


class Scorer:
    """Scores trajectories with one student on one GPU, tensor-parallel group or CPU.

    Making one loads the model. Raises `ValueError` on a model folder that lacks something,
    `RuntimeError` where vLLM cannot run it.
    """

    def __init__(self, config: ScorerConfig) -> None:
        self.config = config
        model_config = load_model_config(config)
        self.max_model_len = config.max_model_len or native_max_model_len(model_config)
        tokenizer = load_tokenizer(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        self._encoder = TrajectoryEncoder(
            tokenizer,
            chat_template=resolve_chat_template(tokenizer, config.chat_template),
            max_model_len=self.max_model_len,
            truncate=config.on_long == "truncate",
            score_end_of_turn=config.score_end_of_turn,
        )
        self._prefill = Prefill(
            config,
            architectures=model_config.architectures,
            max_model_len=self.max_model_len,
        )

    def score(self, trajectories: Sequence[Trajectory]) -> list[TrajectoryScore]:
        """One score per trajectory, in input order; a bad row gets a status, never an exception.

        Depends on `trajectories` alone, not on what was scored before.
        """
        encoded = [self._encoder.encode(trajectory) for trajectory in trajectories]
        usable = [index for index, e in enumerate(encoded) if e.status.is_scored]
        arrays = self._score_tokens([encoded[index] for index in usable])
        by_index = dict(zip(usable, arrays, strict=True))
        return [
            self._reduce(e, by_index[index])
            if index in by_index
            else TrajectoryScore(e.status, rank_clip=self.config.rank_clip, detail=e.detail)
            for index, e in enumerate(encoded)
        ]

    def _score_tokens(self, batch: list[EncodedTrajectory]) -> list[NDArray[np.float32]]:
        """A (T, 4) array of `pooler.OUTPUT_COLUMNS` for each, every scored position present."""
        reuse = self.config.prefix_reuse == "on" or (
            self.config.prefix_reuse == "auto" and shared_fraction(batch) >= MIN_SHARED_FRACTION
        )
        order = wave_order(batch) if reuse else list(range(len(batch)))
        if reuse:
            self._prefill.forget_prefixes()
        results = self._prefill.score(
            [PrefillRequest(batch[i].token_ids, batch[i].spans) for i in order],
            reuse_prefixes=reuse,
        )
        arrays = [result for _, result in sorted(zip(order, results, strict=True), key=_first)]
        gaps = fill_from_siblings(batch, arrays, order)
        # The tokens up to the gap's end are enough: what comes after it is scored already.
        filled = self._prefill.score(
            [
                PrefillRequest(batch[i].token_ids[:end], clip_spans(batch[i].spans, end))
                for i, end in gaps.items()
            ]
        )
        for index, front in zip(gaps, filled, strict=True):
            arrays[index] = np.concatenate([front, arrays[index]])
        return arrays

    def _reduce(self, encoded: EncodedTrajectory, array: NDArray[np.float32]) -> TrajectoryScore:
        positions, ranks, logprobs, entropies = array.T
        expected = scored_positions(encoded)
        # A lost token would be a wrong score that looks right.
        assert np.array_equal(positions, expected), "the engine lost or reordered scored tokens"
        tokens = TokenScores(
            token_ids=np.asarray(encoded.token_ids, dtype=np.int32)[expected],
            ranks=ranks.astype(np.int32),
            logprobs=logprobs,
            entropies=entropies,
        )
        return score_tokens(
            tokens,
            status=encoded.status,
            rank_clip=self.config.rank_clip,
            keep_tokens=self.config.token_scores,
        )


def _first(pair: tuple[int, NDArray[np.float32]]) -> int:
    return pair[0]


def load_model_config(config: ScorerConfig) -> PretrainedConfig:
    """The checkpoint's config.json; `ValueError` naming what the model lacks."""
    if (folder := Path(config.model)).exists():
        _check_model_folder(folder)
    elif config.model.startswith((".", "/", "~")):
        raise ValueError(f"no such model folder: {config.model}")
    try:
        loaded = AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"no usable model {config.model!r}: {reason}") from error
    if not loaded.architectures:
        raise ValueError(f"config.json of {config.model!r} names no architecture")
    return loaded


def _check_model_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"the model {folder} is a file; expected a folder with config.json")
    if not (folder / "config.json").is_file():
        raise ValueError(f"the model folder {folder} has no config.json")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ValueError(
            f"the model folder {folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}"
        )


def native_max_model_len(model_config: PretrainedConfig) -> int:
    """The longest sequence the checkpoint says it takes, in tokens."""
    text_config = model_config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text_config, name, None), int):
            return value
    raise ValueError("the model's config.json states no maximum length; give --max-model-len")

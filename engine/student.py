"""The student before its weights are loaded: is there one, what is it, what will it read.

Everything a user can get wrong about a model is found here, in seconds, as one `ValueError`.
Knows configuration files and tokenizers; knows nothing of vLLM.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from rsr.engine.chat import TrajectoryEncoder, load_tokenizer
from rsr.engine.config import Dtype, ScorerConfig
from rsr.engine.errors import first_line
from rsr.engine.facts import StudentFacts
from rsr.engine.model_folder import WEIGHT_FILES, require_model_folder
from rsr.engine.template import resolve_chat_template

LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True)
class Student:
    """A usable checkpoint.

    config: as given, with dtype and max_model_len resolved. chat_template: Jinja text, or None.
    max_model_len, vocab_size: in tokens.
    """

    config: ScorerConfig
    architectures: list[str]
    max_model_len: int
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    fingerprint: dict[str, Any]

    @property
    def facts(self) -> StudentFacts:
        return StudentFacts(self.config, self.chat_template is not None, self.fingerprint)

    def encoder(self) -> TrajectoryEncoder:
        looks_for_steps = self.config.has_metrics or self.config.window is not None
        return TrajectoryEncoder(
            self.tokenizer,
            chat_template=self.chat_template,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            truncate=self.config.on_long == "truncate",
            score_end_of_turn=self.config.score_end_of_turn,
            render=self.config.render,
            turns=self.config.turns,
            template_kwargs=self.config.template_kwargs,
            step_pattern=self.config.step_pattern if looks_for_steps else None,
            prompt_metrics=self.config.prompt_metrics,
            unconditional=self.config.unconditional,
            window=self.config.window,
            tokenizer_backend=self.config.tokenizer_backend,
        )


def open_student(config: ScorerConfig, *, with_weights: bool = True) -> Student:
    """Read everything but the weights; `ValueError` says what is missing and where.

    with_weights: they must be there, too.
    """
    require_model_folder(config.model, with_weights=with_weights)
    loaded = _load_model_config(config)
    tokenizer = load_tokenizer(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    template = resolve_chat_template(tokenizer, config.chat_template)
    native = _native_max_model_len(loaded)
    max_model_len = config.max_model_len or native
    if max_model_len is None:
        raise ValueError("the model's config.json states no maximum length; give max_model_len")
    if native is not None and max_model_len > native:
        raise ValueError(f"max_model_len={max_model_len}: the model takes {native} tokens at most")
    dtype = config.dtype
    if dtype == "auto":
        # Not left to vLLM, which would run a float32 checkpoint in half precision.
        dtype = cast(Dtype, str(loaded.get_text_config().dtype or "bfloat16").split(".")[-1])
    return Student(
        config=replace(config, dtype=dtype, max_model_len=max_model_len),
        architectures=list(loaded.architectures),
        max_model_len=max_model_len,
        vocab_size=loaded.get_text_config().vocab_size,
        tokenizer=tokenizer,
        chat_template=template,
        fingerprint=_fingerprint(config, loaded, tokenizer, template),
    )


def _load_model_config(config: ScorerConfig) -> PretrainedConfig:
    try:
        loaded = AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        if not Path(config.model).exists():
            reason = f"no such folder here, and as a name on the hub: {reason}"
        raise ValueError(f"no usable model {config.model!r}: {reason}") from error
    if not loaded.architectures:
        raise ValueError(f"config.json of {config.model!r} names no architecture")
    return loaded


def _native_max_model_len(loaded: PretrainedConfig) -> int | None:
    text_config = loaded.get_text_config()
    lengths = (getattr(text_config, name, None) for name in LENGTH_FIELDS)
    return next((value for value in lengths if isinstance(value, int)), None)


def _fingerprint(
    config: ScorerConfig,
    loaded: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
) -> dict[str, Any]:
    """What tells this checkpoint from another: a hub commit, or the sizes of its weight files."""
    folder = Path(config.model)
    weights = {
        file.name: file.stat().st_size
        for pattern in WEIGHT_FILES
        for file in sorted(folder.glob(pattern))
    }
    return {
        "commit": getattr(loaded, "_commit_hash", None),
        "config_sha256": _sha256(loaded.to_json_string()),
        "weight_files_bytes": weights,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": None if template is None else _sha256(template),
    }


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a run's fingerprint says of its tokenizer: two of one value read text alike."""
    return _sha256(tokenizer.backend_tokenizer.to_str())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

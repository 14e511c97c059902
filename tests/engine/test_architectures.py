"""Any decoder that vLLM runs, against transformers in float32.

Each case has a head of its own kind: what its model does to hidden states on the way to logits
is read from the model, so a case that fails here would give wrong ranks silently.
"""

import pytest
import transformers
from small_shape import SMALL_SHAPE

from rsr.engine import Scorer, ScorerConfig, Trajectory

pytestmark = pytest.mark.vllm

VOCAB_SIZE = 261
"""Of the byte tokenizer; vLLM pads a head to a multiple of 64 rows, here to 320."""

SMALL = SMALL_SHAPE | {"vocab_size": VOCAB_SIZE, "pad_token_id": None}

# A text model inside of one that also takes images, of which a row has none.
PALIGEMMA = {
    "text_config": {"model_type": "gemma", "head_dim": 32, **SMALL},
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 64,
    },
    "image_token_index": VOCAB_SIZE - 1,
    "projection_dim": 64,
    "hidden_size": 64,
}

# The name of a transformers configuration class, and what its model's head is about.
STUDENTS: dict[str, tuple[str, dict]] = {
    "llama, untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, nothing padded": ("LlamaConfig", {"vocab_size": 320}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": 64}),
    "gemma2, soft cap": (
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": 5.0},
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3Config", {}),
    "gpt2, tied": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "n_inner": 96},
    ),
    "gptj, head with a bias": (
        "GPTJConfig",
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "rotary_dim": 16},
    ),
    "granite, scaled logits": (
        "GraniteConfig",
        {
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "paligemma, text of a multimodal model": ("PaliGemmaConfig", PALIGEMMA),
    "mixtral, experts": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}

TRAJECTORIES = (
    Trajectory(text="Seven apples cost 21 coins, so one apple costs 3 coins. " * 4),
    Trajectory(prompt="How many legs do three spiders have?", response=" 3 × 8 = 24 legs."),
    Trajectory(prompt="How many legs do three spiders have?", response=" Twenty-four."),
)


FIRST = {"llama, tied", "gemma2, soft cap"}
"""`make test` runs these alone."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in STUDENTS],
)
def test_scores_equal_those_of_transformers(name, save_student, assert_like_transformers, tmp_path):
    config_class, settings = STUDENTS[name]
    config = getattr(transformers, config_class)(**{**SMALL, **settings})
    folder = save_student(config, tmp_path)
    with Scorer(ScorerConfig(model=str(folder), dtype="float32", token_scores=True)) as scorer:
        scores = scorer.score(TRAJECTORIES)
    assert_like_transformers(folder, TRAJECTORIES, scores)

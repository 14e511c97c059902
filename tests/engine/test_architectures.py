"""Any decoder that vLLM runs, against transformers in float32.

Each case has a head of its own kind: what its model does to hidden states on the way to logits
is read from the model, so a case that fails here would give wrong ranks silently.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from small_shape import SMALL_SHAPE

from rsr.engine import Scorer, ScorerConfig, Trajectory

pytestmark = pytest.mark.vllm

VOCAB_SIZE = 261
"""Of the byte tokenizer; vLLM pads a head to a multiple of 64 rows, here to 320."""

SMALL = SMALL_SHAPE | {"vocab_size": VOCAB_SIZE, "pad_token_id": None}

# Text models inside of ones that also take images, of which a row has none.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PALIGEMMA = {
    "text_config": {"model_type": "gemma", "head_dim": 32, **SMALL},
    "vision_config": {"model_type": "siglip_vision_model", "projection_dim": 64, **VISION},
    "image_token_index": VOCAB_SIZE - 1,
    "projection_dim": 64,
    "hidden_size": 64,
}

MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
}
IDEFICS3 = {
    "text_config": {"model_type": "llama", **SMALL},
    "vision_config": VISION,
    "image_token_id": VOCAB_SIZE - 1,
    "scale_factor": 2,
    "pad_token_id": 0,
}

QWEN2_VL = {
    "text_config": SMALL
    | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
    "vision_config": {
        "depth": 1,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "patch_size": 14,
    },
    "vision_start_token_id": 1,
    "vision_end_token_id": 2,
    "image_token_id": 3,
    "video_token_id": 4,
}
GEMMA3 = {
    "text_config": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        **SMALL,
    },
    "vision_config": {"model_type": "siglip_vision_model", **VISION},
    "boi_token_index": VOCAB_SIZE - 3,
    "eoi_token_index": VOCAB_SIZE - 2,
    "image_token_index": VOCAB_SIZE - 1,
    "mm_tokens_per_image": 1,
}

# Of these, transformers has a shortest time step, 0.001 as it comes, and vLLM has none.
SMALL_STEPS = {"time_step_min": 1e-30, "chunk_size": 32, "n_groups": 1}

# Layers that keep a state instead of keys and values. vLLM has the scan of Mamba 1 (Jamba) for GPUs
# alone, and that of gated delta nets on a CPU for bfloat16: they have a test of their own.
STATE_STUDENTS: dict[str, tuple[str, dict]] = {
    "granite 4, Mamba 2 beside attention": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 96,
            **MAMBA,
        },
    ),
    "falcon h1, Mamba 2 along with attention": (
        "FalconH1Config",
        {"head_dim": 32, "mamba_d_ssm": 128, **MAMBA},
    ),
    "nemotron h, a layer for each": (
        "NemotronHConfig",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "head_dim": 32,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            **SMALL_STEPS,
        },
    ),
    "zamba 2, one attention for several layers": (
        "Zamba2Config",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "hybrid_layer_ids": [1, 3],
            "num_key_value_heads": 2,
            "attention_head_dim": 64,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "n_mamba_heads": 4,
            "mamba_headdim": 32,
            "mamba_d_state": 16,
            **SMALL_STEPS,
        },
    ),
    "lfm2, convolutions beside attention": (
        "Lfm2Config",
        {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            # Checkpoints have these two, of which vLLM reads them.
            "conv_dim": 64,
            "block_dim": 64,
        },
    ),
    "mamba 2, no attention": (
        "Mamba2Config",
        {
            "intermediate_size": 128,
            "num_heads": 4,
            "head_dim": 32,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 32,
        },
    ),
}

DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
DELTA_STUDENTS: dict[str, tuple[str, dict]] = {
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            **DELTA_NET,
        },
    ),
    "qwen3.5": ("Qwen3_5TextConfig", DELTA_NET),
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
    "idefics3, text of a multimodal model": ("Idefics3Config", IDEFICS3),
    "qwen2-vl, text of a multimodal model": ("Qwen2VLConfig", QWEN2_VL),
    "gemma3, text of a multimodal model": ("Gemma3Config", GEMMA3),
    "mixtral, experts": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}

LESS_EXACT = {"zamba 2, one attention for several layers": {"max_error_nats": 5e-4}}
"""Where float32 itself is: transformers' own differs by 1.6e-4 nats from its float64 there."""

TRAJECTORIES = (
    Trajectory(text="Seven apples cost 21 coins, so one apple costs 3 coins. " * 4),
    Trajectory(prompt="How many legs do three spiders have?", response=" 3 × 8 = 24 legs."),
    Trajectory(prompt="How many legs do three spiders have?", response=" Twenty-four."),
)


FIRST = {"llama, tied", "gemma2, soft cap", "granite 4, Mamba 2 beside attention"}
"""`make test` runs these alone."""


WANT_TORCHVISION = {
    "qwen2-vl, text of a multimodal model",
    "gemma3, text of a multimodal model",
    "qwen3.5",
}
"""Students of which vLLM imports the image processor, though no row has an image."""

needs_torchvision = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="vLLM's module of this student imports torchvision"
)


def params(students):
    return [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name not in FIRST)
            + [needs_torchvision] * (name in WANT_TORCHVISION),
        )
        for name in students
    ]


@pytest.fixture
def make_student(save_student, tmp_path):
    def make(config_class: str, settings: dict) -> Path:
        config = getattr(transformers, config_class)(**{**SMALL, **settings})
        return save_student(config, tmp_path)

    return make


@pytest.mark.parametrize("name", params(STUDENTS))
def test_scores_equal_those_of_transformers(name, make_student, assert_like_transformers):
    folder = make_student(*STUDENTS[name])
    with Scorer(ScorerConfig(model=str(folder), dtype="float32", token_scores=True)) as scorer:
        scores = scorer.score(TRAJECTORIES)
    assert_like_transformers(folder, TRAJECTORIES, scores)


@pytest.mark.parametrize("name", params(STATE_STUDENTS))
def test_states_are_handed_from_step_to_step(name, make_student, assert_like_transformers):
    """The first row takes three steps; of the last one's single token vLLM thinks it is decoded."""
    folder = make_student(*STATE_STUDENTS[name])
    num_computed = len(TRAJECTORIES[0].text) - 1
    config = ScorerConfig(
        model=str(folder),
        dtype="float32",
        token_scores=True,
        max_num_batched_tokens=num_computed // 2,
    )
    assert num_computed % config.max_num_batched_tokens == 1
    with Scorer(config) as scorer:
        scores = scorer.score(TRAJECTORIES)
    assert_like_transformers(folder, TRAJECTORIES, scores, **LESS_EXACT.get(name, {}))


@pytest.mark.parametrize("name", params(DELTA_STUDENTS))
def test_gated_delta_nets_are_as_exact_as_their_dtype(name, make_student):
    """Heads of 128 in bfloat16, for which vLLM has an operation on a CPU."""
    folder = make_student(*DELTA_STUDENTS[name])
    text = TRAJECTORIES[0].text
    num_computed = len(text) - 1
    config = ScorerConfig(
        model=str(folder),
        dtype="bfloat16",
        token_scores=True,
        max_num_batched_tokens=num_computed // 2,
    )
    with Scorer(config) as scorer:
        ours = scorer.score(TRAJECTORIES[0]).tokens.logprobs
    exact, rounded = (logprobs_of(folder, text, d) for d in (torch.float32, torch.bfloat16))
    # A state that is lost between two steps makes it four times as much.
    assert np.abs(ours - exact).mean() < 2 * np.abs(rounded - exact).mean()


def logprobs_of(folder, text: str, dtype: torch.dtype) -> np.ndarray:
    """Of each token but the first, as transformers computes them in `dtype`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        logprobs = model(ids).logits[0, :-1].float().log_softmax(1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()

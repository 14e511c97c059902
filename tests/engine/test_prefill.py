"""The two engines against each other, and what they refuse to start with."""

import json
import logging
import os
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_shape import SMALL_SHAPE

from rsr.engine import Scorer, ScorerConfig, Trajectory, prefill, vllm_plugin
from rsr.engine.errors import is_out_of_memory
from rsr.engine.student import open_student

MAX_MODEL_LEN = 128
ROWS = (
    Trajectory(text="Seven apples cost 21 coins, so one apple costs 3 coins. " * 4),
    Trajectory(prompt="How many legs do three spiders have?", response=" 3 × 8 = 24 legs."),
)


def config(student, **settings):
    return ScorerConfig(
        model=str(student),
        dtype="float32",
        token_scores=True,
        max_model_len=MAX_MODEL_LEN,
        chat_template="none",
        **settings,
    )


@pytest.mark.slow
@pytest.mark.vllm
def test_prompt_logprobs_agree_with_the_kernel(tiny_student):
    scores = {}
    for kind in ("kernel", "prompt-logprobs"):
        with Scorer(config(tiny_student, scorer=kind)) as scorer:
            assert scorer.kind == kind
            # A server that the user's program starts later is none of ours.
            assert vllm_plugin.ARCHITECTURES_VARIABLE not in os.environ
            scores[kind] = scorer.score(ROWS)
    for ours, stock in zip(scores["kernel"], scores["prompt-logprobs"], strict=True):
        assert ours.status == stock.status
        np.testing.assert_array_equal(ours.tokens.ranks, stock.tokens.ranks)
        np.testing.assert_allclose(ours.tokens.logprobs, stock.tokens.logprobs, rtol=0, atol=1e-5)
        assert ours.entropy_sum_nats is not None
        assert stock.entropy_sum_nats is None


@pytest.mark.slow
@pytest.mark.vllm
def test_unusual_head_is_scored_by_vllm_with_a_warning(tiny_student, monkeypatch, caplog):
    from vllm.model_executor.models.llama import LlamaForCausalLM

    compute_logits = LlamaForCausalLM.compute_logits

    def halved(self, hidden_states):
        return compute_logits(self, hidden_states) / 2

    monkeypatch.setattr(LlamaForCausalLM, "compute_logits", halved)
    with caplog.at_level(logging.WARNING), Scorer(config(tiny_student)) as scorer:
        assert scorer.kind == "prompt-logprobs"
        (row,) = scorer.score(ROWS[1:])
    assert "not a plain matrix" in caplog.text
    assert row.entropy_sum_nats is None

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_student)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32)
    ids = tokenizer(ROWS[1].prompt + ROWS[1].response, return_tensors="pt").input_ids
    with torch.inference_mode():
        logprobs = (model(ids).logits[0, :-1] / 2).log_softmax(1).gather(1, ids[0, 1:, None])
    expected = logprobs[-row.num_tokens :, 0].numpy()
    np.testing.assert_allclose(row.tokens.logprobs, expected, rtol=0, atol=1e-4)


def require_gptq():
    """vLLM loads the build that fits this CPU, and not each multiplies four-bit weights."""
    from vllm import _custom_ops  # noqa: F401
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM's build for this CPU has no product with GPTQ weights")


def quantise_head(folder, group_size=32):
    """Make the checkpoint's LM head GPTQ, symmetric 4 bits; returns what it stands for, (V, D)."""
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop("lm_head.weight").T.contiguous()
    num_inputs, num_outputs = weight.shape
    groups = weight.view(-1, group_size, num_outputs)
    scales = (groups.abs().amax(1) / 7).bfloat16().float()
    levels = (groups / scales[:, None]).round().clamp(-8, 7).view(num_inputs, num_outputs)
    # Eight levels of four bits in each int32, along the inputs; v1 stores zero points less one.
    nibbles = (levels.long() + 8).view(-1, 8, num_outputs) << (4 * torch.arange(8))[:, None]
    zeros = torch.full((len(scales), num_outputs // 8), 0x77777777, dtype=torch.int32)
    tensors |= {
        "lm_head.qweight": nibbles.sum(1).to(torch.uint32).view(torch.int32),
        "lm_head.scales": scales.bfloat16(),
        "lm_head.qzeros": zeros,
        "lm_head.g_idx": (torch.arange(num_inputs) // group_size).int(),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    gptq = {"bits": 4, "group_size": group_size, "desc_act": False, "sym": True, "lm_head": True}
    quantization = {"quant_method": "gptq", **gptq, "dynamic": {"-:model.*": {}}}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization})
    )
    return (levels.view_as(groups) * scales[:, None]).view(num_inputs, num_outputs).T


@pytest.mark.slow
@pytest.mark.vllm
def test_quantised_head_is_scored_by_vllm_with_a_warning(
    save_student, tiny_llama, tmp_path, caplog
):
    require_gptq()
    folder = save_student(tiny_llama(vocab_size=320), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model.lm_head.weight.data = quantise_head(folder)
    settings = {"dtype": "bfloat16", "token_scores": True, "chat_template": "none"}
    with (
        caplog.at_level(logging.WARNING),
        Scorer(ScorerConfig(model=str(folder), max_model_len=MAX_MODEL_LEN, **settings)) as scorer,
    ):
        assert scorer.kind == "prompt-logprobs"
        (row,) = scorer.score(ROWS[1:])
    assert "not a plain matrix" in caplog.text
    ids = tokenizer(ROWS[1].prompt + ROWS[1].response, return_tensors="pt").input_ids
    with torch.inference_mode():
        logprobs = model(ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])
    expected = logprobs[-row.num_tokens :, 0].numpy()
    # bf16 hidden states; another head would be off by nats.
    np.testing.assert_allclose(row.tokens.logprobs, expected, rtol=0, atol=0.15)


@pytest.mark.vllm
def test_a_class_that_is_not_ours_is_noticed(tiny_student, monkeypatch):
    chosen = vllm_plugin.chosen
    # None is, nor one that an engine before this one has left.
    monkeypatch.setattr(vllm_plugin, "chosen", lambda architectures: chosen([]))
    with pytest.raises(RuntimeError, match="does not run the scoring model class"):
        Scorer(config(tiny_student))


@pytest.mark.vllm
def test_a_length_that_the_cache_cannot_hold_is_refused_with_the_one_that_fits(
    tiny_student, monkeypatch
):
    # Of two layers with two heads of 32 float32 each: 512 tokens would need twice as much.
    monkeypatch.setattr(prefill, "CPU_KV_CACHE_BYTES", 256 * 2 * 2 * 2 * 32 * 4)
    with pytest.raises(RuntimeError, match=r"max_model_len=512 needs .* GiB") as refusal:
        Scorer(ScorerConfig(model=str(tiny_student), dtype="float32"))
    assert "\n" not in str(refusal.value)
    assert not is_out_of_memory(refusal.value)
    (fitting,) = re.findall(r"max_model_len=(\d+) fits", str(refusal.value))
    assert 0 < int(fitting) < 512
    length = int(fitting)
    with Scorer(ScorerConfig(model=str(tiny_student), dtype="float32", max_model_len=length)):
        pass


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("architecture", "prefix_reuse", "settings"),
    [
        ("LlamaForCausalLM", "auto", {"enable_prefix_caching": True, "block_size": 32}),
        ("LlamaForCausalLM", "off", {"enable_prefix_caching": False}),
        # Beside attention and without, layers that keep a state; of that a CPU caches nothing.
        ("Lfm2ForCausalLM", "auto", {"enable_prefix_caching": False}),
        ("Lfm2ForCausalLM", "on", {"enable_prefix_caching": False}),
        ("Mamba2ForCausalLM", "auto", {"enable_prefix_caching": False}),
        ("Mamba2ForCausalLM", "on", {"enable_prefix_caching": False}),
    ],
)
def test_prefixes_are_kept_where_blocks_are_small(architecture, prefix_reuse, settings, caplog):
    student = ScorerConfig(model="any", prefix_reuse=prefix_reuse)
    assert prefill._prefix_cache_settings(student, [architecture]) == settings
    in_vain = prefix_reuse == "on" and not settings["enable_prefix_caching"]
    assert (f"keeps no prefix of {architecture}" in caplog.text) == in_vain
    assert prefill._prefix_cache_settings(student, []) == {"enable_prefix_caching": False}


@pytest.mark.vllm
def test_states_are_kept_as_vllm_itself_chooses(save_student, tmp_path):
    """But for prefixes, and for the operation that turns LFM2's queries."""
    shape = SMALL_SHAPE | {"layer_types": ["conv", "full_attention"], "pad_token_id": None}
    folder = save_student(
        transformers.Lfm2Config(vocab_size=261, conv_dim=64, block_dim=64, **shape), tmp_path
    )
    student = open_student(ScorerConfig(model=str(folder), dtype="float32"))
    prefill.import_vllm()
    from vllm import EngineArgs

    def cache_and_operations(**settings):
        made = EngineArgs(**settings).create_engine_config()
        cache = asdict(made.cache_config) | {"kv_cache_memory_bytes": None}
        return cache, made.scheduler_config, made.compilation_config.custom_ops

    told = {"model": str(folder), "runner": "pooling", "dtype": "float32", "max_model_len": 512}
    told |= {"enforce_eager": True, "enable_prefix_caching": False, "skip_tokenizer_init": True}
    with vllm_plugin.chosen(student.architectures):
        settings = prefill.vllm_settings(
            student, student.architectures, runner="pooling", max_model_len=512
        )
        cache, scheduler, operations = cache_and_operations(**settings)
        vllms_cache, vllms_scheduler, vllms_operations = cache_and_operations(**told)
    assert cache == vllms_cache
    assert scheduler == vllms_scheduler
    assert operations == ["-rotary_embedding", *vllms_operations]
    assert cache["mamba_cache_mode"] == "none"


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("LlamaForCausalLM", {}),
        ("Lfm2ForCausalLM", {"custom_ops": ["-rotary_embedding"]}),
        ("Mamba2ForCausalLM", {"custom_ops": ["-rotary_embedding"]}),
    ],
)
def test_queries_are_turned_by_torch_beside_states(architecture, settings):
    assert prefill._rotary_settings([architecture]) == settings


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.1rc1", "0.32.1.dev7+gabc"])
def test_tested_versions_pass(version):
    prefill._check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0"])
def test_untested_versions_are_refused_in_one_line(version):
    with pytest.raises(RuntimeError, match=f"vLLM {version} is not supported") as refusal:
        prefill._check_version(version)
    assert "\n" not in str(refusal.value)

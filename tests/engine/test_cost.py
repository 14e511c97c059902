"""What a student costs, against counts made by hand and by torch."""

import pytest
import transformers

from rsr.engine.config import ScorerConfig
from rsr.engine.cost import model_cost


def cost_of(folder, dtype="bfloat16"):
    return model_cost(ScorerConfig(model=str(folder), dtype=dtype))


def test_dense_student_is_counted_to_the_last_parameter(tiny_student):
    cost = cost_of(tiny_student)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_student)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert cost.num_parameters == sum(p.numel() for p in model.parameters())
    assert cost.num_active_parameters == layers + model.model.norm.weight.numel()
    # Two layers, one key-value head of 32, two bytes, a key and a value.
    assert cost.kv_bytes_per_token == 2 * 2 * 1 * 32 * 2
    assert cost.weight_bytes == 2 * cost.num_parameters
    assert cost_of(tiny_student, "float32").weight_bytes == 4 * cost.num_parameters


def test_prefill_flops_agree_with_torchs_own_count(tiny_student):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = transformers.LlamaForCausalLM.from_pretrained(tiny_student, attn_implementation="eager")
    cost, num_tokens = cost_of(tiny_student), 96
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros((1, num_tokens), dtype=torch.long))
    full_attention = 4 * num_tokens**2 * 64 * 2
    ours = cost.prefill_flops(num_tokens) + full_attention // 2
    ours += num_tokens * cost.head_flops_per_scored_token
    # Torch counts matrix products alone, and attention over the whole square; we count norms'
    # weights among the parameters.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_of_experts_only_the_chosen_ones_are_active(tmp_path):
    sizes = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    transformers.MixtralConfig(
        num_local_experts=8, num_experts_per_tok=2, architectures=["MixtralForCausalLM"], **sizes
    ).save_pretrained(tmp_path)
    cost = cost_of(tmp_path)
    experts = 2 * 8 * 3 * 32 * 48
    rest = cost.num_parameters - experts - 2 * 100 * 32
    assert cost.num_active_parameters == rest + experts * 2 // 8
    assert transformers.AutoConfig.from_pretrained(tmp_path).num_experts_per_tok == 2

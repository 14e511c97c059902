"""What a student costs per token, read from its configuration alone: no weights are loaded.

Parameters are counted on a model made on torch's meta device, so that any architecture that
transformers knows is counted as it is, not by a formula for one family. Knows nothing of GPUs,
hours or files.
"""

from dataclasses import dataclass
from typing import Any

from rsr.engine.config import ScorerConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EXPERT_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A decoder's size.

    num_parameters: all, each tied weight once. num_active_parameters: those a token passes
    through in the layers: no embedding, no LM head, and of experts only the chosen ones.
    """

    num_parameters: int
    num_active_parameters: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    dtype_bytes: int

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """A key and a value per layer and key-value head."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.dtype_bytes

    @property
    def head_flops_per_scored_token(self) -> int:
        """The LM head's product; rows that are not scored skip it."""
        return 2 * self.hidden_size * self.vocab_size

    def prefill_flops(self, num_tokens: int) -> int:
        """FLOPs of one sequence without its head: 2 per active parameter and token, and attention.

        Causal attention multiplies queries with half of all keys, and as much again with values:
        2 · T² · heads · head size per layer. Sliding windows make it less; they are not counted.
        """
        attention = 2 * num_tokens**2 * self.num_heads * self.head_size * self.num_layers
        return 2 * self.num_active_parameters * num_tokens + attention


def model_cost(config: ScorerConfig) -> ModelCost:
    """The cost of the student that `config` names; its dtype must be resolved (`open_student`)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = AutoConfig.from_pretrained(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded, trust_remote_code=config.trust_remote_code)
    text = loaded.get_text_config()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    outside = {id(m.weight) for m in _embeddings(model)}
    body = {n: p.numel() for n, p in model.named_parameters() if id(p) not in outside}
    num_heads = text.num_attention_heads
    return ModelCost(
        num_parameters=sum(sizes.values()),
        num_active_parameters=_active(body, text),
        num_layers=text.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        dtype_bytes=DTYPE_BYTES[config.dtype],
    )


def _embeddings(model: Any) -> list[Any]:
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in both if module is not None]


def _active(sizes: dict[str, int], text_config: Any) -> int:
    """Parameters that a token meets: of routed experts, those of the share that it is sent to."""
    counts = (getattr(text_config, name, None) for name in EXPERT_COUNT_FIELDS)
    num_experts = int(next((count for count in counts if count), 0))
    if not num_experts:
        return sum(sizes.values())
    routed = sum(n for name, n in sizes.items() if ".experts." in name)
    chosen = int(text_config.num_experts_per_tok)
    return sum(sizes.values()) - routed + routed * chosen // num_experts

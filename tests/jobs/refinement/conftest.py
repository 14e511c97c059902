"""An oracle that knows one answer, and is a real model all the same."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rsr.jobs.refinement.prompts import CLOSING, OPENING

ORACLE_ANSWER = "It is 42."
"""What `answering_oracle` writes between the tags, whatever it is asked."""
CONTEXT_TOKENS = 4_096


@pytest.fixture(scope="session")
def answering_oracle(
    tmp_path_factory: pytest.TempPathFactory,
    make_tokenizer: Callable[..., Any],
    tiny_llama: Callable[..., Any],
) -> Path:
    """A Llama whose layers add nothing and whose head holds, for each token, the one after it.

    From the end of the template's header it goes by the tags, and `ORACLE_ANSWER` as one token
    between them, to the end of its turn.
    """
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    steps = [OPENING, ORACLE_ANSWER, CLOSING]
    tokenizer.add_tokens(steps)
    chain = [tokenizer.encode("\n", add_special_tokens=False)[-1]]
    chain += tokenizer.convert_tokens_to_ids([*steps, "<|im_end|>"])
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_TOKENS}
    model = LlamaForCausalLM(tiny_llama(**shape))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedded = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
        model.lm_head.weight.zero_()
        for token, following in pairwise(chain):
            # Tens of nats above every other token, so that no seed draws another.
            model.lm_head.weight[following] = 20 * embedded[token]
    folder = tmp_path_factory.mktemp("answering_oracle")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

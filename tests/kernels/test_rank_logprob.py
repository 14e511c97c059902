import pytest
import torch

from rsr.kernels import rank_logprob

IMPLS = ["tiled", "reference"]


@pytest.mark.parametrize("impl", IMPLS)
def test_integer_operands_give_exact_ranks_with_ties(impl):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (33, 20), generator=generator).float()
    weight = torch.randint(-3, 4, (5000, 20), generator=generator).float()
    targets = torch.randint(0, 5000, (33,), generator=generator)
    logits = hidden.double() @ weight.double().T
    own = logits.gather(1, targets[:, None])
    result = rank_logprob(hidden, weight, targets, impl=impl, entropy=True)
    assert torch.equal(result.rank, 1 + (logits > own).sum(1, dtype=torch.int32))
    truth = logits.log_softmax(1)
    torch.testing.assert_close(
        result.logprob.double(), truth.gather(1, targets[:, None])[:, 0], atol=2e-5, rtol=0
    )
    torch.testing.assert_close(
        result.entropy.double(), -(truth * truth.exp()).sum(1), atol=1e-6, rtol=1e-4
    )

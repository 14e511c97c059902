"""A worker's part of scoring without vLLM: any way to cut requests into steps gives one answer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in_device import StandInDevice
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsr.engine import metric_sums, metrics
from rsr.engine.parts import NUM_PARTS
from rsr.engine.scored_rows import Chunk, ScoredRows, StepScorer, reduce_rows
from rsr.engine.wire import PrefillRequest, PrefillScores, ScoredTokens, first_not_finite
from rsr.kernels import RankLogprob, rank_logprob

VOCAB_SIZE, HIDDEN_SIZE, RANK_CLIP = 31, 8, 10


class PlainHead:
    """A model that is its head: hidden states meet the weight as they are."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def prepare(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, "PlainHead"]:
        return hidden_states, self

    def score(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, *, entropy: bool
    ) -> RankLogprob:
        return rank_logprob(hidden_states, self.weight, targets, impl="reference", entropy=entropy)


HEAD = PlainHead(torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)))


def hidden_states(token_ids: list[int]) -> torch.Tensor:
    """Stands in for the model: each row depends on all tokens up to its own."""
    ids = torch.tensor(token_ids, dtype=torch.float32)
    mixed = torch.cumsum(ids + 1, 0)[:, None] * torch.arange(1, HIDDEN_SIZE + 1)
    return torch.sin(mixed)


def step_scorer(*, entropy: bool = True, head: PlainHead = HEAD) -> StepScorer:
    return StepScorer(head, entropy=entropy, rank_clip=RANK_CLIP)


def parts_of(request: PrefillRequest) -> np.ndarray:
    return ScoredTokens.unpack(request.pack()).parts


def rows_of(request: PrefillRequest, head: PlainHead = HEAD) -> np.ndarray:
    """(T, 4) token columns of all scored positions, without any steps."""
    positions = [p for start, end in request.spans for p in range(start, end)]
    states = hidden_states(request.token_ids)[[p - 1 for p in positions]]
    targets = torch.tensor([request.token_ids[p] for p in positions])
    rank, logprob, entropy = head.score(states, targets, entropy=True)
    columns = (torch.tensor(positions).float(), rank.float(), logprob, entropy)
    return torch.stack(columns, dim=1).double().numpy()


def expected_of(request: PrefillRequest, head: PlainHead = HEAD) -> PrefillScores:
    return PrefillScores.of(
        rows_of(request, head),
        request.detail_end,
        RANK_CLIP,
        has_entropy=True,
        parts=parts_of(request),
    )


def assert_same(found: PrefillScores, expected: PrefillScores) -> None:
    np.testing.assert_array_equal(found.tokens[:, :2], expected.tokens[:, :2])
    np.testing.assert_allclose(found.tokens, expected.tokens, rtol=1e-5)
    assert found.num_rest == expected.num_rest
    assert found.rest_position_sum == expected.rest_position_sum
    np.testing.assert_allclose(found.rest_sums, expected.rest_sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        found.rest_metric_sums, expected.rest_metric_sums, rtol=1e-5, atol=1e-5
    )
    assert found.rest_first_not_finite == expected.rest_first_not_finite


def run(
    requests: list[PrefillRequest],
    steps: list[list[tuple[int, int, int]]],
    head: PlainHead = HEAD,
) -> list:
    """steps: of each, (request, first token, last token + 1) of each chunk."""
    scorer, kept = step_scorer(head=head), [[] for _ in requests]
    answers = [None] * len(requests)
    for step in steps:
        states, chunks = [torch.empty(0, HIDDEN_SIZE)], []
        for index, start, end in step:
            request = requests[index]
            states.append(hidden_states(request.token_ids)[start:end])
            is_last = end == len(request.computed_ids)
            scored = ScoredTokens.unpack(request.pack())
            chunks.append(Chunk.of(scored, start, end - start, is_last=is_last))
        outputs = scorer.score(torch.cat(states), chunks, [kept[index] for index, *_ in step])
        for (index, *_), chunk, output in zip(step, chunks, outputs, strict=True):
            assert (output is not None) == chunk.is_last
            if output is not None:
                assert kept[index] == []
                answers[index] = PrefillScores.unpack(output.numpy())
    return answers


token_lists = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=24)


@st.composite
def requests(draw) -> PrefillRequest:
    token_ids = draw(token_lists)
    start = draw(st.integers(1, len(token_ids) - 1))
    middle = draw(st.integers(start + 1, len(token_ids)))
    spans = [(start, middle)]
    if middle + 1 < len(token_ids):
        spans.append((draw(st.integers(middle + 1, len(token_ids) - 1)), len(token_ids)))
    num_scored = sum(end - start for start, end in spans)
    parts = draw(st.lists(st.integers(0, NUM_PARTS - 1), min_size=num_scored, max_size=num_scored))
    return PrefillRequest(token_ids, spans, draw(st.integers(0, 25)), parts=bytes(parts))


@pytest.mark.seconds
@settings(deadline=None)
@given(st.lists(requests(), min_size=1, max_size=5), st.data())
def test_any_steps_give_what_whole_requests_give(batch, data):
    """Requests join and leave as a scheduler pleases, and some are preempted and start over."""
    next_token = [0] * len(batch)
    preemptions = 2
    steps = []
    while open_requests := [i for i, r in enumerate(batch) if next_token[i] < len(r.computed_ids)]:
        step = []
        for index in data.draw(st.lists(st.sampled_from(open_requests), min_size=1, unique=True)):
            start, length = next_token[index], len(batch[index].computed_ids)
            if preemptions and data.draw(st.booleans()):
                # It goes on from what the prefix cache still has of it.
                preemptions -= 1
                start = data.draw(st.integers(0, start))
            end = data.draw(st.integers(start + 1, length))
            step.append((index, start, end))
            next_token[index] = end
        steps.append(step)
    for request, found in zip(batch, run(batch, steps), strict=True):
        assert_same(found, expected_of(request))


def test_positions_behind_a_cached_prefix_are_in_no_answer():
    request = PrefillRequest(list(range(12)), [(2, 12)], detail_end=9)
    # A cache supplied the first five tokens: the hidden states that predict 1 … 5 do not come.
    (found,) = run(
        [request],
        [
            [
                (0, 5, 8),
            ],
            [(0, 8, 11)],
        ],
    )
    rows = rows_of(request)
    rows = rows[rows[:, 0] > 5]
    parts = np.zeros(len(rows), np.uint8)
    assert_same(found, PrefillScores.of(rows, 9, RANK_CLIP, has_entropy=True, parts=parts))
    assert found.tokens[:, 0].tolist() == [6, 7, 8]
    assert found.num_rest == 3


@pytest.mark.parametrize(
    ("detail_end", "num_tokens"), [(0, 0), (1, 0), (4, 3), (10, 9), (2**40, 9)]
)
def test_detail_ends_where_it_is_asked_to(detail_end, num_tokens):
    request = PrefillRequest(list(range(10)), [(1, 10)], detail_end)
    (found,) = run([request], [[(0, 0, 3)], [(0, 3, 9)]])
    assert len(found.tokens) == num_tokens
    assert_same(found, expected_of(request))


@pytest.mark.parametrize("lengths", [[1], [70_000], [255, 256, 257, 1, 1000], [300] * 40])
def test_sums_are_exact_whatever_the_length(lengths):
    """Of values spread over twelve decades, in pieces, beside rows that are not finite."""
    random = np.random.default_rng(0)
    requests, expected = [], []
    for length in lengths:
        rows = np.stack(
            [
                np.arange(1, length + 1),
                random.integers(1, 150_000, length),
                -(10.0 ** random.uniform(-9, 3, length)),
                random.uniform(0, 12, length),
                random.integers(0, NUM_PARTS, length),
            ],
            axis=1,
        ).astype(np.float32)
        requests.append(list(torch.from_numpy(rows).split(99)))
        _, ranks, logprobs, entropies, parts = rows.astype(np.float64).T
        exact = metrics.token_terms(ranks, logprobs, entropies, RANK_CLIP)
        exact = [term[parts != NUM_PARTS - 1] for term in exact]
        ranks = np.minimum(ranks, RANK_CLIP)
        exact += metric_sums.token_terms(ranks, -logprobs, entropies, parts)
        by_part = metric_sums.part_terms(ranks, -logprobs, parts, np.arange(NUM_PARTS))
        exact += [column for terms in by_part for column in terms.T]
        expected.append([length, length * (length + 1) / 2, *map(math.fsum, exact), math.inf])
    bad = torch.full((7, 5), float("nan"))
    batch = [request for good in requests for request in ([bad], good)]
    found = reduce_rows(batch, RANK_CLIP, has_entropy=True)[1::2]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    alone = torch.cat([reduce_rows([request], RANK_CLIP, has_entropy=True) for request in requests])
    assert torch.equal(found, alone)


def test_rsr_has_the_same_bits_whether_other_metrics_are_asked_for_or_not():
    random = np.random.default_rng(1)
    rows = np.stack(
        [
            np.arange(1, 3001),
            random.integers(1, 150_000, 3000),
            -(10.0 ** random.uniform(-9, 3, 3000)),
            random.uniform(0, 12, 3000),
            random.integers(0, NUM_PARTS - 1, 3000),
        ],
        axis=1,
    ).astype(np.float32)
    batch = [[torch.from_numpy(rows)], [torch.from_numpy(rows[:7])]]
    with_metrics, without = (
        reduce_rows(batch, RANK_CLIP, has_entropy=True, has_metrics=asked)
        for asked in (True, False)
    )
    num_sums = len(metric_sums.SUMS)
    assert torch.equal(with_metrics[:, : -num_sums - 1], without[:, : -num_sums - 1])
    assert torch.equal(with_metrics[:, -1], without[:, -1])
    assert not without[:, -num_sums - 1 : -1].any()


class LogitsHead(PlainHead):
    """As `PlainHead`, by operations for which no host waits; those of `reference` check targets."""

    def score(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, *, entropy: bool
    ) -> RankLogprob:
        logprobs = (hidden_states @ self.weight.T).log_softmax(1)
        logprob = logprobs.gather(1, targets[:, None])
        rank = 1 + (logprobs > logprob).sum(1, dtype=torch.int32)
        return RankLogprob(rank, logprob[:, 0], -(logprobs.exp() * logprobs).sum(1))


@pytest.mark.seconds
@pytest.mark.parametrize("detail_end", [0, 400])
@pytest.mark.parametrize("all_end", [True, False])
def test_a_step_copies_once_each_way_and_waits_for_nothing(detail_end, all_end):
    """However many requests share it, and whether all are through with it or only some."""
    requests, chunks, states = [], [], []
    for index in range(40):
        ids = [(7 * index + i) % VOCAB_SIZE for i in range(600)]
        request = PrefillRequest(ids, [(1, 600)], detail_end)
        is_last = all_end or index % 2 == 0
        num_tokens = 599 if is_last else 300
        scored = ScoredTokens.unpack(request.pack())
        requests.append(request)
        chunks.append(Chunk.of(scored, 0, num_tokens, is_last=is_last))
        states.append(hidden_states(ids)[:num_tokens])
    with StandInDevice() as device:
        head = LogitsHead(device.hold(HEAD.weight))
        held = device.hold(torch.cat(states))
        outputs = step_scorer(head=head).score(held, chunks, [[] for _ in chunks])
    assert device.crossings == ["to device", "to host"]
    for request, output, chunk in zip(requests, outputs, chunks, strict=True):
        assert (output is None) != chunk.is_last
        if output is not None:
            expected = expected_of(request)
            assert_same(PrefillScores.unpack(output.numpy()), expected)


@pytest.mark.parametrize("detail_end", [0, 400])
def test_nothing_is_kept_in_the_memory_of_hidden_states(detail_end):
    """vLLM has one buffer for them, and may overwrite it before an answer is read."""
    ids = [i % VOCAB_SIZE for i in range(600)]
    request = PrefillRequest(ids, [(1, 600)], detail_end)
    scored, states = ScoredTokens.unpack(request.pack()), hidden_states(ids)
    buffer, kept, scorer = torch.empty(200, HIDDEN_SIZE), [], step_scorer()
    for start in range(0, 599, 200):
        num_tokens = min(200, 599 - start)
        buffer[:num_tokens] = states[start : start + num_tokens]
        chunk = Chunk.of(scored, start, num_tokens, is_last=start == 400)
        (answer,) = scorer.score(buffer[:num_tokens], [chunk], [kept])
        buffer.fill_(math.nan)
    assert_same(PrefillScores.unpack(answer.numpy()), expected_of(request))


class Operations(TorchDispatchMode):
    """While it is entered: how many operations write memory, and how many elements of it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.number += 1
            self.num_elements += sum(tensor.numel() for tensor in tree_leaves(result))
        return result


def test_one_long_row_is_reduced_in_no_more_work_than_many_short_ones():
    """Of as many tokens: by as many operations, on as many elements."""
    rows = torch.ones(32_768, 5)
    work = {}
    for num_requests in (1, 32):
        with Operations() as operations:
            reduced = reduce_rows(
                [[request] for request in rows.chunk(num_requests)], RANK_CLIP, has_entropy=True
            )
        assert reduced[:, 0].tolist() == [32_768 / num_requests] * num_requests
        work[num_requests] = operations
    assert work[1].number <= work[32].number
    assert work[1].num_elements <= work[32].num_elements


@pytest.mark.seconds
def test_requests_that_score_nothing_are_answered_too():
    """Alone, and beside one that scores something."""
    ours = PrefillRequest([3, 1, 4], [(1, 3)], 0)
    later = ScoredTokens.unpack(PrefillRequest([0] * 9, [(5, 9)]).pack())
    empty = [Chunk.of(later, 0, 2, is_last=True) for _ in range(1024)]
    outputs = step_scorer().score(torch.zeros(2048, HIDDEN_SIZE), empty, [[] for _ in empty])
    assert all(PrefillScores.unpack(o.numpy()).num_rest == 0 for o in outputs)
    chunks = [*empty, Chunk.of(ScoredTokens.unpack(ours.pack()), 0, 2, is_last=True)]
    states = torch.cat([torch.zeros(2048, HIDDEN_SIZE), hidden_states([3, 1])])
    *_, last = step_scorer().score(states, chunks, [[] for _ in chunks])
    assert_same(PrefillScores.unpack(last.numpy()), expected_of(ours))


@pytest.mark.seconds
def test_made_up_requests_send_every_row_through_the_head():
    """As vLLM measures memory and warms up: many short ones, and one of the longest step."""
    lengths = [1] * 1024 + [3000]
    chunks = [Chunk.of(ScoredTokens.all_of(length), 0, length, is_last=True) for length in lengths]
    states = torch.zeros(sum(lengths), HIDDEN_SIZE)
    outputs = step_scorer().score(states, chunks, [[] for _ in chunks])
    scores = [PrefillScores.unpack(output.numpy()) for output in outputs]
    assert [s.num_rest for s in scores] == lengths


def test_entropy_is_nan_where_it_is_not_asked_for():
    request = PrefillRequest([3, 1, 4], [(1, 3)], 2)
    chunk = Chunk.of(ScoredTokens.unpack(request.pack()), 0, 2, is_last=True)
    kept: list[list[ScoredRows]] = [[]]
    (output,) = step_scorer(entropy=False).score(hidden_states([3, 1]), [chunk], kept)
    scores = PrefillScores.unpack(output.numpy())
    assert np.isnan(scores.tokens[0, 3])
    assert np.isnan(scores.rest_sums).tolist() == [False, False, True] + [False] * 5


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("detail_end", [0, 3, 1000])
def test_a_token_without_a_finite_score_is_named(entropy, value, detail_end):
    """The first one, however long the row and whichever way it comes back."""
    rows = np.ones((700, 5), dtype=np.float32)
    rows[:, 0] = np.arange(1, 701)
    rows[[300, 600], 2 if not entropy else 3] = value
    fine = torch.from_numpy(np.delete(rows, [300, 600], axis=0)).split(200)
    tensors = torch.from_numpy(rows).split(200)
    reduced = reduce_rows([fine, tensors], None, has_entropy=entropy)
    assert reduced[:, -1].tolist() == [math.inf, 301.0]
    scores = PrefillScores.of(
        rows[:, :4].astype(np.float64),
        detail_end,
        None,
        has_entropy=entropy,
        parts=rows[:, 4].astype(np.uint8),
    )
    of_tokens = first_not_finite(scores.tokens, has_entropy=entropy)
    assert min(of_tokens, scores.rest_first_not_finite) == 301
    # Entropy that nobody asked for is NaN, and no reason to refuse a row.
    rows[:, 2:4] = 1.0, math.nan
    (reduced,) = reduce_rows([[torch.from_numpy(rows)]], None, has_entropy=False)
    assert reduced[-1] == math.inf

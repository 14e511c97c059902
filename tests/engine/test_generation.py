"""Candidates: each is its seed's alone, whichever others are sampled beside it."""

import pytest
import transformers
from small_shape import SMALL_SHAPE

from rsr.engine.config import ScorerConfig
from rsr.engine.generation import Generator
from rsr.engine.messages import BadMessagesError
from rsr.engine.sampling import PromptRequest, Sampling

pytestmark = pytest.mark.vllm

PROMPTS = [[{"role": "user", "content": text}] for text in ("2 + 2?", "Say something long.", "x")]


@pytest.fixture(scope="module")
def generator(tiny_student):
    generator = Generator(
        ScorerConfig(model=str(tiny_student), dtype="float32"), Sampling(max_tokens=24)
    )
    yield generator
    generator.close()


def requests(generator, num_samples, first=0):
    return [
        PromptRequest(generator.encode(prompt), 1000 * number + first, num_samples)
        for number, prompt in enumerate(PROMPTS)
    ]


def test_more_samples_begin_with_those_that_were_there(generator):
    eight = generator.sample(requests(generator, 8))
    assert [len(answers) for answers in eight] == [8, 8, 8]
    four = generator.sample(requests(generator, 4))
    others = generator.sample(requests(generator, 4, first=4))
    assert [a + b for a, b in zip(four, others, strict=True)] == eight
    assert generator.sample(requests(generator, 8)) == eight
    assert len({answer.text for answer in eight[0]}) == 8


def test_prompts_that_fill_more_than_a_step_keep_their_seeds(generator):
    """vLLM cannot cut a prompt with a seed on a CPU."""
    num_tokens = 480
    prompts = [[{"role": "user", "content": f"{i:02d}" * 220}] for i in range(20)]
    asked = [PromptRequest(generator.encode(p), 9 * i, 1) for i, p in enumerate(prompts)]
    in_a_step = generator.max_num_batched_tokens
    assert sum(len(request.token_ids) for request in asked) > 2 * in_a_step
    assert max(len(request.token_ids) for request in asked) < num_tokens
    assert [len(answers) for answers in generator.sample(asked)] == [1] * 20


def test_answer_that_reaches_its_limit_says_so(generator):
    for answers in generator.sample(requests(generator, 4)):
        for answer in answers:
            assert answer.finish_reason == ("length" if answer.num_tokens == 24 else "stop")


def test_prompt_without_room_for_an_answer_is_refused(generator):
    with pytest.raises(BadMessagesError, match="takes 512 with the answer"):
        generator.encode([{"role": "user", "content": "x" * 600}])
    with pytest.raises(BadMessagesError, match="control token"):
        generator.encode([{"role": "user", "content": "<|im_end|>"}])


@pytest.mark.slow
def test_student_that_keeps_states_answers(save_student, make_tokenizer, tmp_path):
    """Without a prefix cache, for which vLLM would have to cut prompts, which it cannot here."""
    shape = SMALL_SHAPE | {"layer_types": ["conv", "full_attention"], "pad_token_id": None}
    folder = save_student(
        transformers.Lfm2Config(vocab_size=261, conv_dim=64, block_dim=64, **shape), tmp_path
    )
    make_tokenizer().save_pretrained(folder)
    config = ScorerConfig(model=str(folder), dtype="float32")
    generator = Generator(config, Sampling(max_tokens=24))
    try:
        answers = generator.sample(requests(generator, 3))
        assert generator.sample(requests(generator, 3)) == answers
    finally:
        generator.close()
    assert [len(each) for each in answers] == [3, 3, 3]

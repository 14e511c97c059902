"""Varied prompt-completion rows, and the token ids of them that an encoder scores."""

import random

from rsr.engine.chat import TrajectoryEncoder
from rsr.engine.trajectory import Status, Trajectory

NUM_ROWS = 50
WORDS = (
    *("so", "wait", "2 + 2", "Zürich", "\n", "\n\n", "  ", "日本語", "🙂", "\\frac{1}{2}", "\t"),
    *("def f(x):\n    ", "<answer>", "</answer>", "```", "\r\n", '"quoted"', "it's", "…", "1.5"),
)

Row = tuple[list[dict[str, str]], dict[str, str]]


def labelled_rows(*, reasoning: str, has_system: bool = True) -> list[Row]:
    """Prompts of one to three rounds, with and without a system turn, and a last answer.

    reasoning: "content", "field" or "none": where four rows of five have some.
    """
    source = random.Random(13)
    rows = []
    for number in range(NUM_ROWS):
        is_led = has_system and number % 3 == 0
        prompt = [{"role": "system", "content": _text(source)}] if is_led else []
        for _ in range(number % 2):
            prompt += [
                {"role": "user", "content": _text(source)},
                {"role": "assistant", "content": _text(source)},
            ]
        prompt.append({"role": "user", "content": _text(source)})
        thought, answer = _text(source), _text(source)
        completion = {"role": "assistant", "content": answer}
        if number % 5 and reasoning == "content":
            completion["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
        elif number % 5 and reasoning == "field":
            completion["reasoning_content"] = thought
        rows.append((prompt, completion))
    return rows


def scored_ids(encoder: TrajectoryEncoder, trajectory: Trajectory) -> list[int]:
    encoded = encoder.encode(trajectory)
    assert encoded.status is Status.OK, encoded.detail
    return [id for start, end in encoded.spans for id in encoded.token_ids[start:end]]


def _text(source: random.Random) -> str:
    words = source.choices(WORDS, k=source.randint(1, 12))
    return "a" + " ".join(words) + "z"

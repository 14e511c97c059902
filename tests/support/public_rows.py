"""Rows in the columns of public data sets of reasoning, and the options that read them.

Columns are those of each data set's card; the words are these tests'.
"""

from dataclasses import dataclass
from typing import Any

QUESTION = "What is 2 + 2?"
THOUGHT = "Add them."
ANSWER = "It is 4."
SYSTEM = "Think first."
THINK = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
USER = {"role": "user", "content": QUESTION}
CHAT = [USER, {"role": "assistant", "content": THINK}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
        ],
    },
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": ANSWER},
]
# The line feed before it is part of a token that begins in the header.
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'


@dataclass(frozen=True)
class PublicRow:
    """A row of a data set. options: what `rsr` is told beside INPUT. scored: the texts that score,
    of each row that it becomes. context: what else the student must read."""

    name: str
    row: dict[str, Any]
    options: str
    scored: list[str]
    context: str = QUESTION


def turns(*, human: str = "user", assistant: str = "assistant") -> list[dict[str, str]]:
    return [{"from": human, "value": QUESTION}, {"from": assistant, "value": THINK}]


PUBLIC_ROWS = [
    PublicRow(
        "OpenR1-Math-220k",
        {"problem": QUESTION, "answer": "4", "generations": [ANSWER], "messages": CHAT},
        "",
        [THINK],
    ),
    PublicRow(
        "OpenR1-Math-220k, all generations",
        {
            "problem": QUESTION,
            "answer": "4",
            "generations": [THINK, ANSWER],
            "correctness_math_verify": [True, False],
            "finish_reasons": None,
            "messages": CHAT,
        },
        "--prompt-column problem --explode-responses generations "
        "--explode-column correctness_math_verify",
        [THINK, ANSWER],
    ),
    PublicRow(
        "OpenThoughts-114k",
        {"system": SYSTEM, "conversations": turns()},
        "--system-column system",
        [THINK],
        SYSTEM,
    ),
    PublicRow(
        "OpenThoughts3-1.2M",
        {"domain": "math", "conversations": turns(human="human", assistant="gpt")},
        "",
        [THINK],
    ),
    PublicRow("NuminaMath-CoT", {"problem": "p", "solution": "s", "messages": CHAT}, "", [THINK]),
    PublicRow(
        "NuminaMath-1.5",
        {"problem": QUESTION, "solution": ANSWER, "answer": "4"},
        "--prompt-column problem --response-column solution",
        [ANSWER],
    ),
    PublicRow("Mixture-of-Thoughts", {"messages": CHAT, "num_tokens": 9}, "", [THINK]),
    PublicRow(
        "Llama-Nemotron-Post-Training-Dataset",
        {"input": [USER], "output": THINK, "reasoning": "on", "system_prompt": SYSTEM},
        "--prompt-column input --response-column output --system-column system_prompt",
        [THINK],
        SYSTEM,
    ),
    PublicRow(
        "Nemotron-Post-Training-Dataset-v1",
        {"reasoning": "on", "messages": [{**message, "tool_calls": []} for message in CHAT]},
        "",
        [THINK],
    ),
    PublicRow(
        "OpenMathReasoning",
        {"problem": QUESTION, "generated_solution": THINK, "expected_answer": "4"},
        "--prompt-column problem --response-column generated_solution",
        [THINK],
    ),
    PublicRow(
        "OpenCodeReasoning",
        {"input": QUESTION, "output": THINK, "solution": "4"},
        "--prompt-column input --response-column output",
        [THINK],
    ),
    PublicRow(
        "Bespoke-Stratos-17k",
        {"system": SYSTEM, "conversations": turns()},
        "--system-column system",
        [THINK],
        SYSTEM,
    ),
    PublicRow(
        "s1K-1.1",
        {
            "question": QUESTION,
            "deepseek_thinking_trajectory": THOUGHT,
            "deepseek_attempt": ANSWER,
        },
        "--prompt-column question --response-column deepseek_attempt "
        "--reasoning-column deepseek_thinking_trajectory",
        [THINK],
    ),
    PublicRow(
        "LIMO",
        {"question": QUESTION, "solution": ANSWER, "answer": "4"},
        "--prompt-column question --response-column solution",
        [ANSWER],
    ),
    PublicRow(
        "AM-DeepSeek-R1-Distilled-1.4M",
        {"messages": [{**message, "info": {"source": "x"}} for message in CHAT]},
        "",
        [THINK],
    ),
    PublicRow(
        "dolphin-r1",
        {"messages": [USER], "reasoning": THOUGHT, "answer": ANSWER, "model": "x"},
        "--prompt-column messages --response-column answer --reasoning-column reasoning",
        [THINK],
    ),
    PublicRow(
        "Multilingual-Thinking",
        {
            "messages": [
                {**USER, "thinking": None},
                {"role": "assistant", "content": ANSWER, "thinking": THOUGHT},
            ]
        },
        "",
        [THINK],
    ),
    PublicRow(
        "prompt and completion as messages",
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        "",
        [THINK],
    ),
    PublicRow(
        "prompt and completion as texts", {"prompt": QUESTION, "completion": THINK}, "", [THINK]
    ),
    PublicRow(
        "messages and a response",
        {"prompt_messages": [USER], "response": THINK},
        "--prompt-column prompt_messages --response-column response",
        [THINK],
    ),
    PublicRow(
        "rollouts",
        {"prompt": [USER], "responses": [THINK, ANSWER], "rewards": [1.0, 0.0]},
        "--explode-responses responses --explode-column rewards",
        [THINK, ANSWER],
    ),
    PublicRow(
        "preferences as messages",
        {"chosen": CHAT, "rejected": CHAT},
        "--messages-column chosen",
        [THINK],
    ),
    PublicRow(
        "preferences as texts",
        {"prompt": QUESTION, "chosen": THINK, "rejected": ANSWER},
        "--prompt-column prompt --response-column chosen",
        [THINK],
    ),
    PublicRow(
        "instructions",
        {"instruction": QUESTION, "input": "", "output": ANSWER},
        "--prompt-column instruction --response-column output",
        [ANSWER],
    ),
    PublicRow("conversations of roles", {"conversations": CHAT}, "", [THINK]),
    PublicRow(
        "SmolTalk2",
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}},
        "--chat-template-kwargs-column chat_template_kwargs",
        [THINK],
    ),
    PublicRow(
        "chats with tools",
        {"messages": CALLS, "tools": TOOLS},
        "--tools-column tools",
        [CALLED + ANSWER],
    ),
]

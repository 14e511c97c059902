"""What is scored is what training puts the loss on."""

import json

import pytest
from labelled_rows import labelled_rows, scored_ids
from toy_students import STUDENTS
from trl_rule import chat_labels, text_labels

from rsr.engine.chat import TrajectoryEncoder
from rsr.engine.trajectory import Trajectory

BY_NAME = {student.name: student for student in STUDENTS}


@pytest.mark.parametrize(
    ("name", "reasoning", "end_of_turn"),
    [
        ("Qwen3", "content", "<|im_end|>\n"),
        ("Qwen3", "field", "<|im_end|>\n"),
        ("Llama-3.1", "content", "<|eot_id|>"),
        ("Gemma-3", "content", "<end_of_turn>\n"),
    ],
)
def test_scored_tokens_of_a_chat_row_are_its_labels(name, reasoning, end_of_turn):
    student = BY_NAME[name]
    tokenizer = student.tokenizer()
    encoder = TrajectoryEncoder(
        tokenizer, chat_template=student.template, max_model_len=1 << 20, render="template"
    )
    ending = tokenizer.encode(end_of_turn, add_special_tokens=False)
    for prompt, completion in labelled_rows(reasoning=reasoning):
        labels = chat_labels(tokenizer, prompt, [completion])
        assert labels[-len(ending) :] == ending
        found = scored_ids(encoder, Trajectory(prompt=prompt, response=[completion]))
        assert found == labels[: -len(ending)]


@pytest.mark.parametrize("name", ["Qwen3", "R1-Qwen", "Llama-3.1", "Gemma-3"])
def test_scored_tokens_of_a_verbatim_row_are_the_labels_of_its_text(name):
    student = BY_NAME[name]
    tokenizer = student.tokenizer()
    encoder = TrajectoryEncoder(
        tokenizer, chat_template=student.template, max_model_len=1 << 20, render="verbatim"
    )
    for prompt, completion in labelled_rows(reasoning="content"):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        response = completion["content"]
        if text.endswith("<think>\n"):
            response = response.removeprefix("<think>\n")
        labels = text_labels(tokenizer, text, response)
        found = scored_ids(encoder, Trajectory(prompt=prompt, response=completion["content"]))
        assert found == labels[:-1]


def test_auto_reads_r1_rows_as_their_text_is_trained_on():
    student = BY_NAME["R1-Qwen"]
    options = {"chat_template": student.template, "max_model_len": 1 << 20}
    auto = TrajectoryEncoder(student.tokenizer(), **options)
    verbatim = TrajectoryEncoder(student.tokenizer(), **options, render="verbatim")
    for prompt, completion in labelled_rows(reasoning="content"):
        if "</think>" in completion["content"]:
            row = Trajectory(prompt=prompt, response=[completion])
            assert auto.encode(row) == verbatim.encode(row)


def test_tools_and_template_arguments_of_a_row_are_passed_on_as_in_training():
    student = BY_NAME["Gemma-4"]
    template = student.template.replace(
        "{{ bos_token }}", "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    )
    tokenizer = student.tokenizer()
    tokenizer.chat_template = template
    encoder = TrajectoryEncoder(tokenizer, chat_template=template, max_model_len=1 << 20)
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    ids = tokenizer.apply_chat_template(
        messages, tools=tools, enable_thinking=True, tokenize=True, return_dict=False
    )
    for given in (tools, json.dumps(tools)):
        row = Trajectory(messages, tools=given, chat_template_kwargs='{"enable_thinking": true}')
        assert encoder.encode(row).token_ids == ids

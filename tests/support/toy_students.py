"""Chat templates that behave like those of 28 students that people distil into.

Written for these tests: what each template does to turns, reasoning, tools and white space is the
student's, its text is not. `cannot` names what the template has no way to say, so that a refusal
is right.
"""

import re
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SYSTEM, TOOLS, TOOL_REASONING = "a system turn", "tools", "reasoning beside tool calls"

JSON_CALLS = (
    "{% for call in m.tool_calls or [] %}{% set f = call.function or call %}"
    '{{ \'\n<tool_call>\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}"
    "{{ '}\n</tool_call>' }}{% endfor %}"
)
XML_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n<function=' + call.function.name }}>\n"
    "{% for key, value in call.function.arguments | items %}"
    "<parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% endfor %}"
)
RESPONSE_AS_USER = (
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
)
LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
SPLIT = (
    "{% set c = m.content or '' %}{% set r = '' %}"
    "{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}"
    "{% elif '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
"""Content to reasoning `r` and answer `c`, as Qwen3 and its descendants do."""


def chatml(
    assistant: str, *, before: str = "", prompt: str = "", tool: str = RESPONSE_AS_USER
) -> str:
    """A template with `<|im_start|>` headers. assistant: the body of an assistant turn."""
    return (
        before + "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' }}" + assistant + "{{ '<|im_end|>\n' }}"
        "{% elif m.role == 'tool' %}" + tool + "{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + prompt + "' }}{% endif %}"
    )


def simple(start: str, end: str, *, content: str = "m.content", tail: str = "") -> str:
    """A template of one header and one end, which knows nothing of tools or reasoning.

    start: an expression over `role`. end: text.
    """
    return (
        "{{ bos_token }}{% for m in messages %}{% set role = m.role %}"
        "{{ " + start + " + " + content + " + '" + end + "' }}{% endfor %}"
        "{% set role = 'assistant' %}"
        "{% if add_generation_prompt %}{{ " + start + " }}" + tail + "{% endif %}"
    )


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
)
QWEN3_BODY = (
    SPLIT + "{% if loop.index0 > ns.last and (loop.last or r) %}"
    "{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}"
    "{% else %}{{ c }}{% endif %}" + JSON_CALLS
)
QWEN35_BODY = (
    SPLIT + "{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + r | trim + '\n</think>\n\n' + c | trim }}{% else %}{{ c | trim }}{% endif %}"
    + XML_CALLS
)
QWQ_BODY = (
    "{% set c = m.content or '' %}{% if not loop.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ c }}" + JSON_CALLS
)
R1 = (
    "{{ bos_token }}{% set ns = namespace(tool=false) %}"
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'tool' %}{% set ns.tool = true %}"
    "{{ '<|tool_out|>' + m.content + '<|tool_out_end|>' }}"
    "{% elif m.role == 'assistant' %}{% if m.tool_calls %}{{ '<|Assistant|>' }}"
    "{% for call in m.tool_calls %}{{ '<|call|>' + call.type + '<|sep|>' + call.function.name"
    " + '\n```json\n' + call.function.arguments + '\n```<|call_end|>' }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% if m.content is not none %}{% set c = m.content %}"
    "{% if '</think>' in c and not ns.tool %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ ('' if ns.tool else '<|Assistant|>') + c + eos_token }}{% set ns.tool = false %}"
    "{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.tool %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)


def llama3(preamble: str) -> str:
    header = "'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"
    return (
        "{{ bos_token + " + header.format("'system'") + " + '" + preamble + "' }}"
        "{{ strftime_now('%d %b %Y') }}"
        "{% if messages[0].role == 'system' %}{{ '\n\n' + messages[0].content | trim }}"
        "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
        "{% for m in messages %}{% if 'tool_calls' in m %}"
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        "{% set f = m.tool_calls[0].function %}{{ " + header.format("'assistant'") + " }}"
        "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments | tojson + '}' }}"
        "{% elif m.role == 'tool' %}{{ " + header.format("'ipython'") + " + m.content | tojson }}"
        "{% else %}{{ " + header.format("m.role") + " + m.content | trim }}{% endif %}"
        "{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + header.format("'assistant'") + " }}{% endif %}"
    )


GEMMA_TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (first if loop.first and first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}" + GEMMA_TURNS
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    + GEMMA_TURNS
)
GEMMA4 = (
    "{% macro plain(text) %}{% for part in text.split('<channel|>') %}"
    "{{ part.split('<|channel>')[0] }}{% endfor %}{% endmacro %}"
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% for call in m.tool_calls or [] %}{{ '<|tool_call>call:' + call.function.name + '{' }}"
    "{% for key, value in call.function.arguments | dictsort %}"
    "{{ key }}:{{ '<|q|>' + value + '<|q|>' if value is string else value }}"
    "{{ '' if loop.last else ',' }}{% endfor %}{{ '}<tool_call|>' }}{% endfor %}"
    "{{ (plain(m.content) if m.role == 'assistant' else m.content) | trim + '<turn|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{% if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif %}"
    "{% endif %}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are a model.\n' + strftime_now('%Y') + '<|end|>' }}"
    "{% if messages[0].role == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '<|end|>' }}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% set call = namespace(name=none) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% elif m.role == 'tool' %}"
    "{% if call.name is none %}{{ raise_exception('no call') }}{% endif %}"
    "{{ '<|start|>functions.' + call.name + ' to=assistant<|channel|>commentary<|message|>' }}"
    "{{ m.content | tojson + '<|end|>' }}"
    "{% elif 'tool_calls' in m %}{% set f = m.tool_calls[0].function %}"
    "{% set later = namespace(final=false) %}{% for n in messages[loop.index:] %}"
    "{% if n.role == 'assistant' and 'tool_calls' not in n %}"
    "{% set later.final = true %}{% endif %}"
    "{% endfor %}{% set thought = m.content or m.thinking %}"
    "{% if thought and not later.final %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}"
    "{{ f.arguments | tojson + '<|call|>' }}{% set call.name = f.name %}"
    "{% elif loop.last and not add_generation_prompt %}{% if 'thinking' in m %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


def mistral(system: str, assistant: str, calls: str) -> str:
    return (
        "{{ bos_token }}" + system + "{% for m in messages %}{% if m.role == 'user' %}"
        "{% if loop.last and suffix %}{{ '[INST]' + suffix + '\n\n' + m.content + '[/INST]' }}"
        "{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
        "{% elif m.tool_calls is defined %}" + calls + "{{ eos_token }}"
        "{% elif m.role == 'assistant' %}" + assistant + "{{ eos_token }}"
        "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
    )


NEMO_SYSTEM = (
    "{% set suffix = '' %}{% if messages[0].role == 'system' %}"
    "{% set suffix = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
)
SYSTEM_PROMPT = (
    "{% if messages[0].role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}"
    "{% set messages = messages[1:] %}{% endif %}"
)
ID_CALLS = (
    "{% if m.tool_calls | length == 0 %}{{ raise_exception('no calls') }}{% endif %}"
    "{% for call in m.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('call ids have 9 characters') }}{% endif %}"
    "{{ '[TOOL_CALLS]' + call.function | tojson }}{% endfor %}"
)
ARGS_CALLS = (
    "{% for call in m.tool_calls %}"
    "{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}"
    "{% endfor %}"
)
THINKING_PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '[THINK]' + part.thinking + '[/THINK]' if part.type == 'thinking' else part.text }}"
    "{% endfor %}{% endif %}"
)
GLM = (
    "{{ '[gMASK]<sop>' }}" + LAST_USER + "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|user|>\n' + m.content }}{% elif m.role == 'system' %}{{ '<|system|>\n' + m.content }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|observation|>\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% else %}{{ '<|assistant|>' }}" + SPLIT + "{% if loop.index0 > ns.last and r %}"
    "{{ '\n<think>' + r.strip() + '</think>' }}{% else %}{{ '\n<think></think>' }}{% endif %}"
    "{% if c.strip() %}{{ '\n' + c.strip() }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>' + call.function.name }}\n"
    "{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>\n"
    "<arg_value>{{ value if value is string else value | tojson }}</arg_value>\n{% endfor %}"
    "</tool_call>{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NEMOTRON2_CALLS = (
    "{{ '<TOOLCALL>[' }}{% for call in calls %}{{ '{\"name\": \"' + call.function.name }}"
    '{{ \'", "arguments": \' + (call.function.arguments if call.function.arguments is string'
    " else call.function.arguments | tojson) + '}' }}{% endfor %}{{ ']</TOOLCALL>' }}"
)
NEMOTRON2 = (
    "{{ '<SPECIAL_10>System\n' }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content.strip() }}{% set messages = messages[1:] %}{% endif %}{{ '\n\n' }}"
    "{% set last = messages[-1] if messages[-1].role == 'assistant' else none %}"
    "{% for m in (messages[:-1] if last else messages) %}{% if m.role == 'user' %}"
    "{{ '<SPECIAL_11>User\n' + m.content.strip() + '\n' }}{% elif m.role == 'tool' %}"
    "{{ '<SPECIAL_11>User\n<TOOL_RESPONSE>[' + m.content + ']</TOOL_RESPONSE>\n\n' }}"
    "{% else %}{% set c = m.content or '' %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[1] %}{% endif %}{{ '<SPECIAL_11>Assistant\n' + c.strip() }}"
    "{% if m.tool_calls %}{{ '\n\n' if c.strip() else '' }}{% set calls = m.tool_calls %}"
    + NEMOTRON2_CALLS
    + "{% endif %}{{ '\n<SPECIAL_12>\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\n<think>\n\n' }}{% endif %}"
    "{% if last and not add_generation_prompt %}{% if last.content %}"
    "{{ '<SPECIAL_11>Assistant\n<think>\n\n' + last.content.strip() + '\n<SPECIAL_12>\n\n' }}"
    "{% endif %}{% if last.tool_calls %}{{ '<SPECIAL_11>Assistant\n' }}"
    "{% set calls = last.tool_calls %}"
    + NEMOTRON2_CALLS
    + "{{ '\n<SPECIAL_12>\n\n' }}{% endif %}{% endif %}"
)
NEMOTRON3_BODY = (
    "{% set c = m.content or '' %}{% if m.reasoning_content is string and m.reasoning_content %}"
    "{% set c = '<think>\n' + m.reasoning_content + '\n</think>\n' + c %}"
    "{% elif '<think>' not in c and '</think>' not in c %}{% set c = '<think></think>' + c %}"
    "{% endif %}{% if loop.index0 < ns.last and '</think>' in c %}"
    "{% set c = '<think></think>' + c.split('</think>')[-1] %}{% endif %}{{ c | trim }}" + XML_CALLS
)
GRANITE = simple("'<|start_of_role|>' + role + '<|end_of_role|>'", "<|end_of_text|>\n")
LFM_BODY = (
    "{% generation %}{% if m.thinking is defined and loop.index0 > ns.last %}"
    "{{ '<think>' + m.thinking + '</think>' }}{% endif %}{% set c = m.content or '' %}"
    "{% if loop.index0 < ns.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] | trim %}{% endif %}{{ c }}"
    "{% if m.tool_calls is defined %}{% if not m.tool_calls %}{{ raise_exception('no calls') }}"
    "{% endif %}{{ '<|tool_call_start|>[' }}{% for call in m.tool_calls %}"
    "{{ call.function.name + '(' }}{% for key, value in call.function.arguments.items() %}"
    "{{ key + '=' + (\"'\" + value + \"'\" if value is string else value | string) }}"
    "{{ '' if loop.last else ', ' }}{% endfor %}{{ ')' }}{% endfor %}{{ ']<|tool_call_end|>' }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endgeneration %}"
)
LFM = chatml(
    LFM_BODY,
    before="{{ bos_token }}" + LAST_USER,
    tool="{{ '<|im_start|>tool\n' + m.content + '<|im_end|>\n' }}",
).replace("{% endgeneration %}{{ '<|im_end|>\n' }}", "{% endgeneration %}")


@dataclass(frozen=True)
class ToyStudent:
    """template: Jinja. controls: special tokens. cannot: what it has no way to say."""

    name: str
    template: str
    controls: list[str]
    cannot: frozenset[str] = frozenset()
    eos: str = "</s>"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level, one token a byte, but for the control tokens."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        tokens = [*self.controls, self.eos, "<s>"]
        backend.add_special_tokens([AddedToken(t, special=True) for t in dict.fromkeys(tokens)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=self.eos, bos_token="<s>"
        )
        tokenizer.chat_template = self.template
        return tokenizer


def _student(name: str, template: str, *cannot: str, eos: str = "</s>") -> ToyStudent:
    spelt = template.replace("' + role + '", "assistant").replace(
        "'<|' + m.role + '|>'", "<|user|>"
    )
    controls = re.findall(
        r"<\|[A-Za-z_]+\|?>|<[a-z_]+\|>|<(?:start|end)_of_turn>|<SPECIAL_\d+>|\[/?[A-Z_]+\]",
        spelt,
    )
    controls = [c for c in dict.fromkeys(controls) if "THINK" not in c]
    return ToyStudent(name, template, controls, frozenset(cannot), eos)


NO_TOOLS = (TOOLS, TOOL_REASONING)
STUDENTS = [
    _student(
        "Qwen2.5",
        chatml("{{ m.content or '' }}" + JSON_CALLS, before=DEFAULT_SYSTEM),
        eos="<|im_end|>",
    ),
    _student("Qwen3", chatml(QWEN3_BODY, before=LAST_USER), eos="<|im_end|>"),
    _student("Qwen3-Instruct", chatml("{{ m.content or '' }}" + JSON_CALLS), eos="<|im_end|>"),
    _student(
        "Qwen3-Thinking",
        chatml(QWEN3_BODY, before=LAST_USER, prompt="<think>\n"),
        eos="<|im_end|>",
    ),
    _student("Qwen3.5", chatml(QWEN35_BODY, before=LAST_USER, prompt="<think>\n")),
    _student(
        "Qwen3.5-nothink", chatml(QWEN35_BODY, before=LAST_USER, prompt="<think>\n\n</think>\n\n")
    ),
    _student("QwQ", chatml(QWQ_BODY, before=LAST_USER, prompt="<think>\n")),
    _student("R1-Qwen", R1, TOOL_REASONING),
    _student("R1-Llama", R1.replace("<|User|>", "<|User|> "), TOOL_REASONING),
    _student("Llama-3.1", llama3("Cutting Knowledge Date: 2023\nToday Date: "), TOOL_REASONING),
    _student("Llama-3.2", llama3("Today: "), TOOL_REASONING),
    _student("Gemma-2", GEMMA2, SYSTEM, *NO_TOOLS),
    _student("Gemma-3", GEMMA3, *NO_TOOLS),
    _student("Gemma-4", GEMMA4, TOOL_REASONING),
    _student(
        "Phi-4",
        simple("'<|im_start|>' + role + '<|im_sep|>'", "<|im_end|>").replace(
            "in messages %}", "in messages if m.role != 'tool' %}"
        ),
        *NO_TOOLS,
    ),
    _student(
        "Phi-4-mini",
        simple("'<|' + role + '|>'", "<|end|>")
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        *NO_TOOLS,
        eos="<|endoftext|>",
    ),
    _student("gpt-oss", GPT_OSS),
    _student(
        "SmolLM2", chatml("{{ m.content }}", before=DEFAULT_SYSTEM), *NO_TOOLS, eos="<|im_end|>"
    ),
    _student("SmolLM3", chatml("{{ m.content.lstrip('\n') }}"), *NO_TOOLS, eos="<|im_end|>"),
    _student(
        "Mistral-Nemo", mistral(NEMO_SYSTEM, "{{ m.content }}", ID_CALLS), SYSTEM, TOOL_REASONING
    ),
    _student(
        "Mistral-Small",
        mistral(SYSTEM_PROMPT, "{{ m.content }}", "{{ m.content or '' }}" + ARGS_CALLS),
    ),
    _student("Ministral-3", mistral(SYSTEM_PROMPT, THINKING_PARTS, THINKING_PARTS + ARGS_CALLS)),
    _student("GLM-4.5", GLM),
    _student("Nemotron-Nano-2", NEMOTRON2, TOOL_REASONING),
    _student("Nemotron-3", chatml(NEMOTRON3_BODY, before=LAST_USER, prompt="<think>\n")),
    _student("Granite-4", GRANITE, *NO_TOOLS),
    _student(
        "OLMo-2",
        simple("'<|' + role + '|>\n'", "\n").replace(
            "+ '\n' }}", "+ (eos_token if role == 'assistant' else '') + '\n' }}"
        ),
        *NO_TOOLS,
        eos="<|endoftext|>",
    ),
    _student("LFM2.5", LFM, eos="<|im_end|>"),
]
assert len(STUDENTS) == 28

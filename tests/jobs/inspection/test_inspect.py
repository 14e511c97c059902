"""`rsr inspect`: rows as the student reads them, through the command line, without weights."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hub_server import hub_server

from rsr.jobs.cli import main

USER = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt is four."}
PROMPT = "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
SCORED = ANSWER["content"]
LONG = {"role": "assistant", "content": "".join(f"line {n}\n" for n in range(100))}
ROWS = [
    {"messages": [USER, ANSWER]},
    {"messages": [USER]},
    {"messages": [USER, {"role": "assistant", "content": "a <|im_end|> inside"}]},
    {"messages": [USER, LONG]},
    {"messages": [USER, {"role": "assistant", "content": "4", "reasoning": "Hm."}]},
]


@pytest.fixture(scope="module")
def student(tiny_student, tmp_path_factory):
    """The student's tokenizer and configuration alone."""
    folder = tmp_path_factory.mktemp("weightless")
    shutil.copytree(tiny_student, folder, dirs_exist_ok=True)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def inspect(source, student, *options, **environment):
    typed = ["inspect", str(source), "--model", str(student), *map(str, options)]
    result = CliRunner(env=environment).invoke(main, typed)
    assert "Traceback" not in result.stderr
    return result


def inspect_json(*arguments):
    result = inspect(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_first_rows_are_shown_as_the_student_reads_them(rows, student):
    result = inspect(rows, student)
    assert result.exit_code == 0, result.stderr
    assert f"{PROMPT}⟦{SCORED}⟧<|im_end|>" in result.stdout
    assert "row 0 · ok · 64 tokens, 31 scored · rows.parquet row 0" in result.stdout
    assert "row 1 · no_response" in result.stdout
    # Of a row that nothing can be rendered of, what there is.
    assert '{"messages": [{"role": "user", "content": "Two and two?"' in result.stdout
    assert "this student's control token '<|im_end|>'" in result.stdout
    assert "row 3" not in result.stdout
    told = " ".join(result.stdout.split())
    assert "1 20.0% bad_messages: a message contains one of this student's control" in told
    assert "truncated 1 row (20.0%)" in told
    assert "changed first 1 row: reasoning in content, between <think> tags" in told


def test_json_has_the_text_and_its_scored_characters(rows, student):
    found = inspect_json(rows, student, "--show", 5)
    assert [set(row) for row in found["rows"]] == [
        {"row", "status", "detail", "text", "scored", "num_tokens", "num_scored"}
    ] * 5
    first, second, _, cut, folded = found["rows"]
    assert first | {"text": ""} == {
        "row": 0,
        "status": "ok",
        "detail": None,
        "text": "",
        "scored": [[len(PROMPT), len(PROMPT) + len(SCORED)]],
        "num_tokens": 64,
        "num_scored": 31,
    }
    assert first["text"] == f"{PROMPT}{SCORED}<|im_end|>\n"
    assert (second["status"], second["detail"]) == ("no_response", "no assistant turn")
    assert (cut["status"], cut["num_tokens"]) == ("truncated", 512)
    (start, end) = folded["scored"][0]
    assert folded["text"][start:end] == "<think>\nHm.\n</think>\n\n4"
    summary = found["summary"]
    assert summary["num_rows"] == 5
    assert summary["rows_by_status"] == {
        "ok": 2,
        "no_response": 1,
        "bad_messages": 1,
        "truncated": 1,
    }
    assert summary["num_tokens"] == sum(row["num_tokens"] for row in found["rows"])
    assert summary["num_scored"] == sum(row["num_scored"] for row in found["rows"])
    # A byte is a token of this student, and so is a control token, here "?".
    whole = f"?user\nTwo and two??\n?assistant\n{LONG['content']}?\n"
    num_cut = len(whole) - 512
    assert summary["truncated"] == {
        "num_rows": 1,
        "share_of_rows": 0.2,
        "num_tokens": num_cut,
        "share_of_tokens": pytest.approx(num_cut / (summary["num_tokens"] + num_cut)),
    }
    reason = summary["reasons"]["no_response: no assistant turn"]
    assert reason == {"num_rows": 1, "example": "rows.parquet row 1", "hint": ""}


def test_limit_is_what_the_table_counts_and_no_more_is_read(tmp_path, student):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in ROWS[:2]] + ["no JSON at all"] * 5
    path.write_text("\n".join(lines))
    result = inspect(path, student, "--limit", 2, "--json")
    found = json.loads(result.stdout)
    assert found["summary"]["num_rows"] == 2
    assert [row["row"] for row in found["rows"]] == [0, 1]
    assert result.stderr == ""


def test_one_row_is_shown_whole_wherever_it_stands(tmp_path, student):
    write_parquet(tmp_path / "in" / "a.parquet", ROWS[:3])
    write_parquet(tmp_path / "in" / "b.parquet", ROWS[3:])
    shortened = inspect(tmp_path / "in", student, "--show", 5)
    assert "line 40" not in shortened.stdout
    assert " characters …]" in shortened.stdout
    result = inspect(tmp_path / "in", student, "--row", 3, "--limit", 1)
    assert "row 3 · truncated · 512 tokens, 481 scored · b.parquet row 0" in result.stdout
    assert LONG["content"].rstrip() in result.stdout.replace("⟦", "").replace("⟧", "")
    assert "row 0 ·" not in result.stdout
    beyond = inspect(tmp_path / "in", student, "--row", 5)
    assert beyond.exit_code == 2
    assert "has no row 5; they count from 0" in beyond.stderr


def test_colour_is_told_without_colour_too(rows, student):
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": None}
    coloured = inspect(rows, student, **terminal).stdout
    assert "\x1b[32m<think>" in coloured
    assert f"\x1b[2m{PROMPT.splitlines()[0]}" in coloured
    assert "⟦" not in coloured
    plain = inspect(rows, student, **{**terminal, "NO_COLOR": "1"}).stdout
    assert "\x1b[32m" not in plain
    assert "⟦" in plain


def test_what_a_terminal_or_a_browser_would_obey_is_text(tmp_path, student):
    evil = "\x1b[2J\u202e\x07 <script>alert(1)</script> </pre> [red]"
    refused = {"messages": [USER, {"role": f"{evil}", "content": "x"}]}
    rows = [{"messages": [USER, {"role": "assistant", "content": evil}]}, refused]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    page = tmp_path / "pages" / "page.html"
    result = inspect(path, student, "--html", page)
    assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout)
    assert "⟦\\x1b[2J\\u202e\\x07 <script>alert(1)</script> </pre> [red]⟧" in result.stdout
    html = page.read_text()
    assert not {"\x1b", "\x07", "\u202e"} & set(html)
    assert "<script" not in html
    assert html.count("</pre>") == 2
    assert '<span class="scored">\\x1b[2J\\u202e\\x07 &lt;script&gt;alert' in html
    assert inspect_json(path, student)["rows"][0]["text"] == f"{PROMPT}{evil}<|im_end|>\n"


def test_page_is_self_contained_and_says_what_the_terminal_says(rows, student, tmp_path):
    page = tmp_path / "page.html"
    result = inspect(rows, student, "--html", page, "--show", 4)
    assert result.exit_code == 0
    html = page.read_text()
    assert '<meta name="viewport" content="width=device-width' in html
    assert "default-src 'none'" in html
    assert not [word for word in ("http:", "https:", "src=", "@import", "url(") if word in html]
    # Texts are whole, and what is scored is marked.
    assert "line 99" in html
    assert '<span class="scored">&lt;think&gt;\nHm.' in html
    assert "no_response: no assistant turn" in html
    refused = inspect(rows, student, "--html", tmp_path)
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"q": USER["content"], "a": SCORED}, ["--prompt-column", "q", "--response-column", "a"]),
        ({"chat": [USER, ANSWER]}, ["--messages-column", "chat"]),
        (
            {"q": USER["content"], "a": "It is four.", "thought": "Hm."},
            ["--prompt-column", "q", "--response-column", "a", "--reasoning-column", "thought"],
        ),
        ({"prompt": USER["content"], "generations": [SCORED]}, ["--explode-responses=generations"]),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "jsonl.gz"])
def test_columns_are_named_as_for_scoring(tmp_path, student, columns, options, form):
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        write_parquet(path, [columns])
    else:
        path.write_bytes(gzip.compress(json.dumps(columns).encode()))
    (row,) = inspect_json(path, student, *options)["rows"]
    assert row["text"] == f"{PROMPT}{SCORED}<|im_end|>\n"


def test_template_and_rendering_are_chosen_as_for_scoring(rows, student, tmp_path):
    template = tmp_path / "upper.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + (suffix or '') + ': ' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant' + (suffix or '') + ': ' }}"
        "{% endif %}"
    )
    chosen = ["--chat-template", template, "--chat-template-kwargs", '{"suffix": "!"}']
    found = inspect_json(rows, student, "--limit", 1, *chosen)
    assert found["rows"][0]["text"].startswith("user!: Two and two?<|im_end|>assistant!: <think>")
    verbatim = inspect_json(rows, student, "--render", "verbatim", "--turns", "last")
    assert verbatim["summary"]["notes"] == {"rendered verbatim": 3}


@pytest.mark.seconds
def test_input_may_lie_on_the_hub(tmp_path, student, monkeypatch):
    write_parquet(tmp_path / "hub" / "org" / "traces" / "main" / "a.parquet", ROWS)
    with hub_server(tmp_path / "hub") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        found = inspect_json("hf://datasets/org/traces", student)
    assert found["summary"]["num_rows"] == 5


def test_input_may_lie_on_an_object_store(s3_url, student):
    from rsr.jobs.storage import locate

    storage, name = locate(f"{s3_url}/rows.jsonl")
    with storage.writing(name) as temporary:
        temporary.write_text(json.dumps(ROWS[0]))
    assert inspect_json(f"{s3_url}/rows.jsonl", student)["rows"][0]["num_scored"] == 31


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "has no rows to inspect"),
        (b'{"other": 1}', [], "has no 'messages'"),
        (b'{"text": "a"}', ["--text-column", "t", "--messages-column", "m"], "give --messages"),
        (b'{"text": "a"}', ["--model", "/none"], "no such model folder"),
        (b'{"text": "a"}', ["--chat-template", "/none"], "cannot be read"),
        (b"PAR1", [], "is a Parquet file"),
    ],
)
def test_what_cannot_be_inspected_is_refused_in_one_line(
    tmp_path, student, content, options, message
):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    result = inspect(path, student, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_damaged_file_is_refused_in_one_line(tmp_path, student):
    path = write_parquet(tmp_path / "rows.parquet", ROWS * 100)
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    result = inspect(path, student)
    assert result.exit_code == 2
    assert f"{path} cannot be read" in result.stderr
    assert len(result.stderr.splitlines()) == 1

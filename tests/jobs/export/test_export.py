"""`rsr export`: read back by the libraries that it is for; resumed, refused, verified, pushed."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from hub_server import TOKEN, hub_server

from rsr.jobs.cli import main
from rsr.jobs.storage import open_storage

THOUGHT = "<think>\n2 + 2, so\n</think>\n\n4"


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATIONS = [
    [turn("user", "2 + 2?"), turn("assistant", THOUGHT)],
    [turn("system", "Be brief."), turn("user", "3 + 3?"), turn("assistant", "6")],
    [
        turn("user", "1 + 1?"),
        turn("assistant", "2"),
        turn("user", "Sure? ✓"),
        turn("assistant", "Yes"),
    ],
    [turn("user", "never answered")],
]
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])


def table(num_copies=1, ids=True):
    conversations = CONVERSATIONS * num_copies
    columns = {
        "messages": pa.array(conversations, pa.list_(MESSAGE)),
        "problem_id": pa.array(range(len(conversations)), pa.int16()),
        "teacher": [f"teacher {i % 3}" for i in range(len(conversations))],
    }
    if ids:
        columns["id"] = [f"row {i}" for i in range(len(conversations))]
    return pa.table(columns)


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output + result.stderr
    return result


@pytest.fixture
def selected(tmp_path, write_scored):
    """Two scored files; one row in four cannot be trained on."""
    for number in range(2):
        rows = table(3).slice(number * 6, 6)
        columns = dict(zip(rows.column_names, rows.columns, strict=True))
        write_scored(tmp_path / "in" / f"{number}.parquet", [1.5] * 6, columns=columns)
    return tmp_path / "in"


def exported(folder):
    """Rows by the JSON lines, which must be those of the Parquet files."""
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    files = sorted((folder / "data").glob("train-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [without_nulls(row) for row in rows] == lines
    return lines


def without_nulls(value):
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


EXPECTED = {
    "messages": [{"messages": conversation} for conversation in CONVERSATIONS[:3]],
    "prompt-completion": [
        {"prompt": conversation[:-1], "completion": conversation[-1:]}
        for conversation in CONVERSATIONS[:3]
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "gpt", "value": THOUGHT},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "3 + 3?"},
                {"from": "gpt", "value": "6"},
            ],
            "system": "Be brief.",
        },
        {
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "gpt", "value": "2"},
                {"from": "human", "value": "Sure? ✓"},
                {"from": "gpt", "value": "Yes"},
            ]
        },
    ],
    "alpaca": [
        {"instruction": "2 + 2?", "input": "", "output": THOUGHT},
        {"instruction": "3 + 3?", "input": "", "output": "6", "system": "Be brief."},
        {
            "instruction": "Sure? ✓",
            "input": "",
            "output": "Yes",
            "history": [["1 + 1?", "2"]],
        },
    ],
}


@pytest.mark.seconds
@pytest.mark.parametrize("form", list(EXPECTED))
def test_rows_are_read_back_by_datasets_as_they_were(selected, tmp_path, form, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    result = run("export", selected, out, "--format", form, "--shard-rows", "4", exit_code=1)
    assert "left out, 3 rows: the last turn is not the assistant's" in result.stderr
    ids = [i for i in range(12) if i % 4 != 3]
    wanted = [{"id": f"row {i}", **EXPECTED[form][i % 4]} for i in ids]
    assert exported(out) == wanted
    cache = str(tmp_path / "cache")
    for loaded in (
        datasets.load_dataset(str(out), split="train", cache_dir=cache),
        datasets.load_dataset(
            "json", data_files=str(out / "train.jsonl"), split="train", cache_dir=cache
        ),
    ):
        assert [without_nulls(row) for row in loaded] == wanted
    scores = datasets.load_dataset(str(out), "scores", split="train", cache_dir=cache)
    assert scores["id"][:] == [row["id"] for row in wanted]
    assert set(scores["rsr"][:]) == {1.5}
    assert scores["problem_id"][:] == ids
    assert not {"messages"} & set(scores.column_names)
    assert len(list((out / "data").iterdir())) == 3


@pytest.mark.seconds
@pytest.mark.parametrize("form", ["messages", "prompt-completion"])
def test_trl_takes_the_rows_for_conversations(selected, tmp_path, form, make_tokenizer):
    data_utils = pytest.importorskip("trl.data_utils")
    run("export", selected, tmp_path / "out", "--format", form, exit_code=1)
    tokenizer = make_tokenizer()
    for row in exported(tmp_path / "out"):
        assert data_utils.is_conversational(row)
        applied = data_utils.apply_chat_template(row, tokenizer)
        text = applied.get("text") or applied["prompt"] + applied["completion"]
        conversation = row.get("messages") or row["prompt"] + row["completion"]
        assert all(message["content"] in text for message in conversation)


@pytest.mark.parametrize("form", list(EXPECTED))
def test_what_llama_factory_is_told_is_where_the_rows_are(selected, tmp_path, form):
    """Its documented format; the library itself wants another torch than this project's."""
    out = tmp_path / "out"
    run("export", selected, out, "--format", form, "--name", "mine", exit_code=1)
    if form == "prompt-completion":
        assert not (out / "dataset_info.json").exists()
        assert not (out / "axolotl.yaml").exists()
        return
    (told,) = json.loads((out / "dataset_info.json").read_text()).items()
    assert told[0] == "mine"
    assert (out / told[1]["file_name"]).is_file()
    rows = exported(out)
    assert set(told[1]["columns"].values()) <= {name for row in rows for name in row}
    (entry,) = yaml.safe_load((out / "axolotl.yaml").read_text())["datasets"]
    assert (out / entry["path"]).is_file()
    assert entry.get("field_messages", "instruction") in rows[0]


def test_card_says_what_is_known_and_guesses_no_licence(selected, tmp_path):
    run("select", selected, tmp_path / "best", "--group-by", "problem_id")
    run("export", tmp_path / "best", tmp_path / "out", exit_code=1)
    _, matter, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(matter)
    assert "license" not in told
    assert told["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    for part in (
        "No licence was stated",
        "student: `student`",
        "config_sha256: `0123`",
        "r_max 100",
        "rsr-engine 0.1.0",
        "rows of the pool: 12",
        "rows kept by the selection: 12",
        "exported: 9",
        "left out, 3: the last turn is not the assistant's",
        "selected by: `rsr",
    ):
        assert part in text, part
    options = ("--license", "apache-2.0", "--source", "GSM8K, MIT", "--overwrite")
    run("export", tmp_path / "best", tmp_path / "out", *options, exit_code=1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert "- GSM8K, MIT" in card


def test_order_is_shuffled_by_the_seed_alone(selected, tmp_path):
    orders = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ("--shuffle-seed", seed, "--shard-rows", 5)
        run("export", selected, tmp_path / name, *options, exit_code=1)
        rows = exported(tmp_path / name)
        orders[name] = [row["id"] for row in rows]
        assert all(row["messages"] == CONVERSATIONS[int(row["id"][4:]) % 4] for row in rows)
        scores = pq.read_table(tmp_path / name / "scores.parquet")
        assert scores["id"].to_pylist() == orders[name]
        assert [f"row {i}" for i in scores["problem_id"].to_pylist()] == orders[name]
    assert orders["a"] == orders["b"] != orders["c"]
    assert sorted(orders["a"]) == sorted(orders["c"])


def test_rows_that_no_column_tells_apart_get_ids_of_their_own(tmp_path):
    doubled = pa.concat_tables([table(), table()])
    pq.write_table(doubled, tmp_path / "rows.parquet")
    run("export", tmp_path / "rows.parquet", tmp_path / "out", exit_code=1)
    ids = [row["id"] for row in exported(tmp_path / "out")]
    assert ids == [f"rows.parquet#{i}" for i in range(8) if i % 4 != 3]
    refused = run(
        *("export", tmp_path / "rows.parquet", tmp_path / "other", "--id-column", "id"),
        exit_code=2,
    )
    assert "has 8 rows and 4 different values" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_tool_calls_keep_their_own_arguments(tmp_path):
    calls = [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}},
        {"type": "function", "function": {"name": "say", "arguments": {"text": "hi"}}},
    ]
    lines = [
        {
            "messages": [
                turn("user", "go"),
                turn("assistant", "", tool_calls=[call]),
                turn("tool", "done", tool_call_id="1"),
                turn("assistant", "done", reasoning_content="easy"),
            ],
            "tools": [{"type": "function", "function": {"name": "add"}}],
        }
        for call in calls
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--id-column", "none")
    run("export", tmp_path / "rows.jsonl", tmp_path / "out", *options, exit_code=2)
    run("export", tmp_path / "rows.jsonl", tmp_path / "out")
    rows = exported(tmp_path / "out")
    arguments = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert [json.loads(text) for text in arguments] == [{"a": 1}, {"text": "hi"}]
    assert rows[0]["messages"][3] == turn("assistant", "done", reasoning_content="easy")
    none = run(
        *("export", tmp_path / "rows.jsonl", tmp_path / "alpaca", "--format", "alpaca"),
        exit_code=2,
    )
    assert "no row can be exported: 2 alpaca" in none.stderr
    assert not (tmp_path / "alpaca").exists()


def test_status_verify_and_a_second_start_know_an_export(selected, tmp_path):
    out = tmp_path / "out"
    run("export", selected, out, "--shard-rows", 4, exit_code=1)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.*") if ".rsr" not in p.parts}
    run("export", selected, out, "--shard-rows", 4, exit_code=1)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    status = json.loads(run("status", out, "--json").stdout)
    assert (status["writer"], status["num_rows_done"], status["is_finished"]) == ("export", 9, True)
    run("verify", out, "--deep")
    (out / "train.jsonl").write_text("{}\n")
    told = run("verify", out, exit_code=1)
    assert "train.jsonl" in told.stdout
    (out / "train.jsonl").unlink()
    run("export", selected, out, "--shard-rows", 4, exit_code=1)
    run("verify", out, "--deep")
    other = run("export", selected, out, "--format", "alpaca", exit_code=2)
    assert "format was 'messages' and is now 'alpaca'" in other.stderr
    first = selected / "0.parquet"
    pq.write_table(pq.read_table(first).slice(0, 5), first)
    changed = run("export", selected, out, "--shard-rows", 4, exit_code=2)
    assert "input shards changed" in changed.stderr
    assert "has changed since" in run("verify", out, "--deep", exit_code=1).stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--format", "parquet"], "'parquet' is not one of"),
        (["--messages-column", "none"], "no column 'none'"),
        (["--id-column", "none"], "no column 'none'"),
        (["--push", "hf://datasets/org"], "expected hf://datasets/ORG/NAME"),
        (["--push", "hf://datasets/org/name/x"], "expected hf://datasets/ORG/NAME"),
        (["--push", "s3://bucket/name"], "expected hf://datasets/ORG/NAME"),
        (["--push", "hf://datasets/org/name"], "needs a token"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(
    selected, tmp_path, arguments, reason, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    refused = run("export", selected, tmp_path / "out", *arguments, exit_code=2)
    assert reason in refused.stderr
    assert not (tmp_path / "out").exists()


def test_store_holds_the_same_bytes_as_a_disk(selected, tmp_path, s3_url):
    for file in selected.iterdir():
        open_storage(f"{s3_url}/in").write(file.name, file.read_bytes())
    run("export", selected, tmp_path / "out", exit_code=1)
    run("export", f"{s3_url}/in", f"{s3_url}/out", exit_code=1)
    remote = open_storage(f"{s3_url}/out")
    names = {f.name for f in remote.list() if not f.name.startswith(".rsr/")}
    local = tmp_path / "out"
    files = (p for p in local.rglob("*") if p.is_file() and ".rsr" not in p.parts)
    assert names == {p.relative_to(local).as_posix() for p in files}
    for name in names - {"README.md"}:
        assert remote.read(name) == (local / name).read_bytes()
    run("verify", "--deep", f"{s3_url}/out")


@pytest.mark.slow
def test_interrupted_export_goes_on(tmp_path):
    pq.write_table(table(3000), tmp_path / "rows.parquet")
    command = [sys.executable, "-m", "rsr.jobs.cli", "export", "rows.parquet", "out"]
    command += ["--shard-rows", "200", "--shuffle-seed", "3"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    data = tmp_path / "out" / "data"
    while not (data.exists() and any(data.glob("*.parquet"))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75, process.stderr.read()
    kept = {p: p.stat().st_mtime_ns for p in data.glob("*.parquet")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    receipts = os.listdir(tmp_path / "out" / ".rsr" / "receipts" / "data")
    assert len(receipts) == len(list(data.glob("*.parquet"))) == 45
    assert all(p.stat().st_mtime_ns == then for p, then in list(kept.items())[:-1])
    assert len(exported(tmp_path / "out")) == 9000


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    with hub_server(tmp_path / "hub") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The hub is on this machine.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield tmp_path / "hub"


def test_export_is_pushed_to_the_hub_and_read_from_there(hub, selected, tmp_path):
    push = ("--push", "hf://datasets/org/mine")
    told = run("export", selected, tmp_path / "out", "--shard-rows", 4, *push, exit_code=1)
    assert "/datasets/org/mine/commit/" in told.stdout
    stored = hub / "org" / "mine" / "main"
    for path in (tmp_path / "out").rglob("*.*"):
        if path.is_file() and ".rsr" not in path.parts:
            assert (stored / path.relative_to(tmp_path / "out")).read_bytes() == path.read_bytes()
    assert not (stored / ".rsr").exists()
    (asked,) = (hub / "created.log").read_text().splitlines()
    assert json.loads(asked)["visibility"] == "private"
    # An export of fewer files leaves none of the longer one's behind.
    run("export", selected, tmp_path / "other", *push, exit_code=1)
    assert [p.name for p in (stored / "data").iterdir()] == ["train-00000-of-00001.parquet"]
    run("export", "hf://datasets/org/mine/data/*.parquet", tmp_path / "again")
    assert exported(tmp_path / "again") == exported(tmp_path / "other")


def test_hub_that_refuses_is_a_failure_of_the_push_alone(hub, selected, tmp_path):
    push = ("--push", "hf://datasets/full/mine")
    failed = run("export", selected, tmp_path / "out", *push, exit_code=1)
    (line,) = (line for line in failed.stderr.splitlines() if "full/mine" in line)
    assert "failed" in line
    run("verify", tmp_path / "out")

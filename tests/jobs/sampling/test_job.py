"""Sampling as a worker does it, step by step: stand-ins for the engine, then a real one."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from rsr.engine.config import ScorerConfig
from rsr.engine.messages import BadMessagesError
from rsr.engine.sampling import SampledText, Sampling
from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.run.events import Cause
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest
from rsr.jobs.run.store import RunStore
from rsr.jobs.sampling.blocks import Block
from rsr.jobs.sampling.columns import CANDIDATE_SCHEMA, seed_of
from rsr.jobs.sampling.job import SamplingJob, look_at_student
from rsr.jobs.sampling.prompts import PromptSource
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.shard import Unit, cut_units, describe_shard

PROBLEMS = ["1 + 1?", "2 + 2?", "", "3 + 3?", "a control token", None, "4 + 4?", "5 + 5?"]
MAKES_NO_PROMPT = [2, 4, 5]
PROBLEM_COLUMN = PromptSource(column="problem")


class EchoingEngine:
    """Answers with what it was asked and the seed."""

    max_num_batched_tokens = 512

    def __init__(self, config, sampling):
        pass

    def encode(self, messages):
        text = messages[-1]["content"]
        if text == "a control token":
            raise BadMessagesError("it has a control token", detail="it has <|im_end|>")
        return list(text.encode())

    def sample(self, requests):
        return [
            [
                SampledText(
                    f"{bytes(r.token_ids).decode()} {r.first_seed + k}",
                    "stop",
                    (r.first_seed + k) % 5,
                )
                for k in range(r.num_samples)
            ]
            for r in requests
        ]


def table(num_copies=1):
    problems = PROBLEMS * num_copies
    tags = pa.array([[f"tag {i}"] * (i % 3) for i in range(len(problems))], pa.list_(pa.string()))
    schema = pa.schema(
        [
            pa.field("id", pa.int16(), metadata={"unit": "none"}),
            pa.field("weight", pa.float32()),
            pa.field("problem", pa.string()),
            pa.field("tags", pa.list_(pa.string())),
        ],
        metadata={"mine": "kept"},
    )
    weights = [float("nan") if i % 4 == 1 else -0.0 for i in range(len(problems))]
    return pa.table([range(len(problems)), weights, problems, tags], schema=schema)


class SamplingRun:
    """A run of `SamplingJob` without a cluster: files of samples [first, stop) of one table."""

    def __init__(self, root, blocks=((0, 3),), open_engine=EchoingEngine, num_copies=1, **job):
        source = root / "in.parquet"
        if not source.exists():
            pq.write_table(table(num_copies), source)
        self.folder = RunFolder(root / "out")
        identity = Identity({"seed": 7})
        file = describe_shard(str(source), "in.parquet", TrajectoryColumns(), None)
        self.shards = [replace(file, name=Block("in", *block).name) for block in blocks]
        self.folder.write_manifest(
            Manifest(
                writer="sample",
                identity=identity,
                shards=tuple(InputShard.of(shard, str(source)) for shard in self.shards),
                command=("rsr", "sample", "in.parquet", "out"),
            )
        )
        self.job = SamplingJob(
            config=job.pop("config", ScorerConfig(model="m")),
            sampling=job.pop("sampling", Sampling()),
            prompts=job.pop("prompts", PROBLEM_COLUMN),
            seed=7,
            store=RunStore.of(self.folder, identity),
            open_engine=open_engine,
        )
        self.work = self.job.open(None)

    def units(self, shard, max_rows=3):
        kept = [unit for unit, _ in self.job.store.kept_units(shard)]
        return cut_units(shard, max_rows=max_rows, max_bytes=1 << 30, kept=kept)

    def do(self, unit):
        return self.work.keep(unit, self.work.run(unit, self.work.read(unit)))

    def finish(self):
        for shard in self.shards:
            for unit in self.units(shard):
                self.do(unit)
            self.work.commit(shard)
        return self

    def rows(self, number=0):
        """Without the column that holds NaN, which `rsr verify` compares by its bits."""
        return pq.read_table(self.folder.root / self.shards[number].name).drop(["weight"])


def verify(run, exit_code=0):
    result = CliRunner().invoke(main, ["verify", str(run.folder.root), "--deep", "--json"])
    assert result.exit_code == exit_code, result.output + result.stderr
    return [problem["what"] for problem in json.loads(result.stdout)["problems"]]


def test_candidate_is_a_row_beside_its_problem(tmp_path):
    run = SamplingRun(tmp_path).finish()
    rows = run.rows()
    assert rows.num_rows == 3 * len(PROBLEMS)
    assert rows.schema.metadata[b"mine"] == b"kept"
    assert rows.schema.names == ["id", "problem", "tags", *CANDIDATE_SCHEMA.names]
    assert rows.schema.field("id").metadata[b"unit"] == b"none"
    assert rows["id"].to_pylist() == [i for i in range(len(PROBLEMS)) for _ in range(3)]
    assert pa.schema(list(rows.schema)[-len(CANDIDATE_SCHEMA) :]) == CANDIDATE_SCHEMA
    second = rows.slice(4, 1).to_pylist()[0]
    seed = seed_of(7, "in", 1) + 1
    assert (second["sample_index"], second["seed"]) == (1, seed)
    assert second["response"] == f"2 + 2? {seed}"
    assert second["messages"] == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": second["response"]},
    ]
    assert (second["finish_reason"], second["num_tokens"], second["sample_model"]) == (
        "stop",
        seed % 5,
        "m",
    )
    assert verify(run) == []


def test_problem_that_makes_no_prompt_costs_itself_alone(tmp_path):
    run = SamplingRun(tmp_path)
    (unit,) = run.units(run.shards[0], max_rows=100)
    summary = run.do(unit)
    assert summary.rows_by_status == {"stop": 15, "refused": 9}
    name = run.shards[0].name
    assert {text: (r.num_rows, r.example) for text, r in summary.reasons.items()} == {
        "refused: the problem is empty": (2, f"{name} row 2"),
        "refused: it has a control token": (1, f"{name} row 4"),
    }
    rows = run.finish().rows().to_pylist()
    refused = [row for row in rows if row["finish_reason"] == "refused"]
    assert sorted({row["id"] for row in refused}) == MAKES_NO_PROMPT
    assert {row["response"] for row in refused} == {None}
    assert rows[3 * 4]["sample_detail"] == "it has <|im_end|>"
    assert verify(run) == []


def test_problem_that_breaks_every_worker_says_so(tmp_path):
    run = SamplingRun(tmp_path)
    shard = run.shards[0]
    run.work.refuse(Unit(shard, 0, 1), "crash: it is dead")
    rows = run.finish().rows().to_pylist()
    assert [row["sample_detail"] for row in rows[:4]] == ["crash: it is dead"] * 3 + [None]
    assert verify(run) == []
    assert run.job.cause_of(RuntimeError("CUDA out of memory. Tried to")) is Cause.MEMORY


def test_larger_n_adds_a_file_and_leaves_the_other(tmp_path):
    for name in ("three", "five", "at once"):
        (tmp_path / name).mkdir()
    run = SamplingRun(tmp_path / "three").finish()
    before = run.rows()
    more = SamplingRun(tmp_path / "three", blocks=((0, 3), (3, 5)))
    assert more.job.store.read_receipt(more.shards[0]) is not None
    for unit in more.units(more.shards[1]):
        more.do(unit)
    more.work.commit(more.shards[1])
    assert more.rows(0).equals(before)
    assert set(more.rows(1)["sample_index"].to_pylist()) == {3, 4}
    assert verify(more) == []
    at_once = SamplingRun(tmp_path / "at once", blocks=((0, 5),)).finish().rows()
    together = pa.concat_tables([more.rows(0), more.rows(1)])
    order = [("id", "ascending"), ("sample_index", "ascending")]
    assert together.sort_by(order).equals(at_once)


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("seed", 5, "of seed 5 where sample 0 belongs"),
        ("sample_index", 9, "has sample 9"),
        ("finish_reason", "refused", "of finish_reason 'refused'"),
        ("id", 99, "column 'id' differs in rows 0 to 7"),
    ],
)
def test_verify_finds_a_row_that_is_another(tmp_path, column, value, told):
    run = SamplingRun(tmp_path).finish()
    rows = pq.read_table(run.folder.root / run.shards[0].name)
    place = rows.schema.get_field_index(column)
    values = rows[column].to_pylist()
    changed = rows.set_column(
        place,
        rows.schema.field(place),
        pa.array([value, *values[1:]], rows.schema.field(place).type),
    )
    shard = run.shards[0]
    receipt = run.job.store.read_receipt(shard)

    def write(sink):
        pq.write_table(changed, sink)
        return receipt.summary

    run.job.store.publish(shard, write)
    (problem,) = verify(run, exit_code=1)
    assert told in problem


@pytest.mark.parametrize(
    ("num_samples", "told"),
    [
        (2, "holds 3 samples of each problem: ask for as many or more"),
        (3, "new: other.samples-00000-00002.parquet"),
        (5, "new: other.samples-00000-00002.parquet"),
    ],
)
def test_run_that_is_another_is_refused(tmp_path, tiny_student, num_samples, told):
    """A larger n is a further part of a run; a further file of INPUT is not."""
    run = SamplingRun(tmp_path).finish()
    for name in ("in", "other"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{name}.parquet").hardlink_to(tmp_path / "in.parquet")
    before = sorted(path.name for path in run.folder.root.rglob("*"))
    arguments = ["sample", str(tmp_path / "folder"), str(run.folder.root), "-n", str(num_samples)]
    result = CliRunner().invoke(main, [*arguments, "--model", str(tiny_student)])
    assert result.exit_code == 2
    assert told in result.stderr
    assert sorted(path.name for path in run.folder.root.rglob("*")) == before


def prompt_file(tmp_path, text):
    path = tmp_path / "prompt.yaml"
    path.write_text(text)
    return str(path)


def test_prompt_file_is_filled_in_from_the_row(tmp_path):
    user = "user: |\n  {{ problem }}\n  {% if hint %}({{ hint }}){% endif %}\n"
    text = f"system: Answer in {{{{ unit }}}}.\n{user}"
    source = PromptSource.from_file(prompt_file(tmp_path, text))
    assert source.columns_needed() == ["hint", "problem", "unit"]
    assert source.messages({"problem": "2 + 2?", "unit": "apples", "hint": None}) == [
        {"role": "system", "content": "Answer in apples."},
        {"role": "user", "content": "2 + 2?\n"},
    ]
    for row, told in (
        ({"problem": "2 + 2?", "unit": "apples"}, "'hint' is undefined"),
        ({"problem": None, "unit": "apples", "hint": ""}, "a column that it prints is null"),
    ):
        with pytest.raises(BadMessagesError, match="cannot be filled in") as raised:
            source.messages(row)
        assert told in raised.value.detail


@pytest.mark.parametrize(
    "text",
    ["{{ problem.__class__.__mro__ }}", "{{ ''.format.__globals__ }}", "{{ items.clear() }}"],
)
def test_prompt_file_is_kept_in_a_sandbox(tmp_path, text):
    source = PromptSource.from_file(prompt_file(tmp_path, json.dumps({"user": text})))
    with pytest.raises(BadMessagesError, match="cannot be filled in"):
        source.messages({"problem": "x", "items": [1]})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("system: x", "expected a text `user`"),
        ("user: x\nsytem: y", "and nothing else"),
        ("user: '{{ problem'", "unexpected end of template"),
        ("user: [", "while parsing"),
    ],
)
def test_prompt_file_that_is_none_is_refused_in_one_line(tmp_path, text, told):
    with pytest.raises(UsageError) as raised:
        PromptSource.from_file(prompt_file(tmp_path, text))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-n", "2", "--temperature", "0"], "give -n 1"),
        (["--prompt-column", "id", "--prompt-file", "f"], "give --prompt-column or --prompt-file"),
        (["--prompt-column", "nowhere"], "has no column 'nowhere'; it has: id, weight"),
        (["--prompt-file", "missing.yaml"], "--prompt-file missing.yaml"),
    ],
)
def test_what_cannot_be_sampled_is_refused_and_nothing_written(
    tmp_path, tiny_student, options, told
):
    pq.write_table(table(), tmp_path / "in.parquet")
    out = tmp_path / "out"
    arguments = ["sample", str(tmp_path / "in.parquet"), str(out), "--model", str(tiny_student)]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 2
    assert told in result.stderr
    assert not out.exists()


def test_column_that_would_be_replaced_is_refused(tmp_path, tiny_student):
    rows = pa.table({"problem": ["1 + 1?"], "seed": [3]})
    pq.write_table(rows, tmp_path / "in.parquet")
    out = tmp_path / "out"
    arguments = ["sample", str(tmp_path / "in.parquet"), str(out), "--model", str(tiny_student)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "already has seed, which rsr sample adds" in result.stderr


def test_first_prompt_is_shown_as_the_student_reads_it(tmp_path, tiny_student):
    pq.write_table(pa.table({"problem": ["", "1 + 1?"]}), tmp_path / "in.parquet")
    shard = describe_shard(str(tmp_path / "in.parquet"), "in", TrajectoryColumns(), None)
    config = ScorerConfig(model=str(tiny_student))
    _, first = look_at_student(config, PROBLEM_COLUMN, [Unit(shard, 0, 2)])
    assert first.text == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    _, none = look_at_student(config, PROBLEM_COLUMN, [Unit(shard, 0, 1)])
    assert (none.text, none.refusal) == (None, "the problem is empty")


@pytest.mark.vllm
def test_run_that_was_interrupted_ends_with_the_rows_of_one_that_was_not(tmp_path, tiny_student):
    """Units in another order, one of them twice, and others' prompts in the cache before."""
    from rsr.engine.generation import Generator

    student = ScorerConfig(model=str(tiny_student), dtype="float32")
    engine = Generator(student, Sampling(max_tokens=24))
    job = {"open_engine": lambda *_: engine, "student": student, "blocks": ((0, 2),)}
    try:
        runs = {}
        for name in ("quiet", "disturbed"):
            (tmp_path / name).mkdir()
            runs[name] = SamplingRun(tmp_path / name, **job)
        quiet = runs["quiet"].finish().rows()
        disturbed = runs["disturbed"]
        first, second, third = disturbed.units(disturbed.shards[0])
        disturbed.do(second)
        lost = disturbed.work.run(first, disturbed.work.read(first))
        again = SamplingRun(tmp_path / "disturbed", **job)
        assert again.units(again.shards[0]) == [first, third]
        assert again.work.run(first, again.work.read(first)) == lost
        rows = again.finish().rows()
    finally:
        engine.close()
    assert rows.equals(quiet)
    answers = [answer for answer in quiet["response"].to_pylist() if answer is not None]
    num_prompts = sum(bool(problem) for problem in PROBLEMS)
    assert len(set(answers)) == len(answers) == 2 * num_prompts
    assert verify(again) == []

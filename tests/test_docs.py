"""The pages of docs/: recipes, tables that the code defines, the site and its links."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from click.testing import CliRunner

import rsr.engine
import rsr.jobs
import rsr.kernels
from rsr.engine.catalogue import METRICS
from rsr.engine.trajectory import Status
from rsr.jobs.cli import COMMANDS, main
from rsr.jobs.comparison.gate import GATE_FIELDS
from rsr.jobs.grading.columns import GRADE_FIELDS
from rsr.jobs.refinement.outcome import ADDED_FIELDS as REFINED_FIELDS
from rsr.jobs.sampling.columns import CANDIDATE_SCHEMA
from rsr.jobs.shards.exploded import ADDED as EXPLODED_FIELDS
from rsr.jobs.shards.score_columns import SECOND_PASS_COLUMNS, columns

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "docs" / "cluster.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", CLUSTER.read_text(), re.MULTILINE | re.DOTALL)
SCRIPTS = [text for kind, text in BLOCKS if kind == "bash"]
MANIFESTS = [text for kind, text in BLOCKS if kind == "yaml"]


def test_there_are_recipes_of_each_kind():
    assert (len(SCRIPTS), len(MANIFESTS)) == (2, 1)


@pytest.mark.parametrize("script", SCRIPTS, ids=["ssh", "slurm"])
def test_script_is_bash(script):
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_manifest_is_a_ray_job_whose_pods_can_be_made():
    (job,) = yaml.safe_load_all(MANIFESTS[0])
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_metrics_stand_in_the_docs_as_they_are_defined():
    listed = CliRunner().invoke(main, ["metrics", "--list", "--markdown"], standalone_mode=False)
    assert listed.output.count("\n") == len(METRICS) + 2
    assert listed.output in (CLUSTER.parent / "metrics.md").read_text()


def told_type(kind: pa.DataType) -> str:
    """An Arrow type as docs/columns.md has it; fields of one type are told together."""
    if pa.types.is_list(kind):
        return f"list of {told_type(kind.value_type)}"
    if not pa.types.is_struct(kind):
        return str(kind)
    groups = itertools.groupby(kind, key=lambda field: told_type(field.type))
    parts = [f"{', '.join(f'`{f.name}`' for f in group)} ({told})" for told, group in groups]
    return f"struct of {', '.join(parts)}"


def test_columns_stand_in_the_docs_as_the_code_adds_them():
    scored = (*columns(token_columns=True, metrics=True), *SECOND_PASS_COLUMNS.values())
    fields = [pa.field(column.name, column.arrow_type) for column in scored]
    fields += (*EXPLODED_FIELDS, *CANDIDATE_SCHEMA, *GRADE_FIELDS, *REFINED_FIELDS, *GATE_FIELDS)
    page = (ROOT / "docs" / "columns.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    assert rows == [(field.name, told_type(field.type)) for field in fields]
    statuses = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", page, re.MULTILINE)
    assert statuses == [status.value for status in Status]


@pytest.mark.slow
def test_site_builds_and_every_link_leads_somewhere(tmp_path):
    pytest.importorskip("material", reason="needs rsr-engine[docs]")
    pytest.importorskip("mkdocs_click", reason="needs rsr-engine[docs]")
    pytest.importorskip("mkdocstrings", reason="needs rsr-engine[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path.parent.name for path in (tmp_path / "commands").glob("*/index.html")}
    assert pages == set(COMMANDS)
    documented = (tmp_path / "api" / "index.html").read_text()
    for module in (rsr.engine, rsr.jobs, rsr.kernels):
        for name in set(module.__all__) - {"Row", "__version__"}:
            assert f'id="{module.__name__}.{name}"' in documented


def test_links_of_the_repository_lead_somewhere():
    """As GitHub follows them: the site has its own, which the test above checks."""
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"):
        for target, anchor in re.findall(r"\]\(([^)\s:#]*)(#[^)\s]*)?\)", path.read_text()):
            place = (path.parent / target) if target else path
            assert place.exists(), f"{path.name}: {target}"
            if anchor and place.suffix == ".md":
                assert anchor[1:] in anchors(place), f"{path.name}: {target}{anchor}"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}

"""The recipes in docs/: what can be checked of them without the machines they are for."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from rsr.engine.catalogue import METRICS
from rsr.jobs.cli import main

CLUSTER = Path(__file__).parents[1] / "docs" / "cluster.md"
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


def test_every_option_in_a_recipe_exists():
    commands = re.findall(r"\brsr score\b[^&\n]*(?:\\\n[^&\n]*)*", CLUSTER.read_text())
    used = {option for command in commands for option in re.findall(r"(?<=\s)--[a-z-]+", command)}
    told = CliRunner().invoke(main, ["score", "--help"]).output
    assert used >= {"--model", "--address", "--workers"}
    assert {option for option in used if option not in told} == set()

"""The files that start a recipe on a cluster hold together: what they run exists, what they set is what a run reads."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from train.__main__ import app
from train.config import load_config
from train.distributed import _from_environment

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "configs/recipes/vicuna/cluster"


def commands_of(script: str) -> list[list[str]]:
    """The arguments of each `python -m train run` in a shell script."""
    joined = script.replace("\\\n", " ")
    found = re.findall(r"python -m train run ([^\n]*)", joined)
    return [shlex.split(each) for each in found]


def check_command(arguments: list[str]) -> None:
    """The configuration is there and takes the overrides; variables of the shell stand for paths."""
    config, *overrides = [each for each in arguments if each != "$@"]
    given = [re.sub(r"\$\w+", "somewhere", each) for each in overrides]
    found = load_config(ROOT / config, given)
    assert found.run.save_minutes == 15 and found.run.output_dir in ("somewhere", "/runs/vicuna-7b")
    assert CliRunner().invoke(app, ["run", "--help"]).exit_code == 0


def test_skypilot():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] is True and task["file_mounts"]["/runs"]["mode"] == "MOUNT"
    (arguments,) = commands_of(task["run"])
    check_command(arguments)
    exports = [line for line in task["run"].splitlines() if line.startswith("export")]
    shell = "\n".join([*exports, 'echo "$COORDINATOR_ADDRESS $NUM_PROCESSES $PROCESS_ID"'])
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    said = subprocess.run(["bash", "-c", shell], env=os.environ | nodes, text=True, capture_output=True, check=True)
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    assert _from_environment(dict(zip(names, said.stdout.split(), strict=True))) == ("10.0.0.7:8476", 2, 1)


def test_jobset():
    (job,) = yaml.safe_load_all((CLUSTER / "jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    (container,) = spec["template"]["spec"]["containers"]
    (arguments,) = commands_of(container["args"][0])
    check_command(arguments)
    env = {one["name"]: one["value"] for one in container["env"]} | {"PROCESS_ID": "1"}
    # JobSet calls pod 0 of job 0 SET-REPLICATEDJOB-0-0, under a service of the set's name.
    name = job["metadata"]["name"]
    assert _from_environment(env) == (f"{name}-{replicated['name']}-0-0.{name}:8476", spec["completions"], 1)
    mounts = {one["name"] for one in container["volumeMounts"]}
    assert mounts == {one["name"] for one in spec["template"]["spec"]["volumes"]}


@pytest.mark.parametrize("code, requeued", [(0, False), (85, True), (86, True), (2, False)])
def test_slurm_asks_to_be_started_again_where_the_run_was_stopped(code, requeued, tmp_path):
    for name, body in {
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/asked; exit {code}',
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", str(CLUSTER / "slurm.sh"), "data.json", "out dir", "optim.learning_rate=1e-5"]
    assert subprocess.run(command, env=env).returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[1:5] == ["python", "-m", "train", "run"]
    config = load_config(ROOT / asked[5], asked[6:])
    assert (config.data.path, config.run.output_dir, config.optim.learning_rate) == ("data.json", "out dir", 1e-5)
    assert asked[0] == "--kill-on-bad-exit=1"

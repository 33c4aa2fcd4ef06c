"""SampleJobs and BatchSearches that the command line makes, against a real API server and the operator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from control_plane import ControlPlane
from operator_process import OperatorProcess, eventually, grant

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]
CONFIG = {
    "device": "cpu",
    "dtype": "fp32",
    "model": {"type": "STDiT3", "hidden_size": 32, "depth": 2, "num_heads": 2},
    "vae": {"type": "codec"},
    "text_encoder": {"type": "hash"},
    "scheduler": {"type": "rflow"},
    "data": {"path": "s3://bucket/clips.csv", "bucket_config": {"144p": {17: [1.0, 1], 51: [1.0, 1]}}},
    "train": {"steps": 10},
}


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    grant(control_plane)
    operator = OperatorProcess(control_plane.kubeconfig("operator"), tmp_path_factory.mktemp("operator"))
    operator.start_and_lead()
    yield operator
    operator.terminate(30.0)


class Terminal:
    """Runs `osctl` as a process of its own."""

    def __init__(self, control_plane: ControlPlane, namespace: str, folder: Path) -> None:
        self._kubeconfig = control_plane.kubeconfig("admin", namespace=namespace)
        self.folder = folder

    def run(self, *words: str, code: int = 0) -> str:
        """What it printed: on stdout, or, where it should fail, on stderr."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OSCTL_")}
        done = subprocess.run(
            [sys.executable, "-m", "osctl", *words],
            env={**environment, "KUBECONFIG": str(self._kubeconfig), "HOME": str(self.folder)},
            cwd=self.folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if code else done.stdout


@pytest.fixture
def terminal(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Terminal:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return Terminal(control_plane, namespace, tmp_path)


def _jobs(control_plane: ControlPlane, namespace: str) -> dict[str, list[str]]:
    """Name → arguments of the trainer."""
    found = control_plane.request("GET", f"/apis/batch/v1/namespaces/{namespace}/jobs")["items"]
    return {
        job["metadata"]["name"]: job["spec"]["template"]["spec"]["containers"][0].get("args") or [] for job in found
    }


def _foretold(text: str) -> dict[str, list[str]]:
    jobs = [body for body in json.loads(text)["items"] if body["kind"] == "Job"]
    return {job["metadata"]["name"]: job["spec"]["template"]["spec"]["containers"][0].get("args") or [] for job in jobs}


def test_a_sample_job_is_what_its_dry_run_said(
    terminal: Terminal, operator: OperatorProcess, control_plane: ControlPlane, namespace: str
) -> None:
    words = (
        "sample", "--checkpoint", "s3://bucket/run", "--step", "200", "--prompt", "a cat", "--prompt", "a dog",
        "--image-size", "64x64", "--num-frames", "17", "--output-uri", "s3://bucket/clips", "--image", "x:1",
        "--reference", "a.png", "--reference", "", "--name", "clips",
    )  # fmt: skip
    shown = _foretold(terminal.run(*words, "--dry-run=server", "-o", "json"))
    assert _jobs(control_plane, namespace) == {}, "nothing is made"
    assert terminal.run(*words) == "samplejob.opensora.dev/clips created\n"
    eventually(lambda: _jobs(control_plane, namespace) == shown)
    assert "clips" in terminal.run("get", "sj")
    assert "already exists" in terminal.run(*words, code=4)


def test_a_search_is_what_its_dry_run_said(
    terminal: Terminal, operator: OperatorProcess, control_plane: ControlPlane, namespace: str
) -> None:
    words = ("search", "config.yaml", "--image", "example.com/x:1", "--memory-budget", "2Gi", "--name", "sizes")
    shown = _foretold(terminal.run(*words, "--dry-run=server", "-o", "json"))
    terminal.run(*words)
    eventually(lambda: _jobs(control_plane, namespace) == shown)
    lines = eventually(lambda: terminal.run("search", "sizes").splitlines()[1:])
    assert {line.split()[0] for line in lines} == {"144p/17", "144p/51"}
    assert "no batch size for" in terminal.run("search", "sizes", "--apply-to", "config.yaml", code=4)
    terminal.run("delete", "bs/sizes", "--yes")


def test_a_scaffold_is_accepted_as_it_is(terminal: Terminal, operator: OperatorProcess) -> None:
    terminal.run("init", "first")
    assert "trainingrun.opensora.dev/first" in terminal.run("train", "first/run.yaml", "--image", "example.com/x:1")
    assert "first" in terminal.run("get")
    terminal.run("delete", "first", "--yes")

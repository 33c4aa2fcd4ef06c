"""`osctl plan` against a real API server: what it foretells, the operator then does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control_plane import ControlPlane
from operator_process import OperatorProcess, grant
from stage import Kubelets, Stage, playing_kubelets

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def kubelets(control_plane: ControlPlane) -> Iterator[Kubelets]:
    with playing_kubelets(control_plane) as kubelets:
        yield kubelets


@pytest.fixture
def stage(control_plane: ControlPlane, kubelets: Kubelets, namespace: str) -> Stage:
    return Stage(control_plane, kubelets, namespace)


def plan_of(stage: Stage, folder: Path, *, identity: str = "admin") -> dict[str, Any]:
    """What `osctl plan demo` foretells."""
    kubeconfig = stage.control_plane.kubeconfig(identity, namespace=stage.namespace)
    done = subprocess.run(
        [sys.executable, "-m", "osctl", "plan", "demo", "-o", "json"],
        env={**os.environ, "KUBECONFIG": str(kubeconfig), "HOME": str(folder)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def test_the_operator_does_what_was_foretold(
    control_plane: ControlPlane, stage: Stage, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stage.create(restartPolicy={"backoff": {"baseSeconds": 300}})
    foretold = plan_of(stage, tmp_path)
    made = [action["name"] for action in foretold["actions"] if action["kind"] == "Job"]
    assert {action["kind"] for action in foretold["actions"]} >= {"ConfigMap", "Service", "Job"}
    assert stage.jobs() == {}, "nothing is done by telling"

    grant(control_plane)
    operator = OperatorProcess(control_plane.kubeconfig("operator"), tmp_path_factory.mktemp("operator"))
    operator.start_and_lead()
    try:
        stage.until_phase("Running")
        assert list(stage.jobs()) == made
        assert plan_of(stage, tmp_path)["actions"] == []
        stage.end(1, 1, rank=3, step=7, message="boom")
        stage.until_phase("Restarting")
        waits = plan_of(stage, tmp_path)["waits"]
        assert any(wait["what"] == "the pause before attempt 2 is over" for wait in waits)
    finally:
        operator.terminate(30.0)

"""The command line against a real API server, where the operator runs and where it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from control_plane import ControlPlane
from operator_process import OperatorProcess, grant
from shell import Terminal
from stage import Kubelets, Stage, playing_kubelets

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def kubelets(control_plane: ControlPlane) -> Iterator[Kubelets]:
    with playing_kubelets(control_plane) as kubelets:
        yield kubelets


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    grant(control_plane)
    operator = OperatorProcess(control_plane.kubeconfig("operator"), tmp_path_factory.mktemp("operator"))
    operator.start_and_lead()
    yield operator
    operator.terminate(30.0)


@pytest.fixture
def terminal(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Terminal:
    return Terminal(control_plane, namespace, tmp_path)


@pytest.fixture
def stage(control_plane: ControlPlane, kubelets: Kubelets, operator: OperatorProcess, namespace: str) -> Stage:
    return Stage(control_plane, kubelets, namespace)


def test_without_an_operator_the_status_says_that_nobody_looks(terminal: Terminal) -> None:
    """The first test of the file: the others start an operator."""
    terminal.run("train", terminal.run_file())
    assert "operator has not looked at this run yet" in terminal.run("status", "demo")


def test_a_run_from_its_file_to_its_end(terminal: Terminal, stage: Stage) -> None:
    file = terminal.run_file()
    assert "demo" in terminal.run("train", file)
    stage.until_phase("Running")
    row = terminal.run("get").splitlines()[1]
    assert row.split()[:3] == ["demo", "Running", "2/2"]
    assert terminal.run("get", "tr", "-o", "name").split() == ["trainingrun.opensora.dev/demo"]
    assert json.loads(terminal.run("get", "tr", "demo", "-o", "json"))["metadata"]["name"] == "demo"
    stage.end(1, 1, rank=3, step=7, message="boom")
    stage.until_phase("Running", attempt=2)
    story = terminal.run("status", "demo")
    for words in ("Running", "WorkerFailed", "rank 3", "node-1", "boom", "next:"):
        assert words in story
    told = json.loads(terminal.run("status", "demo", "-o", "json"))
    assert (told["firstFailure"]["rank"], told["status"]["attempt"]) == (3, 2)
    stage.succeed()
    assert "demo complete" in terminal.run("wait", "demo", "--timeout", "60s")
    assert "demo" in terminal.run("delete", "demo", "--yes")
    assert "demo" in terminal.run("status", "demo", code=3)


def test_what_a_dry_run_shows_is_what_the_operator_makes(terminal: Terminal, stage: Stage) -> None:
    file = terminal.run_file()
    shown = {
        (body["kind"], body["metadata"]["name"]): body
        for body in yaml.safe_load_all(terminal.run("train", file, "--dry-run=server"))
    }
    assert stage.jobs() == {}, "nothing is sent"
    terminal.run("train", file)
    stage.until_phase("Running")
    made = stage.jobs()["demo-a1"]["spec"]["template"]["spec"]["containers"][0]
    foretold = shown["Job", "demo-a1"]["spec"]["template"]["spec"]["containers"][0]
    assert (foretold["image"], foretold["args"]) == (made["image"], made["args"])
    assert {kind for kind, _ in shown} >= {"Job", "Service", "ConfigMap"}


def test_a_run_is_suspended_resized_resumed_restarted_and_stopped(terminal: Terminal, stage: Stage) -> None:
    terminal.run("train", terminal.run_file())
    stage.until_phase("Running")
    terminal.run("suspend", "demo")
    stage.until_phase("Suspended")
    terminal.run("scale", "demo", "--nodes", "1")
    terminal.run("resume", "demo")
    stage.until_phase("Running", attempt=2)
    assert stage.status["nodes"]["summary"] == "1/1"
    terminal.run("restart", "demo")
    stage.until_phase("Running", attempt=3)
    terminal.run("stop", "demo", "--yes")
    stage.until_phase("Failed")
    assert stage.condition("Failed")["reason"] == "Cancelled"
    terminal.run("wait", "demo", code=7)


def test_a_run_that_fails_is_told_by_the_exit_code(terminal: Terminal, stage: Stage) -> None:
    terminal.run("train", terminal.run_file())
    stage.until_phase("Running")
    stage.end(0, 78, message="model.type: no such model")
    said = terminal.run("wait", "demo", "--timeout", "60s", code=6)
    assert "model.type: no such model" in said


def test_who_may_not_is_told_what_and_by_which_code(terminal: Terminal) -> None:
    said = terminal.run("get", identity="alice", code=8)
    assert "trainingruns" in said
    assert "alice" in said
    assert len(said.strip().splitlines()) <= 3


def test_mistakes_in_a_file_are_found_before_anything_is_sent(terminal: Terminal, stage: Stage) -> None:
    said = terminal.run("train", terminal.run_file(nodez=3), code=2)
    assert "nodez" in said
    assert "nodes" in said
    assert "run" not in terminal.run("get", "tr", "-o", "name")

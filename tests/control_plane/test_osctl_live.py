"""The live commands against a real API server. There are no kubelets, so it has no logs of pods to give."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import terminals
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


def _open(terminal: Terminal, *words: str) -> terminals.Terminal:
    return terminals.Terminal(*terminals.osctl_words(*words), env=terminal.environment(), folder=terminal.folder)


def _store(folder: Path, attempt: int, rank: int, text: str) -> None:
    place = folder / f"run/logs/attempt-{attempt}/rank-{rank}"
    place.mkdir(parents=True)
    (place / "part-00000.log").write_text(text)


def test_watch_shows_a_run_from_its_start_over_a_failure_to_its_end(terminal: Terminal, stage: Stage) -> None:
    with _open(terminal, "train", terminal.run_file(), "--follow") as seen:
        seen.until_shown("Running, for")
        seen.until_shown("2 of 2 ready, 4 ranks")
        stage.end(1, 1, rank=3, step=7, message="boom")
        seen.until_shown("first failure of attempt 1: WorkerFailed, rank 3")
        stage.until_phase("Running", attempt=2)
        seen.until_shown(r"2 +from .* goes on")
        stage.succeed()
        assert seen.ended() == 0
    assert "TrainingRun demo in" in "\n".join(seen.screen.shown)
    assert "Succeeded" in "\n".join(seen.screen.shown)
    assert "Traceback" not in seen.text


def test_detaching_leaves_the_run_and_a_yes_stops_it(terminal: Terminal, stage: Stage) -> None:
    with _open(terminal, "train", terminal.run_file(), "--follow") as seen:
        seen.until_shown("Running, for")
        seen.type("\x03")
        seen.until_shown(r"\[y/N\]")
        seen.type("n\r")
        assert seen.ended() == 130
    assert stage.status["phase"] == "Running"
    with _open(terminal, "watch") as seen:
        seen.until_shown("Running, for")
        seen.type("q")
        assert seen.ended() == 130
    terminal.run("stop", "demo", "--yes")
    assert "Cancelled" in terminal.run("watch", "demo", code=7) + terminal.run("status", "demo")


def test_in_a_pipe_each_change_is_a_line_and_the_exit_code_the_outcome(terminal: Terminal, stage: Stage) -> None:
    terminal.run("train", terminal.run_file())
    with subprocess.Popen(
        terminals.osctl_words("watch", "demo"),
        env=terminal.environment(), cwd=terminal.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        first = ""
        while "demo: Running" not in first:
            line = watching.stdout.readline()
            assert line, f"it has ended after {first!r}"
            first += line
        stage.end(0, 78, message="model.type: no such model")
        out, err = watching.communicate(timeout=60)
    assert (watching.returncode, err) == (6, "")
    lines = [line.partition(" demo: ")[2] for line in (first + out).splitlines()]
    assert lines[-1].startswith("Failed")
    assert len(lines) == len(set(lines))


def test_logs_of_pods_that_no_node_answers_for_come_from_the_run_directory(terminal: Terminal, stage: Stage) -> None:
    terminal.run("train", terminal.run_file(runUri=str(terminal.folder / "run")))
    stage.until_phase("Running")
    _store(terminal.folder, 1, 0, "[2026-01-01 00:00:01] zero\n")
    _store(terminal.folder, 1, 3, "[2026-01-01 00:00:02] three\n")
    out = terminal.run("logs", "demo")
    assert out == "[rank 0] [2026-01-01 00:00:01] zero\n[rank 3] [2026-01-01 00:00:02] three\n"
    assert terminal.run("logs", "demo", "--rank", "3") == "[2026-01-01 00:00:02] three\n"


def test_logs_cross_attempts_and_find_the_rank_that_failed_first(terminal: Terminal, stage: Stage) -> None:
    terminal.run("train", terminal.run_file(runUri=str(terminal.folder / "run")))
    stage.until_phase("Running")
    _store(terminal.folder, 1, 3, "boom\n")
    stage.end(1, 1, rank=3, step=7, message="boom")
    stage.until_phase("Running", attempt=2)
    _store(terminal.folder, 2, 0, "again\n")
    assert terminal.run("logs", "demo", "--rank", "first-failed") == "boom\n"
    stage.succeed()
    stage.until_phase("Succeeded")
    stage.control_plane.kubectl("delete", "jobs", "--all", "-n", stage.namespace)
    stage.until(lambda: not stage.pods())
    assert terminal.run("logs", "demo", "--attempt", "all").splitlines() == ["[rank 3] boom", "[rank 0] again"]
    assert terminal.run("logs", "demo", "-f", "--attempt", "1") == "[rank 3] boom\n[rank 0] again\n"
    assert "has no attempt 3" in terminal.run("logs", "demo", "--attempt", "3", code=3)


def test_who_may_see_runs_alone_gets_their_logs_from_the_run_directory(
    terminal: Terminal, stage: Stage, control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.kubectl(
        "create", "role", "viewer", "-n", namespace, "--verb=get,list,watch", "--resource=trainingruns"
    )
    control_plane.kubectl("create", "rolebinding", "viewer", "-n", namespace, "--role=viewer", "--user=alice")
    terminal.run("train", terminal.run_file(runUri=str(terminal.folder / "run")))
    stage.until_phase("Running")
    assert "you may not read the logs of the pods" in terminal.run("logs", "demo", identity="alice", code=8)
    _store(terminal.folder, 1, 0, "zero\n")
    assert terminal.run("logs", "demo", identity="alice") == "[rank 0] zero\n"
    assert "demo" in terminal.run("top", identity="alice")
    stage.succeed()
    stage.until_phase("Succeeded")
    assert "demo: Succeeded" in terminal.run("watch", "demo", identity="alice")
    assert terminal.run("logs", "demo", "-f", identity="alice") == "[rank 0] zero\n"


def test_top_adds_up_what_runs_take(terminal: Terminal, stage: Stage) -> None:
    terminal.run("train", terminal.run_file())
    stage.until_phase("Running")
    (usage,) = json.loads(terminal.run("top", "-o", "json"))
    assert (usage["name"], usage["nodes"], usage["ranks"], usage["phase"]) == ("demo", 2, 4, "Running")
    assert terminal.run("top").splitlines()[0].split()[:4] == ["NAME", "PHASE", "NODES", "RANKS"]

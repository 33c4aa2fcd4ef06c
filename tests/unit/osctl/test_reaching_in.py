"""`osctl exec`, `forward` and `dump`: which pod they mean, and what they say where there is none."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api import RUNS, FakeApi, refusal
from fake_kubelet import FakeKubelet
from opensora_operator.wire import format_time
from osctl.commands.forward import _parse
from osctl.errors import UsageError

ROOT = Path(__file__).parents[3]
FIRST = f"{RUNS}/first"
PODS = "/api/v1/namespaces/team/pods"


def _run(phase: str = "Running", **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {
            "name": "first", "namespace": "team", "uid": "u", "resourceVersion": "5",
            "creationTimestamp": format_time(1_000_000.0),
        },
        "spec": {"runUri": "/nowhere/first", "config": {"inline": "{}"}},
        "status": {"phase": phase, "attempt": 2, "resolved": {"procsPerNode": 2, "worldSize": 4}, **status},
    }  # fmt: skip


def _pod(index: int, *, attempt: int = 2, state: str = "running", phase: str = "Running") -> dict[str, Any]:
    name = f"first-a{attempt}-{index}-x7"
    labels = {
        "opensora.dev/kind": "TrainingRun", "opensora.dev/name": "first", "opensora.dev/uid": "u",
        "opensora.dev/attempt": str(attempt), "batch.kubernetes.io/job-completion-index": str(index),
    }  # fmt: skip
    container = {"name": "trainer", "state": {state: {}}}
    return {
        "metadata": {"name": name, "uid": name, "labels": labels, "creationTimestamp": format_time(1_000_000.0)},
        "spec": {"nodeName": f"gpu-{index}"},
        "status": {"phase": phase, "containerStatuses": [container]},
    }


@pytest.fixture
def kubelet(home: Path) -> Iterator[FakeKubelet]:
    """A cluster with a run of two pods of two ranks each, in its second attempt."""
    with FakeKubelet() as running:
        running.objects.on("GET", FIRST, _run())
        pods = [_pod(0, attempt=1), _pod(1, attempt=1), _pod(0), _pod(1)]
        running.objects.on("GET", PODS, {"items": pods, "metadata": {}})
        config = {
            "current-context": "fake",
            "clusters": [{"name": "c", "cluster": {"server": running.url}}],
            "contexts": [{"name": "fake", "context": {"cluster": "c", "namespace": "team"}}],
        }
        (home / ".kube").mkdir()
        (home / ".kube/config").write_text(yaml.safe_dump(config))
        yield running


@pytest.fixture
def terminal(home: Path, kubelet: FakeKubelet) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`osctl` as a process of its own, which ends with the test."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "operator", "cli"))
    environment = {**os.environ, "PYTHONPATH": path}
    with contextlib.ExitStack() as started:

        def start(*words: str, **more: Any) -> subprocess.Popen[bytes]:
            given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
            process = subprocess.Popen([sys.executable, "-m", "osctl", *words], env=environment, cwd=home, **given)
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield start


# ----------------------------------------------------------------------------------------------------------------- exec


def test_output_and_exit_code_are_the_commands_own(kubelet: FakeKubelet, terminal: Any) -> None:
    process = terminal("exec", "first", "--", "echo", "--dry-run", "-n")
    assert process.communicate(timeout=60) == (b"--dry-run -n\n", b"and a complaint\n")
    assert process.returncode == 0
    assert kubelet.asked[0][0] == f"{PODS}/first-a2-0-x7/exec"
    process = terminal("exec", "first", "--rank", "3", "--", "fail", "42")
    process.communicate(timeout=60)
    assert process.returncode == 42
    assert kubelet.asked[1][0] == f"{PODS}/first-a2-1-x7/exec"


def test_input_is_passed_on_when_asked_for(kubelet: FakeKubelet, terminal: Any) -> None:
    process = terminal("exec", "first", "-i", "--", "cat", stdin=subprocess.PIPE)
    assert process.communicate(b"one\ntwo\n", timeout=60) == (b"one\ntwo\n", b"")
    process = terminal("exec", "first", "--", "echo", "x", stdin=subprocess.PIPE)
    assert process.communicate(b"one\ntwo\n", timeout=60)[0] == b"x\n"
    assert ("stdin", "true") not in kubelet.asked[1][1]


def test_from_a_terminal_it_is_a_terminal(kubelet: FakeKubelet, terminal: Any) -> None:
    near, far = pty.openpty()
    process = terminal("exec", "first", "--", "cat", stdin=far, stdout=far, stderr=far)
    os.close(far)
    while not kubelet.sizes:  # from here on the keys are the program's
        assert process.poll() is None
        time.sleep(0.01)
    os.write(near, b"\x03hello\r")
    seen = b""
    while len(seen) < 7:
        seen += os.read(near, 1000)
    assert seen == b"\x03hello\r", "Ctrl-C too, and nothing is shown twice"
    assert dict(kubelet.asked[0][1])["tty"] == "true"
    assert len(kubelet.sizes) == 1
    os.close(near)


def test_the_first_rank_that_failed_is_meant_by_its_name(kubelet: FakeKubelet, osctl: Any) -> None:
    attempts = [{"number": 1, "cause": "WorkerFailed", "rank": 2}, {"number": 2}]
    kubelet.objects.on("GET", FIRST, _run(attempts=attempts))
    osctl("exec", "first", "--rank", "first-failed", "--", "fail", "0")
    assert kubelet.asked[0][0] == f"{PODS}/first-a2-1-x7/exec"


@pytest.mark.parametrize(
    ("rank", "run", "pods", "code", "line"),
    [
        ("two", {}, None, 2, "--rank 'two' is no rank"),
        ("-1", {}, None, 2, "--rank '-1' is no rank"),
        ("٣", {}, None, 2, "is no rank"),
        ("4", {}, None, 3, "first has no rank 4"),
        ("first-failed", {}, None, 3, "no attempt of first has failed"),
        ("0", {"phase": "Suspended"}, [], 4, "rank 0 of first has no pod: the run is Suspended"),
        ("0", {}, [_pod(0, attempt=1)], 4, "rank 0 of first has no pod"),
        ("0", {}, [_pod(0, state="waiting", phase="Pending")], 4, "has not started"),
        ("1", {}, [_pod(0, state="terminated", phase="Failed")], 4, "has ended"),
        ("3", {"resolved": {}}, None, 4, "nobody knows yet in which pod rank 3"),
        ("0", {}, refusal(403, "Forbidden", "no"), 8, "you may not list pods in namespace team"),
    ],
)
def test_a_rank_that_cannot_be_reached_is_one_line_and_a_hint(
    kubelet: FakeKubelet, osctl: Any, rank: str, run: dict[str, Any], pods: Any, code: int, line: str
) -> None:
    kubelet.objects.on("GET", FIRST, _run(**run))
    if pods is not None:
        kubelet.objects.on("GET", PODS, pods if isinstance(pods, tuple) else {"items": pods, "metadata": {}})
    result = osctl("exec", "first", "--rank", rank, "--", "echo")
    first, second = result.err.splitlines()
    assert (result.code, result.out) == (code, "")
    assert line in first
    assert second.startswith("hint: ")


def test_a_shell_without_a_terminal_is_a_mistake(kubelet: FakeKubelet, osctl: Any) -> None:
    result = osctl("exec", "first")
    assert (result.code, result.err.splitlines()[1]) == (2, "hint: osctl exec first -- COMMAND")


def test_who_may_not_is_told_so(kubelet: FakeKubelet, osctl: Any) -> None:
    kubelet.refusal = refusal(403, "Forbidden", "alice cannot create resource pods/exec")
    result = osctl("exec", "first", "--", "echo")
    assert (result.code, result.out) == (8, "")
    assert "alice cannot create resource pods/exec" in result.err


# -------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize(
    ("word", "ports"), [("80", (80, 80)), ("8080:80", (8080, 80)), (":80", (0, 80)), ("0:1", (0, 1))]
)
def test_ports_are_written_as_kubectl_has_them(word: str, ports: tuple[int, int]) -> None:
    port = _parse(word)
    assert (port.local, port.remote) == ports


@pytest.mark.parametrize("word", ["", ":", "http", "0", "80:", "1:2:3", "-1", "65536", "٣", "1" * 5000, "80/udp"])
def test_what_is_no_port_is_said(word: str) -> None:
    with pytest.raises(UsageError, match="is no port"):
        _parse(word)


def test_a_port_is_reached_until_the_command_ends(kubelet: FakeKubelet, terminal: Any) -> None:
    process = terminal("forward", "first", ":7", "--rank", "2")
    line = process.stderr.readline().decode()
    match = re.fullmatch(r"127\.0\.0\.1:(\d+) leads to port 7 of first-a2-1-x7\n", line)
    assert match is not None, line
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", int(match[1])), timeout=30) as connection:
            connection.sendall(b"hello")
            assert connection.recv(100) == b"hello"
    process.send_signal(2)
    assert process.wait(30) == 130
    assert process.stdout.read() == b""


def test_after_a_restart_the_new_pod_is_reached(kubelet: FakeKubelet, terminal: Any) -> None:
    process = terminal("forward", "first", ":13")
    port = int(process.stderr.readline().decode().split()[0].rpartition(":")[2])
    kubelet.gone.add("first-a2-0-x7")
    kubelet.objects.on("GET", FIRST, _run(attempt=3))
    kubelet.objects.on("GET", PODS, {"items": [_pod(0, attempt=3)], "metadata": {}})
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        assert connection.recv(100) == b"hello"
    assert kubelet.asked[-1][0] == f"{PODS}/first-a3-0-x7/portforward"


def test_a_port_that_is_taken_here_is_said(kubelet: FakeKubelet, osctl: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = osctl("forward", "first", f"{port}:80")
    assert result.code == 1
    assert result.err.splitlines() == [
        f"error: port {port} of this machine cannot be used: Address already in use",
        "hint: `:80` takes a free one",
    ]


# ----------------------------------------------------------------------------------------------------------------- dump


@pytest.fixture
def answering(api: FakeApi, monkeypatch: pytest.MonkeyPatch, home: Path) -> FakeApi:
    """A run whose ranks answer the request `r-1` at the second look."""
    monkeypatch.setattr("osctl.commands.dump.new_request", lambda: "r-1")
    monkeypatch.setattr("osctl.waiting._POLL_SECONDS", 0.01)
    before, after = _run(), _run(requests={"dump": "r-1"})
    for body in (before, after):
        body["spec"]["runUri"] = str(home / "run")
    api.on("GET", FIRST, before, before, after)
    api.on("GET", RUNS, (403, {}))  # no watching
    api.on("PATCH", FIRST, before)
    return api


def test_stacks_come_from_the_run_directory(answering: FakeApi, osctl: Any, home: Path) -> None:
    folder = home / "run/dumps/attempt-2/r-1"
    folder.mkdir(parents=True)
    for rank in (0, 1, 10):
        (folder / f"rank-{rank}.txt").write_text(f"in step at step {rank}\n\n  File x\x1b[31m\n")
    result = osctl("dump", "first")
    assert result.out == "".join(
        f"==> rank-{rank} <==\nin step at step {rank}\n\n  File x [31m\n" for rank in (0, 1, 10)
    )
    assert f"stacks of 3 ranks are in {folder}" in result.err
    assert answering.writes() == [("PATCH", FIRST, {"spec": {"requests": {"dump": {"id": "r-1"}}}})]


def test_where_the_run_directory_is_elsewhere_its_place_is_printed(answering: FakeApi, osctl: Any, home: Path) -> None:
    result = osctl("dump", "first")
    assert (result.code, result.out) == (0, f"{home}/run/dumps/attempt-2/r-1\n")


def test_ranks_that_do_not_answer_end_it_with_5(answering: FakeApi, osctl: Any) -> None:
    answering.on("GET", FIRST, _run())
    result = osctl("dump", "first", "--timeout", "0.1s")
    assert result.code == 5
    assert "the ranks of first have not answered in 0.1 s" in result.err


def test_a_run_without_ranks_is_not_asked(api: FakeApi, osctl: Any) -> None:
    for phase, words in (("Suspended", "first is Suspended: it has no ranks now"), ("Failed", "first has failed")):
        api.on("GET", FIRST, _run(phase))
        result = osctl("dump", "first")
        assert (result.code, result.out) == (4, "")
        assert words in result.err
    assert api.writes() == []


def test_a_dry_run_says_what_it_would_do(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    result = osctl("dump", "first", "--dry-run")
    assert result.out == "trainingrun.opensora.dev/first is asked for its stacks (dry run: client)\n"
    assert api.writes() == []

"""The command line of people who may do little, and with words that are no names, against a real API server."""

from __future__ import annotations

from pathlib import Path

import pytest
from control_plane import ControlPlane
from shell import Terminal

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

RUNS = {"apiGroups": ["opensora.dev"], "resources": ["trainingruns"]}
READ = [{**RUNS, "verbs": ["get", "list", "watch"]}]
CHANGE = [{**RUNS, "verbs": ["get", "list", "watch", "create", "patch", "delete"]}]


@pytest.fixture
def terminal(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Terminal:
    """Of a namespace with a run `demo`, which nobody looks after."""
    terminal = Terminal(control_plane, namespace, tmp_path)
    terminal.run("train", terminal.run_file())
    return terminal


def _allow(control_plane: ControlPlane, namespace: str, rules: list[dict[str, list[str]]], user: str = "alice") -> None:
    meta = {"name": user, "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": user}
    subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}
    version = "rbac.authorization.k8s.io/v1"
    control_plane.apply(
        {"apiVersion": version, "kind": "Role", "metadata": meta, "rules": rules},
        {"apiVersion": version, "kind": "RoleBinding", "metadata": meta, "roleRef": role, "subjects": [subject]},
    )


LOOKING = (("get",), ("get", "tr", "demo", "-o", "json"), ("status", "demo"), ("wait", "demo", "--timeout", "1s"))
CHANGING = (
    ("suspend", "demo"),
    ("scale", "demo", "--nodes", "1"),
    ("restart", "demo"),
    ("stop", "demo", "--yes"),
    ("delete", "demo", "--yes"),
)
REACHING = (("exec", "demo", "--", "id"), ("forward", "demo", "80"))


@pytest.mark.parametrize(
    "words", [*LOOKING, *CHANGING, *REACHING, ("dump", "demo"), ("train", "demo.yaml")], ids=" ".join
)
def test_without_any_right_a_line_names_it_and_the_code_is_8(terminal: Terminal, words: tuple[str, ...]) -> None:
    said = terminal.run(*words, identity="bob", code=8)
    first, second = said.strip().splitlines()
    assert first.startswith("error: ")
    assert "bob" in first
    assert "trainingruns" in first
    assert second.startswith("hint: ")


def test_who_may_read_runs_alone_sees_them_and_what_is_not_seen(
    control_plane: ControlPlane, terminal: Terminal, namespace: str
) -> None:
    _allow(control_plane, namespace, READ)
    assert "demo" in terminal.run("get", identity="alice")
    story = terminal.run("status", "demo", identity="alice")
    assert "not seen: pods, since you may not list them" in story
    assert "not demo" not in terminal.run("wait", "demo", "--timeout", "1s", identity="alice", code=5)
    for words in CHANGING:
        said = terminal.run(*words, identity="alice", code=8)
        assert "alice" in said.splitlines()[-2]
    said = terminal.run(*REACHING[0], identity="alice", code=8)
    assert "you may not list pods" in said


def test_who_may_change_runs_needs_no_right_to_pods_or_events(
    control_plane: ControlPlane, terminal: Terminal, namespace: str
) -> None:
    _allow(control_plane, namespace, CHANGE)
    for words in CHANGING:
        assert "demo" in terminal.run(*words, identity="alice")
    assert "demo" in terminal.run("train", "demo.yaml", identity="alice")


def test_a_watch_that_is_not_allowed_is_no_reason_not_to_wait(
    control_plane: ControlPlane, terminal: Terminal, namespace: str
) -> None:
    _allow(control_plane, namespace, [{**RUNS, "verbs": ["get"]}])
    said = terminal.run("wait", "demo", "--timeout", "1s", identity="alice", code=5)
    assert "demo is not complete after 1s" in said


ODD = ("..", ".", "a b", "%2e%2e", "A", "ü", "-", "demo ", "x" * 300, "demo?x=1", "demo#x", "\n", "\x1b[31m", "--", "*")


@pytest.mark.parametrize("name", ODD, ids=repr)
def test_odd_names_are_no_names_or_not_there(terminal: Terminal, name: str) -> None:
    for command in (("status",), ("get", "tr"), ("wait", "--timeout", "1s"), ("suspend",), ("delete", "--yes")):
        said = _fails(terminal, *command, "--", name)
        assert said.startswith("error: ")
        assert len(said.strip().splitlines()) == 2
    assert "demo" in terminal.run("get", "tr", "-o", "name"), "nothing else was meant"


@pytest.mark.parametrize("namespace_given", ["..", "A", "a b", "kube-system/../default", "ü", "x" * 300], ids=repr)
def test_odd_namespaces_lead_nowhere_else(terminal: Terminal, namespace_given: str) -> None:
    said = _fails(terminal, "status", "demo", "-n", namespace_given)
    assert said.startswith("error: ")


def _fails(terminal: Terminal, *words: str) -> str:
    """What it said: the code is that of a mistake, or of something that is not there."""
    for code in (3, 2):
        try:
            return terminal.run(*words, code=code)
        except AssertionError:
            if code == 2:
                raise
    raise AssertionError("unreachable")

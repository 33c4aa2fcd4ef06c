"""The entry point: help, options of all commands, errors, start-up."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_api import RUNS, FakeApi
from osctl.errors import ExitCode
from osctl.main import COMMANDS, main

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "numpy", "kubernetes", "kopf", "yaml", "rich", "ssl", "opensora_operator.api", "opensora.config")


def _modules_after(*words: str) -> set[str]:
    code = (
        "import sys; from osctl.main import main; sys.stdout = open('/dev/null', 'w'); main(sys.argv[1:]);"
        "sys.stderr.write('\\n'.join(sys.modules))"
    )
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "operator", "cli"))
    answer = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(answer.stderr.split())


@pytest.mark.parametrize("words", [("--help",), ("version",)], ids=" ".join)
def test_starting_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    modules = _modules_after(*words)
    assert "osctl.main" in modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_summary_is_the_first_sentence_of_its_help(name: str) -> None:
    function = getattr(importlib.import_module(f"osctl.commands.{COMMANDS[name].module}"), name)
    assert inspect.getdoc(function).splitlines()[0] == COMMANDS[name].summary  # type: ignore[union-attr]


def test_help_lists_every_command(osctl: Any) -> None:
    result = osctl("--help")
    assert result.code == 0
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.summary.split()] for line in result.out.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(osctl: Any, name: str) -> None:
    result = osctl(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: osctl {name}")
    assert ("--namespace" in result.out) == COMMANDS[name].asks_cluster


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("train", "FILE"),
        ("lint", "FILE..."),
        ("get", "[KIND] [NAME]..."),
        ("wait", "[KIND/]NAME"),
        ("delete", "[KIND/]NAME..."),
        ("exec", "RUN [-- COMMAND...]"),
        ("forward", "RUN [LOCAL:]PORT..."),
        ("explain", "[FIELD]"),
        ("config", "ACTION"),
    ],
)
def test_a_usage_line_reads_as_it_is_typed(osctl: Any, name: str, usage: str) -> None:
    lines = osctl(name, "--help").out.splitlines()
    assert lines[0] == f"Usage: osctl {name} [OPTIONS] {usage}"
    assert any(line.split()[:2] == ["-h,", "--help"] for line in lines)
    assert not [line for line in lines if "<str>" in line or "range>" in line], "every value has a name"


def test_nothing_asked_is_a_usage_error_with_the_list_of_commands(osctl: Any) -> None:
    result = osctl()
    assert (result.code, result.out) == (2, "")
    assert "Look:" in result.err


@pytest.mark.parametrize(
    ("words", "line", "hint"),
    [
        (("gte",), "error: there is no command 'gte'", "hint: did you mean `osctl get`?"),
        (("zzz",), "error: there is no command 'zzz'", "hint: `osctl --help` lists the commands"),
        (("get", "--wat"), "error: no such option: --wat", "hint: `osctl get --help` shows how it is used"),
        (("status",), "error: missing argument 'RUN'", "hint: `osctl status --help` shows how it is used"),
        (("get", "-o", "xml"), "error: invalid value for '--output'", None),
        (("--timeout", "soon", "get"), "error: invalid value for '--timeout'", None),
        (("get", "first"), "error: there is no kind 'first'", "osctl get tr first"),
        (("status", "sj/x"), "error: sj/x is no TrainingRun", None),
    ],
)
def test_a_mistake_is_one_line_a_hint_and_code_2(osctl: Any, words: tuple[str, ...], line: str, hint: str) -> None:
    result = osctl(*words)
    assert (result.code, result.out) == (2, "")
    first, *rest = result.err.splitlines()
    assert first.startswith(line)
    assert len(rest) == 1
    assert rest[0].startswith("hint: ")
    assert hint is None or hint in rest[0]


@pytest.mark.parametrize("words", [("-n", "other", "get"), ("get", "-n", "other")])
def test_options_of_all_commands_stand_before_or_after_the_command(api: FakeApi, osctl: Any, words: Any) -> None:
    path = RUNS.replace("team", "other")
    api.on("GET", path, {"columnDefinitions": [], "rows": [], "metadata": {}})
    result = osctl(*words)
    assert result.code == 0
    assert result.err == "no trainingruns in namespace other\n"


def test_quiet_says_nothing_but_data(api: FakeApi, osctl: Any) -> None:
    api.on("GET", RUNS, {"columnDefinitions": [], "rows": [], "metadata": {}})
    assert osctl("get", "-q") == (0, "", "")


def test_verbose_says_what_was_asked_of_the_server(api: FakeApi, osctl: Any) -> None:
    api.on("GET", RUNS, {"columnDefinitions": [], "rows": [], "metadata": {}})
    assert "1 requests to the API server" in osctl("get", "-v").err


def test_a_bug_is_one_line_too(osctl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("osctl.commands.config.config", fail)
    result = osctl("config", "view")
    assert result.code == ExitCode.ERROR
    assert "Traceback" not in result.err
    assert "hint: with OSCTL_DEBUG=1" in result.err


def test_control_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("osctl.session.Session.close", interrupt)
    assert main(["version"]) == 130


def test_a_pipe_that_nobody_reads_ends_quietly() -> None:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "operator", "cli"))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "osctl", "explain", "spec"],
            stdout=writer,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    finally:
        os.close(writer)
    assert (answer.returncode, answer.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("variables", "is_coloured"),
    [({}, False), ({"OSCTL_COLOR": "always"}, True), ({"OSCTL_COLOR": "never"}, False)],
)
def test_colour_is_not_written_to_files_unless_asked_for(
    api: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_coloured: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    api.on("GET", f"{RUNS}/first", _minimal_run())
    api.on("GET", "/api/v1/namespaces/team/pods", {"items": []})
    assert ("\x1b[" in osctl("status", "first").out) == is_coloured


def _minimal_run() -> dict[str, Any]:
    return {
        "metadata": {"name": "first", "namespace": "team", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"runUri": "s3://bucket/first", "config": {"inline": "{}"}},
    }


def test_completion_scripts_name_the_program(osctl: Any) -> None:
    for shell in ("bash", "zsh", "fish", "powershell"):
        result = osctl("completion", shell)
        assert result.code == 0
        assert "osctl" in result.out
        assert "_OSCTL_COMPLETE" in result.out

"""`osctl data` and `osctl eval`: programs of the core, with their own words."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from osctl.main import main
from osctl.tools import Group

ECHO = '''"""Says what it was given.

More.
"""
import json, sys
if __name__ == "__main__":
    print(json.dumps(sys.argv[1:]), flush=True)
    sys.exit(7)
'''


@pytest.fixture
def tools(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """A package with a program, one in a folder, a package that is a program, and a module that is none."""
    package = home / "pipeline_for_test"
    for path, text in {
        "__init__.py": "",
        "echo.py": ECHO,
        "datasets/__init__.py": "raise ImportError('what is not run is not imported')",
        "datasets/convert.py": ECHO,
        "whole/__init__.py": "",
        "whole/__main__.py": '"""A package."""\n',
        "part.py": "x = 1\n",
        "broken_later.py": "import a_library_that_is_missing\n" + ECHO,
    }.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setenv("PYTHONPATH", str(home))
    monkeypatch.setattr("osctl.commands.data.Group", lambda *_: _group("pipeline_for_test"))

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        said = capfd.readouterr()
        return code, said.out, said.err

    return run


def _group(package: str) -> Any:
    return Group("data", package, "tools")


def test_the_tools_are_those_that_can_be_run(tools: Any) -> None:
    table = """\
TOOL               DOES
broken_later
datasets.convert   Says what it was given.
echo               Says what it was given.
whole              A package.
"""
    assert tools("data") == (0, table, "")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["-n", "x", "--dry-run"], ["--", "--dry-run"], ["a b", "ü", ""], ["--timeout", "soon", "-q"]],
)
def test_arguments_and_exit_code_are_the_tools_own(tools: Any, words: list[str]) -> None:
    code, out, err = tools("-q", "-n", "data", "data", "echo", *words)
    assert (code, json.loads(out), err) == (7, words, "")


def test_a_tool_that_is_killed_ends_as_in_a_shell(tools: Any, home: Path) -> None:
    program = 'import os, signal\nif __name__ == "__main__":\n    os.kill(os.getpid(), signal.SIGKILL)\n'
    (home / "pipeline_for_test/dies.py").write_text(program)
    assert tools("data", "dies")[0] == 137


def test_a_tool_that_does_not_exist_is_a_mistake(tools: Any) -> None:
    assert tools("data", "ekho") == (2, "", "error: there is no tool 'ekho'\nhint: `osctl data` lists the tools\n")


@pytest.mark.parametrize(("command", "package"), [("data", "opensora.tools"), ("eval", "opensora.evaluation")])
def test_a_version_without_them_says_so(osctl: Any, command: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"this version has {package}")
    result = osctl(command, "anything", "--at", "all")
    assert (result.code, result.out) == (1, "")
    assert f"this version of opensora has no {package}" in result.err
    assert "pip install --upgrade" in result.err

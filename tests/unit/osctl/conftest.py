"""The command line against canned answers, in a folder and an environment of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from fake_api import FakeApi
from osctl.main import main


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Osctl = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working directory, and none of the settings of whoever runs the tests."""
    for name in ("KUBECONFIG", "NO_COLOR", "XDG_CONFIG_HOME", "KUBERNETES_SERVICE_HOST", "OSCTL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def osctl(home: Path, capsys: pytest.CaptureFixture[str]) -> Osctl:
    def run(*words: str) -> Result:
        code = main(words)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def api(home: Path) -> Iterator[FakeApi]:
    """A server that the kubeconfig of the home leads to."""
    with FakeApi() as running:
        (home / ".kube").mkdir()
        running.write_kubeconfig(home / ".kube" / "config")
        yield running

"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from xdist.scheduler import LoadFileScheduling

from opensora.quickstart.object_store import ObjectStore

_FOLDERS_OF_ONE_PROCESS = ("cluster", "control_plane")


class _ByCluster(LoadFileScheduling):
    """Of several test processes, one takes a whole file, or all files that share a cluster."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0])
        return file.parent.name if file.parent.name in _FOLDERS_OF_ONE_PROCESS else str(file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByCluster:
    return _ByCluster(config, log)


class _FailuresAtOnce:
    """Prints a failure when it happens: a run that is cut off never gets to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\n{report.nodeid} failed ({report.when}):\n{report.longreprtext}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_FailuresAtOnce(config))


@pytest.fixture(autouse=True)
def priority_stays_as_it_is() -> Iterator[None]:
    """A test process with real-time priority would pass it on to every server it starts, and starve the machine."""
    yield
    if sys.platform == "linux":
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server. A test that stops it must start it again."""
    with ObjectStore(tmp_path_factory.mktemp("object-store")) as store:
        yield store


@pytest.fixture
def bucket(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new bucket; the environment says how it is reached."""
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    # Nothing of the machine's own configuration takes part.
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    name = f"test-{uuid4().hex[:12]}"
    object_store.create_bucket(name)
    return name

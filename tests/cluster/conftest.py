"""Fixtures of the tests on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from cluster_runs import ClusterRun
from installation import Installation
from nodes import why_not

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """The operator, installed by Helm. A test that breaks a part of it must mend it."""
    if reason := why_not():
        pytest.skip(reason)
    with Installation(tmp_path_factory.mktemp("installation")) as installation:
        yield installation


@pytest.fixture
def new_run(installation: Installation, request: pytest.FixtureRequest) -> Iterator[Callable[[str], ClusterRun]]:
    """Makes runs by name, which go with the test. When it fails, all that is known of them is printed."""
    runs: list[ClusterRun] = []

    def make(name: str) -> ClusterRun:
        runs.append(ClusterRun(installation, name))
        return runs[-1]

    yield make
    if request.node.stash.get(_FAILED, False):
        for run in runs:
            print(run.describe())
    for run in runs:
        run.delete()

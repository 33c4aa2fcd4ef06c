"""Fixtures of the tests on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import pytest
from cluster_runs import ClusterRun, Watched
from installation import Installation
from nodes import why_not

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
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
def watched(request: pytest.FixtureRequest) -> Iterator[list[Watched]]:
    """Objects that go with the test. When it fails, all that is known of them is printed."""
    objects: list[Watched] = []
    yield objects
    if request.node.stash.get(_FAILED, False):
        for one in objects:
            print(one.describe())
    for one in objects:
        one.delete()


@pytest.fixture
def new_run(installation: Installation, watched: list[Watched]) -> Callable[[str], ClusterRun]:
    """Makes runs by name, which go with the test."""

    def make(name: str) -> ClusterRun:
        run = ClusterRun(installation, name)
        watched.append(run)
        return run

    return make

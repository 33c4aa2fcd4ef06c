"""Fixtures that several integration tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import Run, write_clips

from opensora.cgroups import memory_cgroup


@pytest.fixture(scope="session", autouse=True)
def signals_reach_the_processes_of_tests() -> None:
    """A shell starts what runs in the background with some signals ignored, and every child would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue of twelve moving clips of two shapes."""
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def one_rank(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The truth: one rank that was never interrupted."""
    run = Run(tmp_path_factory.mktemp("one") / "run", catalogue)
    run.train(1)
    return run


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup with a limit of 160 MiB."""
    with limited_cgroup(160 * 2**20) as folder:
        yield folder


@pytest.fixture
def medium_cgroup() -> Iterator[Path]:
    """A memory cgroup with a limit of 700 MiB: a small training fits, and not much more."""
    with limited_cgroup(700 * 2**20) as folder:
        yield folder


@contextlib.contextmanager
def limited_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup; the test is skipped where none can be made."""
    own = memory_cgroup("self")
    if own is None:
        pytest.skip("there are no memory cgroups here")
    version_1 = (own / "memory.limit_in_bytes").exists()
    # Version 2 allows children with controllers only below cgroups without processes; the root is the exception.
    folder = (own if version_1 else Path("/sys/fs/cgroup")) / f"opensora-test-{os.getpid()}"
    limits = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if version_1 else ("memory.max", "memory.swap.max")
    )
    try:
        folder.mkdir()
        (folder / limits[0]).write_text(str(limit_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"a memory cgroup cannot be made here: {error}")
    with contextlib.suppress(OSError):  # no swap accounting
        (folder / limits[1]).write_text(str(limit_bytes) if version_1 else "0")
    yield folder
    deadline = time.monotonic() + 10
    while (folder / "cgroup.procs").read_text().strip() and time.monotonic() < deadline:
        time.sleep(0.02)
    folder.rmdir()

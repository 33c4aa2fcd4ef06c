"""A throw-away Kubernetes of two nodes on this machine, to play with: what `make cluster` runs.

    python tests/cluster/up.py             # until Ctrl-C
    python tests/cluster/up.py --detach    # in the background, until:
    python tests/cluster/up.py --down

Both ways end without leaving anything behind. There is one at a time, and it is always found in the same place.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import build
from nodes import Cluster, why_not
from processes import StartError

_FOLDER = build.cache_folder() / "up"
"""Its state and logs while it runs."""
_ENVIRONMENT = _FOLDER / "environment"
"""What a shell reads to use it. It is there as long as the cluster is ready."""
_STOP_SECONDS = 120.0

_READY = """
The cluster is ready. In this or any other shell:

    . {environment}
    kubectl get nodes

Logs are in {logs}."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--detach", action="store_true", help="return when it is ready, and leave it running")
    group.add_argument("--down", action="store_true", help="end the one that runs, wherever it was started")
    arguments = parser.parse_args()
    try:
        if arguments.down:
            _end()
        elif arguments.detach:
            _start_in_background()
        else:
            _run()
    except (StartError, build.BuildError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    return 0


def _run() -> None:
    """Run the cluster until a signal says that it is enough."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), _only_one(), contextlib.ExitStack() as exits:
        if reason := why_not():
            raise StartError(reason)
        build.ensure("kube", "pause", "coredns", "helm")
        shutil.rmtree(_FOLDER, ignore_errors=True)
        _FOLDER.mkdir()
        exits.callback(shutil.rmtree, _FOLDER, ignore_errors=True)
        cluster = exits.enter_context(Cluster(_FOLDER))
        exits.callback(_say_goodbye)
        plane = cluster.control_plane
        _ENVIRONMENT.write_text(f'export KUBECONFIG="{plane.kubeconfig()}"\nexport PATH="{plane.bin}:$PATH"\n')
        print(_READY.format(environment=_ENVIRONMENT, logs=cluster.logs), flush=True)
        signal.pause()


def _say_goodbye() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # an impatient second one would leave half of it behind
    _ENVIRONMENT.unlink(missing_ok=True)
    print("\ncluster: ending", flush=True)


def _start_in_background() -> None:
    build.ensure("kube", "pause", "coredns", "helm")  # here, where its progress is seen
    log = build.cache_folder() / "up.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while not _ENVIRONMENT.exists() or _running() != process.pid:
        if process.poll() is not None:
            raise StartError(f"it ended at its start:\n{log.read_text(errors='replace')}")
        time.sleep(0.1)
    print(_READY.format(environment=_ENVIRONMENT, logs=_FOLDER / "logs"), flush=True)


def _end() -> None:
    pid = _running()
    if pid is None:
        raise StartError("none runs")
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while _running() == pid:
        if time.monotonic() > deadline:
            raise StartError(f"process {pid} has not ended after {_STOP_SECONDS:.0f} s")
        time.sleep(0.1)


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Be the process that runs the cluster, and say so to others. Raises StartError when another is."""
    with _lock_file() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"one runs already, in process {_running()}; `--down` ends it") from None
        os.truncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield


def _running() -> int | None:
    """The process that runs the cluster, if there is one."""
    with _lock_file() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(os.pread(file, 20, 0) or 0) or None
    return None


@contextlib.contextmanager
def _lock_file() -> Iterator[int]:
    build.cache_folder().mkdir(parents=True, exist_ok=True)
    file = os.open(build.cache_folder() / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)


if __name__ == "__main__":
    sys.exit(main())

"""What `osctl train --local` leaves for other processes of the same user: the run with its status, and its pods."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from osctl.client import Object
from osctl.errors import ExitCode, OsctlError

_RUN_FILE = "run.json"
_LOCK_FILE = "lock"


@dataclass(frozen=True)
class LocalRun:
    """A run of this machine."""

    run: Object
    pods: Sequence[Object]
    is_attended: bool
    """Whether the osctl that runs it is there."""


@contextlib.contextmanager
def own_folder(name: str) -> Iterator[Path]:
    """The folder of a run, for one osctl at a time.

    Raises:
        OsctlError: another one has it.
    """
    import fcntl  # not on Windows, where there are no local runs

    folder = _folder(name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(folder / _LOCK_FILE, "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OsctlError(
                f"another osctl on this machine trains {name}",
                hint=f"`osctl status --local {name}` tells how it is; --name gives this one another name",
                exit_code=ExitCode.CONFLICT,
            ) from error
        (folder / _RUN_FILE).unlink(missing_ok=True)  # of the last time
        yield folder


def write(folder: Path, run: Object, pods: Sequence[Object]) -> None:
    """Tell others how it is; they see the whole of it or what was before."""
    temporary = folder / f"{_RUN_FILE}.new"
    temporary.write_text(json.dumps({"run": run, "pods": [_without_environment(pod) for pod in pods]}))
    temporary.replace(folder / _RUN_FILE)


def read(name: str) -> LocalRun:
    """A run by its name. Raises OsctlError where there is none."""
    import fcntl

    folder = _folder(name)
    try:
        content = json.loads((folder / _RUN_FILE).read_text(encoding="utf-8"))
        with open(folder / _LOCK_FILE, encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                is_attended = False
            except BlockingIOError:
                is_attended = True
    except (OSError, ValueError) as error:
        raise OsctlError(
            f"no run {name} was started on this machine",
            hint="`osctl train FILE --local` starts one; without --local the cluster is asked",
            exit_code=ExitCode.NOT_FOUND,
        ) from error
    return LocalRun(content["run"], content["pods"], is_attended)


def _folder(name: str) -> Path:
    base: Mapping[str, str] = os.environ
    root = Path(base["XDG_STATE_HOME"]) if base.get("XDG_STATE_HOME") else Path.home() / ".local" / "state"
    return root / "osctl" / "runs" / name


def _without_environment(pod: Object) -> Object:
    """Variables may hold what nobody should find in a file."""
    containers = [{**container, "env": []} for container in pod["spec"]["containers"]]
    return {**pod, "spec": {**pod["spec"], "containers": containers}}

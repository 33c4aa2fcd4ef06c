"""The pod in which a rank of a run is now."""

from __future__ import annotations

from opensora_operator.api import TrainingRunStatus
from opensora_operator.views import PodView
from opensora_operator.wire import WireError, from_wire

from osctl.client import Object
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.pods import list_pods
from osctl.session import Session
from osctl.story import newest_failure
from osctl.targets import fetch, parse_run, phase_of

FIRST_FAILED = "first-failed"


def find_running_pod(session: Session, run: str, rank: str) -> PodView:
    """The pod of a rank in the attempt that goes on.

    Args:
        session: of the command.
        run: name of the run.
        rank: a number, or `first-failed`.

    Raises:
        UsageError: it is no rank.
        OsctlError: the run has no such rank, or its container does not run.
    """
    if rank != FIRST_FAILED and not (rank.isascii() and rank.isdigit() and len(rank) < 10):
        raise UsageError(f"--rank {rank!r} is no rank", hint=f"give a number from 0, or {FIRST_FAILED}")
    target = parse_run(run)
    body = fetch(session, target)
    try:
        status = from_wire(TrainingRunStatus, body.get("status") or {}, path="status")
    except WireError as error:
        raise OsctlError(f"this osctl cannot read the run: {error}", hint="update osctl") from error
    number = _first_failed(status, target.name) if rank == FIRST_FAILED else int(rank)
    index = _index(status, number, target.name)
    pods = list_pods(session.client, session.namespace, body)
    if pods is None:
        raise OsctlError(
            f"you may not list pods in namespace {session.namespace}, so rank {number} cannot be found",
            hint="`osctl doctor` tells what you may do",
            exit_code=ExitCode.NOT_ALLOWED,
        )
    mine = [pod for pod in pods if pod.attempt == max(1, status.attempt) and pod.index == index]
    if not mine:
        raise _conflict(f"rank {number} of {target.name} has no pod: the run is {_phase(body)}", target.name)
    pod = mine[-1]
    if not pod.ready:
        state = "has ended" if not pod.is_live else "has not started"
        raise _conflict(f"pod {pod.name}, in which rank {number} of {target.name} is, {state}", target.name)
    return pod


def _first_failed(status: TrainingRunStatus, name: str) -> int:
    failure = newest_failure(status)
    if failure is None or failure.rank is None:
        what = (
            f"no attempt of {name} has failed" if failure is None else f"nobody knows which rank of {name} failed first"
        )
        raise OsctlError(what, hint="give the number of a rank", exit_code=ExitCode.NOT_FOUND)
    return failure.rank


def _index(status: TrainingRunStatus, rank: int, name: str) -> int:
    """Of a rank's pod in its Job."""
    size = status.resolved.world_size
    if size is not None and rank >= size:
        raise OsctlError(
            f"{name} has no rank {rank}", hint=f"its ranks are 0 to {size - 1}", exit_code=ExitCode.NOT_FOUND
        )
    if rank == 0:
        return 0
    if status.resolved.procs_per_node is None:
        raise OsctlError(
            f"nobody knows yet in which pod rank {rank} of {name} is: status.resolved does not tell",
            hint="wait until the run has started; rank 0 is known always",
            exit_code=ExitCode.CONFLICT,
        )
    return rank // status.resolved.procs_per_node


def _phase(body: Object) -> str:
    return phase_of(body) or "new"


def _conflict(message: str, name: str) -> OsctlError:
    return OsctlError(message, hint=f"`osctl status {name}` tells how it is", exit_code=ExitCode.CONFLICT)

"""`osctl dump`."""

from __future__ import annotations

from typing import Annotated

import typer

from osctl.changing import change, new_request
from osctl.client import Object
from osctl.errors import ExitCode, OsctlError
from osctl.kinds import resource_of
from osctl.options import DryRunOption, RunName
from osctl.output import printable
from osctl.run_directory import open_storage
from osctl.session import Session
from osctl.targets import Target, fetch, parse_run, phase_of, refuse_ended
from osctl.waiting import Goal, parse_duration, reach

_STORE_SECONDS = 30.0
"""The place is told as well, so that a store which is out keeps nobody waiting."""


def dump(
    session: Session,
    run: RunName,
    timeout: Annotated[str, typer.Option("--timeout", metavar="TIME", help="Give up then: 90s, 10m.")] = "3m",
    dry_run: DryRunOption = None,
) -> None:
    """Show the stacks of all ranks.

    Where each rank is in its program, also of ranks that stand still. The operator asks the ranks for it, so it needs
    no right to reach into pods. The ranks write into the run directory, from which this prints; where that cannot be
    read from here, it prints the place.

    Examples: `osctl dump first`, `osctl dump first > stacks.txt`.
    """
    seconds = parse_duration(timeout)
    target = parse_run(run)
    body = fetch(session, target)
    refuse_ended(target, body, "it has no ranks any more")
    if phase_of(body) != "Running":
        raise OsctlError(
            f"{target.name} is {phase_of(body) or 'new'}: it has no ranks now",
            hint=f"`osctl status {target.name}` tells how it is",
            exit_code=ExitCode.CONFLICT,
        )
    request = new_request()
    wanted = {"requests": {"dump": {"id": request}}}
    if dry_run is not None:
        change(session, target, wanted, done="is asked for its stacks", dry_run=dry_run)
        return
    session.client.patch(resource_of(target.kind), session.namespace, target.name, {"spec": wanted})
    session.output.note(f"asked the ranks of {target.name} for their stacks ({request})")
    _show(session, _wait(session, target, request, seconds), request)


def _wait(session: Session, target: Target, request: str, seconds: float) -> Object:
    """The run once its ranks have written."""

    def is_written(body: Object) -> bool:
        done = ((body.get("status") or {}).get("requests") or {}).get("dump")
        return bool(done == request)

    try:
        return reach(session, target, Goal("asked for its stacks", is_written), seconds=seconds)
    except OsctlError as error:
        if error.exit_code is ExitCode.TIMED_OUT:
            error.message = f"the ranks of {target.name} have not answered in {seconds:g} s"
            error.hint = "they do once they hear of it: see the condition Progressing in `osctl status`"
        raise


def _show(session: Session, body: Object, request: str) -> None:
    from opensora.errors import StorageError  # slow to import
    from opensora.records import dumps_prefix

    spec = body["spec"]
    folder = f"{dumps_prefix(int(body['status'].get('attempt') or 1))}/{request}"
    place = f"{str(spec['runUri']).rstrip('/')}/{folder}"
    try:
        run = open_storage(spec["runUri"], spec, patience_seconds=_STORE_SECONDS)
        names = sorted(run.list_names(folder), key=lambda name: (len(name), name))
        stacks = [(name.removesuffix(".txt"), run.read(f"{folder}/{name}")) for name in names]
    except StorageError as error:
        session.output.note(f"they cannot be read from here: {error.message}")
        stacks = []
    if not stacks:
        session.output.data(place)
        return
    for name, content in stacks:
        session.output.data(session.output.styled(f"==> {printable(name)} <==", "bold"))
        for line in content.decode(errors="replace").splitlines():
            session.output.data(printable(line))
    session.output.note(f"stacks of {len(stacks)} ranks are in {place}")

"""`osctl scale`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from osctl.changing import change, trial
from osctl.errors import OsctlError
from osctl.options import DryRun, DryRunOption, RunName
from osctl.session import Session
from osctl.targets import fetch, parse_run, refuse_ended


def scale(
    session: Session,
    run: RunName,
    nodes: Annotated[
        int, typer.Option("--nodes", metavar="N", min=1, max=4096, help="The new number.", show_default=False)
    ],
    dry_run: DryRunOption = None,
) -> None:
    """Change a run's number of nodes.

    A run that goes on saves first, and continues with the new number in a new attempt.

    Example: `osctl scale first --nodes 4`.
    """
    target = parse_run(run)
    body = fetch(session, target)
    refuse_ended(target, body, "it has no nodes to change")
    spec: dict[str, Any] = body.get("spec") or {}
    before = spec.get("nodes", 1)
    if before == nodes:
        session.output.data(f"{target} has {nodes} nodes already")
        return
    done = f"scaled from {before} to {nodes} nodes"
    allowed = (spec.get("elastic") or {}).get("allowedNodes")
    if spec.get("suspend") or (allowed and nodes in allowed):
        change(session, target, {"nodes": nodes}, done=done, dry_run=dry_run)
        return
    if dry_run is DryRun.CLIENT:
        session.output.data(f"{target} {done}{trial(dry_run)}")
        return
    # The API lets nodes change together with a suspension; the attempt ends because of the new number either way.
    change(session, target, {"nodes": nodes, "suspend": True}, done=done, dry_run=dry_run)
    if dry_run is None:
        try:
            change(session, target, {"suspend": False}, done="resumed", dry_run=None)
        except OsctlError as error:
            error.hint = f"the run has {nodes} nodes and is suspended: `osctl resume {target.name}`"
            raise

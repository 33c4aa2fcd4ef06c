"""`osctl stop`."""

from __future__ import annotations

from osctl.changing import change, confirm
from osctl.options import DryRunOption, RunName, Yes
from osctl.session import Session
from osctl.targets import fetch, parse_run, refuse_ended


def stop(session: Session, run: RunName, yes: Yes = False, dry_run: DryRunOption = None) -> None:
    """Save, and end a run for good; the object stays.

    `osctl suspend` is for a run that shall go on later. The run directory is kept by both.

    Example: `osctl stop first --yes`.
    """
    target = parse_run(run)
    refuse_ended(target, fetch(session, target), "it has ended already")
    what = [f"{target} saves and ends for good; its run directory stays"]
    confirm(session, what, yes=yes, dry_run=dry_run)
    change(session, target, {"requests": {"stop": True}}, done="stops", dry_run=dry_run)

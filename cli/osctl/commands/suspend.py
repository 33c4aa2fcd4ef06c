"""`osctl suspend`."""

from __future__ import annotations

from osctl.changing import set_suspend
from osctl.options import DryRunOption, Target
from osctl.session import Session


def suspend(session: Session, target: Target, dry_run: DryRunOption = None) -> None:
    """Save, and give up the pods.

    A run finishes its step and saves within its grace period. `osctl resume` goes on from there.

    Examples: `osctl suspend first`, `osctl suspend sj/nightly`.
    """
    set_suspend(session, target, value=True, dry_run=dry_run)

"""`osctl resume`."""

from __future__ import annotations

from osctl.changing import set_suspend
from osctl.options import DryRunOption, Target
from osctl.session import Session


def resume(session: Session, target: Target, dry_run: DryRunOption = None) -> None:
    """Go on after `suspend`.

    A run continues from its newest checkpoint; a sample job and a batch search with what is left.

    Example: `osctl resume first`.
    """
    set_suspend(session, target, value=False, dry_run=dry_run)

"""`osctl delete`."""

from __future__ import annotations

from typing import Annotated

import typer

from osctl.changing import confirm, trial
from osctl.completing import complete_target
from osctl.errors import ApiError
from osctl.kinds import resource_of
from osctl.options import DryRun, DryRunOption, Yes
from osctl.session import Session
from osctl.targets import age, fetch, parse_target, phase_of


def delete(
    session: Session,
    words: Annotated[
        list[str],
        typer.Argument(metavar="[KIND/]NAME...", help="What to delete.", autocompletion=complete_target),
    ],
    yes: Yes = False,
    dry_run: DryRunOption = None,
) -> None:
    """Delete objects with everything they own in the cluster.

    Pods end as on `osctl stop`. Run directories, clips and tables of batch sizes are never touched.

    Examples: `osctl delete first`, `osctl delete sj/nightly bs/sizes --yes`.
    """
    targets = [parse_target(word) for word in words]
    bodies = [fetch(session, target) for target in targets]
    what = [
        f"{target} will be deleted: {phase_of(body) or 'new'}, {age(body)} old"
        for target, body in zip(targets, bodies, strict=True)
    ]
    confirm(session, what, yes=yes, dry_run=dry_run)
    for target, body in zip(targets, bodies, strict=True):
        if dry_run is not DryRun.CLIENT:
            namespace = session.namespace if target.kind.namespaced else None
            uid, is_tried = str(body["metadata"]["uid"]), dry_run is DryRun.SERVER
            try:
                session.client.delete(resource_of(target.kind), namespace, target.name, uid=uid, dry_run=is_tried)
            except ApiError as error:
                if error.status != 404:  # somebody else was quicker
                    raise
        session.output.data(f"{target} deleted{trial(dry_run)}")

"""`osctl status`: the story of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from opensora_operator.constants import LABEL_UID
from opensora_operator.views import PodView, view_pod

from osctl import local_state
from osctl.client import PODS, Object
from osctl.errors import ApiError
from osctl.options import OutputFormat, RunName
from osctl.screen import print_story
from osctl.session import Session
from osctl.targets import fetch, is_over, parse_run


def status(
    session: Session,
    run: RunName,
    local: Annotated[bool, typer.Option("--local", help="A run that `train --local` runs, or ran, here.")] = False,
    output: OutputFormat = None,
) -> None:
    """Tell one run's story on one screen.

    Its phase, where it is and how fast, the last checkpoint, every attempt and why it ended, the first rank that
    failed with its last words, and the next thing to do.

    Examples: `osctl status first`, `osctl status first -o json`, `osctl status first --local`.
    """
    unseen: list[str] = []
    if local:
        found = local_state.read(parse_run(run).name)
        if not found.is_attended and not is_over(found.run):
            unseen.append("whether it still runs: the osctl that ran it is gone, and with it its processes")
        print_story(session, found.run, _views(found.pods), output, unseen=unseen)
        return
    body = fetch(session, parse_run(run))
    pods = _pods(session, str(body["metadata"]["uid"]), unseen)
    print_story(session, body, pods, output, unseen=unseen)


def _pods(session: Session, uid: str, unseen: list[str]) -> Sequence[PodView] | None:
    try:
        return _views(session.client.list(PODS, session.namespace, labels=f"{LABEL_UID}={uid}"))
    except ApiError as error:
        if error.status != 403:
            raise
        unseen.append("pods, since you may not list them")
        return None


def _views(pods: Sequence[Object]) -> list[PodView]:
    views = [view for body in pods if (view := view_pod(body)) is not None]
    return sorted(views, key=lambda view: (view.attempt, view.index))

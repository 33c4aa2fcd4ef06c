"""`osctl status`: the story of one run."""

from __future__ import annotations

from typing import Annotated

import typer

from osctl import local_state
from osctl.options import OutputFormat, RunName
from osctl.pods import UNSEEN, list_pods, views_of
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
    if local:
        found = local_state.read(parse_run(run).name)
        is_lost = not found.is_attended and not is_over(found.run)
        unseen = ["whether it still runs: the osctl that ran it is gone, and with it its processes"] if is_lost else []
        print_story(session, found.run, views_of(found.pods), output, unseen=unseen)
        return
    body = fetch(session, parse_run(run))
    pods = list_pods(session.client, session.namespace, body)
    print_story(session, body, pods, output, unseen=() if pods is not None else (UNSEEN,))

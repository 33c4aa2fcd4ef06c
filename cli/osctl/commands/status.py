"""`osctl status`: the story of one run."""

from __future__ import annotations

import time

from osctl.options import Format, OutputFormat, RunName
from osctl.output import as_json, as_yaml, terminal_width
from osctl.pods import UNSEEN, list_pods
from osctl.session import Session
from osctl.story import as_data, as_text, tell
from osctl.targets import fetch, parse_run


def status(session: Session, run: RunName, output: OutputFormat = None) -> None:
    """Tell one run's story on one screen.

    Its phase, where it is and how fast, the last checkpoint, every attempt and why it ended, the first rank that
    failed with its last words, and the next thing to do.

    Examples: `osctl status first`, `osctl status first -o json`.
    """
    body = fetch(session, parse_run(run))
    pods = list_pods(session.client, session.namespace, body)
    now = time.time()
    story = tell(body, pods, now=now, unseen=() if pods is not None else (UNSEEN,))
    chosen = output or Format(session.settings.output)
    if chosen in (Format.JSON, Format.YAML):
        data = as_data(story, body)
        session.output.data(as_json(data) if chosen is Format.JSON else as_yaml(data))
    elif chosen is Format.NAME:
        session.output.data(str(parse_run(run)))
    else:
        session.output.data(as_text(story, width=terminal_width(), now=now, paint=session.output.styled))

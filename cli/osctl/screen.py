"""A run's story, printed as the user wants it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from opensora_operator.api import TRAINING_RUN
from opensora_operator.views import PodView

from osctl.client import Object
from osctl.options import Format
from osctl.output import as_json, as_yaml, terminal_width
from osctl.session import Session
from osctl.story import as_data, as_text, tell
from osctl.targets import Target


def print_story(
    session: Session,
    body: Object,
    pods: Sequence[PodView] | None,
    output: Format | None,
    *,
    unseen: Sequence[str] = (),
) -> None:
    """Print the story of a run, or its data."""
    now = time.time()
    story = tell(body, pods, now=now, unseen=unseen)
    chosen = output or Format(session.settings.output)
    if chosen in (Format.JSON, Format.YAML):
        data = as_data(story, body)
        session.output.data(as_json(data) if chosen is Format.JSON else as_yaml(data))
    elif chosen is Format.NAME:
        session.output.data(str(Target(TRAINING_RUN, story.name)))
    else:
        session.output.data(as_text(story, width=terminal_width(), now=now, paint=session.output.styled))

"""`osctl config view`."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Annotated

import typer

from osctl.options import Format, OutputFormat
from osctl.output import as_json, as_table, as_yaml
from osctl.session import Session
from osctl.settings import Settings


class Action(StrEnum):
    """What can be done with the settings."""

    VIEW = "view"


def config(
    session: Session,
    action: Annotated[Action, typer.Argument(help="What to do with them: `view`.", show_default=False)],
    output: OutputFormat = None,
) -> None:
    """Show the settings and where each comes from.

    Later ones win: what is built in, the user's file (~/.config/osctl/config.toml), the project's osctl.toml here or
    above, variables such as OSCTL_NAMESPACE, flags. `-o wide` says what each is for.
    """
    values = dataclasses.asdict(session.settings)
    sources = session.resolved.sources
    if output in (Format.JSON, Format.YAML):
        found = {name: {"value": value, "source": sources[name]} for name, value in values.items()}
        session.output.data(as_json(found) if output is Format.JSON else as_yaml(found))
        return
    header = ["SETTING", "VALUE", "FROM"]
    rows = [[name, str(value), sources[name]] for name, value in values.items()]
    if output is Format.WIDE:
        from opensora_operator.fields import docs_of  # reads sources: only here

        header.append("WHAT FOR")
        docs = docs_of(Settings)
        rows = [[*row, docs[row[0]]] for row in rows]
    session.output.data(as_table(header, rows))

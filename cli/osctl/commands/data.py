"""`osctl data`."""

from __future__ import annotations

from typing import Annotated

import typer

from osctl.session import Session
from osctl.tools import Group, run_tool


def data(
    session: Session,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[TOOL] [ARGUMENT]...", help="Tool, and its own arguments.")
    ] = None,
) -> int:
    """Run a tool of the data pipeline on this machine.

    Without a tool it lists those that this version has. Arguments are the tool's own, `--help` too; options of osctl
    stand before the tool. It ends with the tool's exit code.

    Example: `osctl data`.
    """
    return run_tool(session, Group("data", "opensora.tools", "tools"), words or [])

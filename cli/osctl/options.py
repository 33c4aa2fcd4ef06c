"""Options and arguments that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from osctl.completing import complete_target


class DryRun(StrEnum):
    """How far a change goes that is only tried."""

    CLIENT = "client"
    """Nothing is sent that changes anything."""
    SERVER = "server"
    """The API server checks it and keeps nothing of it."""


class Format(StrEnum):
    """Formats of `-o`; the same words as the setting `output`."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


OutputFormat = Annotated[Format | None, typer.Option("--output", "-o", help="Format. [default: table]")]
DryRunOption = Annotated[
    DryRun | None,
    typer.Option(
        "--dry-run",
        help="Say what would be done: `client` sends nothing, `server` has the API server check it. [bare: client]",
    ),
]
ReadBuckets = Annotated[
    bool, typer.Option("--read-buckets", help="Read the catalogue and a table of batch sizes from a bucket, too.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Rank = Annotated[
    str, typer.Option("--rank", metavar="N|first-failed", help="In whose pod. [default: 0]", show_default=False)
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.", autocompletion=complete_target)]
Target = Annotated[
    str,
    typer.Argument(metavar="[KIND/]NAME", help="Name of a run, or KIND/NAME.", autocompletion=complete_target),
]

"""`osctl doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from osctl.checkup import CHECKS, examine
from osctl.errors import ExitCode
from osctl.findings import State, as_data, as_line, header
from osctl.looks import Looks
from osctl.options import Format, OutputFormat
from osctl.output import as_json, as_yaml, terminal_width
from osctl.session import Session


def doctor(
    session: Session,
    run_uri: Annotated[
        str, typer.Option("--run-uri", metavar="URI", help="Try whether this storage can be read from here.")
    ] = "",
    output: OutputFormat = None,
) -> ExitCode:
    """Find what is wrong with an installation.

    One row for each check: ok, warning, failed, or not seen where you may not look. What is wrong ends in the command
    that mends it; `helm` and `manifests/` are meant in the project's folder. The checks from `profiles` on are about
    one namespace. Ends with 1 where something failed; `-o name` prints the names of these checks.

    Examples: `osctl doctor`, `osctl doctor -n team`, `osctl doctor --run-uri s3://bucket/runs/a`.
    """
    chosen = output or Format(session.settings.output)
    names = [check.name for check in CHECKS]
    is_text = chosen in (Format.TABLE, Format.WIDE)
    if is_text:
        session.output.data(header(names))
    rows = []
    for row in examine(Looks(session, run_uri=run_uri)):
        rows.append(row)
        if is_text:  # each at once: some checks take a while
            line = as_line(row, names=names, width=terminal_width(), paint=session.output.styled)
            session.output.data(line)
    data = as_data(rows)
    if chosen in (Format.JSON, Format.YAML):
        session.output.data(as_json(data) if chosen is Format.JSON else as_yaml(data))
    failed = [row.check for row in rows if row.finding.state is State.FAILED]
    if chosen is Format.NAME and failed:
        session.output.data("\n".join(failed))
    session.output.note(", ".join(f"{number} {state}" for state, number in data["count"].items() if number))
    return ExitCode.ERROR if failed else ExitCode.OK

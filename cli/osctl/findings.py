"""What a check has found: one row of the table of `osctl doctor`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from osctl.output import Style, printable

_MIN_TEXT = 30
_MEND = "mend: "
Paint = Callable[[str, Style], str]


class State(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    """It works, and something about it will surprise somebody."""
    FAILED = "failed"
    """It does not work."""
    NOT_SEEN = "not seen"
    """It could not be looked at, which says nothing about it."""


_STYLES: Mapping[State, Style] = {
    State.OK: "good",
    State.WARNING: "warn",
    State.FAILED: "bad",
    State.NOT_SEEN: "dim",
}
_STATE_WIDTH = max(map(len, State))


@dataclass(frozen=True)
class Finding:
    """The outcome of a check."""

    state: State
    message: str
    mend: str = ""
    """The command that mends it, or what to do where no command does; only where something is wrong."""


@dataclass(frozen=True)
class Row:
    """A check with its outcome."""

    check: str
    finding: Finding


def ok(message: str) -> Finding:
    """It is as it should be."""
    return Finding(State.OK, message)


def warning(message: str, mend: str) -> Finding:
    """It works, but."""
    return Finding(State.WARNING, message, mend)


def failed(message: str, mend: str) -> Finding:
    """It does not work."""
    return Finding(State.FAILED, message, mend)


def not_seen(message: str) -> Finding:
    """It could not be looked at."""
    return Finding(State.NOT_SEEN, message)


def worst(findings: Sequence[Finding]) -> Finding:
    """The first of the worst: what a row shows that is about several things."""
    order = [State.FAILED, State.WARNING, State.NOT_SEEN, State.OK]
    return min(findings, key=lambda finding: order.index(finding.state))


def header(names: Sequence[str]) -> str:
    """The line above the rows."""
    return f"{'CHECK':<{max(map(len, names))}}  {'STATE':<{_STATE_WIDTH}}  FINDING"


def as_line(row: Row, *, names: Sequence[str], width: int, paint: Paint) -> str:
    """A row as text, as wide as the terminal.

    Args:
        names: of all checks, for the width of the first column.
        width: of the terminal.
        paint: gives a text its colour.
    """
    finding = row.finding
    first = max(map(len, names))
    indent = first + _STATE_WIDTH + 4
    room = max(_MIN_TEXT, width - indent)
    lines = _wrap(printable(finding.message), room)
    if finding.mend:
        lines += _wrap(_MEND + printable(finding.mend), room, indent=len(_MEND))
    state = paint(finding.state.value, _STYLES[finding.state]) + " " * (_STATE_WIDTH - len(finding.state))
    head = f"{row.check:<{first}}  {state}  {lines[0] if lines else ''}".rstrip()
    return "\n".join([head, *(" " * indent + line for line in lines[1:])])


def as_data(rows: Sequence[Row]) -> dict[str, Any]:
    """What `-o json` prints: names stay as they are once they are here."""
    count = {state.value: sum(row.finding.state is state for row in rows) for state in State}
    checks = [
        {
            "check": row.check,
            "state": row.finding.state.value,
            "message": row.finding.message,
            "mend": row.finding.mend,
        }
        for row in rows
    ]
    return {"checks": checks, "count": count}


def _wrap(text: str, width: int, *, indent: int = 0) -> list[str]:
    """Lines of a text. Words stay whole, so that a command can be copied."""
    return textwrap.wrap(
        text,
        width=width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )

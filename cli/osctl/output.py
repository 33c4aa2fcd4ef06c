"""What is written: data on stdout, everything else on stderr; colour only where it helps and is wanted."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TextIO

from osctl.settings import ColorMode

Style = Literal["plain", "dim", "bold", "good", "warn", "bad"]
_CODES: Mapping[Style, str] = {"plain": "", "dim": "2", "bold": "1", "good": "32", "warn": "33", "bad": "31"}
"""The terminal's own colours, so that light and dark themes both stay readable."""
_GAP = 3
_DEFAULT_WIDTH = 80


class OutputClosedError(Exception):
    """Nobody reads what is written, as after `| head`."""


class Output:
    """Where a command writes."""

    def __init__(self, *, color: ColorMode = "auto", quiet: bool = False, verbose: int = 0) -> None:
        self.color = color
        self.quiet = quiet
        self.verbose = verbose

    def data(self, text: str, *, flush: bool = False) -> None:
        """What was asked for; with `flush` a pipe has it at once."""
        _write(sys.stdout, text, flush=flush)

    def note(self, text: str) -> None:
        """What helps a person; silent with `-q`."""
        if not self.quiet:
            _write(sys.stderr, text)

    def detail(self, text: str) -> None:
        """What tells how it is done; only with `-v`."""
        if self.verbose:
            _write(sys.stderr, text)

    def prompt(self, text: str) -> None:
        """A question, which the answer follows on the same line."""
        sys.stderr.write(text)
        sys.stderr.flush()

    def error(self, message: str, hint: str | None) -> None:
        """Why it did not work, and what to do."""
        _write(sys.stderr, f"{self.styled('error:', 'bad', sys.stderr)} {_one_line(message)}")
        if hint:
            _write(sys.stderr, f"{self.styled('hint:', 'bold', sys.stderr)} {_one_line(hint)}")

    def styled(self, text: str, style: Style, stream: TextIO | None = None) -> str:
        """The text with its colour, where the stream shows colours."""
        code = _CODES[style]
        return f"\x1b[{code}m{text}\x1b[0m" if code and self.has_color(stream or sys.stdout) else text

    def has_color(self, stream: TextIO) -> bool:
        """Whether a stream gets colours."""
        if self.color != "auto":
            return self.color == "always"
        if os.environ.get("NO_COLOR"):
            return False
        return stream.isatty() and os.environ.get("TERM") != "dumb"


def as_json(value: Any) -> str:
    """One JSON document."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def as_yaml(value: Any) -> str:
    """One YAML document, keys in the order in which they are."""
    import yaml  # slow to import, and only this format needs it

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent_text)
    written: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return written.rstrip("\n")


def as_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, as wide as they need to be."""
    lines = [tuple(header), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        (" " * _GAP).join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def printable(text: str) -> str:
    """Text of others, on one line and without what would move a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)


def size_text(num_bytes: float) -> str:
    """A number of bytes for people: `812 B`, `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"


def _one_line(text: str) -> str:
    """Some of it was said by others."""
    return printable(" ".join(text.split()))


def terminal_width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((_DEFAULT_WIDTH, 24)).columns


def _write(stream: TextIO, text: str, *, flush: bool = False) -> None:
    try:
        stream.write(text + "\n")
        if flush:
            stream.flush()
    except BrokenPipeError as error:
        raise OutputClosedError from error
    except UnicodeEncodeError:  # a terminal of another encoding shows what it can
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")

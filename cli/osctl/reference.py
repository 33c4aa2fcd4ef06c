"""Writes docs/reference/cli.md: `python -m osctl.reference`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from opensora_operator.fields import docs_of

from osctl.errors import ExitCode
from osctl.main import COMMANDS, is_argument, load, usage_of
from osctl.settings import PREFIX, Settings

_INTRODUCTION = """# osctl

Written by `make generate`; `osctl COMMAND --help` says the same. Data goes to stdout, everything else to stderr. An
error is one line, and a hint with what to do.
"""
PAGE = Path(__file__).parents[2] / "docs/reference/cli.md"
_OF_ALL = ("quiet", "verbose", "namespace", "context", "kubeconfig", "timeout")


def page() -> str:
    """The page."""
    codes = docs_of(ExitCode)
    fields = docs_of(Settings)
    parts = [
        _INTRODUCTION,
        "## Commands\n\n" + _table(("command", "does"), _commands()),
        *(_command(name) for name in COMMANDS),
        "## Options of all commands\n\nBefore the command or after it; those about the cluster are for the commands "
        "that ask one.\n\n" + _table(("option", "meaning"), _options_of_all()),
        f"## Settings\n\nLater ones win: what is built in, the user's file `~/.config/osctl/config.toml`, the "
        f"project's `osctl.toml` in this folder or above, variables `{PREFIX}<SETTING>`, flags. "
        "`osctl config view` says where each value comes from.\n\n"
        + _table(
            ("setting", "built in", "meaning"),
            ((_code(name.name), _code(str(name.default)), fields[name.name]) for name in dataclasses.fields(Settings)),
        ),
        "## Exit codes\n\n"
        + _table(("code", "name", "meaning"), ((str(int(code)), code.name, codes[code.name]) for code in ExitCode))
        + "\n130 is Ctrl-C, and 141 a pipe that nobody reads any more.\n",
    ]
    return "\n".join(parts)


def _commands() -> Iterable[tuple[str, str]]:
    return ((f"[`{name}`](#{name})", entry.summary) for name, entry in COMMANDS.items())


def _command(name: str) -> str:
    command = load(name)
    own = [parameter for parameter in command.params if not (parameter.name in _OF_ALL and _is_common(parameter))]
    arguments = [parameter for parameter in own if is_argument(parameter)]
    usage = " ".join(["osctl", name, *map(usage_of, arguments)])
    has_options = len(own) > len(arguments)
    table = _table(("argument or option", "meaning"), ((_name(one), one.help or "") for one in own))
    text = inspect.cleandoc(command.help or "")
    return (
        f"## {name}\n\n```text\n{usage}{' [OPTIONS]' if has_options else ''}\n```\n\n{text}\n\n{table if own else ''}"
    )


def _is_common(parameter: Any) -> bool:
    """`wait --timeout` is another one than that of all commands."""
    return bool(parameter.name != "timeout" or parameter.metavar == "SECONDS")


def _options_of_all() -> Iterable[tuple[str, str]]:
    return (
        (_name(parameter), parameter.help or "")
        for parameter in load("get").params
        if parameter.name in _OF_ALL and _is_common(parameter)
    )


def _name(parameter: Any) -> str:
    if is_argument(parameter):
        return _code(usage_of(parameter))
    takes = (
        "" if getattr(parameter, "is_flag", False) or getattr(parameter, "count", False) else " " + _value(parameter)
    )
    return ", ".join(_code(name + takes) for name in sorted(parameter.opts, key=len))


def _value(parameter: Any) -> str:
    """What an option takes: its name for it, the words it takes, or its type."""
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return {int: "N", float: "N"}.get(kind, "TEXT")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

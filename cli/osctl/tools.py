"""Programs of the core that a group of commands passes its words to: what there is, and how it is run.

A tool is a module of the group's package that can be run with `python -m`. The list is made of what is installed, so
that it is never longer or shorter than that.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.output import as_table
from osctl.session import Session

_INTERRUPTED = 128


@dataclass(frozen=True)
class Group:
    """Tools that belong together."""

    command: str
    """Of osctl: `data`."""
    package: str
    """Where they are."""
    extra: str
    """Of the distribution: what they need beyond the package itself."""


def run_tool(session: Session, group: Group, words: Sequence[str]) -> int:
    """Run a tool with its arguments as they are, and return its exit code; without words, list the tools.

    Raises:
        UsageError: there is no tool of this name.
        OsctlError: this version has none at all.
    """
    tools = _find_tools(group)
    if not words:
        session.output.data(as_table(("TOOL", "DOES"), sorted(tools.items())))
        return int(ExitCode.OK)
    name, *arguments = words
    if name not in tools:
        raise UsageError(f"there is no tool {name!r}", hint=f"`osctl {group.command}` lists the tools")
    command = [sys.executable, "-m", f"{group.package}.{name}", *arguments]
    session.output.detail(" ".join(command))
    with subprocess.Popen(command) as process:
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # it has been interrupted as well, and ends in its own way
                continue
            return code if code >= 0 else _INTERRUPTED - code


def _find_tools(group: Group) -> dict[str, str]:
    """Name → the first line of its docstring."""
    spec = importlib.util.find_spec(group.package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise OsctlError(
            f"this version of opensora has no {group.package}, which `osctl {group.command}` runs",
            hint=f"a later one may have it: pip install --upgrade 'opensora[{group.extra}]'",
        )
    return {name: doc for folder in folders for name, doc in _programs(Path(folder), "")}


def _programs(folder: Path, prefix: str) -> list[tuple[str, str]]:
    """Modules that can be run, found without importing any: some need what is not installed."""
    found = []
    for module in pkgutil.iter_modules([str(folder)]):
        path = folder / module.name
        name = f"{prefix}{module.name}"
        source = path / "__main__.py" if module.ispkg else path.with_suffix(".py")
        text = source.read_text(encoding="utf-8") if source.is_file() else ""
        if module.ispkg:
            found += _programs(path, f"{name}.")
        if text and (module.ispkg or 'if __name__ == "__main__":' in text) and module.name != "__main__":
            lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
            found.append((name, lines[0] if lines else ""))
    return found

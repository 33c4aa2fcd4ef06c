"""Settings of the command line and where each comes from.

Later ones win: what is built in, the user's file, the project's `osctl.toml`, variables `OSCTL_*`, flags.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from osctl.errors import UsageError

PREFIX = "OSCTL_"
DEBUG = "OSCTL_DEBUG"
"""Variable that has a mistake of ours show where it is; no setting."""
PROJECT_FILE = "osctl.toml"
OutputFormat = Literal["table", "wide", "json", "yaml", "name"]
ColorMode = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings."""

    kubeconfig: str = ""
    """File that says how to reach the API server; empty: `$KUBECONFIG`, `~/.kube/config`, or the pod's own account."""
    context: str = ""
    """Context of the kubeconfig; empty: its current one."""
    namespace: str = ""
    """Namespace; empty: that of the context."""
    timeout_seconds: float = 30.0
    """Longest time for one request to the API server."""
    output: OutputFormat = "table"
    """Format of what is printed: table, wide, json, yaml or name."""
    color: ColorMode = "auto"
    """Colours: auto, always or never."""
    store_patience_seconds: float = 300.0
    """How long an object store that does not answer is asked again."""
    image: str = ""
    """Image of runs that `train` makes from a config."""
    profile: str = ""
    """ClusterTrainingProfile of runs that `train` makes from a config."""
    queue: str = ""
    """Queue of runs that `train` makes from a config."""
    run_uri: str = ""
    """Run directory of runs that `train` makes from a config; `{name}` is the run's name."""


@dataclass(frozen=True)
class Resolved:
    """The settings, and for each where it comes from."""

    settings: Settings
    sources: Mapping[str, str]


def resolve(
    flags: Mapping[str, Any],
    *,
    environment: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> Resolved:
    """The settings from all layers.

    Args:
        flags: setting → value of its flag; None where it was not given.
        environment: of the process.
        folder: where to look for the project's file, there and above; the working directory unless given.

    Raises:
        UsageError: a layer has a setting that does not exist, or a value that cannot be used.
    """
    values: dict[str, Any] = {}
    sources = {field.name: "built in" for field in dataclasses.fields(Settings)}
    files = [user_file(environment), project_file(folder or Path.cwd())]
    for path in files:
        if path is not None and path.is_file():
            _take(_read(path), str(path), values, sources)
    from_environment = {
        name[len(PREFIX) :].lower(): text
        for name, text in environment.items()
        if name.startswith(PREFIX) and name != DEBUG
    }
    for name, text in from_environment.items():
        _take({name: text}, f"${PREFIX}{name.upper()}", values, sources)
    for name, value in flags.items():
        if value is not None:
            _take({name: value}, "flag", values, sources)
    return Resolved(Settings(**values), sources)


def user_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where the user's own settings are, whether the file exists or not."""
    if environment.get("APPDATA") and os.name == "nt":
        return Path(environment["APPDATA"]) / "osctl" / "config.toml"
    base = environment.get("XDG_CONFIG_HOME") or (f"{environment['HOME']}/.config" if environment.get("HOME") else "")
    return Path(base) / "osctl" / "config.toml" if base else None


def project_file(folder: Path) -> Path | None:
    """The nearest `osctl.toml`, here or above."""
    return next((path for place in (folder, *folder.parents) if (path := place / PROJECT_FILE).is_file()), None)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no TOML, or a number without end
        raise UsageError(f"{path} cannot be read: {error}", hint="correct the file or remove it") from error


def _take(given: Mapping[str, Any], source: str, values: dict[str, Any], sources: dict[str, str]) -> None:
    hints = typing.get_type_hints(Settings)
    for name, value in given.items():
        if name not in hints:
            raise UsageError(f"{source}: there is no setting {name!r}", hint=f"settings are {', '.join(hints)}")
        values[name] = _checked(name, hints[name], value, source)
        sources[name] = source


def _checked(name: str, hint: Any, value: Any, source: str) -> Any:
    if hint is float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if isinstance(value, bool) or not 0 < number < float("inf"):
            raise UsageError(f"{source}: {name} is {value!r}", hint="give a number of seconds above 0")
        return number
    if not isinstance(value, str):
        raise UsageError(f"{source}: {name} is {value!r}", hint="give a text")
    words = typing.get_args(hint)
    if words and value not in words:
        raise UsageError(f"{source}: {name} is {value!r}", hint=f"give one of {', '.join(words)}")
    return value

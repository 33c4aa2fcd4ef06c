"""What a shell completes that only the cluster knows.

Silent where the cluster cannot be asked: a prompt is no place for errors.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from osctl.errors import OsctlError

if TYPE_CHECKING:  # imported late: a shell asks for words alone in most cases
    from osctl.client import Client

_TIMEOUT_SECONDS = 2.0
_MAX_RANKS = 256
"""A longer list helps nobody."""


def complete_target(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of runs, and after `KIND/` those of another kind."""
    from osctl.kinds import find_kind, resource_of

    kind, slash, name = incomplete.rpartition("/")
    try:
        client, namespace = _connect(ctx)
        with client:
            found = client.list(resource_of(find_kind(kind or "tr")), namespace)
    except OsctlError:
        return []
    names = sorted(item["metadata"]["name"] for item in found)
    return [f"{kind}{slash}{found_name}" for found_name in names if found_name.startswith(name)]


def complete_attempt(ctx: typer.Context, incomplete: str) -> list[str]:
    """The attempts of the run on the command line."""
    newest = int(_status(ctx).get("attempt") or 0)
    return _matching([*map(str, range(newest, 0, -1)), "all"], incomplete)


def complete_rank(ctx: typer.Context, incomplete: str) -> list[str]:
    """The ranks of the run on the command line."""
    ranks = int((_status(ctx).get("resolved") or {}).get("worldSize") or 0)
    return _matching(["all", "first-failed", *map(str, range(min(ranks, _MAX_RANKS)))], incomplete)


def _matching(words: list[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _status(ctx: typer.Context) -> dict[str, Any]:
    """Of the run that the command line names already; empty where it names none."""
    from osctl.kinds import resource_of
    from osctl.targets import parse_target

    params = {**_parsed(ctx), **{name: value for name, value in ctx.params.items() if value is not None}}
    word = params.get("target") or params.get("run")
    if not isinstance(word, str):
        return {}
    try:
        client, namespace = _connect(ctx)
        target = parse_target(word)
        with client:
            return client.get(resource_of(target.kind), namespace, target.name).get("status") or {}
    except OsctlError:
        return {}


def _parsed(ctx: typer.Context) -> dict[str, Any]:
    """The command line without the option whose value is asked for: with it, the parser understands nothing."""
    words = (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()
    if ctx.info_name not in words:
        return {}
    before = words[words.index(ctx.info_name) + 1 :]
    while before and before[-1].startswith("-"):
        before.pop()
    return dict(ctx.command.make_context(ctx.info_name, before, parent=ctx.parent, resilient_parsing=True).params)


def _connect(ctx: typer.Context) -> tuple[Client, str]:
    """The API server and the namespace, as the command line has them so far."""
    from osctl.client import Client
    from osctl.kubeconfig import find_access
    from osctl.settings import resolve

    given = {**(ctx.parent.params if ctx.parent is not None else {}), **ctx.params}
    flags = {name: given[name] for name in ("namespace", "context", "kubeconfig") if isinstance(given.get(name), str)}
    settings = resolve(flags).settings
    access = find_access(settings.kubeconfig, context=settings.context)
    return Client(access, timeout_seconds=_TIMEOUT_SECONDS), settings.namespace or access.namespace

"""`osctl get`: lists of objects, as the API server's own table or as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from opensora_operator.constants import API_VERSION, GROUP

from osctl.client import TABLE, Object, Resource
from osctl.completing import complete_target
from osctl.errors import UsageError
from osctl.kinds import resource_of
from osctl.options import OutputFormat
from osctl.output import as_json, as_table, as_yaml
from osctl.session import Session
from osctl.targets import split_kind


def get(
    session: Session,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND] [NAME]...", help="Kind, then names. [default: tr]", autocompletion=complete_target
        ),
    ] = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")] = False,
    selector: Annotated[str, typer.Option("--selector", "-l", metavar="LABELS", help="With these labels.")] = "",
    output: OutputFormat = None,
) -> None:
    """List runs, sample jobs, batch searches and profiles.

    Kinds: tr (TrainingRun), sj (SampleJob), bs (BatchSearch), tp (TrainingProfile), ctp (ClusterTrainingProfile).

    Examples: `osctl get`, `osctl get tr -A -o wide`, `osctl get sj nightly -o yaml`.
    """
    kind, names = split_kind(words or [])
    if names and (all_namespaces or selector):
        raise UsageError("names go with neither -A nor -l", hint="leave out one of them")
    resource = resource_of(kind)
    namespace = None if all_namespaces or not kind.namespaced else session.namespace
    chosen = output.value if output is not None else session.settings.output
    if chosen in ("table", "wide"):
        _show_table(session, resource, namespace, names, selector, is_wide=chosen == "wide")
        return
    found = [session.client.get(resource, namespace, name) for name in names]
    if not names:
        found = session.client.list(resource, namespace, labels=selector)
    if chosen == "name":
        for item in found:
            session.output.data(f"{kind.singular}.{GROUP}/{item['metadata']['name']}")
        return
    for item in found:  # members of a list come without them
        item.setdefault("apiVersion", API_VERSION)
        item.setdefault("kind", kind.name)
    value = found[0] if len(names) == 1 else {"apiVersion": "v1", "kind": "List", "items": found}
    session.output.data(as_json(value) if chosen == "json" else as_yaml(value))


def _show_table(
    session: Session,
    resource: Resource,
    namespace: str | None,
    names: Sequence[str],
    selector: str,
    *,
    is_wide: bool,
) -> None:
    if names:
        tables: Iterable[Object] = [
            session.client.request("GET", resource.path(namespace, name), accept=TABLE) for name in names
        ]
    else:
        tables = session.client.pages(resource.path(namespace), {"labelSelector": selector}, accept=TABLE)
    header: list[str] = []
    rows: list[list[str]] = []
    has_namespaces = resource.namespaced and namespace is None
    for table in tables:
        columns = table.get("columnDefinitions") or ()
        shown = [index for index, column in enumerate(columns) if is_wide or not column.get("priority")]
        header = header or ["NAMESPACE"] * has_namespaces + [str(columns[index]["name"]).upper() for index in shown]
        for row in table.get("rows") or ():
            place = [str(row["object"]["metadata"].get("namespace", ""))] * has_namespaces
            rows.append(place + [_cell(row["cells"][index]) for index in shown])
    if rows:
        session.output.data(as_table(header, rows))
        return
    where = "anywhere" if namespace is None else f"in namespace {namespace}"
    labels = f" with labels {selector}" if selector else ""
    session.output.note(f"no {resource.plural} {where}{labels}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)

"""`osctl plan`: what the operator does next about a run, or what it would make of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from osctl import next_steps
from osctl.completing import complete_target
from osctl.errors import OsctlError
from osctl.forecast import Files, Forecast, forecast
from osctl.manifests import RUN, Choices, is_config, read_manifests, run_from_config, runs_of
from osctl.observing import Observer
from osctl.options import Format, OutputFormat, ReadBuckets
from osctl.output import as_json, as_yaml, terminal_width
from osctl.session import Session
from osctl.targets import fetch, parse_run, phase_of
from osctl.validation import schema_of, with_defaults

_FILES = (".py", ".yaml", ".yml", ".json")
_IMAGE = "example.com/opensora:latest"
"""Stands in where only the cluster's profile knows the image; it is not shown."""


def plan(
    session: Session,
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FILE", help="Name of a run, or a run file or config.", autocompletion=complete_target
        ),
    ],
    read_buckets: ReadBuckets = False,
    output: OutputFormat = None,
) -> None:
    """Show what the operator would do next, and why.

    For a run in the cluster: what it would write down and do now, why, and what it waits for by the clock. The
    operator's own planner decides, here; so it works while no operator runs, too.

    For a file: the nodes, ranks, resources and objects of the run, and what its buckets ask of a rank.

    Examples: `osctl plan first`, `osctl plan run.yaml`, `osctl plan first -o json`.
    """
    if what == "-" or what.endswith(_FILES) or Path(what).is_file():
        _plan_file(session, what, output, read_buckets=read_buckets)
    else:
        _plan_run(session, what, output)


def _plan_run(session: Session, name: str, output: Format | None) -> None:
    body = fetch(session, parse_run(name))
    observer = Observer(session.client, body)
    observed = observer.observe()
    steps = next_steps.next_steps(observed)
    in_the_way = observer.children(next_steps.places_to_create(steps))
    if in_the_way:
        steps = next_steps.next_steps(next_steps.with_children(observed, in_the_way))
    head = {"name": body["metadata"]["name"], "namespace": body["metadata"]["namespace"]}
    if _as_data(session, {**head, **next_steps.as_data(steps), "unseen": observer.unseen}, output):
        return
    session.output.data(f"TrainingRun {head['name']} in {head['namespace']}: {phase_of(body) or 'New'}\n")
    session.output.data(next_steps.as_text(steps, width=terminal_width(), paint=session.output.styled))
    for words in observer.unseen:
        session.output.note(f"not seen: {words}")


def _plan_file(session: Session, path: str, output: Format | None, *, read_buckets: bool) -> None:
    from osctl import layout, outlook  # the core's arithmetic is slow to import
    from osctl.resolved import config_of, why_unknown

    objects = [run_from_config(path, Choices(run_uri="/run"))] if is_config(path) else read_manifests(path)
    found: list[dict[str, Any]] = []
    for run in runs_of(objects, source=path):
        name = run["metadata"]["name"]
        planned = _forecast(session, run, Files(objects))
        asked = layout.layout_of(planned, has_image=layout.image_of(planned) != _IMAGE)
        config = config_of(planned)
        ahead = None if config is None else outlook.look_ahead(config, ranks=asked.ranks, reads_buckets=read_buckets)
        found.append(
            {"name": name, **layout.as_data(asked), "outlook": None if ahead is None else outlook.as_data(ahead)}
        )
        if (output or Format(session.settings.output)) in (Format.TABLE, Format.WIDE):
            text = f"  not forecast: {why_unknown(planned)}" if ahead is None else outlook.as_text(ahead)
            session.output.data(f"TrainingRun {name}\n{layout.as_text(asked)}\n{text}")
    _as_data(session, {"items": found}, output)


def _forecast(session: Session, run: Any, files: Files) -> Forecast:
    """What the operator makes of a run. Raises OsctlError where that is nothing."""
    namespace = session.settings.namespace or str(run["metadata"].get("namespace") or "default")
    stored = {**run, "spec": with_defaults(run["spec"], schema_of(RUN)["properties"]["spec"])}
    planned = forecast(stored, files, namespace=namespace)
    if planned.problem is not None and "image" not in stored["spec"]:
        planned = forecast({**stored, "spec": {**stored["spec"], "image": _IMAGE}}, files, namespace=namespace)
    if planned.problem is not None:
        hint = "profiles and ConfigMaps that the run names belong into the file, or see `osctl train --dry-run=server`"
        raise OsctlError(f"{run['metadata']['name']}: {planned.problem}", hint=hint)
    return planned


def _as_data(session: Session, data: dict[str, Any], output: Format | None) -> bool:
    """Print data where that is asked for; whether it was."""
    chosen = output or Format(session.settings.output)
    if chosen in (Format.JSON, Format.YAML):
        session.output.data(as_json(data) if chosen is Format.JSON else as_yaml(data))
    elif chosen is Format.NAME:
        session.output.data(str(data.get("name") or "\n".join(item["name"] for item in data["items"])))
    return chosen in (Format.JSON, Format.YAML, Format.NAME)

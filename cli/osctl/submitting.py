"""From manifests to objects of the cluster: checked, shown as they would be, created."""

from __future__ import annotations

from collections.abc import Sequence

from opensora_operator.constants import GROUP
from opensora_operator.kinds import KINDS

from osctl.checks import check
from osctl.client import Object
from osctl.errors import OsctlError, UsageError
from osctl.forecast import Files, forecast
from osctl.manifests import RUN, resource_of_object
from osctl.options import DryRun, Format
from osctl.output import as_json, as_yaml
from osctl.session import Session
from osctl.surroundings import InCluster
from osctl.validation import schema_of, with_defaults


def refuse_mistakes(session: Session, objects: Sequence[Object]) -> None:
    """What is wrong costs a moment here, and a place in a queue later. Raises UsageError."""
    for body in objects:
        if body["kind"] not in KINDS:
            continue
        report = check(body, others=objects)
        name = body["metadata"]["name"]
        for words in report.unknown:
            session.output.detail(f"{name}: {words}")
        if report.problems:
            first, *rest = [str(problem) for problem in report.problems]
            more = f" (and {len(rest)} more)" if rest else ""
            raise UsageError(f"{name}: {first}{more}", hint="`osctl lint FILE` lists all problems")


def create(session: Session, body: Object, *, dry_run: bool = False) -> Object:
    """Create an object in its namespace, or else in that of the session; the object as it is stored."""
    resource = resource_of_object(body, source="the file")
    namespace = None
    if resource.namespaced:
        namespace = session.settings.namespace or body["metadata"].get("namespace") or session.namespace
        body = {**body, "metadata": {**body["metadata"], "namespace": namespace}}
    return session.client.create(resource, namespace, body, dry_run=dry_run)


def print_created(session: Session, created: Object, output: Format | None) -> None:
    """Say what there is now, and how to go on."""
    if output in (Format.JSON, Format.YAML):
        session.output.data(as_json(created) if output is Format.JSON else as_yaml(created))
        return
    name, kind = created["metadata"]["name"], created["kind"]
    group = f".{GROUP}" if "/" in created["apiVersion"] else ""
    session.output.data(f"{kind.lower()}{group}/{name}" + ("" if output is Format.NAME else " created"))
    if kind == RUN:
        session.output.note(f"`osctl status {name}` tells how it is, `osctl wait {name}` ends with it")
    elif kind in KINDS:
        session.output.note(f"`osctl wait {kind.lower()}/{name}` ends with it")


def print_forecast(
    session: Session, objects: Sequence[Object], shown: Sequence[Object], *, dry_run: DryRun, output: Format | None
) -> None:
    """Objects as they would be stored, each followed by what the operator would create for it.

    Args:
        session: of the command.
        objects: all that would be created, which may refer to each other.
        shown: those of them that the operator acts on.
        dry_run: whether the API server is asked too.
        output: format.
    """
    files = Files(objects)
    found: list[Object] = []
    for body in shown:
        if dry_run is DryRun.SERVER:
            stored = create(session, body, dry_run=True)
            namespace = str(stored["metadata"]["namespace"])
            planned = forecast(stored, InCluster(session.client, files), namespace=namespace)
        else:
            namespace = session.settings.namespace or str(body["metadata"].get("namespace") or "default")
            spec = with_defaults(body["spec"], schema_of(body["kind"])["properties"]["spec"])
            planned = forecast({**body, "spec": spec}, files, namespace=namespace)
        if planned.problem is not None:
            hint = "with --dry-run=server the objects of the cluster that it refers to count too"
            raise OsctlError(
                f"{body['metadata']['name']}: {planned.problem}", hint=hint if dry_run is DryRun.CLIENT else None
            )
        found += [body, *planned.objects]
    if output is Format.JSON:
        session.output.data(as_json({"apiVersion": "v1", "kind": "List", "items": found}))
    elif output is Format.NAME:
        for body in found:
            session.output.data(f"{body['kind'].lower()}/{body['metadata']['name']}")
    else:
        session.output.data("\n---\n".join(map(as_yaml, found)))
    session.output.note(
        f"nothing was created (dry run: {dry_run.value}); the operator adds its own address to the pods' environment"
    )

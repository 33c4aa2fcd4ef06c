"""`osctl train`: from a run file or a config to a TrainingRun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from osctl.checks import check
from osctl.client import Object
from osctl.errors import OsctlError, UsageError
from osctl.forecast import Files, forecast
from osctl.manifests import (
    RUN,
    Choices,
    is_config,
    read_manifests,
    resource_of_object,
    run_from_config,
    runs_of,
    with_choices,
)
from osctl.options import DryRun, DryRunOption, Format, OutputFormat
from osctl.output import as_json, as_yaml
from osctl.session import Session
from osctl.surroundings import InCluster
from osctl.targets import parse_target
from osctl.validation import schema_of, with_defaults
from osctl.waiting import parse_goal, wait_for

_A_LONG_TIME = 365 * 86_400.0


def train(
    session: Session,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A run file, a config (.py, .yaml), or - for stdin.")],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Name of the run. [default: the file's]", show_default=False),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", min=1, max=4096, help="Number of pods.")] = None,
    procs_per_node: Annotated[
        str | None, typer.Option("--procs-per-node", metavar="N|auto", help="Ranks per pod.")
    ] = None,
    image: Annotated[str | None, typer.Option("--image", metavar="IMAGE", help="Image of the trainer.")] = None,
    run_uri: Annotated[
        str | None,
        typer.Option("--run-uri", metavar="URI", help="Run directory: where checkpoints, logs and samples go."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="URI", help="Catalogue of the clips.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the config; repeat it for more.")
    ] = None,
    queue: Annotated[str | None, typer.Option("--queue", metavar="NAME", help="Queue that admits the run.")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="ClusterTrainingProfile that fills in the rest.")
    ] = None,
    suspend: Annotated[bool, typer.Option("--suspend", help="Create it suspended.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until it is done, and end as it ends.")] = False,
    dry_run: DryRunOption = None,
    output: OutputFormat = None,
) -> None:
    """Submit a training run.

    FILE is a TrainingRun as `kubectl apply` takes it, with the profiles and ConfigMaps that belong to it, or a config
    of the core or of Open-Sora: flags then say where it runs. The config is checked before anything is sent.

    `--dry-run` prints every object that the operator would create, by the operator's own planner: with `client` from
    the file alone, with `server` also with what the cluster has.

    Examples: `osctl train run.yaml`, `osctl train stage1.py --run-uri s3://bucket/runs/a --nodes 4 --set
    train.steps=1000`, `osctl train run.yaml --dry-run`.
    """
    given = Choices(
        name=name,
        nodes=nodes,
        procs_per_node=procs_per_node,
        image=image,
        run_uri=run_uri,
        data=data,
        overrides=tuple(overrides or ()),
        queue=queue,
        profile=profile,
        suspend=suspend,
    )
    objects = _objects(session, file, given)
    runs = runs_of(objects, source=file)
    if wait and len(runs) > 1:
        raise UsageError(f"--wait with {len(runs)} runs", hint="submit them, then `osctl wait` for each")
    _check(session, objects)
    if dry_run is not None:
        _print_forecast(session, objects, runs, dry_run=dry_run, output=output)
        return
    for body in objects:
        created = _create(session, body, dry_run=False)
        _print_created(session, created, output)
    if wait:
        wait_for(session, parse_target(runs[0]["metadata"]["name"]), parse_goal("complete"), seconds=_A_LONG_TIME)


def _objects(session: Session, file: str, given: Choices) -> list[Object]:
    """What the file and flags ask for, run last: what it refers to is there before it."""
    if is_config(file):
        settings = session.settings
        choices = {key: value for key, value in vars(given).items() if value is not None}
        defaults = {"image": settings.image, "queue": settings.queue, "profile": settings.profile}
        defaults["run_uri"] = settings.run_uri
        return [run_from_config(file, Choices(**{key: value for key, value in defaults.items() if value} | choices))]
    objects = read_manifests(file)
    if given.name is not None and len(runs_of(objects, source=file)) > 1:
        raise UsageError(f"{file} has several runs: --name would give all the same", hint="leave it out")
    changed = [with_choices(body, given) if body["kind"] == RUN else body for body in objects]
    return sorted(changed, key=lambda body: body["kind"] == RUN)


def _check(session: Session, objects: Sequence[Object]) -> None:
    """What is wrong costs a moment here, and a place in a queue later."""
    for body in objects:
        if body["kind"] != RUN:
            continue
        report = check(body, others=objects)
        name = body["metadata"]["name"]
        for words in report.unknown:
            session.output.detail(f"{name}: {words}")
        if report.problems:
            first, *rest = [str(problem) for problem in report.problems]
            more = f" (and {len(rest)} more)" if rest else ""
            raise UsageError(f"{name}: {first}{more}", hint="`osctl lint FILE` lists all problems")


def _create(session: Session, body: Object, *, dry_run: bool) -> Object:
    resource = resource_of_object(body, source="the file")
    namespace = None
    if resource.namespaced:
        namespace = session.settings.namespace or body["metadata"].get("namespace") or session.namespace
        body = {**body, "metadata": {**body["metadata"], "namespace": namespace}}
    return session.client.create(resource, namespace, body, dry_run=dry_run)


def _print_created(session: Session, created: Object, output: Format | None) -> None:
    if output in (Format.JSON, Format.YAML):
        session.output.data(as_json(created) if output is Format.JSON else as_yaml(created))
        return
    name = created["metadata"]["name"]
    plural = resource_of_object(created, source="the answer").kind.lower()
    group = ".opensora.dev" if "/" in created["apiVersion"] else ""
    session.output.data(f"{plural}{group}/{name}" + ("" if output is Format.NAME else " created"))
    if created["kind"] == RUN:
        session.output.note(f"`osctl status {name}` tells how it is, `osctl wait {name}` ends with it")


def _print_forecast(
    session: Session, objects: Sequence[Object], runs: Sequence[Object], *, dry_run: DryRun, output: Format | None
) -> None:
    """The runs as they would be stored, each followed by what the operator would create for it."""
    files = Files(objects)
    shown: list[Object] = []
    for run in runs:
        if dry_run is DryRun.SERVER:
            stored = _create(session, run, dry_run=True)
            namespace = str(stored["metadata"]["namespace"])
            planned = forecast(stored, InCluster(session.client, files), namespace=namespace)
        else:
            namespace = session.settings.namespace or str(run["metadata"].get("namespace") or "default")
            spec = with_defaults(run["spec"], schema_of(RUN)["properties"]["spec"])
            stored = {**run, "spec": spec}
            planned = forecast(stored, files, namespace=namespace)
        if planned.problem is not None:
            hint = "with --dry-run=server the profiles and ConfigMaps of the cluster count too"
            raise OsctlError(
                f"{run['metadata']['name']}: {planned.problem}", hint=hint if dry_run is DryRun.CLIENT else None
            )
        shown += [run, *planned.objects]
    if output is Format.JSON:
        session.output.data(as_json({"apiVersion": "v1", "kind": "List", "items": shown}))
    elif output is Format.NAME:
        for body in shown:
            session.output.data(f"{body['kind'].lower()}/{body['metadata']['name']}")
    else:
        session.output.data("\n---\n".join(map(as_yaml, shown)))
    session.output.note(
        f"nothing was created (dry run: {dry_run.value}); the operator adds its own address to the pods' environment"
    )

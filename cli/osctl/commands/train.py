"""`osctl train`: from a run file or a config to a TrainingRun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from osctl.changing import asks, change
from osctl.client import Object
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.manifests import (
    RUN,
    Choices,
    is_config,
    read_manifests,
    run_from_config,
    runs_of,
    with_choices,
)
from osctl.options import DryRunOption, Format, OutputFormat
from osctl.screen import print_story
from osctl.session import Session
from osctl.submitting import create, print_created, print_forecast, refuse_mistakes
from osctl.targets import Target, parse_target
from osctl.waiting import parse_goal, wait_for
from osctl.watching import LeftError, watch_run

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
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show it live, as `watch` does, and end as it ends.")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="Run it here: processes of this machine, no cluster.")] = False,
    dry_run: DryRunOption = None,
    output: OutputFormat = None,
) -> ExitCode | None:
    """Submit a training run.

    FILE is a TrainingRun as `kubectl apply` takes it, with the profiles and ConfigMaps that belong to it, or a config
    of the core or of Open-Sora: flags then say where it runs. The config is checked before anything is sent.

    `--dry-run` prints every object that the operator would create, by the operator's own planner: with `client` from
    the file alone, with `server` also with what the cluster has.

    With `--follow`, q or Ctrl-C leaves the view and the run goes on. On a terminal it is then asked whether the run
    shall stop as well; Enter, or another Ctrl-C, lets it go on.

    `--local` trains on this machine until the run is over: the same command, environment, restarts and status, with
    processes instead of pods. Ctrl-C has the ranks save and end, a second one ends them at once; the same command goes
    on from there.

    Examples: `osctl train run.yaml`, `osctl train stage1.py --run-uri s3://bucket/runs/a --nodes 4 --set
    train.steps=1000`, `osctl train run.yaml --dry-run`, `osctl train run.yaml --local --nodes 1`.
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
    if (wait or follow or local) and len(runs) > 1:
        option = "--local" if local else "--follow" if follow else "--wait"
        raise UsageError(f"{option} with {len(runs)} runs", hint="give each a file of its own")
    if follow and output in (Format.JSON, Format.YAML):
        raise UsageError(f"--follow with -o {output.value}", hint="--wait prints nothing but the object")
    refuse_mistakes(session, objects)
    if dry_run is not None:
        print_forecast(session, objects, runs, dry_run=dry_run, output=output)
        return None
    if local:
        _train_here(session, runs[0], objects, output)
        return None
    for body in objects:
        print_created(session, create(session, body), output)
    target = parse_target(runs[0]["metadata"]["name"])
    if follow:
        return _follow(session, target)
    if wait:
        wait_for(session, target, parse_goal("complete"), seconds=_A_LONG_TIME)
    return None


def _follow(session: Session, target: Target) -> ExitCode:
    """The live view, and what happens when somebody leaves it."""
    try:
        return watch_run(session, target)
    except LeftError:
        session.output.note(f"{target.name} goes on; `osctl watch {target.name}` comes back to it")
    if not asks(session, "Stop the run as well?"):
        raise typer.Abort
    change(session, target, {"requests": {"stop": True}}, done="saves and ends", dry_run=None)
    return ExitCode.CANCELLED


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


def _train_here(session: Session, run: Object, objects: Sequence[Object], output: Format | None) -> None:
    """Train, print the run's story or the run itself, and end as it ended."""
    from osctl.local import train_here, why_it_ended  # needs storage, which is slow to import

    ended = train_here(session, run, objects)
    print_story(session, ended.run, ended.pods, output)
    if ended.code != ExitCode.OK:
        raise OsctlError(why_it_ended(ended.run), exit_code=ended.code)

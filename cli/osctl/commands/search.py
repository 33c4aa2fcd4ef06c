"""`osctl search`: the batch size of every bucket, measured on the hardware that trains."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from opensora_operator.api import BATCH_SEARCH, MAX_NAME
from opensora_operator.constants import API_VERSION

from osctl.batch_sizes import change_file, parse_bucket
from osctl.client import Object
from osctl.completing import complete_target
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.manifests import is_config, name_of, read_manifests
from osctl.options import DryRunOption, Format, OutputFormat
from osctl.output import as_json, as_table, as_yaml, size_text
from osctl.session import Session
from osctl.submitting import create, print_created, print_forecast, refuse_mistakes
from osctl.targets import Target, fetch, is_over, parse_target, phase_of
from osctl.waiting import parse_goal, wait_for

_A_LONG_TIME = 365 * 86_400.0
_FILES = (".py", ".yaml", ".yml", ".json")
_OOM = "oom"
_UNUSED = ("run_uri=/tmp/run", "data.path=/tmp/catalogue.csv")
"""A search touches neither, so a config may lack them, and configs that differ in them alone have one table."""


def search(
    session: Session,
    what: Annotated[
        str,
        typer.Argument(
            metavar="FILE|NAME",
            help="A config or a BatchSearch to submit, or the name of one to show.",
            autocompletion=complete_target,
        ),
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name. [default: a new one]", show_default=False)] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option("--bucket", metavar="RESOLUTION/FRAMES", help="Only these; repeat it. [default: the config's]"),
    ] = None,
    max_batch: Annotated[int | None, typer.Option("--max-batch", min=1, help="Largest batch to try.")] = None,
    headroom: Annotated[int | None, typer.Option("--headroom-percent", min=0, help="Memory that stays free.")] = None,
    step_seconds: Annotated[
        float | None, typer.Option("--step-seconds", help="Batches whose steps take this long, instead of the largest.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory-budget", metavar="QUANTITY", help="Of a rank, such as 2Gi; for CPUs.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--parallel-trials", min=1, help="Pods that search at a time.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the config; repeat it for more.")
    ] = None,
    image: Annotated[str | None, typer.Option("--image", help="Image of the trainer.")] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Queue that admits the search.")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="ClusterTrainingProfile.")] = None,
    apply_to: Annotated[
        str | None, typer.Option("--apply-to", metavar="FILE", help="Write the sizes into this run file or config.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until all sizes are known, and show them.")] = False,
    dry_run: DryRunOption = None,
    output: OutputFormat = None,
) -> None:
    """Find the batch size of every bucket, or show what was found.

    Given a config or a manifest it submits a BatchSearch; given a name it shows the table of one: the batch size of
    each bucket and the measurements behind it. `--apply-to` writes the sizes into a file where it has the old ones.

    Examples: `osctl search stage1.py --wait`, `osctl search sizes`, `osctl search sizes --apply-to run.yaml`.
    """
    given: dict[str, Any] = {
        "buckets": [_bucket(text) for text in bucket] if bucket else None,
        "bounds": None if max_batch is None else {"maxBatch": max_batch},
        "headroomPercent": headroom,
        "objective": None if step_seconds is None else "EqualStepTime",
        "stepSeconds": step_seconds,
        "memoryBudget": memory,
        "parallelTrials": trials,
        "image": image,
        "scheduling": None if queue is None else {"queue": queue},
        "profileRef": None if profile is None else {"name": profile},
    }
    spec = {key: value for key, value in given.items() if value is not None}
    if what != "-" and not what.endswith(_FILES):
        if spec or overrides or name is not None or dry_run is not None:
            raise UsageError(f"{what} exists already: it cannot be changed", hint="give a file to start a new search")
        place = parse_target(what, default=BATCH_SEARCH)
        if place.kind is not BATCH_SEARCH:
            raise UsageError(f"{what} is no BatchSearch", hint="`osctl get bs` lists them")
        if wait:
            _wait(session, place)
        _show(session, fetch(session, place), output, apply_to=apply_to)
        return
    if apply_to is not None and not wait:
        raise UsageError("--apply-to without --wait", hint="the sizes of a new search are not known yet: add --wait")
    body, others = _manifest(what, spec, overrides or [], name=name)
    objects = [*others, body]
    refuse_mistakes(session, objects)
    if dry_run is not None:
        print_forecast(session, objects, [body], dry_run=dry_run, output=output)
        return
    made = [create(session, entry) for entry in objects]
    if not wait:
        for entry in made:
            print_created(session, entry, output)
        session.output.note(f"`osctl search {body['metadata']['name']}` shows what is found")
        return
    place = Target(BATCH_SEARCH, str(body["metadata"]["name"]))
    session.output.note(f"{place} created")
    _wait(session, place)
    _show(session, fetch(session, place), output, apply_to=apply_to)


def _wait(session: Session, place: Target) -> None:
    wait_for(session, place, parse_goal("complete"), seconds=_A_LONG_TIME)


def _bucket(text: str) -> Object:
    resolution, slash, frames = text.partition("/")
    if not (resolution and slash and frames.isascii() and frames.isdigit()):
        raise UsageError(f"--bucket {text!r} is no bucket", hint="give resolution and frames, such as 240p/51")
    return {"resolution": resolution, "frames": int(frames)}


def _manifest(file: str, spec: Object, overrides: list[str], *, name: str | None) -> tuple[Object, list[Object]]:
    """The search, and what comes with it in the file."""
    others: list[Object] = []
    if is_config(file):
        from opensora.config.load import dump_config, load_train_config  # slow to import

        config = {"inline": dump_config(load_train_config(file, [*overrides, *_UNUSED]))}
        own = f"{name_of(file)[: MAX_NAME - 9].rstrip('-')}-{secrets.token_hex(4)}"
        base: Object = {
            "apiVersion": API_VERSION, "kind": BATCH_SEARCH.name, "metadata": {"name": own}, "spec": {"config": config},
        }  # fmt: skip
    else:
        objects = read_manifests(file)
        searches = [body for body in objects if body["kind"] == BATCH_SEARCH.name]
        if len(searches) != 1:
            raise UsageError(f"{file} has {len(searches)} BatchSearches", hint="give a file with one")
        base = searches[0]
        others = [body for body in objects if body is not base]
        if overrides:
            config = base["spec"].get("config") or {}
            spec = {**spec, "config": {**config, "overrides": [*(config.get("overrides") or ()), *overrides]}}
    metadata = {**base["metadata"], **({"name": name} if name is not None else {})}
    return {**base, "metadata": metadata, "spec": {**base["spec"], **spec}}, others


# --------------------------------------------------------------------------------------------------------------- table


def _show(session: Session, body: Object, output: Format | None, *, apply_to: str | None) -> None:
    status = body.get("status") or {}
    results = status.get("results") or []
    chosen = output or Format(session.settings.output)
    if chosen in (Format.JSON, Format.YAML):
        keys = ("phase", "key", "table", "reused", "stepSeconds", "results")
        data = {"name": body["metadata"]["name"], **{key: status[key] for key in keys if key in status}}
        session.output.data(as_json(data) if chosen is Format.JSON else as_yaml(data))
    elif chosen is Format.NAME:
        session.output.data(str(Target(BATCH_SEARCH, str(body["metadata"]["name"]))))
    else:
        header = ("BUCKET", "BATCH", "MEMORY", "STEP", "EVIDENCE")
        session.output.data(as_table(header, [_row(result) for result in results]))
        _note(session, body)
    if apply_to is not None:
        _apply(session, body, apply_to)


def _note(session: Session, body: Object) -> None:
    status, name = body.get("status") or {}, body["metadata"]["name"]
    if not is_over(body):
        session.output.note(f"{name} is {phase_of(body) or 'new'}: `osctl search {name} --wait` waits for the rest")
    elif status.get("table"):
        found = "found by an earlier search, " if status.get("reused") else ""
        session.output.note(
            f"{found}kept in the ConfigMap {status['table']}; --apply-to FILE writes them into a config"
        )


def _row(result: Object) -> tuple[str, ...]:
    state = str(result.get("state"))
    batch = str(result.get("batch", "")) if state == "Found" else state.lower()
    peak = size_text(result["peakBytes"]) if result.get("peakBytes") else ""
    seconds = f"{result['seconds']} s" if result.get("seconds") else ""
    said = str(result.get("message") or "") if state == "Failed" else _evidence(str(result.get("evidence") or ""))
    return str(result.get("bucket")), batch, peak, seconds, said


def _evidence(text: str) -> str:
    """`4:3221225472:0.81 8:oom` for people. What a newer operator says otherwise stays as it is."""
    parts = []
    for word in text.split():
        size, *rest = word.split(":")
        if rest == [_OOM]:
            parts.append(f"{size} out of memory")
        elif len(rest) == 2 and rest[0].isdigit():
            parts.append(f"{size} took {size_text(int(rest[0]))} and {rest[1]} s")
        else:
            parts.append(word)
    return ", ".join(parts)


def _apply(session: Session, body: Object, path: str) -> None:
    """Write the sizes into a file, all or none."""
    name, results = body["metadata"]["name"], (body.get("status") or {}).get("results") or []
    unknown = [str(result["bucket"]) for result in results if result.get("state") != "Found"]
    if unknown or not results:
        raise OsctlError(
            f"{name} has no batch size for {', '.join(unknown) or 'any bucket'} yet",
            hint=f"`osctl search {name} --wait --apply-to {path}` waits for them",
            exit_code=ExitCode.CONFLICT,
        )
    too_large = [str(result["bucket"]) for result in results if not result.get("batch")]
    if too_large:
        raise OsctlError(
            f"not even one clip of {', '.join(too_large)} fits",
            hint="leave the bucket out, or train on larger accelerators",
            exit_code=ExitCode.CONFLICT,
        )
    sizes = {parse_bucket(str(result["bucket"])): int(result["batch"]) for result in results}
    if path == "-" or not Path(path).is_file():
        raise UsageError(f"there is no file {path}", hint="--apply-to changes a file that is there")
    changes = change_file(path, sizes)
    for change in changes:
        resolution, frames = change.bucket
        session.output.note(f"{path}: {resolution}/{frames}: {change.old} becomes {change.new}")
    if not changes:
        session.output.note(f"{path} has these sizes already")

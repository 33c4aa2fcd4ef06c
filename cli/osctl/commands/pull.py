"""`osctl pull`: from the run directory to this machine."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from opensora_operator.status import duration

from osctl.artifacts import What, find_artifacts, parse_step
from osctl.completing import complete_target
from osctl.downloads import Copy, Downloads, Item, UnsafeNameError, place
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.options import Format, OutputFormat
from osctl.output import as_json, as_table, as_yaml, printable, size_text
from osctl.progress import transfer_progress
from osctl.run_directory import RunDirectory, open_run_directory
from osctl.session import Session

_CONTROL_C = 130


class Trial(StrEnum):
    """Nothing is copied. There is no other way to try it."""

    CLIENT = "client"


def pull(
    session: Session,
    run: Annotated[
        str,
        typer.Argument(metavar="RUN|URI", help="Name of the run, or a run directory.", autocompletion=complete_target),
    ],
    what: Annotated[list[What] | None, typer.Option("--what", help="What; repeat it for more. [default: all]")] = None,
    step: Annotated[
        str | None,
        typer.Option(
            "--step", metavar="N|latest", help="Of checkpoint and samples. [default: newest, and all samples]"
        ),
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="DIR", help="Where to. [default: ./RUN]")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, max=64, help="Files at a time.")] = 4,
    dry_run: Annotated[Trial | None, typer.Option("--dry-run", help="Say what would be copied. [bare: client]")] = None,
    output: OutputFormat = None,
) -> ExitCode:
    """Copy checkpoints, samples, logs and metrics from the run directory.

    The copy has the layout of the run directory, so that it can be trained on, sampled and read like the original.
    Of the checkpoints the newest complete one is taken, or that of `--step`, and its digests are checked. What is here
    already is left; interrupted, the same command goes on where it was. Credentials of the store come from the usual
    AWS_* variables of this machine, and so does its endpoint, or else from the run.

    Examples: `osctl pull first`, `osctl pull first --what samples --what logs --to /tmp/first`, `osctl pull
    s3://bucket/runs/first --what checkpoints --step 2000`.
    """
    wanted, asked = parse_step(step), what or [What.ALL]
    directory = open_run_directory(session, run)
    target = Path(to if to is not None else directory.name)
    found = find_artifacts(directory.storage, asked, step=wanted)
    if directory.storage.is_local and target.resolve().is_relative_to(Path(directory.storage.uri).resolve()):
        raise UsageError(f"{target} is the run directory itself", hint="choose another folder with --to")
    items, refused = _safe(found, target)
    total = sum(item.info.size for item in items)
    if dry_run is not None:
        copies = [Copy(item, place(target, item.info.path), "copied") for item in items]
        _show(session, directory, target, copies, output, words=f"{size_text(total)} would be copied (dry run)")
    else:
        copies = _copy(session, directory, target, items, jobs=jobs, run=run, total=total, output=output)
    for error in refused:
        session.output.note(f"left out: {error.message}")
    return ExitCode.ERROR if refused else ExitCode.OK


def _safe(items: Sequence[Item], target: Path) -> tuple[list[Item], list[UnsafeNameError]]:
    """Items whose names are those of files in the target folder, and why the others are left out."""
    safe: list[Item] = []
    refused: list[UnsafeNameError] = []
    for item in items:
        try:
            place(target, item.info.path)
        except UnsafeNameError as error:
            if item.sha256 is not None:  # a checkpoint without one of its objects is none
                raise
            refused.append(error)
        else:
            safe.append(item)
    return safe, refused


def _copy(
    session: Session,
    directory: RunDirectory,
    target: Path,
    items: Sequence[Item],
    *,
    jobs: int,
    run: str,
    total: int,
    output: Format | None,
) -> list[Copy]:
    from opensora.errors import StorageUnavailableError  # of the core: a mistyped option is told before

    session.output.note(f"{len(items)} files, {size_text(total)}, from {directory.storage.uri} to {target}")
    started = time.monotonic()
    again = f"the same command goes on where it was: {_command_line()}"
    try:
        with transfer_progress(session.output, total) as on_bytes:
            copies = Downloads(directory.storage, target, jobs=jobs, on_bytes=on_bytes).run(items)
    except StorageUnavailableError as error:
        raise OsctlError(error.message, hint=f"when it is back, {again}") from error
    except KeyboardInterrupt:
        session.output.note(f"interrupted; {again}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_CONTROL_C)  # threads that wait for a store which is away would hold the process up
    moved = [copy for copy in copies if copy.state == "copied"]
    size, seconds = sum(copy.item.info.size for copy in moved), time.monotonic() - started
    here = f", {sum(copy.state == 'here' for copy in copies)} were here already" if len(moved) < len(copies) else ""
    speed = f", {size_text(size / seconds)}/s" if moved and seconds > 0 else ""
    words = f"copied {len(moved)} files, {size_text(size)}, in {duration(seconds)}{speed}{here}"
    _show(session, directory, target, copies, output, words=words)
    return copies


def _command_line() -> str:
    """As it was given, to be pasted."""
    return shlex.join(["osctl", *sys.argv[1:]])


def _show(
    session: Session,
    directory: RunDirectory,
    target: Path,
    copies: Sequence[Copy],
    output: Format | None,
    *,
    words: str,
) -> None:
    chosen = output or Format(session.settings.output)
    gone = [copy for copy in copies if copy.state == "gone"]
    if chosen in (Format.JSON, Format.YAML):
        data = {"from": directory.storage.uri, "to": str(target), "files": [_as_data(copy) for copy in copies]}
        session.output.data(as_json(data) if chosen is Format.JSON else as_yaml(data))
    elif chosen is Format.NAME:
        for copy in copies:
            if copy.state != "gone":
                session.output.data(printable(str(copy.path)))
    else:
        session.output.data(as_table(("WHAT", "FILES", "SIZE", "WHERE"), _rows(copies)))
    for copy in gone:
        session.output.note(f"left out: {printable(copy.item.info.path)} was removed from the store meanwhile")
    session.output.note(words)


def _rows(copies: Sequence[Copy]) -> list[tuple[str, str, str, str]]:
    """One line for each kind, with the folder that all of it is in."""
    rows = []
    for kind in dict.fromkeys(copy.item.kind for copy in copies):
        mine = [copy for copy in copies if copy.item.kind == kind and copy.state != "gone"]
        if mine:
            size = size_text(sum(copy.item.info.size for copy in mine))
            where = os.path.commonpath([str(copy.path.parent) for copy in mine])
            rows.append((kind, str(len(mine)), size, where))
    return rows


def _as_data(copy: Copy) -> dict[str, Any]:
    data = {
        "what": copy.item.kind,
        "path": copy.item.info.path,
        "file": str(copy.path),
        "bytes": copy.item.info.size,
        "state": copy.state,
    }
    return data | ({"sha256": copy.item.sha256} if copy.item.sha256 is not None else {})

"""`osctl init`: the files of a new run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.manifests import name_of
from osctl.scaffold import README_FILE, RUN_FILE, Scaffold
from osctl.session import Session

_BUCKET = "s3://my-bucket"
_DATA = f"{_BUCKET}/clips/clips.csv"


def init(
    session: Session,
    folder: Annotated[str, typer.Argument(metavar="[DIR]", help="Where to. [default: here]", show_default=False)] = ".",
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run. [default: the folder's]", show_default=False)
    ] = None,
    run_uri: Annotated[str | None, typer.Option("--run-uri", metavar="URI", help="Run directory.")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="URI", help="Catalogue of the clips.")] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=4096, help="Pods.")] = 1,
    image: Annotated[str | None, typer.Option("--image", help="Image of the trainer. [default: the profile's]")] = None,
) -> None:
    """Write the files of a new run.

    A run file with comments, the config that it trains, and a page with the next steps. On a terminal it asks for what
    no flag says; Enter takes what is offered. A file that is there is never replaced.

    Examples: `osctl init first`, `osctl init --name stage1 --run-uri s3://bucket/runs/stage1 --data
    s3://bucket/clips.csv`.
    """
    target = Path(folder)
    own = name or name_of(str(target.resolve()))
    if run_uri is None:
        default = (session.settings.run_uri or f"{_BUCKET}/runs/{{name}}").replace("{name}", own)
        run_uri = _ask("run directory", default)
    if data is None:
        data = _ask("catalogue of the clips", _DATA)
    scaffold = Scaffold(
        name=own, run_uri=run_uri, data=data, nodes=nodes, image=image if image is not None else session.settings.image
    )
    files = {target / name: text for name, text in scaffold.files().items()}
    _refuse_mistakes(files[target / RUN_FILE])
    _write(target, files)
    for path in files:
        session.output.data(str(path))
    session.output.note(f"next: {target / README_FILE} says how to go on")


def _ask(what: str, default: str) -> str:
    if not sys.stdin.isatty():
        return default
    sys.stderr.write(f"{what} [{default}]: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip() or default


def _refuse_mistakes(text: str) -> None:
    """What flags say may be wrong. Raises UsageError before anything is written."""
    import yaml  # slow to import, as the next is

    from osctl.checks import check

    problems = check(yaml.safe_load(text)).problems
    if problems:
        raise UsageError(str(problems[0]), hint="`osctl init --help` lists the options")


def _write(target: Path, files: dict[Path, str]) -> None:
    """All of them, or none."""
    there = [str(path) for path in files if path.exists() or path.is_symlink()]
    if there:
        raise OsctlError(
            f"{', '.join(there)} exists already", hint="choose another folder", exit_code=ExitCode.CONFLICT
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise OsctlError(
            f"{error.filename or target} cannot be written: {error.strerror}", hint="choose another folder"
        ) from error

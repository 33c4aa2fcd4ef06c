"""`osctl samples`: what a run's clips look like."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from opensora_operator.api import SAMPLE_JOB

from osctl.artifacts import parse_step
from osctl.clips import Clip, Round, captions, find_round, read_folder
from osctl.completing import complete_target
from osctl.downloads import Downloads, Item
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.gallery import write_page
from osctl.options import Format, OutputFormat
from osctl.output import as_json, as_table, as_yaml, printable, terminal_width
from osctl.progress import transfer_progress
from osctl.run_directory import is_address, open_run_directory, open_storage
from osctl.session import Session
from osctl.targets import fetch, parse_target

_JOBS = 8


class Drawing(StrEnum):
    """How a terminal shows pictures."""

    AUTO = "auto"
    KITTY = "kitty"
    ITERM2 = "iterm2"
    SIXEL = "sixel"
    BLOCKS = "blocks"
    NONE = "none"


def samples(
    session: Session,
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|sj/NAME|URI",
            help="A run, a sample job, or the directory of either.",
            autocompletion=complete_target,
        ),
    ],
    step: Annotated[
        str | None, typer.Option("--step", metavar="N|latest", help="Of the training. [default: latest]")
    ] = None,
    drawing: Annotated[Drawing, typer.Option("--as", help="How to draw.")] = Drawing.AUTO,
    page: Annotated[
        str | None, typer.Option("--html", metavar="DIR", help="Write a page with the clips into this folder.")
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Write the page and open it in a browser. [folder: ./RUN-samples]")
    ] = False,
    output: OutputFormat = None,
) -> ExitCode:
    """Show the samples of a run or a sample job.

    On a terminal it draws the contact sheet, by the best way that the terminal is known to have; `--as` names another.
    Elsewhere it prints the addresses of sheet and clips. `-o` prints the list instead: prompts, seeds and sizes.

    Examples: `osctl samples first`, `osctl samples first --step 2000 -o json`, `osctl samples sj/nightly --open`.
    """
    name, found = _find(session, run, step)
    if page is not None or open_page:
        _write_page(session, name, found, page=page, opens=open_page)
    elif output is not None:
        _list(session, found, output)
    elif not _draw(session, found, drawing):
        for uri in _uris(found):
            session.output.data(printable(uri))
    return ExitCode.OK


def _find(session: Session, word: str, step: str | None) -> tuple[str, Round]:
    """What it is called, and its clips."""
    wanted = parse_step(step)
    if is_address(word):
        directory = open_run_directory(session, word)
        if directory.storage.list_names("samples"):
            return directory.name, find_round(directory.storage, step=wanted)
        found = read_folder(directory.storage)
    else:
        target = parse_target(word)
        if target.kind is not SAMPLE_JOB:
            directory = open_run_directory(session, word)
            return directory.name, find_round(directory.storage, step=wanted)
        spec = fetch(session, target)["spec"]
        directory = None
        found = read_folder(
            open_storage(spec["outputUri"], spec, patience_seconds=session.settings.store_patience_seconds)
        )
    if wanted is not None:
        raise UsageError(f"--step with {word}", hint="a sample job samples one checkpoint; leave --step out")
    return (directory.name if directory is not None else parse_target(word).name), found


def _uris(found: Round) -> list[str]:
    sheet = [found.folder.uri_of(found.sheet.path)] if found.sheet is not None else []
    return sheet + [clip.uri for clip in found.clips]


# ---------------------------------------------------------------------------------------------------------------- list


def _list(session: Session, found: Round, output: Format) -> None:
    if output in (Format.JSON, Format.YAML):
        sheet = found.folder.uri_of(found.sheet.path) if found.sheet is not None else None
        data = {"step": found.step, "sheet": sheet, "clips": [clip.as_data() for clip in found.clips]}
        session.output.data(as_json(data) if output is Format.JSON else as_yaml(data))
    elif output is Format.NAME:
        for clip in found.clips:
            session.output.data(printable(clip.uri))
    else:
        header = ("CLIP", "SIZE", "FRAMES", "SEED", *(("ADDRESS",) if output is Format.WIDE else ()), "PROMPT")
        session.output.data(as_table(header, [_row(clip, is_wide=output is Format.WIDE) for clip in found.clips]))


def _row(clip: Clip, *, is_wide: bool) -> tuple[str, ...]:
    size = f"{clip.width}x{clip.height}" if clip.width and clip.height else ""
    facts: list[Any] = [clip.num_frames, clip.seed, *((clip.uri,) if is_wide else ()), clip.prompt]
    return clip.info.path, size, *("" if fact is None else str(fact) for fact in facts)


# ------------------------------------------------------------------------------------------------------------- drawing


def _draw(session: Session, found: Round, drawing: Drawing) -> bool:
    """Whether the sheet was drawn: not where there is none, or no terminal that shows pictures."""
    from opensora.terminal_pictures import find_way

    is_asked = drawing is not Drawing.AUTO
    if drawing is Drawing.NONE or not (is_asked or sys.stdout.isatty()):
        return False
    way = drawing.value if is_asked else find_way(os.environ)
    if way == "blocks" and not is_asked and not session.output.has_color(sys.stdout):
        return False
    if way == "none":
        session.output.note("this terminal is not known to show pictures; --as names a way, --open uses a browser")
        return False
    if found.sheet is None:
        session.output.note(f"{found.folder.uri} has no contact sheet yet")
        return False
    picture = found.folder.read(found.sheet.path)
    try:
        _write_picture(session, found, picture, way)
    except ImportError as error:
        message = f"drawing with {way} needs Pillow, which is not installed"
        if is_asked:
            raise OsctlError(message, hint="pip install pillow") from error
        session.output.note(f"{message}: pip install pillow")
        return False
    except OSError as error:
        uri = found.folder.uri_of(found.sheet.path)
        raise OsctlError(f"{uri} is no picture: {error}", hint="--as none lists the samples instead") from error
    step = f"step {found.step}, " if found.step is not None else ""
    session.output.note(f"{step}{len(found.clips)} clips in {found.folder.uri}; --open shows them in a browser")
    return True


def _write_picture(session: Session, found: Round, picture: bytes, way: str) -> None:
    if way == "blocks":
        _write_blocks(session, found, picture)
        return
    from opensora import terminal_pictures as pictures

    columns = terminal_width()
    pixels = pictures.width_in_pixels(columns, terminal_pixels=_terminal_pixels())
    fits = _png_width(picture) <= pixels
    if way == "kitty":
        session.output.data(pictures.kitty(picture, columns=None if fits else columns))
    elif way == "iterm2":
        session.output.data(pictures.iterm2(picture, columns=None if fits else columns))
    else:
        session.output.data(pictures.sixel(picture, max_width=pixels))


def _write_blocks(session: Session, found: Round, picture: bytes) -> None:
    """Captions as text, and below each the frames of its clip: those of the sheet would be too small to read."""
    import io

    import numpy as np
    from PIL import Image
    from rich.console import Console

    from opensora.sheet import SheetRow, TerminalSheet, cut_rows

    sheet = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    rows = cut_rows(sheet)
    names = [] if rows is None else [printable(name) for name in captions(found.clips)]
    names += [""] * len(rows or [sheet])  # for a sheet of another version
    shown = [SheetRow(name, row[None]) for name, row in zip(names, rows or [sheet], strict=False)]
    width = terminal_width()
    colors: Literal["auto", "truecolor"] = "auto" if sys.stdout.isatty() else "truecolor"
    console = Console(file=sys.stdout, width=width, force_terminal=True, color_system=colors)
    console.print(TerminalSheet(shown, frames_per_clip=1, max_width=width))


def _png_width(picture: bytes) -> int:
    """Of the header that every PNG begins with."""
    return int.from_bytes(picture[16:20], "big")


def _terminal_pixels() -> int:
    """Width of the terminal in pixels; 0 where it does not say."""
    try:
        import fcntl  # not on Windows
        import struct
        import termios

        _, _, width, _ = struct.unpack("HHHH", fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8)))
    except (ImportError, OSError, ValueError):
        return 0
    return int(width)


# ---------------------------------------------------------------------------------------------------------------- page


def _write_page(session: Session, name: str, found: Round, *, page: str | None, opens: bool) -> None:
    folder = Path(page if page is not None else f"{name}-samples")
    copies = _copy(session, folder, found.folder, found.clips)
    step = f", step {found.step}" if found.step is not None else ""
    path = write_page(folder, title=f"{name}{step}", clips=found.clips, copies=copies)
    session.output.data(str(path))
    if not opens:
        return
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        raise OsctlError("no browser could be started", hint=f"open {path} yourself")


def _copy(session: Session, folder: Path, source: Any, clips: Sequence[Clip]) -> Any:
    items = [Item("samples", clip.info) for clip in clips]
    total = sum(clip.info.size for clip in clips)
    with transfer_progress(session.output, total) as on_bytes:
        return Downloads(source, folder, jobs=_JOBS, on_bytes=on_bytes).run(items)

"""Contact sheets: a few frames of every clip beside its caption, as a picture and as text for a terminal.

What samples makes them, and the command line shows them; so this module needs no torch.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

Frames = NDArray[np.uint8]
"""[T, H, W, 3]"""

FRAMES_PER_CLIP = 5
CELL_HEIGHT = 96
"""Pixels of a frame."""
_GAP = 4
_LABEL_HEIGHT = 16
_BACKGROUND = (24, 24, 24)
_INK = (220, 220, 220)


@dataclass(frozen=True)
class SheetRow:
    """A clip of the sheet."""

    caption: str
    frames: Frames
    """What is shown of it, [n, H, W, 3]."""


def pick_frames(num_frames: int, count: int = FRAMES_PER_CLIP) -> list[int]:
    """Numbers of up to `count` frames, evenly spread from the first to the last."""
    if num_frames <= count:
        return list(range(num_frames))
    return [round(i * (num_frames - 1) / (count - 1)) for i in range(count)]


def sheet_row(caption: str, frames: Frames) -> SheetRow:
    """The row of a whole clip."""
    return SheetRow(caption, frames[pick_frames(len(frames))])


def contact_sheet(rows: Sequence[SheetRow], *, cell_height: int = CELL_HEIGHT) -> NDArray[np.uint8]:
    """A picture [H, W, 3] with a row per clip: its caption, its frames below."""
    cells = [[_resized(frame, height=cell_height) for frame in row.frames] for row in rows]
    width = max(sum(cell.width + _GAP for cell in line) for line in cells) + _GAP
    row_height = _LABEL_HEIGHT + cell_height + _GAP
    sheet = Image.new("RGB", (width, row_height * len(rows) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, (row, line) in enumerate(zip(rows, cells, strict=True)):
        top, left = _GAP + i * row_height, _GAP
        draw.text((left, top), _fitted(row.caption, draw, font, width - 2 * _GAP), fill=_INK, font=font)
        for cell in line:
            sheet.paste(cell, (left, top + _LABEL_HEIGHT))
            left += cell.width + _GAP
    return np.asarray(sheet)


def cut_rows(sheet: NDArray[np.uint8]) -> list[NDArray[np.uint8]] | None:
    """The frames of each clip, side by side, cut out of a contact sheet; None where it was laid out otherwise."""
    row_height = _LABEL_HEIGHT + CELL_HEIGHT + _GAP
    count, rest = divmod(sheet.shape[0] - _GAP, row_height)
    if rest or not count:
        return None
    tops = [_GAP + i * row_height + _LABEL_HEIGHT for i in range(count)]
    return [sheet[top : top + CELL_HEIGHT, _GAP:-_GAP] for top in tops]


class TerminalSheet:
    """A contact sheet that Rich can print: two pixels per character, the upper half block in one colour on another."""

    def __init__(self, rows: Sequence[SheetRow], *, frames_per_clip: int = 3, max_width: int = 120) -> None:
        self.rows = rows
        self.frames_per_clip = frames_per_clip
        self.max_width = max_width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, self.max_width)
        for row in self.rows:
            yield Segment(_shortened(row.caption, width))
            yield Segment.line()
            frames = row.frames[pick_frames(len(row.frames), self.frames_per_clip)]
            cell = max((width + 1) // self.frames_per_clip - 1, 1)
            yield from _half_blocks([_to_terminal(frame, width=cell) for frame in frames])
            yield Segment.line()


def _half_blocks(frames: Sequence[NDArray[np.uint8]]) -> Iterator[Segment]:
    for top in range(0, frames[0].shape[0], 2):
        for i, frame in enumerate(frames):
            if i > 0:
                yield Segment(" ")
            for upper, lower in zip(frame[top], frame[top + 1], strict=True):
                yield Segment(
                    "▀", Style(color=Color.from_rgb(*upper.tolist()), bgcolor=Color.from_rgb(*lower.tolist()))
                )
        yield Segment.line()


def _to_terminal(frame: NDArray[np.uint8], *, width: int) -> NDArray[np.uint8]:
    """Scaled to `width` characters; characters are twice as high as wide, so that half of one is square."""
    height = max(round(width * frame.shape[0] / frame.shape[1] / 2), 1) * 2
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))


def _resized(frame: NDArray[np.uint8], *, height: int) -> Image.Image:
    image = Image.fromarray(frame)
    width = max(round(image.width * height / image.height), 1)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _fitted(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= width:
        return text
    fitting = bisect(range(len(text)), float(width), key=lambda n: draw.textlength(text[:n] + "…", font=font))
    return text[: max(fitting - 1, 0)] + "…"


def _shortened(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"

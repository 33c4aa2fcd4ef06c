"""Pictures on a terminal, by what the terminal can show: kitty's protocol, iTerm2's, sixels, or coloured half blocks.

A terminal is known by its environment; it is never asked, since its answer would be taken for something that was typed.
Half blocks are `opensora.sheet.TerminalSheet`'s.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Way = Literal["kitty", "iterm2", "sixel", "blocks", "none"]
_KITTY_CHUNK = 4096
"""Longest piece of data in one command of kitty's protocol."""
_SIXEL_TERMS = ("foot", "mlterm", "contour", "yaft")
_SIXEL_COLOURS = 256
_COLUMN_PIXELS = 8
"""Width of a character where the terminal does not say."""


def find_way(environment: Mapping[str, str]) -> Way:
    """How the terminal of this environment shows pictures."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    has_colours = "256color" in term or environment.get("COLORTERM", "") in ("truecolor", "24bit")
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):  # they pass no pictures on
        return "blocks" if has_colours else "none"
    if environment.get("KITTY_WINDOW_ID") or "kitty" in term or "ghostty" in f"{term} {program}":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    if term.startswith(_SIXEL_TERMS) or "sixel" in term:
        return "sixel"
    return "blocks" if has_colours else "none"


def kitty(png: bytes, *, columns: int | None = None) -> str:
    """A PNG in kitty's protocol; scaled to `columns` characters where given. The terminal is told not to answer."""
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    keys = "a=T,f=100,q=2" + (f",c={columns}" if columns is not None else "")
    commands = []
    for number, chunk in enumerate(chunks):
        more = int(number < len(chunks) - 1)
        head = f"{keys},m={more}" if number == 0 else f"m={more}"
        commands.append(f"\x1b_G{head};{chunk}\x1b\\")
    return "".join(commands)


def iterm2(picture: bytes, *, columns: int | None = None) -> str:
    """A picture file in iTerm2's protocol; scaled to `columns` characters where given."""
    width = "auto" if columns is None else str(columns)
    data = base64.b64encode(picture).decode()
    return f"\x1b]1337;File=inline=1;size={len(picture)};width={width};preserveAspectRatio=1:{data}\x07"


def sixel(picture: bytes, *, max_width: int) -> str:
    """A picture file as sixels, scaled down to at most `max_width` pixels. Needs Pillow."""
    import numpy as np
    from PIL import Image as images  # noqa: N813  (of an extra: only this way and half blocks need it)

    image = _fitted(images.open(io.BytesIO(picture)).convert("RGB"), max_width)
    reduced = image.quantize(_SIXEL_COLOURS)
    palette = reduced.getpalette() or []
    pixels = np.asarray(reduced)
    height, width = pixels.shape
    parts = [f'\x1bPq"1;1;{width};{height}']
    for number in range(len(palette) // 3):
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * number : 3 * number + 3])
        parts.append(f"#{number};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        band = pixels[top : top + 6]
        bits = 1 << np.arange(band.shape[0])
        lines = []
        for colour in np.unique(band):
            line = ((band == colour) * bits[:, None]).sum(0)
            lines.append(f"#{colour}" + "".join(_runs(line.tolist())))
        parts.append("$".join(lines) + "-")
    return "".join(parts) + "\x1b\\"


def width_in_pixels(columns: int, *, terminal_pixels: int = 0) -> int:
    """Of a terminal, as far as it says."""
    return terminal_pixels or columns * _COLUMN_PIXELS


def _fitted(image: Image, max_width: int) -> Image:
    if image.width <= max_width:
        return image
    return image.resize((max_width, max(1, round(image.height * max_width / image.width))))


def _runs(line: list[int]) -> Iterator[str]:
    """Columns of sixels, equal ones in a row counted."""
    start = 0
    for end in range(1, len(line) + 1):
        if end == len(line) or line[end] != line[start]:
            count, char = end - start, chr(63 + line[start])
            yield f"!{count}{char}" if count > 3 else char * count
            start = end

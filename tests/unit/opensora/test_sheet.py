"""Contact sheets show the right frames, and fit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from opensora.sheet import SheetRow, TerminalSheet, contact_sheet, pick_frames, sheet_row

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def clip(*colours: tuple[int, int, int], height: int = 32, width: int = 48) -> np.ndarray:
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in colours])


@pytest.mark.parametrize(
    ("num_frames", "expected"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (17, [0, 4, 8, 12, 16])]
)
def test_frames_are_spread_from_first_to_last(num_frames: int, expected: list[int]) -> None:
    assert pick_frames(num_frames) == expected


def test_a_row_per_clip_and_a_cell_per_frame() -> None:
    rows = [sheet_row("one", clip(RED, GREEN)), sheet_row("two", clip(BLUE))]
    sheet = contact_sheet(rows, cell_height=32)
    assert sheet.dtype == np.uint8
    colours = {colour: np.argwhere((sheet == colour).all(-1)) for colour in (RED, GREEN, BLUE)}
    assert all(len(places) == 32 * 48 for places in colours.values())
    assert colours[RED][:, 1].max() < colours[GREEN][:, 1].min()
    assert colours[RED][:, 0].max() < colours[BLUE][:, 0].min()


def test_captions_of_any_length_and_script_keep_the_sheet_in_shape() -> None:
    short = contact_sheet([sheet_row("a", clip(RED))])
    long = contact_sheet([sheet_row("word " * 500 + "一只猫\n", clip(RED))])
    assert short.shape == long.shape


def test_clips_of_different_sizes_share_a_sheet() -> None:
    rows = [sheet_row("wide", clip(RED, height=18, width=320)), sheet_row("tall", clip(BLUE, height=320, width=18))]
    assert contact_sheet(rows).shape[1] > 96 * 320 / 18


def test_the_terminal_shows_two_pixels_per_character() -> None:
    frame = np.zeros((1, 2, 4, 3), np.uint8)
    frame[0, 0] = RED
    frame[0, 1] = BLUE
    console = Console(file=io.StringIO(), width=4, color_system="truecolor", force_terminal=True)
    console.print(TerminalSheet([SheetRow("a caption", frame)], frames_per_clip=1))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "38;2;255;0;0;48;2;0;0;255m▀" in text
    assert text.count("▀") == 4
    assert text.startswith("a c…\n")


@pytest.mark.parametrize("width", [10, 79, 200])
def test_the_terminal_sheet_fits_the_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(TerminalSheet([sheet_row("x" * 300, clip(RED, GREEN, BLUE, RED))]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert lines[1].count("▀") >= width // 2

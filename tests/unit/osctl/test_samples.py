"""`osctl samples`: which clips there are, how a terminal shows them, and the page for a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_api import FakeApi
from PIL import Image

from opensora.sheet import contact_sheet, sheet_row
from opensora.storage import Storage
from opensora.terminal_pictures import find_way, iterm2, kitty, sixel

RED, GREEN = (200, 30, 30), (30, 200, 30)
CONFIG = b"samples: {prompts: [a red <wave>, 'a green hill'], seed: 7, num_frames: 9, image_size: [48, 64], fps: 8}\n"


def _png(picture: Any) -> bytes:
    target = io.BytesIO()
    Image.fromarray(picture).save(target, format="PNG")
    return target.getvalue()


def _sheet() -> bytes:
    rows = [sheet_row(name, np.full((9, 48, 64, 3), colour, np.uint8)) for name, colour in (("a", RED), ("b", GREEN))]
    return _png(contact_sheet(rows))


@pytest.fixture
def run(home: Path) -> Storage:
    """Two rounds, and a third that is not finished."""
    run = Storage(str(home / "run"))
    run.write("config.yaml", CONFIG)
    for step, names in ((100, ("00", "01")), (200, ("00", "01")), (300, ("00",))):
        for name in names:
            run.write(f"samples/step-{step:08d}/{name}.mp4", f"clip {name} of {step}".encode())
        if step < 300:
            run.write(f"samples/step-{step:08d}/sheet.png", _sheet())
    return run


@pytest.fixture
def job(home: Path) -> Storage:
    """What a sampling job leaves behind."""
    folder = Storage(str(home / "clips"))
    for number in (0, 1):
        record = {"prompt": f"prompt {number}\x1b[2J", "seed": 5, "index": number, "draw": 0, "num_frames": 17,
                  "image_size": [24, 32], "save_fps": 8}  # fmt: skip
        folder.write(f"sample_{number:04d}.json", json.dumps(record).encode())
        folder.write(f"sample_{number:04d}.mp4", b"clip")
    folder.write("sheet.png", _sheet())
    folder.write("index/0000-of-0001.json", b"{}")
    return folder


def test_without_a_terminal_it_prints_addresses(osctl: Any, run: Storage) -> None:
    folder = f"{run.uri}/samples/step-00000200"
    assert osctl("samples", "./run") == (0, f"{folder}/sheet.png\n{folder}/00.mp4\n{folder}/01.mp4\n", "")


def test_the_newest_finished_round_unless_a_step_is_given(osctl: Any, run: Storage) -> None:
    assert json.loads(osctl("samples", "./run", "-o", "json").out)["step"] == 200
    assert json.loads(osctl("samples", "./run", "--step", "100", "-o", "json").out)["step"] == 100
    unfinished = json.loads(osctl("samples", "./run", "--step", "300", "-o", "json").out)
    assert (unfinished["sheet"], len(unfinished["clips"])) == (None, 1)
    code, _, err = osctl("samples", "./run", "--step", "7")
    assert (code, err.splitlines()[-1]) == (3, "hint: there are samples of steps 100, 200, 300")


def test_the_list_has_prompts_seeds_and_sizes(osctl: Any, run: Storage) -> None:
    clip = json.loads(osctl("samples", "./run", "-o", "json").out)["clips"][0]
    assert clip == {
        "uri": f"{run.uri}/samples/step-00000200/00.mp4",
        "bytes": 14,
        "prompt": "a red <wave>",
        "seed": 7,
        "numFrames": 9,
        "height": 48,
        "width": 64,
        "fps": 8,
    }
    assert osctl("samples", "./run", "-o", "table").out == (
        "CLIP     SIZE    FRAMES   SEED   PROMPT\n"
        "00.mp4   64x48   9        7      a red <wave>\n"
        "01.mp4   64x48   9        7      a green hill\n"
    )


def test_a_sample_jobs_clips_by_its_name(api: FakeApi, osctl: Any, job: Storage) -> None:
    path = "/apis/opensora.dev/v1alpha1/namespaces/team/samplejobs/nightly"
    api.on("GET", path, {"metadata": {"name": "nightly"}, "spec": {"outputUri": job.uri}})
    found = json.loads(osctl("samples", "sj/nightly", "-o", "json").out)
    assert [clip["prompt"] for clip in found["clips"]] == ["prompt 0\x1b[2J", "prompt 1\x1b[2J"]
    assert "\x1b" not in osctl("samples", "sj/nightly", "-o", "table").out
    assert osctl("samples", "sj/nightly", "--step", "5").code == 2
    assert osctl("samples", "./clips", "-o", "name").out.splitlines() == [
        f"{job.uri}/sample_0000.mp4",
        f"{job.uri}/sample_0001.mp4",
    ]


def test_a_run_without_samples_says_so(osctl: Any, home: Path) -> None:
    Storage(str(home / "bare")).write("config.yaml", b"{}")
    code, _, err = osctl("samples", "./bare")
    assert code == 3
    assert "has no clips" in err


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("width", [80, 120, 200])
def test_half_blocks_are_as_wide_as_the_terminal(
    osctl: Any, run: Storage, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = osctl("samples", "./run", "--as", "blocks").out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    assert plain[0] == "a red <wave>"
    assert "a green hill" in plain
    assert {len(line) for line in plain if "▀" in line} == {width}
    assert "38;2;200;30;30" in out


def _pixels_of_sixels(text: str) -> np.ndarray:
    """What a terminal makes of them: an independent, slow reader."""
    found = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.DOTALL)
    assert found is not None
    width, height, body = int(found[1]), int(found[2]), found[3]
    pixels = np.zeros((height + 6, width, 3), np.uint8)
    palette: dict[int, tuple[int, ...]] = {}
    x = top = colour = 0
    for match in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)(.)|([$-])|([?-~])", body):
        if match[1]:
            palette[int(match[1])] = tuple(round(int(match[i]) * 255 / 100) for i in (2, 3, 4))
        elif match[5]:
            colour = int(match[5])
        elif match[8]:
            x, top = 0, top + (6 if match[8] == "-" else 0)
        else:
            count, char = (int(match[6]), match[7]) if match[6] else (1, match[9])
            for row in range(6):
                if (ord(char) - 63) >> row & 1:
                    pixels[top + row, x : x + count] = palette[colour]
            x += count
    return pixels[:height]


def test_sixels_show_the_picture() -> None:
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:, :15], picture[7:, 15:] = RED, GREEN
    shown = _pixels_of_sixels(sixel(_png(picture), max_width=100))
    assert np.abs(shown.astype(int) - picture).max() <= 3, "colours are per cent"
    assert _pixels_of_sixels(sixel(_png(picture), max_width=10)).shape == (7, 10, 3)


def test_kitty_gets_the_file_in_pieces() -> None:
    png = bytes(range(256)) * 40
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(png, columns=80))
    assert commands[0][0] == "a=T,f=100,q=2,c=80,m=1"
    assert [keys for keys, _ in commands[1:]] == ["m=1"] * (len(commands) - 2) + ["m=0"]
    assert all(len(data) <= 4096 for _, data in commands)
    assert base64.b64decode("".join(data for _, data in commands)) == png


def test_iterm2_gets_the_file_whole() -> None:
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=3;width=auto;preserveAspectRatio=1:(.*)\x07", iterm2(b"png"))
    assert found is not None
    assert base64.b64decode(found[1]) == b"png"


@pytest.mark.parametrize(
    ("environment", "way"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-256color", "TMUX": "x", "TERM_PROGRAM": "iTerm.app"}, "blocks"),
        ({"TERM": "dumb"}, "none"),
        ({"TERM": "vt100"}, "none"),
        ({}, "none"),
    ],
    ids=str,
)
def test_a_terminal_is_known_by_its_environment(environment: dict[str, str], way: str) -> None:
    assert find_way(environment) == way


def test_a_sheet_that_is_no_picture_is_told(osctl: Any, run: Storage) -> None:
    run.write("samples/step-00000200/sheet.png", b"no picture")
    code, _, err = osctl("samples", "./run", "--as", "blocks")
    assert code == 1
    assert "sheet.png is no picture" in err


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_the_clips_beside_it_and_escapes_captions(osctl: Any, run: Storage, home: Path) -> None:
    code, out, _ = osctl("samples", "./run", "--html", "page")
    assert (code, out) == (0, "page/index.html\n")
    text = (home / "page" / "index.html").read_text()
    assert "a red &lt;wave&gt;" in text
    assert "<wave>" not in text
    sources = re.findall(r'src="([^"]*)"', text)
    assert sources == ["00.mp4", "01.mp4"]
    assert (home / "page" / "00.mp4").read_bytes() == b"clip 00 of 200"
    assert "http" not in text, "nothing is loaded from elsewhere"


def test_open_starts_a_browser(osctl: Any, run: Storage, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda uri: opened.append(uri) or True)
    assert osctl("samples", "./run", "--open").code == 0
    assert opened == [(home / "run-samples" / "index.html").as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda uri: False)
    code, out, err = osctl("samples", "./run", "--open")
    assert (code, out) == (1, "run-samples/index.html\n")
    assert "no browser could be started" in err

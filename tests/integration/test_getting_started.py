"""docs/getting-started.md: its commands, pasted in order, do what the page says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/getting-started.md"
FEWER = 50
"""The page's numbers of steps are divided by this."""


@dataclass(frozen=True)
class Block:
    """A fenced bash block of the page."""

    line: int
    text: str
    marker: str
    """What the comment above it says to do with it in a test; empty when it is run as it is."""

    def shortened(self, *, keep_length: bool = False) -> str:
        """The commands, with fewer steps and sampling steps."""
        length = r"(?<![a-z_])steps" if not keep_length else r"(?!)"
        text = re.sub(rf"((?:{length}|\bevery_steps)[=:] ?)(\d+)", lambda m: f"{m[1]}{int(m[2]) // FEWER}", self.text)
        return re.sub(r"(num[-_]sampling[-_]steps:? )\d+", r"\g<1>2", text)


def blocks_of(page: str) -> list[Block]:
    """All bash blocks in order."""
    pattern = re.compile(r"(?:<!-- test: (?P<marker>.*?) -->\n)?```bash\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
    return [
        Block(page[: found.start("text")].count("\n") + 1, found["text"], found["marker"] or "")
        for found in pattern.finditer(page)
    ]


def start(text: str, folder: Path) -> subprocess.Popen[str]:
    # In a folder with the parts of the clone that the commands name.
    # Threads that wait must not take the cores from those that work, where other tests run besides.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # Where the tests themselves run in the background, Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(block: Block, folder: Path) -> str:
    process = start(block.shortened(), folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, f"{PAGE.name}, line {block.line}:\n{block.text}\n{output[-3000:]}"
    return output


def interrupt_after_the_first_checkpoint(block: Block, folder: Path) -> None:
    """What Ctrl-C does to it: SIGINT, and the run ends as the page says."""
    process = start("exec " + block.shortened(keep_length=True), folder)
    deadline = time.monotonic() + 200
    while not list(folder.glob("runs/first/checkpoints/*/*/manifest.json")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 75, output[-3000:]
    assert "the same command continues from there" in output


def test_the_commands_of_the_page_work_in_order(
    object_store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.create_bucket("videos")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    output: dict[int, str] = {}
    markers = []
    for number, block in enumerate(blocks_of(PAGE.read_text(encoding="utf-8"))):
        if block.marker == "Ctrl-C after the first checkpoint":
            interrupt_after_the_first_checkpoint(block, tmp_path)
        elif not block.marker.startswith("skip"):
            output[number] = run(block, tmp_path)
        markers.append(block.marker.partition(",")[0])
    assert markers.count("skip") == 3
    assert markers.count("Ctrl-C after the first checkpoint") == 1
    assert "attempt 2 continues from the checkpoint of step" in "".join(output.values())

    progress = json.loads((tmp_path / "runs/first/progress.json").read_text())
    assert (progress["phase"], progress["step"], progress["attempt"]) == ("done", 600 // FEWER, 3)
    assert len(list((tmp_path / "runs/first-samples").glob("*.mp4"))) == 7
    assert (tmp_path / "runs/first-samples/sheet.png").is_file()
    assert list((tmp_path / "runs/first/tensorboard").glob("events*"))
    assert list((tmp_path / "runs/second/samples").glob("*/*.mp4"))
    assert json.loads(Storage("s3://videos/runs/third").read("progress.json"))["phase"] == "done"


def test_every_block_with_an_unknown_marker_would_be_noticed() -> None:
    known = {"", "skip", "Ctrl-C after the first checkpoint"}
    assert {block.marker.partition(",")[0] for block in blocks_of(PAGE.read_text(encoding="utf-8"))} <= known

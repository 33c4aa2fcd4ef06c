"""`osctl sample --local`: clips of a run on this machine, which `osctl samples` then shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_sample

from opensora.storage import Storage

pytestmark = pytest.mark.integration


def _osctl(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "osctl", *words], cwd=folder, env={**os.environ, "HOME": str(folder)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def test_clips_of_a_pulled_run_are_sampled_and_shown_here(tmp_path: Path) -> None:
    test_sample.make_run(Storage(str(tmp_path / "run")))
    _osctl(tmp_path, "pull", "./run", "--step", "1", "--to", "pulled")
    words = ("--checkpoint", "./pulled", "--step", "1", "--prompt", "a cat", "--prompt", "a dog", "--seed", "3")
    out = _osctl(tmp_path, "sample", *words, "--output-uri", "clips", "--local")
    assert out == f"{tmp_path / 'clips'}\n"
    record = json.loads((tmp_path / "clips" / "sample_0000.json").read_text())
    assert record["weights"].endswith("step-00000001/attempt-1 ema")
    shown = json.loads(_osctl(tmp_path, "samples", "./clips", "-o", "json"))
    assert [(clip["prompt"], clip["seed"]) for clip in shown["clips"]] == [("a cat", 3), ("a dog", 3)]
    assert "▀" in _osctl(tmp_path, "samples", "./clips", "--as", "blocks")


def test_a_checkpoint_that_is_not_there_ends_it(tmp_path: Path) -> None:
    err = _osctl(tmp_path, "sample", "--checkpoint", "./nothing", "--prompt", "a cat", "--local", code=6)
    assert "is not a run directory" in err
    assert "Traceback" not in err

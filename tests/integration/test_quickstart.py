from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def run_quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opensora.quickstart", "--folder", str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


def test_a_model_trained_for_one_step_fails_the_check_and_a_second_call_does_not_train_again(tmp_path: Path) -> None:
    first = run_quickstart(tmp_path, "--steps", "1")
    assert first.returncode == 1, first.stdout + first.stderr
    found = re.search(r"(\d) of 7 sampled clips", first.stdout)
    assert found is not None
    assert int(found.group(1)) < 7
    assert "7 of 7 clips are nearest to themselves" in first.stdout
    assert (tmp_path / "run-1-steps/samples/sheet.png").is_file()
    assert list((tmp_path / "run-1-steps/tensorboard").glob("events*"))

    second = run_quickstart(tmp_path, "--steps", "1")
    assert second.returncode == 1
    assert "is finished" in second.stdout
    assert "0 clips made, 7 were there already" in second.stdout + second.stderr

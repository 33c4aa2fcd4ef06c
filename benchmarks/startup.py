"""Measures how long a run takes to start: importing, and a resumed attempt up to the end of its first step.

python benchmarks/startup.py              one and two ranks, three resumed attempts each
python benchmarks/startup.py --repeats 5

What importing torch takes on as many processes at once is measured in the same run and subtracted: it is the part that
this project cannot change.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from opensora.datasets.synthetic import synthetic_clip
from opensora.sampling.video_io import encode_video

LIMIT_BEYOND_TORCH_SECONDS = 5.0
LIMIT_IMPORT_SECONDS = 0.1


def seconds_to_run(code: str, *, processes: int = 1) -> float:
    """Wall time until that many Python processes, started together, have run some code."""
    started = time.perf_counter()
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(processes)]
    assert [process.wait() for process in running] == [0] * processes
    return time.perf_counter() - started


def write_run(folder: Path) -> Path:
    """Clips, their catalogue and the config of a small run; returns the path of the config."""
    lines = ["path,text,num_frames,height,width"]
    for number in range(8):
        frames, _ = synthetic_clip(number, num_frames=24, height=64, width=64)
        (folder / f"{number}.mp4").write_bytes(encode_video(frames, fps=24))
        lines.append(f"{number}.mp4,a clip,24,64,64")
    (folder / "clips.csv").write_text("\n".join(lines))
    config = {
        "run_uri": str(folder / "run"),
        "dtype": "fp32",
        "data": {"path": str(folder / "clips.csv"), "bucket_config": {"64px": {"17": [1.0, 2]}}},
        "model": {"type": "STDiT3", "hidden_size": 128, "depth": 4, "num_heads": 4},
        "train": {"steps": 2, "micro_batches_per_step": 2},
        "checkpoint": {"export": False},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def seconds_to_first_step(config: Path, *, ranks: int, steps: int) -> float:
    """From starting the command to the end of the first step of the attempt, as its metrics have it."""
    run = config.parent / "run"
    command = [
        sys.executable, "-m", "opensora.launch", "--nproc-per-node", str(ranks), "--run-uri", str(run),
        "opensora.train", str(config), f"train.steps={steps}",
    ]  # fmt: skip
    started = time.time()
    subprocess.run(command, check=True, capture_output=True)
    attempt = max(int(path.name) for path in (run / "attempts").iterdir())
    lines = (run / f"metrics/attempt-{attempt}/part-00000.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["step"] == steps, "the attempt was to do one step"
    return float(first["time"]) - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, median of {repeats}")
    bare = statistics.median(seconds_to_run("pass") for _ in range(repeats))
    ours = statistics.median(seconds_to_run("import opensora") for _ in range(repeats))
    print(f"import opensora: {ours - bare:.3f} s (limit {LIMIT_IMPORT_SECONDS:g} s)")
    print(f"{'ranks':>5} {'import torch':>13} {'first resumed step':>19} {'beyond torch':>13} limit")
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            config = write_run(Path(folder))
            subprocess.run([sys.executable, "-m", "opensora.train", str(config)], check=True, capture_output=True)
            torch_seconds, step_seconds = [], []
            for repeat in range(repeats):
                torch_seconds.append(seconds_to_run("import torch", processes=ranks))
                steps = 2 + repeat + 1  # two were done before
                step_seconds.append(seconds_to_first_step(config, ranks=ranks, steps=steps))
        torch_, step = statistics.median(torch_seconds), statistics.median(step_seconds)
        print(f"{ranks:>5} {torch_:>11.2f} s {step:>17.2f} s {step - torch_:>11.2f} s {LIMIT_BEYOND_TORCH_SECONDS:g} s")


if __name__ == "__main__":
    main()

"""Small training runs through the launcher, for tests: their config, their clips, and a run to start attempts in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opensora.checkpoint.manifest import scan_checkpoints
from opensora.records import EndRecord, Verdict, read_end_records, verdict_path
from opensora.sampling.video_io import encode_video
from opensora.storage import Storage

STEPS = 12
CONFIG = {
    "seed": 7,
    "dtype": "fp64",
    "model": {"type": "STDiT3", "hidden_size": 16, "depth": 1, "num_heads": 2},
    "vae": {"type": "codec", "channels": 4},
    "text_encoder": {"type": "hash", "output_dim": 8, "model_max_length": 8},
    "scheduler": {"type": "rflow", "sample_method": "logit-normal", "use_timestep_transform": True},
    "train": {
        "steps": STEPS,
        "micro_batches_per_step": 8,
        "log_every": 4,
        "mask_ratios": {"random": 0.3, "image_head": 0.2},
    },
    "optim": {"lr": 1e-3, "eps": 1e-8, "ema_decay": 0.9, "grad_clip": 1.0, "warmup_steps": 3},
    "checkpoint": {"every_steps": 5},
    "parallel": {"num_cpu_threads": 1},
    "report": {"flush_seconds": 1.0},
}


def write_clips(folder: Path) -> Path:
    """Write twelve moving clips of two shapes; returns their catalogue."""
    generator = np.random.default_rng(0)
    lines = ["path,text,num_frames,height,width"]
    for number in range(12):
        height, width = ((144, 256), (192, 192))[number % 2]
        picture = np.kron(generator.integers(0, 255, (12, 16, 3)), np.ones((24, 24, 1)))[: height + 24, : width + 24]
        frames = [picture[shift : shift + height, shift : shift + width] for shift in range(20)]
        (folder / f"{number}.mp4").write_bytes(encode_video(np.stack(frames).astype(np.uint8), fps=24))
        lines.append(f"{number}.mp4,clip number {number},20,{height},{width}")
    path = folder / "clips.csv"
    path.write_text("\n".join(lines))
    return path


@dataclass
class Run:
    """A run directory, and how to start attempts in it."""

    folder: Path
    catalogue: Path
    overrides: list[str] = field(default_factory=list)

    def command(self, ranks: int, *overrides: str, program: str = "opensora.train") -> list[str]:
        data = {"path": str(self.catalogue), "bucket_config": {"144p": {"17": [1.0, 2]}}, "repeats": 4}
        config = self.folder.parent / f"{self.folder.name}.json"
        config.write_text(json.dumps({**CONFIG, "data": data, "run_uri": str(self.folder)}))
        launcher = [sys.executable, "-m", "opensora.launch", "--nproc-per-node", str(ranks)]
        return [
            *launcher, "--run-uri", str(self.folder), program, str(config), *self.overrides, *overrides,
        ]  # fmt: skip

    def train(self, ranks: int, *overrides: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(ranks, *overrides), capture_output=True, text=True, timeout=300, check=False, env=environment()
        )
        assert done.returncode == expect, done.stderr[-4000:]
        return done

    def train_with(self, event: str, *overrides: str, expect: int, ranks: int = 2, **environ: str) -> str:
        """Train with an event of `drill_ranks.py`; returns what was said on standard error."""
        done = subprocess.run(
            self.command(ranks, *overrides, program=str(Path(__file__).with_name("drill_ranks.py"))),
            capture_output=True, text=True, timeout=300, check=False,
            env={**environment(), "OPENSORA_DRILL": event, **environ},
        )  # fmt: skip
        assert done.returncode == expect, done.stderr[-4000:]
        return done.stderr

    def saved_steps(self) -> list[int]:
        """The steps of all checkpoints; each one is complete and undamaged."""
        run = Storage(str(self.folder))
        scan = scan_checkpoints(run)
        for info in scan.complete:
            for item in info.manifest.objects:
                assert run.digest(f"{info.path}/{item.path}") == item.sha256
        return [info.step for info in scan.complete]

    def end_record(self, attempt: int, rank: int) -> EndRecord:
        return read_end_records(Storage(str(self.folder)), attempt)[rank]

    def verdict(self, attempt: int) -> Verdict:
        return Verdict.from_json((self.folder / verdict_path(attempt)).read_bytes())

    def train_and_kill(self, ranks: int, *, after_step: int) -> None:
        """SIGKILL the launcher as soon as the checkpoint of a step is complete."""
        manifest = self.folder / f"checkpoints/step-{after_step:08d}"
        process = subprocess.Popen(self.command(ranks), env=environment(), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while not list(manifest.glob("*/manifest.json")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint in time"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def losses(self) -> dict[int, float]:
        """Step → loss; of a step that was done twice, the later one."""
        found: dict[int, float] = {}
        for part in sorted(self.folder.glob("metrics/attempt-*/part-*.jsonl")):
            for line in part.read_text().splitlines():
                record = json.loads(line)
                if "loss" in record:
                    found[record["step"]] = record["loss"]
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "export/model.safetensors")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def assert_equal_within(actual: Run, expected: Run, tolerance: float, *, from_step: int = 1) -> None:
    """Compare losses step by step, and the exported weights tensor by tensor."""
    wanted = {step: loss for step, loss in expected.losses().items() if step >= from_step}
    got = actual.losses()
    assert sorted(wanted) == list(range(from_step, STEPS + 1))
    for step, loss in wanted.items():
        assert got[step] == pytest.approx(loss, rel=tolerance), f"loss of step {step}"
    theirs = expected.weights()
    for name, tensor in actual.weights().items():
        difference = float((tensor - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-30))
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"

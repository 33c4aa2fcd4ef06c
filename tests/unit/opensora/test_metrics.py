"""Metrics: declared names, lines of JSON, TensorBoard files that TensorBoard reads, Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import pytest
import torch

from opensora.config.train import ReportConfig
from opensora.errors import ExitCode, MissingExtraError
from opensora.storage import Storage
from opensora.training.metrics import MetricsWriter, known_name, peak_memory_gib, peak_tflops

CPU = torch.device("cpu")


@pytest.fixture
def run() -> Storage:
    return Storage(f"memory://test-{uuid4().hex}")


def open_metrics(run: Storage, *, attempt: int = 1, wandb: bool = False) -> MetricsWriter:
    return MetricsWriter(
        run, attempt=attempt, config=ReportConfig(wandb=wandb, flush_seconds=1000), run_config={"seed": 7}
    )


def lines(run: Storage, attempt: int = 1) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.read(f"metrics/attempt-{attempt}/part-00000.jsonl").splitlines()]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("loss", True), ("seconds/data wait", True), ("seconds", False), ("seconds/*", True), ("losses", False),
        ("loss/x", False), ("", False),
    ],
)  # fmt: skip
def test_only_declared_names_are_known(name: str, known: bool) -> None:
    assert known_name(name) == known


def test_an_undeclared_name_is_refused(run: Storage) -> None:
    metrics = open_metrics(run)
    try:
        with pytest.raises(AssertionError, match="loss_of_hope is not declared"):
            metrics.write(1, {"loss": 1.0, "loss_of_hope": 2.0}, everywhere=False)
    finally:
        metrics.close()


def test_lines_are_json_with_step_and_time_and_null_for_what_is_not_a_number(run: Storage) -> None:
    metrics = open_metrics(run, attempt=2)
    metrics.write(1, {"loss": 0.5, "seconds/encode": 1.25}, everywhere=False)
    metrics.write(2, {"loss": math.nan, "grad_norm": math.inf}, everywhere=False)
    metrics.close()
    first, second = lines(run, attempt=2)
    assert abs(first.pop("time") - second.pop("time")) < 60
    assert first == {"step": 1, "loss": 0.5, "seconds/encode": 1.25}
    assert second == {"step": 2, "loss": None, "grad_norm": None}
    assert "NaN" not in run.read("metrics/attempt-2/part-00000.jsonl").decode()


def test_tensorboard_reads_what_was_meant_for_it(run: Storage, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = open_metrics(run)
    for step in range(1, 5):
        metrics.write(step, {"loss": 1 / step, "seconds/encode": float(step)}, everywhere=step % 2 == 0)
    metrics.close()
    names = run.list_names("tensorboard")
    assert len(names) == 1
    (tmp_path / names[0]).write_bytes(run.read(f"tensorboard/{names[0]}"))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "seconds/encode"]
    scalars = [(event.step, event.value) for event in events.Scalars("loss")]
    assert scalars == [(2, pytest.approx(0.5)), (4, pytest.approx(0.25))]
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]


def test_closing_leaves_no_local_files(run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    metrics = open_metrics(run)
    metrics.write(1, {"loss": 1.0}, everywhere=True)
    assert len(list(tmp_path.iterdir())) == 1
    metrics.close()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- Weights & Biases


def test_without_wandb_the_extra_is_named_and_nothing_is_begun(
    run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"report\.wandb=true needs the extra `wandb`") as caught:
        open_metrics(run, wandb=True)
    assert caught.value.hint == 'pip install "opensora[wandb]"'
    assert caught.value.exit_code == ExitCode.CONFIG
    assert list(tmp_path.iterdir()) == []


def test_attempts_of_a_run_continue_one_run_of_wandb(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    ended: list[bool] = []

    def init(**settings: Any) -> SimpleNamespace:
        begun.append(settings)
        return SimpleNamespace(
            log=lambda values, *, step: logged.append((step, values)), finish=lambda: ended.append(True)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for storage in (run, run, run.child("other")):
        metrics = open_metrics(storage, wandb=True)
        metrics.write(1, {"loss": 2.0}, everywhere=False)
        metrics.write(2, {"loss": 1.0}, everywhere=True)
        metrics.close()
    assert logged == [(2, {"loss": 1.0})] * 3
    assert ended == [True] * 3
    assert [settings["config"] for settings in begun] == [{"seed": 7}] * 3
    assert [settings["resume"] for settings in begun] == ["allow"] * 3
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[2]["id"] != begun[0]["id"]
    assert begun[2]["name"] == "other"


# ------------------------------------------------------------------------------------------------- the machine


def test_peak_memory_is_that_of_this_process_and_does_not_fall() -> None:
    block = np.ones(2**26 // 8)
    peak = psutil.Process().memory_info().rss / 2**30
    del block
    assert peak <= peak_memory_gib(CPU) * 1.001
    assert peak_memory_gib(CPU) < psutil.virtual_memory().total / 2**30


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989.5), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA H100 80GB HBM3", 989.5), ("Tesla K80", None)],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0)) == peak
    assert peak_tflops(CPU) is None

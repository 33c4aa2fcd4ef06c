"""`python -m opensora.search_batch_size` on this machine: real steps, real processes, real kills."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from training_here import config_of, train_here
from training_runs import Run

from opensora.batch_search.fresh_process import FreshProcesses, OutOfMemory
from opensora.batch_search.probe import ProbeResult
from opensora.config.load import load_train_config
from opensora.config.search import SearchConfig
from opensora.config.train import StorageConfig
from opensora.datasets.batch_table import (
    BatchTable,
    BucketResult,
    Evidence,
    facts_of,
    read_batch_table,
    write_batch_table,
)
from opensora.errors import ConfigError, ExitCode

# A measurement starts a process that imports torch: on a busy machine that takes half a minute, and there are many.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

BUDGET_MIB = 200
CONFIG = {
    "run_uri": "never-written",
    "dtype": "fp32",
    "device": "cpu",
    "model": {"type": "STDiT3", "hidden_size": 32, "depth": 2, "num_heads": 2},
    "text_encoder": {"type": "hash", "output_dim": 16, "model_max_length": 8},
    "data": {"path": "never-read.csv", "bucket_config": {"144p": {17: [1.0, 1], 34: [1.0, 1]}}},
    "train": {"steps": 1},
    "parallel": {"num_cpu_threads": 1},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def command(config: Path, output: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "opensora.search_batch_size", str(config), "--output", str(output), *flags]


@pytest.fixture(scope="module", autouse=True)
def bytecode() -> Iterator[None]:
    """All processes of these tests find what one of them has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OPENSORA_TERMINATION_LOG": str(folder / "termination-log")}


def table_at(path: Path) -> BatchTable:
    table = read_batch_table(str(path), storage=StorageConfig())
    assert table is not None
    return table


@pytest.fixture(scope="module")
def searched(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BatchTable, str]:
    """The table of two buckets, and what was printed."""
    folder = tmp_path_factory.mktemp("searched")
    line = command(config, folder / "table.json", "--memory-budget", f"{BUDGET_MIB}MiB", "--headroom-percent", "10")
    done = subprocess.run(line, env=environment(folder), capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr
    return table_at(folder / "table.json"), done.stdout


def test_both_buckets_have_a_measured_batch_within_the_budget(searched: tuple[BatchTable, str]) -> None:
    table, shown = searched
    assert set(table.buckets) == {"144p/17", "144p/34"}
    for name, found in table.buckets.items():
        assert found.batch_size >= 2
        assert found.peak_bytes <= 0.9 * BUDGET_MIB * 2**20
        assert found.batch_size in [point.batch_size for point in found.evidence.points]
        assert found.seconds_per_step > 0
        assert name in shown
    # A clip of twice the length takes about twice the memory; resident memory is only known to about a tenth.
    short, long = (table.buckets[name].fit for name in ("144p/17", "144p/34"))
    assert short is not None
    assert long is not None
    assert 1.2 < long.bytes_per_clip / short.bytes_per_clip < 2.8


@pytest.mark.parametrize("bucket", ["144p/17", "144p/34"])
def test_the_batch_that_was_found_fits_and_half_as_much_more_does_not(
    bucket: str, searched: tuple[BatchTable, str], config: Path, tmp_path: Path
) -> None:
    measure = FreshProcesses(load_train_config(str(config)), SearchConfig(), folder=tmp_path)
    found = searched[0].buckets[bucket].batch_size
    peaks = {}
    for size in (found, -(-found * 3 // 2)):
        outcome = measure(bucket, size)
        assert isinstance(outcome, ProbeResult)
        peaks[size] = outcome.peak_bytes - searched[0].empty_bytes
    fits, too_much = peaks.values()
    # The resident memory of the same step differs from process to process, by a tenth and more on a busy machine.
    assert fits <= 1.2 * BUDGET_MIB * 2**20
    assert too_much > BUDGET_MIB * 2**20


def test_sizes_that_the_kernel_kills_are_bracketed(config: Path, medium_cgroup: Path, tmp_path: Path) -> None:
    """The budget never ends this search: the limit of the cgroup does."""
    line = command(config, tmp_path / "t.json", "--memory-budget", "64GiB", "--bucket", "144p/34", "--max-batch", "16")
    enter = ["sh", "-c", f'echo $$ > {medium_cgroup}/cgroup.procs; exec "$@"', "sh"]
    done = subprocess.run(
        [*enter, *line], env=environment(tmp_path), capture_output=True, text=True, timeout=1000, check=False
    )
    assert done.returncode == 0, done.stderr
    found = table_at(tmp_path / "t.json").buckets["144p/34"]
    assert found.evidence.too_large
    assert found.batch_size + 1 == min(found.evidence.too_large)
    report = json.loads((tmp_path / "termination-log").read_text())
    assert report["batch_size"] == found.batch_size
    assert f"{min(found.evidence.too_large)}:oom" in report["known"].split()


def test_a_model_that_does_not_fit_is_out_of_memory(config: Path, small_cgroup: Path, tmp_path: Path) -> None:
    line = command(config, tmp_path / "t.json", "--memory-budget", "1GiB", "--bucket", "144p/17")
    enter = ["sh", "-c", f'echo $$ > {small_cgroup}/cgroup.procs; exec "$@"', "sh"]
    done = subprocess.run(
        [*enter, *line], env=environment(tmp_path), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == ExitCode.OUT_OF_MEMORY, done.stderr
    assert "even without a clip" in done.stderr
    report = json.loads((tmp_path / "termination-log").read_text())
    assert (report["bucket"], report["code"]) == ("144p/17", 86)
    assert not (tmp_path / "t.json").exists()


def test_a_training_that_cannot_run_says_why(config: Path, tmp_path: Path) -> None:
    line = command(config, tmp_path / "t.json", "--memory-budget", "1GiB", "vae.channels=4", "model.in_channels=8")
    done = subprocess.run(line, env=environment(tmp_path), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == ExitCode.CONFIG
    assert "model.in_channels=8, but the VAE" in done.stderr
    report = json.loads((tmp_path / "termination-log").read_text())
    assert report["code"] == ExitCode.CONFIG
    assert "model.in_channels=8" in report["reason"]


def test_sigterm_ends_the_measurement_too_and_leaves_what_is_known(config: Path, tmp_path: Path) -> None:
    line = command(config, tmp_path / "t.json", "--memory-budget", "1GiB", "--bucket", "144p/17")
    process = subprocess.Popen(line, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "t.json").exists() or "144p/17" not in (tmp_path / "t.json").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        while not (children := psutil.Process(process.pid).children(recursive=True)):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == ExitCode.STOPPED, said
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    report = json.loads((tmp_path / "termination-log").read_text())
    assert report["code"] == ExitCode.STOPPED


# --------------------------------------------------------------------------------------------- training with a table


def write_table(run: Run, path: Path, batch_size: int, **facts: str) -> Path:
    """A table as a search for this run would leave it."""
    measured = facts_of(config_of(run), ranks=1, accelerator="cpu")
    found = BucketResult(batch_size=batch_size, peak_bytes=1, seconds_per_step=1, fit=None, evidence=Evidence())
    table = BatchTable(
        facts={**measured, "torch": torch.__version__, **facts},
        headroom_percent=8,
        objective="MaxFit",
        buckets={"144p/17": found},
    )
    write_batch_table(str(path), table, storage=StorageConfig())
    return path


def test_training_takes_the_batch_sizes_of_a_table_and_can_be_repeated_without_it(
    catalogue: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", catalogue, ["train.steps=1", "checkpoint.export=false"])
    table = write_table(run, tmp_path / "table.json", 3)
    train_here(config_of(run, f"data.batch_table={table}"))
    config = load_train_config(str(run.folder / "config.yaml"))
    assert config.data.bucket_config == {"144p": {17: (1.0, 3)}}
    assert config.data.batch_table is None
    assert table_at(run.folder / "batch-table.json") == table_at(table)
    table.unlink()
    train_here(load_train_config(str(run.folder / "config.yaml"), ["train.steps=2"]))


@pytest.mark.parametrize(
    ("facts", "override", "words"),
    [
        ({"accelerator": "NVIDIA H200"}, "seed=1", "accelerator cpu (measured: NVIDIA H200)"),
        ({}, "data.bucket_config.64px.17=[1.0, 4]", "no batch size for 64px/17"),
    ],
)
def test_a_table_that_does_not_hold_ends_the_run_before_anything_is_written(
    facts: dict[str, str], override: str, words: str, catalogue: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", catalogue)
    table = write_table(run, tmp_path / "table.json", 3, **facts)
    with pytest.raises(ConfigError) as caught:
        train_here(config_of(run, f"data.batch_table={table}", override))
    assert words in str(caught.value)
    assert not (run.folder / "config.yaml").exists()


def test_a_table_that_is_missing_is_told(catalogue: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", catalogue)
    with pytest.raises(ConfigError, match="does not exist"):
        train_here(config_of(run, f"data.batch_table={tmp_path}/none.json"))


def test_an_allocation_that_fails_means_that_the_batch_does_not_fit(config: Path, tmp_path: Path) -> None:
    measure = FreshProcesses(load_train_config(str(config)), SearchConfig(), folder=tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, hard))  # its processes inherit it
    try:
        outcome = measure("144p/34", 100)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert isinstance(outcome, OutOfMemory), outcome

"""`osctl logs` of runs whose pods are gone: what a real launcher has left in a real object store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_api import FakeApi
from fake_logs import FakeRun
from osctl import run_logs
from osctl.main import main

from opensora.storage import Storage

pytestmark = pytest.mark.integration

PROGRAM = """
import os, sys, time
rank = int(os.environ["RANK"])
for step in range(300):
    print(f"[2026-01-01 00:{step // 60:02d}:{step % 60:02d}] rank {rank} at step {step}")
print("end of rank", rank)
sys.exit(3 if rank == 1 else 0)
"""


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    with FakeApi() as running:
        (tmp_path / ".kube").mkdir()
        running.write_kubeconfig(tmp_path / ".kube" / "config")
        yield running


@pytest.fixture
def uri(bucket: str, tmp_path: Path) -> str:
    """A run directory in the store that a launcher of two ranks has written its logs to."""
    uri = f"s3://{bucket}/runs/demo"
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "opensora.launch", "--nproc-per-node", "2", "--run-uri", uri, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr.decode()
    return uri


def test_the_store_tells_what_the_pods_have_told(
    uri: str, api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_logs, "_BLOCK_BYTES", 1000)
    FakeRun(api, run_uri=uri, nodes=1, phase="Failed")
    assert main(["logs", "demo"]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"pods of attempt 1 are gone: reading {uri}\n"
    lines = captured.out.splitlines()
    assert len(lines) == 602
    of_rank = {rank: [line for line in lines if line.startswith(f"[rank {rank}] ")] for rank in (0, 1)}
    for rank, found in of_rank.items():
        assert found[-1] == f"[rank {rank}] end of rank {rank}"
        assert [int(line.split()[-1]) for line in found[:-1]] == list(range(300))
    assert lines[:4] == [
        f"[rank {rank}] [2026-01-01 00:00:{step:02d}] rank {rank} at step {step}" for step in (0, 1) for rank in (0, 1)
    ]
    assert main(["logs", "demo", "--tail", "3", "--rank", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [line.removeprefix("[rank 1] ") for line in of_rank[1][-3:]]


def test_a_run_directory_by_its_address_names_the_rank_that_failed_first(
    uri: str, api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", uri, "--rank", "first-failed", "--tail", "1"]) == 0
    assert capsys.readouterr().out == "end of rank 1\n"
    assert main(["logs", uri, "--download", "out"]) == 0
    assert capsys.readouterr().out.split() == ["out/attempt-1/rank-0.log", "out/attempt-1/rank-1.log"]
    stored = Storage(uri).read("logs/attempt-1/rank-0/part-00000.log")
    assert Path("out/attempt-1/rank-0.log").read_bytes() == stored
    assert api.requests == []


def test_a_log_that_grows_in_the_store_is_followed_to_its_end(
    bucket: str, api: FakeApi, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_logs, "_POLL_SECONDS", 0.1)
    uri = f"s3://{bucket}/runs/live"
    (tmp_path / "program.py").write_text(PROGRAM.replace("    print(", "    time.sleep(0.01)\n    print("))
    command = [sys.executable, "-m", "opensora.launch", "--nproc-per-node", "2", "--run-uri", uri, "program.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        try:
            run = Storage(uri)
            while not run.list("logs"):
                assert launcher.poll() is None or run.list("logs")
            assert main(["logs", uri, "-f"]) == 0
        finally:
            launcher.kill()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 602
    assert {"[rank 0] end of rank 0", "[rank 1] end of rank 1"} <= set(lines)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "check the credentials"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "check the endpoint"),
    ],
    ids=["refused", "unreachable"],
)
def test_a_store_that_cannot_be_read_is_told_with_the_remedy(
    bucket: str,
    api: FakeApi,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setattr(run_logs, "_STORE_SECONDS", 0.5)
    monkeypatch.setenv(name, value)
    FakeRun(api, run_uri=f"s3://{bucket}/runs/demo", phase="Succeeded")
    assert main(["logs", "demo"]) == 3
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: there are no logs of attempt 1 of demo: its pods are gone, and the run directory")
    assert hint.startswith("hint: ")
    assert said in hint

"""Attempts, end records and the verdict over them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora import records
from opensora.errors import ConfigError, DivergedError, ExitCode, SupersededError, UsageError
from opensora.records import EndRecord, Verdict
from opensora.storage import Storage


def record(rank: int, code: int, time: float = 0.0, message: str = "") -> EndRecord:
    return EndRecord(rank=rank, time=time, code=code, reason="Error", message=message)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


# ---------------------------------------------------------------------------------------------------- attempts


def test_attempts_are_numbered_from_one(run: Storage) -> None:
    assert records.newest_attempt(run) == 0
    assert [records.next_attempt(run), records.next_attempt(run)] == [1, 2]
    assert records.newest_attempt(run) == 2


def test_attempt_ten_is_newer_than_attempt_nine(run: Storage) -> None:
    for attempt in (9, 10, 2):
        records.announce_attempt(run, attempt)
    assert records.newest_attempt(run) == 10


def test_something_else_in_the_folder_is_not_an_attempt(run: Storage) -> None:
    run.write("attempts/old-3/started.json", b"{}")
    run.write("attempts/readme.txt", b"")
    assert records.next_attempt(run) == 1


def test_launchers_that_start_together_never_share_a_number(run: Storage) -> None:
    claimed: list[int] = []
    barrier = threading.Barrier(8)

    def claim() -> None:
        barrier.wait()
        claimed.append(records.next_attempt(run))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, 9))


def test_every_node_may_announce_the_same_attempt(run: Storage) -> None:
    assert records.announce_attempt(run, 3)
    assert not records.announce_attempt(run, 3)
    assert json.loads(run.read(records.started_path(3)))["attempt"] == 3


def test_an_attempt_learns_that_a_newer_one_has_started(run: Storage) -> None:
    attempt = records.next_attempt(run)
    records.check_not_superseded(run, attempt)
    records.next_attempt(run)
    with pytest.raises(SupersededError, match=r"attempt 1 of .* is superseded by attempt 2"):
        records.check_not_superseded(run, attempt)


def test_a_process_without_launcher_claims_the_next_attempt(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(records.ATTEMPT, raising=False)
    assert records.own_attempt(run) == 1
    assert records.own_attempt(run) == 2


def test_a_rank_belongs_to_the_attempt_of_its_launcher(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(records.ATTEMPT, "4")
    assert records.own_attempt(run) == 4
    assert records.newest_attempt(run) == 4
    records.announce_attempt(run, 5)
    with pytest.raises(SupersededError):
        records.own_attempt(run)


@pytest.mark.parametrize("given", ["", "0", "-1", "two", "²"])
def test_a_wrong_attempt_number_is_refused(run: Storage, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(records.ATTEMPT, given)
    with pytest.raises(UsageError, match="OPENSORA_ATTEMPT"):
        records.own_attempt(run)


# ------------------------------------------------------------------------------------------------- end records


@given(
    st.builds(
        EndRecord,
        rank=st.integers(0, 10_000),
        time=st.floats(allow_nan=False, allow_infinity=False),
        code=st.sampled_from(ExitCode).map(int),
        reason=st.text(),
        message=st.text(),
        phase=st.none() | st.text(),
        step=st.none() | st.integers(0),
        bucket=st.none() | st.text(),
        samples=st.lists(st.text()),
        last_words=st.lists(st.text()),
    )
)
def test_an_end_record_survives_its_file(end: EndRecord) -> None:
    assert EndRecord.from_json(end.to_json()) == end


def test_keys_of_a_newer_version_are_ignored() -> None:
    values = json.loads(record(1, 86).to_json()) | {"temperature": 90}
    assert EndRecord.from_json(json.dumps(values)) == record(1, 86)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"rank": 0, "time": 1, "code": 1}', '{"rank": "0", "time": 1, "code": 1}', b"\xff"],
)
def test_a_damaged_record_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"record|Expecting|decode"):
        EndRecord.from_json(text)


def test_the_record_of_an_error_of_ours_carries_its_code_and_place() -> None:
    try:
        raise DivergedError("loss is nan")
    except DivergedError as error:
        end = EndRecord.from_exception(
            error, rank=3, phase="forward/backward", step=12, bucket="144p/51/0.56", samples=["s3://clips/a.mp4"]
        )
    assert (end.code, end.reason, end.samples) == (87, "DivergedError", ["s3://clips/a.mp4"])
    assert str(end) == "diverged (87) in forward/backward at step 12, bucket 144p/51/0.56: loss is nan"
    assert end.last_words[-1] == "opensora.errors.DivergedError: loss is nan"


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("x", hint="y"), 78), (MemoryError(), 86), (KeyboardInterrupt(), 130), (ZeroDivisionError("x"), 1)],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_exception_has_an_exit_code(error: BaseException, code: int) -> None:
    end = EndRecord.from_exception(error, rank=0)
    assert end.code == code
    assert end.message or isinstance(error, MemoryError)


def test_the_first_record_of_a_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "rank-0.json"
    monkeypatch.setenv(records.END_RECORD, str(target))
    assert records.write_end_record(record(0, 85))
    assert not records.write_end_record(record(0, 84))
    assert EndRecord.from_json(target.read_bytes()).code == 85
    assert list(tmp_path.iterdir()) == [target]


def test_without_a_launcher_no_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(records.END_RECORD, raising=False)
    monkeypatch.chdir(tmp_path)
    assert not records.write_end_record(record(0, 85))
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("ends", "first", "code"),
    [
        ([record(0, 0), record(1, 0)], None, 0),
        ([record(0, 84, 5), record(1, 86, 6)], 1, 86),
        ([record(0, 1, 7), record(1, 86, 6), record(2, 84, 5)], 1, 86),
        ([record(0, 84, 5), record(1, 84, 4)], 1, 84),
        ([record(0, 75, 5), record(1, 75, 4)], 1, 75),
        ([record(0, 0, 5), record(1, 75, 4)], 1, 75),
        ([record(0, 84, 3), record(1, 75, 4)], 1, 75),
        ([record(0, 75, 3), record(1, 1, 4)], 1, 1),
        ([record(1, 65, 3), record(0, 65, 3)], 0, 65),
        ([record(0, 42, 3)], 0, 42),
        ([], None, 0),
    ],
    ids=[
        "all done",
        "a lost peer is never the cause",
        "first in time",
        "only lost peers",
        "all stopped",
        "one had finished already",
        "a stop tells more than a lost peer",
        "a failure tells more than a stop",
        "same time: lower rank",
        "a code that is not in the table",
        "no rank",
    ],
)
def test_the_verdict_names_the_rank_that_failed_first(ends: list[EndRecord], first: int | None, code: int) -> None:
    verdict = records.judge(ends, now=9)
    assert (verdict.first.rank if verdict.first else None, verdict.code) == (first, code)
    assert verdict.codes == {str(end.rank): end.code for end in ends}


def test_the_verdict_reads_like_a_sentence() -> None:
    ends = [record(0, 84, 2), EndRecord(rank=1, time=1, code=86, reason="x", message="boom", phase="saving", step=3)]
    assert records.judge(ends, now=9).message == "rank 1 failed first: out of memory (86) in saving at step 3: boom"


def test_the_sentence_stays_on_one_line() -> None:
    ends = [record(0, 86, message="\nno memory\n| allocated | 3 GiB |")]
    assert records.judge(ends, now=9).message == "rank 0 failed first: out of memory (86): no memory"


def test_a_verdict_survives_its_file() -> None:
    verdict = records.judge([record(0, 84, 2), record(1, 86, 1)], attempt=3, now=9)
    assert Verdict.from_json(verdict.to_json()) == verdict
    assert Verdict.from_json(records.judge([], now=1).to_json()).first is None


def test_every_exit_code_has_a_meaning() -> None:
    assert set(records.MEANINGS) == set(ExitCode)

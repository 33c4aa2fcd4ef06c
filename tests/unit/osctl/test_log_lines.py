"""Lines of logs: whose they are, when they were written, and their order."""

from __future__ import annotations

import contextlib
import re
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from osctl.log_lines import Choice, Line, Window, label, merge, own_stamp, parse_stamp, split_rank


@pytest.mark.parametrize(
    ("text", "pod", "source", "rest"),
    [
        (b"step 1", 0, 0, b"step 1"),
        (b"[rank 3] step 1", 0, 3, b"step 1"),
        (b"[rank 12] [rank 3] x", 1, 12, b"[rank 3] x"),
        (b"[launcher] attempt 1", 0, -1, b"[launcher] attempt 1"),
        (b"[launcher] attempt 1", 2, -3, b"[launcher] attempt 1"),
        (b"a line of no rank", 2, -3, b"a line of no rank"),
        (b"[rank x] y", 0, 0, b"[rank x] y"),
    ],
)
def test_a_line_belongs_to_the_rank_that_the_launcher_names(text: bytes, pod: int, source: int, rest: bytes) -> None:
    assert split_rank(text, pod=pod) == (source, rest)


def test_labels_name_the_rank_or_the_pod() -> None:
    assert [label(3, noun="rank", width=2), label(-1, noun="rank"), label(0, noun="shard")] == [
        "[rank  3] ",
        "[pod 0] ",
        "[shard 0] ",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-02T03:04:05.123456789Z",
        "2026-01-02T03:04:05.5Z",
        "2026-01-02T03:04:05Z",
        "2026-01-02T03:04:05.25+02:00",
        "2026-01-02T03:04:05-11:30",
    ],
)
def test_times_of_kubelets_are_read_to_the_nanosecond(text: str) -> None:
    nanoseconds = parse_stamp(text.encode())
    assert nanoseconds // 1000 == round(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1e6)
    assert nanoseconds % 1000 == (789 if "789" in text else 0)


@pytest.mark.parametrize("text", [b"", b"failed", b"2026-01-02T03:04:05", b"2026-13-02T03:04:05Z", b"\xff" * 30])
def test_what_is_no_time_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (which one is of no interest)
        parse_stamp(text)


@given(st.binary(max_size=60))
def test_no_bytes_make_it_fail_otherwise(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_stamp(text)
    split_rank(text, pod=0)
    Choice(pattern=re.compile("x")).take(1, 0, text)
    own_stamp(text)


def test_ranks_tell_the_time_themselves_in_the_run_directory() -> None:
    assert own_stamp(b"[1970-01-02 00:00:01] step 1") == 86_401 * 10**9
    assert own_stamp(b"step 1 [1970-01-02 00:00:01]") is None
    assert own_stamp(b"[1970-99-02 00:00:01] x") is None


def test_a_choice_is_by_rank_and_pattern() -> None:
    choice = Choice(rank=1, pattern=re.compile("lo+ss"))
    assert choice.take(5, 1, b"the looss is 3") == Line(5, 1, "the looss is 3")
    assert choice.take(5, 0, b"the looss is 3") is None
    assert choice.take(5, 1, b"nothing") is None


def test_nothing_that_moves_a_cursor_comes_out() -> None:
    line = Choice().take(0, 0, b"10%\r\x1b[2K\x1b[31mred\x1b[0m\tand \xff \x07 end\x1b]0;title\x07")
    assert line is not None
    assert line.text == "red     and \N{REPLACEMENT CHARACTER}   end"


def test_streams_become_one_in_the_order_of_time() -> None:
    streams = [[Line(1, 0, "a"), Line(4, 0, "b")], [Line(2, 1, "c"), Line(4, 1, "d")], [], [Line(3, 2, "e")]]
    assert [line.text for line in merge([iter(stream) for stream in streams])] == ["a", "c", "e", "b", "d"]


def test_merging_reads_no_further_than_it_writes() -> None:
    num_read = 0

    def endless() -> object:
        nonlocal num_read
        while True:
            num_read += 1
            yield Line(num_read, 0, "")

    merged = merge([endless(), endless()])  # type: ignore[list-item]
    for _ in range(10):
        next(merged)
    assert num_read <= 13


def test_a_line_is_held_back_for_earlier_ones_and_no_longer() -> None:
    window = Window(0.25)
    window.add([Line(20, 0, "late")], now=100.0)
    assert window.wait(now=100.0) == 0.25
    window.add([Line(10, 1, "early")], now=100.1)
    assert window.due(now=100.2) == []
    assert [line.text for line in window.due(now=100.25)] == ["early", "late"]
    assert window.due(now=200.0) == []
    window.add([Line(30, 0, "x")], now=200.0)
    window.add([Line(40, 0, "y")], now=200.2)
    assert [line.text for line in window.due(now=200.3)] == ["x"]
    assert [line.text for line in window.rest()] == ["y"]
    assert window.wait(now=0.0) is None


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), max_size=60))
def test_a_window_loses_nothing(arrivals: list[tuple[int, int]]) -> None:
    window, out = Window(0.25), []
    for number, (moment, source) in enumerate(arrivals):
        window.add([Line(moment, source, str(number))], now=number * 0.1)
        out += window.due(now=number * 0.1)
    out += window.rest()
    assert sorted(int(line.text) for line in out) == list(range(len(arrivals)))

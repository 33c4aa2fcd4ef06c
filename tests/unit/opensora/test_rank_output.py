"""Lines of ranks: broken where they are too long, and reduced to what a reader of a terminal would see."""

from __future__ import annotations

import os
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.rank_output import MAX_LINE_BYTES, RankStream, Screen, log_text, split_lines


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"plain text\n", b"plain text"),
        (b"from windows\r\n", b"from windows"),
        (b"\n", b""),
        (b"\x1b[32mgreen\x1b[0m and \x1b[1mbold\x1b[m\n", b"green and bold"),
        (b"\x1b]0;title\x07text\n", b"text"),
        (b"ma\x1b[01;31m\x1b[Ktch\x1b[m\x1b[K rest\n", b"match rest"),
        (b" 10%\r 50%\r100% done\n", b"100% done"),
        (b"bar 12%\r\x1b[2KINFO checkpoint saved\n", b"INFO checkpoint saved"),
        (b"\x1b[?25l\r\x1b[2K\x1b[1A\x1b[2K\n", None),
        (b"\x1b[?25h\n", None),
        (b"\xff\x00binary\n", b"\xff\x00binary"),
    ],
    ids=[
        "plain",
        "carriage return at the end",
        "empty line",
        "colours",
        "title",
        "grep",
        "tqdm",
        "rich",
        "only movement",
        "only visibility",
        "binary",
    ],
)
def test_the_log_keeps_what_a_reader_sees(line: bytes, text: bytes | None) -> None:
    assert log_text(line) == text


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_splitting_neither_loses_nor_changes_bytes(chunks: list[bytes]) -> None:
    lines: list[bytes] = []
    rest = b""
    for chunk in chunks:
        found, rest = split_lines(rest + chunk)
        lines += found
    assert b"".join(lines) + rest == b"".join(chunks)
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    assert b"\n" not in rest


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["endless", "long"])
def test_a_line_that_is_too_long_is_broken(end: bytes) -> None:
    data = bytes(range(11, 251)) * 2000
    lines, rest = split_lines(data.replace(b"\r", b".") + end)
    assert max(len(line) for line in lines) <= MAX_LINE_BYTES + 1
    assert len(rest) <= MAX_LINE_BYTES
    assert b"".join(line[:-1] for line in lines) + rest == data.replace(b"\r", b".")


def test_a_bar_that_is_drawn_for_hours_does_not_grow() -> None:
    lines, rest = split_lines(b"".join(b"\r%6d of 100000" % i for i in range(10_000)))
    assert (lines, rest) == ([], b"  9999 of 100000")


def forwarded(data: bytes, *, prefix: bytes = b"", raw: bool = False) -> tuple[bytes, list[bytes]]:
    """What appears on the screen, and the last words."""
    source, feed = os.pipe()
    out, screen = os.pipe()
    words: deque[bytes] = deque(maxlen=2)
    stream = RankStream(source, screen=Screen(screen), prefix=prefix, raw=raw, log=None, last_words=words)
    os.write(feed, data)
    os.close(feed)
    while stream.pump():
        pass
    stream.close()
    os.close(screen)
    with open(out, "rb") as shown:
        return shown.read(), list(words)


def test_a_prefix_stands_before_every_line() -> None:
    assert forwarded(b"a\nb\nno end", prefix=b"[rank 1] ")[0] == b"[rank 1] a\n[rank 1] b\n[rank 1] no end\n"


def test_last_words_are_the_last_lines() -> None:
    assert forwarded(b"a\nb\nc")[1] == [b"b", b"c"]


def test_the_rank_that_owns_the_cursor_is_forwarded_byte_for_byte() -> None:
    data = b"\x1b[?25l\r\x1b[2Kstep 1 of 3\r\x1b[2Kstep 2 of 3"
    assert forwarded(data, raw=True)[0] == data


def test_a_line_of_another_rank_replaces_a_half_drawn_bar_and_the_cursor_comes_back() -> None:
    source, target = os.pipe()
    screen = Screen(target)
    screen.write_raw(b"\x1b[?25lstep 1")
    screen.write_line(b"[rank 1] hello\n")
    screen.write_raw(b"step 2")
    screen.restore()
    screen.restore()
    os.close(target)
    with open(source, "rb") as shown:
        assert shown.read() == b"\x1b[?25lstep 1\r\x1b[2K[rank 1] hello\nstep 2\x1b[?25h\n"


def test_a_screen_whose_reader_has_gone_takes_everything() -> None:
    source, target = os.pipe()
    os.close(source)
    screen = Screen(target)
    screen.write_line(b"a\n")
    screen.write_line(b"b\n")
    os.close(target)

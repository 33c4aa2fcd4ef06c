"""Logs, for machines and for people."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import pytest
from opensora_operator import logs


@pytest.fixture
def set_up(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], None]]:
    """Sets logging up in a form; it is as it was afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("opensora_operator")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers.clear()  # what is set up closes those that it finds
    yield lambda form: logs.set_up(level="info", form=form)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def test_a_line_of_json_says_what_it_is_about(
    set_up: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    set_up("json")
    about = {"kind": "TrainingRun", "run": "team/demo", "attempt": 2, "reason": "Hang"}
    logging.getLogger("opensora_operator.events").warning("rank %d does not move\nfor 60 s", 3, extra=about)
    (line,) = capsys.readouterr().err.splitlines()
    parsed = json.loads(line)
    assert parsed.pop("time").startswith("20")
    assert parsed == about | {
        "level": "warning",
        "logger": "opensora_operator.events",
        "message": "rank 3 does not move\nfor 60 s",
    }


def test_an_exception_is_part_of_its_line(set_up: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    set_up("json")
    try:
        raise ZeroDivisionError("by hand")
    except ZeroDivisionError:
        logging.getLogger("opensora_operator").exception("this is a bug")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: by hand" in json.loads(line)["exception"]


def test_text_is_for_people(set_up: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    set_up("text")
    logging.getLogger("opensora_operator").info("started", extra={"run": "team/demo", "attempt": 1})
    logging.getLogger("opensora_operator").info("plain")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("INFO    started [run=team/demo attempt=1]")
    assert second.endswith("INFO    plain")


def test_libraries_speak_from_warnings_on(set_up: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    set_up("text")
    logging.getLogger("kopf").info("a handler has been called")
    logging.getLogger("kopf").warning("something is wrong")
    assert capsys.readouterr().err.split(maxsplit=2)[2:] == ["WARNING something is wrong\n"]

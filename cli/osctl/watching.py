"""The live view of one run: a screen that is drawn again, or a line for each change where there is no terminal."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from osctl.client import Client, Object
from osctl.errors import ApiError, ExitCode, OsctlError, UnreachableError
from osctl.output import terminal_width
from osctl.pods import UNSEEN, list_pods
from osctl.session import Session
from osctl.story import as_line, as_text, tell
from osctl.targets import Target, is_over, outcome
from osctl.waiting import versions

if TYPE_CHECKING:  # imported late: lines do without
    from opensora_operator.views import PodView

_TICK_SECONDS = 1.0
"""Ages are drawn again after this time."""
_KEY_SECONDS = 0.1
_PODS_SECONDS = 4.0
"""Pause between looks at the pods: there may be hundreds."""
_LEAVE = b"qQ"


class LeftError(Exception):
    """The person at the terminal has left the view. The run goes on."""


def watch_run(session: Session, target: Target) -> ExitCode:
    """Show a run until it has ended; returns what its end means.

    Raises:
        LeftError: with q or Ctrl-C.
        OsctlError: there is no such run, or none any more.
    """
    try:
        return _draw(session, target) if can_draw() else _print_lines(session, target)
    except KeyboardInterrupt:
        raise LeftError from None


def can_draw() -> bool:
    """Whether stdout is a terminal on which the cursor can be moved."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _print_lines(session: Session, target: Target) -> ExitCode:
    said = ""
    for body in versions(session.client, session.namespace, target, on_trouble=lambda error: _say(session, error)):
        if body is None:
            raise _deleted(target)
        line = as_line(tell(body, None, now=time.time()))
        if line != said:
            session.output.data(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}", flush=True)
            said = line
        if is_over(body):
            return outcome(body)
    raise AssertionError("unreachable")


def _say(session: Session, error: OsctlError) -> None:
    session.output.note(f"{error.message}; trying again")


def _deleted(target: Target) -> OsctlError:
    return OsctlError(f"{target.name} was deleted meanwhile", exit_code=ExitCode.NOT_FOUND)


# -------------------------------------------------------------------------------------------------------------- drawing


def _draw(session: Session, target: Target) -> ExitCode:
    from rich.console import Console  # slow to import, and only a terminal needs it
    from rich.live import Live
    from rich.text import Text

    feed = Feed(session.client, session.namespace, target)
    console = Console(highlight=False, markup=False)
    feed.start()
    try:
        with _Keys() as keys:
            _wait_for(feed, keys)
            with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
                while True:
                    feed.has_news.clear()
                    body = feed.body
                    has_ended = body is not None and is_over(body) and feed.is_complete
                    text = _screen(session, feed)
                    if not has_ended:
                        text = fit(text, shutil.get_terminal_size().lines)
                    live.update(Text.from_ansi(text, no_wrap=True, overflow="crop"), refresh=True)
                    feed.check()
                    if has_ended and body is not None:
                        return outcome(body)
                    keys.wait(_TICK_SECONDS, feed.has_news)
    finally:
        feed.stop()


def _wait_for(feed: Feed, keys: _Keys) -> None:
    """Until there is something to draw."""
    while feed.body is None:
        feed.check()
        keys.wait(_TICK_SECONDS, feed.has_news)
        feed.has_news.clear()


def _screen(session: Session, feed: Feed) -> str:
    assert feed.body is not None
    now = time.time()
    unseen = [UNSEEN] if feed.may_not_see_pods else []
    trouble = feed.trouble
    if trouble is not None:
        unseen.append(f"changes, since {trouble}")
    story = tell(feed.body, feed.pods, now=now, unseen=unseen)
    return as_text(story, width=terminal_width(), now=now, paint=session.output.styled)


def fit(text: str, height: int) -> str:
    """The text in so many lines: its end, which says what to do, stays."""
    lines = text.splitlines()
    if len(lines) < height:
        return text
    end = len(lines) - 1
    while end > 0 and lines[end - 1]:
        end -= 1
    last = lines[end:][: max(1, height - 3)]
    num_first = max(0, height - len(last) - 2)
    return "\n".join([*lines[:num_first], f"... {end - num_first} lines more: make the window higher", *last])


class Feed:
    """Looks at a run and its pods in the background, so that the newest state is always at hand."""

    def __init__(self, client: Client, namespace: str, target: Target) -> None:
        self.body: Object | None = None
        self.pods: list[PodView] | None = []
        self.may_not_see_pods = False
        self.is_complete = False
        """The run is over, and its pods were looked at after that."""
        self.has_news = threading.Event()
        self._namespace = namespace
        self._target = target
        self._clients = (client.another(), client.another())
        self._stopping = threading.Event()
        self._look_now = threading.Event()
        """The pods are looked at without a pause."""
        self._error: Exception | None = None
        self._away: str | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, own), name=work.__name__, daemon=True)
            for work, own in zip((self._follow_run, self._follow_pods), self._clients, strict=True)
        ]

    @property
    def trouble(self) -> str | None:
        """Why nothing new is seen; None where all is well."""
        return self._away

    def start(self) -> None:
        """Begin to look."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End it; what waits for an answer is not waited for for long."""
        self._stopping.set()
        self._look_now.set()
        for client in self._clients:
            client.abort()
        for thread in self._threads:
            thread.join(1.0)

    def check(self) -> None:
        """Raise what has ended the background's work."""
        if self._error is not None:
            raise self._error

    def _guarded(self, work: Callable[[Client], None], client: Client) -> None:
        try:
            work(client)
        except Exception as error:
            if not self._stopping.is_set():
                self._error = error
                self.has_news.set()
        finally:
            client.close()

    def _follow_run(self, client: Client) -> None:
        for body in versions(client, self._namespace, self._target, on_trouble=self._lose, sleep=self._stopping.wait):
            if body is None:
                raise _deleted(self._target)
            is_first, self.body, self._away = self.body is None, body, None
            self.has_news.set()
            if is_first or is_over(body):
                self._look_now.set()
            if is_over(body):
                return

    def _lose(self, error: OsctlError) -> None:
        self._away = error.message
        self.has_news.set()

    def _follow_pods(self, client: Client) -> None:
        self._look_now.wait()
        while not self._stopping.is_set() and self.body is not None:
            self._look_now.clear()
            body = self.body
            self._look_at_pods(client, body)
            self.is_complete = is_over(body) or self.may_not_see_pods
            self.has_news.set()
            if self.is_complete:
                return
            self._look_now.wait(_PODS_SECONDS)

    def _look_at_pods(self, client: Client, body: Object) -> None:
        try:
            self.pods = list_pods(client, self._namespace, body)
        except (UnreachableError, ApiError):
            return  # the one who looks at the run says so
        self.may_not_see_pods = self.pods is None


class _Keys:
    """The keyboard, while a view is open: keys come at once and are not shown. Nothing where there is none."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._before: list[Any] | None = None

    def __enter__(self) -> _Keys:
        with contextlib.suppress(ImportError, OSError, ValueError):
            import termios  # not on Windows, where Ctrl-C alone leaves
            import tty

            fd = sys.stdin.fileno()
            if os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp():  # in the background it would be stopped
                self._before = termios.tcgetattr(fd)
                tty.setcbreak(fd, termios.TCSADRAIN)
                self._fd = fd
        return self

    def __exit__(self, *exception: object) -> None:
        if self._fd is not None and self._before is not None:
            import termios

            with contextlib.suppress(OSError, termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def wait(self, seconds: float, news: threading.Event) -> None:
        """Until there are news, or the time is over. Raises LeftError at q."""
        deadline = time.monotonic() + seconds
        while not news.is_set() and (left := deadline - time.monotonic()) > 0:
            self._poll(min(left, _KEY_SECONDS), news)
        self._poll(0.0, news)

    def _poll(self, seconds: float, news: threading.Event) -> None:
        if self._fd is None:
            news.wait(seconds)
            return
        ready, _, _ = select.select([self._fd], [], [], seconds)
        if ready:
            keys = os.read(self._fd, 64)
            if not keys:
                self._fd = None
            if any(key in _LEAVE for key in keys):
                raise LeftError

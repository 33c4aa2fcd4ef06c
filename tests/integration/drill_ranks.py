"""A rank of training to which something happens: `opensora.train`, run with one event arranged by OPENSORA_DRILL.

OPENSORA_DRILL is "event,phase,count,rank": the event happens when that rank enters that phase for that time, from 1.
Events: `sigterm` (to the launcher), `hang`, `die` (SIGKILL), `eat` (all memory of the cgroup in OPENSORA_DRILL_CGROUP).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opensora import train
from opensora.training.clock import Clock, Phase

EVENT, PHASE, COUNT, RANK = os.environ["OPENSORA_DRILL"].split(",")


def stand_still_for_ever() -> None:
    sys.stderr.write("standing still\n")
    sys.stderr.flush()
    while True:
        time.sleep(60)


def happen() -> None:
    if EVENT == "sigterm":
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)  # until the launcher has passed it on
    elif EVENT == "hang":
        stand_still_for_ever()
    elif EVENT == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif EVENT == "eat":
        (Path(os.environ["OPENSORA_DRILL_CGROUP"]) / "cgroup.procs").write_text(str(os.getpid()))
        time.sleep(2.5)  # the launcher looks now and then
        hoard = []
        while True:
            hoard.append(b"x" * 4 * 2**20)
    else:
        raise ValueError(EVENT)


class DrilledClock(Clock):
    """A clock that lets it happen."""

    entered = 0

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        with super().__call__(phase):
            if phase == PHASE and os.environ["RANK"] == RANK:
                self.entered += 1
                if self.entered == int(COUNT):
                    happen()
            yield


if __name__ == "__main__":
    position = train.Position.__init__
    train.Position.__init__ = lambda self, rank: position(self, rank, DrilledClock())  # type: ignore[method-assign]
    train._exit(train.main(sys.argv[1:]))

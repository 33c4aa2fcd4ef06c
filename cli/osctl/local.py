"""`osctl train --local`: a run on this machine, decided by the operator's planner, with processes instead of pods."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from opensora_operator.plans import Event, Object
from opensora_operator.views import PodView

from osctl import local_state
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.forecast import Files, Forecast, forecast
from osctl.layout import image_of, job_of, layout_of
from osctl.local_cluster import LocalCluster, new_run
from osctl.local_machine import check_python, counted, differences, gpus_for
from osctl.local_pods import LocalPods
from osctl.local_progress import Past, ProgressFile, past_of
from osctl.manifests import RUN
from osctl.output import OutputClosedError, printable
from osctl.session import Session
from osctl.targets import condition, outcome, phase_of
from osctl.validation import schema_of, with_defaults

_TICK_SECONDS = 0.25
_LAST_PROGRESS_SECONDS = 10.0
"""How long the last word of an attempt is waited for."""
_NO_IMAGE = "this-machine"
"""Stands where neither the run nor a profile names an image: there is none here."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """A run that is over."""

    run: Object
    pods: Sequence[PodView]
    code: ExitCode
    """What its end means as the exit code of a command."""


def train_here(session: Session, body: Object, others: Sequence[Object]) -> Outcome:
    """Train on this machine until the run is over.

    Args:
        session: of the command.
        body: the TrainingRun.
        others: what it refers to.

    Raises:
        OsctlError: it cannot be started here.
    """
    name, files = body["metadata"]["name"], Files(others)
    namespace = session.settings.namespace or str(body["metadata"].get("namespace") or "default")
    body = {**body, "spec": with_defaults(body["spec"], schema_of(RUN)["properties"]["spec"])}
    if body["spec"].get("suspend"):
        raise UsageError(f"{name} is suspended: it would never start", hint="leave `suspend` out")
    planned = _plan(body, files, namespace)
    image = image_of(planned)
    check_python()
    gpus = gpus_for(planned)
    with local_state.own_folder(name) as folder, _stop_signals() as asked:
        pods = LocalPods(folder / "pods", files, gpus=gpus, show=lambda line: _show(session, line))
        try:
            _read_as_pods_do(pods.environment(job_of(planned)["spec"]["template"], namespace))
            past = past_of(body["spec"]["runUri"])
            _tell_what_differs(session, planned, body, past, image=None if image == _NO_IMAGE else image)
            body["spec"]["image"] = image
            cluster = LocalCluster(
                new_run(body, namespace=namespace, attempt=past.attempt, saved_step=past.saved_step, now=time.time()),
                files,
                node=socket.gethostname(),
                start=pods.start,
                tell=lambda event: _show(session, f"{name}: {event.reason}: {_first_line(event)}"),
            )
            _Attendance(session, cluster, pods, asked, folder).run()
        finally:
            pods.close()
        return Outcome(cluster.run, cluster.pod_views(), outcome(cluster.run))


def why_it_ended(run: Object) -> str:
    """One line about a run that has not succeeded."""
    failed = condition(run, "Failed")
    words = str(failed.get("message") or "").splitlines()
    return f"{run['metadata']['name']} has failed: {failed.get('reason')}" + (f": {words[0]}" if words else "")


def _plan(body: Object, files: Files, namespace: str) -> Forecast:
    """What the operator makes of the run. Raises OsctlError where that is nothing."""
    planned = forecast(body, files, namespace=namespace)
    if planned.problem is not None and "image" not in body["spec"]:
        with_image = {**body, "spec": {**body["spec"], "image": _NO_IMAGE}}
        planned = forecast(with_image, files, namespace=namespace)
    if planned.problem is not None:
        raise OsctlError(
            f"{body['metadata']['name']}: {planned.problem}",
            hint="with --local, profiles and ConfigMaps come from the run file: put their manifests into it",
        )
    return planned


def _read_as_pods_do(variables: Mapping[str, str]) -> None:
    """This process reads the run directory, so it reaches the object store as the pods do."""
    os.environ.update({name: value for name, value in variables.items() if name.startswith("AWS_")})


def _tell_what_differs(session: Session, planned: Forecast, body: Object, past: Past, *, image: str | None) -> None:
    name, asked = body["metadata"]["name"], layout_of(planned)
    session.output.note(
        f"{name}: {counted(asked.nodes, 'node')} with {counted(asked.ranks, 'rank')} in all, on this machine"
    )
    for words in differences(planned, image=image):
        session.output.note(f"{name}: {words}")
    if past.attempt:
        step = "" if past.saved_step is None else f", step {past.saved_step} is saved"
        session.output.note(
            f"{name}: {body['spec']['runUri']} has {counted(past.attempt, 'attempt')}{step}: "
            f"it goes on with attempt {past.attempt + 1}"
        )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals by which this process is asked to stop, as they come. What is ignored (nohup) stays ignored."""
    asked: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    old = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    for number, handler in old.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, take)
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Attendance:
    """Watches over a run until it is over."""

    def __init__(
        self, session: Session, cluster: LocalCluster, pods: LocalPods, asked: Sequence[int], folder: Path
    ) -> None:
        self._session = session
        self._cluster = cluster
        self._pods = pods
        self._asked = asked
        """The signals to stop that have come."""
        self._folder = folder
        self._name: str = cluster.run["metadata"]["name"]
        self._num_heard = 0
        self._phase = ""
        self._written: tuple[str, ...] = ()

    def run(self) -> None:
        """Until the run is over, and all its processes with it."""
        progress = ProgressFile(self._cluster.run["spec"]["runUri"], self._say)
        while True:
            self._stop_when_asked()
            report = progress.take()
            if report is not None:
                self._cluster.report(report)
            due = self._cluster.reconcile()
            if self._cluster.advance():  # what the attempt said last counts for what is decided about its end
                self._pods.show_rest()
                progress.read_again(seconds=_LAST_PROGRESS_SECONDS)
                continue
            self._tell()
            if self._cluster.is_over:
                return
            self._pods.wait(min(_TICK_SECONDS, due or _TICK_SECONDS))

    def _stop_when_asked(self) -> None:
        if len(self._asked) == self._num_heard:
            return
        if self._num_heard == 0:
            self._say("the ranks finish their step and save; once more ends them at once")
            self._cluster.stop()
        self._num_heard = len(self._asked)
        if self._num_heard > 1:
            self._say("all processes are ended")
            self._cluster.kill()

    def _tell(self) -> None:
        run = self._cluster.run
        phase = phase_of(run)
        if phase != self._phase:
            self._say(phase)
            self._phase = phase
        new = (run["metadata"]["resourceVersion"], *(json.dumps(pod["status"]) for pod in self._cluster.pods))
        if new != self._written:
            local_state.write(self._folder, run, self._cluster.pods)
            self._written = new

    def _say(self, words: str) -> None:
        _show(self._session, f"{self._name}: {words}")


def _show(session: Session, line: str) -> None:
    """The run goes on when nobody reads any more; the run directory has it all."""
    try:
        session.output.note(line)
    except OutputClosedError:
        session.output.quiet = True


def _first_line(event: Event) -> str:
    lines = event.message.splitlines()
    return printable(lines[0]) if lines else ""

"""`osctl train --local`: a run on this machine, decided by the operator's planner, with processes instead of pods."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from opensora.config.train import StorageConfig
from opensora.errors import MissingExtraError, ObjectNotFoundError, StorageError
from opensora.records import PROGRESS_PATH, Verdict, newest_attempt, verdict_path
from opensora.storage import Storage
from opensora_operator.api import TrainingProfileSpec
from opensora_operator.constants import LABEL_KUEUE_QUEUE
from opensora_operator.constants import ExitCode as RankExitCode
from opensora_operator.plans import Event, Object
from opensora_operator.progress import BadReportError, ProgressReport, parse_report
from opensora_operator.views import PodView
from opensora_operator.wire import from_wire

from osctl import local_state
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.forecast import Files, Forecast, forecast
from osctl.local_cluster import LocalCluster, new_run
from osctl.local_pods import LocalPods
from osctl.manifests import RUN
from osctl.output import OutputClosedError, printable
from osctl.resolved import config_of
from osctl.session import Session
from osctl.targets import condition, outcome, phase_of
from osctl.validation import schema_of, with_defaults

_TICK_SECONDS = 0.25
_PROGRESS_SECONDS = 1.0
"""How often `progress.json` is read; it is written as often."""
_LAST_PROGRESS_SECONDS = 10.0
"""How long the last word of an attempt is waited for."""
_FIRST_LOOK_SECONDS = 30.0
"""How long a store that does not answer is tried before anything is started."""
_IMAGE = "this-machine"
"""Stands where the run names no image, and no profile does."""
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
    files = Files(others)
    name = body["metadata"]["name"]
    namespace = session.settings.namespace or str(body["metadata"].get("namespace") or "default")
    spec = with_defaults(body["spec"], schema_of(RUN)["properties"]["spec"])
    if spec.get("suspend"):
        raise UsageError(f"{name} is suspended: it would never start", hint="leave `suspend` out")
    planned = _plan(body, spec, files, namespace)
    spec.setdefault("image", _image_of(planned))
    template = _job_of(planned)["spec"]["template"]
    _check_python()
    per_pod, gpus = _gpus_for(planned)
    with local_state.own_folder(name) as folder, _signals() as asked:
        pods = LocalPods(
            folder / "pods",
            files,
            gpus=gpus,
            gpus_per_pod=per_pod,
            show=lambda line: _show(session, line),
        )
        try:
            _use_store_of(pods.environment(template, namespace))
            past = _past_of(spec["runUri"])
            body = {**body, "spec": spec}
            run = new_run(
                body, namespace=namespace, attempt=past.attempt, saved_step=past.saved_step, now=time.time()
            )
            cluster = LocalCluster(
                run,
                files,
                node=socket.gethostname(),
                start=pods.start,
                tell=lambda event: _show(session, f"{name}: {event.reason}: {_first_line(event)}"),
            )
            for words in _differences(planned, spec, past):
                session.output.note(f"{name}: {words}")
            _Attendance(session, cluster, pods, asked, folder).run()
        finally:
            pods.close()
        return Outcome(cluster.run, cluster.pod_views(), outcome(cluster.run))


def why_it_ended(run: Object) -> str:
    """One line about a run that has not succeeded."""
    failed = condition(run, "Failed")
    words = str(failed.get("message") or "").splitlines()
    return f"{run['metadata']['name']} has failed: {failed.get('reason')}" + (f": {words[0]}" if words else "")


# -------------------------------------------------------------------------------------------------- before the start


def _plan(body: Object, spec: Object, files: Files, namespace: str) -> Forecast:
    """What the operator makes of the run. Raises OsctlError where that is nothing."""
    named = {**body, "spec": spec}
    planned = forecast(named, files, namespace=namespace)
    if planned.problem is not None and "image" not in spec:
        planned = forecast({**named, "spec": {**spec, "image": _IMAGE}}, files, namespace=namespace)
    if planned.problem is not None:
        raise OsctlError(
            f"{body['metadata']['name']}: {planned.problem}",
            hint="with --local, profiles and ConfigMaps come from the run file: put their manifests into it",
        )
    return planned


def _job_of(planned: Forecast) -> Object:
    return next(body for body in planned.objects if body["kind"] == "Job")


def _container_of(planned: Forecast) -> Object:
    container: Object = _job_of(planned)["spec"]["template"]["spec"]["containers"][0]
    return container


def _image_of(planned: Forecast) -> str:
    return str(_container_of(planned)["image"])


def _check_python() -> None:
    if os.name != "posix":
        raise OsctlError("--local needs Linux or macOS", hint="use WSL, or a cluster")
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("training on this machine", extra="train")


def _gpus_for(planned: Forecast) -> tuple[int, list[str] | None]:
    """GPUs of each pod, and all that may be used: none where the config says so, None where it is all the same.

    Raises:
        OsctlError: this machine has fewer.
    """
    config = config_of(planned)
    device = "auto" if config is None else config.device
    job = _job_of(planned)
    container = job["spec"]["template"]["spec"]["containers"][0]
    num_pods = int(job["spec"]["completions"])
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    limits = container.get("resources", {}).get("limits", {})
    asked = int(limits.get(_accelerator_of(planned), 0))
    there = gpus_here()
    if device == "cpu":
        return 0, []
    if not asked and not there and device == "auto":
        return 0, None
    per_pod = asked or int(variables["OPENSORA_NPROC_PER_NODE"])
    if num_pods * per_pod > len(there):
        nodes = "1 node" if num_pods == 1 else f"{num_pods} nodes"
        raise OsctlError(
            f"{nodes} with {per_pod} GPUs each are {num_pods * per_pod} GPUs, and this machine has {len(there)}",
            hint="ask for fewer with --nodes and --procs-per-node, or train on the CPU with --set device=cpu",
            exit_code=ExitCode.NO_CAPACITY,
        )
    return per_pod, there


def _accelerator_of(planned: Forecast) -> str:
    data = next(body for body in planned.objects if body["kind"] == "ConfigMap")["data"]
    return from_wire(TrainingProfileSpec, json.loads(data["profile.json"])).accelerator.resource


def gpus_here(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """The GPUs of this machine, as `CUDA_VISIBLE_DEVICES` names them: those that it names already, or else all."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        words = [word.strip() for word in given.split(",")]
        return words[: words.index("-1")] if "-1" in words else [word for word in words if word]
    found = [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return [str(number) for number in range(len(found))]


def _use_store_of(variables: Mapping[str, str]) -> None:
    """This process reads the run directory as the ranks do."""
    os.environ.update({name: value for name, value in variables.items() if name.startswith("AWS_")})


@dataclass(frozen=True)
class _Past:
    """What a run directory has already."""

    attempt: int
    saved_step: int | None


def _past_of(run_uri: str) -> _Past:
    run = Storage(run_uri, config=StorageConfig(retry_deadline_seconds=_FIRST_LOOK_SECONDS))
    attempt = newest_attempt(run)
    if not attempt:
        return _Past(0, None)
    steps = [_read_json(run, PROGRESS_PATH).get("checkpoint_step")]
    try:
        verdict = Verdict.from_json(run.read(verdict_path(attempt)))
    except (ObjectNotFoundError, ValueError):
        pass  # it was killed, or it runs elsewhere and is superseded now
    else:
        if verdict.first is not None and verdict.first.code == RankExitCode.STOPPED:
            steps.append(verdict.first.step)
    return _Past(attempt, max((step for step in steps if isinstance(step, int)), default=None))


def _read_json(run: Storage, path: str) -> Mapping[str, Any]:
    try:
        value = json.loads(run.read(path))
    except (ObjectNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _differences(planned: Forecast, spec: Object, past: _Past) -> Iterator[str]:
    """What is not as in the cluster, in words."""
    job = _job_of(planned)
    pod, container = job["spec"]["template"]["spec"], _container_of(planned)
    nodes = int(job["spec"]["completions"])
    ranks = nodes * int(next(env["value"] for env in container["env"] if env["name"] == "OPENSORA_NPROC_PER_NODE"))
    yield f"{nodes} {'node' if nodes == 1 else 'nodes'}, {ranks} {'rank' if ranks == 1 else 'ranks'} on this machine"
    if past.attempt:
        step = f" after step {past.saved_step}" if past.saved_step else ""
        yield f"{spec['runUri']} has {past.attempt} attempts: attempt {past.attempt + 1} goes on{step}"
    own = [volume["name"] for volume in pod["volumes"] if not volume["name"].startswith("opensora-")]
    limits = [name for name in container.get("resources", {}).get("limits", {}) if "/" not in name]
    secrets = [source["secretRef"]["name"] for source in container.get("envFrom", ()) if "secretRef" in source]
    placed = any(key in pod for key in ("affinity", "nodeSelector", "schedulerName", "runtimeClassName"))
    if secrets:
        yield f"what Secret {', '.join(secrets)} holds is taken from your environment"
    kinds = {body["kind"] for body in planned.objects}
    ignored = [
        f"the image {container['image']} (the ranks run with {sys.executable})" if container["image"] != _IMAGE else "",
        f"limits of {' and '.join(limits)}" if limits else "",
        f"the queue {job['metadata']['labels'][LABEL_KUEUE_QUEUE]}" if job["spec"]["suspend"] else "",
        "placement" if placed else "",
        "the NetworkPolicy" if "NetworkPolicy" in kinds else "",
        f"volumes {', '.join(own)}: what the config reads there has to be on this machine" if own else "",
    ]
    yield "without effect here: " + ", ".join(["own /dev/shm and /tmp of each node", *filter(None, ignored)])


# ------------------------------------------------------------------------------------------------- while it runs


@contextmanager
def _signals() -> Iterator[list[int]]:
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


@dataclass
class _Attendance:
    """Watches over a run until it is over."""

    session: Session
    cluster: LocalCluster
    pods: LocalPods
    asked: list[int]
    folder: Path
    _num_asked: int = 0
    _phase: str = ""
    _written: tuple[str, ...] = field(default=())

    def run(self) -> None:
        """Until the run is over, and all its processes with it."""
        progress = _Progress(self.cluster.run["spec"]["runUri"], lambda words: _show(self.session, words))
        while True:
            self._stop_when_asked()
            for report in progress.news():
                self.cluster.report(report)
            due = self.cluster.reconcile()
            if self.cluster.advance():
                progress.read_again(seconds=_LAST_PROGRESS_SECONDS)
                continue
            self._tell()
            if self.cluster.is_over:
                return
            self.pods.wait(min(_TICK_SECONDS, due or _TICK_SECONDS))

    def _stop_when_asked(self) -> None:
        if len(self.asked) == self._num_asked:
            return
        name = self.cluster.run["metadata"]["name"]
        if self._num_asked == 0:
            _show(self.session, f"{name}: the ranks finish their step and save; ask once more to end them at once")
            self.cluster.stop()
        if len(self.asked) > 1:
            _show(self.session, f"{name}: ending all processes")
            self.cluster.kill()
        self._num_asked = len(self.asked)

    def _tell(self) -> None:
        run = self.cluster.run
        phase = phase_of(run)
        if phase != self._phase:
            _show(self.session, f"{run['metadata']['name']}: {phase}")
            self._phase = phase
        new = (run["metadata"]["resourceVersion"], *(json.dumps(pod["status"]) for pod in self.cluster.pods))
        if new != self._written:
            local_state.write(self.folder, run, self.cluster.pods)
            self._written = new


class _Progress:
    """Reads `progress.json` in a thread of its own: a store that does not answer holds nothing up.

    Args:
        run_uri: the run directory.
        complain: is told once that it cannot be read, until it can again.
    """

    def __init__(self, run_uri: str, complain: Any) -> None:
        self._run = Storage(run_uri)
        self._complain = complain
        self._changed = threading.Condition()
        self._num_asked = 0
        self._num_read = 0
        self._sequence = 0
        self._newest: ProgressReport | None = None
        threading.Thread(target=self._read_for_ever, name="progress", daemon=True).start()

    def news(self) -> list[ProgressReport]:
        """The newest report, when there is one that was not given before."""
        with self._changed:
            newest, self._newest = self._newest, None
        return [] if newest is None else [newest]

    def read_again(self, *, seconds: float) -> None:
        """Wait until it has been read once more."""
        with self._changed:
            self._num_asked += 1
            asked = self._num_asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_read >= asked, seconds)

    def _read_for_ever(self) -> None:
        works = True
        while True:
            with self._changed:
                asked = self._num_asked
            report = None
            try:
                report = self._read()
                works = True
            except StorageError as error:
                if works:
                    self._complain(f"progress cannot be read: {error.message}")
                works = False
            with self._changed:
                self._newest = report or self._newest
                self._num_read = asked
                self._changed.notify_all()
                self._changed.wait_for(lambda asked=asked: self._num_asked > asked, _PROGRESS_SECONDS)

    def _read(self) -> ProgressReport | None:
        """The report as rank 0 would send it: the file has the same content, and this counts for its own clock."""
        content = dict(_read_json(self._run, PROGRESS_PATH))
        if not content:
            return None
        self._sequence += 1
        message = json.dumps({**content, "sequence": self._sequence}).encode()
        try:
            return parse_report(message, pod_uid="", received=time.time())
        except BadReportError:  # written by another version
            return None


def _show(session: Session, line: str) -> None:
    """The run goes on when nobody reads any more; the run directory has it all."""
    try:
        session.output.note(line)
    except OutputClosedError:
        session.output.quiet = True


def _first_line(event: Event) -> str:
    lines = event.message.splitlines()
    return printable(lines[0]) if lines else ""

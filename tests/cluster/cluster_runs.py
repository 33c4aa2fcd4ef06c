"""TrainingRuns and their like on a cluster, as the tests there start, watch and break them."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import yaml
from installation import BUCKET, CATALOGUE, NAMESPACE, Installation, Object, said, until
from training_runs import CONFIG

from opensora.checkpoint.manifest import scan_checkpoints
from opensora.errors import ObjectNotFoundError
from opensora.quickstart.training import read_progress
from opensora.storage import Storage

STEPS = 24
SAVE_EVERY = 4
END_SECONDS = 400.0
"""For a run, or an attempt of it, to come to its end; a tenth of that on an idle machine."""


class Watched:
    """An object of one of our kinds, and what belongs to it."""

    def __init__(self, installation: Installation, kind: str, name: str) -> None:
        self.installation = installation
        self.kind = kind
        self.name = name
        self._plane = installation.control_plane

    def submit(self, spec: Object) -> None:
        """Create it."""
        body = {
            "apiVersion": "opensora.dev/v1alpha1",
            "kind": self.kind,
            "metadata": {"name": self.name, "namespace": NAMESPACE},
            "spec": spec,
        }
        self._plane.request("POST", self._path.rpartition("/")[0], body)

    def edit(self, **spec: Any) -> None:
        """Change fields of the spec."""
        self._plane.request("PATCH", self._path, {"spec": spec}, content_type="application/merge-patch+json")

    def delete(self) -> None:
        """Delete it, and wait until its pods are gone."""
        self._plane.kubectl("delete", self.kind, self.name, f"--namespace={NAMESPACE}", "--ignore-not-found")
        for pod in self.pods():
            self._plane.kubectl(
                "delete", "pod", pod["metadata"]["name"], f"--namespace={NAMESPACE}", "--ignore-not-found",
                "--grace-period=1", "--wait=false",
            )  # fmt: skip
        until(lambda: not self.pods(), seconds=60, what=f"pods of {self.name} gone")

    # What is there

    @property
    def _path(self) -> str:
        plural = "batchsearches" if self.kind == "BatchSearch" else f"{self.kind.lower()}s"
        return f"/apis/opensora.dev/v1alpha1/namespaces/{NAMESPACE}/{plural}/{self.name}"

    @property
    def status(self) -> Object:
        return self._plane.request("GET", self._path).get("status") or {}

    def condition(self, kind: str) -> Object:
        return next((found for found in self.status.get("conditions", ()) if found["type"] == kind), {})

    def pods(self, attempt: int | None = None) -> list[Object]:
        selector = f"opensora.dev/name={self.name}" + ("" if attempt is None else f",opensora.dev/attempt={attempt}")
        path = f"/api/v1/namespaces/{NAMESPACE}/pods?labelSelector={selector.replace('/', '%2F')}"
        return sorted(self._plane.request("GET", path)["items"], key=lambda pod: str(pod["metadata"]["name"]))

    def events(self) -> list[tuple[str, str]]:
        """Reasons and messages of the operator's events about it."""
        listed = self._plane.request("GET", f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events")["items"]
        mine = [event for event in listed if event["regarding"].get("name") == self.name]
        return [(event["reason"], event["note"]) for event in mine if event["regarding"]["kind"] == self.kind]

    # What happens

    def until(self, check: Callable[[], Any], *, what: str, seconds: float = END_SECONDS) -> Any:
        """Wait until a check gives something true, and return it. What is over does nothing any more."""

        def check_or_end() -> Any:
            if found := check():
                return found
            phase = self.status.get("phase")
            if phase in ("Succeeded", "Failed") and not (found := check()):
                raise AssertionError(f"{self.name} is {phase}, and waited for: {what}")
            return found

        return until(check_or_end, seconds=seconds, what=f"{self.name}: {what}")

    def until_phase(self, phase: str, *, seconds: float = END_SECONDS) -> Object:
        """Wait for a phase, and return the status."""

        def check() -> Object | None:
            status = self.status
            return status if status.get("phase") == phase else None

        found: Object = self.until(check, what=f"phase {phase}", seconds=seconds)
        return found

    def describe(self) -> str:
        """All that helps to find out what went wrong."""
        where, selector = f"--namespace={NAMESPACE}", f"--selector=opensora.dev/name={self.name}"
        commands = [
            ("get", self.kind, self.name, where, "--output=yaml"),
            ("get", "jobs,pods", where, "--output=wide"),
            ("get", "events", where, "--sort-by=.lastTimestamp"),
            ("logs", where, selector, "--tail=40", "--prefix"),
        ]
        return "\n".join(
            [*(said(self._plane, *command) for command in commands), self.installation.describe_operator()]
        )


class ClusterRun(Watched):
    """A TrainingRun of two pods with two ranks each, unless its spec says otherwise."""

    def __init__(self, installation: Installation, name: str) -> None:
        super().__init__(installation, "TrainingRun", name)
        self.storage = Storage(f"s3://{BUCKET}/runs/{name}")

    # What a user does

    def create(self, *overrides: str, config: Object | None = None, **spec: Any) -> ClusterRun:
        """`overrides` are those of the config; `config` replaces it; `spec` adds to the spec."""
        self.submit(
            {
                "runUri": self.storage.uri,
                "config": {"inline": yaml.safe_dump(config or small_config()), "overrides": list(overrides)},
                "nodes": 2,
                "checkpoint": {"everySteps": SAVE_EVERY},
                "restartPolicy": {"backoff": {"baseSeconds": 0, "maxSeconds": 0}, "noProgressAttempts": 10},
                "deadlines": {"stuckPodSeconds": 10},
                "watchdog": {"heartbeatSeconds": 5},
                "terminationGracePeriodSeconds": 30,
                **spec,
            }
        )
        return self

    # What is there

    def pod(self, index: int, *, attempt: int) -> Object:
        """A pod by its number in the Job."""
        label = "batch.kubernetes.io/job-completion-index"
        return next(pod for pod in self.pods(attempt) if pod["metadata"]["labels"][label] == str(index))

    def losses(self) -> dict[int, float]:
        """Step → loss; of a step that was done twice, the later one."""
        return {step: loss for _, step, loss in self._written()}

    def steps(self) -> dict[int, list[int]]:
        """Attempt → the steps that it has done."""
        found: dict[int, list[int]] = {}
        for attempt, step, _ in self._written():
            found.setdefault(attempt, []).append(step)
        return found

    def saved_step(self, *, attempt: int) -> int:
        """The step of the newest complete checkpoint of an attempt."""
        return max(info.step for info in scan_checkpoints(self.storage).complete if info.attempt == attempt)

    def _written(self) -> list[tuple[int, int, float]]:
        """(attempt, step, loss) as the run directory has them."""
        found = []
        for path in (info.path for info in self.storage.list("metrics") if info.path.endswith(".jsonl")):
            attempt = int(path.split("/")[1].removeprefix("attempt-"))
            records = [json.loads(line) for line in self.storage.read(path).splitlines()]
            found += [(attempt, record["step"], record["loss"]) for record in records if "loss" in record]
        return sorted(found)

    # What happens

    def until_step(self, step: int, *, attempt: int) -> int:
        """Wait until an attempt has done a step, and return the one that it has got to.

        The run directory tells sooner than the status, which is written every ten seconds.
        """

        def check() -> int:
            try:
                self.storage.read(f"attempts/{attempt}/started.json")
            except ObjectNotFoundError:
                return 0
            progress = read_progress(self.storage)
            done = progress.get("step", 0) if progress.get("attempt") == attempt else 0
            return done if done >= step else 0

        found: int = self.until(check, what=f"step {step} of attempt {attempt}")
        return found

    @contextlib.contextmanager
    def frozen(self, *, attempt: int) -> Iterator[None]:
        """The ranks of an attempt that run stand still meanwhile, on whatever node they are."""
        ranks = self.installation.ranks(self.name, attempt=attempt)
        for rank in ranks.values():
            rank.suspend()
        try:
            yield
        finally:
            for rank in ranks.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.resume()

    def until_attempt_ended(self, attempt: int, *, seconds: float = END_SECONDS) -> Object:
        """Wait until the operator has closed an attempt, and return its record."""

        def check() -> Object | None:
            records = self.status.get("attempts", ())
            return next((one for one in records if one["number"] == attempt and one.get("endedAt")), None)

        found: Object = self.until(check, what=f"end of attempt {attempt}", seconds=seconds)
        return found


def small_config() -> Object:
    config = copy.deepcopy(CONFIG)
    del config["checkpoint"]  # the spec says it
    config["data"] = {"path": CATALOGUE, "bucket_config": {"144p": {"17": [1.0, 2]}}, "repeats": 8}
    train: Any = config["train"]
    train |= {"steps": STEPS, "log_every": 1}
    return config

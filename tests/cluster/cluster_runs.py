"""TrainingRuns on a cluster, as the tests there start, watch and break them."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import yaml
from installation import BUCKET, CATALOGUE, NAMESPACE, Installation, Object, said, until
from training_runs import CONFIG

from opensora.errors import ObjectNotFoundError
from opensora.quickstart.training import read_progress
from opensora.storage import Storage

STEPS = 24
SAVE_EVERY = 4
END_SECONDS = 240.0
"""For a run, or an attempt of it, to come to its end; a tenth of that on an idle machine."""
_RUNS = f"/apis/opensora.dev/v1alpha1/namespaces/{NAMESPACE}/trainingruns"


class ClusterRun:
    """A TrainingRun of two pods with two ranks each, unless its spec says otherwise."""

    def __init__(self, installation: Installation, name: str) -> None:
        self.installation = installation
        self.name = name
        self.storage = Storage(f"s3://{BUCKET}/runs/{name}")
        self._plane = installation.control_plane

    # What a user does

    def create(self, *overrides: str, config: Object | None = None, **spec: Any) -> ClusterRun:
        """`overrides` are those of the config; `config` replaces it; `spec` adds to the spec."""
        body = {
            "apiVersion": "opensora.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": self.name, "namespace": NAMESPACE},
            "spec": {
                "runUri": self.storage.uri,
                "config": {"inline": yaml.safe_dump(config or _config()), "overrides": list(overrides)},
                "nodes": 2,
                "checkpoint": {"everySteps": SAVE_EVERY},
                "restartPolicy": {"backoff": {"baseSeconds": 0, "maxSeconds": 0}, "noProgressAttempts": 10},
                "deadlines": {"stuckPodSeconds": 10},
                "watchdog": {"heartbeatSeconds": 5},
                "terminationGracePeriodSeconds": 30,
                **spec,
            },
        }
        self._plane.request("POST", _RUNS, body)
        return self

    def edit(self, **spec: Any) -> None:
        """Change fields of the spec."""
        self._plane.request("PATCH", self._path, {"spec": spec}, content_type="application/merge-patch+json")

    def delete(self) -> None:
        """Delete the run, and wait until its pods are gone."""
        self._plane.kubectl("delete", "trainingrun", self.name, f"--namespace={NAMESPACE}", "--ignore-not-found")
        for pod in self.pods():
            self._plane.kubectl(
                "delete", "pod", pod["metadata"]["name"], f"--namespace={NAMESPACE}", "--ignore-not-found",
                "--grace-period=1", "--wait=false",
            )  # fmt: skip
        until(lambda: not self.pods(), seconds=60, what=f"pods of {self.name} gone")

    # What is there

    @property
    def _path(self) -> str:
        return f"{_RUNS}/{self.name}"

    @property
    def status(self) -> Object:
        return self._plane.request("GET", self._path).get("status") or {}

    def condition(self, kind: str) -> Object:
        return next((found for found in self.status.get("conditions", ()) if found["type"] == kind), {})

    def record(self, attempt: int) -> Object:
        """What the status says of an attempt."""
        return next(record for record in self.status["attempts"] if record["number"] == attempt)

    def pods(self, attempt: int | None = None) -> list[Object]:
        selector = f"opensora.dev/name={self.name}" + ("" if attempt is None else f",opensora.dev/attempt={attempt}")
        path = f"/api/v1/namespaces/{NAMESPACE}/pods?labelSelector={selector.replace('/', '%2F')}"
        return sorted(self._plane.request("GET", path)["items"], key=lambda pod: str(pod["metadata"]["name"]))

    def pod(self, index: int, *, attempt: int) -> Object:
        """A pod by its number in the Job."""
        label = "batch.kubernetes.io/job-completion-index"
        return next(pod for pod in self.pods(attempt) if pod["metadata"]["labels"][label] == str(index))

    def events(self) -> list[tuple[str, str]]:
        """Reasons and messages of the operator's events about the run."""
        listed = self._plane.request("GET", f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events")["items"]
        mine = [event for event in listed if event["regarding"].get("name") == self.name]
        return [(event["reason"], event["note"]) for event in mine if event["regarding"]["kind"] == "TrainingRun"]

    def losses(self) -> dict[int, float]:
        """Step → loss; of a step that was done twice, the later one."""
        found: dict[int, float] = {}
        for record in self._metrics():
            found[record["step"]] = record["loss"]
        return found

    def steps_of(self, attempt: int) -> list[int]:
        """The steps whose loss an attempt has written down."""
        return sorted(record["step"] for record in self._metrics(attempt))

    def _metrics(self, attempt: int | None = None) -> list[Object]:
        folder = "metrics" if attempt is None else f"metrics/attempt-{attempt}"
        paths = sorted(info.path for info in self.storage.list(folder) if info.path.endswith(".jsonl"))
        records = [json.loads(line) for path in paths for line in self.storage.read(path).splitlines()]
        return [record for record in records if "loss" in record]

    # What happens

    def until(self, check: Callable[[], Any], *, what: str, seconds: float = END_SECONDS) -> Any:
        """Wait for something, which comes before the run ends for good unless it is that."""
        return until(check, seconds=seconds, what=f"{self.name}: {what}")

    def until_phase(self, phase: str, *, seconds: float = END_SECONDS) -> Object:
        """Wait for a phase, and return the status. No phase follows those of the end."""

        def check() -> Object | None:
            status = self.status
            reached = status.get("phase")
            if reached in ("Succeeded", "Failed") and reached != phase:
                raise AssertionError(f"{self.name} is {reached} and not {phase}")
            return status if reached == phase else None

        found: Object = self.until(check, what=f"phase {phase}", seconds=seconds)
        return found

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

    def until_attempt_ended(self, attempt: int, *, seconds: float = END_SECONDS) -> Object:
        """Wait until the operator has closed an attempt, and return its record."""

        def check() -> Object | None:
            record = self.record(attempt) if self.status.get("attempts") else {}
            return record if record.get("endedAt") else None

        found: Object = self.until(check, what=f"end of attempt {attempt}", seconds=seconds)
        return found

    def describe(self) -> str:
        """All that helps to find out what went wrong."""
        where, selector = f"--namespace={NAMESPACE}", f"--selector=opensora.dev/name={self.name}"
        commands = [
            ("get", "trainingrun", self.name, where, "--output=yaml"),
            ("get", "jobs,pods", where, "--output=wide"),
            ("get", "events", where, "--sort-by=.lastTimestamp"),
            ("logs", where, selector, "--tail=40", "--prefix"),
        ]
        return "\n".join(
            [*(said(self._plane, *command) for command in commands), self.installation.describe_operator()]
        )


def _config() -> Object:
    config = copy.deepcopy(CONFIG)
    del config["checkpoint"]  # the spec says it
    config["data"] = {"path": CATALOGUE, "bucket_config": {"144p": {"17": [1.0, 2]}}, "repeats": 8}
    train: Any = config["train"]
    train |= {"steps": STEPS, "log_every": 1}
    return config

"""TrainingRuns and their like on a cluster, as the tests there start, watch and break them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
from control_plane import ApiError
from installation import BUCKET, CATALOGUE, NAMESPACE, Installation, Object, said, until
from run_assertions import Observed, ObservedRun, small_config, small_spec

from opensora.storage import Storage


class Watched(Observed):
    """An object of one of our kinds, and what belongs to it."""

    transient = (ApiError, OSError, KeyError)

    def __init__(self, installation: Installation, kind: str, name: str) -> None:
        super().__init__(name)
        self.installation = installation
        self.kind = kind
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


class ClusterRun(Watched, ObservedRun):
    """A TrainingRun of two pods with two ranks each, unless its spec says otherwise."""

    def __init__(self, installation: Installation, name: str) -> None:
        super().__init__(installation, "TrainingRun", name)
        self.storage = Storage(f"s3://{BUCKET}/runs/{name}")

    # What a user does

    def create(self, *overrides: str, config: Object | None = None, **spec: Any) -> ClusterRun:
        """`overrides` are those of the config; `config` replaces it; `spec` adds to the spec."""
        self.submit(small_spec(self.storage.uri, config or small_config(CATALOGUE), *overrides, **spec))
        return self

    # What is there

    def pod(self, index: int, *, attempt: int) -> Object:
        """A pod by its number in the Job."""
        label = "batch.kubernetes.io/job-completion-index"
        return next(pod for pod in self.pods(attempt) if pod["metadata"]["labels"][label] == str(index))

    def ranks(self, *, attempt: int) -> dict[int, psutil.Process]:
        """The processes of an attempt by their rank, on whatever node."""
        return self.installation.ranks(self.name, attempt=attempt)

    # What happens

    @contextlib.contextmanager
    def frozen(self, *, attempt: int) -> Iterator[None]:
        """The ranks of an attempt that run stand still meanwhile, on whatever node they are."""
        ranks = self.ranks(attempt=attempt)
        for rank in ranks.values():
            rank.suspend()
        try:
            yield
        finally:
            for rank in ranks.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.resume()

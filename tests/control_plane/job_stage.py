"""SampleJobs and BatchSearches on the stage of `stage.py`."""

from __future__ import annotations

import json
from typing import Any

from stage import API, Object, Stage, now, set_status

CONFIG = "data: {bucket_config: {144p: {1: [1.0, 1], 17: [1.0, 1]}}}\ntrain: {steps: 10}\n"
SAMPLE: Object = {
    "checkpoint": {"uri": "s3://bucket/demo"},
    "image": "example.com/opensora:1",
    "prompts": {"inline": [f"cat {number}" for number in range(6)]},
    "promptsPerShard": 2,
    "workers": 2,
    "outputUri": "s3://bucket/clips",
}
SEARCH: Object = {
    "image": "example.com/opensora:1",
    "config": {"inline": CONFIG},
    "memoryBudget": "1Gi",
    "parallelTrials": 1,
}


class JobStage(Stage):
    """One SampleJob or BatchSearch in a namespace of its own."""

    def __init__(self, stage: Stage, kind: str, plural: str, spec: Object) -> None:
        super().__init__(stage.control_plane, stage.kubelets, stage.namespace, name="demo")
        self.kind, self.plural, self.spec = kind, plural, spec

    def create(self, **spec: Any) -> Stage:
        body = {"apiVersion": "opensora.dev/v1alpha1", "kind": self.kind, "metadata": {"name": self.name}}
        path = f"{API}/namespaces/{self.namespace}/{self.plural}"
        given = {key: value for key, value in {**self.spec, **spec}.items() if value is not None}
        self.request("POST", path, {**body, "spec": given})
        return self

    @property
    def _path(self) -> str:
        return f"{API}/namespaces/{self.namespace}/{self.plural}/{self.name}"

    def running_pod(self, index: int = 0) -> Object:
        """A pod that runs, of an index."""

        def find() -> Object | None:
            for pod in self.pods():
                number = pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]
                if number == str(index) and pod.get("status", {}).get("phase") == "Running":
                    return pod
            return None

        pod: Object = self.until(find, what=f"a running pod of index {index}")
        return pod

    def running_probe(self, number: int) -> Object | None:
        """The pod of a probe, once it runs."""
        return next((pod for pod in self.pods(number) if pod.get("status", {}).get("phase") == "Running"), None)

    def end_pod(self, pod: Object, code: int, message: str, *, reason: str = "Error") -> None:
        terminated = {"exitCode": code, "finishedAt": now(), "startedAt": now(), "reason": reason, "message": message}
        set_status(self.control_plane, pod, "Failed" if code else "Succeeded", {"terminated": terminated})


def verdict(code: int, message: str) -> str:
    return json.dumps({"code": code, "message": message})


def report(bucket: str, **values: Any) -> str:
    """What a probe says."""
    known = {"bucket": bucket, "known": "1:5:0.1", "trying": None, "batch_size": None, "peak_bytes": None}
    rest = {"seconds_per_step": None, "empty_bytes": 7, "facts": {"accelerator": "cpu"}, "reason": "", "code": 0}
    return json.dumps({**known, **rest, **values})

"""The operator with a planner of a few lines: what is tested with it is the runtime.

    python tests/control_plane/small_operator.py [flags of opensora-operator]

A run gets a Service and one Job. Its status counts the live pods. A Job that failed gives way to the next attempt.
"""

from __future__ import annotations

import sys
from typing import Any

from opensora_operator.__main__ import Operator, run
from opensora_operator.constants import API_VERSION, LABEL_ATTEMPT, LABEL_KIND, LABEL_NAME, LABEL_UID
from opensora_operator.kinds import Kind
from opensora_operator.observation import Observation
from opensora_operator.plans import Create, Event, Needs, Object, Plan


def needs(body: Object) -> Needs:
    return Needs()


def plan(seen: Observation) -> Plan:
    body = seen.body
    name = body["metadata"]["name"]
    old = body.get("status") or {}
    attempt = old.get("attempt", 1)
    jobs = {job.attempt: job for job in seen.jobs}
    job = jobs.get(attempt)
    if job is not None and (job.condition("FailureTarget") or job.condition("Failed")):
        status = {**old, "phase": "Restarting", "attempt": attempt + 1}
        event = Event(reason="WorkerFailed", message=f"attempt {attempt} has failed", warning=True)
        return Plan(status=status, is_decision=True, events=(event,))
    live = sum(pod.is_live for pod in seen.pods if pod.attempt == attempt)
    phase = "Pending" if job is None else "Succeeded" if job.condition("Complete") else "Running"
    status = {**old, "phase": phase, "attempt": attempt, "job": f"{name}-a{attempt}"}
    status["nodes"] = {"desired": body["spec"]["nodes"], "ready": live, "summary": f"{live}/{body['spec']['nodes']}"}
    if job is None:
        created = (Create(manifest=_service(body)), Create(manifest=_job(body, attempt)))
        return Plan(status=status, actions=created[attempt > 1 :])
    return Plan(status=status)


def _service(body: Object) -> Object:
    spec: dict[str, Any] = {"clusterIP": "None", "selector": {LABEL_UID: body["metadata"]["uid"]}}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(body, body["metadata"]["name"], 0),
        "spec": spec,
    }


def _job(body: Object, attempt: int) -> Object:
    metadata = _metadata(body, f"{body['metadata']['name']}-a{attempt}", attempt)
    nodes = body["spec"]["nodes"]
    container = {"name": "trainer", "image": body["spec"]["image"]}
    rule = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [75]}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "parallelism": nodes,
            "completions": nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": [rule]},
            "template": {
                "metadata": {"labels": metadata["labels"]},
                "spec": {"restartPolicy": "Never", "containers": [container], "terminationGracePeriodSeconds": 0},
            },
        },
    }


def _metadata(body: Object, name: str, attempt: int) -> Object:
    owner = body["metadata"]
    return {
        "name": name,
        "namespace": owner["namespace"],
        "labels": {
            LABEL_KIND: body["kind"],
            LABEL_NAME: owner["name"],
            LABEL_UID: owner["uid"],
            LABEL_ATTEMPT: str(attempt),
        },
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": body["kind"],
                "name": owner["name"],
                "uid": owner["uid"],
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ],
    }


SMALL_KINDS = {"TrainingRun": Kind(needs=needs, plan=plan)}

if __name__ == "__main__":
    sys.exit(run(lambda settings: Operator(settings, kinds=SMALL_KINDS), sys.argv[1:]))

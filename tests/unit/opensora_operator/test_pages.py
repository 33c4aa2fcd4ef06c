"""docs/reference/faults.md and the operator's other pages say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from opensora_operator.api import Cleanup, Deadlines, RestartPolicy, Watchdog
from opensora_operator.metrics import METRICS
from opensora_operator.policies.causes import RULES, cause_of
from opensora_operator.policies.restart import budget_of
from opensora_operator.reasons import ConditionType, Reason
from opensora_operator.views import Condition, JobView, OwnerKey

DOCS = Path(__file__).parents[3] / "docs"
FAULTS = (DOCS / "reference/faults.md").read_text(encoding="utf-8")
CONCEPT = (DOCS / "concepts/operator.md").read_text(encoding="utf-8")
HELP = (DOCS / "guides/troubleshoot-runs.md").read_text(encoding="utf-8")


def rows_of(page: str, *head: str) -> list[list[str]]:
    """The rows of every table with this head."""
    found, is_inside = [], False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells == list(head):
            is_inside = True
        elif not cells:
            is_inside = False
        elif is_inside and not re.fullmatch(r"-+:?", cells[0]):
            found.append(cells)
    assert found, head
    return found


FAULT_ROWS = rows_of(FAULTS, "fault", "what follows", "counts as", "seen as")


def job_failed_by(rule: int | None) -> JobView:
    """A Job whose pods are gone."""
    message = "Container trainer failed" if rule is None else f"matching FailJob rule at index {rule}"
    failed = Condition(type="FailureTarget", is_true=True, reason="PodFailurePolicy", message=message, time=0.0)
    fields = dict.fromkeys(("attempt", "parallelism", "completions", "active", "ready", "succeeded", "failed"), 1)
    return JobView(
        name="first-a1", uid="job", owner=OwnerKey(kind="TrainingRun", namespace="here", name="first", uid="run"),
        created=0.0, started=0.0, finished=None, suspended=False, deleting=False, completed_indexes="",
        failed_indexes="", conditions=(failed,), config="", **fields,
    )  # fmt: skip


def test_the_rules_on_the_page_are_those_of_the_job() -> None:
    *rows, other = rows_of(FAULTS, "index", "matches", "cause")
    assert [int(index) for index, _, _ in rows] == list(range(len(RULES)))
    for (_, matches, cause), codes in zip(rows, RULES, strict=True):
        assert [int(code) for code in re.findall(r"\d+", matches)] == sorted(int(code) for code in codes or ())
        assert ("DisruptionTarget" in matches) == (codes is None)
        assert cause == f"`{cause_of(job_failed_by(RULES.index(codes)), ()).reason}`"
    assert other[2] == f"`{cause_of(job_failed_by(None), ()).reason}`"


@pytest.mark.parametrize("row", FAULT_ROWS, ids=lambda row: row[0])
def test_a_fault_is_told_in_words_that_exist(row: list[str]) -> None:
    *_, seen = row
    words = set(re.findall(r"`([A-Za-z]+)`", seen))
    assert words <= {*Reason, *ConditionType} | {"Queued", "Suspended"}


@pytest.mark.parametrize("row", FAULT_ROWS, ids=lambda row: row[0])
def test_a_fault_counts_as_the_page_says(row: list[str]) -> None:
    fault, _, counts_as, seen = row
    causes = re.findall(r"cause `(\w+)`(?:, or `(\w+)`)?", seen)
    by_rank = fault.startswith("A rank finds its machine")
    budgets = {budget_of(cause, accused_by_rank=by_rank) for found in causes for cause in found if cause}
    assert budgets <= {{"failure": "failures", "disruption": "disruptions", "neither": "executions"}.get(counts_as)}


def test_every_way_to_fail_and_every_cause_has_a_fault() -> None:
    told = {word for row in FAULT_ROWS for word in re.findall(r"`([A-Za-z]+)`", row[3])}
    ends = [
        Reason.RESTART_BUDGET_EXCEEDED, Reason.DISRUPTION_BUDGET_EXCEEDED, Reason.NO_PROGRESS, Reason.CANCELLED,
        Reason.NON_RETRYABLE_EXIT, Reason.DEADLINE_EXCEEDED, Reason.STARTUP_DEADLINE_EXCEEDED, Reason.IMAGE_PULL_FAILED,
    ]  # fmt: skip
    causes = [
        Reason.WORKER_FAILED, Reason.DISRUPTED, Reason.NODE_FAILURE, Reason.PREEMPTED, Reason.HANG, Reason.DIVERGED,
        Reason.OUT_OF_MEMORY, Reason.PEER_LOST, Reason.STOPPED, Reason.RESIZED, Reason.RESTART_REQUESTED,
        Reason.JOB_DELETED, Reason.NOT_STARTED,
    ]  # fmt: skip
    assert [reason for reason in (*ends, *causes) if reason not in told] == []


def test_the_numbers_in_the_text_are_the_defaults() -> None:
    policy, deadlines = RestartPolicy(), Deadlines()
    for text in (
        f"`maxRestarts` {policy.max_restarts}",
        f"`maxDisruptions` {policy.max_disruptions}",
        f"`healthySteps` ({policy.healthy_steps})",
        f"`deadlines.stuckPodSeconds` ({deadlines.stuck_pod_seconds})",
        f"`watchdog.heartbeatSeconds` ({Watchdog().heartbeat_seconds})",
        f"{policy.backoff.base_seconds} s, doubled",
        f"at most {policy.backoff.max_seconds // 60} minutes",
    ):
        assert text in CONCEPT, text
    assert policy.no_progress_attempts == 3, "the pages say three"
    assert "`cleanup.attemptHistoryLimit`" in CONCEPT
    assert Cleanup().attempt_history_limit > 0


def test_reasons_and_metrics_of_the_guide_exist() -> None:
    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", HELP))
    phases = {"Pending", "Queued", "Starting", "Running", "Restarting", "Suspended", "Succeeded", "Failed"}
    assert named <= {*Reason, *ConditionType} | phases | {"Terminating", "False"}
    metrics = set(re.findall(r"`(opensora_\w+)", HELP))
    assert metrics <= {metric.name for metric in METRICS.values()}

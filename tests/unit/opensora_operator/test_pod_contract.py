"""What operator and core have to agree on without importing each other: variables, reports, verdicts, ids."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import get_args

import pytest
from opensora_operator import constants, tokens
from opensora_operator import progress as operator_progress
from opensora_operator.views import view_pod

import opensora.errors
from opensora import launch, records
from opensora.training import operator_link, progress

DOCS = Path(__file__).parents[3] / "docs/reference"


def rows(page: str, heading: str) -> dict[str, str]:
    """First cell → the rest of each row of the table below a heading, without the markup."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+`|\d+) \| (.*) \|$", text, flags=re.MULTILINE)
    return {name: rest for names, rest in cells for name in names.replace("`", "").split(", ")}


def test_every_variable_of_a_pod_is_documented_and_understood() -> None:
    documented = set(rows("pod-contract.md", "Environment"))
    launcher = {f"OPENSORA_{field.name.upper()}" for field in dataclasses.fields(launch.LaunchConfig)}
    core = {value for name, value in vars(records).items() if name.isupper() and isinstance(value, str)}
    about_the_pod = {"OPENSORA_POD_NAME", "OPENSORA_POD_UID", "OPENSORA_NODE_NAME", "JOB_COMPLETION_INDEX"}
    assert documented - about_the_pod <= launcher | core
    sources = [path.read_text(encoding="utf-8") for path in Path(constants.__file__).parent.glob("*resources.py")]
    given = {name for source in sources for name in re.findall(r'"(OPENSORA_[A-Z_]+[A-Z])"', source)}
    assert len(given) > 10
    assert given - {"OPENSORA_NUM_SHARDS"} <= documented
    assert "`OPENSORA_NUM_SHARDS`" in (DOCS / "pod-contract.md").read_text(encoding="utf-8")
    assert all(name.startswith(constants.RESERVED_ENV_PREFIX) for name in given)


def test_both_sides_have_the_same_exit_codes() -> None:
    ours = {code.name: int(code) for code in constants.ExitCode}
    assert ours == {code.name: int(code) for code in opensora.errors.ExitCode}


def test_a_report_has_the_documented_keys() -> None:
    sent = {field.name for field in dataclasses.fields(progress.ProgressState)} | {"sequence", "requests"}
    documented = rows("progress.md", "Message")
    assert set(documented) == sent
    taken = {field.name for field in dataclasses.fields(operator_progress.ProgressReport)}
    assert sent - taken == {"updated"}
    required = {name for name, meaning in documented.items() if "null" not in meaning.partition("|")[0]}
    for name in sent:
        message = {**EXAMPLE, name: None}
        if name in required - {"updated"}:
            with pytest.raises(operator_progress.BadReportError, match=name):
                operator_progress.parse_report(json.dumps(message).encode(), pod_uid="p", received=0.0)
        else:
            operator_progress.parse_report(json.dumps(message).encode(), pod_uid="p", received=0.0)


EXAMPLE = {
    "attempt": 1, "sequence": 1, "phase": "training", "state": "Training", "step": 1, "total_steps": 2, "epoch": 0,
    "loss": 0.1, "seconds_per_step": 1.0, "samples_per_second": 1.0, "eta_seconds": 1.0, "goodput": 1.0,
    "checkpoint_step": 1, "samples_step": 1, "requests": {"checkpoint": "a"}, "updated": 1.0,
}  # fmt: skip


def test_both_sides_know_the_same_states() -> None:
    assert get_args(operator_progress.State) == get_args(progress.State)
    told = rows("progress.md", "Message")["state"]
    assert set(re.findall(r"`(\w+)`", told)) == set(get_args(progress.State))


def test_a_reply_has_the_documented_keys() -> None:
    report = operator_progress.parse_report(json.dumps(EXAMPLE).encode(), pod_uid="p", received=0.0)
    run = operator_progress.LiveRun(
        uid="u", attempt=1, pod_uids=frozenset(), heartbeat_seconds=30.0,
        requests={"checkpoint": {"id": "b"}, "dump": {"id": "c"}, "stop": True}, answered={},
    )  # fmt: skip
    assert set(operator_progress.reply_to(report, run)) == set(rows("progress.md", "Reply"))


@pytest.mark.parametrize("name", ["a", "a-b_c.d", "x" * 64, "A1", "", "-a", "a-", "x" * 65, "a b", "é", "a/b"])
def test_both_sides_take_the_same_ids(name: str) -> None:
    assert bool(operator_link._ID.fullmatch(name)) == bool(operator_progress._ID.fullmatch(name))


def test_the_documented_answers_are_those_of_the_server() -> None:
    source = Path(operator_progress.__file__).with_name("progress_server.py").read_text(encoding="utf-8")
    statuses = {
        "BAD_REQUEST": 400, "UNAUTHORIZED": 401, "FORBIDDEN": 403, "NOT_FOUND": 404, "REQUEST_TIMEOUT": 408,
        "CONFLICT": 409, "REQUEST_ENTITY_TOO_LARGE": 413, "TOO_MANY_REQUESTS": 429, "SERVICE_UNAVAILABLE": 503,
    }  # fmt: skip
    assert {statuses[name] for name in re.findall(r"HTTPStatus\.([A-Z_]+)", source) if name != "OK"} == {
        int(status) for status in rows("progress.md", "Errors")
    }


def test_the_audience_is_the_documented_one() -> None:
    page = (DOCS / "progress.md").read_text(encoding="utf-8")
    assert f"`{tokens.audience_of('NAMESPACE', 'NAME')}`" in page
    assert f"`{tokens.audience_of('NAMESPACE', 'NAME')}`" in (DOCS / "pod-contract.md").read_text(encoding="utf-8")


def test_the_operator_reads_the_launchers_verdict() -> None:
    first = records.EndRecord(rank=3, time=7.0, code=86, reason="OutOfMemoryError", message="out of memory", step=12)
    verdict = records.judge([first], attempt=2, now=8.0)
    state = {"terminated": {"exitCode": 86, "message": launch.termination_message(verdict).decode()}}
    pod = view_pod(
        {
            "metadata": {
                "name": "demo-a2-0", "uid": "u", "namespace": "videos",
                "labels": {constants.LABEL_KIND: "TrainingRun", constants.LABEL_NAME: "demo", constants.LABEL_UID: "r"},
            },
            "status": {"containerStatuses": [{"name": constants.TRAINER, "state": state}]},
        }
    )  # fmt: skip
    assert pod is not None
    assert pod.verdict is not None
    assert set(pod.verdict) == set(rows("pod-contract.md", "Termination message"))
    assert (pod.verdict["first"]["rank"], pod.verdict["first"]["code"], pod.exit_code) == (3, 86, 86)
    documented = rows("pod-contract.md", "Termination message")["first"]
    assert set(re.findall(r"`(\w+)`", documented)) == {field.name for field in dataclasses.fields(records.EndRecord)}

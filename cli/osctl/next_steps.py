"""What the operator does next about a run, and why: its own planner decides, and this tells it. Pure."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from opensora_operator import planner
from opensora_operator.observation import Observation
from opensora_operator.plans import Action, Child, Create, Delete, Event, FailPod, Object, SetSuspend, Wait
from opensora_operator.reasons import EXPLANATIONS, Reason
from opensora_operator.status import duration

from osctl.output import printable
from osctl.story import Paint

_MAX_DECISIONS = 16
_MIN_WIDTH = 40


@dataclass(frozen=True)
class NextSteps:
    """What the operator would do now, and what it waits for."""

    decisions: tuple[Event, ...]
    """What it would write down first."""
    actions: tuple[Action, ...]
    """What it would do then, in this order."""
    waits: tuple[Wait, ...]
    """What comes by the clock, soonest first."""
    deletes_run: bool
    before: Object
    """The status as it is."""
    after: Object
    """The status as it would be."""


def next_steps(observed: Observation) -> NextSteps:
    """Plan as the operator does: a decision is written, and everything is looked at again, before anything is done."""
    decisions: list[Event] = []
    body = copy.deepcopy(observed.body)
    before = body.get("status") or {}
    for _ in range(_MAX_DECISIONS):
        plan = planner.plan(replace(observed, body=copy.deepcopy(body)))
        if plan.status is not None:
            body["status"] = plan.status
        decisions += plan.events if plan.is_decision else ()
        if not plan.is_decision:
            waits = tuple(wait for wait in plan.waits if wait.seconds > 0)
            return NextSteps(tuple(decisions), plan.actions, waits, plan.delete_self, before, body.get("status") or {})
    raise AssertionError(f"{_MAX_DECISIONS} decisions in a row")


def with_children(observed: Observation, children: Mapping[tuple[str, str], Child]) -> Observation:
    """The same, with what is known of more objects."""
    return replace(observed, children={**observed.children, **children})


def places_to_create(steps: NextSteps) -> list[tuple[str, str]]:
    """Kind and name of what would be created."""
    return [(a.manifest["kind"], a.manifest["metadata"]["name"]) for a in steps.actions if isinstance(a, Create)]


def as_data(steps: NextSteps) -> dict[str, Any]:
    """What `-o json` prints."""
    return {
        "decisions": [{"reason": str(one.reason), "message": one.message} for one in steps.decisions],
        "actions": [_action_data(action) for action in steps.actions],
        "deletesRun": steps.deletes_run,
        "waits": [{"seconds": round(wait.seconds), "what": wait.what} for wait in steps.waits],
        "phase": {"now": steps.before.get("phase"), "then": steps.after.get("phase")},
        "conditions": steps.after.get("conditions", []),
    }


def as_text(steps: NextSteps, *, width: int, paint: Paint) -> str:
    """For people: what, then why, then what time brings."""
    lines = [f"  {number}. {words}" for number, words in enumerate(_words(steps), 1)]
    now, then = steps.before.get("phase") or "New", steps.after.get("phase") or "New"
    if now != then:
        lines.append(f"  and its phase becomes {then}")
    if lines:
        parts = [paint("now:", "bold") + "\n" + "\n".join(_wrapped(line, width) for line in lines)]
    else:
        parts = [paint("now:", "bold") + " nothing, it is in the state that the operator wants"]
    reasons = [_wrapped(_condition_words(found), width) for found in steps.after.get("conditions", ())]
    if reasons:
        parts.append(paint("why:", "bold") + "\n" + "\n".join(reasons))
    if steps.waits:
        waits = [_wrapped(f"  in {duration(wait.seconds):<6} {printable(wait.what)}", width) for wait in steps.waits]
        parts.append(paint("by the clock, unless something happens before:", "bold") + "\n" + "\n".join(waits))
    return "\n\n".join(parts)


def _words(steps: NextSteps) -> list[str]:
    written = [f"write down {one.reason}: {_first_line(one.message)}" for one in steps.decisions]
    done = [_action_words(action) for action in steps.actions]
    return [*written, *done, *(["delete the run, whose time to live is over"] if steps.deletes_run else [])]


def _action_words(action: Action) -> str:
    match action:
        case Create(manifest=manifest):
            return f"create {manifest['kind']} {manifest['metadata']['name']}"
        case SetSuspend(name=name, suspend=suspend):
            return f"{'suspend' if suspend else 'resume'} Job {name}"
        case Delete(kind=kind, name=name, grace_seconds=grace):
            return f"delete {kind} {name}" + (" by force" if grace == 0 else "")
        case FailPod(name=name, message=message):
            return f"mark pod {name} as failed: {_first_line(message)}"


def _action_data(action: Action) -> dict[str, Any]:
    match action:
        case Create(manifest=manifest):
            return {"do": "Create", "kind": manifest["kind"], "name": manifest["metadata"]["name"]}
        case SetSuspend(name=name, suspend=suspend):
            return {"do": "Suspend" if suspend else "Resume", "kind": "Job", "name": name}
        case Delete(kind=kind, name=name):
            return {"do": "Delete", "kind": kind, "name": name}
        case FailPod(name=name, message=message):
            return {"do": "FailPod", "kind": "Pod", "name": name, "message": message}


def _condition_words(found: Object) -> str:
    why = _first_line(str(found.get("message") or "")) or _meaning(found)
    return f"  {found['type']:<12} {found['status']:<6} {found.get('reason', '')}" + (f": {why}" if why else "")


def _meaning(found: Object) -> str:
    try:
        return EXPLANATIONS[Reason(str(found.get("reason")))].meaning
    except (ValueError, KeyError):  # of a newer operator
        return ""


def _first_line(text: str) -> str:
    lines = text.splitlines()
    return printable(lines[0]) if lines else ""


def _wrapped(line: str, width: int) -> str:
    return textwrap.fill(line, max(width, _MIN_WIDTH), subsequent_indent=" " * 6)

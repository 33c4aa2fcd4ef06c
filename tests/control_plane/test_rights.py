"""The operator has exactly the rights that it uses: what the API server has seen in all tests of this folder.

By its name this file comes after those whose requests it counts.
"""

from __future__ import annotations

import pytest
from control_plane import ControlPlane
from opensora_operator.permissions import RULES

pytestmark = [pytest.mark.cluster]
FILES = ("test_crashes.py", "test_jobs.py", "test_lifecycle.py", "test_progress.py")
ISSUER = "/.well-known/openid-configuration"
"""Every service account may read it, but not the user that plays one here: then tokens are reviewed."""
ELSEWHERE = {
    ("patch", "", "pods"): "labels the leader's own pod: tests/cluster, where it has one",
    ("delete", "", "pods"): "needs a dead node: tests/cluster",
    ("patch", "", "pods/status"): "needs a dead node: tests/cluster",
    ("get", "", "nodes"): "needs a dead node: tests/cluster",
    ("update", "", "secrets"): "renews certificates before they end, in years: tests/unit",
    ("get", "opensora.dev", "samplejobs"): "after somebody else has changed the object at the same moment: tests/unit",
    ("get", "opensora.dev", "batchsearches"): "the same",
}


def test_no_right_is_missing_and_none_is_idle(request: pytest.FixtureRequest, control_plane: ControlPlane) -> None:
    ran = {item.path.name for item in request.session.items}
    if not ran.issuperset(FILES) or request.config.getoption("keyword"):
        pytest.skip(f"it counts what the operator asks for in {', '.join(FILES)}")
    denials = control_plane.denials(identity="operator")
    assert [denied for denied in denials if ISSUER not in denied] == []
    used = set()
    for event in control_plane.audit_events(identity="operator"):
        of = event.get("objectRef")
        if of is not None and (event.get("annotations") or {}).get("authorization.k8s.io/decision") == "allow":
            resource = f"{of['resource']}/{of['subresource']}" if "subresource" in of else of["resource"]
            used.add((event["verb"], of.get("apiGroup", ""), resource))
    granted = {(verb, rule.group, name) for rule in RULES for name in rule.resources for verb in rule.verbs}
    assert used <= granted
    assert granted - used - ELSEWHERE.keys() == set()

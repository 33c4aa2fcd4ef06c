"""Files made from the operator's tables are what the tables say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from opensora_operator import packaging
from opensora_operator.permissions import RULES, Rule, Scope
from opensora_operator.reasons import EXPLANATIONS, Reason


@pytest.mark.parametrize("path", packaging.files(), ids=Path.as_posix)
def test_generated_files_are_up_to_date(path: Path) -> None:
    written = (packaging.ROOT / path).read_text(encoding="utf-8")
    assert written == packaging.files()[path], "run: python -m opensora_operator.packaging"


def grants(objects: list[dict[str, object]]) -> set[tuple[str, str, str, str]]:
    """(kind of role, group, resource, verb) of roles."""
    found = set()
    for body in objects:
        rules = body["rules"]
        assert isinstance(rules, list)
        for rule in rules:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    found |= {(str(body["kind"]), group, resource, verb) for verb in rule["verbs"]}
    return found


def test_manifests_grant_every_permission_and_no_other() -> None:
    roles = [
        body
        for body in yaml.safe_load_all(packaging.manifests())
        if body["kind"] in ("Role", "ClusterRole") and body["metadata"]["name"].endswith("opensora-operator")
    ]
    wanted = {
        ("Role" if rule.scope is Scope.OWN else "ClusterRole", rule.group, resource, verb)
        for rule in RULES
        for resource in rule.resources
        for verb in rule.verbs
    }
    assert grants(roles) == wanted


def test_a_rule_for_some_names_grants_these_alone() -> None:
    rule = Rule(scope=Scope.OWN, group="", resources=("secrets",), verbs=("get",), reason="a test", names=("one",))
    (rendered,) = packaging.rbac_rules(Scope.OWN, [rule])
    assert rendered == {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"], "resourceNames": ["one"]}
    assert packaging.rbac_rules(Scope.WATCHED, [rule]) == []


def test_users_get_no_status_and_no_cluster_wide_writes() -> None:
    edit = packaging.user_rules()["edit"]
    assert [name for rule in edit for name in rule["resources"] if "/" in name or name.startswith("cluster")] == []
    assert [
        verb for rule in packaging.user_rules()["view"] for verb in rule["verbs"] if verb not in "get list watch"
    ] == []


def test_every_permission_has_its_reason_on_the_page() -> None:
    page = packaging.rbac_page()
    assert [rule.reason for rule in RULES if rule.reason not in page] == []


def test_every_reason_has_a_heading_that_a_runbook_can_link_to() -> None:
    page = packaging.reasons_page()
    assert [reason for reason in Reason if f"\n### {reason}\n" not in page] == []
    assert [reason for reason in Reason if EXPLANATIONS[reason].remedy not in page] == []

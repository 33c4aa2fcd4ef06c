"""Files made from the operator's tables: RBAC for chart and manifests, and pages for people.

`python -m opensora_operator.packaging` writes them into a checkout of the repository. Permissions are edited in
`permissions.py`, conditions and reasons in `reasons.py`. The definitions of the kinds, with their page, are made by
`crd.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from opensora_operator.constants import GROUP, MANAGER
from opensora_operator.permissions import RULES, Rule, Scope
from opensora_operator.plans import Object
from opensora_operator.reasons import CONDITIONS, EXPLANATIONS

ROOT = Path(__file__).parents[2]
NAMESPACE = "opensora-system"
"""Where the manifests put the operator; the chart's user chooses."""

_SOURCE = "operator/opensora_operator/{}"
_WRITTEN = "Written by `python -m opensora_operator.packaging` from " + _SOURCE + "."
_OBJECTS = ("trainingruns", "samplejobs", "batchsearches", "trainingprofiles")
"""What the users of a namespace deal with."""
_SCOPES = {
    Scope.OWN: ("The operator's own namespace", "A Role there."),
    Scope.WATCHED: (
        "Namespaces that it looks after",
        "A ClusterRole; with `watchNamespaces`, a Role in each of them instead.",
    ),
    Scope.CLUSTER: ("Outside namespaces", "A ClusterRole, whatever `watchNamespaces` says: no Role can grant these."),
}


def rbac_rules(scope: Scope, rules: Iterable[Rule] = RULES) -> list[Object]:
    """The rules of a Role or ClusterRole."""
    return [_rbac_rule(rule) for rule in rules if rule.scope is scope]


def user_rules() -> Mapping[str, list[Object]]:
    """What is added to Kubernetes' own roles `view` and `edit`, for the users of runs."""
    cluster_wide = {"apiGroups": [GROUP], "resources": ["clustertrainingprofiles"], "verbs": ["get", "list", "watch"]}
    return {
        "view": [
            {"apiGroups": [GROUP], "resources": [*_OBJECTS], "verbs": ["get", "list", "watch"]},
            cluster_wide,
        ],
        "edit": [
            {
                "apiGroups": [GROUP],
                "resources": [*_OBJECTS],
                "verbs": ["create", "update", "patch", "delete", "deletecollection"],
            }
        ],
    }


def chart_rules() -> str:
    """Named templates with the rules, for the chart's roles."""
    lists = {scope.value: rbac_rules(scope) for scope in Scope} | dict(user_rules())
    parts = [f"{{{{- /* {_WRITTEN.format('permissions.py')} */ -}}}}\n"]
    for name, rules in lists.items():
        parts.append(f'{{{{- define "opensora-operator.rules.{name}" -}}}}\n{_dump(rules)}{{{{- end }}}}\n')
    return "".join(parts)


def manifests() -> str:
    """Roles and bindings of an operator that looks after all namespaces, for kustomize."""
    cluster_name = f"{NAMESPACE}:{MANAGER}"
    objects = [
        _role("ClusterRole", cluster_name, rbac_rules(Scope.CLUSTER) + rbac_rules(Scope.WATCHED)),
        _binding("ClusterRole", cluster_name),
        _role("Role", MANAGER, rbac_rules(Scope.OWN)),
        _binding("Role", MANAGER),
        *(
            _role("ClusterRole", f"{cluster_name}:{name}", rules, aggregate_to=name)
            for name, rules in user_rules().items()
        ),
    ]
    return f"# {_WRITTEN.format('permissions.py')}\n" + "---\n".join(_dump(found) for found in objects)


def rbac_page() -> str:
    """docs/reference/rbac.md."""
    text = f"""# Permissions

<!-- {_WRITTEN.format("permissions.py")} -->

What the operator may do to the Kubernetes API, and why. There is nothing else: the rules of chart and manifests are \
written from the same list, and a test compares that list with the API server's audit log of a working operator. It \
may not run commands in pods, and it cannot read the Secrets of the namespaces that it looks after.
"""
    for scope, (title, place) in _SCOPES.items():
        rows = [
            (_code(rule.group or "core"), _codes(rule.resources), ", ".join(rule.verbs), _why(rule))
            for rule in RULES
            if rule.scope is scope
        ]
        text += f"\n## {title}\n\n{place}\n\n" + _table(("group", "objects", "verbs", "why"), rows)
    users = _table(
        ("role", f"objects of `{GROUP}`", "verbs"),
        [
            (_code(name), _codes(rule["resources"]), ", ".join(rule["verbs"]))
            for name, rules in user_rules().items()
            for rule in rules
        ],
    )
    return f"""{text}
## Users

Two ClusterRoles add to Kubernetes' own roles: whoever has such a role in a namespace may do this there. The chart \
leaves them out when `rbac.aggregateToView` or `rbac.aggregateToEdit` is false.

{users}
The pods of a run have no permission and no token for the API. Those that report progress have a token that the \
operator alone accepts.
"""


def reasons_page() -> str:
    """docs/reference/reasons.md."""
    conditions = _table(("type", "true means"), [(_code(kind), meaning) for kind, meaning in CONDITIONS.items()])
    reasons = "\n".join(
        f"### {reason}\n\n{explanation.meaning}\n\n{explanation.remedy}\n"
        for reason, explanation in sorted(EXPLANATIONS.items())
    )
    return f"""# Conditions and reasons

<!-- {_WRITTEN.format("reasons.py")} -->

What `status.conditions`, `status.attempts` and the events of a TrainingRun, SampleJob or BatchSearch say, and what to \
do about it. These words are all there are.

## Conditions

{conditions}
## Reasons

{reasons}"""


def files() -> dict[Path, str]:
    """Path in the repository → what it should hold."""
    return {
        Path("charts/opensora-operator/templates/_rules.tpl"): chart_rules(),
        Path("manifests/operator/rbac.yaml"): manifests(),
        Path("docs/reference/rbac.md"): rbac_page(),
        Path("docs/reference/reasons.md"): reasons_page(),
    }


def main() -> None:
    """Write all of them."""
    for path, content in files().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(content, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- parts


def _rbac_rule(rule: Rule) -> Object:
    found: Object = {"apiGroups": [rule.group], "resources": [*rule.resources], "verbs": [*rule.verbs]}
    if rule.names:
        found["resourceNames"] = [*rule.names]
    return found


def _role(kind: str, name: str, rules: list[Object], *, aggregate_to: str = "") -> Object:
    metadata = _metadata(kind, name)
    if aggregate_to:
        metadata["labels"][f"rbac.authorization.k8s.io/aggregate-to-{aggregate_to}"] = "true"
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": metadata, "rules": rules}


def _binding(kind: str, name: str) -> Object:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": f"{kind}Binding",
        "metadata": _metadata(kind, name),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": MANAGER, "namespace": NAMESPACE}],
    }


def _metadata(kind: str, name: str) -> Object:
    place = {} if kind == "ClusterRole" else {"namespace": NAMESPACE}
    labels = {"name": MANAGER, "instance": MANAGER, "part-of": "opensora"}
    return {"name": name, **place, "labels": {f"app.kubernetes.io/{key}": value for key, value in labels.items()}}


def _dump(value: object) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=120)
    return text


def _why(rule: Rule) -> str:
    return rule.reason + (f" (only {_codes(rule.names)})" if rule.names else "")


def _codes(names: Iterable[str]) -> str:
    return ", ".join(map(_code, names))


def _code(text: str) -> str:
    return f"`{text}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()

"""What the operator knows: the newest version wins, whoever tells of it."""

from __future__ import annotations

from typing import Any

import pytest
from opensora_operator.constants import LABEL_ATTEMPT, LABEL_KIND, LABEL_NAME, LABEL_UID
from opensora_operator.plans import Key
from opensora_operator.store import Store

RUN = Key("TrainingRun", "team", "demo")


def run(version: int, *, uid: str = "u1", **spec: Any) -> dict[str, Any]:
    metadata = {"name": "demo", "namespace": "team", "uid": uid, "resourceVersion": str(version)}
    return {"apiVersion": "opensora.dev/v1alpha1", "kind": "TrainingRun", "metadata": metadata, "spec": spec}


def job(version: int, *, name: str = "demo-a1", owner: str = "u1", active: int = 0) -> dict[str, Any]:
    labels = {LABEL_KIND: "TrainingRun", LABEL_NAME: "demo", LABEL_UID: owner, LABEL_ATTEMPT: "1"}
    metadata = {"name": name, "namespace": "team", "uid": name, "resourceVersion": str(version), "labels": labels}
    return {"kind": "Job", "metadata": metadata, "spec": {}, "status": {"active": active}}


@pytest.fixture
def store() -> Store:
    return Store()


def test_an_old_event_does_not_undo_our_own_write(store: Store) -> None:
    store.put("TrainingRun", run(7, nodes=2))
    assert store.put("TrainingRun", run(5, nodes=1)) is None
    assert store.get(RUN) == run(7, nodes=2)


def test_the_echo_of_our_own_write_concerns_nobody(store: Store) -> None:
    assert store.put("Job", job(7)) == RUN
    assert store.put("Job", job(7)) is None


def test_a_change_that_no_planner_can_see_concerns_nobody(store: Store) -> None:
    store.put("Job", job(7))
    assert store.put("Job", job(8)) is None
    assert store.put("Job", job(9, active=1)) == RUN


def test_children_are_found_by_the_uid_of_their_owner(store: Store) -> None:
    store.put("Job", job(1, name="demo-a2", owner="u2"))
    store.put("Job", job(2, name="demo-a1", owner="u1"))
    assert [found.name for found in store.jobs("u1")] == ["demo-a1"]
    assert store.pods("u1") == ()


def test_a_new_object_of_the_same_name_takes_the_place_of_the_old_one(store: Store) -> None:
    store.put("Job", job(1, owner="u1"))
    store.put("Job", job(2, owner="u2"))
    assert store.jobs("u1") == ()
    assert [found.owner.uid for found in store.jobs("u2")] == ["u2"]


def test_deletion_concerns_the_owner_and_leaves_nothing(store: Store) -> None:
    store.put("Job", job(1))
    assert store.remove("Job", job(3)) == RUN
    assert store.jobs("u1") == ()
    assert store.remove("Job", job(3)) is None


def test_the_late_news_of_a_deletion_does_not_remove_the_successor(store: Store) -> None:
    store.put("TrainingRun", run(9, uid="u2"))
    assert store.remove("TrainingRun", run(8, uid="u1")) is None
    assert store.get(RUN) is not None


def test_what_the_server_does_not_have_is_removed_only_with_its_own_uid(store: Store) -> None:
    store.put("TrainingRun", run(9, uid="u2"))
    assert store.remove_named("TrainingRun", "team", "demo", uid="u1") is None
    assert store.remove_named("TrainingRun", "team", "demo", uid="u2") == RUN
    assert store.get(RUN) is None


def test_a_list_finds_what_went_unnoticed_and_spares_what_is_newer(store: Store) -> None:
    store.put("Job", job(3, name="gone"))
    store.put("Job", job(4, name="stays"))
    store.put("Job", job(12, name="created-after-the-list"))
    assert store.drop_missing("Job", {("team", "stays")}, namespace=None, version=10) == {RUN}
    assert [found.name for found in store.jobs("u1")] == ["created-after-the-list", "stays"]


def test_a_list_of_one_namespace_says_nothing_about_another(store: Store) -> None:
    store.put("Job", job(3))
    assert store.drop_missing("Job", set(), namespace="elsewhere", version=10) == set()
    assert len(store.jobs("u1")) == 1


def test_an_object_that_loses_our_labels_is_no_longer_a_child(store: Store) -> None:
    store.put("Job", job(1))
    stranger = job(2)
    del stranger["metadata"]["labels"]
    assert store.put("Job", stranger) == RUN
    assert store.jobs("u1") == ()


def test_bookkeeping_of_others_is_not_kept(store: Store) -> None:
    body = run(1)
    body["metadata"] |= {
        "managedFields": [{"manager": "kubectl"}],
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "x" * 1000, "mine": "1"},
    }
    store.put("TrainingRun", body)
    kept = store.get(RUN)
    assert kept is not None
    assert kept["metadata"]["annotations"] == {"mine": "1"}
    assert "managedFields" not in kept["metadata"]


def test_objects_are_listed_by_kind(store: Store) -> None:
    store.put("TrainingRun", run(1))
    store.put("Job", job(2))
    assert list(store.objects("TrainingRun")) == [run(1)]
    assert list(store.objects("SampleJob")) == []

"""A TrainingRun that takes its batch sizes from a BatchSearch."""

from __future__ import annotations

import pytest
from opensora_operator.constants import ExitCode
from opensora_operator.plans import Key, Object
from operator_world import World

SEARCH = Key("BatchSearch", "team", "sizes")
TABLE = "batch-table-0123456789abcdef"


def search(table: str | None) -> Object:
    status = {"phase": "Running"} if table is None else {"phase": "Succeeded", "table": table}
    return {"kind": "BatchSearch", "metadata": {"name": "sizes", "namespace": "team"}, "status": status}


def world(table: str | None = TABLE) -> World:
    made = World(batchTableRef={"name": "sizes"})
    made.profiles[SEARCH] = search(table)
    made.user_config_maps[TABLE] = {"table.json": '{"version": 1}'}
    return made


def arguments(made: World) -> list[str]:
    return list(made.job(made.attempt)["spec"]["template"]["spec"]["containers"][0]["args"])


def test_the_pods_find_the_table_and_are_told_of_it() -> None:
    made = world().running()
    assert made.status["resolved"]["batchTable"] == TABLE
    name = made.status["resolved"]["configMap"]
    assert made.others[("ConfigMap", name)]["data"]["batch-table.json"] == '{"version": 1}'
    assert "data.batch_table=/etc/opensora/run/batch-table.json" in arguments(made)


def test_the_run_waits_for_its_search() -> None:
    made = world(table=None)
    made.reconcile()
    assert made.condition("Accepted")["reason"] == "ConfigMissing"
    assert "BatchSearch sizes has no table yet" in made.condition("Accepted")["message"]
    assert not made.jobs
    made.profiles[SEARCH] = search(TABLE)
    made.running()
    assert made.phase == "Running"


@pytest.mark.parametrize("search_is_gone", [True, False])
def test_a_later_attempt_keeps_the_sizes_whatever_becomes_of_the_table(search_is_gone: bool) -> None:
    made = world().running()
    if search_is_gone:
        del made.profiles[SEARCH]
    made.user_config_maps.clear()
    made.end_pod("demo-a1-0", ExitCode.FAILED)
    made.settle(code=ExitCode.PEER_LOST)
    assert made.attempt == 2
    assert "data.batch_table=/etc/opensora/run/batch-table.json" in arguments(made)


def test_a_table_that_was_deleted_is_named() -> None:
    made = world()
    made.user_config_maps.clear()
    made.reconcile()
    assert TABLE in made.condition("Accepted")["message"]
    assert not made.jobs

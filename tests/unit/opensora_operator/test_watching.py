"""The store is kept true through cuts, forgotten histories and busy servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from opensora_operator import watching
from opensora_operator.cluster import ApiError, WatchEvent
from opensora_operator.constants import API_VERSION, LABEL_KIND, LABEL_NAME, LABEL_UID
from opensora_operator.plans import Key, Object
from opensora_operator.store import Store
from opensora_operator.watching import Watching, is_new


class Server:
    """Lists what it has, and plays watches one after another; an exception ends one."""

    def __init__(self, *watches: list[WatchEvent | ApiError]) -> None:
        self.objects: dict[str, Object] = {}
        self.version = 10
        self.watches = list(watches)
        self.asked: list[str] = []
        self.on_list: Callable[[], None] = lambda: None
        self.over = asyncio.Event()

    async def list_pages(
        self, kind: str, namespace: str | None, *, labels: str
    ) -> AsyncIterator[tuple[list[Object], int]]:
        self.asked.append(f"list {namespace or '*'} {labels}".rstrip())
        self.on_list()
        yield list(self.objects.values()), self.version

    async def watch(self, kind: str, namespace: str | None, *, version: str, labels: str) -> AsyncIterator[WatchEvent]:
        self.asked.append(f"watch {version}")
        if not self.watches:
            self.over.set()
            await asyncio.Event().wait()
        for event in self.watches.pop(0):
            if isinstance(event, ApiError):
                raise event
            yield event


def pod(name: str, version: int, *, phase: str = "Pending", kind: str = "Pod", **metadata: Any) -> Object:
    labels = {LABEL_KIND: "TrainingRun", LABEL_NAME: f"run-of-{name}", LABEL_UID: "u1"}
    metadata |= {"name": name, "namespace": "team", "uid": name, "resourceVersion": str(version), "labels": labels}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, "status": {"phase": phase}}


class Heard:
    """Who was heard of, and how urgently."""

    def __init__(self) -> None:
        self.keys: list[tuple[str, bool]] = []

    def __call__(self, key: Key, *, seconds: float = 0.0, later: bool = False) -> None:
        self.keys.append((key.name.removeprefix("run-of-"), later))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_FIRST_RETRY_SECONDS", 0.0)


def watch(server_of: Callable[[], Server]) -> tuple[Server, Store, Heard]:
    """Watch pods until the server has played all its watches."""

    async def scenario() -> tuple[Server, Store, Heard]:
        server, store, heard = server_of(), Store(), Heard()
        keeper = Watching(server, store, concern=heard)  # type: ignore[arg-type]  # as much as is used
        synced = asyncio.Event()
        task = asyncio.create_task(keeper.watch("Pod", None, synced=synced))
        async with asyncio.timeout(5):
            await server.over.wait()
        assert synced.is_set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return server, store, heard

    return asyncio.run(scenario())


def event(kind: str, body: Object) -> WatchEvent:
    return WatchEvent(kind, body)


def test_a_watch_goes_on_where_it_was_cut() -> None:
    def server() -> Server:
        made = Server(
            [event("ADDED", pod("a", 11)), ApiError(0, "cut")],
            [event("BOOKMARK", {"metadata": {"resourceVersion": "20"}}), ApiError(0, "cut")],
        )
        made.objects = {"z": pod("z", 5)}
        return made

    found, store, _ = watch(server)
    assert found.asked == ["list * opensora.dev/uid", "watch 10", "watch 11", "watch 20"]
    assert [view.name for view in store.pods("u1")] == ["a", "z"]


def test_after_a_forgotten_history_what_is_gone_is_found() -> None:
    def server() -> Server:
        made = Server([event("ADDED", pod("new", 30)), ApiError(410, "gone")], [])
        made.objects = {"stays": pod("stays", 5), "goes": pod("goes", 6)}

        def second_time() -> None:
            if len(made.asked) > 1:
                del made.objects["goes"]
                made.version = 25

        made.on_list = second_time
        return made

    found, store, heard = watch(server)
    assert found.asked[-2:] == ["watch 25", "watch 25"]
    assert [view.name for view in store.pods("u1")] == ["new", "stays"], "what is newer than the list stays"
    assert heard.keys[-1] == ("goes", False)


def test_busy_servers_are_asked_until_they_answer() -> None:
    found, _, _ = watch(lambda: Server([ApiError(429, "busy")], [ApiError(503, "starting")], []))
    assert found.asked == ["list * opensora.dev/uid"] + ["watch 10"] * 4


def test_ends_and_deletions_are_urgent_and_mere_numbers_are_not() -> None:
    events = [
        event("ADDED", pod("new", 11)),
        event("MODIFIED", pod("new", 12, phase="Running")),
        event("MODIFIED", pod("new", 13, phase="Failed")),
        event("DELETED", pod("new", 14, phase="Failed")),
        event("ADDED", pod("other", 15, phase="Running", deletionTimestamp="2026-01-01T00:00:00Z")),
    ]
    _, _, heard = watch(lambda: Server(events))
    assert heard.keys == [("new", True), ("new", True), ("new", False), ("new", False), ("other", False)]


def test_a_job_with_a_verdict_is_urgent() -> None:
    job = pod("j", 11, kind="Job")
    assert not is_new(job)
    job["status"]["conditions"] = [{"type": "FailureTarget", "status": "True"}]
    assert is_new(job)


def test_of_the_runs_in_a_list_those_come_first_that_nobody_has_seen() -> None:
    def run(generation: int, observed: int | None) -> Object:
        status = {} if observed is None else {"observedGeneration": observed}
        return {
            "apiVersion": API_VERSION,
            "kind": "TrainingRun",
            "metadata": {"generation": generation},
            "status": status,
        }

    assert is_new(run(1, None))
    assert is_new(run(2, 1))
    assert not is_new(run(2, 2))


def test_a_comparison_looks_into_the_namespaces_of_the_operator_and_once_beyond_them() -> None:
    async def scenario() -> list[str]:
        server = Server()
        keeper = Watching(server, Store(), concern=Heard(), namespaces=("a", "b"))  # type: ignore[arg-type]
        await keeper.compare(["TrainingRun", "ClusterTrainingProfile"])
        assert keeper.streams() == [("Job", "a"), ("Job", "b"), ("Pod", "a"), ("Pod", "b")]
        return server.asked

    assert asyncio.run(scenario()) == ["list a", "list b", "list *"]

"""What the chart's Jobs do: profiles of a release, and a run to try the operator with."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opensora_operator.cluster import ApiError
from opensora_operator.constants import API_VERSION
from opensora_operator.install import InstallError, try_run, write_profiles
from opensora_operator.plans import Object


class FakeApi:
    """Keeps objects in memory, with versions as the API server has them."""

    def __init__(self, *, served_after: int = 0) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.sleeps = 0
        self.answer: Object | None = None
        """Status that the operator would write."""
        self._served_after = served_after
        self._versions = itertools.count(1)

    async def sleep(self, _: float) -> None:
        self.sleeps += 1
        for body in self.objects.values():
            if body["kind"] == "TrainingRun" and self.answer is not None:
                body["status"] = self.answer

    async def serves(self, api_version: str) -> frozenset[str]:
        assert api_version == API_VERSION
        is_served = self.sleeps >= self._served_after
        return frozenset({"ClusterTrainingProfile", "TrainingRun"} if is_served else {"TrainingRun"})

    async def find(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return self.objects.get((kind, name))

    async def get(self, kind: str, namespace: str | None, name: str) -> Object:
        return self.objects[kind, name]

    async def list_pages(
        self, kind: str, namespace: str | None = None, *, labels: str = ""
    ) -> AsyncIterator[tuple[list[Object], int]]:
        wanted = dict(part.split("=") for part in labels.split(","))
        for (found_kind, _), body in sorted(self.objects.items()):
            if found_kind == kind and wanted.items() <= body["metadata"].get("labels", {}).items():
                yield [body], 1

    async def create(self, manifest: Object) -> Object:
        return self._put(manifest)

    async def update(self, manifest: Object) -> Object:
        old = self.objects[manifest["kind"], manifest["metadata"]["name"]]
        assert manifest["metadata"]["resourceVersion"] == old["metadata"]["resourceVersion"]
        return old if manifest["spec"] == old["spec"] else self._put(manifest)

    async def delete(self, kind: str, namespace: str | None, name: str, *, uid: str) -> Object:
        assert self.objects[kind, name]["metadata"]["uid"] == uid
        return self.objects.pop((kind, name))

    def _put(self, manifest: Object) -> Object:
        version = str(next(self._versions))
        metadata = {"uid": f"uid-{version}", **manifest["metadata"], "resourceVersion": version}
        body: Object = {**manifest, "metadata": metadata}
        self.objects[manifest["kind"], metadata["name"]] = body
        return body

    def specs(self) -> dict[str, Any]:
        return {name: body["spec"] for (_, name), body in self.objects.items()}


def write(
    api: FakeApi, profiles: dict[str, Object], *, release: str = "opensora", namespace: str = "system"
) -> list[str]:
    return asyncio.run(write_profiles(api, profiles, release=release, namespace=namespace, sleep=api.sleep))


def test_profiles_become_those_of_the_values() -> None:
    api = FakeApi()
    assert write(api, {"cpu": {"image": "a"}, "gpu": {"image": "b"}}) == ["cpu created", "gpu created"]
    assert write(api, {"cpu": {"image": "c"}, "gpu": {"image": "b"}}) == ["cpu updated", "gpu unchanged"]
    assert write(api, {"gpu": {"image": "b"}}) == ["gpu unchanged", "cpu deleted"]
    assert api.specs() == {"gpu": {"image": "b"}}
    assert write(api, {}) == ["gpu deleted"]


def test_profiles_wait_for_their_definition() -> None:
    api = FakeApi(served_after=3)
    assert write(api, {"cpu": {}}) == ["cpu created"]
    assert api.sleeps == 3


def test_a_cluster_without_the_definition_is_told_what_to_do() -> None:
    with pytest.raises(InstallError, match=r"crds\.install"):
        write(FakeApi(served_after=1000), {"cpu": {}})


@pytest.mark.parametrize("other", [{"release": "other"}, {"namespace": "elsewhere"}])
def test_profiles_of_another_release_stay(other: dict[str, str]) -> None:
    api = FakeApi()
    write(api, {"cpu": {"image": "theirs"}}, **other)
    write(api, {"gpu": {"image": "ours"}})
    assert api.specs() == {"cpu": {"image": "theirs"}, "gpu": {"image": "ours"}}


def test_a_name_that_somebody_else_uses_is_refused_before_anything_is_written() -> None:
    api = FakeApi()
    asyncio.run(
        api.create({"kind": "ClusterTrainingProfile", "metadata": {"name": "cpu"}, "spec": {"image": "theirs"}})
    )
    with pytest.raises(InstallError, match="cpu: somebody else"):
        write(api, {"gpu": {"image": "ours"}, "cpu": {"image": "ours"}})
    assert api.specs() == {"cpu": {"image": "theirs"}}


def test_a_suspended_run_is_tried_and_leaves_nothing() -> None:
    api = FakeApi()
    api.answer = {"phase": "Suspended", "observedGeneration": 1}
    assert asyncio.run(try_run(api, namespace="default", image="image", sleep=api.sleep)) == api.answer
    assert api.objects == {}


def test_the_run_that_is_tried_starts_nothing() -> None:
    api = FakeApi()
    runs = []

    async def look(_: float) -> None:
        runs.extend(api.objects.values())
        await api.sleep(0)

    api.answer = {"phase": "Suspended"}
    asyncio.run(try_run(api, namespace="team", image="image", sleep=look))
    assert (runs[0]["kind"], runs[0]["metadata"]["namespace"], runs[0]["spec"]["suspend"]) == (
        "TrainingRun",
        "team",
        True,
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [(None, "see whether the operator runs"), ({"phase": "Pending"}, '"Pending"')],
    ids=["silence", "another phase"],
)
def test_an_operator_that_does_not_answer_is_named_and_the_run_is_removed(answer: Object | None, message: str) -> None:
    api = FakeApi()
    api.answer = answer
    with pytest.raises(InstallError, match=message):
        asyncio.run(try_run(api, namespace="default", image="image", sleep=api.sleep))
    assert api.objects == {}


def test_a_refused_run_is_reported_in_the_servers_words() -> None:
    class Refusing(FakeApi):
        async def create(self, manifest: Object) -> Object:
            raise ApiError(403, "no quota")

    with pytest.raises(ApiError, match="no quota"):
        asyncio.run(try_run(Refusing(), namespace="default", image="image"))

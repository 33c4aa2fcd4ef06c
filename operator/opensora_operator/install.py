"""What the chart's Jobs do with the operator's image: write profiles after an install, and try an installed operator.

    python -m opensora_operator.install profiles FILE --namespace N --release R
    python -m opensora_operator.install try --namespace N --image I

Ends with 0, or with 1 and the reason as last line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opensora_operator.cluster import ApiError, Cluster, LoginError, Resource
from opensora_operator.constants import API_VERSION, GROUP
from opensora_operator.pacing import RateLimit
from opensora_operator.plans import Object

PROFILE = "ClusterTrainingProfile"
RUN = "TrainingRun"
_PATIENCE_SECONDS = 60
_RETRY_SECONDS = 1.0
_RELEASE = "app.kubernetes.io/instance"
_RELEASE_NAMESPACE = f"{GROUP}/release-namespace"

Sleep = Callable[[float], Awaitable[object]]


class InstallError(Exception):
    """It did not work; the message says what to do."""


class InstallApi(Protocol):
    """What of the cluster is needed."""

    async def serves(self, api_version: str) -> frozenset[str]:
        """The kinds of a group."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Object:
        """One object."""

    async def find(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """One object, or None."""

    def list_pages(
        self, kind: str, namespace: str | None = None, *, labels: str = ""
    ) -> AsyncIterator[tuple[list[Object], int]]:
        """All objects with these labels."""

    async def create(self, manifest: Object) -> Object:
        """Create an object."""

    async def update(self, manifest: Object) -> Object:
        """Replace an object, unless it has changed meanwhile."""

    async def delete(self, kind: str, namespace: str | None, name: str, *, uid: str) -> Object:
        """Delete an object of this UID."""


async def write_profiles(
    api: InstallApi, profiles: Mapping[str, Object], *, release: str, namespace: str, sleep: Sleep = asyncio.sleep
) -> list[str]:
    """Make the release's ClusterTrainingProfiles these (name → spec), and return what was done to each.

    Profiles that an earlier version of the release had are deleted. Those of anybody else are left alone: where one of
    ours would need its name, nothing is written. Raises InstallError, ApiError.
    """
    await _wait_for_definition(api, sleep)
    owner = {_RELEASE: release, _RELEASE_NAMESPACE: namespace}
    found = {name: await api.find(PROFILE, None, name) for name in profiles}
    foreign = sorted(name for name, profile in found.items() if profile is not None and not _has(profile, owner))
    if foreign:
        raise InstallError(
            f"{PROFILE} {', '.join(foreign)}: somebody else made it; give it another name in `profiles`, or delete it"
        )
    done = [await _write(api, name, spec, found[name], owner) for name, spec in profiles.items()]
    selector = ",".join(f"{key}={value}" for key, value in owner.items())
    async for page, _ in api.list_pages(PROFILE, labels=selector):
        for profile in page:
            name = profile["metadata"]["name"]
            if name not in profiles:
                await api.delete(PROFILE, None, name, uid=profile["metadata"]["uid"])
                done.append(f"{name} deleted")
    return done


async def try_run(
    api: InstallApi,
    *,
    namespace: str,
    image: str,
    patience_seconds: int = _PATIENCE_SECONDS,
    sleep: Sleep = asyncio.sleep,
) -> Object:
    """Create a suspended run, return its status once the operator has written it, and delete the run.

    Raises InstallError, ApiError.
    """
    run = await api.create(_suspended_run(f"opensora-test-{secrets.token_hex(4)}", namespace, image))
    name, uid = run["metadata"]["name"], run["metadata"]["uid"]
    status: Object = {}
    try:
        for _ in range(int(patience_seconds / _RETRY_SECONDS)):
            status = (await api.get(RUN, namespace, name)).get("status") or {}
            if status.get("phase") == "Suspended":
                return status
            await sleep(_RETRY_SECONDS)
    finally:
        await api.delete(RUN, namespace, name, uid=uid)
    if not status:
        raise InstallError(
            f"{RUN} {name} has no status after {patience_seconds} s: see whether the operator runs, and its log"
        )
    raise InstallError(f"{RUN} {name} did not become Suspended; its status: {json.dumps(status)}")


# ------------------------------------------------------------------------------------------------------------- parts


async def _wait_for_definition(api: InstallApi, sleep: Sleep) -> None:
    """A definition is served a moment after it is created."""
    for _ in range(int(_PATIENCE_SECONDS / _RETRY_SECONDS)):
        if PROFILE in await api.serves(API_VERSION):
            return
        await sleep(_RETRY_SECONDS)
    raise InstallError(f"the API server has no {PROFILE} of {API_VERSION}: install the definitions (crds.install=true)")


def _has(profile: Object, owner: Mapping[str, str]) -> bool:
    labels = profile["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in owner.items())


async def _write(api: InstallApi, name: str, spec: Object, found: Object | None, owner: Mapping[str, str]) -> str:
    manifest: Object = {"apiVersion": API_VERSION, "kind": PROFILE, "metadata": {"name": name, "labels": {**owner}}}
    manifest["spec"] = spec
    if found is None:
        await api.create(manifest)
        return f"{name} created"
    manifest["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
    written = await api.update(manifest)
    is_same = written["metadata"]["resourceVersion"] == found["metadata"]["resourceVersion"]
    return f"{name} {'unchanged' if is_same else 'updated'}"


def _suspended_run(name: str, namespace: str, image: str) -> Object:
    return {
        "apiVersion": API_VERSION,
        "kind": RUN,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"suspend": True, "image": image, "runUri": "/tmp/run", "config": {"inline": "seed: 1\n"}},
    }


class _StrictCluster(Cluster):
    """One that refuses fields which do not exist. The API server's own habit is to drop them."""

    async def _write(self, verb: str, resource: Resource, *arguments: Any, **options: Any) -> Object:
        query = {"fieldValidation": "Strict"} if verb in ("create", "update") else None
        return await super()._write(verb, resource, *arguments, query=query, **options)


class _NoCount:
    """Nobody asks a Job for its metrics."""

    def count_request(self, *, verb: str, resource: str, code: int) -> None:
        pass


async def _main(arguments: argparse.Namespace) -> str:
    limit = RateLimit(per_second=20, burst=20)
    async with _StrictCluster(kubeconfig=arguments.kubeconfig, limit=limit, counter=_NoCount()) as cluster:
        if arguments.command == "profiles":
            profiles = json.loads(arguments.file.read_text(encoding="utf-8"))
            done = await write_profiles(cluster, profiles, release=arguments.release, namespace=arguments.namespace)
            return "\n".join(done)
        status = await try_run(cluster, namespace=arguments.namespace, image=arguments.image)
        return json.dumps(status, indent=2)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m opensora_operator.install")
    parser.add_argument("--kubeconfig", default="", help="empty: the pod's service account")
    commands = parser.add_subparsers(dest="command", required=True)
    profiles = commands.add_parser("profiles", help="make the ClusterTrainingProfiles of a release")
    profiles.add_argument("file", type=Path, help="JSON: name → spec")
    profiles.add_argument("--namespace", required=True, help="namespace of the release")
    profiles.add_argument("--release", required=True, help="name of the release")
    test = commands.add_parser("try", help="create a suspended run and wait for its status")
    test.add_argument("--namespace", required=True, help="where to create it")
    test.add_argument("--image", required=True, help="image of the run; it is not pulled")
    try:
        sys.stdout.write(asyncio.run(_main(parser.parse_args(words))) + "\n")
    except (InstallError, ApiError, LoginError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

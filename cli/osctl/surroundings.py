"""What an object refers to, looked up in the cluster, as the operator would look it up."""

from __future__ import annotations

from collections.abc import Mapping

from opensora_operator.kinds import PROFILES
from opensora_operator.plans import Key, Object
from opensora_operator.profiles import default_profile

from osctl.client import CONFIG_MAPS, Client
from osctl.forecast import Files
from osctl.kinds import find_kind, resource_of


class InCluster:
    """Objects of the cluster, and before them those that come with the run."""

    def __init__(self, client: Client, files: Files) -> None:
        self._client = client
        self._files = files

    def find(self, key: Key) -> Object | None:
        """An object of our kinds."""
        resource = resource_of(find_kind(key.kind))
        return self._files.find(key) or self._client.find(resource, key.namespace, key.name)

    def default_profile(self, namespace: str) -> Object | None:
        """The profile for objects that name none."""
        mine = self._files.default_profile(namespace)
        if mine is not None:
            return mine
        found: list[Object] = []
        for kind in PROFILES:
            for item in self._client.list(resource_of(find_kind(kind)), namespace):
                found.append({"kind": kind, **item})
        return default_profile(found, namespace)

    def config_map(self, namespace: str, name: str) -> Mapping[str, str] | None:
        """The data of a ConfigMap."""
        mine = self._files.config_map(namespace, name)
        if mine is not None:
            return mine
        found = self._client.find(CONFIG_MAPS, namespace, name)
        return None if found is None else dict(found.get("data") or {})

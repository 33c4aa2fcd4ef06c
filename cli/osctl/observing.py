"""A run in the cluster as the operator sees it, looked at with the user's own rights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from opensora_operator import planner
from opensora_operator.constants import LABEL_UID
from opensora_operator.observation import Observation
from opensora_operator.plans import Child, Object
from opensora_operator.views import PodView, view_job, view_pod

from osctl.client import CONFIG_MAPS, JOBS, NETWORK_POLICIES, NODES, POD_GROUPS, PODS, SERVICES, Client, Resource
from osctl.errors import ApiError
from osctl.forecast import Files
from osctl.surroundings import InCluster

_CHILDREN: Mapping[str, Resource] = {
    resource.kind: resource for resource in (CONFIG_MAPS, SERVICES, NETWORK_POLICIES, POD_GROUPS, JOBS)
}


class Observer:
    """Looks at one run.

    Args:
        client: the API server.
        run: the TrainingRun.
    """

    def __init__(self, client: Client, run: Object) -> None:
        self._client = client
        self._run = run
        self._namespace: str = run["metadata"]["namespace"]
        self.unseen: list[str] = ["what rank 0 reports, which only the operator hears"]
        """What could not be looked at, and why."""

    def observe(self) -> Observation:
        """The run and everything around it.

        Raises:
            ApiError: among others, where Jobs or pods may not be listed: all depends on them.
        """
        run, namespace = self._run, self._namespace
        needs = planner.needs(run)
        around = InCluster(self._client, Files())
        mine = f"{LABEL_UID}={run['metadata']['uid']}"
        jobs = [view_job(body) for body in self._client.list(JOBS, namespace, labels=mine)]
        views = [view_pod(body) for body in self._client.list(PODS, namespace, labels=mine)]
        now = time.time()
        pods = tuple(sorted((pod for pod in views if pod is not None), key=lambda pod: pod.name))
        return Observation(
            now=now,
            body=run,
            jobs=tuple(sorted((job for job in jobs if job is not None), key=lambda job: job.name)),
            pods=pods,
            objects={key: around.find(key) for key in needs.objects},
            default_profile=around.default_profile(namespace) if needs.default_profile else None,
            config_maps={name: around.config_map(namespace, name) for name in needs.config_maps},
            children=self.children(needs.children),
            dead_nodes=self._dead_nodes(pods, needs.stuck_pod_seconds, now=now),
        )

    def children(self, places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Child]:
        """Those of some objects (kind, name) that exist, and whose they are."""
        found = {}
        for kind, name in places:
            try:
                body = self._client.find(_CHILDREN[kind], self._namespace, name)
            except ApiError as error:
                if error.status != 403:
                    raise
                self.unseen.append(f"the {kind} {name}, since you may not get it")
                continue
            if body is not None:
                owners = body["metadata"].get("ownerReferences") or ()
                owner = next((one["uid"] for one in owners if one.get("controller")), "")
                found[kind, name] = Child(uid=body["metadata"]["uid"], owner_uid=owner, data=body.get("data") or {})
        return found

    def _dead_nodes(self, pods: Iterable[PodView], patience: float | None, *, now: float) -> frozenset[str]:
        """The nodes of pods that do not end, as far as they do not answer."""
        if patience is None:
            return frozenset()
        stuck = {pod.node for pod in pods if pod.deleting_since is not None and now - pod.deleting_since >= patience}
        return frozenset(name for name in sorted(stuck) if name and self._is_dead(name))

    def _is_dead(self, name: str) -> bool:
        try:
            node = self._client.find(NODES, None, name)
        except ApiError as error:
            if error.status != 403:
                raise
            self.unseen.append(f"the node {name}, since you may not get it")
            return False
        conditions = [] if node is None else (node.get("status") or {}).get("conditions") or ()
        return not any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

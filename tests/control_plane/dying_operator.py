"""The operator, which dies right before or right after one of its writes.

    DIE=before:3 python tests/control_plane/dying_operator.py [flags of opensora-operator]

Writes that the API server took are counted from 1; those to the Lease are not. It dies without a word, as by SIGKILL:
no Lease is released.
`PLANNER=small` takes the planner of `small_operator.py`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from opensora_operator.__main__ import Operator, run
from opensora_operator.cluster import Cluster, Resource
from opensora_operator.kinds import KINDS
from opensora_operator.plans import Object
from small_operator import SMALL_KINDS

EXIT_CODE = 99


class DyingCluster(Cluster):
    """Counts writes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._when, _, number = os.environ["DIE"].partition(":")
        self._number = int(number)
        self._done = 0
        self._one_at_a_time = asyncio.Lock()

    async def _write(self, verb: str, resource: Resource, *arguments: Any, **options: Any) -> Object:
        if resource.kind == "Lease":
            return await super()._write(verb, resource, *arguments, **options)
        async with self._one_at_a_time:  # what was written before is done
            if self._when == "before" and self._done == self._number - 1:
                os._exit(EXIT_CODE)
            answer = await super()._write(verb, resource, *arguments, **options)
            self._done += 1
            if self._when == "after" and self._done == self._number:
                os._exit(EXIT_CODE)
            return answer


if __name__ == "__main__":
    kinds = SMALL_KINDS if os.environ.get("PLANNER") == "small" else KINDS
    sys.exit(run(lambda settings: Operator(settings, kinds=kinds, cluster_type=DyingCluster), sys.argv[1:]))

"""A real control plane with the kinds of the API installed, and a namespace for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from control_plane import ControlPlane

MANIFESTS = Path(__file__).parents[2] / "manifests"


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd, API server, controller manager and scheduler, without nodes. A test that stops a part starts it again."""
    identities = ("operator", "operator-of-two-namespaces", "alice", "bob")
    with ControlPlane(tmp_path_factory.mktemp("control-plane"), identities=identities) as running:
        # Client-side, as in the instructions: the schemas must fit into the annotation that this writes.
        running.kubectl("apply", "-f", str(MANIFESTS / "crds"))
        running.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(MANIFESTS / "crds"))
        yield running


@pytest.fixture
def namespace(control_plane: ControlPlane) -> str:
    """A new namespace in which pods can be created."""
    name = f"test-{uuid4().hex[:12]}"
    control_plane.kubectl("create", "namespace", name)
    control_plane.kubectl("wait", "--for=create", "--timeout=60s", "-n", name, "serviceaccount/default")
    return name

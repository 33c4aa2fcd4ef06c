"""Training on a real cluster: the operator installed by Helm, ranks in pods, clips and checkpoints in an object store.

One run that nothing disturbs is the truth. Whatever happens to the others, they end with its loss curve.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cluster_runs import STEPS, ClusterRun
from installation import Installation

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NewRun = Callable[[str], ClusterRun]


@pytest.fixture(scope="session")
def undisturbed(installation: Installation) -> dict[int, float]:
    """The loss of every step of a run that nothing happens to."""
    run = ClusterRun(installation, "undisturbed").create()
    try:
        status = run.until_phase("Succeeded")
        assert status["attempt"] == 1
        return run.losses()
    except AssertionError:
        print(run.describe())
        raise
    finally:
        run.delete()


def test_a_run_tells_how_far_it_is_and_completes(
    installation: Installation, new_run: NewRun, undisturbed: dict[int, float]
) -> None:
    assert sorted(undisturbed) == list(range(1, STEPS + 1))

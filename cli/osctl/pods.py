"""The pods of an object, as far as one may see them."""

from __future__ import annotations

from opensora_operator.constants import LABEL_UID
from opensora_operator.views import PodView, view_pod

from osctl.client import PODS, Client, Object
from osctl.errors import ApiError

UNSEEN = "pods, since you may not list them"


def list_pods(client: Client, namespace: str, owner: Object) -> list[PodView] | None:
    """The pods of all attempts in their order; None where one may not list them."""
    selector = f"{LABEL_UID}={owner['metadata']['uid']}"
    try:
        found = client.list(PODS, namespace, labels=selector)
    except ApiError as error:
        if error.status != 403:
            raise
        return None
    views = [view for body in found if (view := view_pod(body)) is not None]
    return sorted(views, key=lambda view: (view.attempt, view.index, view.created))


def has_started(pod: PodView) -> bool:
    """Whether the trainer runs or has run."""
    return pod.ready or pod.exit_code is not None or not pod.is_live

"""What a shell completes that only the cluster knows.

Silent where the cluster cannot be asked: a prompt is no place for errors.
"""

from __future__ import annotations

from osctl.errors import OsctlError

_TIMEOUT_SECONDS = 2.0


def complete_target(incomplete: str) -> list[str]:
    """Names of runs, and after `KIND/` those of another kind."""
    from osctl.client import Client  # a shell asks for words alone in most cases
    from osctl.kinds import find_kind, resource_of
    from osctl.kubeconfig import find_access
    from osctl.settings import resolve

    kind, slash, name = incomplete.rpartition("/")
    try:
        settings = resolve({}).settings
        access = find_access(settings.kubeconfig, context=settings.context)
        with Client(access, timeout_seconds=_TIMEOUT_SECONDS) as client:
            found = client.list(resource_of(find_kind(kind or "tr")), settings.namespace or access.namespace)
    except OsctlError:
        return []
    names = sorted(item["metadata"]["name"] for item in found)
    return [f"{kind}{slash}{found_name}" for found_name in names if found_name.startswith(name)]

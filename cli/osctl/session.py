"""What a command works with: settings, output, and a client that is made when it is first needed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from osctl.output import Output
from osctl.settings import Resolved, Settings

if TYPE_CHECKING:  # imported late: commands that ask no API server start without TLS
    from osctl.client import Client
    from osctl.kubeconfig import Access


class Session:
    """One command."""

    def __init__(self, resolved: Resolved, output: Output) -> None:
        self.resolved = resolved
        self.output = output

    @property
    def settings(self) -> Settings:
        """The settings of all layers."""
        return self.resolved.settings

    @cached_property
    def client(self) -> Client:
        """The API server. Raises KubeconfigError."""
        from osctl.client import Client
        from osctl.kubeconfig import find_access

        def log_in() -> Access:
            return find_access(self.settings.kubeconfig, context=self.settings.context)

        access = log_in()
        self.output.detail(f"{access.server}, context {access.context or 'none'} of {access.source}")
        return Client(access, timeout_seconds=self.settings.timeout_seconds, renew=log_in)

    @cached_property
    def namespace(self) -> str:
        """That of the settings, or else of the kubeconfig's context."""
        return self.settings.namespace or self.client.access.namespace

    def close(self) -> None:
        """Give up the connection, if there is one."""
        if "client" in self.__dict__:
            self.output.detail(f"{self.client.num_requests} requests to the API server")
            self.client.close()

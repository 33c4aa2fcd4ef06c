"""Client certificates at a real API server, which looks at them after the handshake."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from authority import DAY, NOW, Authority
from control_plane import ControlPlane
from shell import Terminal

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("clients")


@pytest.fixture(scope="module")
def plane(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One that knows whoever has a certificate of the authority."""
    folder = tmp_path_factory.mktemp("logins")
    (folder / "clients.crt").write_text(authority.pem)
    flags = [f"--client-ca-file={folder / 'clients.crt'}"]
    with ControlPlane(folder / "plane", scheduler=False, apiserver_flags=flags) as running:
        yield running


class CertificateTerminal(Terminal):
    """With a login by certificate."""

    login: Path

    def environment(self, identity: str = "admin") -> dict[str, str]:
        return {**super().environment(identity), "KUBECONFIG": str(self.login)}


def _terminal(plane: ControlPlane, folder: Path, authority: Authority, end: datetime.datetime) -> CertificateTerminal:
    terminal = CertificateTerminal(plane, "default", folder)
    config: dict[str, Any] = yaml.safe_load(plane.kubeconfig().read_text())
    pair = authority.issue("carol", end=end)
    config["users"][0]["user"] = {
        "client-certificate-data": base64.b64encode(pair.certificate.encode()).decode(),
        "client-key-data": base64.b64encode(pair.key.encode()).decode(),
    }
    terminal.login = folder / "certificate.yaml"
    terminal.login.write_text(yaml.safe_dump(config))
    return terminal


def test_a_good_certificate_gets_in_and_names_its_bearer(
    plane: ControlPlane, authority: Authority, tmp_path: Path
) -> None:
    said = _terminal(plane, tmp_path, authority, NOW + DAY).run("get", code=8)
    assert "carol" in said, "known, and without rights"


def test_an_expired_certificate_is_told_with_its_end(plane: ControlPlane, authority: Authority, tmp_path: Path) -> None:
    said = _terminal(plane, tmp_path, authority, NOW - DAY).run("get", code=8)
    assert "has expired: it was good until" in said
    assert "log in again" in said


def test_a_certificate_of_somebody_else_is_not_known(plane: ControlPlane, tmp_path: Path) -> None:
    said = _terminal(plane, tmp_path, Authority("others"), NOW + DAY).run("get", code=8)
    assert "does not know you" in said

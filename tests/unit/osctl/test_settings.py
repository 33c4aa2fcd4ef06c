"""Settings: layers, sources, mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from opensora_operator.fields import docs_of
from osctl.errors import UsageError
from osctl.settings import Settings, resolve


def _layers(home: Path) -> dict[str, str]:
    (home / ".config/osctl").mkdir(parents=True)
    (home / ".config/osctl/config.toml").write_text('namespace = "user"\ncontext = "user"\nqueue = "user"\n')
    (home / "osctl.toml").write_text('namespace = "project"\ncontext = "project"\ntimeout_seconds = 5\n')
    return {"HOME": str(home), "OSCTL_NAMESPACE": "variable", "OSCTL_COLOR": "never"}


def test_later_layers_win_and_every_value_knows_its_source(tmp_path: Path) -> None:
    environment = _layers(tmp_path)
    below = tmp_path / "deep" / "er"
    below.mkdir(parents=True)
    found = resolve({"namespace": "flag", "image": None}, environment=environment, folder=below)
    expected = Settings(namespace="flag", context="project", queue="user", color="never", timeout_seconds=5.0)
    assert found.settings == expected
    assert found.sources == {
        "kubeconfig": "built in",
        "context": str(tmp_path / "osctl.toml"),
        "namespace": "flag",
        "timeout_seconds": str(tmp_path / "osctl.toml"),
        "output": "built in",
        "color": "$OSCTL_COLOR",
        "store_patience_seconds": "built in",
        "image": "built in",
        "profile": "built in",
        "queue": str(tmp_path / ".config/osctl/config.toml"),
        "run_uri": "built in",
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("namespase = 'x'", "there is no setting 'namespase'"),
        ("output = 'xml'", "output is 'xml'"),
        ("timeout_seconds = 0", "timeout_seconds is 0"),
        ("timeout_seconds = true", "timeout_seconds is True"),
        ("namespace = 3", "namespace is 3"),
        ("namespace = ", "cannot be read"),
    ],
)
def test_a_wrong_setting_names_its_file(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "osctl.toml").write_text(text)
    with pytest.raises(UsageError, match=complaint) as caught:
        resolve({}, environment={"HOME": str(tmp_path)}, folder=tmp_path)
    assert str(tmp_path / "osctl.toml") in caught.value.message


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(UsageError, match=r"\$OSCTL_TIMEOUT_SECONDS: timeout_seconds is 'soon'"):
        resolve({}, environment={"OSCTL_TIMEOUT_SECONDS": "soon"}, folder=Path("/"))


def test_the_variable_for_finding_mistakes_is_no_setting() -> None:
    assert resolve({}, environment={"OSCTL_DEBUG": "1"}, folder=Path("/")).settings == Settings()


def test_config_view_shows_values_and_sources(osctl: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _layers(home).items():
        monkeypatch.setenv(name, value)
    result = osctl("config", "view", "--context", "flag")
    assert result.code == 0
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ["SETTING", "VALUE", "FROM"]
    assert ["context", "flag", "flag"] in lines
    assert ["namespace", "variable", "$OSCTL_NAMESPACE"] in lines
    data = json.loads(osctl("config", "view", "-o", "json").out)
    assert data["timeout_seconds"] == {"value": 5.0, "source": str(home / "osctl.toml")}


def test_every_setting_says_what_it_is_for(osctl: Any) -> None:
    docs = docs_of(Settings)
    wide = osctl("config", "view", "-o", "wide").out
    for field in dataclasses.fields(Settings):
        assert docs[field.name] in wide

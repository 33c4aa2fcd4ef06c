"""Settings: flags, environment, and values that cannot be used."""

from __future__ import annotations

import dataclasses

import pytest
from opensora_operator.settings import PREFIX, Settings, SettingsError, read_settings


def test_defaults_are_those_of_the_fields() -> None:
    settings = read_settings([], {"POD_NAME": "operator-1", "POD_NAMESPACE": "system"})
    assert settings == dataclasses.replace(Settings(), identity="operator-1", own_namespace="system")


def test_the_flag_wins_over_the_environment() -> None:
    environment = {PREFIX + "CONCURRENCY": "3", PREFIX + "RESYNC_SECONDS": "60"}
    settings = read_settings(["--concurrency", "5"], environment)
    assert (settings.concurrency, settings.resync_seconds) == (5, 60.0)


def test_namespaces_are_separated_by_commas() -> None:
    assert read_settings(["--namespaces=a, b,"], {}).namespaces == ("a", "b")
    assert read_settings(["--namespaces="], {}).namespaces == ()


def test_a_replica_outside_a_pod_has_a_name_of_its_own() -> None:
    settings = read_settings([], {})
    assert settings.identity
    assert settings.own_namespace == "default"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--concurrency", "many"], {}, "--concurrency is 'many'; it has to be a whole number"),
        (
            [],
            {PREFIX + "RESYNC_SECONDS": "often"},
            "_RESYNC_SECONDS is 'often'; it has to be a number",
        ),
        (["--leader-election", "maybe"], {}, "it has to be true or false"),
        (["--log-level", "loud"], {}, "it has to be one of debug, info, warning, error"),
        (["--concurrency", "0"], {}, "concurrency is 0; it has to be at least 1"),
        (["--resync-seconds", "0"], {}, "resync_seconds is 0.0; it has to be above 0"),
        (["--progress-writes-per-second", "0"], {}, "it has to be above 0"),
        (["--renew-seconds", "20"], {}, "two replicas may lead at the same time"),
        ([], {PREFIX + "CONCURENCY": "3"}, "OPENSORA_OPERATOR_CONCURENCY: no such setting"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(arguments: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        read_settings(arguments, environment)


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings(["--help"], {})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text
        assert (PREFIX + field.name.upper()) in text.replace("\n", "").replace(" ", "")

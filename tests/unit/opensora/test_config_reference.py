"""The reference page and `--help` come from the dataclasses, and say everything."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from opensora.config import describe
from opensora.config.components import COMPONENT_CONFIGS
from opensora.config.flags import parse_sample_command, parse_train_command
from opensora.config.load import parse_train_config
from opensora.config.sample import SampleConfig
from opensora.config.train import TrainConfig
from opensora.config.typed import dotted_keys, settings_classes


def test_the_checked_in_page_is_what_the_settings_say() -> None:
    assert describe.PAGE.read_text(encoding="utf-8") == describe.reference_page(), (
        "run python -m opensora.config.describe --write"
    )


def test_the_example_on_the_page_loads() -> None:
    example = describe.reference_page().partition("```yaml\n")[2].partition("```")[0]
    assert parse_train_config(example, source="page").optim.lr == 1e-4


@pytest.mark.parametrize("cls", [TrainConfig, SampleConfig])
def test_every_setting_has_an_explanation_on_the_page_and_in_the_help(cls: type) -> None:
    page, text = describe.reference_page(), describe.help_text(cls)
    settings = [setting for section in describe.sections_of(cls) for setting in section.settings]
    assert len(settings) > 40
    for setting in settings:
        assert len(setting.doc) > 5, setting.key
        assert f"| `{setting.key}` |" in page
        assert f"  {setting.key}=" in text


def test_the_example_defaults_are_those_of_the_fields() -> None:
    settings = {s.key: s for section in describe.sections_of(TrainConfig) for s in section.settings}
    assert settings["run_uri"].default == "required"
    assert yaml.safe_load(settings["optim.betas"].default) == [0.9, 0.999]
    assert settings["optim.ema_decay"].type == "number or null"
    assert settings["data.bad_clip"].type == '"fail" or "skip"'


def test_all_component_types_can_be_chosen_in_a_training_config() -> None:
    chosen = {name for section in describe.sections_of(TrainConfig) for name in section.types}
    assert chosen == set(COMPONENT_CONFIGS)


def test_keys_cover_all_fields() -> None:
    def count(cls: type) -> int:
        return sum(
            1 if not settings_classes(describe.field_types(cls)[item.name]) else 0 for item in dataclasses.fields(cls)
        )

    assert len([key for key in dotted_keys(TrainConfig) if key.startswith("data.")]) == count(
        describe.field_types(TrainConfig)["data"]
    )


def test_help_is_printed_and_lists_flags_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for parse, parts in (
        (
            parse_train_command,
            ["--warmup-steps", "train.steps=null", "optim.lr=0.0001", "Learning rate after warm-up."],
        ),
        (parse_sample_command, ["--num-frames", "condition_frame_length=5", "--run"]),
    ):
        with pytest.raises(SystemExit) as caught:
            parse(["--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        for part in parts:
            assert part in out

"""Whatever is written, the answer is a config or a ConfigError; and a config survives being written down."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opensora.config.load import (
    config_from_mapping,
    dump_config,
    load_sample_config,
    load_train_config,
    parse_train_config,
)
from opensora.config.opensora_keys import SAMPLE_RULES, TRAIN_RULES
from opensora.config.sample import SampleConfig
from opensora.config.train import TrainConfig
from opensora.config.typed import dotted_keys, field_types
from opensora.errors import ConfigError, OpenSoraError

BASE: dict[str, Any] = {
    "run_uri": "r",
    "data": {"path": "c.csv", "bucket_config": {"144p": {1: [1.0, 1]}}},
    "train": {"steps": 1},
}
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Random keys without effect would be logged by the thousand."""
    logger = logging.getLogger("opensora.config")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["fp32", "hash", "codec", "minilm", "STDiT3", 10**400, "s" * 100])
)
train_names = sorted({part for key in dotted_keys(TrainConfig) for part in key.split(".")})
names = st.sampled_from([*train_names, "144p", "dataset", "type", "<<", "0", "51", *[r.key for r in TRAIN_RULES]])
keys = names | st.text(max_size=4) | st.integers() | st.none()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=12,
)
texts = st.text(max_size=12) | st.sampled_from(
    ["null", "[1, 2]", "{a: 1}", "1e400", ".inf", "0x", "0o9", "&a [*a]", "!!float x"]
)
paths = st.lists(names | st.text(max_size=3), min_size=1, max_size=4).map(".".join) | st.sampled_from(
    dotted_keys(TrainConfig) + dotted_keys(SampleConfig)
)
overrides = st.lists(st.tuples(paths, texts).map("=".join) | st.text(max_size=10), max_size=4)


def answers(make: Any) -> Any:
    """The config, or `None` for a ConfigError with a message; anything else fails the test."""
    try:
        return make()
    except ConfigError as error:
        if not error.message.strip():
            raise AssertionError("an error without a message") from error
        return None


@QUICK
@given(st.dictionaries(st.sampled_from(list(field_types(TrainConfig))) | keys, values, max_size=5))
def test_random_mappings_give_a_config_or_a_config_error(mapping: dict[Any, Any]) -> None:
    answers(lambda: config_from_mapping(TrainConfig, mapping, "fuzz"))
    answers(lambda: config_from_mapping(TrainConfig, {**BASE, **mapping}, "fuzz"))
    answers(lambda: config_from_mapping(SampleConfig, {"run": "r", "prompt": ["a"], **mapping}, "fuzz"))


@QUICK
@given(overrides, st.dictionaries(st.sampled_from([r.key for r in (*TRAIN_RULES, *SAMPLE_RULES)]), values, max_size=3))
def test_random_overrides_and_flags_give_a_config_or_a_config_error(
    overrides: list[str], flags: dict[str, Any]
) -> None:
    base = ["run_uri=r", "data.path=c", "data.bucket_config.144p.1=[1.0, 1]", "train.steps=1"]
    answers(lambda: load_train_config(None, [*base, *overrides], flags=flags))
    answers(lambda: load_sample_config(None, ["run=r", "prompt=[a]", *overrides], flags=flags))


@QUICK
@given(st.text() | st.lists(st.sampled_from(list("{}[]:,-&*!|>'\"%@`#?\n ab1.\t<~")), max_size=40).map("".join))
def test_random_text_gives_a_config_or_a_config_error(text: str) -> None:
    answers(lambda: parse_train_config(text, source="fuzz"))
    answers(lambda: parse_train_config("run_uri: r\n" + text, source="fuzz"))


finite = st.floats(allow_nan=False, allow_infinity=False)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


@QUICK
@given(
    prompts=st.lists(unicode_text, max_size=4),
    run=unicode_text,
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    share=st.floats(0, 1),
    table=st.dictionaries(
        unicode_text,
        st.dictionaries(
            st.integers(0, 10**9), st.tuples(finite | st.tuples(finite, finite), st.none() | st.integers()), max_size=3
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_any_config_is_equal_after_being_written_and_read(
    prompts: list[str], run: str, lr: float, share: float, table: dict[str, Any]
) -> None:
    config = config_from_mapping(
        TrainConfig,
        {
            **BASE,
            "run_uri": run,
            "optim": {"lr": lr},
            "samples": {"prompts": prompts},
            "data": {"path": run, "bucket_config": table},
            "train": {"epochs": 3, "mask_ratios": {"random": share}},
        },
        "fuzz",
    )
    assert parse_train_config(dump_config(config), source="dump") == config


def test_the_fuzz_can_fail() -> None:
    def broken() -> None:
        raise KeyError("not ours")

    with pytest.raises(KeyError):
        answers(broken)
    assert issubclass(ConfigError, OpenSoraError)

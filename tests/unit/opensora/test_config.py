"""Config files and overrides become typed settings, or one error that says everything that is wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opensora.config.components import CodecConfig, HashTextConfig, MiniLMTextConfig, STDiT3Config
from opensora.config.load import (
    config_from_mapping,
    dump_config,
    load_sample_config,
    load_train_config,
    parse_train_config,
)
from opensora.config.train import OptimConfig, SamplesConfig, TrainConfig
from opensora.errors import ConfigError, ExitCode

MINIMAL = """\
run_uri: runs/first
data:
  path: clips.csv
  bucket_config:
    144p: {1: [1.0, 8], 51: [[1.0, 0.33], 2]}
train: {steps: 100}
"""


def parse(text: str = MINIMAL, *overrides: str) -> TrainConfig:
    return parse_train_config(text, source="cfg.yaml", overrides=overrides)


def message(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, *overrides)
    assert caught.value.exit_code == ExitCode.CONFIG
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file


def test_yaml_becomes_typed_settings_and_the_rest_has_its_default() -> None:
    config = parse()
    assert config.run_uri == "runs/first"
    assert config.data.bucket_config == {"144p": {1: (1.0, 8), 51: ((1.0, 0.33), 2)}}
    assert config.train.steps == 100
    assert config.optim == OptimConfig()
    assert config.vae == CodecConfig()


def test_json_means_the_same_as_yaml(write: Any) -> None:
    tree = {
        "run_uri": "runs/first",
        "data": {"path": "clips.csv", "bucket_config": {"144p": {"1": [1.0, 8], "51": [[1.0, 0.33], 2]}}},
        "train": {"steps": 100},
    }
    assert load_train_config(write("a.json", json.dumps(tree))) == parse()


def test_a_python_config_inherits_from_its_base(write: Any) -> None:
    write(
        "base.py",
        "_lr = 2e-4\nrun_uri = 'runs/first'\noptim = dict(lr=_lr, eps=1e-15)\ntrain = dict(steps=5)\n"
        "data = dict(path='clips.csv', bucket_config={'144p': {1: (1.0, 8), 51: ((1.0, 0.33), 2)}})\n",
    )
    path = write("child.py", "_base_ = ['base.py']\ntrain = dict(steps=100)\noptim = dict(eps=1e-8)\n")
    config = load_train_config(path, ["optim.betas.1=0.95"])
    assert config.train.steps == 100
    assert config.optim == OptimConfig(lr=2e-4, eps=1e-8, betas=(0.9, 0.95))
    assert config.data == parse().data


@pytest.mark.parametrize(
    ("text", "line"),
    [("train = dict(\n", "line 1"), ("x = 1\ny = x / 0\n", "line 2"), ("import no_such_module\n", "line 1")],
    ids=["syntax", "raises", "import"],
)
def test_a_python_config_that_cannot_run_is_named_with_its_line(write: Any, text: str, line: str) -> None:
    path = write("broken.py", text)
    with pytest.raises(ConfigError) as caught:
        load_train_config(path)
    assert path in str(caught.value)
    assert line in str(caught.value)


def test_a_problem_in_a_base_is_traced_to_the_line_of_the_base(write: Any) -> None:
    base = write("base.py", "run_uri = 'r'\noptim = dict(\n    lr='fast',\n)\n")
    path = write("child.py", "_base_ = ['base.py']\n")
    with pytest.raises(ConfigError, match="lr='fast'") as caught:
        load_train_config(path)
    assert f"{base}, line 3" in str(caught.value)


def test_numbers_are_read_as_they_are_meant() -> None:
    config = parse(
        MINIMAL.replace("steps: 100", "steps: 1e5") + "optim: {lr: 1e-4, weight_decay: 0, ema_decay: null}\n"
    )
    assert config.train.steps == 100_000
    assert isinstance(config.train.steps, int)
    assert config.optim.lr == 1e-4
    assert isinstance(config.optim.weight_decay, float)
    assert config.optim.ema_decay is None


def test_text_that_looks_like_something_else_stays_text() -> None:
    config = parse(MINIMAL + "samples: {prompts: [yes, 9:16, 2024-01-01, 0b1]}\n")
    assert config.samples.prompts == ("yes", "9:16", "2024-01-01", "0b1")


def test_resolutions_that_look_like_numbers_are_names() -> None:
    config = parse(MINIMAL.replace("144p", "512"))
    assert list(config.data.bucket_config) == ["512"]


def test_anchors_and_merges_work() -> None:
    config = parse(
        MINIMAL + "optim: &o {lr: 0.5, eps: 0.25}\nvalidation: {bucket_config: {144p: &b {1: [1.0, 3]}, 256: *b}}\n"
    )
    assert config.validation.bucket_config == {"144p": {1: (1.0, 3)}, "256": {1: (1.0, 3)}}
    merged = parse(MINIMAL.replace("train: {steps: 100}", "train: {<<: {steps: 7, log_every: 3}, steps: 100}"))
    assert (merged.train.steps, merged.train.log_every) == (100, 3)


def test_components_are_chosen_by_type() -> None:
    assert parse(MINIMAL + "text_encoder: {type: minilm, model_max_length: 9}\n").text_encoder == MiniLMTextConfig(
        model_max_length=9
    )
    assert parse(MINIMAL + "text_encoder: {output_dim: 9}\n").text_encoder == HashTextConfig(output_dim=9)


def test_a_type_that_fixes_sizes_needs_no_sizes() -> None:
    model = parse(MINIMAL + "model: {type: STDiT3-3B/2}\n").model
    assert (model.hidden_size, model.num_heads, model.depth) == (1872, 26, 28)
    assert "fixes it to 1872" in message(MINIMAL + "model: {type: STDiT3-3B/2, hidden_size: 64}\n")


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("train.steps=5", lambda c: c.train.steps, 5),
        ("optim.lr=1e-3", lambda c: c.optim.lr, 1e-3),
        ("optim.ema_decay=null", lambda c: c.optim.ema_decay, None),
        ("data.bucket_config.144p.51=[1.0,2]", lambda c: c.data.bucket_config["144p"][51], (1.0, 2)),
        ("data.bucket_config.240p.17=[0.5, null]", lambda c: c.data.bucket_config.get("240p"), {17: (0.5, None)}),
        ("data.bucket_config={256: {1: [1.0, 1]}}", lambda c: c.data.bucket_config, {"256": {1: (1.0, 1)}}),
        ('samples.prompts=["a","b"]', lambda c: c.samples.prompts, ("a", "b")),
        ("samples.prompts.0=a cat: asleep, 9:16", lambda c: c.samples.prompts, ("a cat: asleep, 9:16",)),
        ("model.patch_size.1=4", lambda c: c.model.patch_size, (1, 4, 2)),
        ("run_uri=2024", lambda c: c.run_uri, "2024"),
        ("run_uri=s3://b/p=1", lambda c: c.run_uri, "s3://b/p=1"),
        ("checkpoint.load=[x", lambda c: c.checkpoint.load, "[x"),
        ("train.mask_ratios.image_head=0.2", lambda c: c.train.mask_ratios, {"image_head": 0.2}),
        ("text_encoder={type: minilm}", lambda c: c.text_encoder, MiniLMTextConfig()),
        ("text_encoder.model_max_length=7", lambda c: c.text_encoder, HashTextConfig(model_max_length=7)),
        ("train.epochs=2", lambda c: (c.train.steps, c.train.epochs), (None, 2)),
    ],
)
def test_an_override_changes_exactly_its_setting(override: str, get: Any, expected: Any) -> None:
    before = parse()
    config = parse(MINIMAL, override)
    assert get(config) == expected
    assert get(before) != expected
    section = override.partition("=")[0].partition(".")[0]
    for name in vars(before):
        if name != section:
            assert getattr(config, name) == getattr(before, name)


def test_list_items_are_replaced_and_appended_in_order() -> None:
    config = parse(MINIMAL, 'samples.prompts=["a", "b"]', "samples.prompts.0=c", "samples.prompts.2=d")
    assert config.samples.prompts == ("c", "b", "d")
    assert "samples.prompts has 2 items" in message(MINIMAL, 'samples.prompts=["a", "b"]', "samples.prompts.5=c")


def test_the_last_override_wins() -> None:
    assert parse(MINIMAL, "train.steps=5", "train.steps=6").train.steps == 6


def test_two_settings_that_exclude_each_other_are_an_error_when_given_together() -> None:
    assert "exactly one" in message(MINIMAL, "train.steps=5", "train.epochs=2")
    assert "exactly one" in message(MINIMAL.replace("steps: 100", "steps: 100, epochs: 2"))


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (MINIMAL + "trian: {steps: 1}\n", (), ["trian=", "cfg.yaml, line 7", "unknown key", "did you mean train?"]),
        (MINIMAL + "optim:\n  lr: 0.1\n  momentun: 1\n", (), ["optim.momentun=1", "line 9", "unknown key", "lr"]),
        (MINIMAL + "optim: {epss: 1}\n", (), ["did you mean optim.eps?"]),
        (MINIMAL + "eps: 1\n", (), ["eps=1", "did you mean optim.eps?"]),
        (MINIMAL, ("lr=3",), ["lr=3", "Open-Sora's lr is optim.lr"]),
        (MINIMAL, ("train.stepz=3",), ["train.stepz=3", "command line", "train.steps"]),
        (MINIMAL, ("train.steps=x",), ["train.steps='x'", "a whole number"]),
        (MINIMAL, ("train.steps=1.5",), ["train.steps=1.5", "a whole number"]),
        (MINIMAL, ("train.steps=true",), ["train.steps=True", "a whole number"]),
        (MINIMAL, ('optim.lr="1"',), ["optim.lr='1'", "a number"]),
        (MINIMAL, ("optim.lr=.nan",), ["optim.lr=nan", "not a finite number"]),
        (MINIMAL, ("data.shuffle=yes",), ["data.shuffle='yes'", "true or false"]),
        (MINIMAL, ("dtype=bf61",), ["dtype='bf61'", "not one of fp64, fp32, bf16, fp16", "did you mean bf16?"]),
        (MINIMAL, ("dtype=fp16",), ["dtype='fp16'", "small gradients would vanish", "dtype=bf16"]),
        (MINIMAL, ("samples.prompts=cat",), ["samples.prompts='cat'", "list of text", "[cat]"]),
        (MINIMAL, ("optim.betas=[0.9]",), ["optim.betas=[0.9]", "2 items"]),
        (MINIMAL, ("run_uri=null",), ["run_uri=None", "expected text"]),
        (MINIMAL, ("data=null",), ["data=None", "settings of data"]),
        (MINIMAL, ("data.bucket_config.144p.many=[1.0, 1]",), ["144p.many", "the key must be a whole number"]),
        (MINIMAL, ("train.steps.deep=1",), ["train.steps is 100, which has no items"]),
        (MINIMAL, ("train.steps",), ["'train.steps'", "key=value"]),
        (MINIMAL, ("train.steps=[1",), ["not valid YAML"]),
        (MINIMAL, ("vae.type=coded",), ["vae.type='coded'", "unknown vae type", "did you mean 'codec'?"]),
        (MINIMAL, ("vae={type: hash}",), ["vae.type='hash'", "known types: codec"]),
        (MINIMAL, ("vae.type=[1]",), ["vae.type=[1]", "unknown vae type"]),
        (
            MINIMAL + "text_encoder: {type: minilm, output_dim: 3}\n",
            (),
            ["text_encoder.output_dim=3", "type hash has it"],
        ),
        (MINIMAL, ("model.num_heads=5",), ["model.hidden_size=1152", "model.num_heads=5"]),
        (MINIMAL, ("parallel.sequence=2",), ["parallel.sequence=2", "command line"]),
        (MINIMAL.replace("path: clips.csv", "root: x"), (), ["data.path is required", "line"]),
        ("seed: 1\n", (), ["run_uri is required", "data.path is required"]),
        (MINIMAL + "seed: 1\nseed: 2\n", (), ["cfg.yaml, line 8", "the key seed is given twice"]),
        (MINIMAL + "seed: [1\n", (), ["cfg.yaml, line", "not valid YAML"]),
        (MINIMAL + "seed: !!python/name:os.system x\n", (), ["cfg.yaml, line 7", "has no meaning here"]),
        (MINIMAL + "optim: &a\n  lr: *a\n", (), ["an alias that contains itself"]),
        ("[" * 5000, (), ["nested too deeply"]),
        ("- 1\n", (), ["expected keys with values"]),
        (MINIMAL + "_base_: a.yaml\n", (), ["_base_", ".py"]),
    ],
)
def test_an_error_names_key_value_place_and_remedy(text: str, overrides: tuple[str, ...], parts: list[str]) -> None:
    shown = message(text, *overrides)
    for part in parts:
        assert part in shown


def test_all_problems_are_reported_together() -> None:
    shown = message(MINIMAL + "optim: {lr: fast}\nvae: {type: x}\nseeed: 3\n", "train.stepz=1", "parallel.replicas=0")
    for key in ("optim.lr", "vae.type", "seeed", "train.stepz", "parallel.replicas"):
        assert key in shown
    assert shown.startswith("5 settings are wrong:")


def test_a_missing_or_foreign_file_is_a_clear_error(tmp_path: Path) -> None:
    for name, part in [("none.yaml", "no such file"), ("none.toml", "not a config file")]:
        with pytest.raises(ConfigError, match=part):
            load_train_config(str(tmp_path / name))
    (tmp_path / "latin.yaml").write_bytes(b"run_uri: caf\xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_train_config(str(tmp_path / "latin.yaml"))


def test_a_dumped_config_loads_back_equal() -> None:
    config = parse(
        MINIMAL,
        'samples.prompts=["yes", "9:16", "1e5", "é", "", "null", "a: b"]',
        "optim.eps=1e-15",
        "train.mask_ratios={image_head: 0.2}",
        "model={type: STDiT3-3B/2}",
    )
    assert parse_train_config(dump_config(config), source="dump") == config


@pytest.mark.parametrize(
    "text", ["\x85", "a\x85b", " \u2028", "\ufeffa", "\r\n", "\t", "a\n\nb ", "'\"", "\x00", "😀", "#", "- a"]
)
def test_unusual_text_survives_a_dump(text: str) -> None:
    config = dataclasses.replace(parse(), run_uri=text, samples=SamplesConfig(prompts=(text,)))
    assert parse_train_config(dump_config(config), source="dump") == config


def test_a_dump_means_the_same_to_every_yaml_reader() -> None:
    import yaml

    config = parse(MINIMAL, 'samples.prompts=["yes", "9:16", "1e5", "2024-01-01"]')
    assert yaml.safe_load(dump_config(config))["samples"]["prompts"] == ["yes", "9:16", "1e5", "2024-01-01"]


def test_settings_of_one_component_can_be_read_alone() -> None:
    model = config_from_mapping(STDiT3Config, {"hidden_size": 64, "num_heads": 4, "patch_size": [1, 2, 2]}, "here")
    assert (model.hidden_size, model.patch_size) == (64, (1, 2, 2))
    with pytest.raises(ConfigError, match=r"hiden_size=64 \(here\): unknown key"):
        config_from_mapping(STDiT3Config, {"hiden_size": 64}, "here")


def test_sampling_from_a_run_needs_only_a_prompt() -> None:
    config = load_sample_config(None, ["run=runs/first"], flags={"prompt": ["a cat"], "step": 200})
    assert (config.run, config.prompt, config.step, config.model) == ("runs/first", ("a cat",), 200, None)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"prompt": ["a"]}, "model, vae, text_encoder, scheduler not set"),
        ({"run": "r"}, "neither prompt nor prompt_path"),
        ({"run": "r", "prompt": ["a"], "prompt_path": "b.txt"}, "only one of them"),
        ({"run": "r", "prompt": ["a"], "resolution": "240p"}, "each needs the other"),
        ({"run": "r", "prompt": ["a"], "num_frames": "3x"}, "num_frames='3x'"),
        ({"run": "r", "prompt": ["a", "b"], "mask_strategy": ["0"]}, "1 entries for 2 prompts"),
        ({"run": "r", "prompt": ["a"], "condition_frame_length": 4}, "multiple of 5"),
        ({"run": "r", "prompt_path": "b", "start_index": 3, "end_index": 3}, "no prompt is between"),
        ({"run": "r", "prompt": ["a"], "step": "first"}, "step='first'"),
    ],
)
def test_impossible_sampling_settings_are_refused(flags: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sample_config(None, flags=flags)
    assert part in str(caught.value)


def test_a_flag_replaces_its_rival_in_the_file(write: Any) -> None:
    path = write("sample.yaml", "run: r\nprompt_path: many.txt\nimage_size: [64, 64]\n")
    config = load_sample_config(path, flags={"prompt": ["one"], "resolution": "240p", "aspect_ratio": "9:16"})
    assert (config.prompt, config.prompt_path) == (("one",), None)
    assert (config.image_size, config.resolution) == (None, "240p")


def test_reading_settings_imports_neither_torch_nor_the_python_config_reader() -> None:
    code = (
        "import sys, opensora.config.flags, opensora.config.load\n"
        "print([name for name in ('torch', 'mmengine', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_reading_a_python_config_does_not_import_torch(write: Any) -> None:
    path = write("a.py", "run_uri = 'r'\n")
    code = (
        "import sys\nfrom opensora.config.documents import read_document\n"
        f"print(read_document({path!r}).values, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "{'run_uri': 'r'} False"

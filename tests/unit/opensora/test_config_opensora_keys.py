"""Configs and flags of Open-Sora mean here what they mean there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from opensora.config.flags import parse_bool, parse_sample_command, parse_train_command
from opensora.config.load import load_sample_config, load_train_config
from opensora.config.opensora_keys import SAMPLE_RULES, TRAIN_RULES
from opensora.config.sample import SampleConfig
from opensora.config.train import TrainConfig
from opensora.config.typed import dotted_keys
from opensora.errors import ConfigError, ExitCode, UsageError

STAGE3 = str(Path(__file__).parents[3] / "configs" / "opensora-v1-2" / "train" / "stage3.py")
DOWNLOAD_FREE = ["vae={type: codec}", "text_encoder={type: hash}"]

FLAT = """\
dataset = dict(type="VariableVideoTextDataset", data_path="clips.csv", transform_name="center", frame_interval=3)
bucket_config = {"144p": {1: (0.5, 48), 16: (1.0, 6)}}
outputs = "outputs"
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load_text(text: str, overrides: list[str] | None = None, **flags: Any) -> TrainConfig:
        (tmp_path / "stage1.py").write_text(text)
        return load_train_config(str(tmp_path / "stage1.py"), overrides or [], flags=flags)

    return load_text


def test_stage_3_of_version_1_2_loads_unchanged() -> None:
    config = load_train_config(STAGE3, DOWNLOAD_FREE, flags={"data_path": "clips.csv"})
    assert config.run_uri == "outputs/stage3-STDiT3-XL-2"
    assert (config.seed, config.dtype) == (42, "bf16")
    assert (config.optim.lr, config.optim.eps, config.optim.ema_decay) == (1e-4, 1e-15, 0.99)
    assert (config.optim.grad_clip, config.optim.warmup_steps, config.optim.weight_decay) == (1.0, 1000, 0.0)
    assert (config.checkpoint.every_steps, config.checkpoint.load) == (200, None)
    assert (config.train.epochs, config.train.steps, config.train.log_every) == (1000, None, 10)
    assert (config.parallel.sharding, config.parallel.activation_checkpointing) == ("zero2", "full")
    assert (config.data.path, config.data.transform, config.data.num_threads) == ("clips.csv", "resize_crop", 8)
    assert config.data.bucket_config["240p"][408] == ((0.5, 0.4), 2)
    assert config.data.bucket_config["480p"][408] == (0.0, None)
    assert len(config.data.bucket_config) == 10
    assert config.train.mask_ratios is not None
    assert config.train.mask_ratios["image_head"] == 0.22
    assert list(config.train.mask_ratios)[:3] == ["random", "intepolate", "quarter_random"]
    assert sum(config.train.mask_ratios.values()) == pytest.approx(0.25)
    assert (config.model.type, config.model.qk_norm, config.model.freeze_y_embedder) == ("STDiT3-XL/2", True, True)
    assert (config.model.enable_flash_attn, config.model.enable_layernorm_kernel) == (True, True)
    assert (config.scheduler.sample_method, config.scheduler.use_timestep_transform) == ("logit-normal", True)
    assert not config.report.wandb


def test_a_component_that_is_not_there_is_named_with_its_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_train_config(STAGE3, flags={"data_path": "clips.csv"})
    lines = Path(STAGE3).read_text().splitlines()
    for kind, name in (("vae", "OpenSoraVAE_V1_2"), ("text_encoder", "t5")):
        line = next(number for number, text in enumerate(lines, 1) if f'type="{name}"' in text)
        assert f"{kind}.type='{name}' ({STAGE3}, line {line}): unknown {kind} type" in str(caught.value)


def test_what_open_sora_assumes_where_a_config_is_silent_holds(load: Any) -> None:
    config = load(FLAT)
    assert (config.train.epochs, config.train.log_every, config.checkpoint.every_steps) == (1000, 1, 0)
    assert (config.seed, config.optim.lr, config.optim.eps, config.optim.ema_decay) == (1024, 1e-4, 1e-8, 0.9999)
    assert (config.optim.grad_clip, config.optim.warmup_steps, config.dtype) == (0.0, 0, "bf16")
    assert (config.data.transform, config.data.frame_interval) == ("center", 3)


def test_steps_on_the_command_line_replace_the_epochs_of_the_file(load: Any) -> None:
    for text in (FLAT, FLAT + "epochs = 7\n"):
        config = load(text, ["train.steps=12"])
        assert (config.train.steps, config.train.epochs) == (12, None)


@pytest.mark.parametrize(
    ("line", "get", "expected"),
    [
        ("grad_checkpoint = False", lambda c: c.parallel.activation_checkpointing, "none"),
        ("plugin = 'zero1'", lambda c: c.parallel.sharding, "zero2"),
        ("plugin = 'zero2-seq'; sp_size = 1", lambda c: c.parallel.sequence, 1),
        ("num_workers = 0", lambda c: c.data.num_threads, 1),
        ("warmup_steps = None", lambda c: c.optim.warmup_steps, 0),
        ("load = 's3://b/run/checkpoints/step-1'", lambda c: c.checkpoint.load, "s3://b/run/checkpoints/step-1"),
        ("wandb = True", lambda c: c.report.wandb, True),
        ("dtype = 'float32'", lambda c: c.dtype, "fp32"),
        ("model = dict(type='STDiT3', enable_flashattn=True)", lambda c: c.model.enable_flash_attn, True),
        ("mask_ratios = {'mask_no': 0.75, 'mask_image_head': 0.25}", lambda c: c.train.mask_ratios,
         {"identity": 0.75, "image_head": 0.25}),
        ("outputs = 's3://b/out/'", lambda c: c.run_uri, "s3://b/out/stage1-STDiT3"),
        ("batch_size = None; load_video_features = False", lambda c: c.train.epochs, 1000),
    ],
)  # fmt: skip
def test_a_flat_key_lands_in_its_place(load: Any, line: str, get: Any, expected: Any) -> None:
    assert get(load(FLAT + line + "\n")) == expected


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("batch_size = 8", "batch sizes stand in bucket_config"),
        ("load_video_features = True", "latents from disk"),
        ("load_text_features = True", "text features from disk"),
        ("sp_size = 2", "parallel.sequence=2"),
        ("plugin = 'zero9'", "plugin='zero9'"),
        ("dataset['type'] = 'VideoTextDataset'", "VariableVideoTextDataset"),
        ("dataset['image_size'] = (256, 256)", "dataset.image_size=(256, 256)"),
        ("dataset['dummy_text_feature'] = True", "dummy_text_feature"),
        ("dataset['data_pth'] = 'x'", "did you mean dataset.data_path?"),
        ("lr = 1e-4; optim = dict(lr=1e-3)", "optim.lr is given as well"),
        ("num_eval_timesteps = 10", "num_eval_timesteps=10"),
        ("mask_ratios = {'mask_nothing': 1.0}", "unknown mask"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(load: Any, line: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(FLAT + line + "\n")
    assert part in str(caught.value)


def test_keys_without_effect_are_logged_with_the_reason(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="opensora.config"):
        load(FLAT + "num_bucket_build_workers = 16\nreduce_bucket_size_in_m = 20\n")
    for key in ("num_bucket_build_workers=16", "reduce_bucket_size_in_m=20"):
        assert any(key in text and "has no effect: " in text for text in caplog.messages)


def test_load_warns_that_it_does_not_continue_a_run(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    load(FLAT, load="runs/other")
    assert any("same run_uri" in record.message and record.levelno == logging.WARNING for record in caplog.records)


def test_flags_win_over_the_file_and_overrides_over_flags(load: Any) -> None:
    text = FLAT + "lr = 1e-4\nckpt_path = 'a'\n"
    config = load(text, ["optim.lr=3e-4"], lr=2e-4, ckpt_path="b", outputs="elsewhere", data_path="new.csv", seed=7)
    assert config.optim.lr == 3e-4
    assert load(text, lr=2e-4).optim.lr == 2e-4
    assert (config.model.from_pretrained, config.data.path, config.seed) == ("b", "new.csv", 7)
    assert config.run_uri == "elsewhere/stage1-STDiT3"


def test_every_rule_leads_to_a_setting_that_exists() -> None:
    for cls, rules in ((TrainConfig, TRAIN_RULES), (SampleConfig, SAMPLE_RULES)):
        for rule in rules:
            assert rule.target is None or rule.target in dotted_keys(cls), rule.key
            assert rule.verdict == "moved" or rule.text, rule.key


def test_the_training_flags_of_open_sora_are_understood() -> None:
    command = parse_train_command(
        ["cfg.py", "--data-path", "a.csv", "--load", "ckpt", "--lr", "1e-3", "--wandb", "False", "--warmup-steps", "5",
         "--start-from-scratch", "--flash-attn", "y", "--seed", "3", "train.steps=5", "optim.betas=[0.9, 0.95]"]
    )  # fmt: skip
    assert command.config == "cfg.py"
    assert command.overrides == ("train.steps=5", "optim.betas=[0.9, 0.95]")
    assert command.flags == {
        "data_path": "a.csv", "load": "ckpt", "lr": 1e-3, "wandb": False, "warmup_steps": 5,
        "start_from_scratch": True, "flash_attn": True, "seed": 3,
    }  # fmt: skip


def test_the_sampling_flags_of_open_sora_reach_the_settings() -> None:
    command = parse_sample_command(
        ["--run", "r", "--num-frames", "4s", "--image-size", "240", "426", "--prompt", "a cat", "a = b", "--fps",
         "24", "--num-sampling-steps", "30", "--cfg-scale", "7", "--loop", "2", "--aes", "6.5", "--camera-motion",
         "pan right", "--reference-path", "", "b.png", "--mask-strategy", "", "0", "--prompt-as-path", "--watermark",
         "no", "align=5"]
    )  # fmt: skip
    config = load_sample_config(command.config, command.overrides, flags=command.flags)
    assert (config.num_frames, config.image_size, config.prompt) == ("4s", (240, 426), ("a cat", "a = b"))
    assert (config.num_sampling_steps, config.cfg_scale, config.loop, config.aes) == (30, 7.0, 2, 6.5)
    assert (config.reference_path, config.mask_strategy, config.align) == (("", "b.png"), ("", "0"), 5)
    assert config.prompt_as_path
    assert config.camera_motion == "pan right"


def test_every_flag_is_accepted_by_the_settings_or_refused_with_a_reason() -> None:
    refused = {"llm_refine": True, "prompt_generator": "gpt", "watermark": True, "outputs": "o", "data_path": "d"}
    for key, value in refused.items():
        with pytest.raises(ConfigError, match="cannot be honoured"):
            load_sample_config(None, flags={"run": "r", "prompt": ["a"], key: value})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--warmup", "3"], ["unknown flag '--warmup'", "--warmup-steps"]),
        (["--data-pth=x"], ["unknown flag '--data-pth'", "--data-path"]),
        (["--zzz"], ["unknown flag '--zzz'", "key=value"]),
        (["a.py", "b.py"], ["unexpected argument 'b.py'"]),
        (["--lr", "fast"], ["--lr", "'fast'"]),
        (["--wandb", "maybe"], ["--wandb", "'maybe'"]),
        (["--seed"], ["--seed"]),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_train_command(arguments)
    assert caught.value.exit_code == ExitCode.USAGE
    for part in parts:
        assert part in str(caught.value)


def test_a_mistyped_override_is_reported_as_an_unknown_setting() -> None:
    command = parse_train_command(["trian.steps=5", "--lr", "1e-3"])
    assert command.config is None
    with pytest.raises(ConfigError, match="trian"):
        load_train_config(command.config, command.overrides, flags=command.flags)


def test_bool_words_are_those_of_open_sora() -> None:
    assert [parse_bool(word) for word in ("yes", "True", "t", "Y", "1")] == [True] * 5
    assert [parse_bool(word) for word in ("no", "False", "f", "N", "0")] == [False] * 5

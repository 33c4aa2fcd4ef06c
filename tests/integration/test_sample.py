"""`python -m opensora.sample`, from a run, a weight file and a config, with its files on disk and in a bucket."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from opensora import sample
from opensora.checkpoint import CheckpointManager
from opensora.config.load import config_from_mapping, dump_config
from opensora.config.train import CheckpointConfig, TrainConfig
from opensora.datasets.reader import Video
from opensora.errors import ExitCode
from opensora.registry import MODELS
from opensora.storage import Storage

pytestmark = pytest.mark.integration

MODEL = {"type": "STDiT3", "hidden_size": 32, "depth": 1, "num_heads": 2}
TEXT = {"type": "hash", "output_dim": 16, "model_max_length": 8}
SCHEDULER = {"type": "rflow", "num_sampling_steps": 2, "use_timestep_transform": True, "cfg_scale": 2.0}
SIZE = {"num_frames": 17, "image_size": [16, 24], "fps": 8}


def build_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = MODELS.build({**MODEL, "in_channels": 16, "caption_channels": 16, "model_max_length": 8})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def write_averages(path: Path) -> None:
    """What an export of `make_run` holds: the averages of step 2, and the weights' own buffers."""
    state = {**build_model(2).state_dict(), **dict(build_model(12).named_parameters())}
    save_file({name: value.detach().contiguous() for name, value in state.items()}, path)


def make_run(storage: Storage, *, ema_decay: float | None = 0.9) -> None:
    """A run with two checkpoints whose averages differ from their weights."""
    config = config_from_mapping(
        TrainConfig,
        {
            "run_uri": storage.uri,
            "dtype": "fp32",
            "device": "cpu",
            "model": MODEL,
            "text_encoder": TEXT,
            "scheduler": SCHEDULER,
            "data": {"path": "meta.csv", "bucket_config": {"144p": {17: [1.0, 1]}}},
            "train": {"steps": 2},
            "optim": {"ema_decay": ema_decay},
            "samples": SIZE,
        },
        "test",
    )
    storage.write("config.yaml", dump_config(config).encode())
    manager = CheckpointManager(storage, attempt=1, config=CheckpointConfig(), is_main=True, process_group=None)
    for step in (1, 2):
        state = {f"model.{name}": value for name, value in build_model(step).state_dict().items()}
        if ema_decay is not None:
            state |= {f"ema.{name}": value for name, value in build_model(10 + step).named_parameters()}
        manager.save(state, step=step, metadata={}, wait=True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    storage = Storage(str(tmp_path_factory.mktemp("run")))
    make_run(storage)
    return storage.uri


def call(*arguments: str) -> int:
    return sample.main(list(arguments))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def frames(path: Path) -> np.ndarray:
    found: dict[int, np.ndarray] = {}
    with Video(Storage(str(path.parent)), path.name) as video:
        assert video.read(range(video.num_frames), lambda i, frame: found.update({i: np.array(frame)}))
    return np.stack([found[i] for i in sorted(found)])


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def stamp(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix in (".mp4", ".png")}


def test_clips_of_a_run_take_its_sizes_and_newest_averages(run_dir: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("--run", run_dir, "--prompt", "a cat", "a dog", "--save-dir", str(out)) == ExitCode.DONE
    assert files(out) == {
        "sample_0000.mp4", "sample_0000.json", "sample_0001.mp4", "sample_0001.json", "sheet.png",
    }  # fmt: skip
    clip = frames(out / "sample_0000.mp4")
    assert clip.shape == (17, 16, 24, 3)
    record = json.loads((out / "sample_0000.json").read_text())
    assert record["weights"].endswith("step-00000002/attempt-1 ema")
    assert (record["num_frames"], record["image_size"], record["fps"]) == (17, [16, 24], 8)
    with Video(Storage(str(out)), "sample_0000.mp4") as video:
        assert video.fps == 8


def test_the_chosen_weights_decide_the_clip(run_dir: str, tmp_path: Path) -> None:
    """Newest averages, older ones, trained weights, and the newest averages exported: the first and the last agree."""
    weights = tmp_path / "export.safetensors"
    write_averages(weights)
    variants = {
        "newest": (),
        "older": ("--step", "1"),
        "trained": ("--use-ema", "false"),
        "exported": ("--ckpt-path", str(weights)),
    }
    for name, flags in variants.items():
        assert call("--run", run_dir, "--prompt", "a cat", "--save-dir", str(tmp_path / name), *flags) == 0
    clips = {name: (tmp_path / name / "sample_0000.mp4").read_bytes() for name in variants}
    assert clips["newest"] == clips["exported"]
    assert len(set(clips.values())) == 3


def test_a_run_without_averages_gives_its_weights(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    make_run(storage, ema_decay=None)
    assert call("--run", storage.uri, "--prompt", "a", "--save-dir", str(tmp_path / "out")) == 0
    record = json.loads((tmp_path / "out/sample_0000.json").read_text())
    assert record["weights"].endswith(" model")


def test_a_config_file_with_an_export_needs_no_run(run_dir: str, tmp_path: Path) -> None:
    write_averages(tmp_path / "w.safetensors")
    config = tmp_path / "sample.yaml"
    settings = {
        "model": {**MODEL, "from_pretrained": str(tmp_path / "w.safetensors")},
        "vae": {"type": "codec"},
        "text_encoder": TEXT,
        "scheduler": SCHEDULER,
        "dtype": "fp32",
        "prompt": ["a cat"],
        "save_dir": str(tmp_path / "config"),
        **SIZE,
    }
    config.write_text(json.dumps(settings))
    assert call(str(config)) == 0
    assert call("--run", run_dir, "--prompt", "a cat", "--save-dir", str(tmp_path / "run")) == 0
    assert (tmp_path / "config/sample_0000.mp4").read_bytes() == (tmp_path / "run/sample_0000.mp4").read_bytes()


def test_without_weights_nothing_is_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "sample.yaml"
    parts = {"model": MODEL, "vae": {"type": "codec"}, "text_encoder": TEXT, "scheduler": SCHEDULER}
    config.write_text(json.dumps({**parts, **SIZE, "prompt": ["a"]}))
    assert call(str(config), "--save-dir", str(tmp_path / "out")) == ExitCode.CONFIG
    assert "no weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_second_call_makes_only_what_is_missing(
    run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--run", run_dir, "--prompt", "a cat", "a dog", "a bird", "--save-dir", str(tmp_path))
    assert call(*arguments) == 0
    before, sheet = stamp(tmp_path), size(tmp_path / "sheet.png")
    (tmp_path / "sample_0001.mp4").unlink()
    (tmp_path / "sample_0002.json").unlink()  # as if it had been killed before the end of the clip
    capsys.readouterr()
    assert call(*arguments) == 0
    assert "2 clips made, 1 were there already" in capsys.readouterr().err
    after = stamp(tmp_path)
    assert after["sample_0000.mp4"] == before["sample_0000.mp4"]
    assert after["sample_0001.mp4"] > before["sample_0001.mp4"]
    assert size(tmp_path / "sheet.png") == sheet
    assert call(*arguments) == 0
    assert "0 clips made, 3 were there already" in capsys.readouterr().err


def test_other_settings_make_clips_anew(run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--run", run_dir, "--prompt", "a cat", "--save-dir", str(tmp_path))
    assert call(*arguments) == 0
    first = (tmp_path / "sample_0000.mp4").read_bytes()
    assert call(*arguments, "--cfg-scale", "5") == 0
    assert "1 clips were made with other settings" in capsys.readouterr().err
    assert (tmp_path / "sample_0000.mp4").read_bytes() != first


def test_a_clip_is_the_same_in_any_batch_and_any_range(run_dir: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n\na bird\n")
    common = ("--run", run_dir, "--prompt-path", str(prompts), "--num-sample", "2")
    assert call(*common, "--batch-size", "6", "--save-dir", str(tmp_path / "all")) == 0
    assert call(*common, "--start-index", "1", "--end-index", "2", "--save-dir", str(tmp_path / "one")) == 0
    assert {name for name in files(tmp_path / "one") if name.endswith("mp4")} == {
        "sample_0001-0.mp4",
        "sample_0001-1.mp4",
    }
    for name in ("sample_0001-0.mp4", "sample_0001-1.mp4"):
        one, every = frames(tmp_path / "one" / name), frames(tmp_path / "all" / name)
        assert np.abs(one.astype(int) - every.astype(int)).mean() < 1
    draws = [frames(tmp_path / "all" / f"sample_0001-{k}.mp4").astype(int) for k in (0, 1)]
    assert np.abs(draws[0] - draws[1]).mean() > 3


def test_pictures_are_png_and_may_be_named_after_their_prompts(run_dir: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = ("A cat/dog", "b" * 300)
    flags = ("--prompt-as-path", "--num-frames", "1", "--save-dir", str(out))
    assert call("--run", run_dir, "--prompt", *prompts, *flags) == 0
    pictures = sorted(name for name in files(out) if name.endswith(".png") and name != "sheet.png")
    assert pictures[0] == "A cat_dog.png"
    assert pictures[1].startswith("bbb")
    assert size(out / pictures[0]) == (24, 16)


def test_a_reference_picture_is_kept_as_the_first_frame(run_dir: str, tmp_path: Path) -> None:
    grey = np.full((16, 24, 3), 180, np.uint8)
    Image.fromarray(grey).save(tmp_path / "ref.png")
    tail = json.dumps({"reference_path": str(tmp_path / "ref.png"), "mask_strategy": "0"})
    assert call("--run", run_dir, "--prompt", f"a cat {tail}", "--save-dir", str(tmp_path / "out")) == 0
    clip = frames(tmp_path / "out/sample_0000.mp4").astype(int)
    assert np.abs(clip[0] - 180).mean() < 4
    assert np.abs(clip[8] - 180).mean() > 8


def test_loops_make_one_long_clip(run_dir: str, tmp_path: Path) -> None:
    flags = ("--num-frames", "34", "--loop", "2", "--save-dir", str(tmp_path))
    assert call("--run", run_dir, "--prompt", "|0|a cat|1|a dog", *flags) == 0
    assert len(frames(tmp_path / "sample_0000.mp4")) == 51


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--run", "{tmp}/nowhere", "--prompt", "a"), ExitCode.CONFIG, "is not a run directory"),
        (("--run", "{run}", "--step", "7", "--prompt", "a"), ExitCode.CONFIG, "there are: 1, 2"),
        (("--run", "{run}", "--prompt-path", "{tmp}/none.txt"), ExitCode.DATA, "none.txt does not exist"),
        (("--run", "{run}", "--prompt", "a", "--mask-strategy", "x"), ExitCode.DATA, "mask strategy 'x'"),
        (("--run", "{run}", "--prompt", "a", "--mask-strategy", "0"), ExitCode.DATA, "there are 0"),
        (("--run", "{run}", "--prompt", "a", "a", "--prompt-as-path"), ExitCode.DATA, "two clips would be named 'a'"),
        (("--run", "{run}", "--prompt", "a", "--reference-path", "{tmp}/x.png"), ExitCode.DATA, "x.png"),
        (("--run", "{run}", "--prompt", "a", "--ckpt-path", "{tmp}/x.pt"), ExitCode.CONFIG, "x.pt"),
        (("--run", "{run}", "--prompt", "a", "--loop", "2"), ExitCode.CONFIG, "loop=2"),
        (("--runs", "{run}"), ExitCode.USAGE, "--run"),
    ],
)
def test_mistakes_are_told_in_one_line_with_a_hint(
    flags: tuple[str, ...],
    code: ExitCode,
    message: str,
    run_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [flag.format(run=run_dir, tmp=tmp_path) for flag in flags]
    assert call(*arguments, "--save-dir", str(tmp_path / "out")) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "\nhint: " in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_an_unfinished_run_says_that_there_is_no_checkpoint(
    run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.yaml").write_text(Path(run_dir, "config.yaml").read_text())
    assert call("--run", str(young), "--prompt", "a", "--save-dir", str(tmp_path / "out")) == ExitCode.CONFIG
    assert "no complete checkpoint" in capsys.readouterr().err


def test_output_that_is_not_finite_is_not_written(
    run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(1)
    nn.init.constant_(model.get_parameter("x_embedder.proj.bias"), float("nan"))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "nan.safetensors")
    out = tmp_path / "out"
    flags = ("--ckpt-path", str(tmp_path / "nan.safetensors"), "--save-dir", str(out))
    assert call("--run", run_dir, "--prompt", "a", *flags) == ExitCode.DIVERGED
    assert "sample_0000" in capsys.readouterr().err
    assert not out.exists() or not files(out)


def test_the_terminal_shows_the_sheet_and_a_pipe_does_not(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--run", run_dir, "--prompt", "a cat", "--save-dir", str(tmp_path))
    assert call(*arguments) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert call(*arguments) == 0
    shown = capsys.readouterr().out
    assert "a cat" in shown
    assert "▀" in shown


def test_sigterm_stops_soon_and_the_same_command_continues(run_dir: str, tmp_path: Path) -> None:
    prompts = [f"cat number {i}" for i in range(5)]
    flags = ["--run", run_dir, "--prompt", *prompts, "--num-sampling-steps", "60", "--save-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "opensora.sample", *flags], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "sample_0000.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == ExitCode.STOPPED, err
    made = len(list(tmp_path.glob("*.json")))
    assert 1 <= made < 5
    assert call(*flags) == 0
    assert len(list(tmp_path.glob("*.json"))) == 5


def test_ranks_share_the_clips(run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", {"sample_0001"}), ("0", {"sample_0000", "sample_0001", "sample_0002"})):
        monkeypatch.setenv("RANK", rank)
        assert call("--run", run_dir, "--prompt", "a", "b", "c", "--save-dir", str(tmp_path)) == 0
        assert {path.stem for path in tmp_path.glob("*.mp4")} == expected


def contents(folder: Path, *kinds: str) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name.endswith(kinds)}


@pytest.mark.parametrize("flags", [(), ("--batch-size", "2")], ids=["one by one", "in batches"])
def test_shards_together_make_the_same_files_as_one_job_bit_by_bit(
    flags: tuple[str, ...], run_dir: str, tmp_path: Path
) -> None:
    prompts = [f"cat number {i}" for i in range(5)]
    common = ("--run", run_dir, "--prompt", *prompts, "--num-sample", "2", *flags, "--save-dir")
    assert call(*common, str(tmp_path / "whole")) == 0
    for shard in range(3):
        assert call(*common, str(tmp_path / "parts"), "--shard", f"{shard}/3") == 0
        assert (tmp_path / "parts/sheet.png").exists() == (shard == 2)
    expected = contents(tmp_path / "whole", ".mp4", ".json")
    made = contents(tmp_path / "parts", ".mp4", ".json")
    assert {name: data for name, data in made.items() if not name.startswith("index/")} == expected
    assert size(tmp_path / "parts/sheet.png") == size(tmp_path / "whole/sheet.png")


def test_each_shard_says_what_it_has_made(run_dir: str, tmp_path: Path) -> None:
    arguments = ("--run", run_dir, "--prompt", "a", "b", "c", "--sample-name", "x", "--save-dir", str(tmp_path))
    for shard in (0, 1):
        assert call(*arguments, "--shard", f"{shard}/2") == 0
    listed = [json.loads((tmp_path / f"index/x_000{shard}-of-0002.json").read_text()) for shard in (0, 1)]
    assert [[clip["file"] for clip in index["clips"]] for index in listed] == [
        ["x_0000.mp4", "x_0002.mp4"],
        ["x_0001.mp4"],
    ]
    assert [clip["prompt"] for clip in listed[0]["clips"]] == ["a", "c"]
    assert [(index["part"], index["parts"]) for index in listed] == [(0, 2), (1, 2)]


def test_the_sheet_waits_for_the_shards_of_this_job(run_dir: str, tmp_path: Path) -> None:
    """Those of an earlier one, with other settings, do not count."""
    arguments = ("--run", run_dir, "--prompt", "a", "b", "--save-dir", str(tmp_path))
    for shard in ("0/2", "1/2"):
        assert call(*arguments, "--shard", shard) == 0
    (tmp_path / "sheet.png").unlink()
    assert call(*arguments, "--seed", "7", "--shard", "1/2") == 0
    assert not (tmp_path / "sheet.png").exists()
    assert call(*arguments, "--seed", "7", "--shard", "0/2") == 0
    assert (tmp_path / "sheet.png").exists()


def test_the_sheet_can_be_made_alone_from_clips_that_are_there(
    run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--run", run_dir, "--prompt", "a", "b", "--save-dir", str(tmp_path))
    assert call(*arguments, "--shard", "0/2") == 0
    assert call(*arguments, "--sheet-only") == ExitCode.DATA
    assert "1 of 2 clips are not in" in capsys.readouterr().err
    assert call(*arguments, "--shard", "1/2") == 0
    sheet = (tmp_path / "sheet.png").read_bytes()
    (tmp_path / "sheet.png").unlink()
    before = stamp(tmp_path)
    assert call(*arguments, "--sheet-only") == 0
    assert size(tmp_path / "sheet.png") == Image.open(io.BytesIO(sheet)).size
    assert {name: time for name, time in stamp(tmp_path).items() if name != "sheet.png"} == before


def test_a_pod_of_an_indexed_job_knows_its_shard(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--run", run_dir, "--prompt", "a", "b", "c", "--save-dir", str(tmp_path))
    monkeypatch.setenv("OPENSORA_NUM_SHARDS", "3")
    assert call(*arguments) == ExitCode.USAGE
    assert "JOB_COMPLETION_INDEX=None" in capsys.readouterr().err
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert call(*arguments) == 0
    assert {path.stem for path in tmp_path.glob("*.mp4")} == {"sample_0001"}


def test_a_shard_without_clips_ends_well(run_dir: str, tmp_path: Path) -> None:
    arguments = ("--run", run_dir, "--prompt", "a", "--save-dir", str(tmp_path))
    assert call(*arguments, "--shard", "1/2") == 0
    assert json.loads((tmp_path / "index/0001-of-0002.json").read_text())["clips"] == []
    assert call(*arguments, "--shard", "0/2") == 0
    assert (tmp_path / "sheet.png").exists()


def test_ranks_of_shards_share_the_clips_and_the_last_one_makes_the_sheet(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--run", run_dir, "--prompt", *"abcde", "--save-dir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for place, (shard, rank) in enumerate([(0, 1), (1, 0), (1, 1), (0, 0)]):
        monkeypatch.setenv("RANK", str(rank))
        assert call(*arguments, "--shard", f"{shard}/2") == 0
        assert (tmp_path / "sheet.png").exists() == (place == 3)
    assert len(list(tmp_path.glob("*.mp4"))) == 5


@pytest.mark.parametrize("shard", ["2/2", "x", "1/0", "-1/2", "1"])
def test_an_impossible_shard_is_told(shard: str, run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--run", run_dir, "--prompt", "a", f"--shard={shard}") == ExitCode.CONFIG
    assert "0/4 is the first of four" in capsys.readouterr().err


def test_runs_references_prompts_and_clips_may_be_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    root = Storage(f"s3://{bucket}")
    make_run(root.child("run"))
    picture = io.BytesIO()
    Image.fromarray(np.full((16, 24, 3), 90, np.uint8)).save(picture, format="PNG")
    root.write("ref.png", picture.getvalue())
    tail: dict[str, Any] = {"reference_path": root.uri_of("ref.png"), "mask_strategy": "0"}
    root.write("prompts.txt", f"a cat {json.dumps(tail)}\na dog\n".encode())
    arguments = (
        "--run",
        root.uri_of("run"),
        "--prompt-path",
        root.uri_of("prompts.txt"),
        "--save-dir",
        root.uri_of("out"),
    )
    assert call(*arguments) == 0
    assert [info.path for info in root.list("out")] == [
        "out/sample_0000.json", "out/sample_0000.mp4", "out/sample_0001.json", "out/sample_0001.mp4", "out/sheet.png",
    ]  # fmt: skip
    before = {info.path: info.modified for info in root.list("out") if info.path.endswith("mp4")}
    assert call(*arguments) == 0
    assert {info.path: info.modified for info in root.list("out") if info.path.endswith("mp4")} == before

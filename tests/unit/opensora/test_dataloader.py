"""Open-Sora's data sets and loader: the published order of batches, resuming, items of the run's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.datasets import VariableVideoTextDataset, VideoTextDataset, prepare_dataloader
from opensora.datasets.reader import read_clip
from opensora.datasets.sampler import StatefulDistributedSampler, VariableVideoBatchSampler
from opensora.datasets.synthetic import synthetic_clip
from opensora.errors import ConfigError, DataError
from opensora.randomness import rng
from opensora.registry import DATASETS, build_module
from opensora.sampling.video_io import encode_video
from opensora.storage import Storage

TABLE = {"144p": {1: (1.0, 2), 51: (1.0, 2), 102: (1.0, 1)}}
FRAMES = [1, 1, 1, 1, 60, 60, 60, 60, 120, 120, 1, 60]
SMALL_TABLE = {"144p": {1: (1.0, 1), 4: (1.0, 2)}}


@pytest.fixture
def twelve_rows(tmp_path: Path) -> VariableVideoTextDataset:
    """The catalogue whose batches are published; only sizes matter, there are no clips."""
    lines = ["path,text,num_frames,height,width,fps"]
    for row, frames in enumerate(FRAMES):
        name = f"{row}.png" if frames == 1 else f"{row}.mp4"
        lines.append(f"{name},row {row},{frames},512,{(512, 910)[row % 2]},24")
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    return VariableVideoTextDataset(str(tmp_path / "rows.csv"), transform_name="resize_crop")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 3: videos of 12 frames; row 4: an image. Half of 29.97 is not a whole number."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["path,text,num_frames,height,width,fps"]
    for number in range(4):
        frames, caption = synthetic_clip(number, num_frames=12, height=160, width=284)
        (folder / f"{number}.mp4").write_bytes(encode_video(frames, fps=29.97))
        lines.append(f"{number}.mp4,{caption},12,160,284,29.97")
    Image.fromarray(synthetic_clip(4, num_frames=1, height=160, width=284)[0][0]).save(folder / "4.png")
    lines.append("4.png,a picture,1,160,284,")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder / "clips.csv"


def sampler_of(dataset: VariableVideoTextDataset, rank: int, **settings: Any) -> VariableVideoBatchSampler:
    settings = {"num_replicas": 2, "shuffle": True, "seed": 42, "drop_last": True, **settings}
    return VariableVideoBatchSampler(dataset, TABLE, rank=rank, **settings)


def test_each_rank_gets_the_published_batches(twelve_rows: VariableVideoTextDataset) -> None:
    assert list(sampler_of(twelve_rows, 0)) == [
        ["0-1-192-192", "2-1-192-192"],
        ["4-51-192-192", "6-51-192-192"],
        ["8-102-192-192"],
    ]
    assert list(sampler_of(twelve_rows, 1)) == [
        ["3-1-144-256", "1-1-144-256"],
        ["9-102-144-256"],
        ["5-51-144-256", "7-51-144-256"],
    ]


def test_the_length_is_the_number_of_steps_of_a_rank(twelve_rows: VariableVideoTextDataset) -> None:
    for drop_last in (True, False):
        for ranks in (1, 2, 3, 5):
            samplers = [sampler_of(twelve_rows, r, num_replicas=ranks, drop_last=drop_last) for r in range(ranks)]
            assert {len(list(sampler)) for sampler in samplers} == {len(samplers[0])}


def test_an_epoch_goes_on_behind_the_steps_that_were_done(twelve_rows: VariableVideoTextDataset) -> None:
    whole = list(sampler_of(twelve_rows, 0))
    resumed = sampler_of(twelve_rows, 0, seed=7)
    resumed.load_state_dict(sampler_of(twelve_rows, 0).state_dict(1))
    assert list(resumed) == whole[1:]
    assert list(resumed) == whole, "the next epoch starts at its beginning"


def test_an_epoch_goes_on_with_another_number_of_ranks(twelve_rows: VariableVideoTextDataset) -> None:
    every = list(sampler_of(twelve_rows, 0, num_replicas=1))
    alone = sampler_of(twelve_rows, 0, num_replicas=1)
    alone.load_state_dict(sampler_of(twelve_rows, 0).state_dict(1))
    assert list(alone) == every[2:]


def test_without_dropping_every_clip_of_a_bucket_is_given(twelve_rows: VariableVideoTextDataset) -> None:
    batches = [batch for rank in (0, 1) for batch in sampler_of(twelve_rows, rank, drop_last=False)]
    assert {index.split("-")[0] for batch in batches for index in batch} == {str(row) for row in range(12)}
    assert len(list(sampler_of(twelve_rows, 0, drop_last=False))) == len(batches) / 2


def test_epochs_differ(twelve_rows: VariableVideoTextDataset) -> None:
    sampler = sampler_of(twelve_rows, 0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert twelve_rows.epoch == 1


def test_too_few_rows_for_any_batch_is_an_error(twelve_rows: VariableVideoTextDataset) -> None:
    _, sampler = prepare_dataloader(twelve_rows, bucket_config={"144p": {1: (1.0, 50)}}, drop_last=True)
    with pytest.raises(DataError, match="no bucket gets a full batch from the 12 rows"):
        list(sampler)


def test_a_batch_holds_the_clips_of_one_bucket(clips: Path) -> None:
    dataset = VariableVideoTextDataset(str(clips), frame_interval=2, transform_name="resize_crop")
    loader, _ = prepare_dataloader(dataset, bucket_config=SMALL_TABLE, shuffle=True, drop_last=True)
    batches = {batch["num_frames"][0].item(): batch for batch in loader}
    video = batches[4]
    assert video["video"].shape == (2, 3, 4, 144, 256)
    assert video["video"].dtype == torch.float32
    assert -1 <= video["video"].min() < -0.5 < 0.5 < video["video"].max() <= 1
    assert video["fps"].tolist() == [14, 14], "29.97 // 2"
    assert (video["height"].tolist(), video["width"].tolist()) == ([144, 144], [256, 256])
    assert video["ar"].tolist() == [144 / 256] * 2
    assert all(video["text"])
    image = batches[1]
    assert image["video"].shape == (1, 3, 1, 144, 256)
    assert image["fps"].tolist() == [120]
    assert image["text"] == ["a picture"]


def test_clips_of_one_size_have_the_rate_of_the_container_and_images_are_repeated(clips: Path) -> None:
    dataset = VideoTextDataset(str(clips), num_frames=4, frame_interval=2, image_size=(32, 32))
    loader, _ = prepare_dataloader(dataset, batch_size=5)
    (batch,) = loader
    assert batch["video"].shape == (5, 3, 4, 32, 32)
    assert batch["fps"].tolist() == pytest.approx([29.97] * 4 + [120])
    picture = batch["video"][4]
    assert torch.equal(picture, picture[:, :1].expand_as(picture))
    assert not torch.equal(batch["video"][0, :, 0], batch["video"][0, :, 3])


def test_which_frames_are_drawn_depends_on_seed_epoch_and_row_alone(clips: Path) -> None:
    dataset = VideoTextDataset(str(clips), num_frames=2, image_size=(160, 284), transform_name="resize_crop")
    loader, sampler = prepare_dataloader(dataset, batch_size=1, seed=3)
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        for row, batch in zip(range(4), loader, strict=False):
            draws = rng(3, epoch=epoch, row=row, purpose="frames")
            expected = read_clip(Storage(str(clips.parent)), f"{row}.mp4", num_frames=2, rng=draws).frames
            found = ((batch["video"][0] + 1) * 127.5).round().permute(1, 2, 3, 0).numpy().astype(np.uint8)
            assert np.array_equal(found, expected)


def test_rows_of_fixed_size_go_on_behind_the_steps_that_were_done(clips: Path) -> None:
    def sampler() -> StatefulDistributedSampler:
        dataset = VideoTextDataset(str(clips), num_frames=4)
        return StatefulDistributedSampler(dataset, batch_size=2, num_replicas=1, rank=0, shuffle=True, seed=1)

    whole, resumed = sampler(), sampler()
    resumed.load_state_dict(whole.state_dict(1))
    assert (list(resumed), len(resumed)) == (list(whole)[2:], 3)
    resumed.reset()
    assert list(resumed) == list(whole)


def test_text_features_of_a_batch_are_packed(clips: Path) -> None:
    dataset = VariableVideoTextDataset(str(clips), transform_name="resize_crop", dummy_text_feature=True)
    loader, _ = prepare_dataloader(dataset, bucket_config={"144p": {4: (1.0, 2)}})
    batch = next(iter(loader))
    assert batch["text"].shape == (1, 100, 1152)
    assert batch["mask"] == [50, 50]


def test_a_clip_that_cannot_be_read_is_named(twelve_rows: VariableVideoTextDataset) -> None:
    with pytest.raises(Exception, match=r"4\.mp4"):
        twelve_rows["4-51-144-256"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 2}, "need a bucket table"),
        ({}, "need a bucket table"),
        ({"bucket_config": TABLE, "num_workers": 1, "persistent_workers": True}, "frames of their first epoch"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    twelve_rows: VariableVideoTextDataset, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_dataloader(twelve_rows, **settings)


def test_clips_of_one_size_need_a_batch_size(clips: Path) -> None:
    with pytest.raises(ConfigError, match="need a batch size"):
        prepare_dataloader(VideoTextDataset(str(clips)), bucket_config=TABLE)


def test_a_data_set_of_variable_sizes_takes_no_size_of_its_own(clips: Path) -> None:
    with pytest.raises(ConfigError, match="takes sizes from the bucket table"):
        VariableVideoTextDataset(str(clips), num_frames=16)
    with pytest.raises(DataError, match="is not row-T-H-W"):
        VariableVideoTextDataset(str(clips), transform_name="center")["7"]
    with pytest.raises(ConfigError, match="clips have no common size"):
        VariableVideoTextDataset(str(clips))["0-4-32-32"]


def test_the_types_of_open_sora_configs_are_registered(clips: Path) -> None:
    config = {"type": "VariableVideoTextDataset", "data_path": str(clips), "transform_name": "resize_crop"}
    assert len(build_module(config, DATASETS)) == 5

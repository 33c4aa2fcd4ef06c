"""Rounds of samples during training, without processes: the ranks are played one after another."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.config.train import SamplesConfig
from opensora.models.text_encoder.hash import HashTextEncoder
from opensora.models.vae.codec import VideoCodec
from opensora.sampling.rounds import RoundSampler
from opensora.schedulers.rf import RFLOW
from opensora.storage import Storage


class Model(nn.Module):
    """Depends on the caption; counts its calls."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", torch.zeros(8, 16))
        self.scale = scale
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, *, y: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        return (self.scale * y.mean(dim=(1, 2, 3))).reshape(-1, 1, 1, 1, 1) * torch.ones_like(x)


@dataclass
class Played:
    """A rank whose peers have reported before it."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    peers: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.peers.append(value)
        return self.peers


def play(folder: Path, rank: Played, *, model: Model | None = None, should_stop: Any = None, **settings: Any) -> Model:
    model = model or Model()
    config = SamplesConfig(
        every_steps=1, image_size=(16, 16), **{"prompts": ("a cat", "a dog", "a bird"), "num_frames": 5, **settings}
    )
    sampler = RoundSampler(
        config,
        run=Storage(str(folder)),
        ranks=rank,
        vae=VideoCodec(),
        text_encoder=HashTextEncoder(output_dim=16, model_max_length=8),
        scheduler=RFLOW(num_sampling_steps=3),
        dtype=torch.float32,
    )
    sampler(model, 12, should_stop or (lambda: False))
    return model


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "samples/step-00000012").glob("*")}


def test_a_round_is_a_clip_per_prompt_and_a_sheet(tmp_path: Path) -> None:
    play(tmp_path, Played())
    files = written(tmp_path)
    assert set(files) == {"00.mp4", "01.mp4", "02.mp4", "sheet.png"}
    assert len(set(files.values())) == 4
    play(tmp_path / "pictures", Played(), num_frames=1)
    assert set(written(tmp_path / "pictures")) == {"00.png", "01.png", "02.png", "sheet.png"}


def test_two_ranks_write_what_one_writes_and_call_the_model_equally_often(tmp_path: Path) -> None:
    play(tmp_path / "alone", Played())
    peers: list[Any] = []
    calls = [play(tmp_path / "shared", Played(rank, 2, peers=peers)).calls for rank in (1, 0)]
    assert calls == [6, 6]
    assert written(tmp_path / "shared") == written(tmp_path / "alone")


def test_rounds_with_the_same_weights_are_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        play(tmp_path / name, Played())
    assert written(tmp_path / "a") == written(tmp_path / "b")
    play(tmp_path / "c", Played(), seed=1)
    assert written(tmp_path / "c")["00.mp4"] != written(tmp_path / "a")["00.mp4"]


def test_a_round_stops_between_model_steps_when_asked(tmp_path: Path) -> None:
    answers = iter([False] * 6 + [True])
    model = play(tmp_path, Played(), should_stop=lambda: next(answers))
    assert model.calls == 5
    assert set(written(tmp_path)) == {"00.mp4"}


def test_samples_that_are_not_finite_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        play(tmp_path, Played(), model=Model(scale=float("nan")))
    assert "'a cat' is not finite" in caplog.text
    assert written(tmp_path) == {}

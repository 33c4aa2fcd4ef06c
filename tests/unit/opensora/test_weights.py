"""Weights from every supported kind of file; clear errors for those that do not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora.errors import CheckpointError
from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.weights import load_weights
from opensora.storage import Storage


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))


def weights() -> dict[str, Tensor]:
    return {name: torch.full_like(value, i + 1) for i, (name, value) in enumerate(Net().state_dict().items())}


def save_shards(folder: Path) -> None:
    names = sorted(weights())
    for shard, part in enumerate((names[:2], names[2:])):
        save_file({name: weights()[name] for name in part}, folder / f"model-{shard}.safetensors")
    index = {name: f"model-{int(i >= 2)}.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def save_colossal(folder: Path) -> None:
    (folder / "model").mkdir()
    torch.save(weights(), folder / "model" / "pytorch_model-00001.bin")
    index = dict.fromkeys(weights(), "pytorch_model-00001.bin")
    (folder / "model" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


SAVED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "safetensors": (lambda d: save_file(weights(), d / "w.safetensors"), "w.safetensors"),
    "pt": (lambda d: torch.save(weights(), d / "w.pt"), "w.pt"),
    "legacy pth": (lambda d: torch.save(weights(), d / "w.pth", _use_new_zipfile_serialization=False), "w.pth"),
    "state_dict in pth": (lambda d: torch.save({"state_dict": weights(), "step": 3}, d / "w.pth"), "w.pth"),
    "ema in pt": (lambda d: torch.save({"ema": weights()}, d / "w.pt"), "w.pt"),
    "folder with one file": (lambda d: save_file(weights(), d / "model.safetensors"), ""),
    "folder with shards": (save_shards, ""),
    "folder of Open-Sora": (save_colossal, ""),
}


@pytest.mark.parametrize("kind", SAVED)
def test_every_kind_of_file_loads(kind: str, tmp_path: Path) -> None:
    save, name = SAVED[kind]
    save(tmp_path)
    for uri in (str(tmp_path / name), f"file://{tmp_path / name}"):
        net = Net()
        load_weights(net, uri)
        for key, value in weights().items():
            assert torch.equal(net.state_dict()[key], value), key


@pytest.mark.parametrize("kind", ["safetensors", "folder with shards"])
def test_remote_weights_load(kind: str, tmp_path: Path) -> None:
    save, name = SAVED[kind]
    save(tmp_path)
    remote = Storage(f"memory://weights-{kind.replace(' ', '-')}")
    for file in tmp_path.iterdir():
        remote.write(file.name, file.read_bytes())
    net = Net()
    load_weights(net, remote.uri_of(name) if name else remote.uri)
    assert torch.equal(net.state_dict()["layers.1.bias"], weights()["layers.1.bias"])


def test_differences_are_named_in_groups_and_change_nothing(tmp_path: Path) -> None:
    state = weights()
    del state["layers.0.bias"], state["layers.1.bias"]
    state["extra"] = torch.zeros(1)
    state["layers.0.weight"] = torch.zeros(4, 4)
    save_file(state, tmp_path / "w.safetensors")
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, str(tmp_path / "w.safetensors"))
    message = str(caught.value)
    assert "2 missing: layers.*.bias (x2)" in message
    assert "1 unexpected: extra" in message
    assert "1 of another shape: layers.0.weight [4, 4] instead of [3, 3]" in message
    assert "Net" in message
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_one_weight_too_few_or_too_many_is_an_error(kind: str, tmp_path: Path) -> None:
    state = weights() | {"extra": torch.zeros(1)} if kind == "unexpected" else weights()
    if kind == "missing":
        del state["layers.0.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=f"1 {kind}"):
        load_weights(Net(), str(tmp_path / "w.safetensors"))


def test_without_strict_differences_are_logged_but_shapes_are_still_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = weights()
    del state["layers.0.bias"]
    path = str(tmp_path / "w.safetensors")
    save_file(state, path)
    net = Net()
    with caplog.at_level(logging.WARNING):
        load_weights(net, path, strict=False)
    assert "1 missing: layers.0.bias" in caplog.text
    assert torch.equal(net.state_dict()["layers.1.weight"], state["layers.1.weight"])
    with pytest.raises(CheckpointError, match="another shape"):
        load_weights(Net(width=4), path, strict=False)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"", "empty"),
    ],
    ids=["web page", "LFS pointer", "empty"],
)
def test_what_is_not_weights_is_diagnosed(suffix: str, content: bytes, hint: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=hint) as caught:
        load_weights(Net(), str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "legacy pth"])
def test_a_file_that_is_cut_off_is_an_error(kind: str, tmp_path: Path) -> None:
    save, name = SAVED[kind]
    save(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        load_weights(Net(), str(path))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmful"),))


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Harmful()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(Net(), str(tmp_path / "w.pt"))
    assert not Path("harmful").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [([], "0 weight files"), (["a.pt", "b.pt"], "2 weight files")],
    ids=["empty folder", "two files"],
)
def test_an_unclear_folder_is_an_error(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        torch.save(weights(), tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        load_weights(Net(), str(tmp_path))


def test_missing_files_and_unknown_endings_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        load_weights(Net(), str(tmp_path / "none.pt"))
    (tmp_path / "w.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        load_weights(Net(), str(tmp_path / "w.ckpt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="other than named tensors"):
        load_weights(Net(), str(tmp_path / "list.pt"))


def test_an_index_that_promises_more_than_its_shards_hold_is_an_error(tmp_path: Path) -> None:
    save_shards(tmp_path)
    save_file({}, tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.bias"):
        load_weights(Net(), str(tmp_path))


SMALL = {"hidden_size": 24, "depth": 1, "num_heads": 2, "caption_channels": 8}


@pytest.mark.parametrize("length", [3, 9])
def test_the_null_caption_is_brought_to_the_models_length(length: int, tmp_path: Path) -> None:
    saved = STDiT3(**SMALL, model_max_length=6)
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    loaded = STDiT3(**SMALL, model_max_length=length, from_pretrained=str(tmp_path / "w.safetensors"))
    null, expected = loaded.y_embedder.y_embedding, saved.y_embedder.y_embedding
    assert null.shape[0] == length
    for row in range(length):
        assert torch.equal(null[row], expected[min(row, 5)])
    for name, value in saved.state_dict().items():
        assert name == "y_embedder.y_embedding" or torch.equal(value, loaded.state_dict()[name])


def test_an_image_model_fills_the_spatial_blocks(tmp_path: Path) -> None:
    """PixArt-Sigma: other block names, a 2-D patch convolution, a position table that is recomputed."""
    video = STDiT3(**SMALL, model_max_length=6)
    state = {
        name.replace("spatial_blocks.", "blocks."): value
        for name, value in video.state_dict().items()
        if not name.startswith(("temporal_blocks.", "fps_embedder.", "rope."))
    }
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    state["pos_embed"] = torch.zeros(1, 4, 24)
    torch.save({"state_dict": state}, tmp_path / "PixArt-Sigma.pth")
    other = STDiT3(**SMALL, model_max_length=6)
    load_weights(other, str(tmp_path / "PixArt-Sigma.pth"), strict=False)
    for name, value in video.spatial_blocks.state_dict().items():
        assert torch.equal(value, other.spatial_blocks.state_dict()[name])
    assert torch.equal(video.x_embedder.proj.weight, other.x_embedder.proj.weight)

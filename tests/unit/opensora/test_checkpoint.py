"""Checkpoints of one process: what is written, when it counts, what is kept, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors

from opensora.checkpoint import (
    CheckpointInfo,
    CheckpointManager,
    Manifest,
    export_safetensors,
    find_checkpoints,
    read_checkpoint_tensors,
    transfer,
)
from opensora.checkpoint.manifest import (
    CheckpointScan,
    DataObject,
    IncompleteCheckpoint,
    checkpoint_folder,
    expired_checkpoints,
)
from opensora.config.train import CheckpointConfig
from opensora.errors import CheckpointError, StorageError, SupersededError
from opensora.records import announce_attempt
from opensora.storage import Data, Storage


class RecordingStorage(Storage):
    """Tells its journal what is done, and holds or fails writes on demand. Its folders share the journal."""

    def __init__(self, uri: str, journal: Journal | None = None) -> None:
        super().__init__(uri)
        self.journal = journal or Journal()

    def child(self, path: str) -> RecordingStorage:
        return RecordingStorage(self.uri_of(path), self.journal)

    def write(self, path: str, data: Data) -> None:
        assert self.journal.may_write.wait(timeout=30)
        if path.startswith(self.journal.failing):
            raise OSError("disk on fire")
        super().write(path, data)
        self.journal.add("write", self.uri_of(path))

    def read(self, path: str) -> bytes:
        self.journal.add("read", self.uri_of(path))
        return super().read(path)

    def delete(self, path: str) -> None:
        self.journal.add("delete", self.uri_of(path))
        super().delete(path)


class Journal:
    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []
        self.may_write = threading.Event()
        self.may_write.set()
        self.failing: tuple[str, ...] = ()

    def add(self, what: str, uri: str) -> None:
        self.entries.append((what, uri.rpartition("/")[2]))

    def of(self, what: str) -> list[str]:
        return [name for kind, name in self.entries if kind == what]


@pytest.fixture
def run() -> Iterator[RecordingStorage]:
    storage = RecordingStorage(f"memory://checkpoint-{uuid4().hex}")
    yield storage
    storage.journal.may_write.set()
    for name in storage.list_names():
        storage.delete_tree(name)


@pytest.fixture
def small_objects(monkeypatch: pytest.MonkeyPatch) -> int:
    """Objects of 4 KiB, so that a small state takes many."""
    monkeypatch.setattr(transfer, "OBJECT_BYTES", 4096)
    return 4096


def manager_of(run: Storage, *, attempt: int = 1, keep_last: int = 2, keep_every_steps: int = 0) -> CheckpointManager:
    config = CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every_steps)
    return CheckpointManager(run, attempt=attempt, config=config, is_main=True, process_group=None)


def save(run: Storage, step: int, *, attempt: int = 1, **keep: int) -> None:
    state = {"weight": torch.full((10,), float(step)), "step": step}
    manager_of(run, attempt=attempt, **keep).save(state, step=step, metadata={"step": step}, wait=True)


def folders(run: Storage) -> list[str]:
    return [f"{info.step}/{info.attempt}" for info in find_checkpoints(run)]


def only(run: Storage) -> CheckpointInfo:
    (info,) = find_checkpoints(run)
    return info


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_comes_back_exactly_and_in_place(run: Storage, dtype: torch.dtype) -> None:
    numbers = torch.arange(24) - 7
    state = {
        "matrix": numbers.reshape(4, 6).to(dtype),
        "transposed": numbers.reshape(4, 6).to(dtype).T,
        "strided": numbers.to(dtype)[1::3],
        "scalar": torch.tensor(5).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    manager_of(run).save(state, step=3, metadata={}, wait=True)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    pointers = {name: tensor.data_ptr() for name, tensor in target.items()}
    manager_of(run).load(only(run), target)
    for name, tensor in state.items():
        assert torch.equal(target[name], tensor), name
        assert target[name].data_ptr() == pointers[name], name


def test_values_and_metadata_come_back(run: Storage) -> None:
    state = {"cursor": {"epoch": 1, "seen": [(1, 2.5), None]}, "name": "run", 'odd "näme"/.': 7}
    metadata = {"step": 4, "digests": {"plan": "ab"}}
    manager_of(run).save(state, step=4, metadata=metadata, wait=True)
    target: dict[str, Any] = dict.fromkeys(state)
    assert manager_of(run).load(only(run), target) == metadata
    assert target == state


def test_loading_into_parameters_keeps_them_trainable(run: Storage) -> None:
    manager_of(run).save({"w": torch.ones(3)}, step=1, metadata={}, wait=True)
    parameter = torch.nn.Parameter(torch.zeros(3))
    manager_of(run).load(only(run), {"w": parameter})
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert torch.equal(parameter, torch.ones(3))


def test_training_may_change_the_state_while_it_is_written(run: RecordingStorage) -> None:
    manager = manager_of(run)
    weight, counts = torch.ones(1000), {"seen": 1}
    run.journal.may_write.clear()
    ticket = manager.save({"weight": weight, "counts": counts}, step=1, metadata={}, wait=False)
    weight.fill_(2)
    counts["seen"] = 2
    assert not ticket.done
    assert find_checkpoints(run) == []
    run.journal.may_write.set()
    ticket.wait()
    target: dict[str, Any] = {"weight": torch.zeros(1000), "counts": None}
    manager.load(only(run), target)
    assert torch.equal(target["weight"], torch.ones(1000))
    assert target["counts"] == {"seen": 1}


def test_a_second_save_waits_for_the_first(run: RecordingStorage) -> None:
    manager = manager_of(run)
    run.journal.may_write.clear()
    first = manager.save({"w": torch.ones(1)}, step=1, metadata={})
    threading.Timer(0.05, run.journal.may_write.set).start()
    manager.save({"w": torch.ones(1)}, step=2, metadata={})
    assert first.done
    manager.wait()
    assert folders(run) == ["1/1", "2/1"]


def test_staging_buffers_are_allocated_once() -> None:
    staging = transfer.StagingArea()
    first = {name: slot.buffer.data_ptr() for name, slot in staging.stage({"a": torch.ones(5)}).slots.items()}
    again = staging.stage({"a": torch.zeros(5)})
    assert {name: slot.buffer.data_ptr() for name, slot in again.slots.items()} == first
    assert torch.equal(again.slots["a"].buffer, torch.zeros(5))
    assert staging.stage({"a": torch.zeros(2, 3)}).slots["a"].buffer.shape == (2, 3)


def test_objects_are_bounded_and_the_manifest_describes_them(run: Storage, small_objects: int) -> None:
    state = {"large": torch.randn(700, 5), "wide": torch.randn(1, 3000)}
    state.update({f"small{i}": torch.randn(10, 10) for i in range(30)})
    manager_of(run).save(state, step=1, metadata={}, wait=True)
    info = only(run)
    data = [item for item in info.manifest.objects if item.path.endswith(".bin")]
    assert len(data) == 1 + 4 + 3  # wide, the pieces of large, ten small ones each
    # Only the tensor whose single row is larger than the bound exceeds it.
    assert [item.size for item in data if item.size > small_objects] == [12000]
    assert sum(item.size for item in data) == sum(tensor.nbytes for tensor in state.values())
    on_storage = {item.path.removeprefix(f"{info.path}/"): item for item in run.list(info.path)}
    assert set(on_storage) == {item.path for item in info.manifest.objects} | {"manifest.json"}
    for item in info.manifest.objects:
        content = run.read(f"{info.path}/{item.path}")
        assert (len(content), hashlib.sha256(content).hexdigest()) == (item.size, item.sha256)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    manager_of(run).load(info, target)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())


def test_each_object_is_read_once(run: RecordingStorage, small_objects: int) -> None:
    state = {f"w{i}": torch.randn(33, 7) for i in range(20)}
    manager_of(run).save(state, step=1, metadata={}, wait=True)
    info = only(run)
    run.journal.entries.clear()
    manager_of(run).load(info, {name: torch.zeros(33, 7) for name in state})
    assert sorted(run.journal.of("read")) == sorted(item.path for item in info.manifest.objects)


def test_the_manifest_is_written_last(run: RecordingStorage, small_objects: int) -> None:
    manager_of(run).save({"w": torch.randn(5000)}, step=1, metadata={}, wait=True)
    written = run.journal.of("write")
    assert len(written) > 5
    assert written[-2:] == ["index.json", "manifest.json"]


def test_saving_over_an_existing_checkpoint_first_takes_its_manifest_away(run: RecordingStorage) -> None:
    save(run, 1)
    run.journal.entries.clear()
    save(run, 1)
    changes = [entry for entry in run.journal.entries if entry[0] != "read"]
    assert changes[0] == ("delete", "manifest.json")
    assert folders(run) == ["1/1"]


def test_a_committed_step_is_not_saved_again(run: RecordingStorage) -> None:
    manager = manager_of(run)
    manager.save({"w": torch.ones(1)}, step=7, metadata={})
    manager.wait()
    run.journal.entries.clear()
    assert manager.save({"w": torch.ones(1)}, step=7, metadata={}).done
    assert run.journal.entries == []
    assert folders(run) == ["7/1"]


def test_a_superseded_attempt_commits_nothing_and_removes_nothing(run: RecordingStorage) -> None:
    manager = manager_of(run, attempt=1, keep_last=1)
    manager.save({"w": torch.ones(1)}, step=1, metadata={}, wait=True)
    run.journal.may_write.clear()
    ticket = manager.save({"w": torch.ones(1)}, step=2, metadata={})
    announce_attempt(run, 2)
    run.journal.may_write.set()
    with pytest.raises(SupersededError, match="attempt 2"):
        manager.wait()
    assert ticket.done
    assert folders(run) == ["1/1"]


def test_a_failed_save_is_reported_by_the_next_one_and_leaves_the_previous_intact(run: RecordingStorage) -> None:
    manager = manager_of(run)
    manager.save({"w": torch.ones(1)}, step=1, metadata={}, wait=True)
    run.journal.failing = ("rank-",)
    manager.save({"w": torch.ones(1)}, step=2, metadata={})
    with pytest.raises(StorageError, match="disk on fire"):
        manager.save({"w": torch.ones(1)}, step=3, metadata={})
    run.journal.failing = ()
    assert folders(run) == ["1/1"]
    manager.save({"w": torch.ones(1)}, step=3, metadata={}, wait=True)
    assert folders(run) == ["1/1", "3/1"]


def shorten(run: Storage, path: str) -> None:
    run.write(path, run.read(path)[:-1])


SPOILS = {
    "no manifest": (lambda run, path: run.delete(f"{path}/manifest.json"), "not finished"),
    "object missing": (lambda run, path: run.delete(f"{path}/rank-00000-00000.bin"), "rank-00000-00000.bin"),
    "object short": (lambda run, path: shorten(run, f"{path}/rank-00000-00000.bin"), "instead of"),
    "index missing": (lambda run, path: run.delete(f"{path}/index.json"), "index.json"),
    "manifest cut off": (lambda run, path: shorten(run, f"{path}/manifest.json"), "not readable"),
    "manifest of something else": (lambda run, path: run.write(f"{path}/manifest.json", b"[]"), "not readable"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_an_incomplete_checkpoint_is_skipped_and_the_log_says_why(
    run: Storage, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    save(run, 1)
    save(run, 2)
    change, reason = SPOILS[spoil]
    change(run, checkpoint_folder(2, attempt=1))
    with caplog.at_level(logging.WARNING):
        info = manager_of(run).newest()
    assert info is not None
    assert info.step == 1
    (message,) = caplog.messages
    assert "step-00000002/attempt-1 is skipped" in message
    assert reason in message


def test_a_new_run_has_no_newest_checkpoint(run: Storage, caplog: pytest.LogCaptureFixture) -> None:
    assert manager_of(run).newest() is None
    assert caplog.messages == []


def test_of_equal_steps_the_later_attempt_is_newest_and_numbers_are_compared_as_numbers(run: Storage) -> None:
    for attempt in (9, 10):
        save(run, 5, attempt=attempt, keep_last=9)
    newest = manager_of(run).newest()
    assert newest is not None
    assert (newest.step, newest.attempt) == (5, 10)


def test_a_checkpoint_of_a_later_format_is_an_error_not_a_reason_to_go_back(run: Storage) -> None:
    save(run, 1)
    path = f"{checkpoint_folder(1, attempt=1)}/manifest.json"
    run.write(path, json.dumps({**json.loads(run.read(path)), "format": 99}).encode())
    with pytest.raises(CheckpointError, match="format 99"):
        manager_of(run).newest()


@pytest.mark.parametrize("name", ["rank-00000-00000.bin", "index.json"])
def test_one_flipped_bit_is_found_when_loading(run: Storage, name: str) -> None:
    save(run, 1)
    path = f"{checkpoint_folder(1, attempt=1)}/{name}"
    content = bytearray(run.read(path))
    content[len(content) // 2] ^= 1
    run.write(path, bytes(content))
    info = manager_of(run).newest()
    assert info is not None
    with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
        manager_of(run).load(info, {"weight": torch.zeros(10), "step": 0})


def test_an_object_that_disappears_after_the_look_is_named(run: Storage) -> None:
    save(run, 1)
    info = only(run)
    run.delete(f"{info.path}/rank-00000-00000.bin")
    with pytest.raises(CheckpointError, match=r"rank-00000-00000\.bin is missing"):
        manager_of(run).load(info, {"weight": torch.zeros(10), "step": 0})


def test_all_differences_from_the_state_are_in_one_error(run: Storage) -> None:
    saved = {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(2), "d": 1, "gone": torch.ones(1)}
    manager_of(run).save(saved, step=1, metadata={}, wait=True)
    state = {"a": torch.ones(2), "b": torch.ones(3, 2), "c": torch.ones(2).double(), "d": torch.ones(1), "new": 1}
    before = {name: torch.as_tensor(value).clone() for name, value in state.items()}
    with pytest.raises(CheckpointError) as caught:
        manager_of(run).load(only(run), state)
    for part in (
        "1 missing from the checkpoint: new",
        "1 unexpected in the checkpoint: gone",
        "b (float32[2, 3] saved, float32[3, 2] here)",
        "c (float32[2] saved, float64[2] here)",
        "d (no tensor saved, float32[1] here)",
    ):
        assert part in caught.value.message
    assert all(torch.equal(torch.as_tensor(state[name]), value) for name, value in before.items())


def test_part_of_a_checkpoint_can_be_loaded_but_not_more_than_it_has(run: Storage) -> None:
    manager_of(run).save({"model.w": torch.ones(2), "optim.w": torch.ones(2)}, step=1, metadata={}, wait=True)
    state = {"model.w": torch.zeros(2)}
    manager_of(run).load(only(run), state, partial=True)
    assert torch.equal(state["model.w"], torch.ones(2))
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: model\.v"):
        manager_of(run).load(only(run), {**state, "model.v": torch.zeros(2)}, partial=True)


@pytest.mark.parametrize(
    ("state", "metadata"),
    [({"lock": threading.Event}, {}), ({"path": Path("x")}, {}), ({"w": 1}, {"when": object()})],
    ids=["class", "object", "metadata"],
)
def test_what_could_not_be_loaded_safely_is_refused_when_saving(
    run: RecordingStorage, state: dict[str, Any], metadata: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError):
        manager_of(run).save(state, step=1, metadata=metadata)
    assert run.journal.entries == []


class Bomb:
    exploded = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (explode, ())


def explode() -> int:
    Bomb.exploded = True
    return 1


def test_a_checkpoint_cannot_run_code(run: Storage) -> None:
    """Someone who can write the bucket replaces a value, with digests that fit."""
    stream = io.BytesIO()
    torch.save(Bomb(), stream)
    evil = stream.getvalue()
    manager_of(run).save({"value": 1}, step=1, metadata={}, wait=True)
    info = only(run)
    run.write(f"{info.path}/rank-00000-00000.bin", evil)
    index = json.loads(run.read(f"{info.path}/index.json"))
    index["values"]["value"] = [0, 0, len(evil)]
    encoded = json.dumps(index).encode()
    run.write(f"{info.path}/index.json", encoded)
    record = json.loads(run.read(f"{info.path}/manifest.json"))
    record["objects"] = [
        {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in (("index.json", encoded), ("rank-00000-00000.bin", evil))
    ]
    run.write(f"{info.path}/manifest.json", json.dumps(record).encode())
    with pytest.raises(StorageError):
        manager_of(run).load(only(run), {"value": 0})
    assert not Bomb.exploded
    pickle.loads(pickle.dumps(Bomb()))
    assert Bomb.exploded, "the bomb does not work"


def test_retention_keeps_the_newest_and_every_nth(run: Storage) -> None:
    manager = manager_of(run, keep_last=2, keep_every_steps=4)
    for step in range(1, 10):
        manager.save({"w": torch.ones(1)}, step=step, metadata={}, wait=True)
    assert folders(run) == ["4/1", "8/1", "9/1"]


def test_retention_removes_leftovers_also_from_local_folders(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    save(run, 1)
    leftover = tmp_path / "checkpoints/step-00000002/attempt-1"
    leftover.mkdir(parents=True)
    (leftover / ".abc.partial").write_bytes(b"killed while writing")
    save(run, 3, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_removed_checkpoint_loses_its_manifest_first(run: RecordingStorage) -> None:
    manager = manager_of(run, keep_last=1)
    manager.save({"w": torch.ones(1)}, step=1, metadata={}, wait=True)
    run.journal.entries.clear()
    manager.save({"w": torch.ones(1)}, step=2, metadata={}, wait=True)
    deleted = run.journal.of("delete")
    assert deleted == ["manifest.json", "manifest.json"]  # of step 2 before it is written, of step 1 when it goes
    assert folders(run) == ["2/1"]


def test_retention_that_fails_does_not_fail_the_save(
    run: RecordingStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)

    def refuse(path: str) -> None:
        raise StorageError("deleting is not allowed")

    monkeypatch.setattr(run, "delete_tree", refuse)
    save(run, 2, keep_last=1)
    assert folders(run) == ["2/1"]
    assert "deleting is not allowed" in caplog.text


def info_of(step: int, attempt: int) -> CheckpointInfo:
    objects = (DataObject("index.json", 1, ""),)
    manifest = Manifest(step=step, attempt=attempt, saved_at="", num_ranks=1, metadata={}, objects=objects)
    return CheckpointInfo(step, attempt, checkpoint_folder(step, attempt=attempt), manifest)


def test_leftovers_of_newer_attempts_and_of_the_save_in_flight_stay() -> None:
    committed = info_of(20, 2)
    cases = {(10, 1): True, (10, 2): True, (30, 1): True, (30, 2): False, (10, 3): False, (30, 3): False}
    left = [IncompleteCheckpoint(*key, checkpoint_folder(key[0], attempt=key[1]), "") for key in cases]
    expired = expired_checkpoints(
        CheckpointScan([committed], left), committed=committed, keep_last=1, keep_every_steps=0
    )
    assert {key: checkpoint_folder(key[0], attempt=key[1]) in expired for key in cases} == cases


def test_the_just_committed_checkpoint_stays_even_beside_a_later_one_of_another_attempt() -> None:
    committed, zombie, old = info_of(20, 2), info_of(30, 1), info_of(10, 1)
    expired = expired_checkpoints(
        CheckpointScan([old, committed, zombie], []), committed=committed, keep_last=1, keep_every_steps=0
    )
    assert expired == [old.path]


def test_whole_tensors_of_a_prefix_are_read_without_the_rest(run: RecordingStorage, small_objects: int) -> None:
    ema = {f"ema.{i}": torch.randn(50, 20) for i in range(4)}
    model = {f"model.{i}": torch.randn(50, 20) for i in range(4)}
    manager_of(run).save({**model, **ema, "step": 3}, step=3, metadata={}, wait=True)
    run.journal.entries.clear()
    read = read_checkpoint_tensors(run, only(run), prefix="ema.")
    assert set(read) == set(ema)
    assert all(torch.equal(read[name], tensor) for name, tensor in ema.items())
    assert len([name for name in run.journal.of("read") if name.endswith(".bin")]) == 4


def test_a_prefix_without_tensors_is_an_error_that_lists_what_there_is(run: Storage) -> None:
    manager_of(run).save({"model.w": torch.ones(1), "step": 3}, step=3, metadata={}, wait=True)
    with pytest.raises(CheckpointError, match="model, step"):
        read_checkpoint_tensors(run, only(run), prefix="ema.")


def test_export_is_one_file_that_the_format_accepts(run: Storage) -> None:
    flat = torch.arange(12.0)
    state = {"a": flat[:6].reshape(2, 3), "b": flat[6:], "c": torch.ones(2, 3, dtype=torch.bfloat16).T}
    export_safetensors(state, run, "export/model.safetensors", metadata={"step": "3"})
    assert run.list_names("export") == ["model.safetensors"]
    loaded = load_safetensors(run.read("export/model.safetensors"))
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_large_exports_are_sharded_with_an_index(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    state = {f"w{i}": torch.full((100,), float(i)) for i in range(5)}
    export_safetensors(state, storage, "export/model.safetensors", metadata={"step": "3"}, shard_bytes=800)
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert storage.list_names("export") == [*names, "model.safetensors.index.json"]
    index = json.loads(storage.read("export/model.safetensors.index.json"))
    assert index["metadata"]["total_size"] == 2000
    for name, tensor in state.items():
        with safe_open(tmp_path / "export" / index["weight_map"][name], "pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.metadata() == {"step": "3"}


def test_parallel_tasks_keep_their_order_and_stop_at_the_first_error() -> None:
    assert transfer.run_parallel([lambda number=number: number**2 for number in range(10)]) == [
        number**2 for number in range(10)
    ]
    started: list[int] = []

    def task(number: int) -> None:
        started.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match=r"\d"):
        transfer.run_parallel([lambda number=number: task(number) for number in range(100)])
    assert len(started) <= transfer.NUM_THREADS

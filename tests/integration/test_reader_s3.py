"""Reading clips out of a real object store, also while the store is gone for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora.config.train import DataConfig, StorageConfig
from opensora.datasets.bucket import Bucket
from opensora.datasets.catalogue import load_catalogue
from opensora.datasets.dataloader import prepare_dataloader
from opensora.datasets.datasets import VariableVideoTextDataset
from opensora.datasets.loader import ClipBatch, StepLoader
from opensora.datasets.plan import Cursor, EpochPlan, build_plan
from opensora.datasets.synthetic import synthetic_clip
from opensora.errors import ObjectNotFoundError, StorageUnavailableError
from opensora.quickstart.object_store import ObjectStore
from opensora.sampling.video_io import encode_video
from opensora.storage import Storage

pytestmark = pytest.mark.integration

NUM_CLIPS = 12
PER_STEP = 3
STEPS_PER_EPOCH = 4
BUCKETS = {"144p": {17: (1.0, 1)}}
OUTAGE_SECONDS = 6.0
PATIENT = StorageConfig(connect_timeout_seconds=2, read_timeout_seconds=5, retry_deadline_seconds=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    lines = ["path,text,num_frames,height,width,fps"]
    for number in range(NUM_CLIPS):
        frames, caption = synthetic_clip(number, num_frames=30 + number, height=144, width=256)
        (folder / f"clip-{number}.mp4").write_bytes(encode_video(frames, fps=24, key_interval=12))
        lines.append(f"clip-{number}.mp4,{caption},{30 + number},144,256,24")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def uploaded(folder: Path, bucket: str) -> Storage:
    storage = Storage(f"s3://{bucket}/clips", config=PATIENT)
    for file in folder.iterdir():
        storage.upload(file, file.name)
    return storage


def make_loader(uri: str, *, storage: StorageConfig = PATIENT, **data: Any) -> StepLoader:
    catalogue = load_catalogue(uri, config=storage)
    table = Bucket(BUCKETS)

    def plans(epoch: int) -> EpochPlan:
        return build_plan(
            catalogue, table, seed=5, epoch=epoch, micro_batches_per_step=PER_STEP, costs=np.ones(len(table.entries)),
            balance_window=1, drop_last=True, shuffle=True, frame_interval=1,
        )  # fmt: skip

    config = DataConfig(path=uri, bucket_config=BUCKETS, **data)
    return StepLoader(catalogue, plans, data=config, seed=5, rank=0, num_ranks=1, storage=storage)


def read_steps(loader: StepLoader, count: int) -> list[list[ClipBatch]]:
    steps = []
    try:
        for work in loader.steps(Cursor(0, 0)):
            batches = [batch for batch in work.batches() if batch is not None]
            steps.append(batches)
            if len(steps) == count:
                break
    finally:
        loader.close()
    return steps


def assert_same(steps: list[list[ClipBatch]], others: list[list[ClipBatch]]) -> None:
    assert len(steps) == len(others)
    for batches, expected in zip(steps, others, strict=True):
        assert [batch.rows for batch in batches] == [batch.rows for batch in expected]
        assert all(torch.equal(one.video, two.video) for one, two in zip(batches, expected, strict=True))


def test_clips_out_of_a_bucket_are_those_of_a_folder(folder: Path, uploaded: Storage) -> None:
    local = read_steps(make_loader(str(folder / "clips.csv")), 6)
    assert_same(read_steps(make_loader(uploaded.uri_of("clips.csv")), 6), local)


def test_an_outage_while_reading_loses_nothing_and_doubles_nothing(
    folder: Path, uploaded: Storage, object_store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_steps(make_loader(str(folder / "clips.csv")), 3 * STEPS_PER_EPOCH)
    loader = make_loader(uploaded.uri_of("clips.csv"), prefetch_batches=2)
    is_under_way = threading.Event()

    def consume() -> list[list[ClipBatch]]:
        steps: list[list[ClipBatch]] = []
        for work in loader.steps(Cursor(0, 0)):
            steps.append([batch for batch in work.batches() if batch is not None])
            if len(steps) == 3:
                is_under_way.set()
                is_away.wait()
            if len(steps) == 3 * STEPS_PER_EPOCH:
                break
        return steps

    is_away = threading.Event()
    # The server ends with the thread that started it, so that is this one; reading is another one's.
    with caplog.at_level(logging.INFO, logger="opensora"), ThreadPoolExecutor(1) as executor:
        reading = executor.submit(consume)
        try:
            is_under_way.wait(60)
            object_store.kill()
            is_away.set()
            time.sleep(OUTAGE_SECONDS)
        finally:
            is_away.set()
            object_store.start()
        steps = reading.result()
        loader.close()
    assert_same(steps, expected)
    for first in range(0, len(steps), STEPS_PER_EPOCH):
        rows = [row for batches in steps[first : first + STEPS_PER_EPOCH] for batch in batches for row in batch.rows]
        assert sorted(rows) == list(range(NUM_CLIPS))
    assert loader.num_skipped == 0
    assert loader.data_wait_seconds > OUTAGE_SECONDS / 2
    assert "does not answer" in caplog.text


def test_a_store_that_stays_away_ends_the_run_even_where_bad_clips_are_skipped(
    uploaded: Storage, object_store: ObjectStore
) -> None:
    impatient = StorageConfig(connect_timeout_seconds=1, read_timeout_seconds=1, retry_deadline_seconds=2)
    loader = make_loader(uploaded.uri_of("clips.csv"), storage=impatient, bad_clip="skip", prefetch_batches=1)
    steps = loader.steps(Cursor(0, 0))
    list(next(steps).batches())
    object_store.kill()
    try:
        with pytest.raises(StorageUnavailableError):
            deque(batch for work in steps for batch in work.batches())
        assert loader.num_skipped == 0
    finally:
        loader.close()
        object_store.start()


def test_closing_does_not_wait_for_a_store_that_is_away(uploaded: Storage, object_store: ObjectStore) -> None:
    loader = make_loader(uploaded.uri_of("clips.csv"), prefetch_batches=1)
    steps = loader.steps(Cursor(0, 0))
    list(next(steps).batches())
    object_store.kill()
    try:
        closer = threading.Thread(target=loader.close)
        closer.start()
        closer.join(15)
        assert not closer.is_alive()
    finally:
        object_store.start()


def test_a_missing_object_is_a_bad_clip(uploaded: Storage) -> None:
    uploaded.delete("clip-4.mp4")
    loader = make_loader(uploaded.uri_of("clips.csv"), bad_clip="skip")
    steps = read_steps(loader, STEPS_PER_EPOCH)
    rows = [row for batches in steps for batch in batches for row in batch.rows]
    assert sorted(rows) == [row for row in range(NUM_CLIPS) if row != 4]
    assert loader.num_skipped == 1
    with pytest.raises(ObjectNotFoundError, match=r"clip-4\.mp4"):
        read_steps(make_loader(uploaded.uri_of("clips.csv")), STEPS_PER_EPOCH)


def test_copies_on_a_local_disk_give_the_same_clips(folder: Path, uploaded: Storage, tmp_path: Path) -> None:
    expected = read_steps(make_loader(str(folder / "clips.csv")), 2 * STEPS_PER_EPOCH)
    cached = make_loader(uploaded.uri_of("clips.csv"), cache_dir=str(tmp_path / "cache"))
    assert_same(read_steps(cached, 2 * STEPS_PER_EPOCH), expected)
    assert len(list((tmp_path / "cache").iterdir())) == NUM_CLIPS


def test_workers_of_a_data_loader_read_from_the_store_what_the_main_process_would(uploaded: Storage) -> None:
    dataset = VariableVideoTextDataset(uploaded.uri_of("clips.csv"), transform_name="resize_crop")
    assert dataset["0-17-144-256"]["video"].shape == (3, 17, 144, 256)  # the store is open when the workers begin

    def batches(num_workers: int) -> list[dict[str, Any]]:
        loader, sampler = prepare_dataloader(
            dataset, bucket_config={"144p": {17: (1.0, 4)}}, shuffle=True, num_workers=num_workers
        )
        sampler.set_epoch(1)
        return list(loader)

    alone, spread = batches(0), batches(2)
    assert len(alone) == NUM_CLIPS // 4
    for mine, theirs in zip(alone, spread, strict=True):
        assert mine["text"] == theirs["text"]
        assert torch.equal(mine["video"], theirs["video"])

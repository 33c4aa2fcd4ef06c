"""Loader: what the plan says, in its order, whatever the threads; bad clips by policy; nothing left behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.config.train import DataConfig, StorageConfig
from opensora.datasets import loader as module
from opensora.datasets.bucket import BucketShape
from opensora.datasets.cache import ClipCache
from opensora.datasets.catalogue import Catalogue, load_catalogue
from opensora.datasets.loader import ClipBatch, StepLoader
from opensora.datasets.plan import Cursor, EpochPlan
from opensora.datasets.reader import ReadingStoppedError, read_clip
from opensora.datasets.synthetic import synthetic_clip
from opensora.datasets.transforms import ClipTransform
from opensora.errors import DataError, StorageUnavailableError
from opensora.randomness import rng
from opensora.sampling.video_io import encode_video
from opensora.storage import Storage

NUM_CLIPS = 8
SEED = 11
WIDE = BucketShape("tiny", 6, "0.50", 16, 32, 2, 0)
SQUARE = BucketShape("tiny", 4, "1.00", 24, 24, 2, 1)
PICTURE = BucketShape("tiny", 1, "1.00", 24, 24, 2, 2)
BEGINNING = Cursor(0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips (rows 0 to 7) and two images (rows 8 and 9)."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["path,text,num_frames,height,width,fps"]
    for number in range(NUM_CLIPS):
        frames, caption = synthetic_clip(number, num_frames=20 + number, height=40, width=56)
        (folder / f"{number}.mp4").write_bytes(encode_video(frames, fps=23.976, key_interval=8))
        lines.append(f"{number}.mp4,{caption},{20 + number},40,56,23.976")
    for number in (8, 9):
        Image.fromarray(synthetic_clip(number, num_frames=1, height=50, width=40)[0][0]).save(folder / f"{number}.png")
        lines.append(f"{number}.png,picture {number},1,50,40,")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def catalogue(folder: Path) -> Catalogue:
    return load_catalogue(str(folder / "clips.csv"))


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clip-reader")]


def plan_of(micro_batches: Sequence[tuple[BucketShape, Sequence[int]]], *, per_step: int, epoch: int = 0) -> EpochPlan:
    shapes = tuple(dict.fromkeys(shape for shape, _ in micro_batches))
    sizes = np.array([len(rows) for _, rows in micro_batches])
    return EpochPlan(
        epoch=epoch,
        digest="",
        micro_batches_per_step=per_step,
        shapes=shapes,
        rows=np.concatenate([np.array(rows, dtype=np.int64) for _, rows in micro_batches]),
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        shape_indices=np.array([shapes.index(shape) for shape, _ in micro_batches], dtype=np.int32),
        costs=np.array([float(len(rows) * shape.num_frames) for shape, rows in micro_batches]),
        num_unassigned=0,
        num_left_over=0,
    )


def mixed(epoch: int) -> EpochPlan:
    """Three steps of 3, 3 and 1 micro-batches; other clips together in every epoch."""
    order = np.random.default_rng(epoch).permutation(NUM_CLIPS)
    a, b, c, d = order.reshape(4, 2)
    parts = [(WIDE, a), (SQUARE, b), (PICTURE, [8, 9]), (SQUARE, c), (WIDE, d), (WIDE, b), (SQUARE, a)]
    return plan_of(parts, per_step=3, epoch=epoch)


def make_loader(
    catalogue: Catalogue,
    plans: Callable[[int], EpochPlan] = mixed,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    **data: Any,
) -> StepLoader:
    return StepLoader(
        catalogue,
        plans,
        data=DataConfig(path=catalogue.uri, **data),
        seed=SEED,
        rank=rank,
        num_ranks=num_ranks,
        storage=StorageConfig(retry_deadline_seconds=0.1),
    )


def take(loader: StepLoader, num_steps: int, *, start: Cursor = BEGINNING) -> list[tuple[int, int, list[Any]]]:
    """(epoch, step, [(micro-batch, batch)]) of the first steps."""
    taken = []
    try:
        for work in loader.steps(start):
            taken.append((work.epoch, work.step, list(zip(work.micro_batches, work.batches(), strict=True))))
            if len(taken) == num_steps:
                return taken
        raise AssertionError("the steps ended")
    finally:
        loader.close()


def contents(steps: list[tuple[int, int, list[Any]]]) -> dict[tuple[int, int, int], ClipBatch]:
    """(epoch, step, micro-batch) → batch."""
    return {(epoch, step, part.index): batch for epoch, step, parts in steps for part, batch in parts}


def assert_equal(one: dict[tuple[int, int, int], ClipBatch], other: dict[tuple[int, int, int], ClipBatch]) -> None:
    assert one.keys() == other.keys()
    for key, batch in one.items():
        assert batch.rows == other[key].rows
        assert torch.equal(batch.video, other[key].video)
        assert torch.equal(batch.fps, other[key].fps)


# ---------------------------------------------------------------------------------------------------- what is read


def test_every_clip_is_the_frames_drawn_for_it_at_the_size_of_its_bucket(catalogue: Catalogue, folder: Path) -> None:
    for (epoch, step, index), batch in contents(take(make_loader(catalogue), 6)).items():
        part = next(part for part in mixed(epoch).step(step) if part.index == index)
        assert batch.shape == part.shape
        assert batch.rows == part.rows.tolist()
        assert batch.ids == [int(catalogue.ids[row]) for row in batch.rows]
        assert batch.epoch == epoch
        assert batch.video.dtype == torch.float32
        assert batch.video.shape == (2, 3, part.shape.num_frames, part.shape.height, part.shape.width)
        if part.shape is PICTURE:
            continue
        transform = ClipTransform("resize_crop", height=part.shape.height, width=part.shape.width)
        for at, row in enumerate(batch.rows):
            draws = rng(SEED, epoch=epoch, row=int(catalogue.ids[row]), purpose="frames")
            clip = read_clip(Storage(str(folder)), f"{row}.mp4", num_frames=part.shape.num_frames, rng=draws)
            for number, frame in enumerate(clip.frames):
                expected = np.empty((3, part.shape.height, part.shape.width), np.float32)
                transform.frame(frame, expected)
                np.testing.assert_array_equal(batch.video[at, :, number].numpy(), expected)


def test_a_batch_carries_captions_sizes_and_rates(catalogue: Catalogue) -> None:
    plan = plan_of([(WIDE, [3, 5]), (PICTURE, [9])], per_step=2)
    ((_, _, [(_, clips), (_, pictures)]),) = take(make_loader(catalogue, lambda epoch: plan), 1)
    assert clips.text == [synthetic_clip(3, num_frames=1, height=8, width=8)[1], catalogue.row_text(5)]
    assert clips.fps.tolist() == [23.0, 23.0]
    assert clips.height.tolist() == [16.0, 16.0]
    assert clips.width.tolist() == [32.0, 32.0]
    assert clips.num_frames.tolist() == [6.0, 6.0]
    assert clips.ar.tolist() == [0.5, 0.5]
    assert pictures.fps.tolist() == [120.0]
    assert pictures.video.shape == (1, 3, 1, 24, 24)
    assert pictures.text == ["picture 9"]
    assert all(x.dtype == torch.float32 for x in (clips.fps, clips.height, clips.width, clips.num_frames, clips.ar))


def test_with_a_frame_interval_the_rate_is_divided_and_rounded_down(catalogue: Catalogue) -> None:
    plan = plan_of([(WIDE, [0])], per_step=1)
    ((_, _, [(_, batch)]),) = take(make_loader(catalogue, lambda epoch: plan, frame_interval=3), 1)
    assert batch.fps.tolist() == [7.0]


def test_threads_and_read_ahead_change_nothing(catalogue: Catalogue) -> None:
    expected = contents(take(make_loader(catalogue, num_threads=1, prefetch_batches=1), 6))
    assert_equal(contents(take(make_loader(catalogue, num_threads=4, prefetch_batches=7), 6)), expected)


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_share_the_same_steps_out_between_them(num_ranks: int, catalogue: Catalogue) -> None:
    alone = contents(take(make_loader(catalogue), 6))
    shares = [take(make_loader(catalogue, rank=rank, num_ranks=num_ranks), 6) for rank in range(num_ranks)]
    together = [contents(share) for share in shares]
    assert sum(map(len, together)) == len(alone)
    assert_equal({key: batch for share in together for key, batch in share.items()}, alone)
    assert len({tuple((epoch, step) for epoch, step, _ in share) for share in shares}) == 1


def test_every_rank_knows_the_largest_share(catalogue: Catalogue) -> None:
    slots = []
    for rank in range(2):
        loader = make_loader(catalogue, rank=rank, num_ranks=2)
        steps = loader.steps(BEGINNING)
        slots.append([(work.num_slots, len(work.micro_batches)) for work, _ in zip(steps, range(3), strict=False)])
        loader.close()
    for (one, mine), (other, theirs) in zip(*slots, strict=True):
        assert one == other == max(mine, theirs)


@pytest.mark.parametrize("start", [Cursor(0, 1), Cursor(0, 2), Cursor(1, 0), Cursor(1, 2)])
def test_a_run_that_continues_reads_what_it_would_have_read(start: Cursor, catalogue: Catalogue) -> None:
    whole = contents(take(make_loader(catalogue), 9))
    rest = contents(take(make_loader(catalogue), 9 - 3 * start.epoch - start.step, start=start))
    assert_equal(rest, {key: batch for key, batch in whole.items() if key[:2] >= (start.epoch, start.step)})


def test_an_epoch_draws_other_frames_than_the_one_before(catalogue: Catalogue) -> None:
    plan = plan_of([(SQUARE, [6, 7])], per_step=1)
    steps = take(make_loader(catalogue, lambda epoch: plan), 4)
    videos = [batch.video for _, _, [(_, batch)] in steps]
    assert not all(torch.equal(videos[0], video) for video in videos[1:])


def test_square_buckets_can_be_cut_from_the_centre(catalogue: Catalogue) -> None:
    plan = plan_of([(SQUARE, [1])], per_step=1)
    ((_, _, [(_, batch)]),) = take(make_loader(catalogue, lambda epoch: plan, transform="center"), 1)
    assert batch.video.shape == (1, 3, 4, 24, 24)


# ------------------------------------------------------------------------------------------------ reading ahead


def test_no_more_is_read_ahead_than_was_asked_for(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[None] = []
    original = module._Threads.submit
    monkeypatch.setattr(module._Threads, "submit", lambda self, task: begun.append(None) or original(self, task))
    plan = plan_of([(SQUARE, [row]) for row in range(8)], per_step=1)
    loader = make_loader(catalogue, lambda epoch: plan, prefetch_batches=3)
    for number, work in enumerate(loader.steps(BEGINNING)):
        assert len(begun) == number + 3
        list(work.batches())
        assert len(begun) == number + 4
        if number == 12:
            break
    loader.close()


def test_a_rank_without_work_does_not_run_away(catalogue: Catalogue) -> None:
    asked: list[int] = []

    def plans(epoch: int) -> EpochPlan:
        asked.append(epoch)
        return plan_of([(SQUARE, [0])], per_step=1)

    loader = make_loader(catalogue, plans, rank=1, num_ranks=2, prefetch_batches=2)
    for number, work in enumerate(loader.steps(BEGINNING)):
        assert list(work.batches()) == []
        assert work.num_slots == 1
        assert len(asked) <= number + 5
        if number == 20:
            break
    loader.close()


def test_a_plan_that_fails_does_so_when_its_epoch_begins(catalogue: Catalogue) -> None:
    def plans(epoch: int) -> EpochPlan:
        if epoch == 1:
            raise DataError("nothing to train on")
        return mixed(epoch)

    loader = make_loader(catalogue, plans, prefetch_batches=50)
    steps = loader.steps(BEGINNING)
    for _ in range(3):
        assert all(batch is not None for batch in next(steps).batches())
    with pytest.raises(DataError, match="nothing to train on"):
        next(steps)


def test_batches_that_are_not_taken_are_dropped(catalogue: Catalogue) -> None:
    expected = contents(take(make_loader(catalogue), 2))
    loader = make_loader(catalogue)
    steps = loader.steps(BEGINNING)
    first = next(steps)
    next(first.batches())
    second = next(steps)
    batches = list(second.batches())
    loader.close()
    for part, batch in zip(second.micro_batches, batches, strict=True):
        assert batch is not None
        assert torch.equal(batch.video, expected[0, 1, part.index].video)
    with pytest.raises(RuntimeError, match="no more batches"):
        next(first.batches())


def test_closing_in_the_middle_stops_the_threads(catalogue: Catalogue) -> None:
    loader = make_loader(catalogue, num_threads=3, prefetch_batches=7)
    next(loader.steps(BEGINNING))
    loader.close()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clip-reader")]


def test_a_batch_that_does_not_come_can_be_given_up(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    original = module.ClipSource.read

    def read(self: Any, row: int, *arguments: Any) -> float:
        if row != 0:
            never.wait(5)
        return original(self, row, *arguments)

    monkeypatch.setattr(module.ClipSource, "read", read)
    monkeypatch.setattr(module, "_ASK_SECONDS", 0.01)
    plan = plan_of([(SQUARE, [0]), (SQUARE, [1])], per_step=2)
    loader = make_loader(catalogue, lambda epoch: plan, num_threads=1)
    steps = loader.steps(BEGINNING)
    enough = False
    batches = next(steps).batches(give_up=lambda: enough)
    assert next(batches) is not None
    enough = True
    with pytest.raises(ReadingStoppedError):
        next(batches)
    never.set()
    loader.close()


def test_waiting_is_counted_and_only_waiting(catalogue: Catalogue) -> None:
    loader = make_loader(catalogue)
    take(loader, 6)
    assert 0 < loader.data_wait_seconds < 5


# ---------------------------------------------------------------------------------------------------- bad clips


def bad_catalogue(folder: Path, tmp_path: Path) -> tuple[Catalogue, set[int]]:
    """The clips with rows 2, 3, 5, 8 bad, each in another way."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "2.mp4").unlink()
    (tmp_path / "3.mp4").write_bytes(b"")
    (tmp_path / "5.mp4").write_bytes((folder / "5.mp4").read_bytes()[:-900])
    (tmp_path / "8.png").write_bytes((folder / "0.mp4").read_bytes())
    return load_catalogue(str(tmp_path / "clips.csv")), {2, 3, 5, 8}


def test_a_bad_clip_ends_the_run_in_its_turn_and_is_named(folder: Path, tmp_path: Path) -> None:
    catalogue, _ = bad_catalogue(folder, tmp_path)
    plan = plan_of([(WIDE, [0, 1]), (WIDE, [4, 6]), (WIDE, [7, 5]), (WIDE, [2])], per_step=1)
    loader = make_loader(catalogue, lambda epoch: plan, prefetch_batches=4, num_threads=4)
    steps = loader.steps(BEGINNING)
    for rows in ([0, 1], [4, 6]):
        (batch,) = next(steps).batches()
        assert batch is not None
        assert batch.rows == rows
    with pytest.raises(DataError, match=r"5\.mp4: cut off") as caught:
        list(next(steps).batches())
    assert caught.value.exit_code == 65
    loader.close()


def test_bad_clips_can_be_left_out_counted_and_recorded(folder: Path, tmp_path: Path) -> None:
    catalogue, bad = bad_catalogue(folder, tmp_path)
    good = load_catalogue(str(folder / "clips.csv"))
    expected = contents(take(make_loader(good), 3))
    for num_threads in (1, 4):
        loader = make_loader(catalogue, bad_clip="skip", num_threads=num_threads)
        got = contents(take(loader, 3))
        left_out = 0
        for key, whole in expected.items():
            kept = [at for at, row in enumerate(whole.rows) if row not in bad]
            left_out += len(whole.rows) - len(kept)
            batch = got[key]
            if not kept:
                assert batch is None
                continue
            assert batch.rows == [whole.rows[at] for at in kept]
            assert batch.text == [whole.text[at] for at in kept]
            assert len(batch.fps) == len(batch.ar) == len(kept)
            assert torch.equal(batch.video, whole.video[kept])
            names = [clip.uri.rpartition("/")[2].partition(".")[0] for clip in batch.skipped]
            assert names == [str(row) for row in whole.rows if row in bad]
            assert all(clip.reason for clip in batch.skipped)
        assert loader.num_skipped == left_out > 4


def test_a_micro_batch_of_bad_clips_alone_is_none(folder: Path, tmp_path: Path) -> None:
    catalogue, _ = bad_catalogue(folder, tmp_path)
    plan = plan_of([(WIDE, [2, 5]), (WIDE, [0])], per_step=2)
    ((_, _, parts),) = take(make_loader(catalogue, lambda epoch: plan, bad_clip="skip"), 1)
    assert [batch is None for _, batch in parts] == [part.rows.tolist() == [2, 5] for part, _ in parts]


def test_too_many_bad_clips_end_the_run(folder: Path, tmp_path: Path) -> None:
    catalogue, _ = bad_catalogue(folder, tmp_path)
    plan = plan_of([(WIDE, [0, 2]), (WIDE, [2, 3]), (WIDE, [3, 1]), (WIDE, [5])], per_step=1)
    loader = make_loader(catalogue, lambda epoch: plan, bad_clip="skip", max_skips=2)
    steps = loader.steps(BEGINNING)
    for _ in range(3):  # the same two clips again and again
        list(next(steps).batches())
    with pytest.raises(DataError, match=r"3 clips cannot be read, more than data.max_skips=2(.|\n)*5\.mp4"):
        list(next(steps).batches())
    assert loader.num_skipped == 5
    loader.close()


def test_a_clip_shorter_than_the_catalogue_says_is_bad(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text(
        f"path,text,num_frames,height,width,fps\n{folder / '0.mp4'},too long,500,40,56,24\n"
    )
    plan = plan_of([(replace(WIDE, num_frames=30), [0])], per_step=1)
    with pytest.raises(DataError, match=r"0\.mp4: has 20 frames, and 30 are needed"):
        take(make_loader(load_catalogue(str(tmp_path / "clips.csv")), lambda epoch: plan), 1)


def test_an_image_in_a_bucket_of_videos_is_bad(catalogue: Catalogue) -> None:
    plan = plan_of([(WIDE, [8])], per_step=1)
    with pytest.raises(DataError, match=r"8\.png: an image, and 6 frames are needed"):
        take(make_loader(catalogue, lambda epoch: plan), 1)


def test_a_store_that_does_not_answer_is_never_a_bad_clip(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(self: Storage, path: str) -> None:
        raise StorageUnavailableError("no answer")

    monkeypatch.setattr(Storage, "open", unavailable)
    loader = make_loader(catalogue, bad_clip="skip")
    with pytest.raises(StorageUnavailableError):
        take(loader, 1)
    assert loader.num_skipped == 0


# -------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def store() -> Iterator[Storage]:
    store = Storage("memory://loader-tests")
    yield store
    for info in store.list():
        store.delete(info.path)


def copies(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_a_copy_is_made_once_and_read_from_then_on(
    folder: Path, tmp_path: Path, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        store.write(file.name, file.read_bytes())
    catalogue = load_catalogue("memory://loader-tests/clips.csv")
    expected = contents(take(make_loader(catalogue), 3))
    cached = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 0.001}
    assert_equal(contents(take(make_loader(catalogue, **cached), 3)), expected)
    assert len(copies(tmp_path / "cache")) == NUM_CLIPS + 2
    monkeypatch.setattr(Storage, "download", lambda *arguments: pytest.fail("fetched again"))
    assert_equal(contents(take(make_loader(catalogue, **cached), 3)), expected)


def test_the_least_recently_used_copies_make_room(tmp_path: Path, store: Storage) -> None:
    cache = ClipCache(tmp_path, limit_bytes=300)
    found = {}
    for age, name in enumerate(("a.mp4", "b.mp4", "c.mp4")):
        store.write(name, name.encode() * 20)
        found[name] = cache.find(store, name)[1]
        os.utime(tmp_path / found[name], (age, age))
    cache.find(store, "a.mp4")  # used again
    store.write("d.mp4", b"d" * 100)
    found["d.mp4"] = cache.find(store, "d.mp4")[1]
    assert set(copies(tmp_path)) == {found[name] for name in ("a.mp4", "c.mp4", "d.mp4")}
    assert sum(copies(tmp_path).values()) <= 300


def test_an_object_that_was_replaced_is_copied_anew(tmp_path: Path, store: Storage) -> None:
    cache = ClipCache(tmp_path, limit_bytes=1000)
    for content in (b"old", b"newer"):
        store.write("a.mp4", content)
        where, name = cache.find(store, "a.mp4")
        assert where.read(name) == content


def test_what_is_larger_than_the_cache_or_local_is_not_copied(tmp_path: Path, store: Storage) -> None:
    cache = ClipCache(tmp_path / "cache", limit_bytes=10)
    store.write("large.mp4", b"x" * 11)
    assert cache.find(store, "large.mp4") == (store, "large.mp4")
    local = Storage(str(tmp_path))
    local.write("a.mp4", b"a")
    assert cache.find(local, "a.mp4") == (local, "a.mp4")
    assert not (tmp_path / "cache").exists()


def test_a_copy_that_made_room_for_another_one_is_read_from_the_store(
    folder: Path, tmp_path: Path, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        store.write(file.name, file.read_bytes())
    catalogue = load_catalogue("memory://loader-tests/clips.csv")
    original = ClipCache.find

    def find_and_lose(self: ClipCache, storage: Storage, path: str) -> tuple[Storage, str]:
        where, name = original(self, storage, path)
        where.delete(name)
        return where, name

    monkeypatch.setattr(ClipCache, "find", find_and_lose)
    expected = contents(take(make_loader(load_catalogue(str(folder / "clips.csv"))), 3))
    assert_equal(contents(take(make_loader(catalogue, cache_dir=str(tmp_path / "cache")), 3)), expected)


def test_a_full_disk_costs_speed_and_nothing_else(
    tmp_path: Path, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Storage, path: str, local: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Storage, "download", full)
    store.write("a.mp4", b"a")
    assert ClipCache(tmp_path, limit_bytes=100).find(store, "a.mp4") == (store, "a.mp4")

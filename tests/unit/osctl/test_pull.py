"""`osctl pull` of folders: what is chosen, what is left on the disk, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_api import RUNS, FakeApi
from osctl.downloads import PARTS_FOLDER, Downloads, Item, UnsafeNameError, place
from osctl.errors import OsctlError
from osctl.run_directory import open_storage
from run_folder import add_checkpoint, content_of, make_run

from opensora.checkpoint.manifest import find_checkpoint
from opensora.storage import ObjectInfo, Storage


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_all_of_a_run_is_copied_with_its_layout(osctl: Any, tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    code, out, err = osctl("pull", "./run", "--to", "here")
    assert code == 0
    expected = {path: data for path, data in content_of(run).items() if "step-00000100/attempt-1" not in path}
    assert content_of(Storage(str(tmp_path / "here"))) == expected
    assert not (tmp_path / "here" / PARTS_FOLDER).exists()
    assert out == (
        "WHAT          FILES   SIZE      WHERE\n"
        "config        2       33 B      here\n"
        "samples       6       114 B     here/samples\n"
        "metrics       2       9 B       here\n"
        "logs          2       8 B       here\n"
        "checkpoints   4       6.4 KiB   here/checkpoints/step-00000200/attempt-2\n"
    )
    assert f"16 files, 6.6 KiB, from {run.uri} to here\n" in err
    copied = find_checkpoint(Storage(str(tmp_path / "here")))
    assert copied is not None
    assert copied.step == 200


def test_a_copy_that_is_here_is_left(osctl: Any, tmp_path: Path) -> None:
    make_run(str(tmp_path / "run"))
    osctl("pull", "./run", "--to", "here")
    before = {path: path.stat().st_ino for path in (tmp_path / "here").rglob("*") if path.is_file()}
    result = json.loads(osctl("pull", "./run", "--to", "here", "-o", "json").out)
    assert {entry["state"] for entry in result["files"]} == {"here"}
    assert {path: path.stat().st_ino for path in before} == before


def test_what_was_damaged_or_changed_here_is_copied_again(osctl: Any, tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    osctl("pull", "./run", "--to", "here")
    weights = "checkpoints/step-00000200/attempt-2/rank-00000-00000.bin"
    content = bytearray((tmp_path / "here" / weights).read_bytes())
    content[7] ^= 1
    (tmp_path / "here" / weights).write_bytes(content)
    run.write("progress.json", b'{"step": 999}')
    result = json.loads(osctl("pull", "./run", "--to", "here", "-o", "json").out)
    assert {entry["path"] for entry in result["files"] if entry["state"] == "copied"} == {weights, "progress.json"}
    assert (tmp_path / "here" / weights).read_bytes() == run.read(weights)


def test_only_what_is_asked_for(osctl: Any, tmp_path: Path) -> None:
    make_run(str(tmp_path / "run"))
    osctl("pull", "./run", "--what", "samples", "--what", "config", "--step", "latest", "--to", "a")
    assert _files(tmp_path / "a") == [
        "config.yaml",
        "progress.json",
        *(f"samples/step-00000200/{name}" for name in ("00.mp4", "01.mp4", "sheet.png")),
    ]
    osctl("pull", "./run", "--what", "checkpoints", "--step", "100", "--to", "b")
    assert {path.split("/")[1] for path in _files(tmp_path / "b")} == {"step-00000100"}
    names = osctl("pull", "./run", "--what", "logs", "--to", "c", "-o", "name").out.split()
    assert names == ["c/logs/attempt-1/rank-0/part-00000.log", "c/attempts/1/started.json"]


def test_a_checkpoint_that_is_not_committed_is_never_copied(osctl: Any, tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    path = add_checkpoint(run, 300)
    run.delete(f"{path}/manifest.json")
    osctl("pull", "./run", "--what", "checkpoints", "--to", "here")
    assert {name.split("/")[1] for name in _files(tmp_path / "here")} == {"step-00000200"}
    code, _, err = osctl("pull", "./run", "--what", "checkpoints", "--step", "300", "--to", "here")
    assert code == 3
    assert err.endswith("has no complete checkpoint of step 300\nhint: it has steps 100, 200\n")


def test_a_dry_run_copies_nothing(osctl: Any, tmp_path: Path) -> None:
    make_run(str(tmp_path / "run"))
    code, out, err = osctl("pull", "./run", "--dry-run", "--to", "here")
    assert (code, err) == (0, "6.6 KiB would be copied (dry run)\n")
    assert "checkpoints   4" in out
    assert not (tmp_path / "here").exists()


def test_quiet_says_nothing_but_data(osctl: Any, tmp_path: Path) -> None:
    make_run(str(tmp_path / "run"))
    assert osctl("pull", "./run", "--to", "here", "-q", "--what", "config", "-o", "name").err == ""


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("./nothing",), 3, "there is no folder"),
        (("./empty",), 3, "holds nothing of a run"),
        (("./run", "--what", "samples", "--step", "7"), 3, "has no samples of step 7"),
        (("./run", "--step", "newest"), 2, "--step 'newest' is no step"),
        (("./run", "--to", "./run/copy"), 2, "is the run directory itself"),
        (("ftp://host/run",), 1, "unknown kind of storage"),
        (("./run", "--to", "file"), 1, "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_get_an_answer(osctl: Any, tmp_path: Path, words: tuple[str, ...], code: int, message: str) -> None:
    make_run(str(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    result = osctl("pull", *words)
    assert result.code == code
    assert message in result.err
    assert "hint: " in result.err


def test_the_directory_of_a_run_of_the_cluster(api: FakeApi, osctl: Any, tmp_path: Path) -> None:
    make_run(str(tmp_path / "volume"))
    body = {"metadata": {"name": "first"}, "spec": {"runUri": str(tmp_path / "volume")}}
    api.on("GET", f"{RUNS}/first", body)
    assert osctl("pull", "first", "--what", "config").code == 0
    assert _files(tmp_path / "first") == ["config.yaml", "progress.json"]
    api.on("GET", f"{RUNS}/first", {**body, "spec": {"runUri": "/data/of/pods"}})
    code, _, err = osctl("pull", "first")
    assert code == 3
    assert "mount the volume here" in err


def test_the_endpoint_of_this_machine_goes_before_that_of_the_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    spec = {"storage": {"endpoint": "http://store.svc:8333"}}
    assert open_storage("s3://bucket/run", spec).config.endpoint_url == "http://store.svc:8333"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert open_storage("s3://bucket/run", spec).config.endpoint_url is None


# ----------------------------------------------------------------------------------------------------- hostile names


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "a\nb", "a\x1b[2J", "", ".osctl-pull/x"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, path: str) -> None:
    for windows in (False, True):
        with pytest.raises(UnsafeNameError):
            place(tmp_path, path, windows=windows)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("C:/x", "C%3A/x"),
        ("..\\x", "..%5Cx"),
        ("what is it?.mp4", "what is it%3F.mp4"),
        ("con", "%63on"),
        ("Aux.txt", "%41ux.txt"),
        ("end. ", "end.%20"),
        ("plain.mp4", "plain.mp4"),
    ],
)
def test_names_that_windows_does_not_take_are_escaped(tmp_path: Path, path: str, name: str) -> None:
    assert place(tmp_path, path, windows=True) == tmp_path / name
    assert place(tmp_path, path, windows=False) == tmp_path / path


def test_a_link_that_leads_out_is_not_followed(osctl: Any, tmp_path: Path) -> None:
    make_run(str(tmp_path / "run"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "samples").symlink_to(outside)
    code, _, err = osctl("pull", "./run", "--to", "here", "--what", "samples", "--what", "config")
    assert code == 1
    assert "lies behind a link that leads out of here" in err
    assert _files(outside) == []
    assert "config.yaml" in _files(tmp_path / "here")


# -------------------------------------------------------------------------------------------------------- interrupted


class Slow(Storage):
    """Gives a few bytes at a time, and ends with an error after some."""

    def __init__(self, uri: str, *, fails_after: int | None = None) -> None:
        super().__init__(uri)
        self.fails_after = fails_after
        self.starts: list[int] = []

    def stream(self, info: ObjectInfo, *, start: int = 0) -> Iterator[bytes]:
        self.starts.append(start)
        content = b"".join(super().stream(info, start=start))
        for at in range(0, len(content), 100):
            if self.fails_after is not None and at >= self.fails_after:
                raise OsctlError("the store is away")
            yield content[at : at + 100]


def _weights(run: Storage) -> Item:
    checkpoint = find_checkpoint(run)
    assert checkpoint is not None
    entry = checkpoint.manifest.objects[0]
    return Item("checkpoints", run.info(f"{checkpoint.path}/{entry.path}"), sha256=entry.sha256)


def test_a_broken_copy_goes_on_where_it_was(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    item, target = _weights(run), tmp_path / "here"
    with pytest.raises(OsctlError, match="away"):
        Downloads(Slow(run.uri, fails_after=1000), target, jobs=1).run([item])
    assert [name for name in _files(target) if not name.startswith(PARTS_FOLDER)] == []
    source, seen = Slow(run.uri), []
    Downloads(source, target, jobs=1, on_bytes=seen.append).run([item])
    assert source.starts == [1000]
    assert sum(seen) == item.info.size
    assert content_of(Storage(str(target))) == {item.info.path: run.read(item.info.path)}


def test_a_part_of_another_content_is_not_continued(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    target = tmp_path / "here"
    with pytest.raises(OsctlError, match="away"):
        Downloads(Slow(run.uri, fails_after=1000), target, jobs=1).run([_weights(run)])
    add_checkpoint(run, 200, attempt=2)
    source = Slow(run.uri)
    Downloads(source, target, jobs=1).run([_weights(run)])
    assert source.starts == [0]


def test_a_part_that_was_damaged_here_is_thrown_away(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    item, target = _weights(run), tmp_path / "here"
    with pytest.raises(OsctlError, match="away"):
        Downloads(Slow(run.uri, fails_after=1000), target, jobs=1).run([item])
    (part,) = (target / PARTS_FOLDER).glob("*.part")
    part.write_bytes(bytes(1000))  # what a machine that lost its power may leave
    Downloads(Slow(run.uri), target, jobs=1).run([item])
    assert content_of(Storage(str(target))) == {item.info.path: run.read(item.info.path)}


def test_an_object_that_does_not_fit_its_digest_never_gets_its_name(osctl: Any, tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    item = _weights(run)
    run.write(item.info.path, bytes(item.info.size))
    code, _, err = osctl("pull", "./run", "--what", "checkpoints", "--to", "here")
    assert code == 1
    assert "is damaged" in err
    left = [name for name in _files(tmp_path / "here") if not name.startswith(PARTS_FOLDER)]
    assert item.info.path not in left
    assert not any(name.endswith("manifest.json") for name in left), "what is here is no checkpoint"


def test_an_object_that_is_replaced_meanwhile_is_copied_as_it_is_then(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    old = Item("config", run.info("progress.json"))
    run.write("progress.json", b'{"step": 220, "more": 1}')
    (copy,) = Downloads(run, tmp_path / "here", jobs=1).run([old])
    assert copy.path.read_bytes() == b'{"step": 220, "more": 1}'


def test_an_object_that_goes_meanwhile_is_left_out_unless_it_is_of_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"))
    log, weights = Item("logs", run.info("attempts/1/started.json")), _weights(run)
    run.delete(log.info.path)
    (copy,) = Downloads(run, tmp_path / "here", jobs=1).run([log])
    assert copy.state == "gone"
    run.delete(weights.info.path)
    with pytest.raises(OsctlError, match="removed meanwhile"):
        Downloads(run, tmp_path / "here", jobs=1).run([weights])


@pytest.mark.skipif(sys.platform == "win32", reason="locks differ")
def test_two_copies_into_one_folder_do_not_mix(osctl: Any, tmp_path: Path) -> None:
    import fcntl

    make_run(str(tmp_path / "run"))
    (tmp_path / "here" / PARTS_FOLDER).mkdir(parents=True)
    with open(tmp_path / "here" / PARTS_FOLDER / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = osctl("pull", "./run", "--to", "here")
    assert code == 4
    assert "another osctl copies into here now" in err


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    import subprocess

    code = "import osctl.commands.pull, sys; print({'torch', 's3fs', 'rich.progress', 'aiohttp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout == "set()\n"

"""`osctl init`: files that the other commands take as they are, and none that is replaced."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml


class Terminal(io.StringIO):
    """A person who types these lines."""

    def isatty(self) -> bool:
        return True


def test_the_files_are_right_as_they_are(osctl: Any, home: Path) -> None:
    code, out, err = osctl("init", "first")
    assert (code, out) == (0, "first/run.yaml\nfirst/config.yaml\nfirst/README.md\n")
    assert err == "next: first/README.md says how to go on\n"
    assert osctl("lint", "first/run.yaml", "first/config.yaml").code == 0
    run = yaml.safe_load((home / "first" / "run.yaml").read_text())
    assert run["metadata"]["name"] == "first"
    config = yaml.safe_load((home / "first" / "config.yaml").read_text())
    assert config.pop("run_uri") == run["spec"]["runUri"] == "s3://my-bucket/runs/first"
    assert yaml.safe_load(run["spec"]["config"]["inline"]) == config
    assert osctl("train", "first/run.yaml", "--image", "x", "--dry-run").code == 0
    assert osctl("search", "first/config.yaml", "--image", "x", "--dry-run").code == 0


def test_flags_and_settings_fill_them_in(osctl: Any, home: Path) -> None:
    (home / "osctl.toml").write_text('run_uri = "s3://team/runs/{name}"\nimage = "registry/trainer:1"\n')
    odd = "s3://team/a: b #c/clips.csv"
    assert osctl("init", "--name", "stage1", "--nodes", "4", "--data", odd).code == 0
    run = yaml.safe_load((home / "run.yaml").read_text())
    assert (run["spec"]["runUri"], run["spec"]["nodes"]) == ("s3://team/runs/stage1", 4)
    assert run["spec"]["image"] == "registry/trainer:1"
    assert yaml.safe_load(run["spec"]["config"]["inline"])["data"]["path"] == odd


def test_a_person_is_asked_for_what_no_flag_says(osctl: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("s3://mine/runs/first\n\n"))
    code, _, err = osctl("init", "first")
    assert code == 0
    assert "run directory [s3://my-bucket/runs/first]: " in err
    run = yaml.safe_load((home / "first" / "run.yaml").read_text())
    assert run["spec"]["runUri"] == "s3://mine/runs/first"
    assert "s3://my-bucket/clips/clips.csv" in run["spec"]["config"]["inline"]


@pytest.mark.parametrize("name", ["run.yaml", "config.yaml", "README.md"])
def test_nothing_is_replaced(osctl: Any, home: Path, name: str) -> None:
    (home / "first").mkdir()
    (home / "first" / name).write_text("mine")
    code, out, err = osctl("init", "first")
    assert (code, out) == (4, "")
    assert f"first/{name} exists already" in err
    assert [path.name for path in (home / "first").iterdir()] == [name]
    assert (home / "first" / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--name", "Stage_1"), "metadata.name"),
        (("--run-uri", "ftp://x"), "spec.runUri"),
        (("--nodes", "0"), "--nodes"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    osctl: Any, home: Path, words: tuple[str, ...], message: str
) -> None:
    code, _, err = osctl("init", "first", *words)
    assert code == 2
    assert message in err
    assert not (home / "first").exists()


def test_a_folder_that_cannot_be_made_is_told(osctl: Any, home: Path) -> None:
    (home / "file").write_text("")
    code, _, err = osctl("init", "file/first", "--name", "first")
    assert code == 1
    assert "cannot be written" in err

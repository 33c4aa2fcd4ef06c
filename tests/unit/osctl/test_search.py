"""`osctl search`: what is submitted, the table of what was found, and the files that it is written into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api import FakeApi
from osctl.batch_sizes import change_file
from osctl.errors import UsageError

SEARCHES = "/apis/opensora.dev/v1alpha1/namespaces/team/batchsearches"
RESULTS = [
    {"bucket": "144p/17", "state": "Found", "batch": 12, "peakBytes": 3 * 2**30, "seconds": "0.81",
     "evidence": "4:1073741824:0.3 12:3221225472:0.81 13:oom"},
    {"bucket": "144p/51", "state": "Found", "batch": 3, "peakBytes": 2**30, "seconds": "0.4", "evidence": "new:words"},
]  # fmt: skip
CONFIG = """\
# what we train
data:
  path: s3://bucket/clips.csv
  bucket_config: {144p: {17: [1.0, 4], 51: [0.5, 2]}}  # résumé
train: {steps: 10}
"""
SIZES = {("144p", 17): 12, ("144p", 51): 3}


def _search(phase: str = "Succeeded", results: list[dict[str, Any]] = RESULTS, **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "opensora.dev/v1alpha1", "kind": "BatchSearch",
        "metadata": {"name": "sizes", "uid": "u", "resourceVersion": "1"}, "spec": {},
        "status": {"phase": phase, "results": results, "table": "batch-table-1", **status},
    }  # fmt: skip


def test_the_table_shows_sizes_and_evidence(api: FakeApi, osctl: Any) -> None:
    api.on("GET", f"{SEARCHES}/sizes", _search())
    code, out, err = osctl("search", "sizes")
    assert code == 0
    assert out == (
        "BUCKET    BATCH   MEMORY    STEP     EVIDENCE\n"
        "144p/17   12      3.0 GiB   0.81 s   4 took 1.0 GiB and 0.3 s, 12 took 3.0 GiB and 0.81 s, 13 out of memory\n"
        "144p/51   3       1.0 GiB   0.4 s    new:words\n"
    )
    assert "kept in the ConfigMap batch-table-1" in err
    data = json.loads(osctl("search", "bs/sizes", "-o", "json").out)
    assert (data["name"], data["results"]) == ("sizes", RESULTS)


def test_a_search_that_goes_on_says_what_is_missing(api: FakeApi, osctl: Any, home: Path) -> None:
    results = [RESULTS[0], {"bucket": "144p/51", "state": "Running"}]
    api.on("GET", f"{SEARCHES}/sizes", _search("Running", results))
    assert osctl("search", "sizes").out.splitlines()[2].split() == ["144p/51", "running"]
    (home / "config.yaml").write_text(CONFIG)
    code, _, err = osctl("search", "sizes", "--apply-to", "config.yaml")
    assert code == 4
    assert "no batch size for 144p/51 yet" in err
    assert (home / "config.yaml").read_text() == CONFIG


def test_a_bucket_that_does_not_fit_is_never_applied(api: FakeApi, osctl: Any, home: Path) -> None:
    api.on("GET", f"{SEARCHES}/sizes", _search(results=[{**RESULTS[0], "batch": 0}]))
    (home / "config.yaml").write_text(CONFIG)
    code, _, err = osctl("search", "sizes", "--apply-to", "config.yaml")
    assert (code, "not even one clip of 144p/17 fits" in err) == (4, True)


def test_a_config_becomes_a_search(osctl: Any, home: Path) -> None:
    (home / "stage1.yaml").write_text(
        CONFIG + "model: {type: STDiT3}\nvae: {type: codec}\ntext_encoder: {type: hash}\nscheduler: {type: rflow}\n"
    )
    words = ("--image", "x", "--max-batch", "64", "--memory-budget", "2Gi", "--dry-run", "-o", "json")
    items = json.loads(osctl("search", "stage1.yaml", *words).out)["items"]
    assert [item["kind"] for item in items] == ["BatchSearch", "ConfigMap", "Job"]
    assert items[0]["metadata"]["name"].startswith("stage1-")
    arguments = items[2]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "144p/17" in arguments
    assert arguments[arguments.index("--max-batch") + 1] == "64"
    one = json.loads(osctl("search", "stage1.yaml", *words, "--bucket", "144p/51").out)["items"][0]
    assert one["spec"]["buckets"] == [{"resolution": "144p", "frames": 51}]


def test_it_waits_and_writes_what_was_found(api: FakeApi, osctl: Any, home: Path) -> None:
    body = {**_search("Pending", []), "spec": {"image": "x", "config": {"inline": CONFIG}}}
    (home / "search.yaml").write_text(yaml.safe_dump({key: body[key] for key in ("apiVersion", "kind", "spec")}
                                                     | {"metadata": {"name": "sizes"}}))  # fmt: skip
    (home / "config.yaml").write_text(CONFIG)
    api.on("POST", SEARCHES, body)
    api.on("GET", f"{SEARCHES}/sizes", _search())
    code, _, err = osctl("search", "search.yaml", "--wait", "--apply-to", "config.yaml")
    assert code == 0, err
    assert (home / "config.yaml").read_text() == CONFIG.replace("4]", "12]").replace("2]}", "3]}")
    assert "config.yaml: 144p/17: 4 becomes 12" in err
    assert "config.yaml has these sizes already" in osctl("search", "sizes", "--apply-to", "config.yaml").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sizes", "--max-batch", "3"), "sizes exists already"),
        (("tr/sizes",), "tr/sizes is no BatchSearch"),
        (("run.yaml", "--apply-to", "x"), "--apply-to without --wait"),
        (("run.yaml", "--bucket", "144p"), "--bucket '144p' is no bucket"),
        (("missing.yaml",), "missing.yaml cannot be read"),
    ],
)
def test_mistakes_get_an_answer(osctl: Any, words: tuple[str, ...], message: str) -> None:
    code, _, err = osctl("search", *words)
    assert code == 2
    assert message in err


# --------------------------------------------------------------------------------------------------------------- files


def _run_file(config: str, **more: Any) -> str:
    block = "\n".join(f"      {line}" if line else "" for line in config.splitlines())
    return (
        "# first of all\napiVersion: opensora.dev/v1alpha1\nkind: TrainingRun\nmetadata: {name: first}\nspec:\n"
        f"  config:\n    inline: |\n{block}\n  nodes: 2\n"
    )


PYTHON = """\
résumé = "é"; bucket_config = {
    "144p": {17: (1.0, 4), 51: [(0.5, 0.3), 2], 102: ((1.0, 0.3), None)},  # keep me
}
data = dict(type="VariableVideoTextDataset", bucket_config=bucket_config)
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", CONFIG),
        ("crlf.yaml", CONFIG.replace("\n", "\r\n")),
        ("flat.yaml", "bucket_config:\n  144p:\n    17:\n      - 1.0\n      - 4\n    51: [[0.5, 0.2], 2]\n"),
        ("config.json", json.dumps({"data": {"bucket_config": {"144p": {"17": [1.0, 4], "51": [0.5, 2]}}}})),
        ("run.yaml", _run_file(CONFIG)),
        ("blank.yaml", _run_file("\n\n" + CONFIG)),
        ("two.yaml", "kind: ConfigMap\n---\n" + _run_file(CONFIG)),
        ("stage.py", PYTHON),
        ("nested.py", 'data = {"bucket_config": {"144p": {17: (1.0, 4), 51: (1.0, 2)}}}\n'),
    ],
)
def test_only_the_numbers_change(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    path.chmod(0o640)
    changes = change_file(str(path), SIZES)
    assert {change.bucket: (change.old, change.new) for change in changes} == {
        ("144p", 17): (4, 12),
        ("144p", 51): (2, 3),
    }
    new = path.read_bytes().decode()
    undone = new
    for change in reversed(changes):
        shift = sum(len(str(each.new)) - len(str(each.old)) for each in changes if each.start < change.start)
        start = change.start + shift
        assert undone[start : start + len(str(change.new))] == str(change.new)
        undone = undone[:start] + str(change.old) + undone[start + len(str(change.new)) :]
    assert undone == text
    assert path.stat().st_mode & 0o777 == 0o640
    assert change_file(str(path), SIZES) == []


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.yaml", "data: {bucket_config: {144p: {17: [1.0, 4]}}}", "it has no number for 144p/51"),
        ("b.yaml", "train: {steps: 1}", "it has no bucket_config"),
        ("c.yaml", "data: {bucket_config: {144p: {17: &a [1.0, 4], 51: *a}}}", "share one number"),
        ("d.yaml", CONFIG.replace("  path:", "  batch_table: s3://bucket/table.json\n  path:"), "data.batch_table"),
        ("e.yaml", _run_file(CONFIG).replace("inline: |", "inline: >"), "no config in a block"),
        ("f.yaml", _run_file(CONFIG).replace("    inline", "    overrides: ['data.bucket_config={}']\n    inline"),
         "its spec.config.overrides say"),
        ("g.yaml", "a: [", "it is no YAML"),
        ("a.py", "_base_ = ['../x.py']\n", "it has no bucket_config of its own"),
        ("b.py", "n = 4\nbucket_config = {'144p': {17: (1.0, n), 51: (1.0, 2)}}\n", "it has no number for 144p/17"),
        ("c.py", "bucket_config = {f'{n}p': {} for n in (144,)}\n", "it has no bucket_config of its own"),
        ("d.py", PYTHON + "bucket_config['144p'][17] = (1, 1)\nbucket_config['x'] = {}\n", "after it has made it"),
        ("e.py", "bucket_config = {", "it is no Python"),
    ],
)  # fmt: skip
def test_what_cannot_be_changed_safely_is_refused_with_the_text(tmp_path: Path, name: str, text: str, why: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        change_file(str(path), SIZES)
    assert why in caught.value.message
    pasted = yaml.safe_load(str(caught.value.hint).partition(": ")[2])
    assert pasted == {"bucket_config": {"144p": {17: [1.0, 12], 51: [1.0, 3]}}}
    assert path.read_text() == text

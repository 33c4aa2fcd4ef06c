"""docs/guides/run-on-kubernetes.md: its commands, pasted in order, do what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build
import pytest
from nodes import Cluster, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/guides/run-on-kubernetes.md"


@dataclass(frozen=True)
class Block:
    """A fenced bash block of the page."""

    heading: str
    line: int
    text: str
    marker: str
    """What the comment above it says to do with it in a test; empty when it is run as it is."""


def blocks_of(page: str) -> list[Block]:
    """All bash blocks in order."""
    pattern = re.compile(
        r"^## (?P<heading>[^\n]*)$|(?:<!-- test: (?P<marker>.*?) -->\n)?```bash\n(?P<text>.*?)^```$",
        re.DOTALL | re.MULTILINE,
    )
    found, heading = [], ""
    for match in re.finditer(pattern, page):
        if match["heading"]:
            heading = match["heading"]
        else:
            line = page[: match.start("text")].count("\n") + 1
            found.append(Block(heading, line, match["text"], match["marker"] or ""))
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    build.ensure("helm")
    with Cluster(tmp_path_factory.mktemp("guide")) as cluster:
        yield cluster


def run(block: Block, cluster: Cluster) -> str:
    plane = cluster.control_plane
    environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig()), "PATH": f"{plane.bin}:{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    answer = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1000
    )
    assert answer.returncode == 0, f"{PAGE.name}, line {block.line}:\n{block.text}\n{answer.stdout[-3000:]}"
    return answer.stdout


def status(cluster: Cluster) -> Any:
    return json.loads(cluster.control_plane.kubectl("get", "trainingrun", "first", "-o", "json"))["status"]


def test_the_commands_of_the_page_work_in_order(cluster: Cluster) -> None:
    output: dict[str, str] = {}
    markers = []
    for block in blocks_of(PAGE.read_text(encoding="utf-8")):
        if block.heading == "Clean up" and not block.marker:
            ended = status(cluster)
        if not block.marker:
            output[block.heading] = output.get(block.heading, "") + run(block, cluster)
        if block.heading == "Lose a pod":
            disrupted = status(cluster)
        markers.append(block.marker.partition(",")[0])
    assert markers.count("cluster") == 2
    assert markers.count("skip") == 2

    assert "Succeeded" in output["The operator"]
    assert "[launcher] attempt 1 of s3://opensora/runs/first, 2 ranks" in output["A run"]
    assert (disrupted["attempt"], disrupted["restarts"], disrupted["disruptions"]) == (2, 0, 1)
    assert ended["phase"] == "Succeeded"
    first, second = ended["attempts"]
    assert 0 < first["lastStep"] < 200
    assert (second["firstStep"], second["lastStep"]) == (first["lastStep"], 200)
    assert (
        f"1\tStopped\t0 to {first['lastStep']}\n2\tAllRanksSucceeded\t{first['lastStep']} to 200"
        in output["To the end"]
    )

    names = cluster.control_plane.kubectl("get", "namespaces,crds,clusterroles,clusterrolebindings,pods", "-o", "name")
    assert "opensora" not in names
    assert "pod/" not in names


def test_every_block_with_an_unknown_marker_would_be_noticed() -> None:
    known = {"", "skip", "cluster"}
    assert {block.marker.partition(",")[0] for block in blocks_of(PAGE.read_text(encoding="utf-8"))} == known

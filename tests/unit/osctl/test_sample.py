"""`osctl sample`: from flags, a manifest or a config to a SampleJob, and what is refused before anything is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api import RUNS, FakeApi

JOBS = "/apis/opensora.dev/v1alpha1/namespaces/team/samplejobs"
COMMON = ("--checkpoint", "s3://bucket/run", "--output-uri", "s3://bucket/out", "--image", "x", "--name", "clips")
CONFIG = """
model: {type: STDiT3, hidden_size: 32, depth: 1, num_heads: 2}
vae: {type: codec}
text_encoder: {type: hash}
scheduler: {type: rflow}
seed: 42
num_frames: 17
image_size: [64, 64]
"""


def _job(osctl: Any, *words: str) -> Any:
    """The SampleJob that a dry run shows, and the Job's arguments."""
    result = osctl("sample", *words, "--dry-run", "-o", "json")
    assert result.code == 0, result.err
    items = json.loads(result.out)["items"]
    assert [item["kind"] for item in items] == ["SampleJob", "ConfigMap", "Job"]
    arguments = items[2]["spec"]["template"]["spec"]["containers"][0]["args"]
    return items[0], items[1]["data"], arguments


def test_flags_become_the_job_that_the_operator_makes(osctl: Any) -> None:
    job, data, arguments = _job(
        osctl, *COMMON, "--prompt", "a cat", "--prompt", "a dog", "--image-size", "240x426", "--num-frames", "51",
        "--seed", "3", "--num-samples", "2", "--fps", "24", "--sampling-steps", "30", "--guidance", "7",
        "--reference", "a.png", "--reference", "", "--mask-strategy", "0", "--mask-strategy", "", "--set", "loop=2",
    )  # fmt: skip
    assert job["metadata"] == {"name": "clips"}
    assert data["prompts.txt"] == "a cat\na dog\n"
    assert {
        'run="s3://bucket/run"', 'save_dir="s3://bucket/out"', "image_size=[240, 426]", "num_frames=51", "seed=3",
        "num_sample=2", "fps=24", "num_sampling_steps=30", "cfg_scale=7.0", 'reference_path=["a.png", ""]',
        'mask_strategy=["0", ""]', "loop=2",
    } <= set(arguments)  # fmt: skip


def test_prompts_of_a_file_are_its_lines(osctl: Any, home: Path) -> None:
    (home / "prompts.txt").write_text("one\n\n  two \n")
    job, _, _ = _job(osctl, *COMMON, "--prompts", "prompts.txt")
    assert job["spec"]["prompts"] == {"inline": ["one", "two"]}


def test_a_step_of_a_run_directory(osctl: Any) -> None:
    _, _, arguments = _job(osctl, *COMMON, "--step", "200", "--prompt", "a cat")
    assert {'run="s3://bucket/run"', "step=200"} <= set(arguments)


def test_a_manifest_is_changed_by_flags(osctl: Any, home: Path) -> None:
    spec = {
        "checkpoint": {"uri": "s3://bucket/run"}, "prompts": {"inline": ["a cat"]}, "outputUri": "s3://bucket/out",
        "image": "x", "resolution": "240p", "aspectRatio": "9:16", "seed": 5,
    }  # fmt: skip
    body = {"apiVersion": "opensora.dev/v1alpha1", "kind": "SampleJob", "metadata": {"name": "nightly"}, "spec": spec}
    (home / "job.yaml").write_text(yaml.safe_dump(body))
    job, _, _ = _job(osctl, "job.yaml", "--image-size", "64x64", "--workers", "2")
    assert job == {
        **body,
        "spec": {
            **{key: value for key, value in spec.items() if key not in ("resolution", "aspectRatio")},
            "imageSize": [64, 64],
            "workers": 2,
        },
    }


def test_a_config_keeps_its_seed_and_gives_the_job_its_name(osctl: Any, home: Path) -> None:
    (home / "my_clips.yaml").write_text(CONFIG)
    words = ("--checkpoint", "s3://bucket/weights.safetensors", "--output-uri", "s3://bucket/out", "--image", "x")
    job, data, arguments = _job(osctl, "my_clips.yaml", *words, "--prompt", "a cat")
    assert (job["metadata"]["name"], job["spec"]["seed"]) == ("my-clips", 42)
    assert yaml.safe_load(data["config.yaml"])["image_size"] == [64, 64]
    assert {'ckpt_path="s3://bucket/weights.safetensors"', "seed=42"} <= set(arguments)
    assert "seed=9" in _job(osctl, "my_clips.yaml", *words, "--prompt", "a cat", "--seed", "9")[2]


def test_of_a_run_the_clips_go_into_its_directory(api: FakeApi, osctl: Any) -> None:
    api.on("GET", f"{RUNS}/first", {"metadata": {"name": "first"}, "spec": {"runUri": "s3://bucket/runs/first/"}})
    api.on("POST", JOBS, {"apiVersion": "opensora.dev/v1alpha1", "kind": "SampleJob", "metadata": {"name": "c"}})
    code, out, err = osctl("sample", "--run", "first", "--step", "7", "--prompt", "a cat", "--name", "c")
    assert (code, out) == (0, "samplejob.opensora.dev/c created\n")
    assert "`osctl samples sj/c` shows the clips" in err
    ((_, _, body),) = api.writes()
    assert body["spec"] == {
        "prompts": {"inline": ["a cat"]},
        "checkpoint": {"runRef": {"name": "first", "step": 7}},
        "outputUri": "s3://bucket/runs/first/sampled/c",
    }


def test_names_that_nobody_gave_are_new_and_fit(api: FakeApi, osctl: Any) -> None:
    name = "n" * 48
    api.on("GET", f"{RUNS}/{name}", {"metadata": {"name": name}, "spec": {"runUri": "s3://bucket/run"}})
    api.on("POST", JOBS, {"apiVersion": "opensora.dev/v1alpha1", "kind": "SampleJob", "metadata": {"name": "c"}})
    for _ in range(2):
        assert osctl("sample", "--run", name, "--prompt", "a cat").code == 0
    first, second = (body["metadata"]["name"] for _, _, body in api.writes())
    assert first != second
    assert max(len(first), len(second)) <= 48


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "x"), "there is nothing to sample from"),
        (("--checkpoint", "s3://bucket/run"), "there is nothing to sample\n"),
        (("--run", "a", "--checkpoint", "s3://bucket/run", "--prompt", "x"), "--run with --checkpoint"),
        (("--step", "5", "--prompt", "x"), "--step without --run"),
        (("--checkpoint", "s3://bucket/run", "--prompt", "x"), "it is not said where the clips go"),
        ((*COMMON, "--prompt", "x", "--prompts", "y"), "--prompt with --prompts"),
        ((*COMMON, "--prompts", "missing.txt"), "missing.txt cannot be read"),
        ((*COMMON, "--prompt", "x", "--image-size", "240"), "--image-size '240' is no size"),
        ((*COMMON, "--prompt", "x", "--resolution", "240p"), "resolution and aspectRatio need each other"),
        ((*COMMON, "--prompt", "x", "--num-frames", "5000"), "numFrames"),
        ((*COMMON, "--prompt", ""), "prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_told_before_anything_is_sent(osctl: Any, words: tuple[str, ...], message: str) -> None:
    code, out, err = osctl("sample", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert "hint: " in err

"""`osctl sample`: clips from a checkpoint, as a SampleJob or on this machine."""

from __future__ import annotations

import importlib.util
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from opensora_operator.api import MAX_NAME, SAMPLE_JOB, TRAINING_RUN, SampleJobSpec
from opensora_operator.constants import API_VERSION
from opensora_operator.resources import CONFIG_FOLDER, CONFIG_KEY
from opensora_operator.sample_resources import PROMPTS_KEY, arguments_of, checkpoint_of_uri, prompt_lines
from opensora_operator.wire import from_wire

from osctl.artifacts import parse_step
from osctl.client import Object
from osctl.completing import complete_target
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.kinds import resource_of
from osctl.manifests import is_config, name_of, read_manifests, read_text
from osctl.options import DryRunOption, OutputFormat
from osctl.output import printable
from osctl.session import Session
from osctl.submitting import create, print_created, print_forecast, refuse_mistakes
from osctl.targets import Target, parse_run, parse_target
from osctl.waiting import parse_goal, wait_for

_A_LONG_TIME = 365 * 86_400.0
_PLACEHOLDER = "prompt_path=prompts.txt"
"""A config need not say what to sample: the job does."""


def sample(
    session: Session,
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A SampleJob, or a config of sampling (.py, .yaml).")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="Run to sample.", autocompletion=complete_target)
    ] = None,
    step: Annotated[
        str | None, typer.Option("--step", metavar="N|latest", help="Its checkpoint. [default: latest]")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", metavar="URI", help="Instead of a run: run directory, checkpoint, or with FILE weights."
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to sample; repeat it for more.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="FILE", help="The same, one a line.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the noise.")] = None,
    num_samples: Annotated[int | None, typer.Option("--num-samples", min=1, help="Clips per prompt.")] = None,
    num_frames: Annotated[int | None, typer.Option("--num-frames", min=1, help="Frames per clip.")] = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", metavar="HEIGHTxWIDTH", help="In pixels, such as 240x426.")
    ] = None,
    resolution: Annotated[str | None, typer.Option("--resolution", help="Such as 240p, with --aspect-ratio.")] = None,
    aspect_ratio: Annotated[
        str | None, typer.Option("--aspect-ratio", help="Height to width, such as 9:16, with --resolution.")
    ] = None,
    fps: Annotated[int | None, typer.Option("--fps", min=1, help="Frame rate.")] = None,
    sampling_steps: Annotated[
        int | None, typer.Option("--sampling-steps", min=1, help="Steps of the scheduler.")
    ] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance.")] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option("--reference", metavar="URI", help="Pictures or clips to condition on, once for each prompt."),
    ] = None,
    mask_strategy: Annotated[
        list[str] | None, typer.Option("--mask-strategy", help="Where references go, once for each prompt.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the config; repeat it for more.")
    ] = None,
    output_uri: Annotated[
        str | None,
        typer.Option("--output-uri", metavar="URI", help="Folder of the clips. [default: sampled/NAME of the run]"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the job. [default: a new one]", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Pods that sample at a time.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="Image of the sampler.")] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Queue that admits the job.")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="ClusterTrainingProfile.")] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until it is done, and end as it ends.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Sample on this machine: no cluster.")] = False,
    dry_run: DryRunOption = None,
    output: OutputFormat = None,
) -> ExitCode:
    """Sample clips from a checkpoint.

    Sizes, frames and frame rate are those of the run's own samples unless given. `--dry-run` prints every object that
    the operator would create; `--local` runs the same program with the same settings here, which needs a checkpoint
    that this machine can read.

    Examples: `osctl sample --run first --prompt "a waterfall"`, `osctl sample --run first --step 2000 --prompts
    prompts.txt --num-frames 51 --wait`, `osctl sample --checkpoint ./first --prompt "a cat" --local`.
    """
    given: dict[str, Any] = {
        "seed": seed,
        "numSamples": num_samples,
        "numFrames": num_frames,
        "imageSize": _size(image_size),
        "resolution": resolution,
        "aspectRatio": aspect_ratio,
        "fps": fps,
        "samplingSteps": sampling_steps,
        "guidance": guidance,
        "workers": workers,
        "image": image,
        "outputUri": output_uri,
        "profileRef": None if profile is None else {"name": profile},
        "scheduling": None if queue is None else {"queue": queue},
    }
    spec = {key: value for key, value in given.items() if value is not None}
    texts = _prompts(prompt, prompts)
    if texts is not None:
        spec["prompts"] = {"inline": texts}
    source = _source(run, step, checkpoint)
    if source is not None:
        spec["checkpoint"] = source
    base, others = _base(file)
    body = _merged(base, spec, name=name)
    changes = [
        *(overrides or ()),
        *_per_prompt("reference_path", reference),
        *_per_prompt("mask_strategy", mask_strategy),
    ]
    if changes:
        config = body["spec"].get("config") or {}
        body["spec"]["config"] = {**config, "overrides": [*(config.get("overrides") or ()), *changes]}
    _complete(session, body, local=local)
    objects = [*others, body]
    refuse_mistakes(session, objects)
    if dry_run is not None:
        print_forecast(session, objects, [body], dry_run=dry_run, output=output)
    elif local:
        return _sample_here(session, body)
    else:
        for entry in objects:
            print_created(session, create(session, entry), output)
        session.output.note(f"`osctl samples sj/{body['metadata']['name']}` shows the clips")
        if wait:
            place = parse_target(f"{SAMPLE_JOB.singular}/{body['metadata']['name']}")
            wait_for(session, place, parse_goal("complete"), seconds=_A_LONG_TIME)
    return ExitCode.OK


# --------------------------------------------------------------------------------------------------- what is asked for


def _size(text: str | None) -> list[int] | None:
    if text is None:
        return None
    height, times, width = text.lower().partition("x")
    if not (times and height.isdigit() and width.isdigit()):
        raise UsageError(f"--image-size {text!r} is no size", hint="give height and width in pixels, such as 240x426")
    return [int(height), int(width)]


def _prompts(given: list[str] | None, path: str | None) -> list[str] | None:
    if given and path is not None:
        raise UsageError("--prompt with --prompts", hint="give one of them")
    if path is None:
        return given or None
    found = prompt_lines(read_text(path))
    if not found:
        raise UsageError(f"{path} has no prompts", hint="write one a line")
    return found


def _source(run: str | None, step: str | None, checkpoint: str | None) -> Object | None:
    wanted = parse_step(step)
    if run is not None and checkpoint is not None:
        raise UsageError("--run with --checkpoint", hint="give one of them")
    if run is not None:
        return {"runRef": {"name": parse_run(run).name, "step": "latest" if wanted is None else wanted}}
    if checkpoint is None:
        if wanted is not None:
            raise UsageError("--step without --run", hint="name the run")
        return None
    if wanted not in (None, "latest"):
        checkpoint = f"{checkpoint.rstrip('/')}/checkpoints/step-{wanted:08d}"
    return {"uri": _absolute(checkpoint)}


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _per_prompt(key: str, values: list[str] | None) -> list[str]:
    return [f"{key}={json.dumps(values, ensure_ascii=False)}"] if values else []


def _base(file: str | None) -> tuple[Object, list[Object]]:
    """What flags change: the file's SampleJob, one of its config, or an empty one; and what comes with it."""
    empty: Object = {"apiVersion": API_VERSION, "kind": SAMPLE_JOB.name, "metadata": {}, "spec": {}}
    if file is None:
        return empty, []
    if is_config(file):
        return {**empty, "metadata": {"name": name_of(file)}, "spec": _spec_of_config(file)}, []
    objects = read_manifests(file)
    jobs = [body for body in objects if body["kind"] == SAMPLE_JOB.name]
    if len(jobs) != 1:
        raise UsageError(f"{file} has {len(jobs)} SampleJobs", hint="give a file with one; `kubectl apply` takes more")
    return jobs[0], [body for body in objects if body is not jobs[0]]


def _spec_of_config(path: str) -> Object:
    """The config goes into the job whole, but for what the job's own fields say."""
    from opensora.config.documents import read_document  # slow to import
    from opensora.config.load import dump_config, load_sample_config

    values = read_document(path).values
    config = load_sample_config(path, [] if {"prompt", "prompt_path"} & set(values) else [_PLACEHOLDER])
    spec: Object = {
        "config": {"inline": dump_config(config)},
        "seed": config.seed,
        "numSamples": config.num_sample,
    }
    if config.prompt is not None:
        spec["prompts"] = {"inline": list(config.prompt)}
    elif "prompt_path" in values and Path(str(config.prompt_path)).suffix == ".txt":
        spec["prompts"] = {"inline": prompt_lines(read_text(str(config.prompt_path)))}
    if config.run is not None:
        spec["checkpoint"] = {"uri": _absolute(config.run)}
    elif config.ckpt_path is not None:
        spec["checkpoint"] = {"uri": _absolute(config.ckpt_path)}
    return spec


def _merged(base: Object, spec: Mapping[str, Any], *, name: str | None) -> Object:
    old = dict(base.get("spec") or {})
    size = {"imageSize", "resolution", "aspectRatio"}
    if size & set(spec):  # one way to say it replaces the other
        old = {key: value for key, value in old.items() if key not in size}
    if "scheduling" in spec:
        spec = {**spec, "scheduling": {**(old.get("scheduling") or {}), **spec["scheduling"]}}
    metadata = dict(base["metadata"])
    if name is not None:
        metadata["name"] = name
    return {**base, "metadata": metadata, "spec": {**old, **spec}}


def _complete(session: Session, body: Object, *, local: bool) -> None:
    """What is left: a name, and where the clips go. Raises UsageError for what only a person knows."""
    spec, metadata = body["spec"], body["metadata"]
    if not spec.get("prompts"):
        raise UsageError("there is nothing to sample", hint='give --prompt "a waterfall", or --prompts FILE')
    source = spec.get("checkpoint") or {}
    if not source:
        raise UsageError("there is nothing to sample from", hint="give --run NAME, or --checkpoint URI")
    run = source.get("runRef") or {}
    if "name" not in metadata:
        what = str(run.get("name") or "clips")
        metadata["name"] = f"{what[: MAX_NAME - 9].rstrip('-')}-{secrets.token_hex(4)}"
    if "outputUri" in spec:
        if local:
            spec["outputUri"] = _absolute(spec["outputUri"])
        return
    if local:
        spec["outputUri"] = _absolute(metadata["name"])
    elif run:
        found = session.client.get(resource_of(TRAINING_RUN), session.namespace, str(run["name"]))
        spec["outputUri"] = f"{str(found['spec']['runUri']).rstrip('/')}/sampled/{metadata['name']}"
    else:
        raise UsageError("it is not said where the clips go", hint="give --output-uri s3://bucket/folder")


# ---------------------------------------------------------------------------------------------------------------- here


def _sample_here(session: Session, body: Object) -> ExitCode:
    """The program that the pods run, with the same arguments, except that its files are here."""
    if importlib.util.find_spec("torch") is None:
        raise OsctlError("sampling needs torch, which is not installed", hint='pip install "opensora[train]"')
    spec = from_wire(SampleJobSpec, body["spec"])
    if spec.prompts.ref is not None or spec.config.ref is not None:
        raise UsageError("a ConfigMap is read by pods alone", hint="--local takes prompts and config from files")
    uri = spec.checkpoint.uri or _uri_of_run(session, body)
    step = None if spec.checkpoint.run_ref is None else spec.checkpoint.run_ref.step
    data = {PROMPTS_KEY: "\n".join(spec.prompts.inline or ()) + "\n"}
    if spec.config.inline is not None:
        data[CONFIG_KEY] = spec.config.inline
    chosen = checkpoint_of_uri(uri, has_config=CONFIG_KEY in data)
    with tempfile.TemporaryDirectory(prefix="osctl-sample-") as folder:
        for key, text in data.items():
            (Path(folder) / key).write_text(text, encoding="utf-8")
        module, *arguments = (text.replace(CONFIG_FOLDER, folder) for text in arguments_of(spec, chosen, data))
        if isinstance(step, int):
            arguments.append(f"step={step}")
        session.output.note(f"sampling from {printable(uri)} into {printable(spec.output_uri)}")
        code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if code == 0:
        session.output.data(spec.output_uri)
        return ExitCode.OK
    raise OsctlError(f"sampling ended with {code}", exit_code=ExitCode.RUN_FAILED)


def _uri_of_run(session: Session, body: Object) -> str:
    name = str(body["spec"]["checkpoint"]["runRef"]["name"])
    found = session.client.get(resource_of(TRAINING_RUN), session.namespace, Target(TRAINING_RUN, name).name)
    return str(found["spec"]["runUri"])

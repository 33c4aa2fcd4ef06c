"""The files that a new run begins with."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

RUN_FILE, CONFIG_FILE, README_FILE = "run.yaml", "config.yaml", "README.md"

_CONFIG = """\
# A small STDiT3, for a first try; `osctl explain config.model` describes the settings.
model: {type: STDiT3, hidden_size: 384, depth: 8, num_heads: 6, input_sq_size: 128}
vae: {type: codec}           # pixels to latents and back, without weights to download
text_encoder: {type: hash}   # `minilm` understands words; it needs the extra text-minilm in the image
scheduler: {type: rflow, num_sampling_steps: 30, cfg_scale: 4.0}
dtype: bf16                  # fp32 on a CPU

data:
  # Catalogue: a CSV or Parquet file with the columns path, num_frames, height, width, and text and fps.
  path: {data}
  # Resolution: {frames: [share of the clips that is used, clips per batch]}.
  # `osctl search config.yaml --wait --apply-to run.yaml` finds the largest batches that fit.
  bucket_config:
    144p: {17: [1.0, 8], 51: [1.0, 2]}

train: {steps: 10000, log_every: 20}
optim: {lr: 1.0e-4, warmup_steps: 500, grad_clip: 1.0, ema_decay: 0.999}

# What `osctl samples` shows while it trains.
samples:
  every_steps: 1000
  prompts: [a ball moves to the right, a street with cars]
  num_frames: 17
  image_size: [128, 128]
"""

_RUN = """\
# A training run: `osctl lint {run_file}` checks it, `osctl train {run_file}` submits it, as `kubectl apply -f` does.
# `osctl explain spec` describes every field.
apiVersion: opensora.dev/v1alpha1
kind: TrainingRun
metadata:
  name: {name}
spec:
  # Where checkpoints, samples, metrics and logs go. It outlives the run in the cluster.
  runUri: {run_uri}

  # Pods, and ranks in each: `auto` is one per GPU.
  nodes: {nodes}
  procsPerNode: auto
{image}
  # Image, GPUs and credentials that are not given here come from the cluster's default profile (`osctl get ctp`).
  # profileRef: {{name: h200}}
  # scheduling: {{queue: gpus}}

  checkpoint:
    everySteps: 500

  # After a failure it goes on from the newest checkpoint. Failures count anew after healthySteps good steps.
  restartPolicy:
    maxRestarts: 10
    healthySteps: 100

  # What is trained. {config_file} is a copy for the commands that take a config.
  config:
    inline: |
{config}"""

_README = """\
# {name}

- `{run_file}`: the run, as the cluster takes it
- `{config_file}`: what it trains, for the commands that take a config

Next:

1. Fill in `runUri` and `data.path` where they are examples, then check:

   ```bash
   osctl doctor
   osctl lint {run_file} {config_file}
   ```

2. Find the batch sizes that fit the GPUs:

   ```bash
   osctl search {config_file} --wait --apply-to {run_file}
   ```

3. Train, and watch:

   ```bash
   osctl train {run_file}
   osctl status {name}
   osctl logs {name} -f
   ```

4. Look at the samples, and take the results home:

   ```bash
   osctl samples {name}
   osctl sample --run {name} --prompt "a ball moves to the left" --wait
   osctl pull {name}
   ```
"""


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """What differs from one run to the next."""

    name: str
    run_uri: str
    data: str
    nodes: int = 1
    image: str = ""

    def files(self) -> Mapping[str, str]:
        """Name → content."""
        config = _CONFIG.replace("{data}", _quoted(self.data))
        image = f"  image: {_quoted(self.image)}\n" if self.image else ""
        names = {"run_file": RUN_FILE, "config_file": CONFIG_FILE, "name": self.name}
        run = _RUN.format(
            **names,
            run_uri=_quoted(self.run_uri),
            nodes=self.nodes,
            image=image,
            config=textwrap.indent(config, " " * 6),
        )
        head = f"# What the run {self.name} trains. {RUN_FILE} has a copy of its own, which the cluster takes.\n"
        return {
            RUN_FILE: run,
            CONFIG_FILE: f"{head}run_uri: {_quoted(self.run_uri)}\n{config}",
            README_FILE: _README.format(**names),
        }


def _quoted(text: str) -> str:
    """As YAML, whatever is in it: JSON is YAML."""
    return (
        text if text.replace("/", "").replace(":", "").replace("-", "").replace(".", "").isalnum() else json.dumps(text)
    )

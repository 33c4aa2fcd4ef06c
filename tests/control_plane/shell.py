"""`osctl` as a program, by one of the identities of the control plane, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from control_plane import ControlPlane
from stage import SPEC


class Terminal:
    """Runs `osctl` as a process of its own."""

    def __init__(self, control_plane: ControlPlane, namespace: str, folder: Path) -> None:
        self._control_plane = control_plane
        self._namespace = namespace
        self.folder = folder

    def environment(self, identity: str = "admin") -> dict[str, str]:
        """Of the program."""
        kubeconfig = self._control_plane.kubeconfig(identity, namespace=self._namespace)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OSCTL_")}
        return {**environment, "KUBECONFIG": str(kubeconfig), "HOME": str(self.folder), "COLUMNS": "100"}

    def run(self, *words: str, identity: str = "admin", code: int = 0) -> str:
        """What it printed: on stdout, or, where it should fail, on stderr."""
        done = subprocess.run(
            [sys.executable, "-m", "osctl", *words], env=self.environment(identity),
            cwd=self.folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if code else done.stdout

    def run_file(self, name: str = "demo", **spec: object) -> str:
        """A run file in the folder."""
        body = {"apiVersion": "opensora.dev/v1alpha1", "kind": "TrainingRun", "metadata": {"name": name}}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({**body, "spec": {**SPEC, **CONFIG, **spec}}))
        return f"{name}.yaml"


CONFIG = {
    "config": {
        "inline": yaml.safe_dump(
            {
                "device": "cpu",
                "dtype": "fp32",
                "model": {"type": "STDiT3", "hidden_size": 32, "depth": 2, "num_heads": 2},
                "vae": {"type": "codec"},
                "text_encoder": {"type": "hash"},
                "scheduler": {"type": "rflow"},
                "data": {"path": "s3://bucket/clips.csv", "bucket_config": {"144p": {17: [1.0, 1]}}},
                "train": {"steps": 10},
            }
        )
    }
}

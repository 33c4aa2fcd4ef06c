"""A throw-away Kubernetes of two nodes on this machine, to play with: `make cluster`. Ctrl-C ends it without a trace."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

import build
import images
from control_plane import ControlPlane
from nodes import Cluster, why_not
from processes import StartError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    if reason := why_not():
        print(f"cluster: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        build.ensure("kube", "pause", "coredns", "helm")
        with tempfile.TemporaryDirectory(prefix="opensora-cluster-") as folder, Cluster(Path(folder)) as cluster:
            cluster.load_image(images.write_python_image(Path(folder) / "trainer.tar"))
            kubeconfig = _kubeconfig(cluster.control_plane)
            print(_WELCOME.format(bin=cluster.control_plane.bin, kubeconfig=kubeconfig, logs=cluster.logs), flush=True)
            while True:
                time.sleep(3600)
    except (StartError, build.BuildError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0

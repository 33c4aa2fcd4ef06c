"""Says which share of its steps a run has waited for clips, and for other ranks, from the metrics it has left.

make quickstart && python benchmarks/data_wait.py quickstart-run/run-600-steps
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

LIMIT_PERCENT = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory on this machine")
    folders = sorted(parser.parse_args().run.glob("metrics/attempt-*"))
    if not folders:
        raise SystemExit("there are no metrics")
    print(f"rank 0; the limit of data wait is {LIMIT_PERCENT:g} %")
    print(f"{'attempt':>9} {'steps':>9} {'seconds':>8} {'data wait':>10} {'imbalance':>10}")
    for folder in folders:
        records = [json.loads(line) for part in sorted(folder.glob("part-*")) for line in part.read_text().splitlines()]
        steps = [record for record in records if "step_seconds" in record]
        seconds = sum(step["step_seconds"] for step in steps)
        shares = [
            100 * sum(step[name] * step["step_seconds"] for step in steps) / seconds
            for name in ("data_wait_share", "imbalance_share")
        ]
        span = f"{steps[0]['step']}-{steps[-1]['step']}"
        print(f"{folder.name[8:]:>9} {span:>9} {seconds:>8.1f} {shares[0]:>8.2f} % {shares[1]:>8.2f} %")


if __name__ == "__main__":
    main()

"""`osctl lint`: everything that can be checked without a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from osctl.checks import check
from osctl.client import CONFIG_MAPS
from osctl.errors import ExitCode, UsageError
from osctl.forecast import Forecast
from osctl.layout import layout_of
from osctl.manifests import is_config, read_manifests
from osctl.options import ReadBuckets
from osctl.resolved import config_of
from osctl.session import Session


def lint(
    session: Session,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Run files and configs.", show_default=False)],
    read_buckets: ReadBuckets = False,
) -> ExitCode:
    """Check run files without a cluster.

    Schema, the rules of the API, the config, and whether the ranks divide as asked for. Profiles and ConfigMaps in the
    files are taken into account. Ends with 2 where something is wrong.

    What is right is followed by a forecast: parameters, memory of a rank for each bucket, steps of an epoch. Memory is
    an estimate by formula, unless the config names the table of a batch search.

    Examples: `osctl lint run.yaml`, `osctl lint run.yaml profile.yaml`, `osctl lint configs/opensora-v1-2/train/*.py`.
    """
    configs = [path for path in files if is_config(path)]
    sources = [(path, body) for path in files if path not in configs for body in read_manifests(path)]
    num_problems = 0
    for path in configs:
        num_problems += _lint_config(session, path, read_buckets=read_buckets)
    everything = [body for _, body in sources]
    for path, body in sources:
        name = f"{path}: {body['kind']} {body['metadata']['name']}"
        if body["kind"] == CONFIG_MAPS.kind:
            continue
        report = check(body, others=everything)
        for problem in report.problems:
            session.output.data(f"{name}: {problem}")
        for words in report.unknown:
            session.output.note(f"{name}: {words}")
        if not report.problems:
            session.output.note(f"{name}: ok")
            if report.planned is not None:
                _tell_outlook(session, report.planned, read_buckets=read_buckets)
        num_problems += len(report.problems)
    if num_problems:
        raise UsageError(f"{num_problems} {'problem' if num_problems == 1 else 'problems'}")
    return ExitCode.OK


def _lint_config(session: Session, path: str, *, read_buckets: bool) -> int:
    from opensora.config.load import load_train_config  # slow to import
    from opensora.errors import ConfigError
    from osctl.outlook import as_text, look_ahead

    try:
        # Where a run goes is said when it is submitted.
        config = load_train_config(path, ["run_uri=/run"])
    except ConfigError as error:
        session.output.data(f"{path}: {error.message}")
        return 1
    session.output.note(f"{path}: ok; on the fewest ranks that it allows:")
    session.output.note(as_text(look_ahead(config, ranks=config.parallel.replicas, reads_buckets=read_buckets)))
    return 0


def _tell_outlook(session: Session, planned: Forecast, *, read_buckets: bool) -> None:
    from osctl.outlook import as_text, look_ahead  # slow to import

    config = config_of(planned)
    if config is not None:
        session.output.note(as_text(look_ahead(config, ranks=layout_of(planned).ranks, reads_buckets=read_buckets)))

"""Prints what an image has to install, out of pyproject.toml, one requirement a line.

    python docker/requirements.py operator         # of this extra alone: the operator uses nothing else
    python docker/requirements.py --base train     # and what the package itself needs

Dependencies are installed before the sources are copied, so that a change of the sources leaves their layer as it is.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path


def requirements(project: dict[str, object], extras: list[str], *, base: bool) -> list[str]:
    """The requirements of these extras, and of the package itself if `base`. An unknown extra ends the program."""
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    unknown = sorted(set(extras) - set(optional))
    if unknown:
        raise SystemExit(f"no such extra: {', '.join(unknown)}; there are {', '.join(sorted(optional))}")
    own = project["dependencies"] if base else []
    assert isinstance(own, list)
    return [*own, *(line for extra in extras for line in optional[extra])]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prints what an image has to install.")
    parser.add_argument("extras", nargs="+", help="names of extras; several may stand in one word, with commas")
    parser.add_argument("--base", action="store_true", help="also what the package needs without any extra")
    parser.add_argument("--pyproject", type=Path, default=Path("pyproject.toml"))
    arguments = parser.parse_args(words)
    project = tomllib.loads(arguments.pyproject.read_text(encoding="utf-8"))["project"]
    extras = [extra for part in arguments.extras for extra in part.split(",")]
    sys.stdout.writelines(f"{line}\n" for line in requirements(project, extras, base=arguments.base))


if __name__ == "__main__":
    main()

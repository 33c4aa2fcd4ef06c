"""`osctl completion`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from osctl.session import Session


class Shell(StrEnum):
    """Shells that can be taught."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"
    POWERSHELL = "powershell"


def completion(
    session: Session, shell: Annotated[Shell, typer.Argument(help="bash, zsh, fish or powershell.", show_default=False)]
) -> None:
    """Print the completion script of a shell.

    It completes commands, options and names of runs. To keep it, with bash: `source <(osctl completion bash)` in
    ~/.bashrc; with zsh: `source <(osctl completion zsh)` in ~/.zshrc; with fish: `osctl completion fish >
    ~/.config/fish/completions/osctl.fish`.
    """
    from typer import completion as scripts  # slow to import

    make_script: Any = vars(scripts)["get_completion_script"]  # typer does not say that it exports it
    script = make_script(prog_name="osctl", complete_var="_OSCTL_COMPLETE", shell=shell.value)
    session.output.data(str(script))

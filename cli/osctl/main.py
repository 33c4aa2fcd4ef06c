"""The entry point: the table of commands, the options that all have, and how errors end the process."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from osctl.errors import ExitCode, OsctlError
from osctl.output import Output, OutputClosedError
from osctl.session import Session
from osctl.settings import DEBUG, resolve

_CONTROL_C = 130
_CLOSED_PIPE = 141
"""What a shell reports for a program that wrote to a pipe nobody reads."""
COMPLETE = "_OSCTL_COMPLETE"
"""Set by a completion script: what is asked for then is words, in the form of its shell."""
_CLICK_ERROR: type[Any] = typer.BadParameter.__mro__[2]
"""Base of typer's errors about the command line, which it does not export."""


@dataclass(frozen=True)
class Command:
    """A command: the function of its name in a module of its own, imported when it is used."""

    module: str
    section: str
    summary: str
    """First sentence of its help, here so that the list of commands imports none of them."""
    asks_cluster: bool = True
    passes_words: bool = False
    """What follows its first word belongs to somebody else, and is not looked at."""


COMMANDS: Mapping[str, Command] = {
    "train": Command("train", "Start", "Submit a training run."),
    "sample": Command("sample", "Start", "Sample clips from a checkpoint."),
    "search": Command("search", "Start", "Find the batch size of every bucket, or show what was found."),
    "init": Command("init", "Start", "Write the files of a new run.", asks_cluster=False),
    "lint": Command("lint", "Start", "Check run files without a cluster.", asks_cluster=False),
    "plan": Command("plan", "Start", "Show what the operator would do next, and why."),
    "get": Command("get", "Look", "List runs, sample jobs, batch searches and profiles."),
    "status": Command("status", "Look", "Tell one run's story on one screen."),
    "watch": Command("watch", "Look", "Tell one run's story live, until it ends."),
    "top": Command("top", "Look", "Compare what runs take and how fast they are."),
    "logs": Command("logs", "Look", "Show what the ranks of a run have printed."),
    "samples": Command("samples", "Look", "Show the samples of a run or a sample job."),
    "tb": Command("tb", "Look", "Run TensorBoard on the metrics of a run."),
    "pull": Command("pull", "Look", "Copy checkpoints, samples, logs and metrics from the run directory."),
    "wait": Command("wait", "Look", "Wait until a run is done, or a condition holds."),
    "suspend": Command("suspend", "Change", "Save, and give up the pods."),
    "resume": Command("resume", "Change", "Go on after `suspend`."),
    "scale": Command("scale", "Change", "Change a run's number of nodes."),
    "restart": Command("restart", "Change", "Start a new attempt of a run."),
    "stop": Command("stop", "Change", "Save, and end a run for good; the object stays."),
    "delete": Command("delete", "Change", "Delete objects with everything they own in the cluster."),
    "exec": Command("exec", "Reach in", "Run a command in the pod of a rank."),
    "forward": Command("forward", "Reach in", "Connect ports of this machine with those of a rank."),
    "dump": Command("dump", "Reach in", "Show the stacks of all ranks."),
    "data": Command(
        "data", "Tools", "Run a tool of the data pipeline on this machine.", asks_cluster=False, passes_words=True
    ),
    "eval": Command("eval", "Tools", "Run an evaluation on this machine.", asks_cluster=False, passes_words=True),
    "doctor": Command("doctor", "Help", "Find what is wrong with an installation."),
    "explain": Command("explain", "Help", "Describe a field of a run file or a config.", asks_cluster=False),
    "config": Command("config", "Help", "Show the settings and where each comes from."),
    "completion": Command("completion", "Help", "Print the completion script of a shell.", asks_cluster=False),
    "version": Command("version", "Help", "Show the version of osctl and of the cluster."),
}


class _Commands(TyperGroup):
    """Imports a command when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else load(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean `osctl {close[0]}`?" if close else "`osctl --help` lists the commands"
            raise OsctlError(f"there is no command {name!r}", hint=hint, exit_code=ExitCode.USAGE)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for section in dict.fromkeys(entry.section for entry in COMMANDS.values()):
            rows = [(name, entry.summary) for name, entry in COMMANDS.items() if entry.section == section]
            with formatter.section(section):
                formatter.write_dl(rows, col_max=12)


class _Command(TyperCommand):
    """Shows its arguments by the names that its help uses, as `kubectl` does: `RUN`, `[KIND] [NAME]...`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(usage_of(parameter) for parameter in self.params if is_argument(parameter))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        parameters: list[Any] = self.get_params(ctx)
        arguments = [(usage_of(each), each.help or "") for each in parameters if is_argument(each)]
        options = [record for each in parameters if not is_argument(each) and (record := each.get_help_record(ctx))]
        for title, records in (("Arguments", arguments), ("Options", options)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def is_argument(parameter: Any) -> bool:
    """Whether it has its place on the command line, rather than a name."""
    return not parameter.opts[0].startswith("-")


def usage_of(argument: Any) -> str:
    """An argument on a usage line."""
    name = str(argument.metavar or argument.name.upper())
    return name if argument.required or name.startswith("[") else f"[{name}]"


# ------------------------------------------------------------------------------------------------- options of all

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but data and errors.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say how it is done.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", metavar="NAME", help="Namespace.")]
Context = Annotated[str | None, typer.Option("--context", metavar="NAME", help="Context of the kubeconfig.")]
Kubeconfig = Annotated[str | None, typer.Option("--kubeconfig", metavar="FILE", help="How to reach the API server.")]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="Longest time for one request to the API server."),
]

_OPTIONS: Mapping[str, tuple[Any, Any]] = {"quiet": (Quiet, False), "verbose": (Verbose, 0)}
_CLUSTER_OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "namespace": (Namespace, None),
    "context": (Context, None),
    "kubeconfig": (Kubeconfig, None),
    "timeout": (Timeout, None),
}
_TAKING_VALUES = ("-n", "--namespace", "--context", "--kubeconfig", "--timeout")
_SETTINGS = {"timeout": "timeout_seconds"}
"""Option → setting, where they have different names."""


def load(name: str) -> Any:
    """The command as typer has it, with the options that all commands have."""
    entry = COMMANDS[name]
    function = getattr(importlib.import_module(f"osctl.commands.{entry.module}"), name)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings = {"help_option_names": ["-h", "--help"], "allow_interspersed_args": not entry.passes_words}
    app.command(name, cls=_Command, context_settings=settings)(_with_options(function, entry))
    return typer.main.get_command(app)


def _with_options(function: Callable[..., int | None], entry: Command) -> Callable[..., int]:
    """The command with more options, and with a session instead of them. Its own option of a name wins."""
    options = {**_OPTIONS, **(_CLUSTER_OPTIONS if entry.asks_cluster else {})}
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature.parameters.items()
        if name != "session"
    ]
    added = {name: option for name, option in options.items() if name not in signature.parameters}
    keyword = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (annotation, default) in added.items()
    ]
    context = inspect.Parameter("ctx", keyword, annotation=typer.Context)

    @functools.wraps(function)
    def run(ctx: typer.Context, **values: Any) -> int:
        given = {name: values.pop(name) for name in added}
        session = _session({**ctx.obj, **{name: value for name, value in given.items() if value}})
        try:
            code = function(session, **values)
        finally:
            session.close()
        return int(code or ExitCode.OK)

    plain = [parameter.replace(kind=keyword) for parameter in own]
    run.__signature__ = inspect.Signature([context, *plain, *more])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *plain, *more)}
    return run


def _session(options: Mapping[str, Any]) -> Session:
    given = {name: value for name, value in options.items() if name in _CLUSTER_OPTIONS and value}
    flags = {_SETTINGS.get(name, name): value for name, value in given.items()}
    resolved = resolve(flags)
    output = Output(
        color=resolved.settings.color, quiet=bool(options.get("quiet")), verbose=int(options.get("verbose") or 0)
    )
    return Session(resolved, output)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(
    epilog="Every command has --help. `osctl doctor` tells whether all is well; `osctl config view` shows the settings."
)
def _root(
    ctx: typer.Context,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    timeout: Timeout = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Train video diffusion models on Kubernetes: submit runs, see how they are, change them."""
    ctx.obj = {
        "namespace": namespace,
        "context": context,
        "kubeconfig": kubeconfig,
        "timeout": timeout,
        "quiet": quiet,
        "verbose": verbose,
    }


def entry() -> None:
    """The console script."""
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get(COMPLETE):
        _teach_shells()
    try:
        code = typer.main.get_command(app)(_completed(words), prog_name="osctl", standalone_mode=False)
        sys.stdout.flush()
        return int(code or ExitCode.OK)
    except (BrokenPipeError, OutputClosedError):
        # Python flushes stdout once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return _CONTROL_C
    except OsctlError as error:
        Output().error(error.message, error.hint)
        return int(error.exit_code)
    except _CLICK_ERROR as error:
        return _usage_error(error)
    except Exception as error:
        return _foreign_error(error)


def _teach_shells() -> None:
    """Typer knows the shells by itself only where it adds options of its own to the command line."""
    from typer import completion

    vars(completion)["completion_init"]()  # typer does not say that it exports it


def _completed(words: Sequence[str]) -> list[str]:
    """`--dry-run` without a value is `--dry-run=client`, which typer cannot be told."""
    command = _command_in(words)
    if command in COMMANDS and COMMANDS[command].passes_words:
        return list(words)
    end = words.index("--") if "--" in words else len(words)
    return [("--dry-run=client" if word == "--dry-run" else word) for word in words[:end]] + list(words[end:])


def _command_in(words: Sequence[str]) -> str:
    """The first word that is neither an option of all commands nor its value."""
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            return word
        if word in _TAKING_VALUES:
            next(rest, None)
    return ""


def _usage_error(error: Any) -> int:
    ctx = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(error.format_message() + "\n")
        return int(ExitCode.USAGE)
    command = ctx.command_path if ctx is not None else "osctl"
    message = " ".join(error.format_message().split()).rstrip(".")
    Output().error(message[:1].lower() + message[1:], f"`{command} --help` shows how it is used")
    return int(ExitCode.USAGE)


def _foreign_error(error: Exception) -> int:
    """Errors of the core have a message and a hint of their own; anything else is a mistake of ours."""
    message = getattr(error, "message", None)
    if isinstance(message, str) and hasattr(error, "hint"):
        Output().error(message, error.hint)
        return int(ExitCode.ERROR)
    if isinstance(error, OSError) and error.filename:
        Output().error(f"{error.filename}: {error.strerror}", None)
        return int(ExitCode.ERROR)
    if isinstance(error, UnicodeEncodeError):
        Output().error(f"{ascii(error.object)[:60]} is no text that can be written", "use characters of Unicode")
        return int(ExitCode.USAGE)
    if os.environ.get(DEBUG):
        raise error
    Output().error(
        f"osctl made a mistake: {type(error).__name__}: {error}",
        f"with {DEBUG}=1 it shows where; please report that",
    )
    return int(ExitCode.ERROR)

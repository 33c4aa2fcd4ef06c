"""The command lines of the entry points: a config file, Open-Sora's flags, and `key=value` overrides."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from opensora.config.describe import describe_key, help_text
from opensora.config.opensora_keys import SAMPLE_RULES, TRAIN_RULES, KeyRule
from opensora.config.sample import SampleConfig
from opensora.config.search import SearchConfig
from opensora.config.train import TrainConfig
from opensora.config.typed import field_types
from opensora.errors import UsageError


@dataclass(frozen=True)
class CommandLine:
    """What was typed, for `load_train_config` and `load_sample_config`."""

    config: str | None
    overrides: tuple[str, ...]
    flags: dict[str, Any]
    """Open-Sora's key → value, for the flags that were given."""


@dataclass(frozen=True)
class SearchCommandLine:
    """What was typed for the batch-size search: the training config, and the search's own settings."""

    train: CommandLine
    search: dict[str, Any]
    """Setting → value, for the flags that were given."""


@dataclass(frozen=True)
class _Flag:
    name: str
    kind: Callable[[str], Any] | None = str
    """Converts the text; `None` for a switch without a value."""
    count: str | int | None = None
    metavar: str | tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


def parse_bool(text: str) -> bool:
    """Open-Sora's words for true and false: yes, true, t, y, 1 and no, false, f, n, 0.

    Raises:
        ValueError: another word.
    """
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError(text)


_COMMON = (
    _Flag("--seed", int),
    _Flag("--ckpt-path"),
    _Flag("--batch-size", int),
    _Flag("--outputs"),
    _Flag("--flash-attn", parse_bool),
    _Flag("--layernorm-kernel", parse_bool),
    _Flag("--resolution"),
    _Flag("--data-path"),
    _Flag("--dtype"),
)

TRAIN_FLAGS = (
    *_COMMON,
    _Flag("--lr", float),
    _Flag("--wandb", parse_bool),
    _Flag("--load"),
    _Flag("--start-from-scratch", None),
    _Flag("--warmup-steps", int),
    _Flag("--record-time", None),
)

SAMPLE_FLAGS = (
    _Flag("--run"),
    _Flag("--step", lambda text: text if text == "latest" else int(text)),
    _Flag("--use-ema", parse_bool),
    *_COMMON,
    _Flag("--save-dir"),
    _Flag("--sample-name"),
    _Flag("--start-index", int),
    _Flag("--end-index", int),
    _Flag("--num-sample", int),
    _Flag("--prompt-as-path", None),
    _Flag("--verbose", int),
    _Flag("--prompt-path"),
    _Flag("--prompt", count="+"),
    _Flag("--llm-refine", parse_bool),
    _Flag("--prompt-generator"),
    _Flag("--num-frames"),
    _Flag("--fps", int),
    _Flag("--save-fps", int),
    _Flag("--image-size", int, 2, ("HEIGHT", "WIDTH")),
    _Flag("--frame-interval", int),
    _Flag("--aspect-ratio"),
    _Flag("--watermark", parse_bool),
    _Flag("--num-sampling-steps", int),
    _Flag("--cfg-scale", float),
    _Flag("--loop", int),
    _Flag("--condition-frame-length", int),
    _Flag("--condition-frame-edit", float),
    _Flag("--align", int),
    _Flag("--reference-path", count="+"),
    _Flag("--mask-strategy", count="+"),
    _Flag("--aes", float),
    _Flag("--flow", float),
    _Flag("--camera-motion"),
    _Flag("--shard", metavar="NUMBER/SHARDS"),
    _Flag("--sheet-only", None),
)

SEARCH_FLAGS = (
    _Flag("--bucket", count="+", metavar="RESOLUTION/FRAMES"),
    _Flag("--output"),
    _Flag("--objective"),
    _Flag("--step-seconds", float),
    _Flag("--headroom-percent", float),
    _Flag("--max-batch", int),
    _Flag("--memory-budget"),
    _Flag("--nproc-per-node", int),
    _Flag("--untimed-steps", int),
    _Flag("--timed-steps", int),
    _Flag("--probe-timeout-seconds", float),
    _Flag("--known", count="+"),
)


def parse_train_command(arguments: Sequence[str]) -> CommandLine:
    """The command line of `python -m opensora.train`. `--help` prints and exits 0.

    Raises:
        UsageError: an unknown flag, or a value that does not fit it.
    """
    return _parse(
        TrainConfig, "python -m opensora.train", "Train a video diffusion model.", TRAIN_FLAGS, TRAIN_RULES, arguments
    )


def parse_sample_command(arguments: Sequence[str]) -> CommandLine:
    """The command line of `python -m opensora.sample`. `--help` prints and exits 0.

    Raises:
        UsageError: an unknown flag, or a value that does not fit it.
    """
    return _parse(
        SampleConfig, "python -m opensora.sample", "Sample clips and pictures.", SAMPLE_FLAGS, SAMPLE_RULES, arguments
    )


def parse_search_command(arguments: Sequence[str]) -> SearchCommandLine:
    """The command line of `python -m opensora.search_batch_size`: that of the training, and flags of the search.

    `--help` prints and exits 0.

    Raises:
        UsageError: an unknown flag, or a value that does not fit it.
    """
    line = _parse(
        TrainConfig,
        "python -m opensora.search_batch_size",
        "Find the batch size of every bucket of a training config, measured on this machine.",
        (*SEARCH_FLAGS, *TRAIN_FLAGS),
        TRAIN_RULES,
        arguments,
        also=SearchConfig,
    )
    mine = {key: value for key, value in line.flags.items() if key in field_types(SearchConfig)}
    others = {key: value for key, value in line.flags.items() if key not in mine}
    return SearchCommandLine(CommandLine(line.config, line.overrides, others), mine)


class _Parser(argparse.ArgumentParser):
    """Raises our error instead of ending the process with code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help lists all flags")


def _parse(
    cls: type,
    program: str,
    purpose: str,
    flags: Sequence[_Flag],
    rules: Sequence[KeyRule],
    arguments: Sequence[str],
    *,
    also: type | None = None,
) -> CommandLine:
    """Parse; `also` has the settings that are flags alone."""
    parser = _Parser(
        prog=program,
        usage=f"{program} [CONFIG] [flags] [key=value …]",
        description=f"{purpose} Settings come from a config, then flags, then key=value overrides; later ones win.",
        epilog=help_text(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a .yaml, .yml, .json or .py file")
    for flag in flags:
        owner = also if also is not None and flag.key in field_types(also) else cls
        text = _flag_help(owner, flag.key, rules).replace("%", "%%")
        if flag.kind is None:
            parser.add_argument(flag.name, action="store_const", const=True, help=text)
        else:
            kind = "true|false" if flag.kind is parse_bool else None
            metavar = flag.metavar or kind or flag.key.upper()
            parser.add_argument(flag.name, type=flag.kind, nargs=flag.count, metavar=metavar, help=text)
    overrides = [argument for argument in arguments if _is_override(cls, argument)]
    rest = [argument for argument in arguments if not _is_override(cls, argument)]
    known, unknown = parser.parse_known_args(rest)
    for argument in unknown:
        if argument.startswith("-") or "=" not in argument:
            _raise_unknown(argument, [flag.name for flag in flags], program)
        overrides.append(argument)
    values = vars(known)
    config = values.pop("config")
    if config is not None and "=" in config:  # an override of a setting that does not exist, named first
        overrides.insert(0, config)
        config = None
    return CommandLine(config, tuple(overrides), {key: value for key, value in values.items() if value is not None})


def _is_override(cls: type, argument: str) -> bool:
    """`key=value` with a key that begins with a setting's name. It ends a list of prompts before it."""
    match = re.match(r"([A-Za-z_]\w*)(\.[^=\s]+)?=", argument)
    return match is not None and match.group(1) in field_types(cls)


def _raise_unknown(argument: str, names: Sequence[str], program: str) -> NoReturn:
    name = argument.partition("=")[0]
    close = difflib.get_close_matches(name, names, n=2) if argument.startswith("-") else []
    what = "unknown flag" if argument.startswith("-") else "unexpected argument"
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"{program} --help lists all; settings are given as key=value"
    )
    raise UsageError(f"{what} {name!r}", hint=hint)


def _flag_help(cls: type, key: str, rules: Sequence[KeyRule]) -> str:
    rule = next((rule for rule in rules if rule.key == key), None)
    if rule is None or rule.target == key:
        return describe_key(cls, key)
    if rule.target is None:
        return f"{rule.verdict}: {rule.text}"
    return f"{rule.target}{f' ({rule.text})' if rule.text else ''}: {describe_key(cls, rule.target)}"

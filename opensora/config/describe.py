"""The reference page of all settings and the text of `--help`, made from the dataclasses and the strings in them.

`python -m opensora.config.describe --write` writes `docs/reference/config.md`; a test compares the two.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from opensora.config.documents import write_yaml
from opensora.config.opensora_keys import SAMPLE_RULES, TRAIN_RULES, KeyRule
from opensora.config.sample import SampleConfig
from opensora.config.search import SearchConfig
from opensora.config.train import TrainConfig
from opensora.config.typed import component_types, field_default, field_types, settings_classes, type_text

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "config.md"


@dataclass(frozen=True)
class Setting:
    """One field as the reference shows it."""

    key: str
    type: str
    default: str
    doc: str


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name → the string below it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def settings_of(cls: type, prefix: str = "") -> list[Setting]:
    """The fields of one dataclass that hold values, not those that hold other settings."""
    return [
        Setting(f"{prefix}{name}", type_text(annotation), _default_text(cls, name), field_docs(cls)[name])
        for name, annotation in field_types(cls).items()
        if not settings_classes(annotation)
    ]


@dataclass(frozen=True)
class Section:
    """Settings that belong together: one dataclass, or one type of a component."""

    name: str
    """The key that leads to it; empty for the top level."""
    doc: str
    types: list[str]
    """The type names that choose it, where it is one of several."""
    settings: list[Setting]


def sections_of(cls: type) -> Iterator[Section]:
    """All sections of a config, the top level first."""
    yield Section("", inspect.cleandoc(cls.__doc__ or ""), [], settings_of(cls))
    for name, annotation in field_types(cls).items():
        for member in settings_classes(annotation):
            doc = f"{field_docs(cls)[name]} {inspect.cleandoc(member.__doc__ or '')}"
            yield Section(name, doc, list(component_types(member)), settings_of(member, f"{name}."))


def describe_key(cls: type, key: str) -> str:
    """The explanation of one dotted key."""
    return next(setting.doc for section in sections_of(cls) for setting in section.settings if setting.key == key)


def help_text(cls: type) -> str:
    """All settings, for the end of `--help`."""
    lines: list[str] = []
    for section in sections_of(cls):
        kinds = f" (type: {', '.join(section.types)})" if section.types else ""
        lines += ["", f"{section.name or 'settings'}{kinds}:"]
        for setting in section.settings:
            lines.append(f"  {setting.key}={setting.default}  [{setting.type}]")
            lines += textwrap.wrap(setting.doc, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines).strip()


def reference_page() -> str:
    """The reference page, in Markdown."""
    training, sampling = list(sections_of(TrainConfig)), list(sections_of(SampleConfig))
    parts = [_INTRODUCTION, "## Training\n"]
    parts += [_table(section) for section in training if not section.types]
    parts += ["## Sampling\n", _SAMPLING]
    parts += [_table(section) for section in sampling if not section.types]
    parts += ["## Batch-size search\n", _SEARCH]
    parts += [_table(section) for section in sections_of(SearchConfig)]
    parts += ["## Components\n", _COMPONENTS]
    parts += [_table(section) for section in training if section.types]
    parts += [_OPEN_SORA, "### Training keys and flags\n", _rule_table(TRAIN_RULES)]
    parts += ["### Sampling keys and flags\n", _SAMPLING_KEYS, _rule_table(SAMPLE_RULES)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _table(section: Section) -> str:
    kinds = ", ".join(f"`{name}`" for name in section.types)
    title = f"### `{section.name}`{f' of type {kinds}' if kinds else ''}\n\n" if section.name else ""
    rows = [
        f"| `{setting.key}` | {_cell(setting.type)} | {_default_cell(setting)} | {_cell(setting.doc)} |"
        for setting in section.settings
    ]
    return f"{title}{section.doc}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n" + "\n".join(rows)


def _default_cell(setting: Setting) -> str:
    return setting.default if setting.default == _REQUIRED else f"`{_cell(setting.default)}`"


def _rule_table(rules: Sequence[KeyRule]) -> str:
    rows = [f"| `{rule.key}` | {_verdict(rule)} |" for rule in rules]
    return "| Open-Sora | here |\n| --- | --- |\n" + "\n".join(rows)


def _verdict(rule: KeyRule) -> str:
    if rule.target is None:
        return _cell(rule.text if rule.verdict == "moved" else f"{rule.verdict}: {rule.text}")
    return _cell(f"`{rule.target}`" + (f": {rule.text}" if rule.text else ""))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default_text(cls: type, name: str) -> str:
    default = field_default(cls, name)
    if default is MISSING:
        return _REQUIRED
    return _yaml(default)


def _yaml(value: Any) -> str:
    """A default as it would be written behind `key=`."""
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    return write_yaml({"x": value}).removeprefix("x:").strip()


_REQUIRED = "required"

_INTRODUCTION = """\
# Settings

All settings of `python -m opensora.train`, `python -m opensora.sample` and `python -m opensora.search_batch_size`, with
their types and defaults. A setting that is not in a config has its default; an unknown one is an error.

<!-- Written by `python -m opensora.config.describe --write`. Edit the dataclasses in opensora/config/ instead. -->

```yaml
run_uri: s3://bucket/runs/first
data:
  path: s3://bucket/clips.csv
  bucket_config:
    144p: {1: [1.0, 8], 51: [1.0, 2]}
train: {steps: 1000}
optim: {lr: 1e-4}
```

A config is a `.yaml`, `.yml` or `.json` file, or an MMEngine-style `.py` file whose top-level names are the keys;
there, `_base_ = ["other.py"]` inherits, and other names that begin with an underscore are ignored. YAML is read by its
version 1.2: `1e-4` is a number, `yes` and `9:16` are text. Whole numbers may be written as `1e5`; lists stand for
tuples. Components (`model`, `vae`, `text_encoder`, `scheduler`) are chosen by their `type`; some types fix sizes.

On the command line, `key=value` changes a setting, whatever file it comes from. The value is YAML:

| override | effect |
| --- | --- |
| `train.steps=100` | a number |
| `train.epochs=null` | not set |
| `data.bucket_config.144p.51=[1.0, 2]` | one entry of a table |
| `'samples.prompts=["a cat", "a dog"]'` | a list |
| `'samples.prompts.0=a cat'` | one item of a list; the position after the last appends |
| `'text_encoder={type: minilm}'` | a component as a whole |

Later ones win: the file, then flags, then overrides. Where two settings exclude each other (`train.steps` and
`train.epochs`, `prompt` and `prompt_path`, `image_size` and `resolution` with `aspect_ratio`), one that is given on the
command line replaces the other of the file.
"""

_SAMPLING = """\
`python -m opensora.sample --run DIR --prompt "a waterfall"` needs nothing more: what is not given comes from the run.
Without a run, a config holds the components below, `num_frames`, and `image_size` or `resolution` with `aspect_ratio`.
"""

_SEARCH = """\
`python -m opensora.search_batch_size CONFIG` takes the config, flags and overrides of a training, and these settings,
each as a flag: `--memory-budget 2GiB`. [How to use it](../guides/find-batch-sizes.md).
"""

_COMPONENTS = """\
The same for training and sampling, where they come from the run unless given.
"""

_OPEN_SORA = """\
## Open-Sora's keys

Configs of Open-Sora 1.2 hold flat keys; they, and its flags, are accepted and moved to the settings above. Giving one
together with the setting that it is moved to is an error. What has no effect is logged with the reason when the config
is read; what cannot be honoured is refused.

`outputs` becomes `run_uri = <outputs>/<name of the config>-<model type>`, for example `outputs/stage3-STDiT3-XL-2`.
There is no running number in front, as Open-Sora has it: the same command continues the same run. Choose another
`outputs`, or give `run_uri=`, to start anew.
"""

_SAMPLING_KEYS = """\
Inference configs and flags use the names of the settings of sampling, except for these.
"""


def main(arguments: list[str]) -> int:
    """Write the page to its file with `--write`, to standard output otherwise."""
    if arguments == ["--write"]:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(reference_page(), encoding="utf-8")
        return 0
    sys.stdout.write(reference_page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

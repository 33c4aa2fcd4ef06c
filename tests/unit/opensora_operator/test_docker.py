"""The Dockerfiles hold together, as far as that can be seen without an engine that builds them."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import shlex
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IMAGES = {"operator": ROOT / "docker/operator.Dockerfile", "trainer": ROOT / "docker/trainer.Dockerfile"}


@dataclass(frozen=True)
class Instruction:
    """A line of a Dockerfile, with its continuations."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


@dataclass(frozen=True)
class Stage:
    """What follows a FROM, the FROM included."""

    instructions: list[Instruction]

    def all(self, name: str) -> list[Instruction]:
        return [found for found in self.instructions if found.name == name]

    @property
    def name(self) -> str:
        words = self.instructions[0].words
        return words[2] if len(words) == 3 and words[1].upper() == "AS" else ""

    @property
    def copies(self) -> list[tuple[list[str], str]]:
        """Sources and target of every COPY out of the repository."""
        found = [copy.words for copy in self.all("COPY") if not copy.words[0].startswith("--")]
        return [(words[:-1], words[-1]) for words in found]


@dataclass(frozen=True)
class Dockerfile:
    globals: list[Instruction]
    stages: list[Stage]


def parse(path: Path) -> Dockerfile:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]
    instructions = [
        Instruction(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)
    ]
    starts = [index for index, found in enumerate(instructions) if found.name == "FROM"]
    stages = [
        Stage(instructions[start:end]) for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True)
    ]
    return Dockerfile(instructions[: starts[0]], stages)


@pytest.fixture(params=sorted(IMAGES))
def dockerfile(request: pytest.FixtureRequest) -> Dockerfile:
    return parse(IMAGES[request.param])


def is_sent(path: str) -> bool:
    """Whether `.dockerignore` lets a path of the repository reach the engine. The last line that matches decides."""
    ignored = False
    parts = path.split("/")
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        if pattern.startswith("**/"):
            matches = any(fnmatch(part, pattern[3:]) for part in parts)
        else:
            matches = any(fnmatch("/".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))
        if matches:
            ignored = not line.startswith("!")
    return not ignored


def test_both_stages_stand_on_one_base_that_a_digest_can_pin(dockerfile: Dockerfile) -> None:
    (argument,) = (found for found in dockerfile.globals if found.name == "ARG")
    assert re.fullmatch(r"BASE_IMAGE=python:3\.\d+-slim-[a-z]+", argument.text)
    assert [stage.instructions[0].words[0] for stage in dockerfile.stages] == ["${BASE_IMAGE}"] * 2


def test_the_base_has_a_python_that_the_package_supports(dockerfile: Dockerfile) -> None:
    match = re.search(r"python:(3\.\d+)-", dockerfile.globals[0].text)
    assert match is not None
    assert f"Programming Language :: Python :: {match[1]}" in PROJECT["project"]["classifiers"]


def test_the_image_is_the_environment_that_was_built_and_nothing_of_the_build(dockerfile: Dockerfile) -> None:
    build, final = dockerfile.stages
    (copy,) = (found for found in final.all("COPY") if found.words[0].startswith("--"))
    assert copy.words == [f"--from={build.name}", "/opt/opensora", "/opt/opensora"]
    assert final.all("RUN") == []


def test_nobody_is_root(dockerfile: Dockerfile) -> None:
    names = [found.name for found in dockerfile.stages[-1].instructions]
    (user,) = dockerfile.stages[-1].all("USER")
    assert user.text == "65532:65532", "Kubernetes can prove runAsNonRoot for a number alone"
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_everything_copied_is_there_and_is_sent(dockerfile: Dockerfile) -> None:
    sources = [source for stage in dockerfile.stages for sources, _ in stage.copies for source in sources]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not is_sent(source)] == []


def test_nothing_is_fetched_but_packages(dockerfile: Dockerfile) -> None:
    texts = [found.text for stage in dockerfile.stages for found in stage.instructions]
    assert [stage.all("ADD") for stage in dockerfile.stages] == [[], []]
    assert [text for text in texts if re.search(r"https?://|curl|wget|--(extra-)?index-url", text)] == []


def test_versions_come_from_the_lock(dockerfile: Dockerfile) -> None:
    runs = [found.text for found in dockerfile.stages[0].all("RUN")]
    installs = [command for run in runs for command in run.split("&&") if " install " in command]
    assert len(installs) == 2
    assert "--constraint requirements.lock" in installs[0]
    assert installs[1].split()[-2:] == ["--no-deps", "."], "the package itself brings no other versions in"


def test_what_the_wheel_is_built_from_is_copied_first(dockerfile: Dockerfile) -> None:
    project = PROJECT["project"]
    copied = {source for sources, _ in dockerfile.stages[0].copies for source in sources}
    assert {"pyproject.toml", project["readme"], *project["license-files"]} <= copied


@pytest.mark.parametrize(("image", "package"), [("operator", "operator/opensora_operator"), ("trainer", "opensora")])
def test_each_image_has_its_package_and_not_the_other(image: str, package: str) -> None:
    copied = {source for sources, _ in parse(IMAGES[image]).stages[0].copies for source in sources}
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert package in packages
    assert [found for found in packages if found.split("/")[0] in copied] == [package]


@pytest.mark.parametrize("image", IMAGES)
def test_the_entry_point_exists(image: str) -> None:
    (entry,) = parse(IMAGES[image]).stages[-1].all("ENTRYPOINT")
    words = ast.literal_eval(entry.text)
    if words[0] == "python":
        assert words[1] == "-m"
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    else:
        assert words[0] in PROJECT["project"]["scripts"]


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "tests/conftest.py", "outputs/run/config.yaml", "opensora/x.pyc"]
)
def test_what_no_image_needs_is_not_sent(path: str) -> None:
    assert not is_sent(path)


def printed(*arguments: str) -> list[str]:
    """What `docker/requirements.py` prints."""
    main = runpy.run_path(str(ROOT / "docker/requirements.py"))["main"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main([*arguments, "--pyproject", str(ROOT / "pyproject.toml")])
    return output.getvalue().splitlines()


def test_requirements_are_those_of_the_extras() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert printed("operator") == extras["operator"]
    assert printed("--base", "train,text-minilm") == [
        *PROJECT["project"]["dependencies"],
        *extras["train"],
        *extras["text-minilm"],
    ]


def test_an_unknown_extra_fails_the_build_and_is_named() -> None:
    with pytest.raises(SystemExit, match="no such extra: gpu"):
        printed("train,gpu")


def test_the_operator_imports_nothing_that_its_image_lacks() -> None:
    """The image has what the extra `operator` needs, not what the other packages do."""
    here = metadata.packages_distributions()
    lacking = set()
    for module in (ROOT / "operator/opensora_operator").rglob("*.py"):
        for name in imports_of(module) - set(sys.stdlib_module_names) - {"opensora_operator"}:
            if not {canonicalize_name(found) for found in here.get(name, [])} & closure(printed("operator")):
                lacking.add(f"{module.name}: {name}")
    assert lacking == set()


def imports_of(module: Path) -> set[str]:
    """Top-level names of everything imported, inside functions as well."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def closure(lines: list[str]) -> set[str]:
    """Distributions that pip would install for these requirements, as this environment resolves them."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in lines]
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in found:
            continue
        found.add(name)
        needs = [Requirement(line) for line in metadata.requires(name) or []]
        waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found

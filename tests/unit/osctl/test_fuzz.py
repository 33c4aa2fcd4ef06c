"""Whatever is typed, set or stored: never a traceback, always an exit code of the table, and no half answers."""

from __future__ import annotations

import io
import json
import os
import re
import string
import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from fake_api import RUNS, FakeApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opensora_operator.api import KINDS
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.kubeconfig import find_access
from osctl.main import COMMANDS, main
from osctl.settings import resolve
from osctl.story import as_data, as_text, tell

RUN = "/apis/opensora.dev/v1alpha1/namespaces/team/trainingruns/first"
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "25")),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""The fixtures change nothing between examples. FUZZ_EXAMPLES looks harder, and elsewhere each time."""
SHOWN_BESIDE_THE_CODE = ("doctor", "lint", "data", "eval", "exec")
"""Commands whose answer is printed although they do not end with 0."""


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def _osctl(words: list[str]) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return Result(code, out.getvalue(), err.getvalue())


def _check(result: Result, *, prints: bool = False) -> None:
    assert result.code in [*ExitCode, 130], result
    assert "made a mistake" not in result.err, result
    assert "Traceback" not in result.err, result
    if result.code:
        assert prints or result.out == "", result
        says_why = re.search("^error: ", result.err, flags=re.M)  # `-v` tells of requests before
        assert says_why or "Usage:" in result.err or prints, result
        assert all(char.isprintable() or char == "\n" for char in result.err), result


# ----------------------------------------------------------------------------------------------------- the command line

WORDS = st.one_of(
    st.sampled_from(
        [
            "first", "tr", "sj/x", "tr/", "/", "//", ".", "..", "../x", "-", "--", "", " ", "-o", "json", "yaml", "xml",
            "-n", "team", "-A", "-l", "a=b", "--nodes", "0", "-1", "9" * 400, "1e999", "nan", "--timeout", "0s", "1s",
            "--for", "complete", "step>=", "step>=" + "9" * 5000, "condition=", "--rank", "first-failed", "--yes",
            "--dry-run", "--dry-run=server", "--dry-run=", "--set", "=", "a=b=c", "config", "config.", "config.train",
            "spec", "spec..nodes", "tr.spec", "view", "bash", "65536", ":80", "--help", "-h", "-q", "-vvv", "--context",
            "--kubeconfig", "nowhere.yaml", "x.py", "--run-uri", "s3://", "s3:///", "memory://x", "file:///", "gs://b",
        ]
    ),
    st.text(max_size=12),
    st.text(alphabet=string.ascii_letters + "-=/.", max_size=8).map(lambda text: f"--{text}"),
    st.text(alphabet="\x00\x01\x1b\x7f\x9b\r\n\t\u202e\ud800é日", max_size=6),
)  # fmt: skip


@pytest.fixture(scope="module")
def api() -> Iterator[FakeApi]:
    with FakeApi() as running:
        running.on("GET", RUNS, {"columnDefinitions": [], "rows": [], "items": [], "metadata": {}})
        yield running


@pytest.fixture
def somewhere(home: Path, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a cluster that has no runs; nobody at the keyboard."""
    (home / ".kube").mkdir()
    api.write_kubeconfig(home / ".kube/config")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return home


ENDING = [name for name in COMMANDS if name != "tb"]
"""The commands that end by themselves: TensorBoard serves any folder there is until it is stopped."""


@pytest.mark.parametrize("command", ENDING)
@FUZZ
@given(words=st.lists(WORDS, max_size=5))
def test_any_words_after_a_command_end_well(somewhere: Path, command: str, words: list[str]) -> None:
    _check(_osctl([command, *words]), prints=command in SHOWN_BESIDE_THE_CODE)


@FUZZ
@given(words=st.lists(WORDS | st.sampled_from(ENDING), max_size=6))
def test_any_words_at_all_end_well(somewhere: Path, words: list[str]) -> None:
    _check(_osctl(words), prints=any(word in SHOWN_BESIDE_THE_CODE for word in words))


# ------------------------------------------------------------------------------------------------------------- settings

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["1e400", "nan", "auto"])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
NAMES = st.sampled_from(["namespace", "timeout_seconds", "color", "output", "context", ""]) | st.text(max_size=6)


@FUZZ
@given(
    content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
)
def test_any_settings_file_is_taken_or_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "osctl.toml").write_bytes(content)
    _take({}, {"HOME": str(tmp_path)}, tmp_path, names="osctl.toml")


@FUZZ
@given(name=NAMES, value=st.integers() | st.floats() | st.booleans() | st.text(max_size=10))
def test_any_value_of_a_setting_is_taken_or_named(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "osctl.toml").write_text(
        f"{json.dumps(name)} = {json.dumps(value)}\n", encoding="utf-8", errors="replace"
    )
    _take({}, {"HOME": str(tmp_path)}, tmp_path, names="osctl.toml")


@pytest.mark.parametrize("content", ["x = " + "[" * 5000, "x = " + "{a=" * 5000, "x = " + "9" * 5000])
def test_a_settings_file_of_any_depth_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "osctl.toml").write_text(content)
    _take({}, {"HOME": str(tmp_path)}, tmp_path, names="osctl.toml")


@FUZZ
@given(variables=st.dictionaries(NAMES.map(lambda name: f"OSCTL_{name.upper()}"), st.text(max_size=10), max_size=3))
def test_any_variables_are_taken_or_named(tmp_path: Path, variables: dict[str, str]) -> None:
    _take({}, {**variables, "HOME": str(tmp_path)}, tmp_path, names="$OSCTL_")


def _take(flags: dict[str, Any], environment: dict[str, str], folder: Path, *, names: str) -> None:
    try:
        resolve(flags, environment=environment, folder=folder)
    except UsageError as error:
        complaint = error
    else:
        return
    assert names in complaint.message
    assert complaint.hint


# ----------------------------------------------------------------------------------------------------------- kubeconfig


def _entries(key: str, *fields: str) -> st.SearchStrategy[Any]:
    entry = st.fixed_dictionaries({}, optional={"name": st.just("c") | VALUES, key: _fields(*fields) | VALUES})
    return st.lists(entry | VALUES, max_size=2) | VALUES


def _fields(*names: str) -> st.SearchStrategy[Any]:
    values = VALUES | st.sampled_from(
        ["c", "https://c", "https://[::1", "https://c:99999", "https://c:x/", "http://", "bm8=", "a\nb", "ü"]
    )
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, values))


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "current-context": st.just("c") | VALUES,
        "clusters": _entries(
            "cluster", "server", "certificate-authority-data", "tls-server-name", "proxy-url", "certificate-authority"
        ),
        "users": _entries("user", "token", "tokenFile", "client-certificate-data", "client-key-data", "username"),
        "contexts": _entries("context", "cluster", "user", "namespace"),
    },
)


@FUZZ
@given(config=CONFIGS | VALUES)
def test_any_kubeconfig_leads_somewhere_or_is_refused(somewhere: Path, config: Any) -> None:
    (somewhere / ".kube/config").write_text(yaml.safe_dump(config), encoding="utf-8", errors="replace")
    try:
        find_access(environment={"HOME": str(somewhere)}, account=somewhere)
    except OsctlError as error:
        named = str(somewhere / ".kube/config") in error.message
    else:
        named = True
    assert named, "who is told that a file is wrong is told which"
    _check(_osctl(["get", "--timeout", "0.05"]))


GOOD: dict[str, Any] = {
    "current-context": "c",
    "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
    "users": [{"name": "c", "user": {"token": "x"}}],
    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c", "namespace": "team"}}],
}


@pytest.mark.parametrize("section", ["clusters", "users", "contexts"])
@FUZZ
@given(data=st.data())
def test_any_one_wrong_value_in_a_kubeconfig_is_refused_well(
    somewhere: Path, section: str, data: st.DataObject
) -> None:
    config = json.loads(json.dumps(GOOD))
    values = config[section][0][section[:-1]]
    known = {
        "clusters": ["server", "proxy-url", "tls-server-name", "certificate-authority-data", "certificate-authority"],
        "users": ["token", "tokenFile", "client-certificate-data", "client-key", "exec", "auth-provider"],
        "contexts": ["cluster", "user", "namespace"],
    }[section]
    values.update(data.draw(_fields(*known)))
    (somewhere / ".kube/config").write_text(yaml.safe_dump(config), encoding="utf-8", errors="replace")
    _check(_osctl(["get", "--timeout", "0.05"]))


@pytest.mark.parametrize("content", ["[" * 20_000, "{a: " * 5000, "&a [*a]", "!!python/object:os.system x", "\x00"])
def test_a_kubeconfig_of_any_shape_is_named(somewhere: Path, content: str) -> None:
    (somewhere / ".kube/config").write_text(content)
    _check(_osctl(["get"]))


# ------------------------------------------------------------------------------------------------------------ run files

DOCUMENTS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {"apiVersion": st.just("opensora.dev/v1alpha1"), "kind": st.sampled_from([kind.name for kind in KINDS])},
        optional={
            "metadata": st.just({"name": "first"}) | VALUES,
            "spec": st.fixed_dictionaries(
                {},
                optional={
                    "runUri": st.just("s3://b/first") | VALUES,
                    "config": st.just({"inline": "train: {steps: 1}"}) | VALUES,
                    "nodes": VALUES,
                    "procsPerNode": VALUES,
                    "parallelism": VALUES,
                    "podTemplate": VALUES,
                },
            ),
        },
    ),
    st.fixed_dictionaries({"kind": st.just("List"), "items": VALUES}),
)


@pytest.mark.parametrize("command", [["lint"], ["train", "--dry-run"]])
@FUZZ
@given(documents=st.lists(DOCUMENTS, min_size=1, max_size=2))
def test_any_run_file_is_taken_or_refused(somewhere: Path, command: list[str], documents: list[Any]) -> None:
    text = yaml.safe_dump_all(documents, allow_unicode=True)
    (somewhere / "run.yaml").write_text(text, encoding="utf-8", errors="replace")
    _check(_osctl([*command, "run.yaml"]), prints=command == ["lint"])


@pytest.mark.parametrize("content", ["[" * 20_000, "2026-99-99", "a: &a [*a]", "!!binary x", "\x00", "? [a]\n: b"])
def test_a_run_file_of_any_shape_is_named(somewhere: Path, content: str) -> None:
    (somewhere / "run.yaml").write_text(content)
    result = _osctl(["lint", "run.yaml"])
    _check(result, prints=True)
    assert "run.yaml" in result.out + result.err


# ------------------------------------------------------------------------------------------------------- what is stored


@st.composite
def _garbled(draw: Any, value: Any) -> Any:
    """As another version has it: fields are missing or more, words are others; objects and lists stay such."""
    if isinstance(value, dict):
        kept = {key: draw(_garbled(inner)) for key, inner in value.items() if draw(st.integers(0, 5))}
        return kept | draw(st.just({}) | st.just({"new": {"field": [1]}}))
    if isinstance(value, list):
        return [draw(_garbled(inner)) for inner in value]
    return draw(st.just(value) | LEAVES | st.sampled_from(["NewReason", "2026-13-45T99:99:99Z", "\x1b[31mred"]))


STORED = {
    "apiVersion": "opensora.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {
        "name": "first", "namespace": "team", "uid": "u", "resourceVersion": "1",
        "creationTimestamp": "2026-01-01T00:00:00Z",
    },
    "spec": {"runUri": "s3://b/first", "config": {"inline": "{}"}, "nodes": 2},
    "status": {
        "phase": "Restarting",
        "observedGeneration": 1,
        "attempt": 2,
        "conditions": [
            {
                "type": "Running", "status": "False", "reason": "PullingImages", "message": "x",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        ],
        "attempts": [{"number": 1, "cause": "WorkerFailed", "rank": 3, "node": "n", "message": "boom\nboom"}],
        "progress": {"step": 5, "percent": 50, "eta": "1h", "lastUpdate": "2026-01-01T00:00:00Z"},
        "nodes": {"ready": 1, "desired": 2},
        "checkpoint": {"latestStep": 3},
    },
}  # fmt: skip


@FUZZ
@given(status=_garbled(STORED["status"]))
def test_any_status_of_another_version_is_told_or_refused(status: Any) -> None:
    """Of metadata the API server is the master: it is as it should be."""
    body = {**STORED, "status": status}
    try:
        story = tell(body, [], now=2e9)
    except OsctlError:
        return
    json.dumps(as_data(story, body))
    text = as_text(story, width=80, now=2e9, paint=lambda text, style: text)
    assert all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize("command", [["status"], ["wait", "--timeout", "0.2s"], ["stop", "--yes"], ["get", "tr"]])
@FUZZ
@given(status=_garbled(STORED["status"]))
def test_commands_on_any_status_end_well(somewhere: Path, api: FakeApi, command: list[str], status: Any) -> None:
    body = {**STORED, "status": status}
    with ExitStack() as put_back:
        put_back.callback(api.answers.clear)
        put_back.callback(api.requests.clear)
        for method in ("GET", "PATCH"):
            api.on(method, RUN, body)
        api.on("GET", "/api/v1/namespaces/team/pods", {"items": [], "metadata": {}})
        api.on("GET", RUNS, (403, {}))
        _check(_osctl([command[0], "-q", *command[1:], "first", *(["-o", "json"] if command[0] == "get" else [])]))


def test_every_kind_is_known_by_its_names() -> None:
    for kind in KINDS:
        for name in (kind.plural, kind.singular, *kind.short_names):
            result = _osctl(["explain", f"{name}.spec"])
            assert result.out.startswith(f"{kind.name}.spec (object)")

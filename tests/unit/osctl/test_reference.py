"""docs/reference/cli.md says what the commands take."""

from __future__ import annotations

import re

import pytest
from osctl.errors import ExitCode
from osctl.main import COMMANDS
from osctl.reference import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make generate`"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_its_examples_are_there(name: str) -> None:
    [section] = re.findall(rf"^## {name}\n(.*?)(?=^## )", page(), flags=re.M | re.S)
    assert f"osctl {name}" in section


def test_every_exit_code_is_explained() -> None:
    for code in ExitCode:
        assert re.search(rf"^\| {int(code)} \| {code.name} \| \S.+ \|$", page(), flags=re.M)

"""The pages point at what is there, and nothing that should be mentioned is left out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def text_of(page: Path) -> str:
    """The page without its fenced blocks, where brackets are code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", text_of(page))  # a regular expression may look like a link
    for link in [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors_of(target), f"{link}: no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#:]+\.md)", text_of(page))
        waiting += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) <= reached


def test_every_benchmark_has_its_line() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    scripts = [path.name for path in (ROOT / "benchmarks").glob("*.py")]
    assert scripts
    assert [name for name in scripts if f"`{name}`" not in page] == []


def test_the_file_map_names_what_is_at_the_top() -> None:
    page = (ROOT / "docs/concepts/architecture.md").read_text(encoding="utf-8")
    parts = [path for path in (ROOT / "opensora").iterdir() if path.name[0] not in "_." and path.name != "py.typed"]
    file_map = page.partition("## File map")[2].partition("\n## ")[0]
    missing = [path.name for path in parts if path.name not in file_map]
    assert missing == []


def test_the_order_of_imports_on_the_page_is_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    page = (ROOT / "docs/concepts/architecture.md").read_text(encoding="utf-8")
    block = page.partition("## Direction of imports")[2].partition("```\n")[2].partition("```")[0]
    assert block.splitlines() == layers

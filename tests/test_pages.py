"""The pages: short enough, readable, and what they name is there."""

import re
from pathlib import Path

import pytest

from fastnce import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))]
PAGES += sorted(ROOT.glob("docs/*.md"))


def prose(text: str) -> list[str]:
    """The sentences of a page, of its tables' cells and of what stands for its pictures."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1.\n\n", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    found = []
    for block in re.split(r"\n\s*\n|\n(?=[-*|>#]|\d+\. )", text):
        for cell in block.split("|"):
            found += re.split(r"(?<=[.!?])\s+(?=[A-Z`*(\"0-9])", " ".join(cell.split()))
    return found


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_read_once(page):
    assert [sentence for sentence in prose(page.read_text()) if len(sentence) > 200] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        to = page.parent / name if name else page
        assert "://" in target or to.exists(), target
        if anchor and to.suffix == ".md":
            headings = re.findall(r"^#+ (.*)", to.read_text(), flags=re.M)
            anchors = [
                re.sub(r"[^\w -]", "", x).strip().lower().replace(" ", "-") for x in headings
            ]
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_there(page):
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    for line in "".join(blocks).splitlines():
        words = line.split()
        if words[:1] == ["fastnce"]:
            assert words[1] in cli.COMMANDS, line


def test_every_page_is_in_the_site_and_in_its_index():
    site, index = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in site
        assert page.name == "index.md" or f"]({page.name})" in index

# SPDX-License-Identifier: MIT
"""Every link of the Markdown files leads somewhere: to a file of the repository, and to a heading of it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md"), *ROOT.glob("tests/*.md")]


def headings(path):
    """The anchors that a page gets from its headings."""
    text = re.sub(r"(?s)```.*?```", "", path.read_text(encoding="utf-8"))
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        if not link.startswith("http") and not (path.exists() and (not anchor or anchor in headings(path))):
            broken.append(link)
    assert not broken


def test_the_check_itself(tmp_path):
    """Headings in code are none; signs are left out."""
    (tmp_path / "a.md").write_text("# A: b, c\n```bash\n# none\n```\n## `x` is y\n")
    assert headings(tmp_path / "a.md") == {"a-b-c", "x-is-y"}

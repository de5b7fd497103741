"""What make docs holds its site to: every link is followed to its file and its anchor."""

import ast
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
BROKEN = runpy.run_path(str(ROOT / "docs" / "site" / "links.py"))["broken"]


def test_a_page_that_a_page_links_to_is_on_the_site():
    """Sphinx names such a link, too, but not in this run of tests."""
    patterns = ast.literal_eval(
        re.search(r"^include_patterns = (\[.*\])$", (ROOT / "docs" / "site" / "conf.py").read_text(), re.MULTILINE)[1]
    )
    pages = {path.resolve() for pattern in patterns for path in ROOT.glob(pattern)}
    assert {ROOT / "README.md", ROOT / "SPEC.md"} <= pages
    missing = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in sorted(pages)
        for link in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text())
        if (page.parent / link).resolve() not in pages
    ]
    assert missing == []


def test_links_that_lead_nowhere_are_named(tmp_path):
    """A missing file, an anchor that no page has, a missing picture; what is elsewhere is not asked."""
    (tmp_path / "part").mkdir()
    (tmp_path / "a b.html").write_text("<h1 id='here'>A</h1><a href='#here'></a><a href='#gone'></a><img src='x.png'>")
    (tmp_path / "part" / "b.html").write_text(
        "<a href='../a%20b.html#here'></a><a href='../a%20b.html#hence'></a><a href='c.html'></a>"
        "<a href='https://example.org/c.html'></a><a href='mailto:a@example.org'></a>"
    )
    assert sorted(BROKEN(tmp_path)) == [
        "a b.html: #gone",
        "a b.html: x.png",
        "part/b.html: ../a%20b.html#hence",
        "part/b.html: c.html",
    ]

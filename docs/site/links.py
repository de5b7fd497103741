"""Follow every link of a site's pages to its file and its anchor; what lies elsewhere is not asked for."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page, and where it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links = {""}, []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, _tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value is not None:
                self.links.append(value)


def broken(site: Path) -> list[str]:
    """One line for each link that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (target in pages and anchor not in pages[target].anchors):
                found.append(f"{path.relative_to(site.resolve())}: {link}")
    print(f"{len(pages)} pages, {sum(len(page.links) for page in pages.values()):,} links, {len(found)} broken")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(broken(Path(sys.argv[1]))) or 0)

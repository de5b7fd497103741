"""The site of make docs: the repository's own pages where they are, and the reference from docstrings; for sphinx."""

import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import sklformat
from sklformat import distill

ROOT = Path(__file__).parents[2]
FIRST = "README"  # the root is the source directory, so that links between pages lead where they do in the repository

project = "sklformat"
author = "The sklformat authors"
release = sklformat.__version__
root_doc = FIRST
include_patterns = ["*.md", "docs/*.md", "docs/site/*.rst", "benchmarks/RESULTS.md", "benchmarks/paper/README.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 4
highlight_language = "text"
autodoc_typehints = "signature"
autodoc_member_order = "groupwise"
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
html_theme = "furo"
html_title = f"sklformat {release}"
html_copy_source = False
html_show_sphinx = False


def write_contents(_app: Sphinx, name: str, source: list[str]) -> None:
    """README's list of pages is the site's too; a link to the folder of recipes leads to a page of them."""
    source[0] = re.sub(r"\]\((?:docs/)?recipes/\)", "](/docs/site/recipes.rst)", source[0])
    if name == FIRST:
        pages = re.findall(r"^\* \[(docs/[\w-]+)\.md\]", source[0], re.MULTILINE)
        pages += [
            "docs/site/recipes",
            "docs/site/api",
            "SPEC",
            "benchmarks/RESULTS",
            "benchmarks/paper/README",
            "CHANGELOG",
        ]
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", ":titlesonly:", "", *pages, "```", ""])
    elif name == "docs/site/api":  # errors last, as they are read
        errors = [name for name in sklformat.__all__ if name.endswith("Error")]
        source[0] = source[0].replace("ERRORS", ", ".join(errors))
        source[0] += "".join(f"\n.. autoexception:: sklformat.{name}\n" for name in errors)
    elif name == "docs/site/recipes":
        for path in sorted((ROOT / "docs" / "recipes").iterdir()):
            if path.suffix in (".py", ".sh"):
                language = "python" if path.suffix == ".py" else "bash"
                source[0] += f"\n{path.name}\n{'-' * len(path.name)}\n\n"
                source[0] += f".. literalinclude:: ../recipes/{path.name}\n   :language: {language}\n"


def adapt_docstring(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Several returned values as a list, which napoleon would make one paragraph of; |x| stays as it is written."""
    for number, line in enumerate(lines):
        plain = line.split("``")  # every second piece is code
        plain[::2] = [piece.replace("|", r"\|") for piece in plain[::2]]
        lines[number] = "``".join(plain)
    if "Returns:" not in lines:
        return
    begin = lines.index("Returns:") + 1
    end = lines.index("", begin) if "" in lines[begin:] else len(lines)
    if sum(re.match(r" {4}\w+: ", line) is not None for line in lines[begin:end]) > 1:
        listed = [re.sub(r"^ {4}(\w+): ", r"    * **\1**: ", line) for line in lines[begin:end]]
        lines[begin - 1 : end] = [":returns:", *(re.sub(r"^ {8}", " " * 6, line) for line in listed)]


def write_index(app: Sphinx, error: Exception | None) -> None:
    """The first page under the name that servers look for; no public name is without its place in the reference."""
    if error is None:
        public = {f"{module.__name__}.{name}" for module in (sklformat, distill) for name in module.__all__}
        if missing := sorted(public - app.env.get_domain("py").objects.keys()):
            raise ExtensionError(f"docs/site/api.rst: not there: {', '.join(missing)}")
        shutil.copy(Path(app.outdir) / f"{FIRST}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", write_contents)
    app.connect("autodoc-process-docstring", adapt_docstring, priority=100)  # before napoleon
    app.connect("build-finished", write_index)

"""The page of all claims: what each script found, from the results that are there; written into README.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results: written by summary.py -->\n", "<!-- end of results -->\n"
ORDER = (
    "figure2a", "figure2b", "figure2c", "table1", "table2", "figure3", "table3", "table4", "table5", "study", "noise",
    "table6", "figure4", "figure5", "table9", "table10", "table11", "table12", "table13", "d1",
)  # fmt: skip


def page(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each claim, then each one's table and rule."""
    lines = ["| script | the paper's claim | here |", "|---|---|---|"]
    lines += [f"| {name} | {one['claim']} | **{one['verdict']}** |" for name, one in results.items()]
    lines += [f"| {name} | see benchmarks/paper/{name}.py | not run yet |" for name in ORDER if name not in results]
    for name, one in results.items():
        lines += ["", f"### {name}: {one['verdict']}", "", f"{one['claim']}.", "", one["table"], ""]
        lines += [f"* {note}" for note in one["notes"]]
        size = "" if one["scale"] == "standard" else f", --{one['scale']}"
        lines.append(f"* Rule: {one['rule']}.")
        lines.append(f"* {one['seeds']} seeds, {one['device']}{size}; ours ± standard error [the paper's].")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/paper"), help="where the scripts wrote their results")
    parser.add_argument("--write", action="store_true", help="into README.md instead of the terminal")
    given = parser.parse_args()
    paths = {name: given.out / f"{name}.json" for name in ORDER}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    text = page({name: one for name, one in results.items() if one["scale"] != "quick"})
    for name in ORDER:
        if name not in results or results[name]["scale"] == "quick":
            print(f"{name}: no results in {given.out}; run benchmarks/paper/{name}.py")
    if not given.write:
        print(text)
        return
    old = README.read_text()
    README.write_text(old[: old.index(BEGIN) + len(BEGIN)] + "\n" + text + "\n" + old[old.index(END) :])


if __name__ == "__main__":
    main()

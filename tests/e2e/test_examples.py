"""Every example of README.md and docs/ runs as it is printed, page after page, on a small text and a small teacher."""

import gzip
import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import sklformat as skl
from sklformat import cli
from sklformat.distill.models import loading, tokenization

ROOT = Path(__file__).parents[2]
# In the order of README's list, so that a page may use what an earlier one made.
PAGES = [
    "README.md",
    "docs/capture.md",
    "docs/scale.md",
    "docs/engines.md",
    "docs/training.md",
    "docs/evaluation.md",
    "docs/trainers.md",
    "docs/python.md",
    "docs/troubleshooting.md",
    "docs/your-data.md",
    "docs/models.md",
    "docs/operations.md",
    "docs/converting.md",
    "docs/neighbours.md",
    "docs/looking.md",
    "docs/compatibility.md",
    "docs/contributing.md",
]
# What is printed at a size for use, and its size here.
SMALLER = {
    "--seq-len 512": "--seq-len 32",
    "--steps 2000": "--steps 6",
    "--steps 3000": "--steps 8",
    "--hidden-size 256": "--hidden-size 32",
}
NOT_RUN = re.compile(r"<!-- not run: \w.* -->")
WORDS = ["def", "class", "return", "import", "value", "name", "list", "index", "error", "token", "teacher", "cache"]

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@dataclass(frozen=True)
class Example:
    """A fenced block of a page: its language, where it is, its text, and whether a comment before it excuses it."""

    page: str
    line: int
    language: str
    text: str
    is_run: bool


def examples(page):
    """The fenced blocks of a page, in order."""
    lines = (ROOT / page).read_text().splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, page
    return [
        Example(
            page=page,
            line=begin + 2,
            language=lines[begin][3:],
            text="\n".join(lines[begin + 1 : end]) + "\n",
            is_run=NOT_RUN.fullmatch(lines[begin - 1]) is None,
        )
        for begin, end in zip(fences[::2], fences[1::2], strict=True)
    ]


def every_example():
    return [example for page in PAGES for example in examples(page)]


def commands(example):
    """The commands of a console example, each with the exit status that a comment behind it promises."""
    for line in example.text.splitlines():
        if words := shlex.split(line, comments=True):
            promised = re.search(r"# exit status (\d)", line)
            yield line, words, int(promised[1]) if promised else 0


def write_files(directory, text):
    """The same text in files of other kinds, as docs/your-data.md names them."""
    rows, old = directory / "my-rows", directory / "my-old-text"
    rows.mkdir()
    old.mkdir()
    pq.write_table(pa.table({"content": text}), rows / "news.parquet")
    (rows / "more.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in text).encode()))
    (old / "old.txt").write_text("\n".join(text).replace("value", "Größe"), encoding="latin-1")


def write_chats(path, text):
    """A question and an answer of some of a text's words a row."""
    for_each = [(words[:3], words[3:8]) for words in map(str.split, text)]
    with path.open("w") as file:
        for asked, said in for_each:
            messages = [{"role": "user", "content": " ".join(asked)}, {"role": "assistant", "content": " ".join(said)}]
            file.write(json.dumps({"messages": messages}) + "\n")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory: what the pages take for granted, and the repository's docs/ beside it."""
    text = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(400)) for i in range(12)]
    for name, part in (("my-text", text[:9]), ("my-held-out", text[9:])):
        (tmp_path / name).mkdir()
        for number, document in enumerate(part):
            (tmp_path / name / f"{number}.txt").write_text(document)
    write_files(tmp_path, text)
    write_chats(tmp_path / "my-chats.jsonl", text[:9])
    write_chats(tmp_path / "my-held-out-chats.jsonl", text[9:])
    tokenizer = tokenization.train_tokenizer(text, 300)
    tokenizer.chat_template = TEMPLATE
    teacher = loading.new_llama(
        vocab_size=tokenization.num_ids(tokenizer), hidden_size=32, num_layers=1, num_heads=2, max_positions=64, seed=0
    )
    loading.save(teacher, tokenizer, tmp_path / "my-teacher")
    with torch.no_grad():
        teacher.lm_head.weight += 0.01 * torch.arange(32)
    loading.save(teacher, tokenizer, tmp_path / "my-other-teacher")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def run_program(words, monkeypatch):
    """``python FILE ARGUMENTS``, in this process, which has loaded torch already."""
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_path(words[1], run_name="__main__")
    return 0


def run_console(example, monkeypatch):
    for line, words, promised in commands(example):
        if words[0] == "sklformat":
            status = cli.main(words[1:])
        elif words[0] == "python":
            status = run_program(words, monkeypatch)
        else:
            status = subprocess.run(line, shell=True, check=False).returncode
        assert promised == status, f"{example.page}:{example.line}: {line}"


def test_every_example_runs(place, monkeypatch):
    """Each runs as it is printed, and leaves what its page says it leaves."""
    unused = set(SMALLER)
    for example in every_example():
        text = example.text
        for printed, small in SMALLER.items():
            unused -= {printed} if printed in text else set()
            text = text.replace(printed, small)
        small = Example(example.page, example.line, example.language, text, example.is_run)
        if example.language == "console" and example.is_run:
            run_console(small, monkeypatch)
        elif example.language == "python" and example.is_run:
            # Lines keep their numbers in the page, so that a traceback leads there.
            exec(compile("\n" * (example.line - 1) + text, example.page, "exec"), {"__name__": "__main__"})
    assert set() == unused
    assert [] == skl.verify("my-cache")
    shards = sorted(path.name for path in Path("my-cache").glob("*.skl"))
    assert shards == sorted(path.name for path in Path("my-copy").glob("*.skl"))
    for name in shards:
        assert skl.open(f"my-cache/{name}")[0].targets == skl.open(f"my-copy/{name}")[0].targets
    assert "llama" == json.loads(Path("my-student/model/config.json").read_text())["model_type"]
    assert 2 <= len(list(Path("my-own-cache").glob("*.skl")))
    # The loop that was stopped after step 4 ends where an undisturbed one does.
    loop = ["python", "docs/recipes/own_loop.py", "my-cache", "my-student/model", "straight.pt", "--steps", "8"]
    run_program(loop, monkeypatch)
    resumed, straight = (torch.load(name, weights_only=True) for name in ("my-checkpoint.pt", "straight.pt"))
    assert resumed["loader"] == straight["loader"]
    assert all(torch.equal(resumed["student"][name], tensor) for name, tensor in straight["student"].items())


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_what_is_not_run(page, monkeypatch):
    """What a test cannot run has flags that the command line takes; every block has a language that is known."""
    parse = cli.parse

    def only_parsed(*arguments, **named):
        parse(*arguments, **named)
        raise SystemExit(0)

    monkeypatch.setattr(cli, "parse", only_parsed)
    for example in examples(page):
        assert example.language in ("console", "python", ""), f"{page}:{example.line}"
        assert example.is_run or example.language == "console", f"{page}:{example.line}: a program that no test runs"
        for line, words, _ in commands(example) if example.language == "console" else ():
            if "sklformat" in words and "python" not in words:
                assert 0 == cli.main(words[words.index("sklformat") + 1 :]), f"{page}:{example.line}: {line}"


def test_every_page_and_recipe_is_run():
    """No page is without its place here, no recipe without a test that runs it; imports are public."""
    assert set(PAGES) == {"README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))}
    console = "".join(example.text for example in every_example() if example.language == "console" and example.is_run)
    recipes = sorted((ROOT / "docs" / "recipes").glob("*.py"))
    tests = [ROOT / "tests" / "e2e" / "test_recipes.py", *(ROOT / "tests" / "integrations").glob("*.py")]
    tested = "".join(path.read_text() for path in tests)
    for recipe in recipes:
        assert f"python docs/recipes/{recipe.name} " in console or re.search(rf"\b{re.escape(recipe.name)}\b", tested)
    sources = [recipe.read_text() for recipe in recipes]
    sources += [example.text for example in every_example() if example.language == "python"]
    for source in sources:
        for module in re.findall(r"(?:from|import) (sklformat\S*)", source):
            assert module in ("sklformat", "sklformat.distill") or module.startswith("sklformat.integrations.")


def anchors(path):
    """What links call the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    """Every link inside the repository has its file, and the heading that it names there."""
    lost = []
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / link if link else ROOT / page
        if "://" not in link and not (path.exists() and (not anchor or anchor in anchors(path))):
            lost.append(f"{link}#{anchor}")
    assert [] == lost

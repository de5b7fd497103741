"""The page of ``sklformat view`` in a real browser: keys, pointer, finger, colours, size, speed, what it never does."""

import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from operation_data import write
from page_data import write_beside

import sklformat as skl
from sklformat.settings.inspection import ViewConfig
from sklformat.views.page import read_stretch, render
from sklformat.views.serving import PageServer

pytestmark = pytest.mark.browser

SHOTS = Path(__file__).parents[2] / "build" / "browser"
HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
WORDS = ["the", " quick", " brown", " fox", "\n", " jumps", " over", "\t", "ing", " Zebra"]
# Of every text that can be seen: its colour, and the first background behind it.
PAIRS = """() => {
  const found = new Set(), seen = (c) => !/^rgba\\(.*, 0\\)$/.test(c);
  const behind = (e) => { while (e && !seen(getComputedStyle(e).backgroundColor)) e = e.parentElement;
    return e ? getComputedStyle(e).backgroundColor : "rgb(255, 255, 255)"; };
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || /SCRIPT|STYLE/.test(e.tagName)) continue;
    if ([...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || /INPUT|SELECT/.test(e.tagName))
      found.add(getComputedStyle(e).color + "|" + behind(e));
    if (e.tagName === "INPUT") found.add(getComputedStyle(e, "::placeholder").color + "|" + behind(e));
  }
  return [...found];
}"""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def stretch(tmp_path_factory):
    """Two teachers of four sequences: the second has other tokens in the third, the first is damaged in the fourth."""
    root = tmp_path_factory.mktemp("caches")
    write(root / "sampled", 4, seq_len=60)
    write_beside(root / "topk", root / "sampled", kind="ratios", columns=("label_logprob",), misplaced=(2,))
    shard = root / "sampled" / "shard-00001.skl"
    content = bytearray(shard.read_bytes())
    content[4096 + 80] ^= 1
    shard.write_bytes(content)
    return read_stretch(ViewConfig(caches=(str(root / "sampled"), str(root / "topk"))))


@pytest.fixture(scope="module")
def written(stretch, tmp_path_factory):
    """The page of them, with text, one token of which is hostile, and two students."""
    texts = {token: WORDS[token % len(WORDS)] for token in stretch.ids()}
    texts[int(stretch.tokens[0][5])] = HOSTILE
    answers = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        answers.append([rng.random(rows.ids.size, np.float32) ** 4 / 4 for rows in stretch.rows])
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render(stretch, texts, ["runs/ce/model", "runs/kd/model"], answers))
    return path


class Seen:
    """A page as somebody sees it, and what it did beside: requests, complaints, errors."""

    def __init__(self, chromium, url, **how):
        how.setdefault("viewport", {"width": 1280, "height": 800})
        self.context = chromium.new_context(**how)
        self.page = self.context.new_page()
        self.asked, self.said, self.refused = [], [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("requestfailed", lambda request: self.refused.append(request.failure))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(url)
        self.url = url

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    @property
    def chosen(self):
        return int(self.page.locator("#text .chosen").get_attribute("data-i"))

    @property
    def number(self):
        return int(self.page.locator("#sequence").input_value())

    @property
    def focused(self):
        return self.page.evaluate("document.activeElement.dataset.i ?? document.activeElement.id")

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def columns(self):
        """The records' table: each row as its cells."""
        rows = self.page.locator("#records tr").all()
        return [[cell.inner_text() for cell in row.locator("td, th").all()] for row in rows]

    def shoot(self, name, **how):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", **how)


@pytest.fixture
def seen(chromium, written):
    """The page on a desk; in the end it has asked for nothing but itself and complained of nothing."""
    shown = Seen(chromium, written.as_uri())
    yield shown
    assert [shown.url] == shown.asked
    assert [] == shown.said
    assert shown.page.evaluate("window.hit === undefined")
    shown.context.close()


def test_keys(seen):
    """Every key that the page names does what it says, and moves the focus with it."""
    assert (0, 1) == (seen.number, seen.chosen)
    seen.press("ArrowRight", "ArrowRight")
    assert (3, "3") == (seen.chosen, seen.focused)
    seen.press("ArrowLeft")
    assert (2, "2") == (seen.chosen, seen.focused)
    seen.press("ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert 0 == seen.chosen
    assert "nobody foretold it" in seen.text("#records")
    seen.press("n", "n")
    assert 2 == seen.number
    seen.press("p")
    assert 1 == seen.number
    seen.press("f")
    assert 2 == seen.number
    seen.press("/")
    assert "search" == seen.focused
    seen.page.keyboard.type("sn")  # letters are letters here
    assert ("sn", 2) == (seen.page.locator("#search").input_value(), seen.number)
    seen.press("Escape")
    assert "1" == seen.focused
    documented = set(re.findall(r"<kbd>(.+?)</kbd>", seen.page.locator("footer").inner_html()))
    assert {"←", "→", "s", "n", "p", "f", "/", "Enter", "Esc"} == documented


def test_the_ends(seen):
    """Beyond the first and the last sequence and token there is nothing, which is said."""
    seen.press("p")
    assert (0, "not on this page, which has 0 to 3") == (seen.number, seen.text("#status"))
    seen.press("n", "n", "n", "n")
    assert (3, "not on this page, which has 0 to 3") == (seen.number, seen.text("#status"))
    seen.page.locator("#text span").last.click()
    last = seen.chosen
    seen.press("ArrowRight")
    assert (60, 60) == (last, seen.chosen)


def test_next_surprise(seen):
    """It goes from token to token that the colouring one has below 10 %, over sequences and round."""
    found = []
    for _ in range(200):
        seen.press("s")
        found.append((seen.number, seen.chosen))
        if found.count(found[0]) == 2:
            break
    expected = seen.page.evaluate(
        "data.sequences.flatMap((s) => s.sizes.flatMap((_, t) => "
        "{ const p = confidence(s, t, 0); return p !== null && p < 0.1 ? [[s.number, t + 1]] : []; }))"
    )
    assert len({number for number, _ in found}) > 1
    assert sorted(map(tuple, expected)) == sorted(set(found))
    seen.page.locator("#surprise").click()
    assert found[1] == (seen.number, seen.chosen)


def test_search(seen):
    """Text is found where it begins, over the ends of tokens, match after match; what is not there is said."""
    tokens = seen.page.evaluate("data.sequences.map((s) => s.tokens.map(textOf))")
    text = tokens[0][10] + tokens[0][11]
    seen.page.locator("#search").fill(text.upper())
    seen.page.locator("#search").press("Enter")
    found = (seen.number, seen.chosen)
    assert tokens[found[0]][found[1]] + tokens[found[0]][found[1] + 1] == text
    seen.page.locator("#search").fill("ing")
    seen.page.locator("#search").press("Enter")
    met = {(seen.number, seen.chosen)}
    for _ in range(5):
        seen.press("Enter")
        met.add((seen.number, seen.chosen))
    assert 6 == len(met)
    assert {"ing"} == {tokens[number][i] for number, i in met}
    seen.page.locator("#search").fill("no such words")
    seen.page.locator("#search").press("Enter")
    assert "nothing found" == seen.text("#status")
    seen.page.locator("#search").fill("onerror=")
    seen.page.locator("#search").press("Enter")
    assert HOSTILE in seen.text("#records h2").replace("␣", " ")


def test_jump(seen):
    """A number goes to its sequence; one that is not there is said, and the number shown stays the true one."""
    seen.page.locator("#sequence").fill("1")
    seen.press("Enter")
    assert (1, "") == (seen.number, seen.text("#status"))
    seen.page.locator("#sequence").fill("70")
    seen.press("Enter")
    assert (1, "not on this page, which has 0 to 3") == (seen.number, seen.text("#status"))
    seen.page.locator("#after").click()
    assert 2 == seen.number
    seen.page.locator("#before").click()
    assert 1 == seen.number


def test_records(seen, stretch):
    """A row for each id and a column for each teacher and student; not drawn is not 0, and the rest is last."""
    head, first, *rows, rest = seen.columns()
    assert ["token", "teacher\nsampled", "teacher\ntopk", "student\nce", "student\nkd"] == head
    assert "this token" == first[0]
    assert 5 == len({len(row) for row in (head, first, *rows, rest)} | {5}) + 4
    assert ("outside the records", "not drawn") == tuple(rest[:2])
    assert re.fullmatch(r"(< )?\d+\.\d %", rest[2])
    of_a, of_b = (one.targets for one in stretch.said[0])
    drawn = of_a.counts[: of_a.offsets[1]].astype(float) / 20
    shares = [row[1] for row in rows]
    assert (
        sorted((f"{100 * share:.1f} %" for share in drawn), key=lambda text: -float(text[:-2])) == shares[: drawn.size]
    )
    assert {"not drawn"} == set(shares[drawn.size :])
    assert int(of_b.offsets[1]) == sum(row[2] != "outside" for row in rows)
    assert "exact" in first[2]
    assert "exact" in first[3]
    assert "by records" in first[1] or first[1] == "not drawn\nby records"


def test_pointer_and_focus(seen):
    """The records are those of the token that the pointer is on, that is clicked, or that has the focus."""
    spans = seen.page.locator("#text span")
    spans.nth(7).hover()
    assert 7 == seen.chosen
    assert seen.text("#records h2").startswith("Token 7: ")
    spans.nth(9).click()
    assert 9 == seen.chosen
    spans.nth(12).evaluate("(span) => span.focus()")
    assert 12 == seen.chosen
    assert 1 == spans.and_(seen.page.locator("[tabindex='0']")).count()


def test_colour_by(seen):
    """The colours are of who is chosen; the token stays."""
    seen.page.locator("#text span").nth(9).click()
    options = seen.page.locator("#source option").all_inner_texts()
    assert ["teacher sampled", "teacher topk", "student ce", "student kd"] == options
    looks = []
    for choice in options:
        seen.page.locator("#source").select_option(label=choice)
        looks.append(seen.page.evaluate("[...document.querySelectorAll('#text span')].map((s) => s.className)"))
        assert 9 == seen.chosen
        expected = seen.page.evaluate(
            "data.sequences[0].sizes.map((_, t) => colour(confidence(sequence(), t, source)))"
        )
        assert expected == [look.split()[0] for look in looks[-1][1:]]
    assert 4 == len(set(map(str, looks)))


def test_faults(seen):
    """What is damaged or misaligned is named, counted and found; what others say of it is shown."""
    assert "Next of 2 faults" == seen.text("#fault")
    assert "" == seen.text("#faults")
    seen.page.locator("#fault").click()
    assert 2 == seen.number
    assert "topk: sequence 2: misaligned: alignment checksum 0x" in seen.text("#faults")
    assert ["fault"] * 2 == [seen.columns()[-1][2], seen.columns()[-2][2]]
    seen.shoot("misaligned")
    seen.press("f")
    assert 3 == seen.number
    assert "sampled: sequence 3: damaged: " in seen.text("#faults")
    seen.press("f")
    assert 2 == seen.number


def test_markup_is_text(seen):
    """A token of markup is seen as its letters, in the text, in the records and in the table."""
    spans = seen.page.locator("#text span")
    assert HOSTILE == spans.nth(5).inner_text()
    spans.nth(5).click()
    assert HOSTILE.replace(" ", "␣") in seen.text("#records h2")
    assert 0 == seen.page.locator("img, #text script, #records script").count()
    # And were there markup all the same, the page's policy would not run it.
    seen.page.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.hit = 1'>`)")
    assert any("Content Security Policy" in text for text in seen.said)
    assert ["csp"] == seen.refused
    seen.said.clear()
    seen.asked.pop()


def test_what_shows_no_ink_is_seen(chromium, stretch, tmp_path):
    """A token of nothing but marks and controls is an escape in the text; in the records each of them is."""
    texts = dict.fromkeys(stretch.ids(), "a")
    first, second, third, fourth = map(int, stretch.tokens[0][1:5])
    texts |= {first: "\u200b\x00", second: "\u0301", third: "می\u200cخ", fourth: "\t"}
    path = tmp_path / "page.html"
    path.write_text(render(stretch, texts))
    shown = Seen(chromium, path.as_uri())
    spans = shown.page.locator("#text span")
    texts_seen = spans.evaluate_all("(all) => all.slice(1, 5).map((span) => span.textContent)")
    assert [r"\u{200b}\u{0}", r"\u{301}", "می\u200cخ", "\t"] == texts_seen
    spans.nth(3).click()
    assert rf"Token 3: می\u{{200c}}خ (id {third})" == shown.text("#records h2")
    assert "of 0 to 3" == shown.text("#of")
    shown.context.close()


def contrast(pair):
    """Of two colours as a browser writes them."""
    levels = []
    for colour in pair.split("|"):
        assert colour.startswith("rgb("), colour  # nothing that is half seen through
        value = np.array([float(part) / 255 for part in re.findall(r"[\d.]+", colour)])
        levels.append(
            np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )
    return (max(levels) + 0.05) / (min(levels) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(chromium, written, scheme):
    """Of every text that is seen, in every state of the page, the contrast with what is behind it is 4.5 or more."""
    shown = Seen(chromium, written.as_uri(), color_scheme=scheme)
    pairs = set()
    for keys in (["ArrowRight"], ["ArrowLeft"], ["n"], ["n"], ["n", "/"]):
        shown.press(*keys)
        pairs |= set(shown.page.evaluate(PAIRS))
    assert 8 == len(pairs), pairs
    least = min(map(contrast, pairs))
    print(f"{scheme}: {len(pairs)} pairs of text and background, the least contrast {least:.2f}")
    assert 4.5 <= least
    shown.press("Escape", "p", "p", "p", "s")
    shown.shoot(scheme)
    shown.context.close()


@pytest.mark.parametrize("width", [1280, 800])
def test_many_columns(chromium, stretch, tmp_path, width):
    """Two teachers and four students are seen beside each other, without scrolling to the side."""
    path = tmp_path / "page.html"
    answers = [[np.full(rows.ids.size, 0.123, np.float32) for rows in stretch.rows]] * 4
    path.write_text(render(stretch, None, ["r/ce/model", "r/topk/model", "r/random/model", "r/full/model"], answers))
    shown = Seen(chromium, path.as_uri(), viewport={"width": width, "height": 800})
    shown.shoot(f"many-{width}")
    assert 7 == len(shown.columns()[0])
    assert shown.page.evaluate("$('records').scrollWidth <= $('records').clientWidth")
    assert shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.context.close()


def test_a_narrow_screen(chromium, written):
    """On a telephone nothing is cut off at the side, and a tap shows the records below the text."""
    shown = Seen(chromium, written.as_uri(), viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.page.locator("#text span").nth(12).tap()
    assert 12 == shown.chosen
    box = shown.page.locator("#records").bounding_box()
    assert box["y"] + box["height"] <= 740
    assert box["width"] <= 360
    shown.shoot("narrow")
    shown.context.close()


def test_ids(chromium, stretch, tmp_path):
    """Without a tokenizer ids stand apart and are found as numbers; one teacher alone has no choice of colours."""
    lone = read_stretch(ViewConfig(caches=(stretch.caches[0],)))
    path = tmp_path / "page.html"
    path.write_text(render(lone))
    shown = Seen(chromium, path.as_uri())
    assert not shown.page.locator("#by").is_visible()
    wanted = int(lone.tokens[0][30])
    shown.page.locator("#search").fill(str(wanted))
    shown.page.locator("#search").press("Enter")
    assert wanted == lone.tokens[shown.number][shown.chosen]
    shown.shoot("ids")
    assert [shown.url] == shown.asked
    shown.context.close()


def test_ten_thousand_positions(chromium, tmp_path):
    """10 000 positions in one sequence, the slowest to show, are at most 5 MB, and are there at once."""
    rng = np.random.default_rng(0)
    header = skl.Header(vocab_size=100_000, seq_len=10_000, kind="counts", rounds=12)
    ids = np.sort(rng.integers(0, 8000, (10_000, 12)) + np.arange(12) * 8000, axis=1)
    with skl.CacheWriter(tmp_path / "a", header=header, sequences_per_shard=10) as writer:
        targets = skl.SparseTargets(token_ids=ids.ravel(), counts=np.ones(120_000, int), offsets=np.arange(10_001) * 12)
        writer.append(np.concatenate([[0], ids[:, 3]]), targets)
    lone = read_stretch(ViewConfig(caches=(str(tmp_path / "a"),)))
    answers = [[rng.random(lone.rows[0].ids.size, np.float32)]]
    path = tmp_path / "page.html"
    path.write_text(render(lone, {token: f" token{token}" for token in lone.ids()}, ["student"], answers))
    assert path.stat().st_size <= 5_000_000
    shown = Seen(chromium, path.as_uri())
    assert 10_001 == shown.page.locator("#text span").count()
    timing = shown.page.evaluate(
        "({loaded: performance.getEntriesByType('navigation')[0].loadEventEnd, "
        "painted: performance.getEntriesByName('first-contentful-paint')[0].startTime})"
    )
    print(f"10 000 positions: {path.stat().st_size:,} bytes, loaded in {timing['loaded']:.0f} ms, "
          f"painted after {timing['painted']:.0f} ms")  # fmt: skip
    assert timing["loaded"] < 20_000  # a guard against what never ends; the figure is printed
    shown.press("ArrowRight")
    assert 2 == shown.chosen
    shown.shoot("ten-thousand")
    shown.context.close()


def test_served(chromium, written):
    """Served, it is the same page under the same rules, and asks its server for nothing else."""
    with PageServer(written.read_bytes(), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        shown = Seen(chromium, server.address)
        shown.press("ArrowRight", "s")
        assert shown.chosen
        assert [server.address] == shown.asked
        assert [] == shown.said
        shown.context.close()
        server.shutdown()
        thread.join()

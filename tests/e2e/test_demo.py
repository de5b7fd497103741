import dataclasses
import json
import os
import re
import shlex
import signal
import sysconfig
from pathlib import Path

import demo_data
import forked
import numpy as np
import pytest
from forked import Child
from system import alive, members, wait_for

import sklformat as skl
from sklformat.cli import main
from sklformat.distill.demo import stages
from sklformat.distill.demo.stages import run_demo
from sklformat.distill.models import loading
from sklformat.settings.demo import DemoConfig


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Real text: a few modules of the standard library."""
    root = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse", "difflib", "inspect", "tarfile", "typing"):
        (root / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes())
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("demo") / "run"
    return run_demo(config_of(out, text))


def config_of(out, text, **changes):
    return DemoConfig(**({"out": out, "text": text, "size": "tiny", "processes": 1} | changes))


def figures(result):
    return [dataclasses.asdict(row) for row in result.rows]


def test_the_whole_way(finished):
    """From text to the table: both caches sound, four students and the teacher measured, report and plot written."""
    out = finished.directory
    assert ["CE", "Top-K 12", "Random sampling", "FullKD", "(teacher)"] == [row.method for row in finished.rows]
    for name in ("cache-random", "cache-topk"):
        assert skl.verify(out / name) == []
        assert len(skl.open(out / name)) == 64
    topk, random = finished.rows[1:3]
    assert topk.unique_tokens == pytest.approx(12)
    assert random.unique_tokens == pytest.approx(12, abs=1.5)
    assert [0.0, 100.0] == pytest.approx([finished.rows[0].percent_ce_to_full, finished.rows[3].percent_ce_to_full])
    assert finished.text == (out / "REPORT.md").read_text()
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((out / "result.json").read_text())
    assert figures(finished) == stored["rows"]
    assert [] == finished.checks


def page_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_the_page(finished, tmp_path):
    """It has both caches, all students and the text; the report names it, and its command comes to the same page."""
    path = finished.directory / "page.html"
    shown = page_of(path)
    assert ["cache-random", "cache-topk"] == [one["name"] for one in shown["teachers"]]
    assert ["ce", "topk", "random", "full"] == [one["name"] for one in shown["students"]]
    assert 64 == len(shown["sequences"])
    tokens = skl.open(finished.directory / "cache-random")[0].tokens
    assert tokens.tolist() == shown["sequences"][0]["tokens"]
    tokenizer = loading.load_tokenizer(finished.directory / "tokenizer")
    assert tokenizer.decode(tokens) == "".join(shown["texts"][str(token)] for token in tokens)
    assert f"Page: {path}" in finished.text
    line = next(line for line in finished.text.splitlines() if line.startswith("sklformat view"))
    assert 0 == main(shlex.split(line.replace(str(path), str(tmp_path / "page.html")))[1:])
    again = page_of(tmp_path / "page.html")
    for one, other in zip(shown["sequences"], again["sequences"], strict=True):
        # Another number of threads adds in another order.
        assert max(map(abs, np.subtract(one.pop("students"), other.pop("students")).ravel())) <= 1
    assert shown == again


def test_students_start_from_the_same_weights_and_see_the_same_text(finished):
    """Only the method differs between the students: their settings are equal but for method, data and teacher."""
    runs = [
        json.loads((finished.directory / "students" / name / "run.json").read_text())
        for name in ("ce", "topk", "random", "full")
    ]
    for run in runs:
        for name in ("method", "cache", "teacher_fingerprint"):
            run.pop(name)
    assert [runs[0]] * 4 == runs
    random, topk = (skl.open(finished.directory / name) for name in ("cache-random", "cache-topk"))
    assert all((random[i].tokens == topk[i].tokens).all() for i in range(64))


def test_a_run_that_shows_nothing_says_so(finished):
    """A run of a size that cannot show the paper's order makes no claim about it, and says why."""
    section = finished.text.split("## What the paper shows\n", 1)[1].split("\n## ", 1)[0]
    assert "Nothing: a run of this size shows only that everything works." == section.strip()


def test_a_finished_demo_does_nothing_again(finished, text):
    """Run again, a finished demo makes no model and no shard anew and gives the same figures."""
    page = (finished.directory / "page.html").read_bytes()
    parts = [p for pattern in ("*/model/*", "*/*/model/*", "*/*.skl") for p in finished.directory.glob(pattern)]
    before = {path: path.stat().st_mtime_ns for path in parts}
    again = run_demo(config_of(finished.directory, text))
    assert figures(finished) == figures(again)
    assert before == {path: path.stat().st_mtime_ns for path in parts}
    assert page == (finished.directory / "page.html").read_bytes()


@pytest.mark.parametrize("stage", ["teacher", "cache", "student"])
def test_a_stopped_demo_goes_on(finished, text, tmp_path, monkeypatch, stage):
    """Stopped in any stage, also in the middle of a model, the demo ends with the figures of an undisturbed one."""

    def stop(*_):
        raise KeyboardInterrupt

    def stop_in_training(config, **_):
        wanted = "teacher" if stage == "teacher" else "topk"
        if config.out.name != wanted:
            return train(config, report=lambda *_: None)
        return train(dataclasses.replace(config, save_every=7), report=lambda done, *_: stop() if done == 10 else None)

    train = stages.train
    with monkeypatch.context() as patch:
        if stage == "cache":
            patch.setattr("sklformat.capture.Capture.push", stop)
        else:
            patch.setattr(stages, "train", stop_in_training)
        with pytest.raises(KeyboardInterrupt):
            run_demo(config_of(tmp_path / "run", text))
    assert figures(finished) == figures(run_demo(config_of(tmp_path / "run", text)))


def test_other_settings_are_refused(finished, text):
    """A directory of another demo is left alone; the message has both values."""
    with pytest.raises(skl.SettingsError, match="seed was 0, asked for is 3"):
        run_demo(config_of(finished.directory, text, seed=3))


def test_no_text_is_refused(tmp_path):
    """A directory without text is one clear error."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text"):
        run_demo(config_of(tmp_path / "run", tmp_path / "empty"))


def test_too_little_text_is_refused(tmp_path):
    """Text that does not fill the sequences is an error with numbers."""
    (tmp_path / "short.txt").write_text("too short to learn from\n" * 60)
    with pytest.raises(ValueError, match=r"\d+"):
        run_demo(config_of(tmp_path / "run", tmp_path / "short.txt"))


@pytest.mark.parametrize(
    "start_methods", [("fork", "forkserver"), pytest.param(("spawn", "spawn"), marks=pytest.mark.soak)], ids="-".join
)
def test_ctrl_c_is_clean_and_processes_give_the_same_figures(finished, text, tmp_path, start_methods):
    """
    Ctrl-C while processes work ends all of them without a traceback; run again, the demo finishes.

    On several processes it comes to the figures of one.
    """
    first, second = start_methods
    process = Child(demo_data.run, tmp_path / "run", text, first)
    caches = [tmp_path / "run" / name for name in ("cache-random", "cache-topk")]
    wait_for(lambda: all(cache.exists() for cache in caches) or not alive(process.pid))
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = process.done()
    assert status == 130, err
    assert "Traceback" not in err
    wait_for(lambda: not members(process.pid))
    status, out, err = forked.run(demo_data.run, tmp_path / "run", text, second)
    assert status == 0, err
    assert not {"\r", "\x1b"} & set(err)  # a log holds lines, of all processes
    for line in ("2/6 teacher: training on the text", "train full: 0 of 20 steps", "eval: 0 of 16 sequences"):
        assert f"{line}\n" in err
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert figures(finished) == stored["rows"]
    assert (tmp_path / "run" / "REPORT.md").read_text() in out

"""Ranks of any launcher, which never meet: each starts and dies at its own time, and the bytes are those of one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import teacher_data
from capture_data import shard_bytes
from system import HANGS, complaint
from teacher_data import SEQ_LEN, write_teacher, write_text

import sklformat as skl
from sklformat.capture.runs import Run
from sklformat.capture.session import Capture
from sklformat.cli import main
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.files.disk import shared_directory
from sklformat.settings.cache import CacheConfig

SEQUENCES, PER_SHARD = 22, 4
SETTINGS = {"seq_len": SEQ_LEN, "num_sequences": SEQUENCES, "rounds": 20, "batch_size": 3, "sequences_per_shard": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, a teacher, and the cache that one undisturbed process makes of them."""
    folder = tmp_path_factory.mktemp("apart")
    write_teacher(folder / "teacher", write_text(folder / "text"))
    capture(folder, folder / "whole")
    return folder


def capture(place, out, **settings):
    return cache_teacher(
        CacheConfig(teacher=str(place / "teacher"), text=(place / "text",), out=out, **SETTINGS | settings)
    )


def command(place, out, *more, **settings):
    flags = {"teacher": place / "teacher", "text": place / "text", "out": out} | SETTINGS | settings
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["cache", *words, *map(str, more)]


def as_rank(rank, world_size=2, run="job-7"):
    return "--run", run, "--rank", rank, "--world-size", world_size


def check_whole(place, out):
    assert shard_bytes(place / "whole") == shard_bytes(out)
    assert {"manifest.json", "tokens", *shard_bytes(out)} == {path.name for path in out.iterdir()}
    assert skl.open(place / "whole").fingerprint == skl.open(out).fingerprint


def test_one_after_the_other(place, tmp_path, capsys):
    """The first to come is done with its own shards and says whose are missing; the last writes the manifest."""
    out = tmp_path / "cache"
    assert 0 == main(command(place, out, *as_rank(1), "--json"))
    said = json.loads(capsys.readouterr().out)
    assert (1, 10, 10, 3, [0]) == tuple(
        said[name] for name in ("rank", "sequences", "sequences_made", "unsealed_shards", "waits_for")
    )
    with pytest.raises(skl.MissingShardError):
        skl.open(out)
    assert 1 == main(command(place, out, "--run", "job-7", "--finish"))
    line = complaint(capsys.readouterr().err)
    assert "run job-7 is not finished: 3 shards are not sealed, of the ranks 0 of 2; start these again" in line
    assert 0 == main(command(place, out, *as_rank(1)))
    assert "rank 1 of 2 is done with its 10 sequences (all there already); 3 shards" in capsys.readouterr().out
    assert 0 == main(command(place, out, *as_rank(0), "--json"))
    said = json.loads(capsys.readouterr().out)
    assert (SEQUENCES, 12) == (said["sequences"], said["sequences_made"])
    check_whole(place, out)
    assert 0 == main(command(place, out, *as_rank(0)))  # started once more than needed, as launchers do
    check_whole(place, out)


def test_at_the_same_time_and_one_is_killed(place, tmp_path):
    """Of two real processes one is killed; started again, it waits for nobody and ends the cache, byte for byte."""
    out = tmp_path / "cache"
    rank = forked.Child(main, command(place, out, *as_rank(1)))
    words = command(place, out, *as_rank(0))
    killed = forked.run(teacher_data.main_with_a_signal, signal.SIGKILL, 6, "0", words)
    assert (-signal.SIGKILL, "") == (killed.status, complaint(killed.stderr))
    other = rank.done()
    assert (0, "") == (other.status, complaint(other.stderr))
    assert "shards of the ranks 0 are not sealed" in other.stdout
    again = forked.run(main, [*words, "--json"])
    assert 0 == again.status, again
    said = json.loads(again.stdout)
    assert (SEQUENCES, True) == (said["sequences"], 0 < said["sequences_made"] <= 12 - PER_SHARD)
    check_whole(place, out)


def test_into_a_store(place, tmp_path):
    """Ranks that upload to one URL meet in their work directory; the manifest follows the last shard."""
    url, work = f"file://{tmp_path}/store/cache", tmp_path / "work"
    done = [capture(place, url, work_dir=work, run="a", rank=rank, world_size=2) for rank in (1, 0)]
    assert (3, (0,)) == (done[0].unsealed_shards, done[0].waits_for)
    assert (SEQUENCES, skl.open(place / "whole").fingerprint) == (done[1].sequences, skl.open(url).fingerprint)
    assert {"tokens"} == {path.name for path in work.iterdir()}
    assert 0 == main(["cache", "--teacher", "t", "--text", str(place), "--out", url, "--work-dir", str(work),
                      "--run", "a", "--finish"])  # fmt: skip


@pytest.mark.integration
def test_the_script_for_slurm(place, tmp_path):
    """Two jobs of an array, one after the other, make the cache."""
    out = tmp_path / "cache"
    script = Path(__file__).parents[2] / "docs" / "recipes" / "slurm_array.sh"
    for rank in ("1", "0"):
        told = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": rank, "SLURM_ARRAY_TASK_COUNT": "2"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        words = ["bash", str(script), *command(place, out)[1:]]
        subprocess.run(words, env=os.environ | told | {"PATH": path}, check=True, timeout=HANGS)
    check_whole(place, out)


def test_a_rank_is_one_process(place, tmp_path, capsys):
    """A second process of a rank is refused, and another run too, while the first is at work."""
    out = tmp_path / "cache"
    run = Run(out, "job-7", 1, 2)
    with shared_directory(out, "job-7"), run.taken():
        assert 1 == main(command(place, out, *as_rank(1)))
        assert "rank 1 of run job-7 is another process, which is at work" in complaint(capsys.readouterr().err)
        assert 1 == main(command(place, out, *as_rank(1, run="job-8")))
        assert "another process is writing here" in complaint(capsys.readouterr().err)
    assert not shard_bytes(out)


def test_ranks_have_the_same_settings(place, tmp_path):
    """What a rank began, another one of the run continues with the same settings; another run may divide the rest."""
    out = tmp_path / "cache"
    capture(place, out, run="a", rank=0, world_size=3)
    both = "another rank began run a in another way"
    for settings, message in (
        ({"world_size": 4}, f"{both}.*world_size: 3 != 4"),
        ({"world_size": 3, "num_sequences": 21}, f"{both}.*num_sequences: 22 != 21"),
        ({"world_size": 3, "rounds": 19}, f"{both}.*rounds: 20 != 19"),
    ):
        with pytest.raises(skl.SettingsError, match=message):
            capture(place, out, run="a", rank=1, **settings)
    with pytest.raises(skl.SettingsError, match="made with other settings"):
        capture(place, out, run="b", rank=1, world_size=2, rounds=19)
    assert capture(place, out, run="b", rank=1, world_size=2).sequences_made == 4 + 2  # shards 1 and 5; 3 is there
    capture(place, out, run="b", rank=0, world_size=2)
    check_whole(place, out)
    (out / "manifest.json").unlink()
    (out / "capture.run.json").write_text('{"run": "c"}')
    with pytest.raises(skl.CorruptError, match="not what a rank of a run wrote"):
        capture(place, out, run="c", rank=0, world_size=2)


def test_the_end_of_a_run_that_nobody_ended(place, tmp_path, capsys, monkeypatch):
    """Killed before the manifest, the last rank leaves what --finish ends; it says where no run was begun."""
    out = tmp_path / "cache"
    finish = command(place, out, "--run", "job-7", "--finish")
    assert 1 == main(finish)
    assert "so no rank of run job-7 has begun here" in complaint(capsys.readouterr().err)
    assert not out.exists()
    capture(place, out, run="job-7", rank=1, world_size=2)

    def stopped(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Capture, "finish", stopped)
        capture(place, out, run="job-7", rank=0, world_size=2)
    assert 1 == main(command(place, out, "--run", "job-8", "--finish"))
    assert "no rank of run job-8 has begun here; start its ranks first" in complaint(capsys.readouterr().err)
    for _ in range(2):
        assert 0 == main(finish)
        assert f"{SEQUENCES} sequences in 6 shards, all there" in capsys.readouterr().out
        check_whole(place, out)


def test_flags_of_runs(tmp_path, monkeypatch):
    """Run, rank and number of ranks come together, and without torchrun."""
    given = {"teacher": "t", "text": (tmp_path,), "out": tmp_path / "out"}
    for settings, message in (
        ({"rank": 0}, "rank, world_size and finish belong to a run: give run, its name"),
        ({"run": "a/b", "rank": 0, "world_size": 1}, "run must be 1 to 64 letters, digits, dots"),
        ({"run": "a", "rank": 2, "world_size": 2}, "run a needs world_size, and rank in 0..world_size - 1; got rank 2"),
        ({"run": "a", "finish": True, "rank": 1, "world_size": 2}, "finish is not the work of a rank: leave out"),
    ):
        with pytest.raises(ValueError, match=message):
            CacheConfig(**given, **settings)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run a says that this is rank 0 of 1, torchrun that it is rank 0 of 2"):
        cache_teacher(CacheConfig(**given, run="a", rank=0, world_size=1))

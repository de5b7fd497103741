"""Writing a cache of many shards: numbered, resumed from any moment, listed at the end."""

import shutil

import pytest
import reference
from strategies import header_of, small_sequence, small_settings, targets_of

import sklformat as skl
from sklformat.cache import sharding
from sklformat.cache.contents import UNFINISHED_NAME

HEADER = header_of(small_settings())
PER_SHARD, MANY = 3, 8


def append(writer, number):
    sequence = small_sequence(number)
    return writer.append(sequence.tokens, targets_of(reference.COUNTS, sequence.positions))


def write(directory, first=0, **changes):
    with skl.CacheWriter(directory, **{"header": HEADER, "sequences_per_shard": PER_SHARD} | changes) as writer:
        assert first <= len(writer)
        for number in range(len(writer), MANY):
            assert number == append(writer, number)


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def whole(tmp_path):
    """What an undisturbed run leaves."""
    write(tmp_path / "whole")
    return content(tmp_path / "whole")


def test_a_cache_of_three_shards(tmp_path, whole):
    """Shards are numbered and full but for the last, the manifest lists them, and the reference reads the same."""
    assert ["manifest.json", "shard-00000.skl", "shard-00001.skl", "shard-00002.skl"] == sorted(whole)
    cache = skl.open(tmp_path / "whole")
    assert [small_sequence(i).tokens for i in range(MANY)] == [sequence.tokens.tolist() for sequence in cache]
    assert [] == skl.verify(tmp_path / "whole")
    shards = reference.decode_cache(tmp_path / "whole")
    assert [3, 3, 2] == [len(shard.sequences) for shard in shards]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop", range(MANY + 1))
def test_an_exception_at_any_sequence(tmp_path, whole, stop):
    """A run that an exception ended resumes after the last sequence, to the same bytes; meanwhile it is no cache."""
    directory = tmp_path / "stopped"
    with (
        pytest.raises(StoppedError),
        skl.CacheWriter(directory, header=HEADER, sequences_per_shard=PER_SHARD) as writer,
    ):
        for number in range(stop):
            append(writer, number)
        raise StoppedError
    with pytest.raises(skl.UnfinishedError):
        skl.open(directory)
    write(directory, first=stop)
    assert whole == content(directory)


def test_a_kill_at_any_moment(tmp_path, whole):
    """Whatever a killed run leaves after any step is no whole cache, keeps what was flushed and resumes to the same."""
    directory, states = tmp_path / "run", []

    def keep(kept):
        states.append((kept, shutil.copytree(directory, tmp_path / f"state-{len(states)}")))

    with skl.CacheWriter(directory, header=HEADER, sequences_per_shard=PER_SHARD) as writer:
        keep(0)
        for number in range(MANY):
            append(writer, number)
            writer.flush()
            keep(number + 1)
    for kept, state in states:
        with pytest.raises(skl.UnfinishedError):
            skl.open(state)
        write(state, first=kept)
        assert whole == content(state)


@pytest.mark.parametrize("name", ["write_manifest", "unmark_unfinished"])
def test_a_failure_at_the_end(tmp_path, whole, monkeypatch, name):
    """A failure between the last seal and the end costs nothing; with its manifest the cache is whole already."""
    directory = tmp_path / "run"

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(sharding, name, fail)
        write(directory)
    if name == "unmark_unfinished":
        assert MANY == len(skl.open(directory))
        with pytest.raises(FileExistsError, match="holds a finished cache"):
            write(directory)
        assert not (directory / UNFINISHED_NAME).exists()  # else its shards would be no cache without the manifest
        return
    with pytest.raises(skl.UnfinishedError):
        skl.open(directory)
    write(directory, first=MANY)
    assert whole == content(directory)


def test_what_is_here_must_belong(tmp_path):
    """What is finished, of other settings, of another program or in use is refused, and nothing changes."""
    write(tmp_path / "a")
    before = content(tmp_path / "a")
    with pytest.raises(FileExistsError, match=r"a: holds a finished cache \(manifest\.json\); choose "):
        write(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    other = header_of(small_settings(rounds=4))
    with pytest.raises(skl.SettingsError, match=r"shard-00000\.skl: made with other settings .*rounds: 5 != 4"):
        write(tmp_path / "a", header=other)
    (tmp_path / "a" / "mine.skl.partial").touch()
    with pytest.raises(skl.SettingsError, match=r"mine\.skl\.partial: is not the next shard, shard-00003\."):
        write(tmp_path / "a")
    (tmp_path / "a" / "mine.skl.partial").unlink()
    assert before == content(tmp_path / "a") | {"manifest.json": before["manifest.json"]}
    with skl.CacheWriter(tmp_path / "b", header=HEADER), pytest.raises(skl.InUseError):
        skl.CacheWriter(tmp_path / "b", header=HEADER)


def test_wrong_arguments(tmp_path):
    """Each wrong argument is named with its value, before a directory is made."""
    with pytest.raises(ValueError, match="sequences_per_shard must be >= 1, got 0"):
        skl.CacheWriter(tmp_path / "a", header=HEADER, sequences_per_shard=0)
    placed = header_of(small_settings(shard_number=2, first_sequence=9))
    with pytest.raises(ValueError, match="shard_number and first_sequence must be 0, got 2 and 9"):
        skl.CacheWriter(tmp_path / "a", header=placed)
    assert not (tmp_path / "a").exists()


def test_a_wrong_sequence_costs_nothing(tmp_path):
    """A sequence that breaks a rule is refused, and the writer goes on as if it had not come."""
    with skl.CacheWriter(tmp_path / "a", header=HEADER, sequences_per_shard=2) as writer:
        append(writer, 0)
        with pytest.raises(ValueError, match="vocab_size is 20"):
            writer.append([1, 2, 3, 20], targets_of(reference.COUNTS, small_sequence(1).positions))
        assert 1 == append(writer, 1)
    with pytest.raises(ValueError, match="the writer is closed"):
        append(writer, 2)
    assert 2 == len(skl.open(tmp_path / "a"))


def test_an_empty_cache(tmp_path):
    """A run without sequences leaves a cache of none."""
    with skl.CacheWriter(tmp_path / "a", header=HEADER):
        assert (tmp_path / "a" / UNFINISHED_NAME).exists()
    assert 0 == len(skl.open(tmp_path / "a"))
    assert [] == skl.verify(tmp_path / "a")


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_program_that_begins_again_is_warned(tmp_path, stop):
    """Appending sequence 0 to a resumed cache doubles what is there: said once, at the first; the right one passes."""
    with pytest.raises(StoppedError), skl.CacheWriter(tmp_path / "a", header=HEADER, sequences_per_shard=3) as writer:
        for number in range(stop):
            append(writer, number)
        raise StoppedError
    with skl.CacheWriter(tmp_path / "a", header=HEADER, sequences_per_shard=3) as writer:
        with pytest.warns(UserWarning, match=rf"resumed with {stop} sequences, and the first .* is sequence 0 again"):
            append(writer, 0)
        append(writer, 0)  # sequences may well be equal

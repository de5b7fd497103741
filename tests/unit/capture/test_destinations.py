"""Capture into a URL: verified, uploaded, checked, listed last; whatever fails keeps the local file and can go on."""

import dataclasses

import pytest
from capture_data import (
    HEADER,
    NUM_SEQUENCES,
    draws_of,
    open_capture,
    push_all,
    shard_bytes,
    tokens_of,
    write_undisturbed,
)

import sklformat as skl
from sklformat.capture import destinations
from sklformat.capture.destinations import Target, Uploader
from sklformat.capture.plan import find_header, survey, unsealed
from sklformat.files import remote
from sklformat.files.places import url_of

pytest.importorskip("fsspec")


@pytest.fixture
def url(tmp_path):
    """A store that the writer process sees too."""
    return f"file://{tmp_path}/store/cache"


@pytest.fixture
def stored(tmp_path):
    return tmp_path / "store" / "cache"


@pytest.fixture
def expected(tmp_path):
    return write_undisturbed(tmp_path / "plain")


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_a_cache_lands_at_its_url(tmp_path, url, stored, expected):
    """The shards and, last, the manifest are at the URL; nothing of them is left here; a second run finds all there."""
    with open_capture(tmp_path / "work", url=url) as capture:
        push_all(capture)
    assert expected == shard_bytes(stored)
    assert {"manifest.json", *expected} == names(stored)
    assert set() == names(tmp_path / "work")
    assert [] == skl.verify(stored)
    assert skl.open(stored).fingerprint == skl.open(tmp_path / "plain").fingerprint
    assert HEADER == dataclasses.replace(find_header(tmp_path / "work", url), shard_number=0, first_sequence=0)
    with open_capture(tmp_path / "other machine", url=url) as capture:
        assert [] == list(capture.shards())
    assert NUM_SEQUENCES == sum(entry.num_sequences for entry in capture.entries)


def test_a_stopped_capture_lists_nothing_and_goes_on(tmp_path, url, stored, expected):
    """What is uploaded is skipped, what is unfinished here is gone on with; the manifest waits for all of it."""
    with pytest.raises(KeyboardInterrupt), open_capture(tmp_path / "work", url=url) as capture:
        for sequence in range(6):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        raise KeyboardInterrupt
    assert {"shard-00000.skl"} == names(stored)
    assert "shard-00001.skl.partial" in names(tmp_path / "work")
    with open_capture(tmp_path / "work", url=url) as capture:
        assert [6, 8] == [work.next_sequence for work in capture.shards()]
        push_all(capture)
    assert expected == shard_bytes(stored)
    assert [] == skl.verify(stored)


def test_ranks_upload_side_by_side(tmp_path, url, stored, expected):
    """Ranks on machines of their own, each with its own directory, make one cache at one URL; one lists it."""
    ranks = [open_capture(tmp_path / str(rank), url=url, rank=rank, world_size=2, run="a") for rank in range(2)]
    for capture in ranks:
        with capture:
            push_all(capture)
    assert expected == shard_bytes(stored)
    assert "manifest.json" not in names(stored)
    ranks[0].finish()
    assert [] == skl.verify(stored)
    assert {"manifest.json", *expected} == names(stored)


def test_a_failed_upload_keeps_the_shard(tmp_path, url, stored, expected):
    """A store that takes nothing is an error with its URL; the shard stays here, and the next run uploads it only."""
    stored.parent.mkdir()
    stored.touch()  # a file where the directory should be
    with (
        pytest.raises(skl.CaptureError, match=r"shard-00000\.skl: cannot be written .* is kept"),
        open_capture(tmp_path / "work", url=url, num_sequences=4) as capture,
    ):
        push_all(capture)
    assert expected["shard-00000.skl"] == (tmp_path / "work" / "shard-00000.skl").read_bytes()
    assert HEADER == find_header(tmp_path / "work", f"file://{tmp_path}/elsewhere")  # it is known by what is here
    stored.unlink()
    with open_capture(tmp_path / "work", url=url, num_sequences=4) as capture:
        assert [] == list(capture.shards())
    assert {"manifest.json", "shard-00000.skl"} == names(stored)
    assert expected["shard-00000.skl"] == (stored / "shard-00000.skl").read_bytes()


def test_what_is_at_the_url_must_belong_there(tmp_path, url, stored):
    """Shards at the URL of other settings, other lengths or cut short are refused, with both values."""
    with open_capture(tmp_path / "work", url=url) as capture:
        push_all(capture)
    for changes, message in (
        ({"header": dataclasses.replace(HEADER, rounds=21)}, r"file://.*shard-00000\.skl: .*rounds: 20 != 21"),
        ({"sequences_per_shard": 5}, "holds 4 sequences, this capture asks for 5"),
        ({"num_sequences": 8}, "make 2 shards, this is number 2"),
    ):
        with pytest.raises(skl.SettingsError, match=message), open_capture(tmp_path / "new", url=url, **changes):
            pass
    shard = stored / "shard-00001.skl"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(skl.TruncatedError, match=r"shard-00001\.skl: trailer"), open_capture(tmp_path / "new", url=url):
        pass


def test_a_half_uploaded_shard_is_uploaded_again(tmp_path, url, stored, expected):
    """A store that shows what was killed half way hides neither the settings nor the shard that is still here."""
    with pytest.raises(KeyboardInterrupt), open_capture(tmp_path / "work") as capture:
        for sequence in range(4):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        raise KeyboardInterrupt
    stored.mkdir(parents=True)
    (stored / "shard-00000.skl").write_bytes(expected["shard-00000.skl"][:5000])
    assert HEADER == find_header(tmp_path / "work", url)
    with open_capture(tmp_path / "work", url=url) as capture:
        push_all(capture)
    assert expected == shard_bytes(stored)
    (stored / "shard-00001.skl").write_bytes(expected["shard-00001.skl"][:5000])
    with (
        pytest.raises(skl.TruncatedError, match=r"shard-00001\.skl: .*; remove it there, and run the capture again"),
        open_capture(tmp_path / "new", url=url),
    ):
        pass


def test_the_index_of_what_is_at_the_url_is_read(tmp_path, url, stored):
    """A damaged index is found before the manifest lists its shard."""
    with open_capture(tmp_path / "work", url=url) as capture:
        push_all(capture)
    shard = stored / "shard-00001.skl"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(skl.CorruptError, match=r"shard-00001\.skl: index"), open_capture(tmp_path / "new", url=url):
        pass


def test_a_damaged_shard_is_not_uploaded(tmp_path, url, expected):
    """Every sequence is decoded before its shard leaves this machine."""
    shard = tmp_path / "shard-00000.skl"
    data = bytearray(expected["shard-00000.skl"])
    data[5000] ^= 1
    shard.write_bytes(data)
    uploader = Uploader(url)
    uploader.put(shard)
    with pytest.raises(skl.CorruptError, match=r"shard-00000\.skl: block"):
        uploader.finish()
    assert shard.exists()
    assert not remote.exists(url_of(url, shard.name))
    with pytest.raises(skl.CorruptError):
        uploader.put(shard)


def test_the_manifest_goes_last(tmp_path, url, stored, monkeypatch):
    """A store that refuses the manifest has no cache yet; the next run brings it."""
    upload = destinations.remote.upload

    def refusing(local, where):
        if local.name == "manifest.json":
            raise skl.RemoteError(f"{where}: full")
        upload(local, where)

    monkeypatch.setattr(destinations.remote, "upload", refusing)
    with (
        pytest.raises(skl.RemoteError, match=r"manifest\.json: full"),
        open_capture(tmp_path / "w", url=url) as capture,
    ):
        push_all(capture)
    assert 3 == len(names(stored))
    monkeypatch.undo()
    with open_capture(tmp_path / "w", url=url):
        pass
    assert "manifest.json" in names(stored)


def test_a_local_target_finds_what_is_there(tmp_path, expected):
    """Without a URL the directory itself is asked."""
    target = Target(tmp_path / "plain")
    header, entry = target.find("shard-00001.skl")
    assert (1, 4, 4) == (header.shard_number, entry.first_sequence, entry.num_sequences)
    assert target.find("shard-00009.skl") is None
    assert sorted(expected) == target.names()


def test_a_listing_that_lags(tmp_path, url, stored, expected, monkeypatch):
    """What a store does not list yet is neither captured again nor missed by the manifest or by the last rank."""
    plain = remote.list_names
    monkeypatch.setattr(remote, "list_names", lambda url: [])
    with pytest.raises(KeyboardInterrupt), open_capture(tmp_path / "work", url=url) as capture:
        for sequence in range(9):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        raise KeyboardInterrupt
    assert {"shard-00000.skl", "shard-00001.skl"} == names(stored)
    target = Target(tmp_path / "work", url)
    assert [2] == unsealed(target, NUM_SEQUENCES, 4)
    (tmp_path / "elsewhere").mkdir()
    assert HEADER == find_header(tmp_path / "elsewhere", url)
    with open_capture(tmp_path / "work", url=url) as capture:
        assert [9] == [work.next_sequence for work in capture.shards()]
        push_all(capture)
    assert expected == shard_bytes(stored)
    assert [] == unsealed(target, NUM_SEQUENCES, 4)
    assert [] == skl.verify(stored)
    assert plain(url) == sorted(names(stored))


def test_a_listing_that_shows_what_is_gone(tmp_path, url, stored, expected, monkeypatch):
    """A shard that was removed is captured again although the store lists it still."""
    with open_capture(tmp_path / "work", url=url) as capture:
        push_all(capture)
    listed = remote.list_names(url)
    (stored / "shard-00001.skl").unlink()
    monkeypatch.setattr(remote, "list_names", lambda url: listed)
    with open_capture(tmp_path / "work", url=url) as capture:
        assert [4] == [work.next_sequence for work in capture.shards()]
        push_all(capture)
    assert expected == shard_bytes(stored)


def test_few_shards_are_asked_for_by_name(tmp_path, url, monkeypatch):
    """Of a large capture that begins only the first ones are: a lag is short."""
    asked, plain = [], remote.size
    monkeypatch.setattr(remote, "size", lambda url: asked.append(url) or plain(url))
    (tmp_path / "work").mkdir()
    works = survey(tmp_path / "work", HEADER, 4000, 4, url=url)
    assert 1000 == len(works)
    assert [url_of(url, f"shard-{number:05d}.skl") for number in range(16)] == asked

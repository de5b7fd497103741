"""Records that the device decodes: the same as the host's, and nothing bad gets past them."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_data import write_cache
from packed_runs import Mark
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat import native
from sklformat.distill import SparseLogitDataset, Teachers, kernels
from sklformat.distill.kernels.decode_counts import decode_counts
from sklformat.distill.loader import packed
from sklformat.distill.loader.packed import PackedTargets, decode_by_torch
from sklformat.distill.loader.sources import Sources
from sklformat.errors import CorruptError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 10
# Number, bits of an id, bytes of a record, and a vocabulary that needs the profile.
PROFILES = {"R24": (1, 17, 3, 1 << 17), "R24W": (2, 18, 3, (1 << 17) + 77), "R32": (3, 24, 4, (1 << 18) + 5)}


def shape_of(profile, positions, records):
    number, _, _, vocab_size = PROFILES[profile]
    return native.Shape(1, number, 2, 0, 0, vocab_size, ROUNDS, positions, records)


def encoded(profile, positions):
    """Records of positions, each a list of (id, count), as tensors of bytes and offsets."""
    _, id_bits, size, _ = PROFILES[profile]
    shift = 24 if size == 4 else id_bits
    words = [token_id | count << shift for position in positions for token_id, count in position]
    data = b"".join(word.to_bytes(size, "little") for word in words)
    offsets = torch.tensor([0, *np.cumsum([len(position) for position in positions])], dtype=torch.int64)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8), offsets


def by_host(profile, records, offsets):
    """What C makes of them."""
    numbers = np.diff(offsets.numpy()).astype("<u2").view(np.uint8)
    payload = np.concatenate([numbers, records.numpy(), np.zeros(64, np.uint8)])
    _, ids, codes, *_ = native.decode(shape_of(profile, offsets.numel() - 1, int(offsets[-1])), payload)
    return ids.astype(np.int64).tolist(), (codes.astype(np.float32) / np.float32(ROUNDS)).tolist()


def by_device(profile, records, offsets, way):
    _, id_bits, size, vocab_size = PROFILES[profile]
    settings = {"id_bits": id_bits, "record_size": size, "rounds": ROUNDS, "vocab_size": vocab_size}
    ids, probs, fault = way(records.to(DEVICE), offsets.to(DEVICE), **settings)
    assert (ids.dtype, probs.dtype) == (torch.int32, torch.float32)
    assert len(ids) == 0 or 0 <= int(ids.min()) <= int(ids.max()) < vocab_size
    return ids.tolist(), probs.tolist(), int(fault) != 0


@st.composite
def layouts(draw, profile):
    """Sound positions: none, one or several records, the lowest and the highest id among them."""
    vocab_size = PROFILES[profile][3]
    token_id = st.sampled_from([0, 1, vocab_size - 1]) | st.integers(0, vocab_size - 1)
    positions = []
    for _ in range(draw(st.integers(1, 5))):
        ids = sorted(draw(st.sets(token_id, max_size=ROUNDS)))
        counts = [1] * len(ids)
        if ids:
            counts[draw(st.integers(0, len(ids) - 1))] += ROUNDS - len(ids)
        positions.append(list(zip(ids, counts, strict=True)))
    return positions


@pytest.mark.parametrize("profile", PROFILES)
@settings(max_examples=12)
@given(data=st.data())
def test_the_device_decodes_what_the_host_does(profile, data):
    records, offsets = encoded(profile, data.draw(layouts(profile)))
    ids, probs = by_host(profile, records, offsets)
    for way in (decode_counts, decode_by_torch):
        assert by_device(profile, records, offsets, way) == (ids, probs, False)


def test_positions_of_more_records_than_a_program_takes_at_once():
    position = [(7 * i, 1) for i in range(ROUNDS - 1)] + [(100_000, 1)]
    long = [(3 * i, 1) for i in range(100)]  # in three turns, the sum of which is not the rounds
    for positions, bad in (([position] * 3, False), ([position, long], True)):
        records, offsets = encoded("R24", positions)
        for way in (decode_counts, decode_by_torch):
            assert by_device("R24", records, offsets, way)[2] is bad


def mutations(profile):
    """Positions that break one rule each; the position before them is sound, and so is the one behind."""
    vocab_size, id_bits = PROFILES[profile][3], PROFILES[profile][1]
    bad = {
        "order": [(5, 4), (4, 6)],
        "twice": [(5, 4), (5, 6)],
        "zero count": [(4, 0), (5, 10)],
        "sum below": [(4, 4), (5, 5)],
        "sum above": [(4, 4), (5, 7)],
        "one count too large": [(4, 11)],
    }
    if vocab_size < 1 << id_bits:
        bad |= {"id": [(4, 4), (vocab_size, 6)], "largest id": [(4, 4), ((1 << id_bits) - 1, 6)]}
    if profile == "R32":
        bad["reserved bit"] = [(4, 4), (5, 128 + 6)]
    return bad


CASES = [(profile, name) for profile in PROFILES for name in mutations(profile)]


@pytest.mark.parametrize(("profile", "name"), CASES)
def test_every_bad_record_is_found_and_named_as_the_host_names_it(profile, name):
    records, offsets = encoded(profile, [[(900, 10)], mutations(profile)[name], [], [(2, 10)]])
    with pytest.raises(CorruptError) as host:
        by_host(profile, records, offsets)
    for way in (decode_counts, decode_by_torch):
        assert by_device(profile, records, offsets, way)[2]
    ours = PackedTargets(records, offsets, shape_of(profile, 0, 0), [("cache/shard.skl", 12, 4096)])
    with pytest.raises(CorruptError) as found:
        ours.to(DEVICE).check()
    assert (found.value.path, found.value.sequence, found.value.offset) == ("cache/shard.skl", 12, 4096)
    assert str(host.value) in str(found.value)


@pytest.mark.parametrize("way", [decode_counts, decode_by_torch])
def test_ids_may_fall_from_one_position_to_the_next_alone(way):
    records, offsets = encoded("R24", [[(9, 10)], [(3, 10)], [], [(3, 10)]])
    assert by_device("R24", records, offsets, way)[2] is False


def test_no_record_at_all():
    records, offsets = encoded("R24", [[], []])
    for way in (decode_counts, decode_by_torch):
        assert by_device("R24", records, offsets, way) == ([], [], False)


# --- through the dataset ---


@pytest.fixture
def cuda(monkeypatch):
    """Datasets may be made as on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def same(ours, theirs):
    for name in ("input_ids", "labels", "position_ids", "document_starts"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    for name in ("token_ids", "probs", "offsets"):
        assert torch.equal(getattr(ours.targets, name), getattr(theirs.targets, name))
    assert ours.state == theirs.state


CACHES = {
    "R24": {},
    "R24W": {"vocab_size": PROFILES["R24W"][3]},
    "R32": {"vocab_size": PROFILES["R32"][3]},
    "ragged": {"seq_len": 0, "lengths": [3 + i % 7 for i in range(23)], "columns": ("entropy", "document_start")},
    "without tokens": {"store_tokens": False},
}


@pytest.mark.parametrize("name", CACHES)
def test_a_stream_is_the_same(tmp_path, cuda, name):
    data = write_cache(tmp_path / "cache", **CACHES[name])
    tokens = [each for each, _ in data] if name == "without tokens" else None
    ways = [
        SparseLogitDataset(tmp_path / "cache", 4, tokens=tokens, tail="pad", decode=decode)
        for decode in ("cpu", "cuda")
    ]
    seen = 0
    for host, device in zip(*ways, strict=True):
        assert isinstance(device.targets, PackedTargets)
        same(device.to("cpu"), host)
        seen += 1
    assert seen == 6


def test_a_batch_by_the_kernel_is_the_same(tmp_path, cuda, monkeypatch):
    write_cache(tmp_path / "cache", seq_len=5, sequences=3)
    host, device = (next(iter(SparseLogitDataset(tmp_path / "cache", 2, decode=way))) for way in ("cpu", "cuda"))
    runs = []
    monkeypatch.setattr(kernels, "run_on", lambda device: runs.append(device) or True)
    same(device.to("cpu"), host)
    assert runs == [torch.device("cpu")]


def test_caches_of_one_layout_are_one_stream(tmp_path, cuda):
    for number, name in enumerate("ab"):
        write_cache(tmp_path / name, seed=number)
    paths = [tmp_path / "a", tmp_path / "b"]
    ways = [SparseLogitDataset(paths, 4, weights=[2, 1], decode=decode) for decode in ("cpu", "cuda")]
    for host, device in zip(*ways, strict=True):
        same(device.to("cpu"), host)


def test_worker_processes_hand_out_packed_records_and_states_resume(tmp_path, cuda, monkeypatch):
    write_cache(tmp_path / "cache")
    host = list(SparseLogitDataset(tmp_path / "cache", 4))
    ds = SparseLogitDataset(tmp_path / "cache", 4, decode="cuda")
    monkeypatch.undo()  # DataLoader asks for a GPU too
    ours = list(DataLoader(ds, batch_size=None, num_workers=2))
    for a, b in zip(ours, host, strict=True):
        same(a.to("cpu"), b)
    ds.load_state_dict(ours[1].state)
    same(next(iter(ds)).to("cpu"), host[2])


def test_pinned_memory_is_still_packed(tmp_path, cuda, monkeypatch):
    write_cache(tmp_path / "cache")
    batch = next(iter(SparseLogitDataset(tmp_path / "cache", 4, decode="cuda")))
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.dtype) or tensor.clone())
    ours = batch.pin_memory()
    assert isinstance(ours.targets, PackedTargets)
    assert pinned.count(torch.uint8) == 1
    same(ours.to("cpu"), batch.to("cpu"))


def flip(batch, bit=0x10):
    """The first record of a batch's second row takes another count, as from memory that lost a bit."""
    positions = batch.input_ids.shape[1]
    first = 3 * int(batch.targets.offsets[positions])
    batch.targets.records[first + 2] ^= bit


def test_a_bad_record_is_named_by_file_block_and_position(tmp_path, cuda):
    write_cache(tmp_path / "cache")
    batch = next(iter(SparseLogitDataset(tmp_path / "cache", 4, shuffle=False, decode="cuda")))
    flip(batch)
    with pytest.raises(CorruptError, match="position 0") as found:
        batch.to("cpu")
    assert (found.value.path, found.value.sequence) == (tmp_path / "cache" / "shard-00000.skl", 1)
    offset = skl.open(tmp_path / "cache").find(1)[0].index.offset[1]
    assert found.value.offset == int(offset)


@pytest.fixture
def marks(monkeypatch):
    """The flags of faults are on their way, as from a GPU; a mark for each of them, in order."""
    made = []
    monkeypatch.setattr(packed, "to_host", lambda flag: (flag, made.append(Mark()) or made[-1]))
    yield made
    packed._unread.clear()


def test_a_flag_is_waited_for_by_check_and_only_once(tmp_path, cuda, marks):
    write_cache(tmp_path / "cache")
    batch = next(iter(SparseLogitDataset(tmp_path / "cache", 4, decode="cuda"))).to("cpu")
    assert [mark.waited for mark in marks] == [0]
    batch.check()
    batch.to("cpu").row(1).check()  # the same records, wherever they are
    assert [mark.waited for mark in marks] == [1]


def test_check_raises_before_the_step_and_again(tmp_path, cuda, marks):
    """Whoever was told so by the batch itself is not told once more by a sound one."""
    write_cache(tmp_path / "cache")
    batch, sound, *_ = SparseLogitDataset(tmp_path / "cache", 4, decode="cuda")
    flip(batch)
    moved = batch.to("cpu")
    for _ in range(2):
        with pytest.raises(CorruptError, match="position 0"):
            moved.check()
    sound.to("cpu").check()


def test_who_never_checks_is_stopped_by_the_next_batch(tmp_path, cuda, marks):
    write_cache(tmp_path / "cache")
    first, second, *_ = SparseLogitDataset(tmp_path / "cache", 4, decode="cuda")
    flip(first)
    first.to("cpu")
    with pytest.raises(CorruptError, match="position 0"):
        second.to("cpu")
    second.to("cpu").check()  # it is sound itself


def test_a_fault_of_the_copy_alone_is_said_to_be_one(tmp_path, cuda, marks):
    write_cache(tmp_path / "cache")
    batch = next(iter(SparseLogitDataset(tmp_path / "cache", 4, decode="cuda")))
    flip(batch)
    moved = batch.to("cpu")
    flip(batch)
    with pytest.raises(CorruptError, match="where the host's copy has none"):
        moved.check()


def test_check_of_batches_that_the_host_decoded_is_nothing(tmp_path):
    write_cache(tmp_path / "cache")
    next(iter(SparseLogitDataset(tmp_path / "cache", 4))).to("cpu").check()


def test_what_is_packed_has_no_ids_and_says_so(tmp_path, cuda):
    write_cache(tmp_path / "cache")
    batch = next(iter(SparseLogitDataset(tmp_path / "cache", 4, decode="cuda")))
    for asked in (lambda: batch.targets.token_ids, lambda: batch.targets.probs, batch.padded, lambda: batch.row(0)):
        with pytest.raises(ValueError, match="the records are packed and have no"):
            asked()
    with pytest.raises(ValueError, match="packed and not checked yet: call check"):
        batch.check()
    assert "64 positions" in repr(pickle.loads(pickle.dumps(batch)).targets)
    with pytest.raises(AttributeError, match="have no attribute 'mass'"):
        _ = batch.targets.mass


def write_ratios(path):
    rng = np.random.default_rng(1)
    header = skl.Header(vocab_size=50, seq_len=4, kind="ratios", rounds=0, store_tokens=True)
    with skl.ShardWriter(path, header=header) as writer:
        targets = skl.SparseTargets(token_ids=[1, 2, 3, 4], weights=[0.5] * 4, offsets=[0, 1, 2, 3, 4])
        writer.append(rng.integers(0, 50, 5), targets)
    return path


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, cuda, monkeypatch):
    write_cache(tmp_path / "a")
    write_cache(tmp_path / "b", profile="R32")
    write_ratios(tmp_path / "ratios.skl")
    for source, why in (
        (tmp_path / "ratios.skl", "kind 'ratios'"),
        ([tmp_path / "a", tmp_path / "b"], "another layout"),
        (Teachers([tmp_path / "a", tmp_path / "b"]), "several teachers"),
    ):
        with pytest.raises(ValueError, match=f'decode="cuda" does not fit .*{why}.*; use decode="cpu"') as refused:
            SparseLogitDataset(source, decode="cuda")
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match='decode="cuda" makes batches, not the single sequences'):
        SparseLogitDataset(tmp_path / "a", None, decode="cuda")
    with pytest.raises(ValueError, match="decode must be 'cpu' or 'cuda', got 'gpu'"):
        SparseLogitDataset(tmp_path / "a", decode="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match='decode="cuda" needs a GPU, and torch sees none here'):
        SparseLogitDataset(tmp_path / "a", decode="cuda")


def test_where_records_are_decoded_is_chosen_for_whoever_trains(tmp_path):
    """By a GPU that trains and knows them, which is said; an order that it cannot follow is refused."""
    write_cache(tmp_path / "a")
    write_ratios(tmp_path / "ratios.skl")
    counts, ratios = (Sources.of(tmp_path / name, None, None) for name in ("a", "ratios.skl"))
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    for asked in ("auto", "cuda"):
        where, note = counts.decoding(asked, gpu)
        assert (where, note.partition(": ")[2]) == (
            "cuda",
            "the GPU decodes the records and checks them before each step",
        )
    for asked, device in (("cpu", gpu), ("cpu", cpu), ("auto", cpu)):
        assert counts.decoding(asked, device) == ratios.decoding(asked, device) == ("cpu", "")
    where, note = ratios.decoding("auto", gpu)
    assert where == "cpu"
    assert "ratios.skl: the host decodes the records, of kind 'ratios'" in note
    with pytest.raises(ValueError, match='decode="cuda" needs a student that trains on a GPU, it is on cpu; use'):
        counts.decoding("cuda", cpu)
    with pytest.raises(ValueError, match="does not fit kind 'ratios'"):
        ratios.decoding("cuda", gpu)

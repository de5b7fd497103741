"""cache_teacher: text and a teacher in, a finished cache out; stopped, gone on with, refused."""

import dataclasses
import re
import shutil
import signal

import forked
import numpy as np
import pytest
import teacher_data
import tiny
import torch
import transformers
from capture_data import shard_bytes
from teacher_data import SEQ_LEN, make_teacher

import sklformat as skl
from sklformat.distill.models import heads, loading, outputs, tokenization
from sklformat.distill.models.identities import config_fingerprint, model_fingerprint
from sklformat.distill.teacher import caching, drawing, forward
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.distill.teacher.ranks import Ranks
from sklformat.distill.text.corpus import Document, TokenStore, tokenizer_fingerprint, write_token_store
from sklformat.distill.text.packing import PackedSequences
from sklformat.sampler import draw
from sklformat.settings.cache import CacheConfig


@pytest.fixture(scope="module")
def teacher(place):
    return place / "teacher"


@pytest.fixture(scope="module")
def tokenizer(teacher):
    return loading.load_tokenizer(teacher)


@pytest.fixture
def config(place, tmp_path):
    def make(out="cache", **changes):
        settings = {
            "teacher": str(place / "teacher"),
            "text": (place / "text",),
            "out": tmp_path / out,
            "seq_len": SEQ_LEN,
            "num_sequences": 22,
            "rounds": 20,
            "batch_size": 4,
            "sequences_per_shard": 10,
            "seed": 5,
            "packing_seed": 6,
        }
        return CacheConfig(**settings | changes)

    return make


def test_cache_holds_what_the_teacher_says(config, teacher, tokenizer):
    """Each sequence is the packed one, each record the draw from the teacher's logits there, and the cache is sound."""
    summary = cache_teacher(config())
    assert [] == skl.verify(config().out)
    cache = skl.open(config().out)
    assert 22 == len(cache)
    assert (22, 22, 22 * SEQ_LEN) == (summary.sequences, summary.sequences_made, summary.positions)
    assert cache.fingerprint == summary.fingerprint
    assert ["shard-00000.skl", "shard-00001.skl", "shard-00002.skl"] == sorted(shard_bytes(config().out))
    assert [] == list(config().out.glob("*.partial"))
    packed = PackedSequences(config().out / "tokens", seq_len=SEQ_LEN, separator_id=0, seed=6, count=22)
    model = loading.load_model(teacher)
    unique = 0
    for i in range(22):
        assert packed[i].tolist() == cache[i].tokens.tolist()
        cache.check_alignment(i, packed[i])
        # The grid of batches: shards begin at 0, 10, 20; batches at 0, 4, 8 within them.
        first = i // 10 * 10 + i % 10 // 4 * 4
        last = min(first + 4, i // 10 * 10 + 10, 22)
        ids = torch.from_numpy(np.stack([packed[j][:-1].astype(np.int64) for j in range(first, last)]))
        with torch.inference_mode():
            hidden = outputs.hidden_states(model, ids)[i - first]
            logits = hidden @ heads.plain_weight(model).T
        assert draw(logits, rounds=20, sampler="systematic", seed=5, sequence=i) == cache[i].targets
        unique += cache[i].targets.num_records
    assert unique / (22 * SEQ_LEN) == summary.unique_tokens
    assert 2 < summary.unique_tokens < 20


def test_header_says_how_the_cache_was_made(config, teacher, tokenizer):
    """Teacher, tokenizer, corpus, packing, draws and versions stand in the header."""
    cache_teacher(config())
    header = skl.open(config().out).header
    assert (280, SEQ_LEN, "counts", 20, "systematic") == (
        header.vocab_size,
        header.seq_len,
        header.kind,
        header.rounds,
        header.sampler,
    )
    assert (5, 6) == (header.sampling_seed, header.packing_seed)
    assert tokenizer_fingerprint(tokenizer) == header.tokenizer_fingerprint
    assert model_fingerprint(loading.load_model(teacher)) == header.teacher_fingerprint
    assert TokenStore(config().out / "tokens").facts.corpus_fingerprint == header.corpus_fingerprint
    config_digest = config_fingerprint(loading.load_model(teacher))
    assert {"dtype": "float32", "device": "cpu", "config": config_digest} == header.capture["teacher"]
    assert 0 == header.capture["packing"]["separator_id"]
    assert torch.__version__ == header.capture["versions"]["torch"]


def test_second_run_does_nothing(config, monkeypatch):
    """The same command again finds all there: the teacher does not run, no byte changes."""
    first = cache_teacher(config())
    before = shard_bytes(config().out)
    monkeypatch.setattr(forward.Teacher, "run", None)
    second = cache_teacher(config())
    assert (0, 0.0, first.fingerprint) == (second.sequences_made, second.positions_per_second, second.fingerprint)
    assert before == shard_bytes(config().out)
    assert "all there already" in str(second)


@pytest.mark.parametrize("stop_at", [0, 6, 10, 17])
def test_stopped_run_goes_on_to_the_same_bytes(config, monkeypatch, stop_at):
    """Ctrl-C loses nothing that was kept; the same command again ends with the bytes of an undisturbed run."""
    batches = []
    run, draw_sequence = forward.Teacher.run, drawing.Drawer.draw

    def recorded(teacher, ids):
        batches.append(ids.tolist())
        return run(teacher, ids)

    monkeypatch.setattr(forward.Teacher, "run", recorded)
    cache_teacher(config("whole"))
    whole = [*batches]

    def stopping(drawer, sequence, *rest):
        if sequence == stop_at:
            raise KeyboardInterrupt
        return draw_sequence(drawer, sequence, *rest)

    monkeypatch.setattr(drawing.Drawer, "draw", stopping)
    with pytest.raises(KeyboardInterrupt, match=rf"stopped: {stop_at} of 22 sequences"):
        cache_teacher(config("stopped"))
    monkeypatch.setattr(drawing.Drawer, "draw", draw_sequence)
    batches.clear()
    summary = cache_teacher(config("stopped"))
    assert 22 - stop_at == summary.sequences_made
    assert shard_bytes(config("whole").out) == shard_bytes(config("stopped").out)
    # Larger teachers give other last bits in batches of another shape; so every batch must be one of the whole run's.
    assert [] == [batch for batch in batches if batch not in whole]


def test_stopped_run_goes_on_to_more_sequences(config, monkeypatch):
    """A capture of 14 sequences, stopped before its last, goes on to 22 and has the bytes of one that began so."""
    cache_teacher(config("whole"))
    draw_sequence = drawing.Drawer.draw

    def stopping(drawer, sequence, *rest):
        if sequence == 13:
            raise KeyboardInterrupt
        return draw_sequence(drawer, sequence, *rest)

    monkeypatch.setattr(drawing.Drawer, "draw", stopping)
    with pytest.raises(KeyboardInterrupt, match="stopped: 13 of 14 sequences"):
        cache_teacher(config("stopped", num_sequences=14))
    monkeypatch.setattr(drawing.Drawer, "draw", draw_sequence)
    assert 9 == cache_teacher(config("stopped")).sequences_made
    assert shard_bytes(config("whole").out) == shard_bytes(config("stopped").out)


def test_killed_run_goes_on_to_the_same_bytes(config):
    """After kill -9 of the teacher's process the same command ends with the bytes of an undisturbed run."""
    cache_teacher(config("whole"))
    killed = forked.run(teacher_data.cache_with_a_signal, signal.SIGKILL, 17, config("killed"))
    assert -signal.SIGKILL == killed.status
    summary = cache_teacher(config("killed"))
    assert 5 <= summary.sequences_made <= 12  # the first shard is sealed; the writer may have lost none of the second
    assert shard_bytes(config("whole").out) == shard_bytes(config("killed").out)
    assert [] == skl.verify(config("killed").out)


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"rounds": 21}, "20.*21|21.*20"),
        ({"seed": 7}, "5.*7|7.*5"),
        ({"packing_seed": 7}, "6.*7|7.*6"),
        ({"batch_size": 2}, "batch_size"),
        ({"num_sequences": 21}, "num_sequences"),
        ({"sequences_per_shard": 11}, "sequences_per_shard"),
    ],
)
def test_cache_of_other_settings_is_refused(config, change, both):
    """A directory with a cache of other settings is refused with both values, and stays as it is."""
    cache_teacher(config())
    before = shard_bytes(config().out)
    with pytest.raises(skl.SettingsError) as raised:
        cache_teacher(config(**change))
    assert re.search(both, str(raised.value))
    assert before == shard_bytes(config().out)


def test_how_many_sequences_changes_none_of_them(config):
    """A longer cache has the same key and begins with the same sequences; a finished one may become longer."""
    for name, count in (("short", 10), ("ragged", 13), ("long", 22)):
        cache_teacher(config(name, num_sequences=count))
    short, ragged, long = (skl.open(config(name).out) for name in ("short", "ragged", "long"))
    assert 1 == len({cache.header.cache_key for cache in (short, ragged, long)})
    assert list(short) == list(long)[:10]
    assert list(ragged) == list(long)[:13]
    expected = shard_bytes(config("long").out)
    for name in ("short", "ragged"):
        made = cache_teacher(config(name)).sequences_made
        assert {"short": 12, "ragged": 9}[name] == made
        assert expected == shard_bytes(config(name).out)
        assert (config("long").out / "manifest.json").read_text() == (config(name).out / "manifest.json").read_text()


def with_added_token(teacher, directory):
    """The teacher again, whose tokenizer has one token more than its head."""
    tokenizer = loading.load_tokenizer(teacher)
    tokenizer.add_tokens(["<img>"])
    loading.save(loading.load_model(teacher), tokenizer, directory)
    return directory


def test_a_token_that_the_teacher_lacks_is_refused_only_where_text_holds_it(config, teacher, tmp_path):
    """One id beyond the head neither widens V nor changes a cache's ids; a text that holds it is named, with the id."""
    wider = with_added_token(teacher, tmp_path / "wider")
    cache_teacher(config("plain", num_sequences=4))
    cache_teacher(config("wider-cache", num_sequences=4, teacher=str(wider)))
    plain, wide = skl.open(tmp_path / "plain"), skl.open(tmp_path / "wider-cache")
    assert plain.header.vocab_size == wide.header.vocab_size == 280
    assert plain.header.capture["tokenizer"] == wide.header.capture["tokenizer"]
    assert plain.header.tokenizer_fingerprint != wide.header.tokenizer_fingerprint
    assert [block.targets.token_ids.tolist() for block in plain] == [block.targets.token_ids.tolist() for block in wide]
    text = tmp_path / "image.txt"
    text.write_text("def x " * 40 + "<img> return")
    refused = r"holds '<img>' \(id 280\), which the tokenizer has and the model, with ids below 280, has not"
    with pytest.raises(ValueError, match=rf"image\.txt: {refused}"):
        cache_teacher(config("refused", text=(text,), teacher=str(wider), num_sequences=1))
    tokenizer = loading.load_tokenizer(wider)
    documents = [Document("a", "def x " * 99), Document("b", text.read_text())]
    for name, there in (("fits", documents[:1]), ("does-not", documents)):
        tiny.write_store(tmp_path / name, tokenizer, there)
    given = {"text": (), "teacher": str(wider), "num_sequences": 1}
    cache_teacher(config("of-store", tokens=tmp_path / "fits", **given))
    with pytest.raises(ValueError, match=rf"does-not: document 1: {refused}"):
        cache_teacher(config("refused-store", tokens=tmp_path / "does-not", **given))


def test_a_cache_that_does_not_say_its_map_goes_on(config, monkeypatch):
    """What was begun before the map from ids to tokens was said resumes to the bytes that it would have had."""

    def as_before(*args, **named):
        header = make_header(*args, **named)
        return dataclasses.replace(header, capture={k: v for k, v in header.capture.items() if k != "tokenizer"})

    make_header = caching.make_header
    with monkeypatch.context() as patch:
        patch.setattr(caching, "make_header", as_before)
        cache_teacher(config("whole"))
        cache_teacher(config("begun", num_sequences=10))
    cache_teacher(config("begun"))
    assert shard_bytes(config("whole").out) == shard_bytes(config("begun").out)


def test_tokens_of_a_tokenizer_with_other_roles_are_taken(config, teacher, tmp_path):
    """A store whose tokenizer has the same ids and another padding token is as good as the teacher's own."""
    tokenizer = loading.load_tokenizer(teacher)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(7)
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(loading.load_tokenizer(teacher))
    tiny.write_store(tmp_path / "store", tokenizer, [Document("a", "def x " * 99)])
    assert 1 == cache_teacher(config(text=(), tokens=tmp_path / "store", num_sequences=1)).sequences


def test_other_text_and_other_tokenizer_are_refused(config, tokenizer, tmp_path):
    """Other text in the same directory, or a token store of another tokenizer, is refused."""
    cache_teacher(config())
    (tmp_path / "other.txt").write_text("other text " * 400)
    with pytest.raises(skl.SettingsError, match="text"):
        cache_teacher(config(text=(tmp_path / "other.txt",)))
    foreign = tokenization.train_tokenizer(["x y z"], 260)
    write_token_store(
        tmp_path / "foreign",
        [Document("d", "x y z " * 999)],
        tokenization.TextEncoder(foreign, bos="none"),
        vocab_size=260,
        tokenizer_fingerprint=tokenizer_fingerprint(foreign),
    )
    with pytest.raises(skl.SettingsError, match="made by a different tokenizer from the teacher's"):
        cache_teacher(config("new", text=(), tokens=tmp_path / "foreign"))


def test_token_store_serves_instead_of_text(config, tmp_path):
    """A store made earlier gives the cache that its text gives."""
    cache_teacher(config())
    shutil.copytree(config().out / "tokens", tmp_path / "store")
    cache_teacher(config("second", text=(), tokens=tmp_path / "store"))
    assert shard_bytes(config().out) == shard_bytes(config("second").out)


def test_padded_head_gives_no_id_beyond_the_tokenizer(config, tokenizer, tmp_path):
    """A head wider than the tokenizer is cut: padding is no token, whatever its logits."""
    model = make_teacher(304)
    with torch.no_grad():
        model.lm_head.weight[280:] *= 50
    loading.save(model, tokenizer, tmp_path / "padded")
    cache_teacher(config(teacher=str(tmp_path / "padded")))
    cache = skl.open(config().out)
    assert 280 == cache.header.vocab_size
    assert all(int(sequence.targets.token_ids.max()) < 280 for sequence in cache)
    assert [] == skl.verify(config().out)


def test_head_that_is_no_single_matrix_works(config, tokenizer, tmp_path):
    """A teacher that scales its logits is captured from its own logits."""
    settings = {"vocab_size": 280, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": SEQ_LEN}
    cohere = transformers.CohereConfig(num_hidden_layers=1, num_attention_heads=2, logit_scale=0.25, **settings)
    torch.manual_seed(0)
    loading.save(transformers.CohereForCausalLM(cohere), tokenizer, tmp_path / "cohere")
    cache_teacher(config(teacher=str(tmp_path / "cohere"), num_sequences=2))
    cache = skl.open(config().out)
    ids = torch.from_numpy(np.stack([cache[i].tokens[:-1].astype(np.int64) for i in range(2)]))
    with torch.inference_mode():
        logits = outputs.logits(loading.load_model(tmp_path / "cohere"), ids)
    assert draw(logits[1], rounds=20, sampler="systematic", seed=5, sequence=1) == cache[1].targets


def test_slices_of_positions_change_nothing(config, monkeypatch):
    """How many positions are drawn at a time is no setting: records are keyed by position."""
    cache_teacher(config("whole", num_sequences=4))
    monkeypatch.setitem(forward.LOGITS_AT_ONCE, "cpu", 280 * 7)
    cache_teacher(config("sliced", num_sequences=4))
    whole, sliced = skl.open(config("whole").out), skl.open(config("sliced").out)
    same = [whole[i].targets == sliced[i].targets for i in range(4)]
    # A matrix product of another shape may differ in its last bit, which can move a draw.
    assert sum(same) >= 3


def test_logits_that_are_not_finite_are_refused(config, tokenizer, tmp_path):
    """NaN in a teacher's logits stops the capture with sequence and position; nothing false is kept."""
    model = make_teacher()
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float("nan")
    loading.save(model, tokenizer, tmp_path / "bad")
    with pytest.raises(ValueError, match="sequence 0, position 0: the logits hold NaN"):
        cache_teacher(config(teacher=str(tmp_path / "bad")))
    assert {} == shard_bytes(config().out)


def test_type_and_device_follow_the_machine(config, monkeypatch):
    """bfloat16 on a GPU and float32 on the CPU unless told; each rank of a machine has a GPU of its own."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    types = [caching._dtype(config(dtype=name), device) for name in ("auto", "float16") for device in (cpu, gpu)]
    assert ["float32", "bfloat16", "float16", "float16"] == types
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    ranks = [Ranks(rank=rank, world_size=4, local_rank=rank % 2, local_world_size=2) for rank in range(4)]
    assert [torch.device("cuda", n) for n in (0, 1, 0, 1)] == [caching._devices(config(), r)[0] for r in ranks]
    assert (gpu, []) == caching._devices(config(), Ranks())
    spread = [caching._devices(config(device_map="auto"), rank) for rank in ranks[:2]]
    assert [(torch.device("cuda", 0), [0, 1]), (torch.device("cuda", 2), [2, 3])] == spread
    with pytest.raises(ValueError, match="cuda:1 is one GPU, this machine runs 2 processes"):
        caching._devices(config(device="cuda:1"), ranks[0])
    with pytest.raises(ValueError, match="spreads the teacher over several CUDA devices, device is cuda:1"):
        caching._devices(config(device_map="auto", device="cuda:1"), Ranks())


def test_moved_teacher_is_the_same_one(config, teacher, tmp_path):
    """A cache is gone on with from a copy of the teacher under another name: its weights say which one it is."""
    first = cache_teacher(config())
    shutil.copytree(teacher, tmp_path / "copy")
    assert first.fingerprint == cache_teacher(config(teacher=str(tmp_path / "copy"))).fingerprint


def test_directory_in_use_is_refused_before_any_work(config, monkeypatch):
    """A second run into one directory neither tokenises nor loads a teacher; the first holds it while it does."""
    load_model = loading.load_model

    def second(*args, **kwargs):
        monkeypatch.setattr(loading, "load_model", None)
        with pytest.raises(skl.InUseError, match="another process is writing here"):
            cache_teacher(config(num_sequences=2))
        return load_model(*args, **kwargs)

    monkeypatch.setattr(loading, "load_model", second)
    assert 2 == cache_teacher(config(num_sequences=2)).sequences_made


def test_directory_with_other_files_is_refused(config):
    """A cache never mixes with someone's own files; what a run that was stopped early left is no hindrance."""
    out = config().out
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(skl.SettingsError, match=r"not empty and holds no cache \(thesis\.tex is there\)"):
        cache_teacher(config(num_sequences=2))
    assert ["thesis.tex"] == [path.name for path in out.iterdir()]
    (out / "thesis.tex").unlink()
    (out / "tokens.partial").mkdir()
    for name in (".lock", ".writer.lock"):
        (out / name).touch()
    assert 2 == cache_teacher(config(num_sequences=2)).sequences_made


def test_too_short_text_leaves_nothing_behind(config, tmp_path):
    """A text that was too short does not stop the next run, which has more of it; other text is named as such."""
    (tmp_path / "grows.txt").write_text("x = 1\n")
    settings = config(text=(tmp_path / "grows.txt",), num_sequences=2)
    with pytest.raises(ValueError, match="too short"):
        cache_teacher(settings)
    (tmp_path / "grows.txt").write_text("x = 1\n" * 200)
    assert 2 == cache_teacher(settings).sequences_made
    (tmp_path / "grows.txt").write_text("x = 1\n" * 201)
    with pytest.raises(
        skl.SettingsError, match=r"the tokens there were made of other text.*sklformat merge joins their"
    ):
        cache_teacher(settings)


def test_bad_input_is_named_before_the_teacher_runs(config, tmp_path):
    """What cannot work is said at once: no text, short text, too long sequences, contradicting settings."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text found"):
        cache_teacher(config(text=(tmp_path / "empty",)))
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(ValueError, match="too short"):
        cache_teacher(config("short", text=(tmp_path / "short.txt",), num_sequences=None))
    with pytest.raises(ValueError, match=f"seq_len 25 is beyond the {SEQ_LEN} positions"):
        cache_teacher(config(seq_len=25))
    with pytest.raises(OSError, match="nowhere"):
        cache_teacher(config(teacher=str(tmp_path / "nowhere")))
    for change, message in (
        ({"tokens": tmp_path}, "give one of --text, --dataset and --tokens"),
        ({"text": ()}, "give one of --text, --dataset and --tokens"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"sampler": "topk"}, "needs k"),
        ({"sampler": "topp"}, "needs p"),
        ({"k": 3}, "belong to topk"),
        ({"sampler": "topk", "k": 3, "proposal_temperature": 0.5}, "draws nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**change)

"""
Caches in an S3 store: moto's server on localhost, behind s3fs and a proxy that fails as stores and networks do.

Whatever fails, a result is exactly that of a local cache, or one line says what failed where.
"""

import collections
import json
import os
import re
import shutil
import signal
import threading

import forked
import pytest
from strategies import make_listed_cache
from system import HANGS, complaint

import sklformat as skl
from sklformat.distill import SparseLogitDataset
from sklformat.files import remote
from sklformat.files.copies import PIECE, LocalCopies

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]
pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")
fsspec = pytest.importorskip("fsspec")
s3_proxy = pytest.importorskip("s3_proxy")
s3_runs = pytest.importorskip("s3_runs")

# A store that stalls is given up after two seconds, and what fails is asked for again by s3fs alone, which waits less.
QUICK = {"config_kwargs": {"read_timeout": 2, "retries": {"max_attempts": 0}}}
FOUND_BY = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "FSSPEC_S3", "HOME")
PASSING = ("slow down", "stall", "cut", "short", "lost")


@pytest.fixture(scope="module")
def server():
    with s3_proxy.serving() as proxy:
        yield proxy


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    """The proxy, without a fault; this process and its children find it, and have local copies of this test's own."""
    for name, value in s3_proxy.environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSSPEC_S3", json.dumps(QUICK))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(fsspec.config.conf, "s3", QUICK)
    s3fs.S3FileSystem.clear_instance_cache()
    server.plan, server.delay = None, 0.0
    server.thaw_listing()
    server.clear()
    yield server
    server.plan = None
    server.thaw_listing()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def url(request):
    """A directory of this test's own."""
    return f"s3://{s3_proxy.BUCKET}/{request.node.name.translate(str.maketrans('[] ', '---'))}"


def upload(local, url):
    for name in files_of(local):
        remote.upload(local / name, f"{url}/{name}")


def run(*words):
    return forked_run(s3_runs.command, words)


def forked_run(function, *arguments):
    """A process that finds what this one finds now."""
    return forked.run(function, *arguments, **{name: os.environ[name] for name in FOUND_BY if name in os.environ})


def run_well(*words):
    """What a command prints; it must succeed."""
    status, out, err = run(*words)
    assert status == 0, err
    assert complaint(err) == ""
    return out


def content(url):
    """Every file of a directory of the store, asked for at the server itself."""
    fs = s3fs.S3FileSystem()
    fs.invalidate_cache()
    return {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find(url.removeprefix("s3://"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher and its text, and the cache that an undisturbed capture makes of them here."""
    from teacher_data import write_teacher, write_text

    folder = tmp_path_factory.mktemp("taught")
    write_teacher(folder / "teacher", write_text(folder / "text"))
    status, _, err = forked_run(s3_runs.command, capture(folder, folder / "cache"))
    assert status == 0, err
    return folder


def capture(place, out, *more):
    """The words of a capture of some shards."""
    return [
        "cache", "--teacher", place / "teacher", "--text", place / "text", "--out", out, "--seq-len", "24",
        "--num-sequences", "40", "--sequences-per-shard", "8", "--rounds", "20", "--device", "cpu", *more,
    ]  # fmt: skip


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".skl", ".json")}


def test_a_cache_in_the_store(store, url, tmp_path):
    """What is uploaded reads and verifies as here; damage, a shard that is gone and no manifest are named."""
    local = make_listed_cache(tmp_path / "cache")
    upload(local, url)
    assert [] == skl.verify(url)
    with skl.open(local) as here, skl.open(url, copies=LocalCopies(tmp_path / "copies")) as there:
        assert here.fingerprint == there.fingerprint
        assert [s.targets for s in here] == [s.targets for s in there]
    fs, path = s3fs.S3FileSystem(), url.removeprefix("s3://")
    data = bytearray((local / "shard-00000.skl").read_bytes())
    data[4096 + 70] ^= 1
    fs.pipe_file(f"{path}/shard-00000.skl", bytes(data))
    (problem,) = skl.verify(url)
    assert (f"{url}/shard-00000.skl", "CorruptError", 4096, 0) == (
        problem.path, problem.error, problem.offset, problem.sequence,
    )  # fmt: skip
    fs.rm(f"{path}/shard-00001.skl")
    assert ["CorruptError", "MissingShardError"] == [p.error for p in skl.verify(url)]
    with (
        skl.open(url, copies=LocalCopies(tmp_path / "gone")) as there,
        pytest.raises(skl.MissingShardError, match=r"shard-00001\.skl: sequences 3\.\.4 are missing"),
    ):
        there[3]
    fs.rm(f"{path}/manifest.json")
    assert "UnfinishedError" in [p.error for p in skl.verify(url)]


def test_a_bucket_that_is_not_there(store, tmp_path):
    """It is named, and not made."""
    (tmp_path / "x").write_bytes(b"1234")
    with pytest.raises(skl.RemoteError, match="there is no mistyped in the store; make it, or correct the URL"):
        remote.upload(tmp_path / "x", "s3://mistyped/cache/x")
    assert not s3fs.S3FileSystem().exists("mistyped")


@pytest.mark.parametrize("fault", [None, *PASSING])
def test_a_capture_that_is_killed(store, url, place, tmp_path, fault):
    """Killed half way and run again, while requests fail: the bytes of an undisturbed capture here."""
    out = capture(place, url, "--work-dir", tmp_path / "work")
    store.plan = fault and s3_proxy.seeded(1, 0.3, (fault,))
    assert -signal.SIGKILL == forked_run(s3_runs.killed_capture, 19, out).status
    run_well(*out)
    assert fault is None or store.struck[fault] > 0
    store.plan = None
    assert files_of(place / "cache") == content(url)
    assert {} == files_of(tmp_path / "work")
    assert [] == skl.verify(url)


def test_a_capture_under_a_listing_that_lags(store, url, place, tmp_path):
    """A store whose listing shows nothing of what came since the beginning gets each shard once, and the manifest."""
    store.freeze_listing()
    out = capture(place, url, "--work-dir", tmp_path / "work")
    assert -signal.SIGKILL == forked_run(s3_runs.killed_capture, 19, out).status
    run_well(*out)
    assert 6 + 2 == store.answered["PUT"]  # and an empty file at each of the two beginnings
    assert 40 == json.loads(run_well("inspect", url, "--json"))["sequences"]
    assert [] == json.loads(run_well("verify", url, "--json"))["problems"]
    store.thaw_listing()
    assert files_of(place / "cache") == content(url)
    # Now one that is gone is shown still.
    store.freeze_listing()
    s3fs.S3FileSystem().rm(f"{url.removeprefix('s3://')}/shard-00002.skl")
    status, report, _ = run("verify", url)
    assert status == 3
    assert "sequences 16..23 are missing before shard-00003.skl" in report
    shutil.rmtree(tmp_path / "home")  # where a copy of it is
    status, _, err = run("stats", url)
    assert status == 1
    assert f"{url}/shard-00002.skl: sequences 16..23 are missing; put the shard back or capture it again" in complaint(
        err
    )
    assert "8 made now" in run_well(*out)
    store.thaw_listing()
    assert files_of(place / "cache") == content(url)


@pytest.mark.parametrize("fault", PASSING)
def test_reading_while_requests_fail(store, url, place, fault):
    """verify, inspect, stats and one sequence say of the store's cache what they say of the local one."""
    upload(place / "cache", url)
    store.plan = s3_proxy.seeded(2, 0.4, (fault,))
    for words in (("verify",), ("inspect", "--json"), ("stats", "--json"), ("inspect", "--sequence", "17")):
        verb, *rest = words
        there, here = run_well(verb, url, *rest), run_well(verb, place / "cache", *rest)
        there = there.replace(url, str(place / "cache"))
        if "--json" in rest:  # when it was sealed is said by the files here, and by nothing there
            there, here = ({**json.loads(text), "sealed": None} for text in (there, here))
        assert there == here if "--json" in rest else there.split() == here.split()  # lines break where a name ends
    assert store.struck[fault] > 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("slow down", "Please reduce your request rate"),
        ("forbidden", "Access Denied"),
        ("cut", "Response payload is not completed"),
        ("short", r"Expected checksum|asked 4 times for \d+ bytes from byte 0 on, got"),  # of a whole file: of botocore
        ("lost", "Connection was closed before we received a valid response"),
    ],
)
def test_a_store_that_keeps_failing(store, url, place, tmp_path, fault, reason):
    """One line with URL, cause and next action, and no smaller cache; once the store is well, so is the command."""
    upload(place / "cache", url)
    for words in (["verify", url], ["inspect", url], train(place, url, tmp_path / "student")):
        store.plan = lambda request: fault if request.kind == "GET" and request.key.endswith(".skl") else None
        shutil.rmtree(tmp_path / "home", ignore_errors=True)  # without what the last command has copied
        status, out, err = run(*words)
        assert (status, out) == (1, "")
        line = complaint(err)
        assert f"{url}/shard-00000.skl: " in line
        assert re.search(reason, line)
        assert "run the same command again" in line
        store.plan = None
        run_well(*words)


def test_an_upload_that_keeps_failing(store, url, place, tmp_path):
    """The capture ends with one line, keeps what it could not upload, and uploads it when it is run again."""
    out = capture(place, url, "--work-dir", tmp_path / "work")
    store.plan = lambda request: "forbidden" if request.kind == "PUT" and "00002" in request.key else None
    status, _, err = run(*out)
    assert status == 1
    assert f"{url}/shard-00002.skl: cannot be written (Access Denied); {tmp_path}/work/shard" in complaint(err)
    assert "manifest.json" not in content(url)
    store.plan = None
    run_well(*out)
    assert files_of(place / "cache") == content(url)


def train(place, cache, out, *more):
    return [
        "train", "--cache", cache, "--tokenizer", place / "teacher", "--out", out, "--steps", "12", "--batch-size", "3",
        "--window", "12", "--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--save-every", "5",
        "--log-every", "1", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def student(place):
    """Weights after training on the local cache."""
    status, _, err = forked_run(s3_runs.command, train(place, place / "cache", place / "student"))
    assert status == 0, err
    return (place / "student" / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", PASSING)
def test_training_while_requests_fail(store, url, place, tmp_path, student, fault):
    """Trained in windows from the store, killed and resumed by two workers, a student is that of the local cache."""
    upload(place / "cache", url)
    store.plan = s3_proxy.seeded(3, 0.4, (fault,))
    words = train(place, url, tmp_path / "student")
    assert -signal.SIGKILL == forked_run(s3_runs.killed_training, 7, words).status
    shutil.rmtree(tmp_path / "home")  # another machine, without the local copies
    run_well(*words, "--num-workers", "2")
    assert student == (tmp_path / "student" / "model" / "model.safetensors").read_bytes()
    assert store.struck[fault] > 0


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A cache of some mebibytes in three shards."""
    import scale

    directory = tmp_path_factory.mktemp("large") / "cache"
    scale.write_small(directory, 120, 40, 1024)
    return directory


def test_local_copies_stay_within_their_bound(store, url, large, tmp_path):
    """Two workers read an epoch in windows under faults; copies are evicted, and batches are the local ones."""
    from loader_data import rows
    from torch.utils.data import DataLoader

    upload(large, url)
    store.clear()
    store.plan = s3_proxy.seeded(4, 0.2, PASSING)
    bound, folder, seen = 2 * (PIECE + 8) + 64, tmp_path / "copies", []
    over = threading.Event()

    def watch():
        while not over.wait(0.002):
            seen.append(s3_runs.bytes_under(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with skl.open(url, copies=LocalCopies(folder, bound)) as there:
            dataset = SparseLogitDataset(there, batch_size=4, window=40)
            found = rows(DataLoader(dataset, batch_size=None, num_workers=2, timeout=HANGS))
    finally:
        over.set()
        watcher.join()
    with skl.open(large) as here:
        assert rows(SparseLogitDataset(here, batch_size=4, window=40)) == found
        assert here.size_bytes > 2 * bound
    assert s3_runs.bytes_under(folder) <= bound
    assert max(seen) <= bound + 2 * (PIECE + 8)  # each of two processes has put a piece there and makes room for it
    assert sum(store.struck.values()) > 0


def test_parts_of_a_large_upload_whose_answers_are_lost(store, url, tmp_path, monkeypatch):
    """A file of several parts is whole although an answer to each kind of request is lost after the server did it."""
    local = tmp_path / "large.skl"
    with local.open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(101 << 20)
    lost = collections.Counter()

    def plan(request):
        lost[request.kind] += 1
        return "lost" if request.kind in ("BEGIN", "PART", "COMPLETE") and lost[request.kind] == 1 else None

    monkeypatch.setitem(fsspec.config.conf, "s3", {})  # with the time that s3fs gives it
    store.plan = plan
    remote.upload(local, f"{url}/large.skl")
    assert min(lost["BEGIN"], lost["PART"], lost["COMPLETE"]) > 1
    assert local.stat().st_size == remote.size(f"{url}/large.skl")

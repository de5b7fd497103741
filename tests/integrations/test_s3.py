"""A cache in an S3 store: moto's server on localhost, behind s3fs; verified, damaged, and read through local copies."""

import pytest
from strategies import make_listed_cache

import sklformat as skl
from sklformat.files import remote
from sklformat.files.copies import LocalCopies

pytestmark = pytest.mark.integration
server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")

URL = "s3://caches/cache"


@pytest.fixture
def store(monkeypatch):
    """A bucket of a server of this test's own; credentials and the endpoint are what s3fs reads."""
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (names | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(name, value)
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.mkdir("caches")
    yield fs
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_cache_in_the_store(store, tmp_path):
    """What is uploaded reads and verifies as here; damage, a shard that is gone and no manifest are named."""
    local = make_listed_cache(tmp_path / "cache")
    for path in sorted(local.iterdir()):
        remote.upload(path, f"{URL}/{path.name}")
    assert [] == skl.verify(URL)
    with skl.open(local) as here, skl.open(URL, copies=LocalCopies(tmp_path / "copies")) as there:
        assert here.fingerprint == there.fingerprint
        assert [s.targets for s in here] == [s.targets for s in there]
    data = bytearray((local / "shard-00000.skl").read_bytes())
    data[4096 + 70] ^= 1
    store.pipe_file("caches/cache/shard-00000.skl", bytes(data))
    (problem,) = skl.verify(URL)
    assert (f"{URL}/shard-00000.skl", "CorruptError", 4096, 0) == (
        problem.path, problem.error, problem.offset, problem.sequence,
    )  # fmt: skip
    store.rm("caches/cache/shard-00001.skl")
    assert ["CorruptError", "MissingShardError"] == [p.error for p in skl.verify(URL)]
    store.rm("caches/cache/manifest.json")
    assert "UnfinishedError" in [p.error for p in skl.verify(URL)]

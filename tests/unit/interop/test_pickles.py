"""The door to pickles: tensors and arrays come through, nothing that a file says is run."""

import contextlib
import io
import os
import pickle

import numpy as np
import pytest

import sklformat as skl
from sklformat.interop.tables.pickles import read_npy, read_torch

torch = pytest.importorskip("torch")


class Runs:
    """An object whose pickle would run a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return io.BytesIO(file.getvalue())


def ragged(*rows):
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
def test_tensors_become_arrays(tmp_path, old, in_memory):
    """Of files of both kinds that PyTorch has had, on disk and in memory."""
    path = tmp_path / "a.pt"
    low = torch.uint8 if old else torch.uint16  # a type that old files have not
    content = {
        "low": [torch.arange(3).to(low)],
        "values": (torch.tensor([[1.5, -2.25]], dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.float16)),
        "text": "x",
        "none": None,
    }
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    found = read_torch(path, path.read_bytes() if in_memory else None)
    assert found["text"] == "x"
    assert found["none"] is None
    assert found["low"][0].dtype == (np.uint8 if old else np.uint16)
    assert found["low"][0].tolist() == [0, 1, 2]
    assert found["values"][0].dtype == np.float32
    assert found["values"][0].tolist() == [[1.5, -2.25]]
    assert found["values"][1].dtype == np.float16


def test_a_torch_file_that_runs_something(tmp_path):
    """It is refused in one line, and nothing runs."""
    path = tmp_path / "a.pt"
    torch.save([Runs(tmp_path / "ran")], path)
    with pytest.raises(skl.CorruptError, match=r"a\.pt: torch\.load\(weights_only=True\) refuses it: ") as error:
        read_torch(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_torch_file_cut_anywhere(tmp_path):
    """Any beginning of a file is refused."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(5)}, path)
    content = path.read_bytes()
    for end in range(0, len(content), 97):
        path.write_bytes(content[:end])
        with pytest.raises(skl.CorruptError):
            read_torch(path)
        with pytest.raises(skl.CorruptError):
            read_torch(path, content[:end])


@pytest.mark.parametrize(
    "array",
    [
        ragged(np.arange(3), np.arange(4, dtype=">i2")),
        ragged([1, 2, None, "text"], [[1.5], []]),
        np.array([[[1, 2], [3, 4]]], object),
        np.asfortranarray(np.array([[1, None, 3], [4, 5, 6]], object)),
        ragged(np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)), ragged(np.zeros(0, bool))),
        np.arange(4.0),
        np.array(["ab", "c"]),
    ],
)
def test_arrays_of_objects(tmp_path, array):
    """Whatever numpy writes of numbers, texts, lists and arrays comes back as numpy itself would read it."""

    def plain(value):
        if isinstance(value, np.ndarray):
            return value.dtype.str, value.shape, [plain(one) for one in value.tolist()]
        return value

    assert plain(read_npy(npy(array), tmp_path)) == plain(np.load(npy(array), allow_pickle=True))
    if array.dtype.hasobject:
        pairs = read_npy(npy(array), tmp_path).flat, np.load(npy(array), allow_pickle=True).flat
        assert all(plain(mine) == plain(theirs) for mine, theirs in zip(*pairs, strict=True))


def test_arrays_of_numpy_1(tmp_path):
    """The name under which numpy 1 wrote arrays is known too."""
    content = npy(ragged(np.arange(2), np.arange(3))).getvalue().replace(b"numpy._core", b"numpy.core")
    head = content.index(b"\x80")
    pickled = pickle.dumps(ragged(np.arange(2), np.arange(3)), protocol=2).replace(b"numpy._core", b"numpy.core")
    with pytest.raises(skl.CorruptError, match=r"asks for _codecs\.encode, which is never loaded; only arrays are"):
        read_npy(io.BytesIO(content[:head] + pickled), tmp_path)
    pickled = pickle.dumps(ragged(np.arange(2), np.arange(3)), protocol=3).replace(b"numpy._core", b"numpy.core")
    assert [one.tolist() for one in read_npy(io.BytesIO(content[:head] + pickled), tmp_path)] == [[0, 1], [0, 1, 2]]


def test_arrays_that_ask_for_more(tmp_path):
    """Any other object, type or shape is refused, before anything of it exists."""
    with pytest.raises(skl.CorruptError, match=r"array of objects: asks for posix\.mkdir, which is never loaded"):
        read_npy(npy(ragged(Runs(tmp_path / "ran"))), tmp_path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(skl.CorruptError, match="type 'V8' is not of numbers or objects"):
        read_npy(npy(ragged(np.zeros(2, "i4,f4"))), tmp_path)
    with pytest.raises(skl.CorruptError, match="type 'M8' is not of numbers or objects"):
        read_npy(npy(ragged(np.zeros(2, "M8[s]"))), tmp_path)
    header = npy(ragged(1, 2)).getvalue()
    other = npy(np.array([[1, 2]], object)).getvalue()
    head = header.index(b"\x80")
    for pickled in (other[other.index(b"\x80") :], pickle.dumps([1, 2])):
        with pytest.raises(skl.CorruptError, match="its objects are no array of the shape that its header says"):
            read_npy(io.BytesIO(header[:head] + pickled), tmp_path)


class Crafted:
    """An object whose pickle has any state."""

    def __init__(self, make, arguments, state):
        self.parts = make, arguments, state

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (Crafted(np.dtype, ("i4", False, True), (3, "<", None, ("a",), {"a": 0}, -1, -1, 0)), "a type with fields"),
        (Crafted(np.ndarray, ((5,),), None), "an array without content"),
    ],
)
def test_pickles_that_no_numpy_writes(tmp_path, inner, message):
    """States that would change numpy's own types, or leave memory as it is, are refused."""
    content = npy(ragged(1)).getvalue()
    pickled = pickle.dumps(ragged(inner), protocol=4)
    with pytest.raises(skl.CorruptError, match=message):
        read_npy(io.BytesIO(content[: content.index(b"\x80")] + pickled), tmp_path)


def test_arrays_altered_anywhere(tmp_path):
    """A byte that is another leaves an array or an error, and nothing else."""
    content = npy(ragged(np.arange(3), [1.5, "x"])).getvalue()
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= int(rng.integers(1, 256))
        with contextlib.suppress(skl.CorruptError):
            assert isinstance(read_npy(io.BytesIO(bytes(altered)), tmp_path), np.ndarray)
    for end in range(len(content)):
        with pytest.raises(skl.CorruptError):
            read_npy(io.BytesIO(content[:end]), tmp_path)

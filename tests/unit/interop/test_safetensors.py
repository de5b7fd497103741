"""Safetensors files: arrays as the package itself writes them, and headers that lie."""

import json

import numpy as np
import pytest

import sklformat as skl
from sklformat.interop import convert
from sklformat.interop.tables.safetensors import open_arrays
from sklformat.settings.convert import ConvertConfig

TYPES = (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
)  # fmt: skip


def test_arrays_of_every_type(tmp_path):
    """What the package writes is read, of any type and shape; bfloat16 as float32."""
    write = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arrays = {name: torch.tensor(rng.integers(0, 2, (3, 4))).to(getattr(torch, name)) for name in TYPES}
    arrays |= {"none": torch.zeros(0, 7), "one": torch.tensor(5.0)}
    values = torch.tensor(rng.normal(size=(3, 4, 5)))
    write.save_file(arrays | {"bfloat16": values.bfloat16()}, tmp_path / "a.safetensors", metadata={"x": "y"})
    found = open_arrays(tmp_path / "a.safetensors")
    assert set(found) == {*arrays, "bfloat16"}
    for name, array in arrays.items():
        assert found[name].dtype == array.numpy().dtype
        np.testing.assert_array_equal(found[name], array.numpy())
    assert found["bfloat16"].shape == (3, 4, 5)
    assert len(found["bfloat16"]) == 3
    np.testing.assert_array_equal(found["bfloat16"][1:], values.bfloat16().float().numpy()[1:])
    write.save_file({"none": torch.zeros(0, 7)}, tmp_path / "a.safetensors")
    assert open_arrays(tmp_path / "a.safetensors")["none"].shape == (0, 7)


def test_plain_columns(tmp_path):
    """Stacked rows become a cache as those of an npz do."""
    write = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((4, 5, 20)), axis=2)[:, :, :3]
    logs = np.log(np.array([0.5, 0.25, 0.125]))
    arrays = {"input_ids": rng.integers(0, 20, (4, 6)), "token_ids": ids, "logprobs": np.broadcast_to(logs, ids.shape)}
    np.savez(tmp_path / "a.npz", **arrays)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    tensors["logprobs"] = tensors["logprobs"].bfloat16()
    write.save_file(tensors, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        settings = {"vocab_size": 20, "sampler": "topk"}
        convert(ConvertConfig(source=tmp_path / name, destination=tmp_path / f"cache-{name[2:]}", **settings))
    caches = [skl.open(tmp_path / name) for name in ("cache-npz", "cache-safetensors")]
    for one, other in zip(*caches, strict=True):
        assert (one.tokens == other.tokens).all()
        assert (one.targets.token_ids == other.targets.token_ids).all()
        np.testing.assert_allclose(one.targets.weights, other.targets.weights, rtol=0.01)
    wide = tensors | {"token_ids": (tensors["token_ids"] + 290).bfloat16()}
    write.save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(skl.CorruptError, match="token_ids are floats of 8 significant bits"):
        convert(
            ConvertConfig(
                source=tmp_path / "wide.safetensors", destination=tmp_path / "wide", vocab_size=400, sampler="topk"
            )
        )
    tensors["input_ids"] = tensors["input_ids"][:3]
    write.save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(skl.CorruptError, match=r"safetensors: arrays have 3 rows \(input_ids\), 4 rows"):
        convert(ConvertConfig(source=tmp_path / "b.safetensors", destination=tmp_path / "out", **settings))


def entry(first, last, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "b begins at byte 4, must at 8"),
        ({"a": entry(0, 8), "b": entry(9, 17)}, "b begins at byte 9, must at 8"),
        ({"a": entry(0, 8)}, "its arrays end at byte 8 of 16"),
        ({"a": entry(0, 16)}, r"a has 16 bytes for shape \[2\] of F32"),
        ({"a": entry(0, 16, (-2, -2))}, "shape or data_offsets of a are not natural numbers"),
        ({"a": entry(0, 16, (1 << 62, 4))}, "a has 16 bytes for shape"),
        ({"a": entry(0, 16, (16,), "F8_E4M3")}, "a has type 'F8_E4M3', known are F64, F32"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "a has no dtype, shape and data_offsets"),
        ([1], "its header is no object"),
        ("{", "not a safetensors file"),
        ('{"a":1,"a":1}', "a name is there twice"),
    ],
)
def test_headers_that_lie(tmp_path, header, message):
    """Holes, overlaps, sizes that do not fit, types that are unknown: one line each."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(skl.CorruptError, match=message):
        open_arrays(path)


def test_files_cut_short(tmp_path):
    """Any beginning of a file is refused."""
    text = json.dumps({"a": entry(0, 8)}).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(8)
    path = tmp_path / "a.safetensors"
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(skl.CorruptError, match="not a safetensors file: "):
            open_arrays(path)
    path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    with pytest.raises(skl.CorruptError, match="its header would end at byte 1099511627784 of 77"):
        open_arrays(path)

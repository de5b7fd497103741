"""DistillKit's files, written from the description of their bytes: nothing here is shared with the reader."""

import json
import struct

import numpy as np
import pytest

V = 300
PADDED = V + 1  # what DistillKit takes for d


def bfloat16(number):
    """The two bytes of a number in bfloat16, halves to even."""
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    low, high = bits & 0xFFFF, bits >> 16
    return struct.pack("<H", high + (low > 0x8000 or (low == 0x8000 and high & 1)))


PACKED = {
    "bfloat16": bfloat16,
    "float16": lambda x: np.float16(x).tobytes(),
    "float32": lambda x: struct.pack("<f", x),
    "float64": lambda x: struct.pack("<d", x),
}


def unpacked(raw, dtype):
    """The number that these bytes are."""
    if dtype == "bfloat16":
        return struct.unpack("<f", b"\0\0" + raw)[0]
    return float(np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"))[0])


def bit_stream(numbers, bits):
    """Numbers of some bits each, highest bit first, filled up to whole bytes."""
    text = "".join(f"{int(number):0{bits}b}" for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def term_values(codec, ranks):
    """[n, terms] each term at each rank."""
    points = np.linspace(0, 1, ranks) if codec.get("normalize_t") else np.arange(ranks, dtype=float)
    columns = [points**term if isinstance(term, int) else getattr(np, term)(points) for term in codec_terms(codec)]
    return np.stack(columns, axis=1) if columns else np.zeros((ranks, 0))


def codec_terms(codec):
    return codec.get("polynomial_terms") or []


def encode_values(logs, codec):
    """The bytes of one position's log-probs, which fall."""
    logs = np.asarray(logs, np.float64)
    if codec.get("delta_encoding", True):
        logs = np.diff(logs, prepend=0.0)
    exact_dtype, term_dtype = codec.get("exact_dtype", "float32"), codec.get("term_dtype", "float32")
    exact, rest = logs[: codec["exact_k"]], logs[codec["exact_k"] :]
    raw = b"".join(PACKED[exact_dtype](x) for x in exact)
    if codec_terms(codec):
        terms = term_values(codec, rest.size)
        packed = [PACKED[term_dtype](c) for c in np.linalg.lstsq(terms, rest, rcond=None)[0]]
        raw += b"".join(packed)
        rest = rest - terms @ [unpacked(one, term_dtype) for one in packed]
    place = 0
    for part in codec["residual_bins"]:
        values, bits = rest[place : place + part["num_elements"]], part["element_bits"]
        scale = PACKED[part["scale_dtype"]](np.abs(values).max() / 2 ** (bits - 1) or 1.0)
        codes = np.rint(values / unpacked(scale, part["scale_dtype"])) + 2 ** (bits - 1)
        raw += scale + bit_stream(np.clip(codes, 0, 2**bits - 1), bits)
        place += part["num_elements"]
    return list(raw)


def encode_ids(ids, size):
    return list(bit_stream(ids, int(np.ceil(np.log2(size)))))


def legacy_words(ids, size):
    """64-bit words, the first id in the lowest bits."""
    bits = int(np.ceil(np.log2(size)))
    per_word = 64 // bits
    words = [ids[i : i + per_word] for i in range(0, len(ids), per_word)]
    return [sum(int(one) << (bits * place) for place, one in enumerate(word)) for word in words]


def teacher(seed, length, k, vocab_size=V):
    """Tokens [length], and ids [length, k] and log-probs [length, k] of the k most likely, by the whole softmax."""
    rng = np.random.default_rng(seed)
    logits = rng.gumbel(size=(length, vocab_size)) * 1.5
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logs, axis=1, kind="stable")[:, :k]
    return rng.integers(0, vocab_size, length), ids, np.take_along_axis(logs, ids, 1)


def compressed_row(sequence, codec, rows):
    """A row of the form distillkit, of the first rows of a sequence of ``teacher``."""
    tokens, ids, logs = sequence
    return {
        "input_ids": tokens.tolist(),
        "compressed_logprobs": [encode_values(one, codec) for one in logs[:rows]],
        "bytepacked_indices": [encode_ids(one, codec["d"]) for one in ids[:rows]],
    }


def types(names):
    """Column types as DistillKit's schemas have them."""
    pa = pytest.importorskip("pyarrow")
    kinds = {
        "input_ids": pa.list_(pa.uint64()),
        "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
        "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
        "packed_indices": pa.list_(pa.list_(pa.uint64())),
        "exact_values": pa.list_(pa.list_(pa.float32())),
        "coeffs": pa.list_(pa.list_(pa.float32())),
        "token_ids": pa.list_(pa.list_(pa.int64())),
        "top_values": pa.list_(pa.list_(pa.float32())),
        "attention_mask": pa.list_(pa.int8()),
        "messages": pa.string(),
        "text": pa.string(),
    }
    return pa.schema([(name, kinds[name]) for name in names])


def write_parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows, types(rows[0])), path)
    return path


def write_saved(directory, rows, files=2):
    """A directory as ``save_to_disk`` of ``datasets`` leaves it: streams of batches, and the list of them."""
    pa = pytest.importorskip("pyarrow")
    directory.mkdir(parents=True)
    schema, names = types(rows[0]), []
    for number in range(files):
        names.append(f"data-{number:05}-of-{files:05}.arrow")
        part = rows[number * len(rows) // files : (number + 1) * len(rows) // files]
        with pa.OSFile(str(directory / names[-1]), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            stream.write_table(pa.Table.from_pylist(part, schema), max_chunksize=1)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (directory / "dataset_info.json").write_text("{}")
    return directory

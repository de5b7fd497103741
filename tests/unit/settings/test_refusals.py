"""What settings refuse, each refusal once by its own words, before anything is read or loaded."""

import dataclasses
from pathlib import Path

import pytest

from sklformat.settings.cache import CacheConfig
from sklformat.settings.convert import ConvertConfig
from sklformat.settings.demo import DemoConfig
from sklformat.settings.estimate import EstimateConfig
from sklformat.settings.eval import EvalConfig
from sklformat.settings.train import TrainConfig

CACHE = CacheConfig(teacher="t", text=(Path("x"),), out="out", seq_len=8)
TRAIN = TrainConfig(cache="cache", out=Path("out"))
EVAL = EvalConfig(student="s", text=(Path("x"),), seq_len=8)
ESTIMATE = EstimateConfig(positions=1e9)
NOISE = EstimateConfig(teacher="t", student=("s",), text=(Path("x"),))
CONVERT = ConvertConfig(source=Path("a"), destination=Path("b"))
RECORDS = {"cache": "c", "text": (), "seq_len": 0}
TOKENS = {"cache": None, "tokens": Path("store"), "seq_len": 8}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CACHE, {"dataset": "d"}, r"give one of --text, --dataset and --tokens \(a token store\)"),
        (
            CACHE,
            {"text": (), "tokens": Path("s"), "special_tokens": "special"},
            "special_tokens belongs to text or a data",
        ),
        (
            CACHE,
            {"columns": ("entropie",)},
            "columns may be label_logprob, entropy, document_start, record_logprob, got",
        ),
        (CACHE, {"gpu_memory": 0.5}, "gpu_memory belongs to engine vllm, engine is transformers"),
        (CACHE, {"tensor_parallel": 0}, "tensor_parallel must be >= 1, got 0"),
        (CACHE, {"engine": "vllm", "gpu_memory": 1.5}, r"gpu_memory must be in \(0, 1\], got 1\.5"),
        (CACHE, {"engine": "vllm", "isolate_documents": True}, "isolate_documents needs a mask of attention within"),
        (CACHE, {"engine": "vllm", "batch_size": 4}, "batch_size is of a fixed grid of batches, engine vllm makes its"),
        (CACHE, {"engine": "vllm", "device": "cuda:1"}, "device is not for engine vllm to choose: it runs on what it"),
        (CACHE, {"engine": "vllm", "device_map": "auto"}, "device_map is not for engine vllm: tensor_parallel divides"),
        (
            CACHE,
            {"tensor_parallel": 2, "device_map": "auto"},
            "tensor_parallel divides a teacher among processes, device_map among GPUs; give one",
        ),
        (
            CACHE,
            {"engine": "vllm", "adapter_base": "b"},
            "adapter_base belongs to an adapter, .*; leave it out, or take",
        ),
        (CACHE, {"num_sequences": 0}, "^num_sequences must be >= 1, got 0"),
        (CACHE, {"out": "s3://b/c"}, "out s3://b/c is a URL: give work_dir, a directory here for shards that are not"),
        (CACHE, {"work_dir": Path("w")}, "work_dir belongs to an out that is a URL, got out"),
        (CACHE, {"out": "s3://b/c", "work_dir": Path("s3:/b")}, "work_dir s3:/b is a URL, must be a directory here"),
        (CACHE, {"rounds": 0}, "rounds must be >= 1 and <= 65535 for sampler systematic, got 0"),
        (CACHE, {"sampler": "topk"}, r"sampler topk needs k in 1\.\.65535, got None"),
        (CACHE, {"sampler": "topp", "p": 1.5}, r"sampler topp needs p in \(0, 1\], got 1\.5"),
        (CACHE, {"k": 3}, "k and p belong to topk and topp, not to sampler systematic"),
        (
            CACHE,
            {"sampler": "topk", "k": 3, "proposal_temperature": 0.5},
            "sampler topk draws nothing, so proposal_temperature must be 1",
        ),
        (CACHE, {"proposal_temperature": 0.0}, r"proposal_temperature must be in 0\.001\.\.100, got 0\.0"),
        (
            CACHE,
            {"unbiased_weights": True},
            "unbiased_weights belongs to a proposal_temperature other than 1; at 1 nothing is weighted",
        ),
        (
            CACHE,
            {"text": (), "tokens": Path("s"), "field": "x"},
            "field belongs to text or a dataset; tokens have none",
        ),
        (CACHE, {"text": (), "tokens": Path("s"), "field": "text"}, "field belongs to text or a dataset; tokens ha"),
        (CONVERT, {"vocab_size": 0}, "^vocab_size must be >= 1, got 0"),
        (DemoConfig(), {"processes": -1}, "^processes must be >= 0, got -1"),
        (DemoConfig(), {"field": "text"}, "field belongs to text, which is not given"),
        (ESTIMATE, {"field": "text"}, "field belongs to the text of a calibration run, which is not given"),
        (ESTIMATE, {"positions": 0.0}, r"^positions must be positive and finite, got 0\.0"),
        (ESTIMATE, {"positions": None}, "^positions is missing: say how many to capture, such as 1e12"),
        (ESTIMATE, {"noise_rounds": (2,)}, "^noise_rounds belongs to the noise of a student's gradient"),
        (ESTIMATE, {"student": ("s",)}, "^student s learns from a teacher, which is not given; give both"),
        (NOISE, {"student": ("s", "s")}, "^a student is given twice: s s; give each once"),
        (NOISE, {"proposal_temperature": 0.8}, "must be 1 with a student, got 0.8"),
        (NOISE, {"plot": Path("x.bmp")}, r"^plot must end in \.png, \.svg or \.pdf, got 'x\.bmp'"),
        (
            NOISE,
            {"plot": Path("x.png"), "student": tuple("abcdefghi")},
            "^plot draws 1 to 8 students, got 9; leave it out",
        ),
        (NOISE, {"noise": 0.0}, r"^noise must be positive and finite, got 0\.0"),
        (NOISE, {"noise_seed": -1}, r"^noise_seed must be in 0\.\.2\*\*48 - 1, got -1"),
        (NOISE, {"noise_seed": 1 << 48}, r"^noise_seed must be in 0\.\.2\*\*48 - 1, got 281474976710656"),
        (NOISE, {"noise_rounds": (4, 2, 4)}, "^noise_rounds holds a number twice: 4 2 4; give each once"),
        (NOISE, {"noise_sequences": 2}, "^noise_sequences must be >= 3, for a variance and its error, got 2"),
        (NOISE, {"noise_rounds": ()}, "^noise_rounds is empty; give rounds to try, such as 2 12 50"),
        (NOISE, {"noise_rounds": (1, 65536)}, r"^noise_rounds must be in 1\.\.65535, got 65536"),
        (ESTIMATE, {"unique_tokens": float("inf")}, "^unique_tokens must be positive and finite, got inf"),
        (ESTIMATE, {"rounds": 65536}, r"^rounds must be in 0\.\.65535, got 65536"),
        (ESTIMATE, {"rounds": 5, "unique_tokens": 6.0}, "unique_tokens 6 is more than the 5 rounds that draw them"),
        (ESTIMATE, {"rounds": 0, "teacher": "t"}, "a calibration run draws: rounds must be >= 1 with a teacher, got 0"),
        (
            ESTIMATE,
            {"seq_len": 8, "learnt_per_sequence": 9.5},
            "learnt_per_sequence 9.5 is more than the 8 positions of",
        ),
        (ESTIMATE, {"teacher": "t"}, "a calibration run needs both a teacher and something to read: either text or a"),
        (ESTIMATE, {"dataset": ("d",)}, "a calibration run needs both a teacher and something to read"),
        (ESTIMATE, {"teacher": "t", "dataset": ("d",), "text": (Path("x"),)}, "either text or a dataset"),
        (ESTIMATE, {"dataset_split": "all"}, "dataset_split belongs to the text of a calibration run"),
        (EVAL, {"bins": 0}, "^bins must be >= 1, got 0"),
        (EVAL, {"tokens": Path("s")}, r"give one of --text, --tokens \(a token store\) and --cache"),
        (EVAL, {"cache": "c"}, r"give one of --text, --tokens \(a token store\) and --cache"),
        (EVAL, {"hold_out": 3}, "hold_out and sequences choose a part of a cache, which is not given"),
        (EVAL, RECORDS | {"packing": "single"}, "packing belongs to text or tokens; a cache says it itself"),
        (EVAL, RECORDS | {"hold_out": -1}, "^hold_out must be >= 0, got -1"),
        (EVAL, RECORDS | {"hold_out": 3, "sequences": "1:2"}, "give hold_out or sequences, got 3 and 1:2"),
        (EVAL, RECORDS | {"sequences": "1-2"}, "sequences must be A:B, such as 900:1000, got '1-2'"),
        (
            EVAL,
            {"text": (), "tokens": Path("s"), "bos": "never"},
            "bos and special_tokens belong to text; the token store",
        ),
        (EVAL, {"text": (), "tokens": Path("s"), "field": "text"}, "field belongs to text; tokens have none"),
        (EVAL, {"ce_loss": 1.0}, "ce_loss and full_loss belong together: give both or none"),
        (TRAIN, {"tokens": Path("s")}, "give exactly one of cache and tokens"),
        (TRAIN, TOKENS | {"method": "sparse"}, "method sparse needs a cache; a token store serves ce and full only"),
        (TRAIN, {"seq_len": 8}, "seq_len belongs to tokens and must be >= 1 there, got 8"),
        (TRAIN, {"packing": "single"}, "packing belongs to tokens; a cache says itself how it was packed"),
        (TRAIN, {"packing_seed": 3}, "packing_seed belongs to tokens; a cache says itself"),
        (TRAIN, {"truncate": "start"}, "truncate belongs to tokens; a cache says itself"),
        (TRAIN, {"method": "full"}, "teacher belongs to method full, got method full and teacher None"),
        (TRAIN, TOKENS | {"method": "ce", "window": 4}, "window and hold_out belong to a cache, got 4 and 0"),
        (
            TRAIN,
            {"method": "ce", "ce_weight": 0.5},
            "ce_weight mixes cross-entropy into another method; method ce is all",
        ),
        (TRAIN, {"steps": 0}, "^steps must be >= 1, got 0"),
        (TRAIN, {"hidden_size": 10, "num_heads": 4}, "num_heads 4 does not divide hidden_size 10"),
        (TRAIN, {"warmup": 1.5}, r"warmup must be in \[0, 1\], got 1\.5"),
        (TRAIN, {"learning_rate": 0.0}, "learning_rate must be > 0, weight_decay >= 0"),
        (TRAIN, {"num_workers": -1}, "^num_workers must be >= 0, got -1"),
    ],
)
def test_settings(config, changes, message):
    """A value out of range, or two that contradict each other, are refused with what they may be."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)

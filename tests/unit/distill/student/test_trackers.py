"""What a run tells trackers, through accelerate's own classes over packages of our own making; and how fast it is."""

import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
import tiny
import torch
from student_data import config_of, log_of, silent, stop_at, write_place

import sklformat as skl
from sklformat.distill.models.devices import peak_flops
from sklformat.distill.student import trackers
from sklformat.distill.student.trackers import Pace, training_flops
from sklformat.distill.student.training import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("tracked"))


class Book:
    """A tracker's service: what it was told, by the name of the run."""

    def __init__(self):
        self.started, self.told, self.settings, self.finished = [], [], [], 0

    def log(self, values, step=None):
        self.told.append((step, "eval_lm_loss" in values))

    def finish(self):
        self.finished += 1


def install(monkeypatch, name, **names):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


def install_wandb(monkeypatch, book):
    def init(**how):
        book.started.append(how)
        return book

    config = types.SimpleNamespace(update=lambda values, **_: book.settings.append(values))
    install(monkeypatch, "wandb", init=init, config=config)


def install_mlflow(monkeypatch, book):
    def start_run(**how):
        book.started.append(how)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-of-mlflow"))

    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    install(
        monkeypatch,
        "mlflow",
        search_experiments=lambda **_: [],
        create_experiment=lambda **_: "7",
        start_run=start_run,
        log_params=book.settings.append,
        log_metrics=book.log,
        end_run=book.finish,
        utils=types.SimpleNamespace(validation=limits),
    )


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_is_one_run_of_its_tracker(place, tmp_path, monkeypatch, name):
    """A run that is stopped and resumed tells every line once, to one run of the tracker, with its settings once."""
    book = Book()
    {"wandb": install_wandb, "mlflow": install_mlflow}[name](monkeypatch, book)
    config = config_of(place, tmp_path / "run", steps=6, save_every=2, hold_out=4, eval_every=3, report_to=(name,))
    with pytest.raises(KeyboardInterrupt):
        train(config, report=stop_at(4))
    train(config, report=silent)
    assert [(row["step"], "eval_lm_loss" in row) for row in log_of(tmp_path / "run")] == book.told
    assert 2 == book.finished
    assert 1 == len(book.settings)
    assert "random_sampling" == book.settings[0]["method"]
    first, second = book.started
    if name == "wandb":
        assert first == second
        assert {
            "project": "sklformat",
            "resume": "allow",
            "name": "run",
            "dir": str(tmp_path / "run"),
        }.items() <= first.items()
        assert first["id"].startswith("run-")
    else:
        assert (None, "run-of-mlflow") == (first["run_id"], second["run_id"])


def test_a_tracker_that_fails_ends_no_run(place, tmp_path, monkeypatch, capsys):
    """What a tracker raises in the middle of a run is said once; training continues without it."""
    book = Book()
    install_wandb(monkeypatch, book)

    def broken(_values, step):
        raise OSError("the service is gone\nand more")

    book.log = broken
    summary = train(config_of(place, tmp_path / "run", steps=3, report_to=("wandb", "wandb")), report=silent)
    said = capsys.readouterr().err
    assert 1 == said.count(
        "note: the tracker wandb has failed (OSError: the service is gone); training continues without"
    )
    assert 3 == summary.steps


def test_a_tracker_that_does_not_start_is_named(place, tmp_path, monkeypatch):
    """Before the first step, in one line."""

    def init(**_):
        raise RuntimeError("not logged in\nsee the manual")

    install(monkeypatch, "wandb", init=init)
    with pytest.raises(
        skl.SettingsError,
        match=r"^the tracker wandb does not start \(RuntimeError: not logged in\); set it up, or leave",
    ):
        train(config_of(place, tmp_path / "run", report_to=("wandb",)), report=silent)


def test_a_missing_package_is_named(place, tmp_path, monkeypatch):
    """A tracker that is not installed is named before anything is loaded; so is accelerate."""
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name == "wandb")
    with pytest.raises(
        skl.SettingsError, match="report_to mlflow: the package mlflow is not installed; install it, or"
    ):
        train(config_of(place, tmp_path / "run", report_to=("mlflow",)), report=silent)
    with pytest.raises(ModuleNotFoundError, match="report_to wandb needs accelerate"):
        train(config_of(place, tmp_path / "run", report_to=("wandb",)), report=silent)
    assert not (tmp_path / "run").exists()


def test_none_is_none(place, tmp_path, monkeypatch):
    """report_to none asks for no package, and keeps nothing of trackers."""
    monkeypatch.setattr(trackers, "_is_installed", pytest.fail)
    train(config_of(place, tmp_path / "run", steps=1, report_to=("none",)), report=silent)
    assert not (tmp_path / "run" / "trackers.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_each_step_once(place, tmp_path):
    """Where a run resumes, TensorBoard forgets what comes again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        train(config_of(place, tmp_path / "run", steps=6, save_every=2), report=stop_at(4))
    train(config_of(place, tmp_path / "run", steps=6, save_every=2), report=silent)
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("loss")
    rows = log_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [event.step for event in found]
    assert [row["loss"] for row in rows] == pytest.approx([event.value for event in found])


def test_every_line_says_how_fast(place, tmp_path):
    """Positions per second of all processes, the share of waiting, and the peak of memory; no MFU on a CPU."""
    train(config_of(place, tmp_path / "run", steps=2), report=silent)
    for row in log_of(tmp_path / "run"):
        assert row["tokens_per_second"] > 0
        assert 0 <= row["data_wait"] <= 1
        assert row["peak_memory_bytes"] > 2**20
        assert "mfu" not in row


def test_pace(monkeypatch):
    """What trains nothing is left out of the speed; MFU is the student's operations over what the devices can do."""
    now = 0.0
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now)
    pace = Pace(torch.device("cpu"), 2, 1e9, "bfloat16")
    pace._full = 2 * 1e12 / 1e9
    with pace.waiting():
        now += 1
    pace.add(3000)
    with pace.apart():
        now += 100
    now += 3
    pace.add(1000)
    found = pace.figures()
    assert (1000.0, 0.25, 0.5) == (found["tokens_per_second"], found["data_wait"], found["mfu"])
    now += 2
    assert 0 == pace.figures()["tokens_per_second"]


def test_training_flops():
    """Six for each weight in a product, and attention; an embedding that is only looked up costs nothing."""
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
    model = tiny.new_model(50, **sizes)
    inner = sum(p.numel() for p in model.model.layers.parameters()) + model.model.norm.weight.numel()
    attention = 12 * 2 * 16 * 64
    assert 6 * (inner + 50 * 16) + attention == training_flops(model, 64)
    assert training_flops(model, 64) == training_flops(tiny.new_model(50, **sizes, tie=True), 64)
    model.model.layers[0].requires_grad_(False)
    frozen = sum(p.numel() for p in model.model.layers[0].parameters())
    assert 6 * (inner + 50 * 16) - 2 * frozen + attention == training_flops(model, 64)
    model.config.num_experts = 4
    assert training_flops(model, 64) is None


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", pytest.approx(989.4e12), pytest.approx(66.9e12)),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", None, None),
        ("Some other card", None, None),
    ],
)
def test_peak_flops(name, bfloat16, float32):
    """A card is known by the words of its name, the longer entry first; one that is not known has no figure."""
    assert (bfloat16, float32) == (peak_flops(name, "bfloat16"), peak_flops(name, "float32"))


def test_trackers_are_kept_by_name(place, tmp_path, monkeypatch):
    """trackers.json has the names by which services know the run, for whoever looks for it there."""
    install_wandb(monkeypatch, Book())
    train(config_of(place, tmp_path / "run", steps=1, report_to=("wandb",)), report=silent)
    assert ["wandb"] == list(json.loads((tmp_path / "run" / "trackers.json").read_text()))

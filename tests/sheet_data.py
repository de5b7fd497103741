"""Training runs to be drawn, and whether what is drawn can be read, for the tests of sheets."""

import itertools
import json

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

EVALUATED = {"eval_lm_loss": 3.5, "eval_kl": 0.25, "eval_kl_to_records": 1.5, "eval_calibration_error": 0.04}
BINS = [{"confidence": 0.25, "accuracy": 0.5, "share": 0.75}, {"confidence": 0.75, "accuracy": 0.5, "share": 0.25}]


def make_run(directory, *, evaluated=True, end=""):
    """A run of 20 steps at ``directory``."""
    directory.mkdir(parents=True)
    rows = [{"step": 10, "loss": 4.5}, {"step": 20, "loss": 4.25}]
    rows += [{"step": 20, **EVALUATED}] if evaluated else []
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    if evaluated:
        (directory / "evaluation.json").write_text(json.dumps({"lm_loss": 3.5, "reliability": BINS}))
    return directory


def is_beyond(place, axis):
    """Whether a tick lies beyond the limits of its axis, where it is kept but not drawn."""
    low, high = axis.get_view_interval()
    return not low <= place <= high


def overlaps(figure):
    """Pairs of texts of a drawn figure whose boxes meet."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    undrawn = [tick for axis in axes for tick in axis.get_major_ticks() if is_beyond(tick.get_loc(), axis)]
    hidden = {id(text) for tick in undrawn for text in tick.findobj(Text)}
    hidden |= {id(text) for one in figure.axes if not one.axison for text in one.xaxis.findobj(Text)}
    hidden |= {id(text) for one in figure.axes if not one.axison for text in one.yaxis.findobj(Text)}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and id(t) not in hidden]
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for _, box in boxes)
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]

"""
Figures of what other modules computed.

figures  draws them; the only door to matplotlib
rows     what is drawn: the rows that each figure takes
"""

from sklformat.plot.figures import draw_caches, draw_runs, plot_caches, plot_comparison, plot_noise, plot_runs
from sklformat.plot.rows import CacheRow, ComparisonRow, NoiseRow, ReliabilityBin, RunRow

__all__ = [
    "CacheRow",
    "ComparisonRow",
    "NoiseRow",
    "ReliabilityBin",
    "RunRow",
    "draw_caches",
    "draw_runs",
    "plot_caches",
    "plot_comparison",
    "plot_noise",
    "plot_runs",
]

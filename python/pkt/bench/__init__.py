"""`pkt bench`: what this host gives, and from it how long an extraction will take.

Every figure is measured with the parts that an extraction is made of, never with a model of them:
reading by the core's reader, scoring by `LayerScores`, windows by `choose`, and for the forecast
two layers of the teacher's shape swept by the method itself.
"""

from __future__ import annotations

from pkt.bench.forecast import Forecast, Pace, Phase, Work, forecast
from pkt.bench.kernels import MatmulRate, ScoreRates, WindowRates, bench_score, bench_window
from pkt.bench.prediction import Prediction, assumed_seeds, predict
from pkt.bench.reading import ReadRates, bench_read, files_of, temporary_file

__all__ = [
    "Forecast",
    "MatmulRate",
    "Pace",
    "Phase",
    "Prediction",
    "ReadRates",
    "ScoreRates",
    "WindowRates",
    "Work",
    "assumed_seeds",
    "bench_read",
    "bench_score",
    "bench_window",
    "files_of",
    "forecast",
    "predict",
    "temporary_file",
]

"""Cells and slides: measured channels in, unmeasured channels out."""

from imgshared.prediction.cells import predict_batches, predict_cells, predictable
from imgshared.prediction.images import predict_image
from imgshared.prediction.run import Run, load_run
from imgshared.prediction.types import PredictedCells
from imgshared.prediction.write import predict

__all__ = [
    "PredictedCells",
    "Run",
    "load_run",
    "predict",
    "predict_batches",
    "predict_cells",
    "predict_image",
    "predictable",
]

"""Whole slides and plates: any size, in bounded memory, without seams."""

from imgshared.slides.plate import predict_plate
from imgshared.slides.predict import predict_slide

__all__ = ["predict_plate", "predict_slide"]

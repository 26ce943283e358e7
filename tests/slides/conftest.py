"""Slides on disk, and a run that predicts them."""

from dataclasses import replace

import numpy as np
import pytest
import tifffile

from imgshared.config import TranslatorConfig, TranslatorWeights
from imgshared.evaluation.calibrate import calibrate

TRANSLATOR = TranslatorConfig(
    channels=(8, 12), marker_dim=4, weights=TranslatorWeights(adversarial=0.1, sharp=1.0), discriminator_channels=(4,)
)  # fmt: skip


@pytest.fixture
def run(untrained):
    """A translator with both outputs."""
    return untrained(TRANSLATOR)


@pytest.fixture
def calibrated(run, toy, tmp_path):
    """The same, with intervals of its own."""
    (tmp_path / "run").mkdir()
    own = replace(run, path=tmp_path / "run")
    calibrate(own, toy)
    return own


@pytest.fixture
def pixels():
    """DNA and another stain, (2, 700, 530) uint16: smooth blobs, and noise."""
    y, x = np.mgrid[:700, :530]
    blobs = 600 * (np.sin(y / 17) * np.sin(x / 23) > 0.3)
    return np.random.default_rng(0).poisson(np.stack([blobs + 100, 200 + x])).astype(np.uint16)


@pytest.fixture
def write_tiff():
    """Write a tiled OME-TIFF with a pyramid: (path, (C, Y, X), names, pixel size, levels)."""

    def write(path, data, names=("DNA", "P1"), size=0.5, levels=1, **more):
        metadata = {"axes": "CYX", "Channel": {"Name": list(names)}}
        if size:
            metadata |= {"PhysicalSizeX": size, "PhysicalSizeY": size}
        with tifffile.TiffWriter(path, ome=True) as tiff:
            tiff.write(data, tile=(128, 128), metadata=metadata, subifds=levels - 1, photometric="minisblack", **more)
            for k in range(1, levels):
                small = np.ascontiguousarray(data[:, :: 2**k, :: 2**k])
                tiff.write(small, tile=(128, 128), subfiletype=1, photometric="minisblack", **more)
        return path

    return write

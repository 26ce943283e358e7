"""The picture by which a segmentation is judged: who is outlined in which colour, and how long the bar is."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from imgshared.data import outlines
from imgshared.data.outlines import draw_outlines
from imgshared.data.prepare import prepare

SKY_BLUE, ORANGE = (86, 180, 233), (230, 159, 0)  # kept, dropped
TITLE, BELOW = 36, 54  # px: where the picture begins, and how far under it lies the bar's middle
SHAPE, ZOOM = (90, 120), 8  # 900 px at least
SQUARES = {3: np.s_[20:40, 20:50], 5: np.s_[50:70, 60:90]}


def squares():
    """Labels of two squares, each one as bright as its label."""
    labels = np.zeros(SHAPE, np.uint16)
    for label, at in SQUARES.items():
        labels[at] = label
    return labels


def drawn(path, labels, **wish):
    grey = np.random.default_rng(0).poisson(100 + 100 * labels)
    draw_outlines(path, grey, labels, np.array([3]), **{"title": "t", "pixel_size_um": 0.5, **wish})
    return np.asarray(Image.open(path)).astype(int)


def outline(at):
    """The outermost pixels of a square in the picture."""
    inside = np.zeros([side * ZOOM for side in SHAPE], bool)
    rows, columns = (slice(s.start * ZOOM, s.stop * ZOOM) for s in at)
    inside[rows, columns] = True
    inside[rows.start + 1 : rows.stop - 1, columns.start + 1 : columns.stop - 1] = False
    return inside


def bar(picture):
    """How many columns the scale bar is long."""
    black = (picture[-(72 - BELOW), 8:] == 0).all(-1)
    return int(np.argmin(black))


def test_edges_alone_are_coloured_by_what_became_of_the_cell(tmp_path):
    picture = drawn(tmp_path / "a.png", squares())[TITLE:-TITLE]
    assert picture.shape == (90 * ZOOM, 120 * ZOOM, 3)
    edges = {label: outline(at) for label, at in SQUARES.items()}
    assert (picture[edges[3]] == SKY_BLUE).all()
    assert (picture[edges[5]] == ORANGE).all()
    assert (np.ptp(picture, axis=-1)[~(edges[3] | edges[5])] == 0).all()


def test_the_legend_has_the_same_colours(tmp_path):
    below = drawn(tmp_path / "a.png", squares())[-(72 - BELOW)]
    assert tuple(below[-200 + 6]) == SKY_BLUE
    assert tuple(below[-110 + 6]) == ORANGE


@pytest.mark.parametrize(("size", "length"), [(0.5, 20 / 0.5 * ZOOM), (0.25, 10 / 0.25 * ZOOM), (None, 20 * ZOOM)])
def test_the_bar_is_as_long_as_it_says(tmp_path, size, length):
    picture = drawn(tmp_path / "a.png", squares(), pixel_size_um=size)
    assert bar(picture) == pytest.approx(length, abs=1)


def test_the_bar_is_that_of_the_pixels_shown(tmp_path, monkeypatch):
    """Of every second pixel."""
    monkeypatch.setattr(outlines, "SIDE_PX", (900, 60))
    metadata = {"axes": "CYX", "Channel": {"Name": ["DNA"]}, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    image = 100 + 100 * squares()[None]
    tifffile.imwrite(tmp_path / "a.ome.tif", image, metadata=metadata, photometric="minisblack", ome=True)
    tifffile.imwrite(tmp_path / "k.tif", squares())
    (tmp_path / "m.csv").write_text("image,mask\na.ome.tif,k.tif\n")
    prepare(tmp_path / "m.csv", tmp_path / "out.zarr", crop_px=16)
    picture = np.asarray(Image.open(tmp_path / "out.qc" / "a.png")).astype(int)
    assert picture.shape[1] == 60 * 15
    assert bar(picture) == pytest.approx(20 / 1.0 * 15, abs=1)

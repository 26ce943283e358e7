"""OME-Zarr of both versions, by its metadata; plates become manifests; damage is named."""

import numpy as np
import pandas as pd
import pytest
import zarr

from imgshared import api
from imgshared.data.manifest import read_manifest
from imgshared.data.ngff import open_ngff, plate_fields
from imgshared.data.readers import open_image, open_mask, read_mask, stem
from imgshared.data.store import CellStore
from imgshared.types import InputError

NAMES = ("DNA", "LaminB1")
UNIT = {"unit": "micrometer"}


def pixels(channels=2, side=48, dtype="uint16"):
    return np.random.default_rng(0).integers(0, 200, (channels, side, side + 16)).astype(dtype)


def write_image(
    path, data, names=NAMES, version="0.5", axes="cyx", size=0.5, unit="micrometer", change=lambda meta: None
):
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


def write_plate(path, fields, version="0.5"):
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
            write_image(path / well["path"] / field, fields(well["path"], field), version=version)
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "tczyx"])
def test_an_image_is_read_as_it_was_written(tmp_path, version, axes):
    data = pixels()
    image = open_image(write_image(tmp_path / "a.ome.zarr", data, version=version, axes=axes))
    assert image.channels == NAMES
    assert image.shape == data.shape
    assert image.dtype == data.dtype
    assert image.pixel_size_um == 0.5
    np.testing.assert_array_equal(image.read(), data)
    np.testing.assert_array_equal(image.read(["LaminB1"]), data[1:])
    assert stem("plates/a.ome.zarr") == "a"


def test_a_window_of_a_level_is_read_alone(tmp_path):
    data = pixels()
    image = open_ngff(write_image(tmp_path / "a.zarr", data))
    np.testing.assert_array_equal(image.read([1], slice(5, 20), slice(30, 60)), data[1:, 5:20, 30:60])
    np.testing.assert_array_equal(image.read([0], slice(0, 8), level=1), data[:1, ::2, ::2][:, :8])


def test_channels_and_sizes_that_it_does_not_tell(tmp_path):
    path = write_image(tmp_path / "a.zarr", pixels(), names=(), unit=None)
    with pytest.raises(InputError, match="does not name its 2 channel"):
        open_image(path)
    image = open_image(path, names=NAMES)
    assert image.channels == NAMES
    assert image.pixel_size_um is None


def test_labels_are_a_mask(tmp_path):
    mask = np.random.default_rng(0).integers(0, 9, (40, 50)).astype(np.uint32)
    path = write_image(tmp_path / "a.zarr", mask, names=(), axes="yx")
    assert open_mask(path).shape == (1, 40, 50)
    np.testing.assert_array_equal(read_mask(path), mask)


def drop_datasets(meta):
    del meta["ome"]["multiscales"][0]["datasets"]


def third_channel(meta):
    meta["ome"]["omero"]["channels"].append(meta["ome"]["omero"]["channels"][0])


def oblong(meta):
    meta["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"][1] = 0.1


def lost_level(meta):
    meta["ome"]["multiscales"][0]["datasets"][1]["path"] = "9"


def several(meta):
    meta["ome"] = {"version": "0.5", "bioformats2raw.layout": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_datasets, "no valid OME-Zarr image: multiscales.0.datasets: Field required"),
        (third_channel, "holds 2 channel.*names 3"),
        (oblong, "not square"),
        (lost_level, "promises a level '9' that is not there"),
        (several, "holds several images: name one of them"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        open_image(write_image(tmp_path / "a.zarr", pixels(), change=change))


def test_planes_are_not_guessed(tmp_path):
    with pytest.raises(InputError, match="3 focal planes"):
        open_image(write_image(tmp_path / "a.zarr", pixels(3), names=(), axes="zyx"), names=["a"])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_plate_is_a_manifest(tmp_path, version):
    data = {}

    def field(well, name):
        data[well, name] = pixels() + len(data)
        return data[well, name]

    plate = write_plate(tmp_path / "plate.zarr", field, version)
    assert [(f.well, f.field) for f in plate_fields(plate)] == [("A01", "0"), ("A01", "1"), ("B02", "0"), ("B02", "1")]
    table = read_manifest(plate)
    assert [row.group for row in table.rows] == ["A01", "A01", "B02", "B02"]
    assert list(table.labels["row"]) == ["A", "A", "B", "B"]
    assert len({row.image for row in table.rows}) == 4
    np.testing.assert_array_equal(open_image(table.rows[2].path).read(), data["B/2", "0"])


def test_a_lost_field_or_well_is_named(tmp_path):
    import shutil

    plate = write_plate(tmp_path / "plate.zarr", lambda well, field: pixels())
    shutil.rmtree(plate / "A" / "1" / "1")
    with pytest.raises(InputError, match=r"names 1 file\(s\) that do not exist: .*A/1/1"):
        read_manifest(plate)
    shutil.rmtree(plate / "B" / "2")
    with pytest.raises(InputError, match="names the well B/2, which is not there"):
        read_manifest(plate)


def test_a_plate_is_prepared_like_files(tmp_path):
    """The same discs, as a plate and as OME-TIFFs, give the same cells."""
    import tifffile

    yy, xx = np.mgrid[:64, :64]
    rng = np.random.default_rng(0)

    def field(well, name):
        disc = sum(np.exp(-(((yy - y) ** 2 + (xx - x) ** 2) / 30)) for y, x in ((20, 20), (44, 40)))
        return (np.stack([disc, disc[::-1]]) * 800 + rng.integers(0, 20, (2, 64, 64))).astype(np.uint16)

    plate = write_plate(tmp_path / "plate.zarr", field)
    rows = []
    for row in read_manifest(plate).rows:
        name = row.image.replace("/", "_") + ".ome.tif"
        tifffile.imwrite(
            tmp_path / name, open_image(row.path).read(),
            metadata={"axes": "CYX", "Channel": {"Name": list(NAMES)}, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
        )  # fmt: skip
        rows.append({"image": name, "group": row.group})
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    stores = [
        CellStore(api.prepare(manifest, tmp_path / f"{k}.zarr", crop_px=16, qc=False).path)
        for k, manifest in enumerate((plate, tmp_path / "manifest.csv"))
    ]
    assert len(stores[0]) == len(stores[1]) == 8
    assert stores[0].data_hash == stores[1].data_hash
    assert list(stores[0].obs["group"]) == list(stores[1].obs["group"])

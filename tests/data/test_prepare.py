import errno
import os
import tracemalloc
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import ndimage

from imgshared.data.prepare import prepare
from imgshared.data.segment import SegmentSettings
from imgshared.data.store import CellStore, StoreWriter
from imgshared.types import InputError

SIDE, CROP = 128, 32
CENTRES = {1: (30, 30), 2: (40, 52), 5: (90, 80), 7: (64, 4), 9: (100, 118)}  # 7 touches the border, 9's crop leaves
KEPT = [1, 2, 5]


def make_mask(side=SIDE):
    y, x = np.mgrid[:side, :side]
    mask = np.zeros((side, side), np.uint16)
    for label, (cy, cx) in CENTRES.items():
        mask[(y - cy) ** 2 + (x - cx) ** 2 <= 64] = label
    return mask


def make_image(markers=("DNA", "LaminB1"), dtype="uint16", seed=0):
    rng = np.random.default_rng(seed)
    light = ndimage.gaussian_filter((make_mask() > 0) * 150.0, 1) + 10
    return np.stack([rng.poisson(light) for _ in markers]).astype(dtype)


def write_image(folder, name, markers=("DNA", "LaminB1"), data=None, **metadata):
    data = make_image(markers) if data is None else data
    metadata = {"axes": "CYX", "Channel": {"Name": list(markers)}, **metadata}
    tifffile.imwrite(folder / name, data, metadata=metadata, photometric="minisblack")


def write_manifest(folder, text):
    (folder / "m.csv").write_text(text)
    return folder / "m.csv"


@pytest.fixture
def manifest(tmp_path):
    """Two images of different panels: the first with a mask and more markers, the second the same cells unmasked."""
    write_image(tmp_path, "a.ome.tif", ("LaminB1", "DNA"))
    write_image(tmp_path, "b.ome.tif", ("dna", "CD3"))
    tifffile.imwrite(tmp_path / "a_mask.tif", make_mask())
    tifffile.imwrite(tmp_path / "b_mask.tif", make_mask())
    rows = "a.ome.tif,a_mask.tif,d1,0.5,control\nb.ome.tif,b_mask.tif,d2,1.5,\n"
    return write_manifest(tmp_path, "image,mask,donor,dose,drug\n" + rows)


def run(manifest, **options):
    options = {"crop_px": CROP, **options}
    return prepare(manifest, manifest.parent / "out.zarr", **options)


def store_of(manifest):
    return CellStore(manifest.parent / "out.zarr")


def test_crops_are_the_image_and_x_is_the_masked_mean(manifest):
    run(manifest)
    store, mask = store_of(manifest), make_mask()
    assert store.panel.markers == ("DNA", "LaminB1", "CD3")
    lamin, dna = make_image(("LaminB1", "DNA"))
    for i, label in enumerate(KEPT):
        y, x = (int(np.rint(c - (CROP - 1) / 2)) for c in CENTRES[label])
        window = np.s_[y : y + CROP, x : x + CROP]
        np.testing.assert_array_equal(store.images()[i, 0], dna[window])
        np.testing.assert_array_equal(store.images()[i, 1], lamin[window])
        np.testing.assert_array_equal(store.masks()[i], mask[window] == label)
        np.testing.assert_allclose(
            store.mean_intensity[i, :2], [p[mask == label].mean() for p in (dna, lamin)], rtol=1e-6
        )


def test_panels_may_differ(manifest):
    summary = run(manifest)
    store = store_of(manifest)
    expected = np.repeat([[True, True, False], [True, False, True]], 3, axis=0)
    np.testing.assert_array_equal(store.measured, expected)
    np.testing.assert_array_equal(np.isfinite(store.mean_intensity), expected)
    assert not store.images()[:3, 2].any()
    assert summary.measured == {"DNA": 6, "LaminB1": 3, "CD3": 3}


def test_obs_holds_place_group_and_labels(manifest):
    run(manifest)
    obs = store_of(manifest).obs
    assert obs.index.name == "cell_id"
    assert list(obs.index) == [f"{i}:{label}" for i in "ab" for label in KEPT]
    assert obs["group"].tolist() == ["d1"] * 3 + ["d2"] * 3
    assert obs["dose"].tolist() == [0.5] * 3 + [1.5] * 3
    assert obs["drug"].tolist()[0] == "control"
    assert obs["drug"].isna().tolist() == [False] * 3 + [True] * 3
    assert all(obs[c].dtype == "category" for c in ("image", "group", "donor", "drug"))
    np.testing.assert_allclose(obs[["centroid_y_px", "centroid_x_px"]].iloc[:3], [CENTRES[k] for k in KEPT], atol=0.1)
    assert obs["area_px"].iloc[2] == (make_mask() == 5).sum()


def test_summary_and_info(manifest):
    summary = run(manifest)
    info = store_of(manifest).info
    dropped = {"nucleus touches the border": 2, "crop leaves the image": 2}
    assert (summary.images, summary.cells, summary.dropped) == (2, 6, dropped)
    assert info["dropped"] == dropped
    assert (info["kind"], info["crop_px"], info["dtype"], info["segmentation"]) == ("cells", CROP, "uint16", "masks")
    dna = store_of(manifest).images()[:, 0]
    assert info["intensity"]["DNA"]["max"] == dna.max()
    assert info["intensity"]["DNA"]["p50"] == pytest.approx(np.median(dna), abs=1)
    text = str(summary)
    assert "6 cells of 2 images" in text
    assert "LaminB1" in text
    assert "2 (crop leaves the image)" in text
    assert {p.name for p in (manifest.parent / "out.qc").iterdir()} == {"a.png", "b.png"}


def test_anndata_opens_it(manifest):
    run(manifest)
    data = anndata.read_zarr(manifest.parent / "out.zarr")
    assert data.obsm["single_cell_images"].shape == (6, 3, CROP, CROP)
    assert list(data.var_names) == ["DNA", "LaminB1", "CD3"]


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_dtype_stays(tmp_path, dtype):
    data = make_image(dtype=dtype)
    write_image(tmp_path, "a.ome.tif", data=data)
    tifffile.imwrite(tmp_path / "k.tif", make_mask())
    summary = run(write_manifest(tmp_path, "image,mask\na.ome.tif,k.tif\n"))
    images = store_of(tmp_path / "m.csv").images()
    assert images.dtype == dtype
    for i, marker in enumerate(("DNA", "LaminB1")):
        assert summary.intensity[marker]["min"] == images[:, i].min()
        assert summary.intensity[marker]["p99"] == pytest.approx(np.percentile(images[:, i], 99), rel=0.02)


def test_segments_where_there_is_no_mask(tmp_path):
    write_image(tmp_path, "a.ome.tif")
    settings = SegmentSettings(background="20 px", split="8 px", min_diameter="6 px")
    summary = run(write_manifest(tmp_path, "image\na.ome.tif\n"), segment=settings)
    assert summary.cells == 3
    assert any("no group column" in w for w in summary.warnings)
    store = store_of(tmp_path / "m.csv")
    assert store.info["segmentation"]["split"] == "8 px"
    np.testing.assert_allclose(
        sorted(map(tuple, store.obs[["centroid_y_px", "centroid_x_px"]].to_numpy())),
        sorted(CENTRES[k] for k in KEPT),
        atol=1,
    )


def test_neighbours_are_masked_on_request(manifest):
    run(manifest, mask_neighbours=True)
    store = store_of(manifest)
    y, x = (int(np.rint(c - (CROP - 1) / 2)) for c in CENTRES[1])
    other = make_mask()[y : y + CROP, x : x + CROP] == 2
    assert other.any()
    assert not store.images()[0, 0][other].any()
    assert store.images()[0, 0][~other].all()


def test_resampling_keeps_places_and_sizes_in_micrometres(tmp_path):
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    write_image(tmp_path, "a.ome.tif", **sizes)
    tifffile.imwrite(tmp_path / "k.tif", make_mask())
    run(write_manifest(tmp_path, "image,mask\na.ome.tif,k.tif\n"), pixel_size_um=1.0, crop_px=16)
    store = store_of(tmp_path / "m.csv")
    assert store.pixel_size_um == 1.0
    assert store.dtype == np.uint16
    np.testing.assert_allclose(store.obs[["centroid_y_px", "centroid_x_px"]], [CENTRES[k] for k in KEPT], atol=0.6)
    np.testing.assert_allclose(store.obsm("spatial")[:, ::-1], np.array([CENTRES[k] for k in KEPT]) * 0.5, atol=0.3)
    np.testing.assert_allclose(store.obs["area_px"], np.pi * 64 / 4, rtol=0.1)
    full = make_image()[0][make_mask() == 5].mean()
    assert store.mean_intensity[2, 0] == pytest.approx(full, rel=0.08)  # edges blur


def test_spatial_is_in_micrometres_also_without_resampling(manifest):
    run(manifest, source_pixel_size_um=0.25)
    store = store_of(manifest)
    np.testing.assert_allclose(store.obsm("spatial")[:, 0], store.obs["centroid_x_px"] * 0.25)


def test_markers_aliases_and_chromatin(manifest):
    run(manifest, aliases={"Chromatin": ["DNA"]}, markers=["cd3"], chromatin="dna")
    panel = store_of(manifest).panel
    assert panel.markers == ("Chromatin", "CD3")
    assert panel.index("DNA") == 0


def test_manifest_names_channels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", make_image(), photometric="minisblack")
    tifffile.imwrite(tmp_path / "k.tif", make_mask())
    path = write_manifest(tmp_path, "image,mask,channels\na.tif,k.tif,LaminB1;DNA\n")
    run(path)
    assert store_of(path).panel.markers == ("DNA", "LaminB1")
    path.write_text("image,mask\na.tif,k.tif\n")
    run(path, channels=["DNA", "ER"], overwrite=True)
    assert store_of(path).panel.markers == ("DNA", "ER")


def test_folders_of_channels(tmp_path):
    (tmp_path / "A01").mkdir()
    for name, plane in zip(("DNA", "ER"), make_image(), strict=True):
        tifffile.imwrite(tmp_path / "A01" / f"{name}.tif", plane)
    tifffile.imwrite(tmp_path / "k.tif", make_mask())
    assert run(write_manifest(tmp_path, "image,mask\nA01,k.tif\n"), pattern="{channel}.tif").cells == 3


@pytest.mark.parametrize("columns", [("roi", "label"), ("section", "nr")])
def test_a_table_of_cells_is_joined(manifest, columns):
    rows = [("a", 1, "T", 0.5), ("a", 5, "B", 1.5), ("b.ome.tif", 2, "T", 2.5), ("z", 1, "T", 0)]
    table = manifest.parent / "cells.csv"
    pd.DataFrame(rows, columns=[*columns, "type", "score"]).to_csv(table, index=False)
    named = dict(zip(("cells_image_column", "cells_label_column"), columns, strict=True)) if columns[1] == "nr" else {}
    summary = run(manifest, cells=table, **named)
    obs = store_of(manifest).obs
    assert obs.loc[["a:1", "a:5", "b:2"], "type"].tolist() == ["T", "B", "T"]
    assert obs.loc["b:2", "score"] == 2.5
    assert obs["type"].isna().sum() == 3
    assert "3 cell(s) without a row in the table of cells" in summary.warnings
    assert any(w.startswith("1 row(s) of the table of cells name no image") for w in summary.warnings)


def test_a_table_of_other_cells_is_refused(manifest):
    table = manifest.parent / "cells.csv"
    table.write_text("image,label,type\na,99,T\n")
    with pytest.raises(InputError, match="no label of the table of cells"):
        run(manifest, cells=table)
    table.write_text("image,label,dose\na,1,T\n")
    with pytest.raises(InputError, match=r"both have the column\(s\) dose"):
        run(manifest, cells=table)


def test_a_binary_mask_is_split_into_its_parts(manifest):
    tifffile.imwrite(manifest.parent / "a_mask.tif", (make_mask() == 1) | (make_mask() == 5))
    summary = run(manifest)
    assert summary.cells == 5
    assert any("1 binary mask" in w for w in summary.warnings)


def test_labels_of_any_size(manifest):
    big = make_mask().astype(np.uint32)
    tifffile.imwrite(manifest.parent / "a_mask.tif", np.where(big == 5, 4_000_000_000, big).astype(np.uint32))
    run(manifest)
    assert store_of(manifest).obs.index[2] == "a:4000000000"


def test_progress_counts_images(manifest):
    seen = []
    run(manifest, progress=lambda *step: seen.append(step))
    assert seen == [(1, 2, "a"), (2, 2, "b")]


def change(manifest, old, new):
    manifest.write_text(manifest.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"markers": ["LaminB2"]}, r"no marker 'LaminB2' in the panel .*Did you mean 'LaminB1'"),
        ({"chromatin": "DAPI"}, r"no marker 'DAPI' in the panel LaminB1, DNA, CD3"),
        ({"chromatin": "LaminB1"}, r"b\.ome\.tif lacks the chromatin marker 'LaminB1'"),
        ({"aliases": {"DNA": ["LaminB1"]}}, r"a\.ome\.tif holds the marker 'DNA' twice, as 'LaminB1' and 'DNA'"),
        ({"crop_px": 129}, r"a\.ome\.tif is 128 x 128 pixels: a crop of 129 does not fit"),
        ({"crop_px": 127}, r"all 10 nuclei were dropped: .*crop leaves the image.*Lower crop_px"),
        ({"pixel_size_um": 1.0}, r"a\.ome\.tif does not say its pixel size.*source_pixel_size_um"),
        ({"pixel_size_um": 1.0, "source_pixel_size_um": 0.2}, r"26 x 26 pixels after resampling"),
    ],
)
def test_options_that_do_not_fit_the_images(manifest, options, message):
    with pytest.raises(InputError, match=message):
        run(manifest, **options)
    assert not list(manifest.parent.glob("out.zarr*"))


def test_cells_that_were_not_stained_for_chromatin_are_cut_by_their_mask(manifest):
    folder = manifest.parent
    write_image(folder, "b.ome.tif", ("CD3", "CD8"))
    summary = run(manifest)
    assert any(w.startswith("1 of 2 images do not show DNA") for w in summary.warnings)
    store = CellStore(folder / "out.zarr")
    of_b = store.obs["image"].to_numpy() == "b"
    assert of_b.sum() == (~of_b).sum() == len(KEPT)
    shown = {m: store.measured[of_b, store.panel.index(m)] for m in store.panel.markers}
    assert {m for m, known in shown.items() if known.all()} == {"CD3", "CD8"}
    assert {m for m, known in shown.items() if known.any()} == {"CD3", "CD8"}
    assert not store.images(np.flatnonzero(of_b))[:, store.panel.chromatin_index].any()
    assert (folder / "out.qc" / "b.png").exists()


def test_without_chromatin_there_must_be_a_mask_and_no_other_name_of_it(manifest):
    folder = manifest.parent
    change(manifest, "b_mask.tif", "")
    write_image(folder, "b.ome.tif", ("CD3", "CD8"))
    with pytest.raises(InputError, match=r"b\.ome\.tif lacks the chromatin marker 'DNA': .*without a mask"):
        run(manifest)
    change(manifest, "b.ome.tif,", "b.ome.tif,b_mask.tif")
    write_image(folder, "b.ome.tif", ("CD3", "Hoechst"))
    with pytest.raises(InputError, match=r"b\.ome\.tif lacks .* say so: aliases=\{DNA: \[Hoechst\]\}"):
        run(manifest)
    write_image(folder, "b.ome.tif", ("CD3", "CD8"))
    with pytest.raises(InputError, match=r"b\.ome\.tif holds none of .*LaminB1.*, only CD3, CD8: leave it out"):
        run(manifest, markers=["LaminB1"])


def test_broken_image_in_the_middle_leaves_no_store_and_a_rerun_works(manifest):
    data = make_image(("dna", "CD3"), "float32")
    write_image(manifest.parent, "a.ome.tif", ("LaminB1", "DNA"), make_image(dtype="float32"))
    write_image(manifest.parent, "b.ome.tif", ("dna", "CD3"), np.where(data == data.max(), np.nan, data))
    with pytest.raises(InputError, match=r"b\.ome\.tif: channel .* NaN"):
        run(manifest)
    with pytest.raises(InputError, match="no store at"):
        store_of(manifest)
    write_image(manifest.parent, "b.ome.tif", ("dna", "CD3"), data)
    assert run(manifest).cells == len(store_of(manifest)) == 6


def test_interrupted_prepare_keeps_the_store_that_was_there(manifest, monkeypatch):
    run(manifest)
    before, folder = store_of(manifest).data_hash, manifest.parent
    (folder / "out.qc" / "a.png").write_text("of this store")

    def stop(done, total, image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(manifest, mask_neighbours=True, overwrite=True, progress=stop)
    assert store_of(manifest).data_hash == before
    with pytest.raises(InputError, match="exists already"):
        run(manifest)
    assert (folder / "out.qc" / "a.png").read_text() == "of this store"
    assert {p.name for p in (folder / "out.qc.partial").iterdir()} == {"a.png"}  # to look at
    run(manifest, overwrite=True)
    assert (folder / "out.qc" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "out.qc.partial").exists()


@pytest.mark.parametrize("method", ["append", "finish"])
def test_disk_full(manifest, monkeypatch, method):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StoreWriter, method, full)
    with pytest.raises(InputError, match=r"the disk is full: .*out\.zarr could not be written"):
        run(manifest)
    assert not list(manifest.parent.glob("out.zarr*"))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    data = np.pad(make_image(), ((0, 0), (0, 512), (0, 512)))  # the image, not its few crops, is what counts
    write_image(tmp_path, "0.ome.tif", data=data)
    tifffile.imwrite(tmp_path / "k.tif", np.pad(make_mask(), ((0, 512), (0, 512))))
    for i in range(1, 12):
        os.link(tmp_path / "0.ome.tif", tmp_path / f"{i}.ome.tif")

    def peak(images):
        path = write_manifest(tmp_path, "image,mask\n" + "".join(f"{i}.ome.tif,k.tif\n" for i in range(images)))
        tracemalloc.start()
        run(path, qc=False, overwrite=True)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(2)  # what is made once and stays
    assert peak(12) - peak(2) < data.nbytes


@pytest.mark.parametrize("size", [None, 0.7])
@pytest.mark.parametrize("masked", [True, False])
def test_images_scaled_one_by_one_are_told_also_where_they_are_resampled(tmp_path, size, masked):
    for i in range(5):
        data = make_image(("DNA",), seed=i).astype(float)
        data = (65535 * (data - data.min()) / np.ptp(data)).astype(np.uint16)
        write_image(tmp_path, f"{i}.ome.tif", ("DNA",), data, PhysicalSizeX=0.5, PhysicalSizeY=0.5)
    tifffile.imwrite(tmp_path / "k.tif", make_mask())
    rows = "".join(f"{i}.ome.tif,{'k.tif' if masked else ''}\n" for i in range(5))
    small = SegmentSettings(min_diameter="6 px", max_diameter="40 px")
    summary = run(write_manifest(tmp_path, "image,mask\n" + rows), pixel_size_um=size, crop_px=24, segment=small)
    assert any("as if scaled one by one" in warning for warning in summary.warnings)


@pytest.mark.skipif("IMGSHARED_REAL_DATA" not in os.environ, reason="IMGSHARED_REAL_DATA is not set")
def test_real_regions_with_masks(tmp_path):
    folder = Path(os.environ["IMGSHARED_REAL_DATA"]).resolve() / "imc_spleen"
    path = write_manifest(tmp_path, f"image,mask\n{folder}/ROI002.ome.tif,{folder}/ROI002_cells.tif\n")
    summary = run(path, cells=folder / "cells.csv", source_pixel_size_um=1.0)
    assert summary.cells == 3595
    assert store_of(path).obs["region"].notna().all()

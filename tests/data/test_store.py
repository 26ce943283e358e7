import shutil

import anndata
import numpy as np
import pandas as pd
import pytest

from imgshared.data import store as module
from imgshared.data.panel import Panel
from imgshared.data.store import IMAGES, MASKS, CellStore, StoreWriter, panel_table
from imgshared.types import InputError

PANEL = Panel(("DNA", "LaminB1"), "DNA", {"LaminB1": ("LMNB1", "lamin")})


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 999, (count, 2, 16, 16)).astype(np.uint16), rng.random((count, 16, 16)) > 0.5


def write(path, blocks, **options):
    writer = StoreWriter(path, **options)
    for images, masks in blocks:
        writer.append(**{IMAGES: images, MASKS: masks})
    count = sum(len(images) for images, _ in blocks)
    obs = pd.DataFrame(
        {"group": pd.Categorical(["a"] * count)}, index=pd.Index([str(i) for i in range(count)], name="cell_id")
    )
    return writer.finish(
        obs,
        panel_table(PANEL),
        np.ones((count, 2)),
        layers={"measured": np.ones((count, 2), bool)},
        obsm={"spatial": np.zeros((count, 2))},
        info={"crop_px": 16, "pixel_size_um": 0.5},
    )


def test_rows_come_back_in_order_whatever_the_blocks(tmp_path):
    images, masks = rows(1300)
    a = CellStore(write(tmp_path / "a.zarr", [(images, masks)]))
    b = CellStore(write(tmp_path / "b.zarr", [(images[i : i + 7], masks[i : i + 7]) for i in range(0, 1300, 7)]))
    for store in (a, b):
        np.testing.assert_array_equal(store.images(), images)
        np.testing.assert_array_equal(store.masks(), masks)
    cells = np.array([1299, 3, 3, 640])
    np.testing.assert_array_equal(a.images(cells), images[cells])
    assert a.images(np.array([], int)).shape == (0, 2, 16, 16)


def test_what_the_store_knows(tmp_path):
    store = CellStore(write(tmp_path / "a.zarr", [rows(5)]))
    assert store.panel == PANEL
    assert (len(store), store.crop_px, store.pixel_size_um, store.dtype) == (5, 16, 0.5, np.uint16)
    assert store.measured.dtype == bool
    assert set(store.obsm_names()) == {IMAGES, MASKS, "spatial"}


def test_anndata_opens_it(tmp_path):
    data = anndata.read_zarr(write(tmp_path / "a.zarr", [rows(5)]))
    assert data.shape == (5, 2)
    np.testing.assert_array_equal(data.obsm[IMAGES], rows(5)[0])


def test_data_hash_tells_crops_apart(tmp_path):
    hashes = [CellStore(write(tmp_path / f"{i}.zarr", [rows(5, seed)])).data_hash for i, seed in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_existing_store_is_replaced_only_when_asked(tmp_path):
    path = write(tmp_path / "a.zarr", [rows(5)])
    with pytest.raises(InputError, match=r"a\.zarr exists already"):
        write(path, [rows(6)])
    assert len(CellStore(path)) == 5
    assert len(CellStore(write(path, [rows(6)], overwrite=True))) == 6


def test_an_interrupted_store_is_no_store(tmp_path):
    writer = StoreWriter(tmp_path / "a.zarr")
    writer.append(**{IMAGES: rows(3)[0]})
    with pytest.raises(InputError, match=r"no store at .*a\.zarr.*interrupted run left .*run the command again"):
        CellStore(tmp_path / "a.zarr")
    writer.partial.rename(tmp_path / "b.zarr")
    with pytest.raises(InputError, match=r"b\.zarr is not a whole cell store"):
        CellStore(tmp_path / "b.zarr")


def test_what_is_no_store(tmp_path):
    with pytest.raises(InputError, match=r"no store at .*none\.zarr"):
        CellStore(tmp_path / "none.zarr")
    (tmp_path / "file.zarr").write_text("no")
    with pytest.raises(InputError, match=r"file\.zarr is not a Zarr store"):
        CellStore(tmp_path / "file.zarr")


def test_only_a_store_is_ever_replaced(tmp_path, write_image):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("irreplaceable")
    write_image(tmp_path / "raw.ome.zarr", rows(1)[0][0])
    anndata.AnnData(np.ones((2, 2))).write_zarr(tmp_path / "atlas.zarr")
    before = sorted(tmp_path.rglob("*"))
    for name in ("thesis", "raw.ome.zarr", "atlas.zarr"):
        with pytest.raises(InputError, match=f"{name} is not a store, so it is not replaced"):
            StoreWriter(tmp_path / name, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_backup_beside_stays(tmp_path):
    write(tmp_path / "a.zarr", [rows(5)]).rename(tmp_path / "a.zarr.old")
    write(tmp_path / "a.zarr", [rows(6)])
    write(tmp_path / "a.zarr", [rows(7)], overwrite=True)
    assert [len(CellStore(tmp_path / name)) for name in ("a.zarr", "a.zarr.old")] == [7, 5]
    assert len(list(tmp_path.iterdir())) == 2


def test_of_a_link_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "a.zarr").symlink_to(tmp_path / "scratch" / "b.zarr")
    for count in (5, 6, 7):
        write(tmp_path / "a.zarr", [rows(count)], overwrite=True)
        assert len(CellStore(tmp_path / "scratch" / "b.zarr")) == count
    assert (tmp_path / "a.zarr").is_symlink()
    assert sorted(p.name for p in tmp_path.rglob("*.zarr*")) == ["a.zarr", "b.zarr"]


def test_only_what_an_interrupted_run_left_is_removed(tmp_path):
    partial = write(tmp_path / "b.zarr", [rows(5)]).rename(tmp_path / "a.zarr.partial")
    with pytest.raises(
        InputError, match=r"a\.zarr\.partial is in the way, and no interrupted run left it: move it away"
    ):
        StoreWriter(tmp_path / "a.zarr")
    assert len(CellStore(partial)) == 5
    shutil.rmtree(partial)
    StoreWriter(tmp_path / "a.zarr").append(**{IMAGES: rows(3)[0]})
    assert partial.exists()
    assert len(CellStore(write(tmp_path / "a.zarr", [rows(6)]))) == 6
    assert not partial.exists()


@pytest.mark.parametrize("name", [f"obsm/{IMAGES}/c/1/0/0/0", f"obsm/{MASKS}/c/0/0/0", "obs/group/codes/c/0"])
def test_a_lost_file_is_told_even_where_all_was_zero(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "SHARD_CHUNKS", 1)
    path = write(tmp_path / "a.zarr", [[np.zeros_like(part) for part in rows(300)]])
    assert not CellStore(path).images().any()
    (path / name).unlink()
    with pytest.raises(InputError, match=rf"a\.zarr is damaged, it lacks 1 file\(s\), as .*{name}: copy it again"):
        CellStore(path)


def test_a_store_that_made_no_promise_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "promise_every_chunk", lambda root: None)  # as those that were written before
    path = write(tmp_path / "a.zarr", [rows(5)])
    (path / "obsm" / MASKS / "c" / "0" / "0" / "0").unlink()
    assert not CellStore(path).masks().any()


@pytest.mark.parametrize(
    "name", ["obs/zarr.json", "uns/imgshared/c", f"obsm/{IMAGES}/c/0/0/0/0", f"obsm/{IMAGES}/zarr.json"]
)
def test_a_file_that_was_cut_off_is_told(tmp_path, name):
    path = write(tmp_path / "a.zarr", [rows(5)])
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.zarr is damaged \(.*\): copy it again"):
        CellStore(path).images()


def test_scattered_cells_are_read_a_shard_at_a_time_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr("imgshared.data.store.SHARD_CHUNKS", 8)
    images, masks = rows(6000)
    store = CellStore(write(tmp_path / "a.zarr", [(images, masks)]))
    array = store._array(IMAGES)
    assert len(images) > array.shards[0] > 4 * array.chunks[0]
    asked, get = [], type(array).__getitem__

    def seen(self, key):
        asked.append(key.stop - key.start)
        return get(self, key)

    monkeypatch.setattr(type(array), "__getitem__", seen)
    cells = np.random.default_rng(0).permutation(6000)[:3000]
    np.testing.assert_array_equal(store.images(cells), images[cells])
    assert max(asked) <= array.shards[0]
    in_order = np.arange(0, 6000, 7)
    np.testing.assert_array_equal(store.images(in_order), images[in_order])

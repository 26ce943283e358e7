"""The simulator keeps its promises: who shows what, who does not, and files that a microscope could have written."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy.ndimage import center_of_mass

from imgshared.data.optics import PANELS
from imgshared.data.simulate import FACTORS, Field, draw_factors, draw_field, plan_fields, simulate
from imgshared.types import InputError

SHARED = ["nuclear_area", "shape_x", "shape_y", "heterochromatin"]
SPECIFIC = [factor.name for factor in FACTORS if factor.kind == "specific"]
CAMERA = {"field_px": 384, "pixel_size_um": 0.5, "seed": 0}


def field_of(batch: str, cells: int = 24, **changes: object) -> Field:
    field = Field(0, donor=0, batch=batch, treatment="control", drug="vehicle", replicate=0, cells=cells)
    return replace(field, **changes)  # type: ignore[arg-type]


def many_factors(scenario: str, cells: int = 300) -> pd.DataFrame:
    fields = plan_fields(64 * cells, 8, 10_000)
    return pd.concat([draw_factors(f, scenario, 0).assign(donor=f.donor) for f in fields], ignore_index=True)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("simulate") / "out", cells=203, donors=2, seed=3)


def test_tables_describe_the_files(experiment: Path) -> None:
    manifest, cells = pd.read_csv(experiment / "manifest.csv"), pd.read_csv(experiment / "cells.csv")
    assert list(manifest) == ["image", "mask", "group", "batch", "treatment", "drug", "field"]
    assert list(cells) == ["image", "label", *(f.name for f in FACTORS if f.kind != "condition"), "y_px", "x_px"]
    assert len(cells) == 203
    assert not cells.isna().any(axis=None)
    assert set(cells["image"]) == set(manifest["image"])
    assert [factor["name"] for factor in json.loads((experiment / "factors.json").read_text())] == [
        f.name for f in FACTORS
    ]
    design = manifest.groupby(["group", "batch", "treatment", "drug"]).size()
    assert len(design) == 2 * 2 * 2 * 2  # each donor: both batches, all four conditions
    for row in manifest.itertuples():
        with tifffile.TiffFile(experiment / row.image) as tif:
            ome = tif.ome_metadata
            image = tif.asarray()
            assert tif.series[0].axes == "CYX"
        assert [part.split('"')[0] for part in ome.split('Name="')[1:] if "Image" not in part.split('"')[0]] == list(
            PANELS[row.batch]
        )
        assert 'PhysicalSizeX="0.5" PhysicalSizeXUnit="µm"' in ome
        labels = tifffile.imread(experiment / row.mask)
        assert image.dtype == np.uint16
        assert image.shape == (4, *labels.shape) == (4, 384, 384)
        mine = cells[cells["image"] == row.image]
        assert sorted(set(np.unique(labels)) - {0}) == sorted(mine["label"])


def test_masks_lie_where_cells_csv_says_and_have_the_size_of_nuclei(experiment: Path) -> None:
    cells = pd.read_csv(experiment / "cells.csv")
    areas, inside = [], []
    for image, mine in cells.groupby("image"):
        labels = tifffile.imread(experiment / image.replace("images", "masks").replace(".ome.tif", ".tif"))
        whole = mine[mine[["y_px", "x_px"]].min(axis=1).gt(20) & mine[["y_px", "x_px"]].max(axis=1).lt(364)]
        found = np.array(center_of_mass(labels > 0, labels, whole["label"]))
        assert np.abs(found - whole[["y_px", "x_px"]].to_numpy()).max() < 2
        areas.append(pd.Series(np.bincount(labels.ravel())[whole["label"]], index=whole.index))
        inside.append(mine[["y_px", "x_px"]].min(axis=1).gt(32) & mine[["y_px", "x_px"]].max(axis=1).lt(352))
    area = pd.concat(areas)
    diameter_um = 2 * np.sqrt(area / np.pi) * 0.5
    assert diameter_um.between(8, 15.5).all()
    assert np.corrcoef(np.log(area), cells.loc[area.index, "nuclear_area"])[0, 1] > 0.98
    assert pd.concat(inside).mean() > 0.9  # most 64-pixel crops are whole


def test_same_arguments_same_files_whatever_the_threads(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("imgshared.data.simulate")
    monkeypatch.setattr(module, "ThreadPoolExecutor", partial(ThreadPoolExecutor, max_workers=1))
    again = simulate(tmp_path / "again", cells=203, donors=2, seed=3)
    names = sorted(str(path.relative_to(experiment)) for path in experiment.rglob("*.*"))
    assert names == sorted(str(path.relative_to(again)) for path in again.rglob("*.*"))
    for name in names:
        if name.endswith(".tif"):  # the OME header carries a random UUID; the pixels do not
            np.testing.assert_array_equal(tifffile.imread(experiment / name), tifffile.imread(again / name))
        else:
            assert (experiment / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize("batch", ["A", "B"])
def test_a_specific_factor_changes_its_own_stain_and_leaves_chromatin_untouched(batch: str) -> None:
    field = field_of(batch)
    factors = draw_factors(field, "independent", 0)
    before, labels, _ = draw_field(field, factors, **CAMERA)
    for factor in FACTORS:
        if factor.kind != "specific":
            continue
        moved = factors.copy()
        moved[factor.name] = factors[factor.name].to_numpy()[::-1]
        after, labels_after, _ = draw_field(field, moved, **CAMERA)
        np.testing.assert_array_equal(labels_after, labels)
        np.testing.assert_array_equal(after[0], before[0])
        # In blocks, because a slightly changed light also redraws the shot noise.
        blocks = (after.astype(float) - before).reshape(4, 24, 16, 24, 16).mean(axis=(2, 4))
        change = np.abs(blocks).mean(axis=(1, 2))
        if factor.marker in PANELS[batch]:
            own = PANELS[batch].index(factor.marker)
            others = np.delete(change, own)
            assert change[own] > 5 * others.max()
        else:
            assert not change.any()


def test_drug_and_scenario_leave_chromatin_untouched() -> None:
    field = field_of("A")
    plain, _, _ = draw_field(field, draw_factors(field, "independent", 0), **CAMERA)
    drugged = field_of("A", drug="drug")
    after, _, _ = draw_field(drugged, draw_factors(drugged, "independent", 0), **CAMERA)
    entangled, _, _ = draw_field(field, draw_factors(field, "entangled", 0), **CAMERA)
    np.testing.assert_array_equal(after[:2], plain[:2])
    np.testing.assert_array_equal(entangled[0], plain[0])
    assert np.abs(after[2].astype(float) - plain[2]).mean() > 5


def test_independent_specific_factors_know_nothing_of_the_shared_ones() -> None:
    factors = many_factors("independent")
    factors["monocyte"] = (factors["cell_type"] == "monocyte") * 1.0
    factors["treated"] = (factors["treatment"] == "treated") * 1.0
    correlation = factors[[*SHARED, *SPECIFIC, "monocyte", "treated"]].corr()
    assert correlation.loc[SPECIFIC, [*SHARED, "monocyte", "treated"]].abs().max(axis=None) < 0.04
    among = correlation.loc[SPECIFIC, SPECIFIC].to_numpy() - np.eye(len(SPECIFIC))
    assert np.abs(among).max() < 0.04


def test_entangled_specific_factors_follow_the_shared_ones() -> None:
    factors = many_factors("entangled")
    vehicle = factors[factors["drug"] == "vehicle"]
    correlation = vehicle[[*SHARED, *SPECIFIC]].corr().loc[SPECIFIC, ["nuclear_area", "heterochromatin"]].abs()
    assert correlation.max(axis=1).between(0.5, 0.7).all()


def test_conditions_act_where_they_should() -> None:
    factors = many_factors("independent")

    def shift(condition: str, treated: str, name: str) -> float:
        groups = factors.groupby(condition)[name]
        return float((groups.mean()[treated] - groups.mean().drop(treated).item()) / np.sqrt(groups.var().mean()))

    assert 1.0 < shift("treatment", "treated", "nuclear_area") < 1.5
    assert -1.5 < shift("treatment", "treated", "heterochromatin") < -1.0
    assert shift("drug", "drug", "foxo_switch") > 2
    for name in {*SHARED, *SPECIFIC} - {"nuclear_area", "heterochromatin"}:
        assert abs(shift("treatment", "treated", name)) < 0.08
    for name in {*SHARED, *SPECIFIC} - {"foxo_switch"}:
        assert abs(shift("drug", "drug", name)) < 0.08
    assert factors["foxo_switch"].between(0, 1).all()
    assert factors["foci"].isin(range(16)).all()
    donors = factors.groupby("donor")["nuclear_area"].mean()
    assert 0.1 < donors.std() < 0.5


def test_stains_show_their_factors() -> None:
    for batch, checks in {
        "A": {"lamin_level": 1, "foxo_switch": 2},
        "B": {"foci": 2, "heterochromatin": 0},
    }.items():
        values: dict[str, list[tuple[float, float]]] = {name: [] for name in checks}
        for index in range(4):
            field = field_of(batch, index=index, drug=("vehicle", "drug")[index % 2])
            factors = draw_factors(field, "independent", 0)
            counts, labels, _ = draw_field(field, factors, **CAMERA)
            for label, row in enumerate(factors.to_dict("records"), start=1):
                for name, channel in checks.items():
                    pixels = counts[channel][labels == label]
                    seen = pixels.std() / pixels.mean() if name == "heterochromatin" else pixels.mean()
                    values[name].append((row[name], float(seen)))
        for name, pairs in values.items():
            assert np.corrcoef(np.array(pairs).T)[0, 1] > (0.6 if name == "heterochromatin" else 0.85), name


def test_pixels_are_what_a_camera_gives(experiment: Path) -> None:
    image = tifffile.imread(next((experiment / "images").iterdir()))
    assert image.min() > 50  # offset and background
    assert image.max() < 20_000  # far from saturation
    assert np.percentile(image, 5) < 250


def test_nuclei_do_not_overlap_in_full_fields() -> None:
    field = field_of("A", cells=32)
    factors = draw_factors(field, "independent", 0)
    _, labels, centers = draw_field(field, factors, **CAMERA)
    assert len(np.unique(labels)) == 33
    gaps = np.linalg.norm(centers[:, None] - centers, axis=2) + 1e9 * np.eye(32)
    assert gaps.min() * 0.5 > 9  # micrometres


def test_progress_counts_the_images(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    simulate(tmp_path / "out", cells=8, donors=1, field_px=128, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"cells": 7}, "cells=7"),
        ({"scenario": "mixed"}, "mixed"),
        ({"field_px": 64}, "field_px=64"),
        ({"pixel_size_um": 0.0}, "pixel_size_um=0.0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, changes: dict[str, object], culprit: str) -> None:
    with pytest.raises(InputError, match=culprit):
        simulate(tmp_path / "out", **{"donors": 1, "cells": 8, **changes})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_filled_folder_is_refused_and_an_empty_one_used(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not an empty folder"):
        simulate(tmp_path, cells=8, donors=1)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    simulate(tmp_path / "empty", cells=8, donors=1, field_px=128)
    assert not (tmp_path / "empty.partial").exists()


def test_an_interrupted_simulation_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "out", cells=8, donors=1, field_px=128, progress=stop)
    assert not (tmp_path / "out").exists()

"""An evaluation writes where nothing of the user's is lost, and says so before it begins."""

import shutil

import anndata
import numpy as np
import pandas as pd
import pytest

from imgshared import api
from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.evaluation import by_cell
from imgshared.evaluation.by_cell import FIDELITY
from imgshared.evaluation.collect import Part
from imgshared.evaluation.place import OURS, refuse_place
from imgshared.types import InputError


def digest(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_no_store_that_is_read_is_written_over(trained_run, toy, make_store, tmp_path):
    store = api.open_store(make_store(tmp_path / "t" / "cells.zarr"))
    other = api.open_store(make_store(tmp_path / "other.zarr"))
    before = digest(tmp_path)
    for out, given, wish in (
        (tmp_path / "t", store, {}),
        (tmp_path / "t" / "cells.zarr", store, {}),
        (tmp_path / "t" / "cells.zarr" / "deep", store, {}),
        (tmp_path / "t", other, {"predictions": str(store.path)}),
    ):
        with pytest.raises(InputError, match=r"where the judged cells are written, is, holds or lies in .*cells\.zarr"):
            api.evaluate(trained_run, given, out, **wish)
    with pytest.raises(InputError, match="holds or lies in"):
        refuse_place(toy.path.parent, trained_run, other, EvaluateConfig())  # of which the model learnt
    (tmp_path / "link").symlink_to(tmp_path / "t", target_is_directory=True)
    with pytest.raises(InputError, match="holds or lies in"):
        api.refit(trained_run, store, tmp_path / "link")
    (tmp_path / "link").unlink()
    assert digest(tmp_path) == before


def test_a_folder_of_something_else_is_left_alone(trained_run, toy, tmp_path):
    out = tmp_path / "mine"
    refuse_place(out, trained_run, toy, EvaluateConfig())
    out.mkdir()
    refuse_place(out, trained_run, toy, EvaluateConfig())
    (out / "tables").mkdir()
    (out / "tables" / "features.csv").write_text("mine")
    with pytest.raises(InputError, match="mine exists and holds no evaluation: choose another folder"):
        api.evaluate(trained_run, toy, out)
    for name in OURS:
        (out / name).touch()
        refuse_place(out, trained_run, toy, EvaluateConfig())
        (out / name).unlink()
    shutil.rmtree(out)
    out.write_text("mine")
    with pytest.raises(InputError, match="mine is a file"):
        api.evaluate(trained_run, toy, out)


def test_a_marker_with_a_slash_keeps_its_latents(tmp_path):
    panel = Panel(("DNA", "HLA-A/B"), "DNA")
    obs = pd.DataFrame({"group": ["a", "b"]}, index=["a:1", "b:1"])
    rows = pd.DataFrame({"cell_id": obs.index, "marker": "HLA-A/B", **dict.fromkeys(FIDELITY, 0.5)})
    latents = {"z_s [HLA-A/B]": np.ones((2, 3), np.float32)}
    part = Part(np.arange(2), obs, np.ones((2, 2), bool), latents=latents)
    by_cell.write(part, rows, panel, tmp_path / "cells.zarr")
    data = anndata.read_zarr(tmp_path / "cells.zarr")
    assert list(data.obsm) == ["z_s [HLA-A_B]"]
    assert list(data.var_names) == ["HLA-A/B"]

"""Cells with planted signals, and predictions as a model would make them, without any training.

`drug` acts on chromatin and Rim (shared), `switch` moves Foci between nucleus and cytoplasm (specific: chromatin and
predictions cannot know it).
"""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from imgshared.config import Experiment
from imgshared.data.panel import Panel
from imgshared.data.split import Split
from imgshared.data.store import CellStore, StoreWriter, panel_table
from imgshared.prediction.types import PredictedCells
from imgshared.types import InputError

SIDE = 32
PANEL = Panel(("DNA", "Rim", "Foci"), "DNA")


class World:
    """Everything about the planted cells: obs, images (n, 3, Y, X), masks and what is predicted of them."""

    def __init__(self, n=600, groups=12, seed=0):
        rng = np.random.default_rng(seed)
        group = np.arange(n) % groups
        drug, switch = rng.integers(0, 2, n), rng.integers(0, 2, n)
        size = rng.uniform(6, 10, n)
        y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
        angle, stretch = rng.uniform(0, np.pi, n), rng.uniform(1, 1.4, n)
        u = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
        v = -np.sin(angle)[:, None, None] * x + np.cos(angle)[:, None, None] * y
        radius = np.sqrt((u / stretch[:, None, None]) ** 2 + (v * stretch[:, None, None]) ** 2)
        edge = radius - size[:, None, None]
        self.masks = edge < 0
        inside = 1 / (1 + np.exp(edge))
        grain = gaussian_filter(rng.normal(0, 1, (n, SIDE, SIDE)), (0, 1.2, 1.2)) * 1.2
        texture = 0.55 + grain * (0.12 + 0.16 * drug[:, None, None])
        brightness = rng.normal(1, 0.06, groups)[group][:, None, None]
        dna = inside * texture * brightness
        rim = np.exp(-((edge / 1.8) ** 2)) * (0.4 + 0.35 * drug[:, None, None])
        cytoplasm = (1 - inside) * np.exp(-np.maximum(edge, 0) / 5)
        weight = np.where(switch == 1, 0.85, 0.25)[:, None, None]
        foci = 0.7 * (weight * inside + (1 - weight) * cytoplasm)
        truth = np.stack([dna, rim, foci], 1)
        self.real = (truth + rng.normal(0, 0.03, truth.shape)).astype(np.float32)
        self.measured = np.ones((n, 3), bool)
        self.measured[::7, 2] = False  # some cells lack Foci
        self.real[~self.measured] = 0
        blind = 0.7 * 0.55 * inside + 0.7 * 0.45 * cytoplasm
        self.predicted = np.stack([dna, rim * 0.96, blind], 1).astype(np.float32)
        self.full, self.shared_only = truth.astype(np.float32), self.predicted.copy()
        for rebuilt in (self.full, self.shared_only):
            rebuilt[~self.measured] = 0
        z = np.column_stack([size, drug * 2.0, stretch])
        self.z_s = (z @ rng.normal(0, 1, (3, 8)) + rng.normal(0, 0.05, (n, 8))).astype(np.float32)
        self.z_m = {m: rng.normal(0, 1, (n, 4)).astype(np.float32) for m in PANEL.markers}
        self.z_m["Foci"][:, 0] += 4 * switch
        self.z_m["Foci"][~self.measured[:, 2]] = np.nan
        self.obs = pd.DataFrame(
            {
                "image": [f"image{g}" for g in group],
                "group": [f"donor{g:02d}" for g in group],
                "drug": np.where(drug, "treated", "control"),
                "switch": np.where(switch, "on", "off"),
                "one": "same",
                "size": size,
                "switched": switch.astype(float),
            },
            index=pd.Index([f"cell{i}" for i in range(n)], name="cell_id"),
        )

    def predict(self, run, store, cells, *, full=True, shared=True, **_):
        """Stand in for `predict_cells`."""
        images = {"predicted": self.predicted[cells]}
        images |= {"full": self.full[cells]} if full else {}
        images |= {"shared": self.shared_only[cells]} if shared else {}
        z_s = {m: np.where(self.measured[cells, c, None], self.z_s[cells], np.nan) for c, m in enumerate(PANEL.markers)}
        return PredictedCells(
            cells,
            self.real[cells],
            self.measured[cells],
            self.masks[cells],
            images,
            {"sources": self.z_s[cells], **z_s},
            {m: z[cells] for m, z in self.z_m.items()},
        )

    def store(self, path) -> CellStore:
        """Write the cells as a real store."""
        writer = StoreWriter(path)
        writer.append(single_cell_images=self.real, cell_masks=self.masks)
        writer.finish(
            self.obs,
            panel_table(PANEL),
            self.real.mean((2, 3)),
            layers={"measured": self.measured},
            obsm={"spatial": np.zeros((len(self.obs), 2))},
            info={"crop_px": SIDE, "pixel_size_um": 0.5},
        )
        return CellStore(path)


@pytest.fixture(scope="session")
def world():
    return World()


@pytest.fixture
def run(tmp_path):
    """A run folder with a log; donors 0 to 5 train, 6 and 7 validate, 8 to 11 are held out."""
    path = tmp_path / "planted-run"
    path.mkdir()
    lines = [
        json.dumps({"step": s, "epoch": s // 5, "stage": stage, "split": split, "time_s": s, "loss": 1 / (s + 1)})
        for stage in ("latents", "encoders")
        for s in range(0, 40, 4)
        for split in ("train", "val")
    ]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    donors = [f"donor{g:02d}" for g in range(12)]
    split = Split("group", tuple(donors[:6]), tuple(donors[6:8]), tuple(donors[8:]))
    contract = SimpleNamespace(data_hash="of another store", check=lambda store, needed: [0, 1, 2])

    def gone(why):
        raise InputError(why)

    return SimpleNamespace(
        path=path,
        experiment=Experiment(data="cells.zarr"),
        panel=PANEL,
        split=split,
        contract=contract,
        sources=(PANEL.chromatin,),
        source_channels=(PANEL.chromatin_index,),
        method=SimpleNamespace(sources=None, parameters=list, stages=()),
        title="a stand-in",
        refuse_sharp=lambda wanted: None,
        training_store=gone,
    )

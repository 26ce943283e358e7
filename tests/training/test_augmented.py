import dataclasses
import io

import pytest
from rich.console import Console

from imgshared.config import AugmentConfig
from imgshared.training.log import read_metrics
from imgshared.training.loop import train


@pytest.mark.parametrize("change", [{"scale": 0.2}, {"shift": 0.1}, {"flips": True}, {"noise": 0.1}])
def test_geometry_works_on_the_host_wherever_the_crops_were_wanted(tiny, tmp_path, change):
    experiment = dataclasses.replace(
        tiny,
        augment=AugmentConfig(**change),
        method=dataclasses.replace(tiny.method, one_step=True, latent_epochs=1, encoder_epochs=30),
        train=dataclasses.replace(tiny.train, residency="device"),
    )
    said = io.StringIO()
    train(experiment, tmp_path / "run", console=Console(file=said, width=300))
    assert ("crops in device memory" in said.getvalue()) == ("noise" in change)
    assert {r["stage"] for r in read_metrics(tmp_path / "run")} == {"one_step"}

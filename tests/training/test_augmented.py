import dataclasses
import io

import pytest
from rich.console import Console

from imgshared.config import AugmentConfig
from imgshared.training.log import read_metrics
from imgshared.training.loop import train


def augmented(tiny, residency, **change):
    return dataclasses.replace(
        tiny,
        augment=AugmentConfig(**change),
        method=dataclasses.replace(tiny.method, one_step=True, latent_epochs=1, encoder_epochs=30),
        train=dataclasses.replace(tiny.train, residency=residency),
    )


@pytest.mark.parametrize("change", [{"flips": True}, {"noise": 0.1}, {"rotate_deg": 5.0, "scale": 0.2, "shift": 0.1}])
def test_augmentation_works_where_the_crops_are(tiny, tmp_path, change):
    said = io.StringIO()
    train(augmented(tiny, "device", **change), tmp_path / "run", console=Console(file=said, width=300))
    assert "crops in device memory" in said.getvalue()
    assert {r["stage"] for r in read_metrics(tmp_path / "run")} == {"one_step"}

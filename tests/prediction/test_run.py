import shutil

import pytest
import torch

from imgshared.prediction import load_run
from imgshared.training.devices import make_fabric
from imgshared.types import InputError


def test_load_run_gives_the_best_weights_frozen(trained_run):
    run = load_run(trained_run.path)
    assert run.checkpoint.name == "best.safetensors"
    assert load_run(str(trained_run.path), checkpoint="last").checkpoint.name == "last.safetensors"
    assert not run.method.training
    assert not any(p.requires_grad for p in run.method.parameters())
    assert (run.panel.markers, run.split.test) == (("DNA", "P1", "P2"), ("g4",))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_what_was_trained_on_a_gpu_opens_where_there_is_none(kind, trained_run, tmp_path, monkeypatch):
    module = {"cuda": torch.cuda, "mps": torch.backends.mps}[kind]
    monkeypatch.setattr(module, "is_available", lambda: False)
    run = tmp_path / "run"
    shutil.copytree(trained_run.path, run)
    config = (run / "config.yaml").read_text()
    assert "accelerator: cpu" in config
    (run / "config.yaml").write_text(config.replace("accelerator: cpu", f"accelerator: {kind}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_run(run).fabric.device.type == "cpu"
    with pytest.raises(InputError, match=f"train.accelerator={kind}: torch finds none here. Set it to auto or cpu"):
        make_fabric(kind, "float32")


def test_runs_that_cannot_be_opened_are_named(trained_run, tmp_path):
    with pytest.raises(InputError, match=r"no run at .*nowhere"):
        load_run(tmp_path / "nowhere")
    broken = tmp_path / "run"
    shutil.copytree(trained_run.path, broken)
    config = broken / "config.yaml"
    config.write_text(config.read_text().replace("shared_dim: 8", "shared_dim: 9"))
    with pytest.raises(InputError, match=r"config\.yaml was changed after training"):
        load_run(broken)
    shutil.copy(trained_run.path / "config.yaml", config)
    best = broken / "checkpoints" / "best.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"best\.safetensors is not a whole imgshared checkpoint"):
        load_run(broken)
    best.unlink()
    with pytest.raises(InputError, match=r"no best checkpoint yet.*--resume"):
        load_run(broken)

"""The average of the weights against its closed form."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from imgshared import api
from imgshared.config import Experiment
from imgshared.training.devices import lay_out
from imgshared.training.ema import Ema


def walk(decay: float, steps: int) -> tuple[nn.Module, Ema, list[torch.Tensor]]:
    """Random weights at every step, and their path."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema, path = Ema(module, decay), [module[0].weight.detach().clone()]
    for step in range(steps):
        nn.init.normal_(module[0].weight)
        path.append(module[0].weight.detach().clone())
        ema.update(step)
    return module, ema, path


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.999])
def test_the_average_is_its_closed_form(decay: float) -> None:
    _, ema, path = walk(decay, 40)
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(40)]
    # Each point weighs what the later steps leave of it.
    left = torch.tensor([*decays, 1.0]).double().flip(0).cumprod(0).flip(0)
    weights = torch.cat([left[:1], (1 - torch.tensor(decays).double()) * left[1:]])
    assert weights.sum().item() == pytest.approx(1)
    expected = sum(w * p.double() for w, p in zip(weights, path, strict=True))
    torch.testing.assert_close(ema.values["0.weight"].double(), expected, atol=1e-6, rtol=1e-5)


def test_the_start_is_soon_forgotten() -> None:
    _, ema, path = walk(0.9999, 1)
    torch.testing.assert_close(ema.values["0.weight"], 0.1 * path[0] + 0.9 * path[1])


def test_each_stage_forgets_the_start_of_what_it_trains(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(Ema, "update", lambda self, steps: told.append(steps))
    averaged = replace(tiny, train=replace(tiny.train, ema=0.999))
    api.train(averaged, out=tmp_path / "run", console=Console(file=io.StringIO()))
    stage = len(told) // 2  # two stages of two epochs each
    assert stage > 2
    assert told == [*range(stage)] * 2


def test_the_average_stands_in_for_the_weights_and_gives_way_again() -> None:
    module, ema, _ = walk(0.9, 5)
    module[1].running_mean.fill_(3.0)
    live, average = copy.deepcopy(module.state_dict()), copy.deepcopy(ema.values)
    seen: dict[str, torch.Tensor] = {}

    def fail() -> None:
        with ema.in_place():
            seen.update(copy.deepcopy(module.state_dict()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(seen[name], average[name]) for name in average)
    assert not torch.equal(seen["0.weight"], live["0.weight"])
    assert torch.equal(seen["1.num_batches_tracked"], live["1.num_batches_tracked"])  # other buffers are the module's
    assert all(torch.equal(value, live[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in ema.values.items())
    statistics = {"1.running_mean", "1.running_var"}  # those of the averaged weights, or nearly
    assert set(average) == {"0.weight", "0.bias", "1.weight", "1.bias", *statistics}


def test_resumed_moments_lie_in_memory_as_their_weights_do() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 8, 8)

    def stepped(optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        module(images).square().mean().backward()
        optimizer.step()

    before = torch.optim.Adam(module.parameters())
    stepped(before)
    saved = before.state_dict()
    flat = {k: {n: v.contiguous() for n, v in s.items()} for k, s in saved["state"].items()}
    resumed = torch.optim.Adam(module.parameters())
    resumed.load_state_dict({**saved, "state": flat})
    lay_out(resumed)
    for p in module.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert resumed.state[p][name].stride() == before.state[p][name].stride() == p.stride()
            assert torch.equal(resumed.state[p][name], before.state[p][name])
        assert resumed.state[p]["step"] == 1


def test_an_optimizer_goes_on_with_the_same_parameters() -> None:
    module, ema, _ = walk(0.9, 5)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = module[0].weight.detach().clone()
    with ema.in_place():
        pass
    module[0].weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(module[0].weight.detach(), before - 1)


def test_a_saved_average_is_taken_up() -> None:
    _, ema, _ = walk(0.9, 7)
    other = Ema(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 0.9)
    other.load(copy.deepcopy(ema.values))
    assert all(torch.equal(other.values[name], value) for name, value in ema.values.items())


def test_a_method_without_weights_has_no_average() -> None:
    ema = Ema(nn.Identity(), 0.9)
    ema.update(3)
    with ema.in_place():
        assert ema.values == {}

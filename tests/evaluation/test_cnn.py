"""The networks learn, stop by themselves, and answer alike one by one and together."""

import numpy as np
import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d

from imgshared.evaluation import cnn
from imgshared.evaluation.cnn import Training, fit_networks
from imgshared.evaluation.jobs import Job, View
from imgshared.types import InputError

SMALL = Training("test_resnet", steps=60, seed=0)


def blobs(seed=0, tells=1.0, n=192, channels=2, groups=6):
    """A job whose second class has a bright blob in the last channel; 64 cells are tested."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, n)
    arrays = [rng.normal(0, 0.3, (n, 24, 24)).astype(np.float16) for _ in range(channels)]
    arrays[-1][truth == 1, 8:16, 8:16] += tells
    rows = np.arange(n)
    learn, test = (View(tuple(arrays), (at,) * channels) for at in (rows[64:], rows[:64]))
    return Job("cnn", learn, truth[64:], rows[64:] % groups, (test,), 2), truth[:64]


def right(answers, truth):
    return float((answers[0].argmax(1) == truth).mean())


def test_a_network_learns_a_bright_blob_and_repeats_itself():
    job, truth = blobs()
    first, again = (fit_networks([job], SMALL, together=1)[0] for _ in range(2))
    assert right(first, truth) > 0.9
    np.testing.assert_allclose(first[0].sum(1), 1)
    np.testing.assert_array_equal(first[0], again[0])


def test_together_and_one_by_one_take_the_same_step(monkeypatch):
    """The gradients of the first batch are compared: later ones part, as AdamW turns rounding into steps."""
    monkeypatch.setattr(cnn, "has_bf16", lambda device: False)
    jobs = [blobs(0)[0], blobs(1, n=150)[0], blobs(2, tells=0.0)[0]]
    network = cnn.build(SMALL, 2, 2)

    def gradients(some):
        stack = cnn._Stack(network, some, SMALL)
        stack.step(0)
        return {name: p.grad for name, p in stack.weights.items()}

    beside = gradients(jobs)
    for k, job in enumerate(jobs):
        for name, alone in gradients([job]).items():
            close = 1e-3 * float(alone.abs().max())  # sums in another order, and what ReLUs make of that
            torch.testing.assert_close(beside[name][k], alone[0], rtol=1e-2, atol=close)
    assert not torch.allclose(*beside["conv1.0.weight"][:2], rtol=0.1)


def test_a_network_is_not_moved_by_those_beside_it():
    """What is learnt from other cells, with other answers, leaves no trace."""
    job, (other, _) = blobs(0)[0], blobs(5)
    training = Training("test_resnet", steps=20, seed=0)
    twins = fit_networks([job, other, job], training, together=3)
    np.testing.assert_allclose(twins[0][0], twins[2][0], atol=1e-6)
    assert np.abs(twins[0][0] - twins[1][0]).max() > 0.05


def test_a_network_that_gains_no_more_stops_and_the_others_go_on(monkeypatch):
    """Steps are counted: what stopped costs nothing, and its best weights are kept."""
    seen = []
    step = cnn._Stack.step
    monkeypatch.setattr(cnn._Stack, "step", lambda self, k: (seen.append(list(self.active)), step(self, k))[1])
    noise, blob = blobs(3, tells=0.0)[0], blobs(4)
    losses = {0: iter([1.0, 0.5] + [2.0] * 20), 1: iter(np.linspace(1, 0, 20))}
    monkeypatch.setattr(cnn._Stack, "_inner_loss", lambda self, place, k: next(losses[k]))
    answers = fit_networks([noise, blob[0]], SMALL, together=2)
    per_round = SMALL.steps // cnn.ROUNDS
    assert seen.count([0, 1]) == (2 + cnn.PATIENCE) * per_round
    assert seen.count([1]) == SMALL.steps - seen.count([0, 1])
    assert right(answers[1], blob[1]) > 0.9


def test_all_of_the_budget_is_used_where_no_group_can_be_kept_aside(monkeypatch):
    looked = []
    monkeypatch.setattr(cnn._Stack, "_inner_loss", lambda self, place, k: looked.append(k) or 0.0)
    job, truth = blobs(groups=1)
    assert right(fit_networks([job], SMALL, together=1)[0], truth) > 0.9
    assert not looked


def test_channels_and_classes_may_differ_between_jobs():
    one, _ = blobs(channels=1)
    two, truth = blobs(channels=2)
    done, said = [], []
    answers = fit_networks([one, two], SMALL, done=lambda k, p: done.append(k), say=said.append)
    assert done == [0, 1]
    assert right(answers[1], truth) > 0.9
    assert all("cells/s on" in text and "networks" in text for text in said)
    assert len(said) == 2


def test_no_batch_normalisation_is_left():
    network = cnn.build(Training("resnet10t", 20, 0), 3, 2)
    kinds = {type(part) for part in network.modules()}
    assert torch.nn.GroupNorm in kinds
    assert not kinds & {torch.nn.BatchNorm2d, BatchNormAct2d}


def test_moves_are_the_same_for_all_networks_and_others_each_step():
    images = torch.rand(1, 4, 2, 16, 16).expand(3, -1, -1, -1, -1).contiguous()
    moved = cnn._move(images, np.random.default_rng(0))
    assert moved.shape == images.shape
    torch.testing.assert_close(moved[0], moved[2])
    assert not torch.equal(moved[0, 0], images[0, 0])
    assert not torch.equal(moved, cnn._move(images, np.random.default_rng(1)))


@pytest.mark.parametrize(("name", "near"), [("resnt10t", "resnet10t"), ("effcientnet_b0", "efficientnet_b0")])
def test_an_unknown_network_is_named_with_the_nearest(name, near):
    with pytest.raises(InputError, match=rf"^cnn: timm knows no model '{name}'\. Did you mean '{near}'\?$"):
        fit_networks([blobs()[0]], Training(name, 20, 0))


def test_a_network_like_no_other_is_named_alone():
    with pytest.raises(InputError, match=r"^cnn: timm knows no model '0000000'\.$"):
        fit_networks([blobs()[0]], Training("0000000", 20, 0))

"""Nothing is computed twice: answers are known by all that they depend on."""

import dataclasses

import numpy as np
import pytest

from imgshared.config import EvaluateConfig
from imgshared.evaluation import solve as module
from imgshared.evaluation.jobs import Job, View, keys
from imgshared.evaluation.solve import solve

CONFIG = EvaluateConfig(labels=("drug",))


def job(seed=0, move=0.0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, 80)
    x = (rng.normal(size=(80, 5)) + truth[:, None] + move).astype(np.float32)
    rows = np.arange(80)
    views = [View((x,), (at,)) for at in (rows[40:], rows[:30], rows[30:40])]
    return Job("features", views[0], truth[40:], rows[40:] % 4, tuple(views[1:]), 2)


@pytest.fixture
def fits(monkeypatch):
    """Count the fits."""
    seen = []
    fit = module.feature_probabilities
    monkeypatch.setattr(module, "_tools", lambda: ("as it is",))
    monkeypatch.setattr(module, "feature_probabilities", lambda *a: seen.append(1) or fit(*a))
    return seen


def run(jobs, cache, config=CONFIG):
    return solve(jobs, config, cache, lambda what, done, total: None)


def same(a, b):
    return all(np.array_equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_each_test_has_its_own_probabilities(fits):
    (first, second), *_ = run([job()], None)
    assert first.shape == (30, 2)
    assert second.shape == (10, 2)
    np.testing.assert_allclose(np.concatenate([first, second]).sum(1), 1)


def test_what_is_asked_twice_is_computed_once(fits):
    answers = run([job(), job(1), job()], None)
    assert len(fits) == 2
    assert same([answers[0]], [answers[2]])


def test_a_second_run_computes_only_what_changed(fits, tmp_path):
    first = run([job(), job(1)], tmp_path)
    second = run([job(), job(2)], tmp_path)
    assert len(fits) == 3
    assert same([first[0]], [second[0]])
    assert len(list(tmp_path.iterdir())) == 2  # of the second run: what nobody asks for goes


@pytest.mark.parametrize(
    "change",
    [
        {"truth": 1 - job().truth},
        {"groups": job().groups + 1},
        {"learn": View(job(0, 1e-3).learn.arrays, job().learn.rows)},
        {"learn": View(job().learn.arrays, (job().learn.rows[0][::-1],))},
        {"tests": job().tests[:1]},
    ],
)
def test_whatever_an_answer_depends_on_is_in_its_name(change):
    one = job()
    assert keys([one], ()) == keys([job()], ())
    assert keys([one], ()) != keys([dataclasses.replace(one, **change)], ())
    assert keys([one], ()) != keys([one], ("another seed",))


def test_an_answer_cut_short_is_computed_again(fits, tmp_path):
    first = run([job()], tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-50])
    assert same(first, run([job()], tmp_path))
    assert len(fits) == 2
    np.save(path, np.zeros((3, 2)))
    assert same(first, run([job()], tmp_path))


def test_networks_are_cached_too_and_an_interruption_keeps_what_is_done(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 96)
    config = EvaluateConfig(labels=("drug",), cnn="test_resnet", cnn_steps=20)

    def crops(seed):
        x = np.random.default_rng(seed).normal(size=(96, 16, 16)).astype(np.float16)
        rows = np.arange(96)
        return Job("cnn", View((x,), (rows[32:],)), truth[32:], rows[32:] % 4, (View((x,), (rows[:32],)),), 2)

    def cut(what, done, total):
        if done == 1:
            raise KeyboardInterrupt

    jobs = [crops(1), crops(2)]
    with pytest.raises(KeyboardInterrupt):
        solve(jobs, config, tmp_path, cut)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    (tmp_path / "my_embeddings.npy").touch()  # no answer of ours
    trained = []
    fit = module.cnn.fit_networks
    monkeypatch.setattr(
        module.cnn, "fit_networks", lambda jobs, *a, **k: trained.append(len(jobs)) or fit(jobs, *a, **k)
    )
    answers = run(jobs, tmp_path, config)
    assert trained == [1]
    assert all(one.shape == (32, 2) for (one,) in answers)
    assert (tmp_path / "my_embeddings.npy").exists()

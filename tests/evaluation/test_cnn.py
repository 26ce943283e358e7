"""The network backend learns, from any number of channels, and repeats itself."""

import numpy as np
import pytest

from imgshared.evaluation.cnn import cnn_probabilities
from imgshared.types import InputError


def test_cnn_learns_a_bright_blob_and_repeats_itself():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 192)
    images = rng.normal(0, 0.3, (192, 2, 32, 32)).astype(np.float16)
    images[truth == 1, 1, 12:20, 12:20] += 1
    learn = {"model": "test_resnet", "epochs": 6, "seed": 0}
    first, again = (cnn_probabilities(images[:128], truth[:128], images[128:], 2, **learn) for _ in range(2))
    assert ((first.argmax(1) == truth[128:]).mean()) > 0.9
    np.testing.assert_allclose(first.sum(1), 1)
    np.testing.assert_array_equal(first, again)


def test_unknown_network_is_named():
    with pytest.raises(InputError, match="no model 'resnet10x'"):
        cnn_probabilities(np.zeros((4, 1, 8, 8)), np.array([0, 1, 0, 1]), np.zeros((1, 1, 8, 8)), 2, model="resnet10x")

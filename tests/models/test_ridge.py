import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.linear_model import LinearRegression

from imgshared.models.ridge import BlurredRidge, Equations, blur, fitting


@pytest.mark.parametrize("shape", [(16, 16), (15, 22), (5, 3), (1, 9)])
@pytest.mark.parametrize("sigma", [0, 0.4, 1, 3.7, 16])
def test_blur_is_scipys_with_mirrored_borders(shape, sigma):
    images = torch.rand(2, 3, *shape)
    want = ndimage.gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode="reflect")
    np.testing.assert_allclose(blur(images, sigma), want, atol=1e-5)


def test_blur_stays_exact_under_autocast():
    images = torch.rand(2, 1, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blur(images, 2.0), blur(images, 2.0).float())
        inside = blur(images, 2.0)
    assert torch.equal(inside, blur(images, 2.0))


def test_a_blur_wider_than_half_a_crop_is_left_out():
    assert fitting((0, 1, 2, 4, 8, 16, 32), 32) == [0, 1, 2, 4, 8, 16]
    assert fitting((8, 9), 15) == []


def make(pixels=10_000, ridge=1e-12):
    torch.manual_seed(0)
    images, stains = torch.rand(6, 2, 12, 10), torch.rand(6, 3, 12, 10)
    shown = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)
    return BlurredRidge(2, 3, (0, 1.5, 4), ridge=ridge, pixels=pixels), images, stains, shown


def test_it_is_least_squares_on_the_cells_that_show_a_target():
    net, images, stains, shown = make()
    for rows in (slice(0, 2), slice(2, 6)):
        net.add(net.equations(images[rows], stains[rows], shown[rows]))
    predicted = net(images)
    for t in range(3):
        x = np.concatenate([blur(images[shown[:, t]], s).numpy() for s in (0, 1.5, 4)], 1).transpose(0, 2, 3, 1)
        want = LinearRegression().fit(x.reshape(-1, 6).astype(float), stains[shown[:, t], t].flatten().double())
        np.testing.assert_allclose(net.weights()[t, :-1], want.coef_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(predicted[shown[:, t], t].flatten(), want.predict(x.reshape(-1, 6)), atol=1e-4)
    torch.testing.assert_close(net(images, [2, 0]), predicted[:, [2, 0]])


def test_the_error_is_that_of_the_prediction():
    net, images, stains, shown = make()
    equations = net.equations(images, stains, shown)
    net.add(equations)
    want = (net(images) - stains)[shown].square().mean()
    assert net.squared_error(equations).item() == pytest.approx(want.item(), rel=1e-4)


def test_the_penalty_shrinks_all_but_the_constant():
    net, images, stains, shown = make(ridge=1e6)
    net.add(net.equations(images, stains, shown))
    weights = net.weights()
    assert weights[:, :-1].abs().max() < 1e-4
    for t in range(3):
        assert weights[t, -1].item() == pytest.approx(stains[shown[:, t], t].mean().item(), abs=1e-4)


def test_drawn_pixels_are_a_sample_that_the_generator_decides():
    net, images, stains, shown = make(pixels=7)
    first, again = (net.equations(images, stains, shown, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (first.xx[:, -1, -1] == 7 * shown.sum(0)).all()
    other = net.equations(images, stains, shown, torch.Generator().manual_seed(4))
    assert not torch.equal(first.xx, other.xx)


def test_a_target_never_shown_and_an_empty_block_do_no_harm():
    net, images, stains, shown = make()
    empty = net.equations(images[:0], stains[:0], shown[:0])
    assert isinstance(empty, Equations)
    net.add(empty)
    assert net.squared_error(empty) == 0
    shown[:, 1] = False
    net.add(net.equations(images, stains, shown))
    predicted = net(images)
    assert not predicted[:, 1].any()
    assert predicted[:, [0, 2]].all()


def test_the_fit_is_float64_and_travels_with_the_state():
    net, images, stains, shown = make()
    net.add(net.equations(images, stains, shown))
    assert net.xx.dtype == torch.float64
    other, *_ = make()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images), net(images))

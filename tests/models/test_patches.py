import pytest
import torch

from imgshared.losses import patch_nce
from imgshared.models.patches import PatchProjection, sample_positions

WIDTHS = (1, 4, 6)


def maps(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(2, 1, 9, 7), torch.randn(2, 4, 5, 4), torch.randn(2, 6, 3, 2)]


def test_unit_vectors_at_each_position_of_each_level():
    features = maps()
    vectors = PatchProjection(WIDTHS, 16)(features, sample_positions(features, 10))
    assert [v.shape for v in vectors] == [(2, 10, 16), (2, 10, 16), (2, 6, 16)]
    for v in vectors:
        torch.testing.assert_close(v.norm(dim=-1), torch.ones(v.shape[:2]))


def test_positions_are_distinct_drawn_a_level_and_a_function_of_the_seed():
    features = maps()
    torch.manual_seed(1)
    positions = sample_positions(features, 10)
    for h, at in zip(features, positions, strict=True):
        assert len(at.unique()) == len(at) == min(10, h.shape[2] * h.shape[3])
        assert (at >= 0).all()
        assert (at < h.shape[2] * h.shape[3]).all()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(positions, sample_positions(features, 10), strict=True))
    assert not torch.equal(positions[0], sample_positions(features, 10)[0])
    one = sample_positions([features[0], features[0]], 10)
    assert not torch.equal(*one)


def test_a_row_is_the_mlp_of_the_features_at_its_position():
    features, net = maps(), PatchProjection(WIDTHS, 16)
    positions = sample_positions(features, 5)
    vectors = net(features, positions)
    for level, h, at, v in zip(net.levels, features, positions, vectors, strict=True):
        for s, p in enumerate(at.tolist()):
            expected = level(h[1, :, p // h.shape[3], p % h.shape[3]])
            torch.testing.assert_close(v[1, s], expected / expected.norm())


def test_memory_format_does_not_matter():
    features, net = maps(), PatchProjection(WIDTHS, 16)
    positions = sample_positions(features, 5)
    last = [h.contiguous(memory_format=torch.channels_last) for h in features]
    for a, b in zip(net(features, positions), net(last, positions), strict=True):
        torch.testing.assert_close(a, b)


def test_both_images_are_read_at_the_same_positions():
    source, net = maps(), PatchProjection(WIDTHS, 16)
    positions = sample_positions(source, 5)
    other = [torch.randn_like(h) for h in source]
    for h, o, at in zip(source, other, positions, strict=True):
        o.flatten(2)[:, :, at] = h.flatten(2)[:, :, at]  # alike there and nowhere else
    for a, b in zip(net(source, positions), net(other, positions), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_start_normal_with_zero_bias():
    net = PatchProjection((64,), 128)
    for layer in net.levels[0][::2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0).all()


def test_black_patches_have_finite_gradients():
    net, black = PatchProjection((1,), 16), [torch.zeros(2, 1, 4, 4)]
    positions = sample_positions(black, 8)
    (vectors,) = net(black, positions)
    assert (vectors == 0).all()
    patch_nce(vectors, vectors).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_autocast_gives_float32():
    features, net = maps(), PatchProjection(WIDTHS, 16)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = net(features, sample_positions(features, 5))
    assert {v.dtype for v in vectors} == {torch.float32}


def test_it_learns_to_match_an_image_with_its_negative():
    torch.manual_seed(0)
    source = [torch.randn(4, 3, 5, 5)]
    target = [-h for h in source]
    net = PatchProjection((3,), 16)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    seen = []
    for _ in range(60):
        positions = sample_positions(source, 16)
        loss = patch_nce(net(target, positions)[0], net(source, positions)[0])
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < 0.5 * seen[0]

import torch
from torch import nn

from imgshared.models.buffer import ImageBuffer, pool_state


def numbered(*numbers):
    """Images that hold their number, of the marker with that number."""
    numbers = torch.tensor(numbers)
    return numbers.float()[:, None, None, None].expand(-1, 1, 3, 5).clone(), numbers


def run(pool, first, batches=6, batch=4):
    """The numbers that came back, batch by batch."""
    returned = []
    for i in range(batches):
        images, markers = pool.exchange(*numbered(*range(first + i * batch, first + (i + 1) * batch)))
        assert (images == markers[:, None, None, None]).all()  # images and markers travel together
        returned += markers.tolist()
    return returned


def test_until_full_it_stores_and_returns_the_new():
    pool = ImageBuffer(6, (1, 3, 5))
    images, markers = numbered(1, 2, 3, 4)
    out = pool.exchange(images, markers)
    assert torch.equal(out[0], images)
    assert torch.equal(out[1], markers)
    assert (pool.count.item(), pool.markers.tolist()) == (4, [1, 2, 3, 4, 0, 0])
    torch.manual_seed(0)
    pool.exchange(*numbered(5, 6, 7, 8))
    assert pool.count == 6


def test_nothing_is_lost_and_nothing_doubled():
    torch.manual_seed(0)
    pool = ImageBuffer(5, (1, 3, 5))
    returned = run(pool, 1)
    assert returned[:5] == [1, 2, 3, 4, 5]  # while it filled
    assert sorted(returned[5:] + pool.markers.tolist()) == list(range(1, 25))
    assert (pool.images == pool.markers[:, None, None, None]).all()


def test_about_half_of_the_new_are_swapped_for_any_stored_one():
    torch.manual_seed(0)
    pool = ImageBuffer(4, (1, 3, 5))
    run(pool, 0, batches=1)
    places, swapped = torch.zeros(4), 0
    for _ in range(200):
        before = pool.markers.clone()
        _, markers = pool.exchange(*numbered(*(before.max() + 1 + torch.arange(2)).tolist()))
        places += before != pool.markers
        swapped += (markers <= before.max()).sum().item()
    assert 160 < swapped < 240
    assert (places > 25).all()


def test_it_is_a_function_of_the_seed_and_goes_on_exactly_from_a_checkpoint():
    torch.manual_seed(0)
    pool, other = ImageBuffer(5, (1, 3, 5)), ImageBuffer(5, (1, 3, 5))
    run(pool, 0, batches=3)
    other.load_state_dict({name: value.clone() for name, value in pool.state_dict().items()})
    returned = []
    for p in (pool, other):
        torch.manual_seed(1)
        returned.append(run(p, 100))
    assert returned[0] == returned[1]
    for a, b in zip(pool.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_one_half_filled_goes_on_filling_after_a_checkpoint():
    pool, other = ImageBuffer(5, (1, 3, 5)), ImageBuffer(5, (1, 3, 5))
    pool.exchange(*numbered(1, 2))
    other.load_state_dict(pool.state_dict())
    other.exchange(*numbered(3))
    assert other.markers.tolist() == [1, 2, 3, 0, 0]


def test_no_gradient_passes_and_the_input_is_left_alone():
    torch.manual_seed(0)
    for size in (0, 2):
        pool = ImageBuffer(size, (1, 3, 5))
        for first in (1, 5, 9):
            images, markers = numbered(*range(first, first + 4))
            kept = images.clone()
            out, _ = pool.exchange(images.requires_grad_(), markers)
            assert not out.requires_grad
            assert torch.equal(images, kept)


def test_size_zero_returns_the_new():
    pool = ImageBuffer(0, (1, 3, 5))
    images, markers = numbered(1, 2)
    state = torch.get_rng_state()
    out = pool.exchange(images, markers)
    assert torch.equal(out[0], images)
    assert torch.equal(out[1], markers)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_images_stay_half():
    images, markers = numbered(1, 2, 3, 4)
    out, _ = ImageBuffer(2, (1, 3, 5)).exchange(images.bfloat16(), markers)
    assert out.dtype == torch.bfloat16


def test_the_state_of_the_pools_is_apart_from_all_other_state():
    class Game(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.pool_norm = ImageBuffer(2, (1, 3, 5)), nn.BatchNorm2d(1)

    game = Game()
    game.pool.exchange(*numbered(7))
    state = pool_state(nn.ModuleDict({"game": game}))
    assert set(state) == {"game.pool.images", "game.pool.markers", "game.pool.count"}
    assert state["game.pool.markers"].tolist() == [7, 0]
    assert pool_state(game.pool_norm) == {}

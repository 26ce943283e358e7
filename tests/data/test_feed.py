import threading
import time

import numpy as np
import pytest
import torch

from imgshared.data.augment import Augment, channel_intensity, paired_geometry
from imgshared.data.feed import AHEAD, Feed, choose_residency, mix, read_ahead
from imgshared.data.normalise import Normaliser
from imgshared.data.store import CellStore

NORMALISER = Normaliser("linear", 5.0, (100.0, 100.0), (1100.0, 600.0))
CELLS = np.arange(3, 73)  # 70 cells, 4 batches of 16 and a rest of 6


def feed(store, **changes):
    settings = {"channels": [2, 0], "device": torch.device("cpu"), "residency": "memory", "batch_size": 16, "seed": 5}
    return Feed(store, CELLS, normaliser=NORMALISER, **settings | changes)


def assert_equal(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        for name in ("index", "images", "measured"):
            assert torch.equal(getattr(x, name), getattr(y, name))


def test_a_batch_holds_the_normalised_crops_of_its_cells(toy):
    for batch in feed(toy).epoch(0):
        rows = CELLS[batch.index.numpy()]
        raw = torch.from_numpy(toy.images(rows)[:, [2, 0]].astype(np.float32))
        measured = torch.from_numpy(toy.measured[np.ix_(rows, [2, 0])])
        assert torch.equal(batch.measured, measured)
        assert not measured.all()
        assert (batch.images[~measured] == 0).all()  # not (0 - low) / (high - low)
        torch.testing.assert_close(batch.images[measured], NORMALISER.forward(raw)[measured])
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_batches_are_a_function_of_seed_epoch_and_step(toy):
    first = list(feed(toy).epoch(4))
    assert_equal(first, list(feed(toy).epoch(4)))
    assert not torch.equal(first[0].index, next(feed(toy).epoch(5)).index)
    assert not torch.equal(first[0].index, next(feed(toy, seed=6).epoch(4)).index)


def test_every_use_and_place_has_a_seed_of_its_own():
    places = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (1, 0, 0), (2, 1), (1, 2), (1, 2, 0, 0, 0), (1, 2, 0, 0)]
    seeds = [mix(use, *place) for use in ("train", "validate") for place in places]
    assert len(set(seeds)) == len(seeds)
    assert mix("train", 1, 2) == mix("train", 1, 2)
    assert all(0 <= s < 2**63 for s in seeds)


def test_an_epoch_that_starts_late_gives_the_rest_of_the_same_sequence(toy):
    change = Augment(
        paired_geometry(flips=True, rotate_deg=0, scale=0, shift=0), channel_intensity(gain=0.2, noise=0.1)
    )
    whole = list(feed(toy).epoch(1, augment=change))
    assert_equal(whole[2:], list(feed(toy).epoch(1, 2, augment=change)))


def test_the_crops_may_live_anywhere(toy):
    change = Augment(None, channel_intensity(gain=0.2, noise=0.1))
    by_residency = {r: list(feed(toy, residency=r).epoch(2, augment=change)) for r in ("device", "memory", "stream")}
    assert_equal(by_residency["device"], by_residency["memory"])
    assert_equal(by_residency["device"], by_residency["stream"])


def test_crops_are_warped_once_where_they_are_learnt_from(toy):
    """On a CPU while they are read; on any other device after they came there."""
    seen = []

    def doubled(raw, seed):
        seen.append(seed)
        return raw.to(torch.int32) * 2

    here = feed(toy, residency="memory")
    rows, raw, left, seed = here._gather(torch.arange(3), doubled, 7)
    assert (left, seen) == (None, [7])
    torch.testing.assert_close(here._finish(rows, raw, left, seed).images, plain(here, 2))
    elsewhere = feed(toy, residency="memory", device=torch.device("cuda"))
    rows, raw, left, seed = elsewhere._gather(torch.arange(3), doubled, 8)
    assert (left, seen) == (doubled, [7])
    torch.testing.assert_close(here._finish(rows, raw, left, seed).images, plain(here, 2))
    assert seen == [7, 8]


def plain(given, times):
    raw = given._crops[:3].to(torch.int32) * times
    return NORMALISER.forward(raw) * given.measured[:3, :, None, None]


def test_bright_pixels_stay_bright_on_the_device(tmp_path, arrays, write_store):
    """A device holds 16 bits a pixel, also above 32,767."""
    images, measured, masks, obs = arrays
    images = (images.astype(np.uint32) * 40 % 65536).astype(np.uint16)
    images[:, :, 0, :4] = 0, 32767, 32768, 65535
    store = CellStore(write_store(tmp_path / "bright.zarr", images, measured, masks, obs))
    change = Augment(paired_geometry(flips=True, rotate_deg=0, scale=0, shift=0), None)
    for augment in (None, change):
        device, memory = (list(feed(store, residency=r).epoch(0, augment=augment)) for r in ("device", "memory"))
        assert_equal(device, memory)
    assert max(float(b.images.max()) for b in memory) > NORMALISER.forward(torch.full((1, 2, 1, 1), 60000.0)).min()
    assert feed(store, residency="device")._crops.element_size() == 2


def test_an_epoch_visits_every_cell_at_most_once_and_all_but_the_rest(toy):
    batches = list(feed(toy).epoch(0))
    seen = torch.cat([b.index for b in batches])
    assert len(batches) == feed(toy).steps == 4
    assert len(seen) == len(seen.unique()) == 64
    assert feed(toy, batch_size=1000).steps == 1
    assert len(next(feed(toy, batch_size=1000).epoch(0)).index) == 70


def test_a_shorter_epoch_is_the_beginning_of_a_whole_one(toy):
    short, whole = (list(feed(toy, most_steps=most).epoch(1)) for most in (3, None))
    assert_equal(short, whole[:3])
    assert feed(toy, most_steps=3).steps == 3
    assert feed(toy, most_steps=9).steps == 4
    assert feed(toy, most_steps=9, whole=True).steps == 5


@pytest.mark.parametrize("residency", ["device", "memory", "stream"])
@pytest.mark.parametrize(("size", "steps"), [(16, 5), (14, 5), (69, 2), (1000, 1)])
def test_a_whole_epoch_shows_every_cell_once_on_all_ranks_together(toy, residency, size, steps):
    change = Augment(
        paired_geometry(flips=True, rotate_deg=9, scale=0, shift=0), channel_intensity(gain=0.2, noise=0.1)
    )
    alone = list(feed(toy, whole=True, batch_size=size, residency=residency).epoch(0, augment=change))
    assert len(alone) == steps
    assert torch.cat([b.index for b in alone]).sort().values.equal(torch.arange(70))
    settings = {"whole": True, "batch_size": size, "residency": residency, "world": 2, "parts": 2}
    ranks = [list(feed(toy, rank=r, **settings).epoch(0, augment=change)) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 2 * steps  # of 69 a rest of one cell: three parts of four are empty
    assert torch.cat([b.index for r in ranks for b in r]).sort().values.equal(torch.arange(70))
    assert all(b.images.shape == (len(b.index), 2, 16, 16) for r in ranks for b in r)


def test_ranks_share_each_batch_without_overlap(toy):
    alone = list(feed(toy, batch_size=18).epoch(3))
    ranks = [list(feed(toy, batch_size=18, rank=r, world=4).epoch(3)) for r in range(4)]
    for step, batch in enumerate(alone):
        parts = torch.cat([ranks[r][step].index for r in range(4)])
        assert parts.sort().values.equal(batch.index.sort().values)
    assert [b.index.tolist() for b in feed(toy, batch_size=18, parts=4).epoch(3)] == [
        ranks[r][step].index.tolist() for step in range(len(alone)) for r in range(4)
    ]  # one rank with four parts draws what four ranks draw
    once = torch.cat([b.index for r in range(4) for b in feed(toy, rank=r, world=4).once(7)])
    assert once.sort().values.equal(torch.arange(70))


@pytest.mark.parametrize(("at_most", "step"), [(None, 1), (70, 1), (69, 2), (10, 7), (1, 70)])
def test_some_cells_are_evenly_spread(toy, at_most, step):
    assert torch.cat([b.index for b in feed(toy).once(16, at_most)]).equal(torch.arange(0, 70, step))


THREE = np.ones((70, 2), bool)  # panels of 6, 14 and 50 cells
THREE[:6, 0] = THREE[6:20, 1] = False


def panels(batch):
    return [int((batch.measured == torch.tensor(p)).all(1).sum()) for p in ([False, True], [True, False], [True, True])]


def test_balanced_panels_take_turns_in_every_batch(toy):
    balanced = feed(toy, balance="panels", stained=THREE)
    assert balanced.steps == feed(toy).steps == 4
    seen = []
    for epoch in range(3):
        for batch in balanced.epoch(epoch):
            counts = panels(batch)
            assert sum(counts) == 16
            assert max(counts) - min(counts) <= 1
            assert not batch.images[~batch.measured].any()
            seen.append(batch.index)
    index = torch.cat(seen)
    counts = torch.bincount(index, minlength=70)
    assert (
        counts[:6].min() >= 9
    )  # a panel of 6 cells fills 64 of 192 places: 10 or 11 each, but for the end of an epoch
    assert counts[20:].max() <= 3  # a large one never shows a cell twice in an epoch


def test_a_panel_without_repeats_is_drawn_without_repeats(toy):
    halves = np.ones((70, 2), bool)
    halves[::2, 0] = False
    index = torch.cat([b.index for b in feed(toy, balance="panels", stained=halves).epoch(2)])
    assert len(index.unique()) == len(index) == 64
    one = torch.cat([b.index for b in feed(toy, balance="panels", stained=np.ones((70, 2), bool)).epoch(2)])
    assert len(one.unique()) == 64


def test_a_few_odd_cells_do_not_take_over_the_balanced_panels(toy):
    odd = np.ones((70, 2), bool)  # two cells that show both stains, and the sides of 36 and 32
    odd[2:38, 0] = odd[38:, 1] = False
    batches = list(feed(toy, balance="panels", stained=odd, whole=True).epoch(0))
    counts = torch.bincount(torch.cat([b.index for b in batches]), minlength=70)
    assert counts.sum() == 70
    assert counts[:2].tolist() == [10, 10]  # a third of the epoch would be 12 each
    assert [int(counts[2:38].sum()), int(counts[38:].sum())] == [25, 25]
    for batch in batches[:-1]:
        assert max(abs(drawn - share) for drawn, share in zip(panels(batch), (5.7, 5.7, 4.6), strict=True)) < 1.5


def test_balanced_batches_are_a_function_of_seed_and_epoch(toy):
    settings = {"balance": "panels", "stained": THREE}
    first = list(feed(toy, **settings).epoch(4))
    assert_equal(first, list(feed(toy, **settings).epoch(4)))
    assert_equal(first[2:], list(feed(toy, residency="stream", **settings).epoch(4, 2)))
    assert not torch.equal(first[0].index, next(feed(toy, **settings).epoch(5)).index)
    assert not torch.equal(first[0].index, next(feed(toy, seed=6, **settings).epoch(4)).index)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_shares_of_the_ranks_are_disjoint_and_balanced_too(toy, world):
    settings = {"balance": "panels", "stained": THREE, "batch_size": 24}
    alone = list(feed(toy, **settings).epoch(1))
    ranks = [list(feed(toy, rank=r, world=world, **settings).epoch(1)) for r in range(world)]
    for step, batch in enumerate(alone):
        shares = [ranks[r][step] for r in range(world)]
        assert torch.cat([share.index for share in shares]).equal(batch.index)
        for share in shares:
            assert max(panels(share)) - min(panels(share)) <= 1


def test_once_yields_all_cells_in_order(toy):
    for residency in ("device", "memory", "stream"):
        index = torch.cat([b.index for b in feed(toy, residency=residency).once(16)])
        assert index.equal(torch.arange(70))


def test_a_feed_without_cells_yields_nothing_that_counts(toy):
    empty = Feed(toy, np.array([], int), [0], NORMALISER.select([0]), torch.device("cpu"), "memory", 4)
    assert len(empty) == 0
    assert sum(len(b.index) for b in empty.once(4)) == 0


def test_reading_ahead_hands_on_errors():
    def read(n):
        if n == 3:
            raise ValueError("chunk 3 is damaged")
        return n

    items = read_ahead(iter(range(10)), read)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="chunk 3 is damaged"):
        next(items)


def test_reading_ahead_stays_ahead_by_a_few_and_ends_with_its_consumer():
    read = []
    before = threading.active_count()
    items = read_ahead(iter(range(1000)), lambda n: read.append(n) or n)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(read) < AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert AHEAD <= len(read) <= AHEAD + 2
    items.close()
    assert threading.active_count() == before
    assert len(read) <= AHEAD + 3


def test_the_thread_of_a_stream_ends_with_the_epoch_that_is_left_early(toy):
    before = threading.active_count()
    for _ in feed(toy, residency="stream", batch_size=4).epoch(0):
        break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_residency_follows_the_wish_else_what_fits(toy, monkeypatch):
    cpu = torch.device("cpu")
    assert choose_residency("stream", toy, 10, 2, cpu) == "stream"
    need = 70 * 2 * 16 * 16 * 2
    for free, expected in ((3 * need, "memory"), (need, "stream")):
        monkeypatch.setattr("imgshared.data.feed._free_memory", lambda free=free: free)
        assert choose_residency("auto", toy, 70, 2, cpu) == expected


def test_crops_go_to_the_device_where_they_take_less_than_half_of_what_is_free(toy, monkeypatch):
    cuda, need = torch.device("cuda", 1), 70 * 2 * 16 * 16 * 2
    monkeypatch.setattr("imgshared.data.feed._free_memory", lambda: 3 * need)
    for free, expected in ((2 * need + 2, "device"), (2 * need, "memory")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free if device == cuda else 0, 0))
        assert choose_residency("auto", toy, 70, 2, cuda) == expected
    assert choose_residency("auto", toy, 70, 2, torch.device("cpu")) == "memory"
    for free, expected in ((2 * need + 2, "device"), (2 * need, "stream")):  # eight devices, but one memory
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        assert choose_residency("auto", toy, 70, 2, cuda, processes=8) == expected

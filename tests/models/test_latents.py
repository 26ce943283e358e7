import pytest
import torch

from imgshared.models.latents import LatentTable

BATCHES = ([0, 3, 5], [3, 1], [5, 0, 3], [3], [1, 5])  # rows of each step; row 2 and row 4 are never drawn


def gradient(z, step):
    return (z - torch.arange(z.shape[1])) * (1 + step)  # of a quadratic that changes


def walk(table, batches=BATCHES, lr=0.05):
    for step, rows in enumerate(batches):
        z = table.draw(torch.tensor(rows))
        (0.5 * (1 + step) * (z - torch.arange(z.shape[1])).square()).sum().backward()
        table.step(lr)


def test_each_row_walks_as_torchs_adam_on_that_row_alone():
    table = LatentTable(6, 4, 0.3, seed=0)
    rows = [torch.nn.Parameter(row.clone()) for row in table.values]
    optimizers = [torch.optim.Adam([row], lr=0.05) for row in rows]
    walk(table)
    for step, batch in enumerate(BATCHES):
        for row in batch:
            rows[row].grad = gradient(rows[row].detach()[None], step)[0]
            optimizers[row].step()
    torch.testing.assert_close(table.values, torch.stack([r.detach() for r in rows]), rtol=1e-5, atol=1e-6)
    assert table.steps.tolist() == [2, 2, 0, 4, 0, 3]


def test_rows_outside_the_batch_and_their_moments_do_not_move():
    table = LatentTable(6, 4, 0.3, seed=0)
    before = table.values.clone()
    walk(table)
    unseen = [2, 4]
    assert torch.equal(table.values[unseen], before[unseen])
    for moments in (table.first, table.second, table.steps):
        assert (moments[unseen] == 0).all()
    seen = [0, 1, 3, 5]
    assert (table.values[seen] != before[seen]).any(1).all()


def test_the_start_is_gaussian_and_a_function_of_the_seed():
    table = LatentTable(2000, 10, 0.3, seed=1)
    assert abs(table.values.std() - 0.3) < 0.01
    assert torch.equal(table.values, LatentTable(2000, 10, 0.3, seed=1).values)
    assert not torch.equal(table.values, LatentTable(2000, 10, 0.3, seed=2).values)


def test_state_goes_on_exactly():
    table, other = LatentTable(6, 4, 0.3, seed=0), LatentTable(6, 4, 0.3, seed=9)
    walk(table, BATCHES[:2])
    other.load({name: value.clone() for name, value in table.state().items()})
    for t in (table, other):
        walk(t, BATCHES[2:])
    for name, value in table.state().items():
        assert torch.equal(value, other.state()[name])


def test_ranks_step_as_one_batch_whose_gradient_is_averaged():
    together, split = LatentTable(4, 2, 0.3, seed=0), LatentTable(4, 2, 0.3, seed=0)
    rows, grads = torch.tensor([2, 0, 3]), torch.tensor([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0]])
    together.draw(rows).backward(grads / 2)
    together.step(0.1)
    split.draw(rows[:2]).backward(grads[:2])
    split.step(0.1, lambda mine: torch.cat([mine, rows[2:] if mine.dim() == 1 else grads[2:]]), ranks=2)
    for name, value in together.state().items():
        torch.testing.assert_close(split.state()[name], value)


def test_reading_does_not_mark_rows_for_an_update():
    table = LatentTable(4, 2, 0.3, seed=0)
    assert not table.read(torch.tensor([1])).requires_grad
    with pytest.raises(AssertionError, match="draw before step"):
        table.step(0.1)


def test_an_empty_draw_is_a_step_of_nothing():
    table = LatentTable(4, 2, 0.3, seed=0)
    before = table.values.clone()
    table.draw(torch.tensor([], dtype=torch.long)).sum().backward()
    table.step(0.1)
    assert torch.equal(table.values, before)

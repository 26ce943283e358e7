"""Running statistics of a batch that is cut into parts: one step of the mean of the parts, by hand."""

import torch
from torch import nn

from imgshared.training.statistics import BatchStatistics


def test_parts_of_a_batch_move_the_running_statistics_once_to_the_mean_of_theirs() -> None:
    norm, before = nn.BatchNorm1d(3), torch.tensor([1.0, 2.0, 3.0])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(before)
    parts = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 5.0])[:, None, None]
    statistics = BatchStatistics(norm, parts=2, world=1)
    statistics.begin()
    for part in parts:
        norm(part)
        statistics.take()
        torch.testing.assert_close(norm.running_mean, before)  # where the next part begins
    statistics.end()
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * parts.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, 0.9 * torch.ones(3) + 0.1 * parts.var(1).mean(0))


def test_a_batch_of_one_part_is_left_to_the_layer() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    batch = torch.randn(8, 3)
    statistics = BatchStatistics(ours, parts=1, world=1)
    statistics.begin()
    ours(batch), theirs(batch)
    statistics.take()
    statistics.end()
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))

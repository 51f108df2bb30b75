"""Cutting supports by rows and columns, against a dense mask."""

import pytest
import torch

from sparse_peft.support import ChannelSupport, Shard, Support

SHAPE = (7, 9)
MASK = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.4
SUPPORTS = {
    "entries": Support.from_mask(MASK),
    "none": Support(SHAPE, torch.empty(0, dtype=torch.int64)),
    "rows": ChannelSupport(SHAPE, 0, torch.tensor([0, 2, 6])),
    "columns": ChannelSupport(SHAPE, 1, torch.tensor([1, 4, 5, 8])),
    "input channels of three taps": ChannelSupport(SHAPE, 1, torch.tensor([0, 2]), width=3),
}


@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_have_the_entries_of_their_rows_or_columns(name, dim, parts):
    support, seen = SUPPORTS[name], []
    values = torch.arange(1, support.nnz + 1)
    dense = torch.zeros(SHAPE, dtype=torch.int64).view(-1).scatter(0, support.indices.long(), values).view(SHAPE)
    for number, expected in enumerate(dense.chunk(parts, dim)):
        shard = Shard.of(SHAPE, dim, number, parts)
        local, slots = shard.cut(support)
        assert shard.local_shape == local.shape == tuple(expected.shape)
        assert shard.cut(support)[0] is local
        found = torch.zeros(expected.numel(), dtype=torch.int64).scatter(0, local.indices.long(), values[slots])
        assert torch.equal(found.view(expected.shape), expected)
        assert torch.equal(Support(local.shape, local.indices).indices, local.indices)
        seen.append(slots)
    assert torch.cat(seen).sort().values.tolist() == list(range(support.nnz))


def test_channels_stay_channels():
    local, _ = Shard(SHAPE, 1, 3, 6).cut(SUPPORTS["columns"])
    assert isinstance(local, ChannelSupport)
    assert local.channels.tolist() == [1, 2]

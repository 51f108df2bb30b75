"""Entries that weights hold for a time: written, given back bit for bit, and never lost by an interruption."""

import pytest
import torch

from sparse_peft.ops import (
    HeldEntries,
    effective_entries,
    held_entries,
    restore_supports_,
    resync_supports_,
    take_supports_,
    use_backend,
)
from sparse_peft.support import ChannelSupport, Support, support

SHAPE = 31, 17


@pytest.fixture
def short_pieces(monkeypatch):
    """Many pieces of few entries."""
    monkeypatch.setattr(held_entries, "FEW_ENTRIES", 0)
    monkeypatch.setattr(support, "PIECE_ENTRIES", 8)


def chosen(name):
    """A support of each kind, and one without entries."""
    entries = Support.random(SHAPE, 200, seed=3, name="layer")
    if name == "none":
        return Support(SHAPE, torch.zeros(0, dtype=torch.int64))
    if name == "channels":
        return ChannelSupport(SHAPE, 1, torch.tensor([2, 5, 11]))
    return entries.compact() if name == "compact" else entries


def weight_of(dtype, contiguous):
    torch.manual_seed(0)
    return torch.randn(SHAPE).to(dtype) if contiguous else torch.randn(SHAPE[::-1]).to(dtype).t()


def held(weight, positions):
    one = HeldEntries(weight, positions)
    take_supports_([one])
    return one


@pytest.mark.parametrize("kind", ["flat", "compact", "channels", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("many", [True, False])
def test_entries_are_written_and_given_back_bit_for_bit(kind, dtype, contiguous, scale, many, request):
    if many:
        request.getfixturevalue("short_pieces")
    positions, weight = chosen(kind), weight_of(dtype, contiguous)
    before, flat = weight.clone(), positions.indices.long()
    values = torch.randn(positions.nnz)
    one = held(weight, positions)
    for delta in (values, -values):  # the second time the originals are known
        resync_supports_([one], [delta], [scale])
        wanted = before.reshape(-1).clone()
        wanted[flat] = effective_entries(wanted[flat], delta, scale)
        assert torch.equal(weight, wanted.view(SHAPE))
    for _ in range(2):
        restore_supports_([one])
        assert torch.equal(weight, before)
    assert torch.equal(one.originals, before.reshape(-1)[flat])


def test_many_weights_of_several_kinds_at_once(short_pieces):
    supports = [chosen(kind) for kind in ("flat", "channels", "none", "compact")]
    weights = [weight_of(torch.float32, True) for _ in supports]
    before, values = weights[0].clone(), [torch.randn(one.nnz) for one in supports]
    parts = [HeldEntries(*pair) for pair in zip(weights, supports, strict=True)]
    take_supports_(parts)
    resync_supports_(parts, values)
    for weight, positions, value in zip(weights, supports, values, strict=True):
        flat = positions.indices.long()
        assert torch.equal(weight.view(-1)[flat], before.view(-1)[flat] + value)
    restore_supports_(parts)
    assert all(torch.equal(weight, before) for weight in weights)


class Stop(Exception):
    """Raised in the middle of a write."""


@pytest.mark.parametrize("kind", ["flat", "compact"])
@pytest.mark.parametrize("at", [0, 1, 7, 24])
@pytest.mark.parametrize("is_written", [True, False])
@pytest.mark.parametrize("follows", ["restore", "write", "write in other pieces", "originals"])
def test_an_interrupted_write_loses_no_original(kind, at, is_written, follows, short_pieces, monkeypatch):
    weight, positions = weight_of(torch.float32, True), chosen(kind)
    before, flat = weight.clone(), positions.indices.long()
    values, one, calls, write = torch.randn(positions.nnz), held(weight, positions), [], held_entries.write_piece_

    def stop(*args):
        calls.append(args)
        if len(calls) == at + 1:
            if is_written:
                write(*args)
            raise Stop
        write(*args)

    monkeypatch.setattr(held_entries, "write_piece_", stop)
    with pytest.raises(Stop):
        resync_supports_([one], [values])
    assert one.known == min(8 * (at + 1), positions.nnz), "noted before the place is written"
    monkeypatch.setattr(held_entries, "write_piece_", write)
    if follows == "write in other pieces":
        monkeypatch.setattr(support, "PIECE_ENTRIES", 13)
    if follows.startswith("write"):
        resync_supports_([one], [values])
        assert torch.equal(weight.view(-1)[flat], before.view(-1)[flat] + values)
    if follows == "originals":
        assert torch.equal(one.originals, before.view(-1)[flat])
    for _ in range(2):
        restore_supports_([one])
        assert torch.equal(weight, before)


def test_many_entries_are_read_when_they_are_written(short_pieces):
    one = held(weight_of(torch.float32, True), chosen("flat"))
    assert one.known == 0 and one.place is None
    resync_supports_([one], [torch.zeros(200)])
    assert one.known == 200


def test_a_forced_backend_takes_many_entries_at_once(short_pieces):
    weight = weight_of(torch.float32, True)
    before = weight.clone()
    with use_backend("panels"):
        one = held(weight, chosen("flat"))
        assert one.known == 200
        resync_supports_([one], [torch.ones(200)])
        assert torch.equal(weight.view(-1)[one.support.indices.long()], one.originals + 1)
        restore_supports_([one])
    assert torch.equal(weight, before)

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_peft.support import Candidates, Support, exchange, random_inactive


def positions(*flat):
    return torch.tensor(flat, dtype=torch.int64)


def toy(incumbents):
    """The specification's example: W of 1 x 4, entries 0 and 1, values .01 and 5; gradients 1 and -9 at 2 and 3."""
    support = Support((1, 4), torch.tensor([0, 1]))
    candidates = Candidates(positions(2, 3), torch.tensor([1.0, 9.0]), incumbents)
    return exchange([support], [torch.tensor([0.01, 5.0])], [1], [candidates])[0]


def test_the_toy_matrix():
    result = toy(torch.tensor([0.5, 0.0]))
    assert result.support.indices.tolist() == [1, 3]
    assert result.source.tolist() == [1, -1]
    assert result.replaced == 1
    assert result.drop_threshold == pytest.approx(0.01)
    assert result.grow_threshold == 9.0


def test_the_toy_matrix_where_the_dropped_entry_wins():
    result = toy(torch.tensor([100.0, 0.0]))
    assert result.support.indices.tolist() == [0, 1]
    assert result.source.tolist() == [0, 1]
    assert result.replaced == 0 and result.drop_threshold is None and result.grow_threshold is None


def test_without_competition_the_replacement_is_forced_and_bounded_by_the_candidates():
    support = Support((2, 3), torch.tensor([0, 2, 5]))
    values = torch.tensor([3.0, -1.0, 2.0])
    result = exchange([support], [values], [3], [Candidates(positions(1, 4), torch.tensor([1.0, 2.0]))])[0]
    assert result.support.indices.tolist() == [0, 1, 4], "the two smallest went, the largest stayed"
    assert result.source.tolist() == [0, -1, -1]
    assert result.drop_threshold == 2.0


def test_ties_go_to_the_lowest_position():
    support = Support((1, 8), torch.tensor([0, 4, 6]))
    candidates = Candidates(positions(1, 5, 7), torch.ones(3), torch.ones(3))
    result = exchange([support], [torch.zeros(3)], [2], [candidates])[0]
    # 0 and 4 are up; of 0, 1, 4, 5, 7 with equal scores 0 and 1 are the lowest
    assert result.support.indices.tolist() == [0, 1, 6]


@st.composite
def layers(draw):
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    out = []
    for index in range(draw(st.integers(1, 4))):
        rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        numel = rows * cols
        k = draw(st.integers(1, numel))
        order = torch.randperm(numel, generator=generator)
        support = Support((rows, cols), order[:k].sort().values, name=f"layer{index}")
        free = order[k:]
        free = free[: draw(st.integers(0, free.numel()))].sort().values
        # few different numbers, so that ties are common
        scores = torch.randint(0, 4, (free.numel(),), generator=generator).float()
        values = torch.randint(-3, 4, (k,), generator=generator).float()
        own = torch.randint(0, 4, (k,), generator=generator).float()
        out.append((support, values, draw(st.integers(0, k)), Candidates(free, scores, own)))
    return out


def brute_force(supports, values, count, candidates, keep_largest, competes):
    """The definition, over lists of (layer, position)."""
    entries = [
        (abs(float(v)), i, int(p)) for i, s in enumerate(supports) for p, v in zip(s.indices, values[i], strict=True)
    ]
    up = sorted(entries)
    if keep_largest:
        for i in range(len(supports)):
            mine = [e for e in entries if e[1] == i]
            largest = max(e[0] for e in mine)
            up.remove(next(e for e in mine if e[0] == largest))
    pool = [
        (-float(s), i, int(p), "new")
        for i, c in enumerate(candidates)
        for p, s in zip(c.positions, c.scores, strict=True)
    ]
    if not competes:
        count = min(count, len(pool))
    up = up[:count]
    if competes:
        own = {
            (i, int(p)): float(c)
            for i, s in enumerate(supports)
            for p, c in zip(s.indices, candidates[i].incumbent_scores, strict=True)
        }
        pool += [(-own[(i, p)], i, p, "old") for _, i, p in up]
    chosen = sorted(pool)[: len(up)]
    stays = {(i, p) for _, i, p, kind in chosen if kind == "old"}
    gone = {(i, p) for _, i, p in up} - stays
    grown = {(i, p) for _, i, p, kind in chosen if kind == "new"}
    return [
        sorted({int(p) for p in s.indices} - {p for j, p in gone if j == i} | {p for j, p in grown if j == i})
        for i, s in enumerate(supports)
    ]


@given(layers(), st.booleans(), st.booleans())
def test_exchange_is_what_the_definition_says(layers, together, competes):
    supports, values, counts, candidates = map(list, zip(*layers, strict=True))
    if not competes:
        candidates = [Candidates(c.positions, c.scores) for c in candidates]
    results = exchange(supports, values, counts, candidates, together=together)
    if together:
        limit = sum(counts)
        largest = sum(s.nnz for s in supports) - len(supports)
        expected = brute_force(supports, values, min(limit, largest), candidates, True, competes)
    else:
        expected = [
            brute_force([s], [v], n, [c], False, competes)[0]
            for s, v, n, c in zip(supports, values, counts, candidates, strict=True)
        ]
    assert [result.support.indices.tolist() for result in results] == expected
    assert sum(r.support.nnz for r in results) == sum(s.nnz for s in supports), "the total stays"
    for support, result in zip(supports, results, strict=True):
        assert result.support.nnz >= 1
        kept = result.source >= 0
        assert torch.equal(support.indices[result.source[kept]], result.support.indices[kept])
        assert result.replaced == int((~support.contains(result.support.indices)).sum())


def test_values_that_are_no_numbers_are_refused():
    support = Support((1, 4), torch.tensor([0, 1]), name="decoder.q")
    with pytest.raises(ValueError, match=r"decoder.q.*NaN"):
        exchange([support], [torch.tensor([float("nan"), 1.0])], [1], [Candidates(positions(2), torch.ones(1))])


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.data())
def test_random_inactive_positions_are_outside_and_all_of_them_possible(rows, cols, seed, data):
    k = data.draw(st.integers(0, rows * cols))
    support = Support.random((rows, cols), k, seed=seed, name="a")
    free = rows * cols - k
    n = data.draw(st.integers(0, free))
    drawn = random_inactive(support, n, seed=seed, name="b")
    assert drawn.numel() == n and drawn.unique().numel() == n
    assert not bool(support.contains(drawn).any())
    assert torch.equal(drawn, drawn.sort().values)
    everything = random_inactive(support, free, seed=seed, name="b")
    assert torch.equal(everything, (~support.to_mask()).reshape(-1).nonzero().squeeze(1))


def test_random_inactive_positions_are_uniform():
    support = Support((4, 5), torch.tensor([0, 1, 2, 7, 19]))
    hits = torch.zeros(20)
    for seed in range(3000):
        hits[random_inactive(support, 3, seed=seed, name="x")] += 1
    free = ~support.to_mask().reshape(-1)
    assert hits[~free].sum() == 0
    assert hits[free] == pytest.approx(torch.full((15,), 600.0), rel=0.2)

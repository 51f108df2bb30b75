"""Scores, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_peft.support import CRITERIA, Statistics, Support, get_criterion, select
from sparse_peft.support.criteria import NEEDS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def weight_like(shape=(7, 5), dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_match_their_formulas(dtype):
    weight = weight_like(dtype=dtype).requires_grad_()
    before = weight.detach().clone()
    gradient = weight_like(seed=1)
    norms = torch.rand(5) + 0.5
    w = weight.detach().double()
    by_input = w / w.square().sum(0).sqrt()
    by_both = by_input / by_input.square().sum(1, keepdim=True).sqrt()
    expected = {
        "magnitude": (None, {}, w.abs()),
        "magnitude_smallest": (None, {}, w.abs()),
        "gradient": (Statistics(gradient=gradient, batches=4), {}, (gradient.double() / 4).abs()),
        "fisher": (Statistics(gradient=gradient.square(), batches=4), {}, gradient.double() ** 2 / 4),
        "gallop": (Statistics(gradient=gradient, batches=4), {}, (gradient.double() / 4).abs() / (w.abs() + 1e-8)),
        "movement": (Statistics(gradient=gradient, batches=4), {}, -w * gradient.double()),
        "snip": (Statistics(gradient=gradient, batches=4), {}, (w * gradient.double()).abs()),
        "wanda": (Statistics(input_norms=norms), {}, w.abs() * norms.double()),
        "nowag": (Statistics(input_norms=norms), {}, by_both.abs() * norms.double()),
        "threshold": (None, {"threshold": 0.5}, w.abs().masked_fill(w.abs() >= 0.5, torch.inf)),
    }
    assert set(expected) | {"random", "given", "nonzero", "principal", "residual"} == set(CRITERIA)
    for name, (stats, options, scores) in expected.items():
        found = CRITERIA[name].score(weight, stats, **options)
        assert found.dtype == torch.float32 and not found.requires_grad, name
        torch.testing.assert_close(found.double(), scores, rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(weight.detach(), before)


def test_wanda_of_a_weight_stored_in_by_out():
    weight, norms = weight_like(), torch.rand(7)
    found = get_criterion("wanda").score(weight, Statistics(input_norms=norms), in_dim=0)
    torch.testing.assert_close(found, weight.abs() * norms[:, None])
    with pytest.raises(ValueError, match=r"norms of shape \(7,\) for a weight of shape \(7, 5\).*need in_dim=0"):
        get_criterion("wanda").score(weight, Statistics(input_norms=norms))
    with pytest.raises(ValueError, match="in_dim=2"):
        get_criterion("wanda").score(weight, Statistics(input_norms=norms), in_dim=2)


def test_nowag_of_a_weight_stored_in_by_out_and_with_a_channel_of_zeros():
    weight, norms = weight_like(), torch.rand(5)
    weight[:, 2] = 0
    weight[3] = 0
    found = get_criterion("nowag").score(weight, Statistics(input_norms=norms))
    stored = get_criterion("nowag").score(weight.t(), Statistics(input_norms=norms), in_dim=0)
    torch.testing.assert_close(stored.t(), found)
    assert bool(found.isfinite().all()) and torch.equal(found == 0, weight == 0)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_principal_is_the_best_low_rank_approximation(shape, dtype):
    r = 4
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, 30, generator=generator, dtype=torch.float64)).Q for n in shape)
    # singular values that fall off, as those of trained weights do
    weight = (u * 0.7 ** torch.arange(30.0, dtype=torch.float64)) @ v.T
    weight = weight.to(dtype)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = ((exact.U[:, :r] * exact.S[:r]) @ exact.Vh[:r]).abs()
    found = get_criterion("principal").score(weight, None, r=r)
    assert found.dtype == torch.float32 and found.shape == shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_principal_of_a_full_rank_is_the_magnitude():
    weight = weight_like((6, 9))
    found = get_criterion("principal").score(weight, None, r=32)
    torch.testing.assert_close(found, weight.abs(), rtol=1e-5, atol=1e-5)


def test_principal_draws_from_no_global_state():
    weight = weight_like((20, 30))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = get_criterion("principal").score(weight, None, r=2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, get_criterion("principal").score(weight, None, r=2))


@pytest.mark.parametrize("r", [0, -1, True, 2.0])
def test_principal_needs_a_rank(r):
    with pytest.raises((TypeError, ValueError), match=f"r={r!r}"):
        get_criterion("principal").score(weight_like(), None, r=r)


@pytest.mark.parametrize("name", ["magnitude", "threshold", "principal", "residual"])
def test_packed_weights_are_refused(name):
    options = {"threshold": {"threshold": 1.0}}.get(name, {})
    with pytest.raises(TypeError, match=r"dtype torch.int8 .*dequantise"):
        get_criterion(name).score(torch.zeros(3, 3, dtype=torch.int8), None, **options)


def test_registry():
    for name, criterion in CRITERIA.items():
        assert criterion.name == name and criterion.needs in NEEDS
    with pytest.raises(ValueError, match="selection='magic' is not known; one of random, given, magnitude,"):
        get_criterion("magic")
    for name in ("random", "nonzero"):
        with pytest.raises(ValueError, match=f"selection='{name}' draws positions and has no scores"):
            get_criterion(name).score(weight_like())
    for ask in (get_criterion("given").score, get_criterion("given").count):
        with pytest.raises(ValueError, match=r"selection='given' takes positions from you.*supports="):
            ask(weight_like())
    with pytest.raises(ValueError, match="selection='fisher' is computed from gradients"):
        get_criterion("fisher").score(weight_like(), Statistics(input_norms=torch.ones(5)))
    with pytest.raises(ValueError, match="selection='wanda' is computed from activations"):
        get_criterion("wanda").score(weight_like())
    for name in ("movement", "gallop"):
        with pytest.raises(ValueError, match=f"selection='{name}' is computed from the weight"):
            get_criterion(name).score(None, Statistics(gradient=torch.ones(5)))
    with pytest.raises(ValueError, match="selection='magnitude' finds no number of entries"):
        get_criterion("magnitude").count(weight_like())


# ---------------------------------------------------------------------- select


def test_select_takes_the_best():
    weight = weight_like((9, 4))
    order = weight.abs().reshape(-1).argsort()
    assert select("magnitude", weight, 5).indices.tolist() == sorted(order[-5:].tolist())
    assert select("magnitude_smallest", weight, 5).indices.tolist() == sorted(order[:5].tolist())
    stats = Statistics(gradient=weight_like((9, 4), seed=2))
    order = stats.gradient.abs().reshape(-1).argsort()
    support = select(get_criterion("gradient"), weight, 5, stats=stats, name="q")
    assert support.indices.tolist() == sorted(order[-5:].tolist()) and support.name == "q"


def test_select_random_is_by_seed_and_name():
    weight = weight_like((9, 4))
    assert select("random", weight, 5, seed=3, name="q") == Support.random((9, 4), 5, seed=3, name="q")


def test_gallop_ranks_zero_weights_by_their_gradients_and_ties_by_position():
    weight = torch.tensor([[0.0, 0.0, 1.0], [-0.5, 0.5, 0.0]])
    gradient = torch.tensor([[1.0, -2.0, 9.0], [1.0, -1.0, 0.0]])
    score = get_criterion("gallop").score(weight, Statistics(gradient=gradient))
    assert bool(score.isfinite().all()) and score[1, 2] == 0
    order = [select("gallop", weight, k, stats=Statistics(gradient=gradient)).indices.tolist() for k in (1, 2, 4)]
    assert order == [[1], [0, 1], [0, 1, 2, 3]]  # the quotients of the second row are equal: the lower position


@pytest.mark.parametrize("shape", [(1, 9), (9, 4), (31, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonzero_is_a_uniform_draw_among_the_nonzero_entries(shape, dtype):
    weight = weight_like(shape, dtype)
    weight[weight_like(shape, seed=1) > 0] = 0
    pool = weight.reshape(-1).nonzero().squeeze(1)
    drawn = [select("nonzero", weight, len(pool) // 2, seed=seed, name="q").indices for seed in range(200)]
    assert all(bool(torch.isin(positions, pool).all()) and positions.unique().numel() == len(pool) // 2
               for positions in drawn)  # fmt: skip
    share = torch.cat(drawn).bincount(minlength=weight.numel())[pool] / 200
    # five standard deviations of a share of 200 draws
    assert bool(((share - len(pool) // 2 / len(pool)).abs() < 5 * (0.25 / 200) ** 0.5).all())
    assert select("nonzero", weight, len(pool)).indices.tolist() == pool.tolist()
    assert select("nonzero", weight, 1, seed=1, name="a") == select("nonzero", weight, 1, seed=1, name="a")
    with pytest.raises(ValueError, match=rf"layer q: k={len(pool) + 1}: {len(pool)} of the {weight.numel()} entries"):
        select("nonzero", weight, len(pool) + 1, name="q")


def test_nonzero_without_zeros_is_the_random_draw():
    weight = weight_like((9, 4))
    assert select("nonzero", weight, 7, seed=3, name="q") == Support.random((9, 4), 7, seed=3, name="q")


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_decides_its_own_count(dtype):
    # 0.0021 is no bfloat16 number: entries are compared as they are, the threshold is not rounded
    weight = weight_like((40, 40), dtype=dtype).mul_(0.01)
    for threshold in (0.0021, 0.0103, 0.02):
        expected = (weight.double().abs() < threshold).reshape(-1).nonzero().squeeze(1)
        if dtype == torch.float64:
            weight = weight.float().double()
        support = select("threshold", weight, None, options={"threshold": threshold})
        assert support.indices.tolist() == expected.tolist()
        assert get_criterion("threshold").count(weight, threshold=threshold) == expected.numel()
        assert select("threshold", weight, expected.numel(), options={"threshold": threshold}) == support


def test_threshold_that_finds_another_number():
    weight = torch.tensor([[0.1, 0.2, 0.3]])
    with pytest.raises(ValueError, match=r"layer q: selection='threshold' with .*0.25.* finds 2 entries, not 3"):
        select("threshold", weight, 3, options={"threshold": 0.25}, name="q")
    assert select("threshold", weight, None, options={"threshold": 0.05}, name="q").nnz == 0


def test_select_refuses():
    weight = weight_like()
    with pytest.raises(ValueError, match="layer q: k=36: between 0 and 35"):
        select("magnitude", weight, 36, name="q")
    with pytest.raises(ValueError, match="layer q: k=None: selection='magnitude' needs the number"):
        select("magnitude", weight, None, name="q")
    with pytest.raises(ValueError, match="layer q: selection='fisher' needs statistics of the data: pass stats="):
        select("fisher", weight, 3, name="q")
    with pytest.raises(ValueError, match="layer q: 1 of 35 scores are NaN"):
        weight[2, 3] = float("nan")
        select("magnitude", weight, 3, name="q")

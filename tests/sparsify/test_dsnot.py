"""DSnoT: against exchanges written row by row; counts, groups and errors that only fall."""

from __future__ import annotations

import pytest
import torch

from sparse_peft.numerics import panel_limit
from sparse_peft.sparsify import NM, DSnoT, Unstructured, prune
from sparse_peft.sparsify.dsnot import _Rows
from tests.sparsify.models import batches, linear_layers, llama, rows


def problem(out_rows=9, cols=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_rows, cols, generator=generator)
    mean = torch.randn(cols, generator=generator, dtype=torch.float64)
    square = mean.square() + torch.rand(cols, generator=generator, dtype=torch.float64) + 0.1
    return weight, mean, square


def start(weight, square, pattern):
    return pattern.keep(weight.abs() * square.sqrt().float())


def error_of(weight, kept, mean):
    return (weight.double() * mean * ~kept).sum(1)


def plain_dsnot(weight, kept, mean, square, options, group):
    """One row after the other, with lists."""
    refined = kept.clone()
    variance = (square - mean**2).clamp(min=1e-8)
    for row in range(len(weight)):
        part = (weight[row].double() * mean).tolist()
        score = (weight[row].double().abs() * square.sqrt()).tolist()
        fresh, error = set(range(len(part))), sum(p for p, k in zip(part, kept[row].tolist(), strict=True) if not k)
        for _ in range(options.max_cycles):
            if abs(error) <= options.threshold:
                break
            sign = 1 if error > 0 else -1
            grow = [j for j in fresh if not refined[row, j] and part[j] * sign > 0]
            if not grow:
                break
            restored = max(grow, key=lambda j: part[j] * sign / float(variance[j]) ** options.power)
            drop = [j for j in fresh if refined[row, j]]
            if group is None:
                drop = [j for j in drop if part[j] * sign < 0]
            else:
                drop = [j for j in drop if j // group == restored // group]
            pruned = min(drop, key=lambda j: score[j], default=None)
            fresh.remove(restored)
            after = None if pruned is None else error + part[pruned] - part[restored]
            if after is None or (options.strict and abs(after) >= abs(error)):
                continue
            refined[row, restored], refined[row, pruned] = True, False
            fresh.remove(pruned)
            error = after
    return refined


@pytest.mark.parametrize("options", [DSnoT(), DSnoT(strict=False, max_cycles=7), DSnoT(power=0.0, threshold=0.5)])
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.7, "matrix"), NM(2, 4), NM(2, 8)])
@pytest.mark.parametrize("cols", [16, 64, 160])
def test_the_exchanges_are_the_plain_ones(cols, pattern, options):
    weight, mean, square = problem(cols=cols)
    kept = start(weight, square, pattern)
    with panel_limit(4 * cols * 48):
        refined = options.refine(weight, kept, mean, square, pattern)
    assert torch.equal(refined, plain_dsnot(weight, kept, mean, square, options, getattr(pattern, "m", None)))
    assert torch.equal(refined.sum(1), kept.sum(1)) and not torch.equal(refined, kept)
    if isinstance(pattern, NM):
        assert refined.view(-1, pattern.m).sum(1).eq(pattern.n).all()
    if options.strict:
        before, after = error_of(weight, kept, mean).abs(), error_of(weight, refined, mean).abs()
        assert bool((after <= before).all()) and after.sum() < 0.6 * before.sum()


def test_the_tracked_error_is_that_of_the_mask():
    weight, mean, square = problem(cols=128)
    kept = start(weight, square, Unstructured(0.5, "row"))
    tracked = _Rows(weight, kept, mean, square, (square - mean**2), None)
    trace = [tracked.error.clone()]
    for _ in range(30):
        tracked.run(1, torch.full_like(tracked.error, 0.01), strict=True)
        trace.append(tracked.error.clone())
        torch.testing.assert_close(tracked.error, error_of(weight, kept, mean), rtol=1e-12, atol=1e-12)
    falls = torch.stack(trace).abs().diff(dim=0)
    assert bool((falls <= 0).all()) and bool((falls < 0).any())


def test_dead_inputs_are_never_restored():
    weight, mean, square = problem(cols=32)
    mean[::3] = 0
    square[::3] = 0
    pattern = Unstructured(0.5, "row")
    kept = start(weight, square, pattern)
    refined = DSnoT(threshold=0).refine(weight, kept, mean, square, pattern)
    assert not bool((refined & ~kept)[:, ::3].any()) and not torch.equal(refined, kept)


def test_a_relative_threshold_follows_the_scale_of_the_inputs():
    weight, mean, square = problem(cols=64)
    pattern = Unstructured(0.5, "row")
    kept = start(weight, square, pattern)
    options = DSnoT(relative=True, threshold=0.2)
    refined = options.refine(weight, kept, mean, square, pattern)
    scaled = options.refine(weight, kept, 100 * mean, 10_000 * square, pattern)
    assert torch.equal(refined, scaled) and not torch.equal(refined, kept)


def test_the_mean_output_of_a_models_first_block_comes_closer():
    data, results = batches(), {}
    dense = llama()
    for refine in (None, "dsnot"):
        model = llama()
        masks = prune(model, 0.6, "wanda", calibration=data, refine=refine, progress=False)
        results[refine] = masks
    name = "model.layers.0.self_attn.q_proj"
    x = dense.model.layers[0].input_layernorm(dense.model.embed_tokens(torch.cat([b["input_ids"] for b in data])))
    mean = x.detach().flatten(0, 1).double().mean(0)
    weight = rows(linear_layers(dense)[name])
    before, after = (error_of(weight, results[key].layers[name].to_bool(), mean).abs() for key in (None, "dsnot"))
    assert bool((after <= before + 1e-6).all()) and after.sum() < before.sum()
    assert results["dsnot"].kept == results[None].kept and "DSnoT" in results["dsnot"].about["refine"]


@pytest.mark.parametrize("options", [{"max_cycles": 0}, {"threshold": -1}, {"power": -0.5}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DSnoT(**options)

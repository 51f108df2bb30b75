"""SparseGPT, against the algorithm written row by row from the inverse itself, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from sparse_peft.calibrate import output_error
from sparse_peft.sparsify import NM, SparseGPT, Unstructured, prune
from tests.calibrate.test_gptq import correlated
from tests.sparsify.models import batches, inputs_of, linear_layers, llama, rows


def plain_sparsegpt(weight, moment, damping, group, choose):
    """Optimal brain surgeon, column by column: the inverse of what is left is found anew for every column.

    Args:
        choose: ``choose(scores, first, stop)``: bool of the columns ``first`` to ``stop`` that stay.
    """
    out_rows, cols = weight.shape
    damped = moment + damping * moment.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    left, kept = weight.double().clone(), torch.ones(out_rows, cols, dtype=torch.bool)
    for column in range(cols):
        if column % group == 0:
            stop = min(column + group, cols)
            # the variance of column j, given those behind it: what the j-th step of the sweep divides by
            spread = [float(torch.linalg.inv(damped[j:, j:])[0, 0]) for j in range(column, stop)]
            scores = left[:, column:stop].square() / torch.tensor(spread, dtype=torch.float64)
            kept[:, column:stop] = choose(scores, column, stop)
        inverse = torch.linalg.inv(damped[column:, column:])
        error = torch.where(kept[:, column], 0.0, left[:, column])
        left[:, column:] -= error[:, None] / inverse[0, 0] * inverse[0]
        left[:, column] *= kept[:, column]
    return left, kept


def rank(scores, count):
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().topk(count).indices] = True
    return kept.view(scores.shape)


@pytest.mark.parametrize("block, cols", [(8, 32), (128, 24), (8, 29)])
def test_unstructured_is_the_plain_one(block, cols):
    weight, moment = torch.randn(7, cols), correlated(cols)
    units = 3 * cols
    expected, mask = plain_sparsegpt(
        weight, moment, 0.01, block, lambda s, first, stop: rank(s, units * stop // cols - units * first // cols)
    )
    found, kept = SparseGPT(block=block).prune(weight, moment.clone(), Unstructured(0.5, "matrix"), units, "")
    assert torch.equal(kept, mask) and int(kept.sum()) == units
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert not bool(found[~kept].any())


@pytest.mark.parametrize("n, m, block", [(2, 4, 128), (2, 4, 6), (1, 8, 16)])
def test_n_of_m_is_the_plain_one(n, m, block):
    weight, moment = torch.randn(6, 32), correlated(32)

    def choose(scores, first, stop):
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(n, 1).indices, True)

    expected, mask = plain_sparsegpt(weight, moment, 0.01, m, choose)
    found, kept = SparseGPT(block=block).prune(weight, moment.clone(), NM(n, m), 0, "")
    assert torch.equal(kept, mask) and kept.view(-1, m).sum(1).eq(n).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.7, "matrix"), NM(2, 4)])
def test_compensation_lowers_the_outputs_error(pattern):
    weight, moment = torch.randn(24, 96), correlated(96)
    units = round(pattern.density * weight.numel())
    found, kept = SparseGPT(block=32).prune(weight, moment.clone(), pattern, units, "")
    wanda = weight * pattern.keep(weight.abs() * moment.diagonal().sqrt().float(), units)
    assert output_error(weight, found, moment) < output_error(weight, wanda, moment)
    assert output_error(weight, found, moment) < output_error(weight, weight * kept, moment)


def test_without_correlation_the_weights_that_stay_do_not_change():
    weight = torch.randn(5, 16)
    found, kept = SparseGPT(block=16).prune(weight, torch.eye(16), Unstructured(0.5, "matrix"), 40, "")
    assert torch.equal(kept, rank(weight.square(), 40)) and torch.equal(found, weight * kept)


def test_inputs_that_are_always_zero_go_first_and_compensate_nothing():
    weight, moment = torch.randn(6, 16) + 3, correlated(16)
    moment[:, [2, 9]] = 0
    moment[[2, 9]] = 0
    alive = [i for i in range(16) if i not in (2, 9)]
    found, kept = SparseGPT().prune(weight, moment.clone(), Unstructured(0.5, "matrix"), 48, "")
    assert not bool(kept[:, [2, 9]].any()) and int(kept.sum()) == 48
    assert bool(found.isfinite().all()) and kept[:, alive].sum() == 48
    found, kept = SparseGPT().prune(weight, torch.zeros(16, 16), NM(2, 4), 0, "")
    assert torch.equal(found, weight * kept)


def test_a_singular_moment_names_the_layer():
    x = torch.randn(3, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layer q: .*singular with damping=1e-30"):
        SparseGPT(damping=1e-30).prune(torch.randn(4, 16), x.t() @ x, NM(2, 4), 0, "q")
    with pytest.raises(ValueError, match="damping=0"):
        SparseGPT(damping=0)


def test_a_model_block_by_block_is_the_plain_one():
    model, data = llama(), batches(12)
    reference = copy.deepcopy(model)
    masks = prune(model, "2:4", "sparsegpt", calibration=data, progress=False)
    names = [name for name in linear_layers(reference) if ".0." in name]
    for name, x in inputs_of(reference, names, data).items():
        module = reference.get_submodule(name)
        found, kept = SparseGPT().prune(rows(module), x.t() @ x / len(x), NM(2, 4), 0, name)
        assert torch.equal(masks.layers[name].to_bool(), kept)
        torch.testing.assert_close(rows(model.get_submodule(name)), found, rtol=1e-3, atol=1e-3)


def test_few_tokens_are_said():
    with pytest.warns(
        RuntimeWarning, match=r"14 layers saw fewer tokens .* than they have inputs, layer model\.layers\.0.* 12;"
    ):
        prune(llama(), "2:4", "sparsegpt", calibration=batches(1, 1), progress=False)

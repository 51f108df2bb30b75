"""Split and merge: passes with one part against dense float64 weights, and the merged adapter as it always is."""

import copy
import itertools

import pytest
import torch

from sparse_peft import SparsityController
from sparse_peft.procedures import SplitMerge
from tests.helpers.procedures import adapted, assert_resumes, batches, loss_of, optimizer_of, run, train, trained

pytestmark = pytest.mark.filterwarnings("ignore:adapter.*what suits its config")


def started(kind, procedure, dtype=torch.float64, **options):
    model = adapted(kind, dtype)
    optimizer = optimizer_of(model, **options)
    controller = SparsityController(model, optimizer, procedures=[procedure])
    return model, optimizer, controller, controller.parts["procedures"]["SplitMerge"]


def with_part(model, splitter):
    """A copy of the model, without hooks, whose adapter is the drawn part."""
    found = copy.deepcopy(model)
    for module in found.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with torch.no_grad():
        for name, parameter in trained(found).items():
            if name in splitter.split:
                parameter.mul_(splitter.active(name, parameter) * splitter.config.parts)
    return found


@pytest.mark.parametrize(
    "procedure", [SplitMerge(3), SplitMerge(4, parameters=r"lora_B|values")], ids=["all", "one factor"]
)
@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_pass_computes_with_the_drawn_parts(kind, procedure):
    model, optimizer, controller, splitter = started(kind, procedure)
    for step in range(3):
        batch = batches([step])[0]
        reference = with_part(model, splitter)
        loss = loss_of(model, batch)
        expected = loss_of(reference, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        loss.backward()
        expected.backward()
        for (name, parameter), other in zip(trained(model).items(), trained(reference).values(), strict=True):
            gradient = other.grad
            if name in splitter.split:
                gradient = gradient * splitter.active(name, parameter) * procedure.parts
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    plain = adapted(kind, torch.float64)
    assert model.state_dict().keys() == plain.state_dict().keys(), "nothing is added to the files"
    plain.load_state_dict(model.state_dict())
    x = batches([9])[0][0].double()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x)), "evaluation is that of the merged adapter"


def test_parts_are_disjoint_equal_and_drawn_alike():
    _, _, _, splitter = started("lora", SplitMerge(3))
    drawn = set()
    for step in range(2, 42):
        drawn |= set(splitter.chosen.items())
        splitter.begin_step(step)
    assert drawn == set(itertools.product(splitter.split, range(3)))
    for name, parameter in splitter.split.items():
        found = []
        for part in range(3):
            splitter.chosen[name] = part
            found.append(splitter.active(name, parameter))
        assert torch.equal(sum(mask.int() for mask in found), torch.ones_like(parameter).int())
        sizes = [int(mask.sum()) for mask in found]
        assert max(sizes) - min(sizes) <= 1


def test_the_mean_over_the_parts_is_the_evaluation():
    model, _, _, splitter = started("lora", SplitMerge(2, parameters=r"layers\.3\.down\.lora_B"))
    (name,) = splitter.split
    model.base_model.model.head = torch.nn.Identity()  # linear from this factor on
    x = batches([0])[0][0].double()
    outputs = []
    for part in range(2):
        splitter.chosen[name] = part
        outputs.append(model(x))
    torch.testing.assert_close((outputs[0] + outputs[1]) / 2, model.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_resting_entries_and_their_moments_stay_if_asked(kind):
    for lazy in (False, True):
        model, optimizer, controller, splitter = started(kind, SplitMerge(4, lazy=lazy), weight_decay=0.1)
        train(model, optimizer, controller, range(8))
        before = {name: p.detach().clone() for name, p in splitter.split.items()}
        moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in splitter.split.items()}
        rests = {name: ~splitter.active(name, p) for name, p in splitter.split.items()}
        train(model, optimizer, controller, [8])
        for name, parameter in splitter.split.items():
            same = torch.equal(parameter[rests[name]], before[name][rests[name]])
            assert same == lazy
            assert torch.equal(optimizer.state[parameter]["exp_avg"][rests[name]], moments[name][rests[name]]) == lazy
            assert not torch.equal(parameter[~rests[name]], before[name][~rests[name]])


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_resumed_run_is_the_uninterrupted_one(kind):
    assert_resumes(kind, SplitMerge(3), stops=(1, 4))
    assert_resumes(kind, SplitMerge(3, lazy=True), stops=(3,))


def test_checkpointing_and_errors_leave_the_parameters_in_place():
    model, _, controller, _ = started("lora", SplitMerge(2))
    block = model.base_model.model.layers[1]
    x = torch.randn(3, 7, dtype=torch.float64)
    plain = torch.autograd.grad(block(x).sum(), list(trained(block).values()))
    again = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum()
    for one, other in zip(plain, torch.autograd.grad(again, list(trained(block).values())), strict=True):
        assert torch.equal(one, other)
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match="shapes"):
        block(torch.randn(3, 5, dtype=torch.float64))
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    controller.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="parts=1"):
        SplitMerge(1)
    with pytest.raises(ValueError, match=r"parameters='lora_C'.*lora_A"):
        run("lora", SplitMerge(parameters="lora_C"), steps=1)

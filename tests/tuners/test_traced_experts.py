"""Fused experts in compiled graphs: no graph break more than the base has, and the results of eager models."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sparse_peft import S2FTConfig, SLTrainConfig, SparsityController
from tests.helpers.expert_models import IDS, Loop, adapted, config, layers, mixture

# A model, the implementation of its experts, and what is stored in another way there.
CASES = {
    "grouped": ("qwen3_moe", "grouped_mm"),
    "batched": ("qwen3_moe", "batched_mm"),
    "grouped, (in, out), biases": ("gpt_oss", "grouped_mm"),
    "one implementation, (in, out)": ("llama4_text", "eager"),
}
pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


X = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


def made(name="qwen3_moe", implementation="grouped_mm", dtype=torch.float32, settings=None, **sizes):
    """``(model, its block of experts)``: compiling the rest takes seconds."""
    torch.manual_seed(1)
    base = mixture(name, implementation, num_hidden_layers=1, **sizes).to(dtype)
    model = get_peft_model(base, settings or config()).train()
    block = base.model.layers[0]
    return model, block.feed_forward if name == "llama4_text" else block.mlp


def whole(block, backend="aot_eager"):
    """The compiled block, which must be one graph."""
    return torch.compile(block, backend=backend, fullgraph=True)


def first(out):
    return out[0] if isinstance(out, tuple) else out


def results(model, forward, dtype=torch.float32):
    model.zero_grad()
    x = X.to(dtype).requires_grad_()
    out = first(forward(x))
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def check_equal(model, block, compiled, tolerance=1e-6, dtype=torch.float32):
    wanted, found = results(model, block, dtype), results(model, compiled, dtype)
    assert len(found) == len(wanted) > 2
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_one_graph_and_equal_results_before_and_after_a_step(case):
    model, block = made(*CASES[case])
    compiled = whole(block)
    before = {path: layer.base_parameter.detach().clone() for path, layer in layers(model).items()}
    results(model, compiled)
    assert all(torch.equal(layer.base_parameter, before[path]) for path, layer in layers(model).items())
    check_equal(model, block, compiled)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.deltas["default"].values.mul_(-2)
        assert (first(compiled(X)) - first(block(X))).abs().max() < 1e-5
    check_equal(model, block, compiled)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_channels_in_a_graph(name):
    settings = S2FTConfig(ratio=0.2, target_modules=[], target_experts=True, init_weights=False)
    model, block = made(name, settings=settings)
    check_equal(model, block, whole(block))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_sparse_part_of_sltrain_in_a_graph(name):
    settings = SLTrainConfig(r=2, density=0.1, target_modules=["q_proj"], target_experts=True, init_weights=False)
    model, block = made(name, settings=settings)
    check_equal(model, block, whole(block))


@pytest.mark.parametrize("case", CASES)
def test_autocast_around_a_graph(case):
    def cast(forward):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(x)

        return run

    model, block = made(*CASES[case])
    assert first(cast(block)(X)).dtype == first(cast(whole(block))(X)).dtype
    check_equal(model, cast(block), cast(whole(block)), 0.03)


def test_adapters_are_added_switched_merged_and_disabled():
    model, block = made()
    model.add_adapter("other", config(seed=7, target_experts=False, target_parameters=["experts.down_proj"]))
    compiled, longer = whole(block, "eager"), torch.randn(1, 9, 16)

    def check(x=X):
        with torch.no_grad():
            assert (compiled(x) - block(x)).abs().max() < 1e-5

    for names in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(names)
        check()
    check(longer)
    with model.disable_adapter():
        check()
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    check()


def test_a_mixed_batch_of_a_compiled_model():
    model, _ = made()
    model.eval().add_adapter("other", config(seed=7))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for names in (["other", "default"], ["__base__", "other"]):
            found, wanted = (one(IDS, adapter_names=names).logits for one in (compiled, model))
            assert (found - wanted).abs().max() < 1e-5


def test_positions_change_as_in_an_eager_run():
    found = []
    for compiles in (False, True):
        settings = config(selection="rigl", reselect_every=2, accumulate=1, init_weights=True)
        model, block = made(settings=settings)
        forward = whole(block) if compiles else block
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        controller = SparsityController(model, optimizer, total_steps=6)
        before = [layer.support("default").indices.clone() for layer in layers(model).values()]
        for _ in range(5):
            results(model, forward)
            optimizer.step()
            controller.step()
        found.append([layer.support("default").indices for layer in layers(model).values()])
        assert not any(torch.equal(*pair) for pair in zip(before, found[-1], strict=True))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


class Einsum(Loop):
    """Experts that multiply by a function which is not taken over, and one after the other."""

    def forward(self, x, weights):
        hidden = torch.einsum("ti,eoi->teo", x, self.up).relu()
        return sum(weights[:, e, None] * nn.functional.linear(hidden[:, e], self.down[e]) for e in range(3))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Einsum()

    def forward(self, x, weights):
        return self.experts(x, weights)


def test_other_functions_and_numbers_of_experts_in_a_graph():
    torch.manual_seed(0)
    model = get_peft_model(Holder().double(), config(task_type=None, density=0.3))
    x, weights = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64)
    found = []
    for forward in (model, whole(model)):
        model.zero_grad()
        out = forward(x, weights)
        out.square().sum().backward()
        found.append(
            [out.detach(), *(layer.deltas["default"].values.grad.clone() for layer in layers(model).values())]
        )
    assert len(found[0]) == 3
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_no_graph_break_more_than_the_base_has(implementation):
    def breaks(model):
        torch._dynamo.reset()
        return torch._dynamo.explain(model.train())(IDS, labels=IDS).graph_break_count

    own = breaks(mixture("qwen3_moe", implementation))
    assert breaks(adapted("qwen3_moe", implementation)) <= own
    assert (own == 0) == (implementation != "eager")


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_compiler_of_torch(implementation):
    model, block = made("qwen3_moe", implementation)
    check_equal(model, block, whole(block, "inductor"), 1e-4)

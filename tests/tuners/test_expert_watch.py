"""Positions in fused experts chosen from data, against a dense float64 reference that loops over the experts."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from benchmarks.measure import LargestTensor
from sparse_peft import SparseConfig, panel_limit, select_support
from tests.helpers.expert_models import CONFIGS, IDS, config, layers, mixture

BATCHES = [{"input_ids": IDS + shift, "labels": IDS + shift} for shift in (0, 3, 8)]
MANY = [{"input_ids": torch.randint(1, 32, (4, 16), generator=torch.Generator().manual_seed(seed))} for seed in (1, 2)]
for batch in MANY:
    batch["labels"] = batch["input_ids"]


def dense_gradients(base, batches, power):
    """Mean over batches of the dense gradients, or of their squares, of all experts' parameters."""
    total = {}
    for batch in batches:
        base.zero_grad()
        base(**batch).loss.backward()
        for name, parameter in base.named_parameters():
            if "experts." in name and parameter.ndim == 3:
                total[name] = total.get(name, 0) + parameter.grad.detach() ** power
    return {name: gradient / len(batches) for name, gradient in total.items()}


def best(scores, count):
    """The positions of the largest scores, ascending."""
    return scores.reshape(-1).topk(count).indices.sort().values


def check_best(support, scores):
    """The best positions train, beside an equal share of the experts without scores."""
    scores = scores.reshape(5, -1)
    active = scores.any(1)
    positions = support.indices.long()
    ours = positions[active[positions // scores.shape[1]]]
    assert len(ours) == support.nnz - int((~active).sum()) * (support.nnz // 5)
    assert torch.equal(ours, best(scores, len(ours))), support.name


def chosen(base, selection, batches, **settings):
    made = config(selection=selection, density=0.05, **settings)
    return select_support(base, made, batches, oversample=float("inf")).supports


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("selection", ["gradient", "fisher"])
def test_gradients_are_those_of_the_routed_tokens(name, selection, implementation):
    wanted = dense_gradients(mixture(name).double(), MANY, 2 if selection == "fisher" else 1)
    base = mixture(name, implementation).double()
    supports = chosen(base, selection, MANY)
    assert supports.keys() == wanted.keys()
    for path, support in supports.items():
        check_best(support, wanted[path].abs())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_choice(reentrant):
    wanted = chosen(mixture(), "gradient", MANY)
    base = mixture("qwen3_moe", "grouped_mm").train()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    found = chosen(base, "gradient", MANY)
    for path, support in found.items():
        shared = torch.isin(support.indices, wanted[path].indices).float().mean()
        assert shared > 0.99, path


def routed_inputs(base, batches):
    """``{path: [(tokens, in) of each expert]}`` of a Qwen3-MoE, computed in a loop; padded tokens are left out."""
    found = {}

    def see(module, args, output):
        x, index, _ = args
        for expert in range(5):
            mine = x[((index == expert).any(1)) & kept]
            gate, up = (mine @ module.gate_up_proj[expert].T).chunk(2, -1)
            found.setdefault((module, "gate_up_proj", expert), []).append(mine)
            found.setdefault((module, "down_proj", expert), []).append(nn.functional.silu(gate) * up)

    paths = {module: name for name, module in base.named_modules() if name.endswith("experts")}
    handles = [module.register_forward_hook(see) for module in paths]
    for batch in batches:
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().reshape(-1)
        with torch.no_grad():
            base(**batch)
    for handle in handles:
        handle.remove()
    return {(f"{paths[module]}.{name}", expert): torch.cat(x) for (module, name, expert), x in found.items()}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("padded", [False, True])
def test_input_norms_are_those_of_the_routed_tokens(implementation, padded):
    batches = MANY
    if padded:
        mask = torch.ones(4, 16, dtype=torch.long)
        mask[:2, 9:] = 0
        batches = [{**batch, "attention_mask": mask} for batch in MANY]
    reference = mixture().double()
    inputs, weights = routed_inputs(reference, batches), dict(reference.named_parameters())
    supports = chosen(mixture("qwen3_moe", implementation).double(), "wanda", batches)
    for path, support in supports.items():
        weight = weights[path].detach().abs()
        scores = torch.stack([weight[e] * inputs[path, e].square().sum(0).sqrt() for e in range(5)])
        check_best(support, scores)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_input_norms_of_weights_that_are_stored_in_out(name):
    base = mixture(name).double()
    experts = [module for path, module in base.named_modules() if path.endswith("experts")]
    seen = []
    handle = experts[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    supports = chosen(base, "wanda", MANY)
    handle.remove()
    for args in seen[:1]:
        assert args[0].shape[-1] == 16
    path = next(path for path in supports if path.endswith("layers.0.mlp.experts.gate_up_proj") or "gate_up" in path)
    norms = torch.zeros(5, 16, dtype=torch.float64)
    for args in seen:
        for expert in range(5):
            x = args[0].view(5, -1, 16)[expert] if name == "llama4_text" else args[0][(args[1] == expert).any(1)]
            norms[expert] += x.square().sum(0)
    scores = experts[0].gate_up_proj.detach().abs() * norms.sqrt()[:, :, None]
    check_best(supports[path], scores)


def only_experts(base, chosen_ones):
    """Route all tokens to some experts of the first layer."""
    router = base.model.layers[0].mlp.gate
    with torch.no_grad():
        router.weight.zero_()
        for number in chosen_ones:
            router.weight[number] = 5 * torch.randn(16)
    base.model.layers[0].mlp.gate.forward = lambda x: _routed(router, x, chosen_ones)
    return base


def _routed(router, x, chosen_ones):
    logits = x.reshape(-1, x.shape[-1]) @ router.weight.T
    index = torch.tensor(chosen_ones).expand(len(logits), -1)
    weights = logits.softmax(-1).gather(1, index)
    return logits, weights / weights.sum(-1, keepdim=True), index


@pytest.mark.parametrize("selection", ["gradient", "wanda", "gallop", "movement"])
def test_experts_without_tokens_train_random_entries(selection):
    base = only_experts(mixture(), [1, 3])
    with pytest.warns(RuntimeWarning, match=r"experts.gate_up_proj: no token.*experts 0, 2, 4, and 3 others"):
        supports = chosen(base, selection, MANY[:1], seed=4)
    for path, support in supports.items():
        if "layers.0" not in path:
            continue
        counts = torch.bincount(support.rows.long() // (support.shape[0] // 5), minlength=5).tolist()
        share = support.nnz // 5
        assert [counts[number] for number in (0, 2, 4)] == [share] * 3
        assert sum(counts) == support.nnz
        assert support.indices.unique().numel() == support.nnz
    again = chosen(only_experts(mixture(), [1, 3]), selection, MANY[:1], seed=4)
    assert all(torch.equal(again[path].indices, support.indices) for path, support in supports.items())


def test_all_entries_train_with_and_without_tokens():
    made = config(selection="gradient", density=0.99)
    with pytest.warns(RuntimeWarning, match="no token"):
        supports = select_support(only_experts(mixture(), [1, 3]), made, MANY[:1]).supports
    for support in supports.values():
        assert support.nnz == round(0.99 * support.shape[0] * support.shape[1])
        assert support.indices.unique().numel() == support.nnz


def test_experts_that_a_later_batch_reaches_are_chosen():
    torch.manual_seed(0)
    base = mixture()
    order = iter([[0, 1], [2, 3], [2, 3]])

    def loss(model, batch):
        return only_experts(model, next(order))(**batch).loss

    some = {"target_experts": False, "target_parameters": ["0.mlp.experts.down_proj"]}
    made = config(selection="fisher", density=0.05, **some)
    with pytest.warns(RuntimeWarning, match=r"experts 4, and 0 others"):
        support = next(iter(select_support(base, made, MANY + MANY[:1], loss_fn=loss).supports.values()))
    reached = torch.bincount(support.rows.long() // 16, minlength=5)
    assert (reached > 0).all()


@pytest.mark.parametrize("granularity", ["entry", "block"])
def test_blocks_and_shared_budgets(granularity):
    settings = {"selection": "fisher", "density": 0.1}
    settings |= {"granularity": "block", "block_size": 4} if granularity == "block" else {"allocation": "global"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = select_support(mixture().double(), config(**settings), MANY, oversample=float("inf"))
    model = get_peft_model(mixture(), made)
    total = sum(layer.stored_shape[0] * layer.stored_shape[1] for layer in layers(model).values())
    entries = sum(layer.support("default").nnz for layer in layers(model).values())
    assert entries == pytest.approx(0.1 * total, abs=32)
    wanted = dense_gradients(mixture().double(), MANY, 2)
    if granularity == "entry":
        flat = torch.cat([wanted[path].reshape(-1) for path in layers(model)])
        limit = flat.topk(entries).values.min()
        for path, layer in layers(model).items():
            assert wanted[path].reshape(-1)[layer.support("default").indices.long()].min() >= limit * (1 - 1e-4)


def test_blocks_of_two_experts_are_refused():
    made = config(selection="fisher", density=0.1, granularity="block", block_size=[9, 1])
    with pytest.raises(ValueError, match=r"gate_up_proj: blocks of 9 rows \(block_size\).*24 rows each"):
        select_support(mixture(), made, MANY)


@pytest.mark.parametrize("selection", ["fisher", "wanda"])
def test_no_temporary_is_as_large_as_the_gradient_of_all_experts(selection):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "num_experts": 16, "num_hidden_layers": 1}
    base = mixture("qwen3_moe", "grouped_mm", **sizes)
    whole = 16 * 64 * 96 * 4
    made = config(selection=selection, density=0.002, target_experts=False, target_parameters=["experts.down_proj"])
    with panel_limit(whole // 16), LargestTensor() as largest:
        select_support(base, made, MANY)
    # scores of one parameter are compared; gradients come one expert at a time
    assert largest.nbytes <= (whole if selection == "wanda" else whole // 4)


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.up = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.einsum("ti,eoi->to", x, self.up)


def test_experts_that_are_multiplied_in_an_unknown_way_are_refused():
    base = nn.Sequential(Einsum())
    made = SparseConfig(selection="fisher", density=0.1, target_modules=[], target_experts=True)
    with pytest.raises(NotImplementedError, match=r"0.up: its experts are multiplied in einsum.*gradients="):
        select_support(base, made, [torch.randn(6, 4)], loss_fn=lambda model, x: model(x).sum())
    assert "forward" not in vars(base[0]), "nothing is left behind"


def test_a_gradient_of_zeros_is_that_of_an_expert_without_tokens():
    base = mixture()
    base(**MANY[0]).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in base.named_parameters()}
    for name, gradient in found.items():
        if name.endswith("down_proj") and "experts" in name:
            gradient[2] = 0
    with pytest.warns(RuntimeWarning, match=r"experts.down_proj: no token of the data.*experts 2, and 1 others"):
        made = select_support(mixture(), config(selection="gradient", density=0.05), gradients=found)
    support = made.supports["model.layers.0.mlp.experts.down_proj"]
    assert int((support.rows // 16 == 2).sum()) == support.nnz // 5


def test_more_batches_propose_enough():
    few = select_support(mixture(), config(selection="fisher", density=0.02), BATCHES, oversample=8.0).supports
    whole = dense_gradients(mixture().double(), BATCHES, 2)
    for path, support in few.items():
        kept = torch.isin(support.indices.long(), best(whole[path], support.nnz)).float().mean()
        assert kept > 0.6, path

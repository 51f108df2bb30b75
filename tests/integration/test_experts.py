"""Mixture-of-experts models of transformers 5, whose experts are fused into bare parameters."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from sparse_peft import SaRAConfig, SparsityController
from sparse_peft.adapters import compose, extract, save_merged, soup
from sparse_peft.planning import plan_training
from sparse_peft.tuners.base_layer import TunerLayer
from tests.helpers.expert_models import IDS, SMALL, logits, train
from tests.helpers.methods import METHODS, config

MODELS = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),
    "qwen3-moe": Qwen3MoeConfig(**SMALL, num_experts=3, moe_intermediate_size=24, head_dim=8),
    "gpt-oss": GptOssConfig(**SMALL, num_local_experts=3, head_dim=8),
}
TRAIN_EXPERTS = ("sparse", "sara", "s2ft", "sltrain")


def mixture(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name])


@pytest.mark.parametrize(
    ("name", "method"), [*(("mixtral", method) for method in METHODS), ("qwen3-moe", "sparse"), ("gpt-oss", "sparse")]
)
def test_what_is_no_expert_trains(tmp_path, name, method):
    before = {key: tensor.clone() for key, tensor in mixture(name).state_dict().items()}
    targets = ["o_proj"] if method == "s2ft" else "all-linear"
    model = get_peft_model(mixture(name), config(method, target_modules=targets))
    adapted = {layer.name.rpartition(".")[2] for layer in model.modules() if isinstance(layer, TunerLayer)}
    assert adapted == ({"o_proj"} if method == "s2ft" else {"q_proj", "k_proj", "v_proj", "o_proj"})
    losses = train(model, 4)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
        assert torch.equal(PeftModel.from_pretrained(mixture(name), tmp_path).eval()(IDS).logits, wanted)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.unload().state_dict().items())


@pytest.mark.parametrize(
    ("name", "method"), [*(("mixtral", method) for method in METHODS), ("qwen3-moe", "sparse"), ("gpt-oss", "sparse")]
)
def test_experts_by_name_are_refused_with_what_to_do(name, method):
    model = mixture(name)
    with pytest.raises(ValueError, match=r"down_proj is a parameter of shape \(3, \d+, \d+\) in \w+Experts.*all-lin"):
        get_peft_model(model, config(method, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"gate_up_proj is a parameter of shape.*name linear layers"):
        get_peft_model(model, config(method, target_modules=r".*experts\.gate_up_proj"))
    with pytest.raises(
        TypeError, match=r"mlp\.experts of type .*Experts is not supported\. Its weights are bare param"
    ):
        get_peft_model(model, config(method, target_modules=["experts"]))
    if method not in TRAIN_EXPERTS:
        for fields in ({"target_parameters": ["mlp.experts.gate_up_proj"]}, {"target_experts": True}):
            with pytest.raises(ValueError, match=rf"{next(iter(fields))}=.*fused experts.*name linear layers"):
                config(method, **fields)
    assert not any(isinstance(module, TunerLayer) for module in model.modules()), "nothing was replaced"


@pytest.mark.parametrize("name", MODELS)
def test_experts_named_beside_layers_are_left_out_with_a_warning(name):
    with pytest.warns(UserWarning, match="down_proj is a parameter.*The adapter leaves them out"):
        model = get_peft_model(mixture(name), config("sparse", target_modules=["o_proj", "down_proj"]))
    assert {m.name.rpartition(".")[2] for m in model.modules() if isinstance(m, TunerLayer)} == {"o_proj"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is a parameter.*")
        get_peft_model(mixture(name), config("sparse", target_modules=["o_proj"]))


@pytest.mark.parametrize("names", [["gate_up_proj"], ["o_proj", "gate_up_proj"], r".*experts\.gate_up_proj"])
def test_parameters_of_one_module_in_both_fields_are_refused(names):
    model = mixture("qwen3-moe")
    with pytest.raises(ValueError, match=r"target_modules=.*gate_up_proj, and target_parameters .*down_proj of the s"):
        get_peft_model(model, config("sparse", target_modules=names, target_parameters=["experts.down_proj"]))
    assert not any(isinstance(module, TunerLayer) for module in model.modules())
    # names of layers that other models have as experts
    get_peft_model(model, config("sparse", target_modules=["o_proj", "down_proj"], target_experts=True))


def test_all_experts_of_a_model_without_any_are_refused_or_warned_of():
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match=r"target_experts=True: LlamaForCausalLM has no fused experts; name linear l"):
        get_peft_model(dense, config("sparse", target_modules=[], target_experts=True))
    with pytest.raises(ValueError, match=r"target_experts=True: .* no fused experts that .*layers_to_transform leave"):
        fields = {"target_modules": [], "target_experts": True, "layers_to_transform": [7]}
        get_peft_model(mixture("qwen3-moe"), config("sparse", **fields))
    with pytest.warns(UserWarning, match="target_experts=True: .*The adapter trains layers only"):
        get_peft_model(dense, config("sparse", target_modules="all-linear", target_experts=True))


# ---------------------------------------------------------------------- adapters of experts


def trained(seed, **settings):
    """A model whose experts have random entries."""
    model = get_peft_model(
        mixture("qwen3-moe"), config(target_experts=True, seed=seed, init_weights=False, **settings)
    )
    return model.eval()


def test_a_merged_export_is_a_plain_model(tmp_path):
    model = trained(0)
    own = logits(model)
    save_merged(model, tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), own)
    assert torch.equal(logits(model), own)


def test_adapters_are_composed_and_averaged(tmp_path):
    models = [trained(seed) for seed in (0, 1)]
    folders = []
    for number, model in enumerate(models):
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
    compose(folders, tmp_path / "sum")
    soup(folders, tmp_path / "mean", on_mismatch="union")
    for name, weight in (("sum", 1.0), ("mean", 0.5)):
        joined = PeftModel.from_pretrained(mixture("qwen3-moe"), tmp_path / name)
        for layer in (one for one in joined.modules() if isinstance(one, TunerLayer)):
            parts = [one for model in models for one in model.modules() if isinstance(one, TunerLayer)]
            wanted = sum(one.get_delta_weight("default") for one in parts if one.name == layer.name) * weight
            assert torch.allclose(layer.get_delta_weight("default"), wanted, atol=1e-6), layer.name


def test_a_plan_counts_the_entries_of_experts():
    settings = {"target_experts": True, "density": 0.1}
    with_experts = plan_training(MODELS["qwen3-moe"], config(**settings))
    without = plan_training(MODELS["qwen3-moe"], config(density=0.1))
    model = get_peft_model(mixture("qwen3-moe"), config(**settings))
    entries = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counted = [sum(kind.trained for kind in plan.kinds) for plan in (with_experts, without)]
    assert counted[0] == entries > counted[1]


@pytest.mark.compile
def test_a_compiled_model_computes_the_same():
    model = trained(0)
    own = logits(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(IDS).logits, own, atol=1e-6)
    compiled(IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("budget", [{"density": 1.0}, {"density": 0.1}])
def test_extraction_compares_experts(tmp_path, name, budget):
    base, tuned = mixture(name), mixture(name)
    torch.manual_seed(1)
    changed = [name for name, parameter in tuned.named_parameters() if "experts." in name and parameter.ndim == 3]
    with torch.no_grad():
        for path in changed:
            tuned.get_parameter(path).add_(0.02 * torch.randn(tuned.get_parameter(path).shape))
    found = extract(base, tuned, tmp_path, target_modules="all-linear", target_experts=True, **budget)
    assert [layer.name for layer in found.layers] == changed
    model = PeftModel.from_pretrained(mixture(name), tmp_path)
    for layer in (one for one in model.modules() if isinstance(one, TunerLayer)):
        delta = (tuned.get_parameter(layer.name) - base.get_parameter(layer.name)).detach()
        kept = delta.abs().reshape(-1).topk(layer.support("default").nnz).indices.sort().values
        assert torch.equal(layer.support("default").indices.long(), kept)
        if budget == {"density": 1.0}:
            reached = layer.dense_base_weight() + layer.get_delta_weight("default").view(layer.stored_shape)
            assert torch.equal(reached, tuned.get_parameter(layer.name).detach().view(layer.stored_shape))


def test_layers_and_experts_of_two_adapters_are_composed(tmp_path):
    models = [
        get_peft_model(mixture("qwen3-moe"), config(target_modules=["q_proj"], init_weights=False)),
        trained(1, target_modules=["k_proj"], exclude_modules=["gate_up_proj"]),
    ]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    compose([tmp_path / "0", tmp_path / "1"], tmp_path / "sum")
    joined = PeftModel.from_pretrained(mixture("qwen3-moe"), tmp_path / "sum")
    names = {one.name.rpartition(".")[2] for one in joined.modules() if isinstance(one, TunerLayer)}
    assert names == {"q_proj", "k_proj", "down_proj"}


def test_sara_trains_experts_in_a_run():
    model = get_peft_model(
        mixture("qwen3-moe"),
        SaRAConfig(
            target_modules="all-linear", target_experts=True, density=0.1, progressive=3, nuclear_weight=0.01,
            nuclear_min_size=4,
        ),
    )  # fmt: skip
    experts = [one for one in model.modules() if isinstance(one, TunerLayer) and "experts" in one.name]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    controller = SparsityController(model, optimizer, total_steps=8)
    losses, values = [], []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        values.append(torch.cat([one.deltas["default"].values.detach().clone() for one in experts]))
    assert losses[-1] < losses[0]
    frozen = values[3] == values[-1]  # those that outgrew the threshold by the third step
    assert 0 < frozen.sum() < frozen.numel()


@pytest.mark.parametrize("selection", ["accumulated_gradient", "rigl", "set"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, selection):
    window = {"set": 0, "rigl": 1}.get(selection, 2)

    def make():
        made = config(
            selection=selection, density=0.1, reselect_every=3, accumulate=window, target_experts=True, seed=3
        )
        return get_peft_model(mixture("qwen3-moe"), made)

    def going_on(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        return model.train(), optimizer

    def take(model, optimizer, controller, steps):
        for step in steps:
            ids = torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(step))
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()

    for stop in (2, 4):  # in a window, and after a reselection
        model, optimizer = going_on(make())
        controller = SparsityController(model, optimizer, total_steps=9)
        first = [layer.support("default").indices.clone() for layer in experts_of(model)]
        take(model, optimizer, controller, range(stop))
        model.save_pretrained(tmp_path / str(stop))
        saved = copy.deepcopy(optimizer.state_dict())
        take(model, optimizer, controller, range(stop, 8))
        loaded = PeftModel.from_pretrained(mixture("qwen3-moe"), tmp_path / str(stop), is_trainable=True)
        resumed, other = going_on(loaded)
        other.load_state_dict(saved)
        again = SparsityController(resumed, other, total_steps=9)
        assert again.completed_steps == stop
        take(resumed, other, again, range(stop, 8))
        for one, twin, start in zip(experts_of(model), experts_of(resumed), first, strict=True):
            assert torch.equal(one.support("default").indices, twin.support("default").indices), one.name
            assert torch.equal(one.deltas["default"].values, twin.deltas["default"].values), one.name
            assert not torch.equal(one.support("default").indices, start)


def experts_of(model):
    return [one for one in model.modules() if isinstance(one, TunerLayer) and ".experts." in one.name]

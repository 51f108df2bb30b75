"""Fused experts with trained entries: products, gradients, memory and the contract of adapters."""

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.measure import LargestTensor
from sparse_peft import SparseConfig, SparsityController, panel_limit, select_support
from sparse_peft.tuners.expert_layer import ExpertsLayer
from sparse_peft.tuners.expert_mode import ExpertsMode
from tests.helpers.expert_models import (
    CONFIGS,
    IDS,
    FromTheEnd,
    Holder,
    Stack,
    adapted,
    config,
    layers,
    logits,
    mixture,
    reference,
    train,
)
from tests.helpers.memory import saved_bytes

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def gradients(model):
    return {name: layer.deltas["default"].values.grad for name, layer in layers(model).items()}


def relative_error(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def check_against_dense(name, model, tolerance):
    dense = reference(name, model)
    loss, wanted = model(IDS, labels=IDS).loss, dense(IDS, labels=IDS).loss
    loss.backward()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    parameters = dict(dense.named_parameters())
    assert layers(model)
    for path, layer in layers(model).items():
        gradient = parameters[path].grad.reshape(-1)[layer.support("default").indices.long()]
        assert relative_error(layer.deltas["default"].values.grad, gradient) < tolerance, path


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("resident", [True, False])
def test_gradients_are_those_of_the_dense_loop(name, implementation, resident):
    model = adapted(name, implementation, torch.float64, resident=resident)
    check_against_dense(name, model, 1e-9)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama4_text"])  # which has one implementation
@pytest.mark.parametrize("resident", [True, False])
def test_gradients_of_grouped_products(name, resident):
    check_against_dense(name, adapted(name, "grouped_mm", resident=resident), 2e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_the_gradient_of_the_input_passes_through_the_experts(name):
    model, inputs = adapted(name, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    found, wanted = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    model(inputs_embeds=found).logits.square().sum().backward()
    reference(name, model)(inputs_embeds=wanted).logits.square().sum().backward()
    assert relative_error(found.grad, wanted.grad) < 1e-9


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_without_tokens_get_zeros(implementation):
    model = adapted(implementation=implementation)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "Qwen3MoeTopKRouter":
                module.weight.zero_()
                module.weight[1] = module.weight[3] = torch.randn(16)
    tokens = model(IDS, labels=IDS, output_router_logits=True).router_logits
    chosen = torch.cat(tokens).topk(2).indices.unique().tolist()
    model(IDS, labels=IDS).loss.backward()
    assert len(chosen) < 5
    for layer in layers(model).values():
        rows = layer.stored_shape[0] // 5
        expert = layer.support("default").rows // rows
        gradient = layer.deltas["default"].values.grad
        assert gradient.isfinite().all()
        idle = ~torch.isin(expert, torch.tensor(chosen))
        assert idle.any()
        assert not gradient[idle].any()


def test_a_frozen_module_computes_by_itself_without_gradients():
    model = adapted()
    experts = next(module for module in model.modules() if isinstance(module, ExpertsLayer))
    seen = []
    experts.base_layer.register_forward_hook(lambda module, args, output: seen.append(module))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert seen == [experts.base_layer] * 2


def test_a_settled_module_is_one_check_until_something_changes(monkeypatch):
    model, prepared = adapted().eval(), []
    plain = ExpertsLayer._next_forward
    monkeypatch.setattr(
        ExpertsLayer, "_next_forward", lambda self, *args: (prepared.append(self.name), plain(self, *args))[1]
    )
    model.add_adapter("other", config(seed=7))

    def prepares(act=lambda: None):
        """How many modules were not settled after an act, and that all are so in the next pass."""
        act()
        del prepared[:]
        found = logits(model)
        first = len(prepared)
        assert torch.equal(logits(model), found)
        assert len(prepared) == first
        check_dense(found)
        return first

    def check_dense(found):
        disabled = any(layer.disable_adapters for layer in layers(model).values())
        dense = mixture().double() if disabled else reference("qwen3_moe", model, model.active_adapter)
        assert torch.allclose(found.double(), logits(dense), atol=1e-4)

    def change():
        with torch.no_grad():
            layers(model)["model.layers.0.mlp.experts.down_proj"].deltas[model.active_adapter].values.mul_(2)

    assert prepares() == 2
    assert prepares() == 0
    assert prepares(change) == 1
    assert prepares(lambda: model.set_adapter("other")) == 2
    assert prepares(lambda: model(IDS, labels=IDS).loss.backward()) == 2  # an optimizer may step from now on
    assert prepares(lambda: model.merge_adapter()) == 0  # merged weights are their output
    assert prepares(lambda: model.unmerge_adapter()) == 2
    assert prepares(lambda: model.base_model.release()) == 2
    model.base_model.disable_adapter_layers()
    del prepared[:]
    check_dense(logits(model))
    assert len(prepared) == 2
    model.base_model.enable_adapter_layers()
    assert prepares() == 2


@pytest.mark.parametrize("experts", [Stack, FromTheEnd])
@pytest.mark.parametrize("resident", [True, False])
def test_other_ways_to_compute_have_right_gradients(experts, resident):
    torch.manual_seed(0)
    base = Holder(experts).double()
    dense = copy.deepcopy(base)
    model = get_peft_model(base, config(task_type=None, density=0.3, resident=resident))
    x, weights = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64)
    with torch.no_grad():
        for path, layer in layers(model).items():
            dict(dense.named_parameters())[path].add_(layer.get_delta_weight("default"))
    assert torch.allclose(model(x, weights), dense(x, weights))
    model(x, weights).square().sum().backward()
    dense(x, weights).square().sum().backward()
    for path, layer in layers(model).items():
        wanted = dict(dense.named_parameters())[path].grad.reshape(-1)[layer.support("default").indices.long()]
        assert torch.allclose(layer.deltas["default"].values.grad, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("resident", [True, False])
def test_autocast(implementation, resident):
    model = adapted(implementation=implementation, resident=resident)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    dense = reference("qwen3_moe", model)
    dense(IDS, labels=IDS).loss.backward()
    for path, layer in layers(model).items():
        wanted = dict(dense.named_parameters())[path].grad.reshape(-1)[layer.support("default").indices.long()]
        assert torch.cosine_similarity(layer.deltas["default"].values.grad.double(), wanted, 0) > 0.99


# ---------------------------------------------------------------------- memory


def wide(implementation, **settings):
    """A layer whose experts are much larger than its activations, and its module of experts."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "num_experts": 16, "num_hidden_layers": 1}
    torch.manual_seed(1)
    return get_peft_model(mixture("qwen3_moe", implementation, **sizes), config(density=0.01, **settings))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("resident", [True, False])
def test_no_temporary_of_a_training_step_is_as_large_as_all_experts(implementation, resident):
    model = wide(implementation, resident=resident)
    experts = 16 * 64 * 96 * 4
    limit = experts // 8
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with panel_limit(limit), LargestTensor() as largest:
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 0 < largest.nbytes <= limit


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_nothing_is_saved_that_a_frozen_model_does_not_save(implementation):
    model = wide(implementation)
    frozen = mixture("qwen3_moe", implementation, hidden_size=64, moe_intermediate_size=96, num_experts=16)
    experts = next(m for m in model.modules() if isinstance(m, ExpertsLayer))
    base = frozen.model.layers[0].mlp.experts.requires_grad_(False)
    x, index = torch.randn(16, 64, requires_grad=True), torch.arange(32).view(16, 2) % 16
    weights = torch.rand(16, 2)

    def run(module):
        return lambda x: module(x, index, weights)

    run(experts)(x)  # positions in the layouts of products are made once
    ours = saved_bytes(_Of(experts, run(experts)), x)[0]
    assert ours <= saved_bytes(_Of(base, run(base)), x)[0] + 4096


def test_a_step_with_grouped_products_saves_what_the_frozen_model_saves():
    model, x = wide("grouped_mm"), torch.randn(1, 32, 64, requires_grad=True)
    sizes = {"num_experts": 16, "num_hidden_layers": 1}
    frozen = mixture("qwen3_moe", "grouped_mm", hidden_size=64, moe_intermediate_size=96, **sizes).requires_grad_(
        False
    )
    ours = saved_bytes(_Of(model, lambda x: model(inputs_embeds=x).logits), x)[0]
    # the norm's output, which gate and up projections multiply, is formed again
    assert ours <= saved_bytes(_Of(frozen, lambda x: frozen(inputs_embeds=x).logits), x)[0] + 1024 < ours + 32 * 64 * 4


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])  # the other gathers a panel of weights
def test_temporaries_of_positions_do_not_grow_with_the_entries(implementation, monkeypatch):
    monkeypatch.setattr("sparse_peft.support.support.PIECE_ENTRIES", 256)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "num_experts": 16, "num_hidden_layers": 1}
    model = get_peft_model(mixture("qwen3_moe", implementation, **sizes), config(density=0.2))
    entries = max(layer.support("default").nnz for layer in layers(model).values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = IDS[:1, :4]  # activations are small
    for _ in range(2):
        with LargestTensor() as largest:
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    # originals and gradients in float32; flat positions would take 8 bytes an entry, rows and columns 16
    assert largest.nbytes <= 4 * entries


class _Of(nn.Module):
    def __init__(self, module, run):
        super().__init__()
        self.module, self.run = module, run

    def forward(self, x):
        return self.run(x)


# ---------------------------------------------------------------------- the contract of adapters


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_returns_bit_for_bit(name, dtype):
    base = mixture(name).to(dtype)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    wanted = logits(base)
    model = get_peft_model(base, config())
    own = logits(model)
    assert not torch.equal(own, wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)
    model.merge_adapter()
    assert torch.equal(logits(model), own)
    model.unmerge_adapter()
    assert torch.equal(logits(model), own)
    model(IDS, labels=IDS).loss.backward()
    unloaded = model.unload()
    assert all(torch.equal(tensor, before[key]) for key, tensor in unloaded.state_dict().items())
    assert unloaded.state_dict().keys() == before.keys()


def test_merge_and_unload_keeps_the_adapter():
    model = adapted()
    own = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, ExpertsLayer) for module in merged.modules())
    assert torch.equal(logits(merged), own)


def test_two_adapters_switch_and_add_up():
    model = adapted(dtype=torch.float64)
    first = logits(model)
    model.add_adapter("other", config(seed=7, target_experts=False, target_parameters=["experts.down_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(second, first)
    model.base_model.set_adapter(["default", "other"])
    dense = reference("qwen3_moe", model)
    with torch.no_grad():
        for path, layer in layers(model).items():
            if "other" in layer.deltas:
                dict(dense.named_parameters())[path].add_(layer.get_delta_weight("other"))
    assert torch.allclose(logits(model), logits(dense), rtol=1e-9, atol=1e-12)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_restores_the_adapter(tmp_path, low_cpu_mem_usage):
    model = adapted(save_dtype="bfloat16")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixture(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for path, layer in layers(model).items():
        twin = layers(loaded)[path].settled("default")
        assert torch.equal(twin.support.indices, layer.support("default").indices)
        assert torch.equal(twin.values, layer.deltas["default"].values.bfloat16().float())
    assert torch.allclose(logits(loaded), logits(model), atol=0.05)
    loaded.save_pretrained(tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / weights).read_bytes()


def test_bytes_of_an_entry_in_a_file(tmp_path):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 8, "num_hidden_layers": 1}
    model = get_peft_model(mixture(**sizes), config(density=0.02))
    model.save_pretrained(tmp_path)
    entries = sum(layer.deltas["default"].values.numel() for layer in layers(model).values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 6.5 * entries


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointing_gives_the_same_gradients(reentrant, implementation):
    model = adapted(implementation=implementation)
    model(IDS, labels=IDS).loss.backward()
    wanted = gradients(model)
    again = adapted(implementation=implementation)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again.enable_input_require_grads()
    again.train()
    again(IDS, labels=IDS).loss.backward()
    assert all(torch.equal(gradient, wanted[path]) for path, gradient in gradients(again).items())


def test_a_mixed_batch_gives_each_input_its_adapter():
    model = adapted().eval()
    model.add_adapter("other", config(seed=7))
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    for names in (["other", "default"], ["__base__", "other"], ["default", "default"]):
        with torch.no_grad():
            mixed = model(IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            assert torch.allclose(mixed[row], alone[name][row], atol=1e-5), (names, row)


def test_copies_compute_the_same_and_apart():
    model = adapted()
    own = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(twin), own)
        with torch.no_grad():
            for layer in layers(twin).values():
                layer.deltas["default"].values.zero_()
        assert not torch.equal(logits(twin), own)
        assert torch.equal(logits(model), own)


def test_a_merged_copy_unmerges():
    model = adapted(dtype=torch.bfloat16)
    with model.disable_adapter():
        wanted = logits(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    with twin.disable_adapter():
        assert torch.equal(logits(twin), wanted)


def test_a_merged_model_may_be_moved_and_cast():
    model = adapted()
    model.merge_adapter()
    model.to(torch.bfloat16)
    merged = logits(model)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(mixture().to(torch.bfloat16)))
    assert torch.allclose(logits(model), merged, atol=0.1)


def test_a_state_dict_has_the_base_and_stays_so():
    model = adapted()
    wanted = {key: value.clone() for key, value in mixture().state_dict().items()}
    logits(model)
    state = model.state_dict()
    logits(model)
    for key, value in state.items():
        name = key.removeprefix("base_model.model.").replace("base_layer.", "")
        if name in wanted:
            assert torch.equal(value, wanted[name]), key


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training_lowers_the_loss(implementation):
    model = adapted(implementation=implementation, init_weights=True, target_modules="all-linear")
    assert {path.rpartition(".")[2] for path in layers(model)} >= {"q_proj", "gate_up_proj", "down_proj"}
    losses = train(model, 5)
    assert losses[-1] < losses[0] - 0.03


@pytest.mark.parametrize("selection", ["accumulated_gradient", "momentum", "set", "rigl"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_positions_change_in_training(selection, implementation):
    schedule = {"reselect_every": 3, "replace_rate": 0.5}
    accumulate = {} if selection == "set" else {"accumulate": 2}
    model = adapted(
        implementation=implementation, init_weights=True, selection=selection, **schedule, **accumulate
    ).train()
    before = {path: layer.support("default").indices.clone() for path, layer in layers(model).items()}
    losses = train(model, 9, total_steps=9)
    assert losses[-1] < losses[0]
    for path, layer in layers(model).items():
        support = layer.support("default")
        assert support.nnz == len(before[path])
        assert not torch.equal(support.indices, before[path])
        assert layer.deltas["default"].values.isfinite().all()


def test_candidates_are_the_largest_gradients_of_each_expert():
    model = adapted(dtype=torch.float64, selection="rigl", reselect_every=2, accumulate=1, candidates=5.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    dense = reference("qwen3_moe", model)
    dense(IDS, labels=IDS).loss.backward()
    controller = SparsityController(model.train(), optimizer, total_steps=8)
    tracks = controller.parts["adapters"]["default"].tracks
    seen = {}
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        for path, track in tracks.items():
            if track.window is not None:
                seen[path] = [(one.positions, one.partial, one.limit) for one in track.window.observers]
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert set(seen) == set(tracks)
    for path, windows in seen.items():
        gradient = dict(dense.named_parameters())[path].grad
        support = layers(model)[path].deltas["default"].support
        for number, (positions, sums, limit) in enumerate(windows):
            own = gradient[number].reshape(-1)
            assert torch.allclose(sums.double(), own[positions.long()], rtol=1e-3, atol=1e-7)
            free = own.abs().sort(descending=True).values
            assert limit == -(-round(5.0 * support.nnz) // 5) or positions.numel() <= limit
            if positions.numel():
                assert sums.abs().max() <= free[0] * 1.001


def test_a_router_trains_by_modules_to_save(tmp_path):
    model = adapted(modules_to_save=["gate"])
    model(IDS, labels=IDS).loss.backward()
    routers = [p for name, p in model.named_parameters() if ".gate.modules_to_save." in name]
    assert len(routers) == 2
    assert all(router.grad.abs().sum() > 0 for router in routers)
    with torch.no_grad():
        for router in routers:
            router.add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(mixture(), tmp_path)), logits(model))


# ---------------------------------------------------------------------- targets and refusals


def test_target_parameters_are_found_as_peft_finds_them():
    model = adapted(target_experts=False, target_parameters=["experts.gate_up_proj", "layers.1.mlp.experts.down_proj"])
    assert list(layers(model)) == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    assert set(model.base_model.targeted_parameter_names) == set(layers(model))


def test_layers_to_transform_and_exclude_modules_choose_experts():
    assert list(layers(adapted(layers_to_transform=[1]))) == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    names = layers(adapted(exclude_modules=["down_proj"]))
    assert {name.rpartition(".")[2] for name in names} == {"gate_up_proj"}


def test_a_second_adapter_on_linear_layers_leaves_experts_alone():
    model = adapted()
    model.add_adapter("other", SparseConfig(density=0.1, target_modules="all-linear"))
    having = {path.rpartition(".")[2] for path, layer in layers(model).items() if "other" in layer.deltas}
    assert having == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["experts.gate_proj"], "'experts.gate_proj' matches no parameter.*experts.down_proj, experts.gate_up_proj"),
        (["input_layernorm.weight"], r"names model.layers.0.input_layernorm.weight of shape \(16,\) in Qwen3MoeRMSN"),
        (["q_proj.weight"], r"q_proj.weight of shape \(16, 16\) in Linear.*target_modules"),
        (["mlp.gate.weight"], r"gate.weight of shape \(5, 16\) in Qwen3MoeTopKRouter.*modules_to_save"),
    ],
)
def test_parameters_that_are_no_experts_are_refused(names, message):
    base = mixture()
    before = set(dict(base.named_modules()))
    with pytest.raises(ValueError, match=f"target_parameters: .*{message}"):
        get_peft_model(base, config(target_experts=False, target_parameters=names))
    assert set(dict(base.named_modules())) == before


def test_bare_parameters_of_two_dimensions_are_refused():
    base = mixture("gpt_oss")
    with pytest.raises(
        ValueError, match=r"gate_up_proj_bias of shape \(5, 48\) in GptOssExperts.*\(experts, rows, co"
    ):
        get_peft_model(base, config(target_experts=False, target_parameters=["experts.gate_up_proj_bias"]))
    assert not any(isinstance(module, ExpertsLayer) for module in base.modules())


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = mixture(num_experts=4)
    with pytest.raises(ValueError, match=r"weight_shapes: .*\(120, 16\).*experts.gate_up_proj.*\(96, 16\)"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, ExpertsLayer) for module in base.modules())


def test_kernels_without_a_sparse_gradient_are_refused():
    model = adapted()
    model.base_model.model.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError, match=r"experts_implementation='sonicmoe'.*'eager', 'grouped_mm', 'batched_mm'"):
        model(IDS)


def test_given_gradients_choose_positions():
    made = config(selection="gradient", density=0.02)
    base = mixture()
    base(IDS, labels=IDS).loss.backward()
    found = {name: parameter.grad for name, parameter in base.named_parameters()}
    chosen = select_support(mixture(), made, gradients=found)
    model = get_peft_model(mixture(), chosen)
    for path, layer in layers(model).items():
        support = layer.support("default")
        best = found[path].abs().reshape(-1).topk(support.nnz).indices.sort().values
        assert torch.equal(support.indices.long(), best), path


def test_the_scale_is_in_the_weight_and_in_the_gradient():
    model = adapted(dtype=torch.float64, scale=4.0)
    dense = reference("qwen3_moe", model)
    model(IDS, labels=IDS).loss.backward()
    dense(IDS, labels=IDS).loss.backward()
    assert torch.allclose(logits(model), logits(dense))
    for path, layer in layers(model).items():
        wanted = dict(dense.named_parameters())[path].grad.reshape(-1)[layer.support("default").indices.long()]
        assert relative_error(layer.deltas["default"].values.grad, 4.0 * wanted) < 1e-9


def test_a_module_of_experts_is_no_target_module():
    base = mixture()
    with pytest.raises(TypeError, match=r"mlp.experts of type Qwen3MoeExperts is not supported.*target_parameters"):
        get_peft_model(base, config(target_modules=["experts"], target_parameters=["experts.down_proj"]))
    assert not any(isinstance(module, ExpertsLayer) for module in base.modules())


def test_an_adapter_loads_into_a_model_that_has_one(tmp_path):
    adapted(seed=3).save_pretrained(tmp_path)
    model = adapted()
    first = logits(model)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(mixture(), tmp_path)))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_sharded_and_quantised_experts_are_refused():
    model = adapted()
    next(
        module for module in model.modules() if isinstance(module, ExpertsLayer)
    ).base_layer._is_fsdp_managed_module = True
    with pytest.raises(NotImplementedError, match=r"layers.0.mlp.experts: FSDP2 shards.*use DDP"):
        model(IDS)
    base = mixture()
    experts = base.model.layers[1].mlp.experts
    experts._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match=r"layers.1.mlp.experts.gate_up_proj is distributed over.*leave exp"):
        get_peft_model(base, config())
    experts._is_expert_parallel = False
    experts.down_proj = nn.Parameter(torch.zeros(5, 16, 12, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"layers.1.mlp.experts.down_proj of Qwen3MoeExperts.*torch.uint8.*bfloat16"):
        get_peft_model(base, config())
    assert not any(isinstance(module, ExpertsLayer) for module in base.modules())


def test_experts_in_four_bits_are_refused():
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    base = mixture()
    for layer in base.model.layers:
        parametrize.replace_parameter_4bit(layer.mlp.experts, "down_proj")
    for fields in ({}, {"target_experts": False, "target_parameters": ["experts.down_proj"]}):
        with pytest.raises(TypeError, match=r"layers.0.mlp.experts.down_proj is computed by a param.*in bfloat16"):
            get_peft_model(base, config(**fields))
    some = {"target_experts": False, "target_parameters": ["experts.gate_up_proj"]}
    assert all("gate_up_proj" in path for path in layers(get_peft_model(base, config(**some))))


def test_experts_in_mxfp4_train_where_transformers_dequantises_them(tmp_path):
    kind = pytest.importorskip("transformers").Mxfp4Config
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 1}
    base = mixture("gpt_oss", **sizes).bfloat16()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for parameter, rows in (("gate_up_proj", 64), ("down_proj", 32)):
        path = f"model.layers.0.mlp.experts.{parameter}"
        del state[path]
        state[f"{path}_blocks"] = torch.randint(0, 255, (5, rows, 1, 16), dtype=torch.uint8)
        state[f"{path}_scales"] = torch.full((5, rows, 1), 124, dtype=torch.uint8)
    base.config.quantization_config = {"quant_method": "mxfp4"}
    base.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kind(dequantize=True))
    assert loaded.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert loaded.model.layers[0].mlp.experts.down_proj.any()
    model = get_peft_model(loaded, config(init_weights=True))
    losses = train(model, 6)
    assert losses[-1] < losses[0]


def test_checkpointed_experts_keep_zeros():
    torch.manual_seed(1)
    model = adapted(preserve_zeros=True).train()
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one in model, twin:
        one(IDS, labels=IDS).loss.backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert own.grad is None or torch.equal(own.grad, other.grad)


def test_an_interruption_at_the_end_of_a_no_grad_block_leaves_gradients_enabled():
    class Interrupted(ExpertsMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch._C._set_grad_enabled and args == (True,):
                raise KeyboardInterrupt
            return super().__torch_function__(func, types, args, kwargs)

    def act():
        with torch.no_grad():
            torch.ones(2)

    with pytest.raises(KeyboardInterrupt):
        Interrupted([]).run(act, (), {})
    assert torch.is_grad_enabled()


def test_experts_hold_entries_between_steps_whatever_layers_do():
    model = get_peft_model(mixture("qwen3_moe", "eager"), config(resident="product", target_modules=["q_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    parts = {name: part for name, part in model.named_modules() if getattr(part, "ledger", None) is not None}
    model.train()(IDS, labels=IDS).loss.backward()
    assert {name for name, part in parts.items() if not part.ledger.is_own} == {n for n in parts if "experts" in n}
    optimizer.step()
    assert all(part.ledger.is_own for part in parts.values())

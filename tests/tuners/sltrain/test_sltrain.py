import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measure import LargestTensor
from sparse_peft import SLTrainConfig, SparseConfig, SparsityController, build_for_pretraining, select_support
from sparse_peft.tuners.delta_layer import TunerLayer
from tests.helpers.two_layers import TwoLayers

NAMES = ["first", "second"]


def sltrain(model=None, random=True, **config):
    config = SLTrainConfig(
        scale=1.0,
        **{"target_modules": NAMES, "r": 3, "alpha": 6, "density": 0.1, "init_weights": not random, **config},
    )
    return get_peft_model(TwoLayers() if model is None else model, config)


def layers(model):
    return {m.name: m for m in model.modules() if isinstance(m, TunerLayer)}


def delta(layer, adapter="default"):
    """The delta in float64, as stored, from the parameters themselves."""
    state, support = layer.deltas[adapter], layer.support(adapter)
    low = state.scale * state.B.detach().double() @ state.A.detach().double()
    low = low if layer.product.in_dim == 1 else low.t()
    dense = torch.zeros(support.shape, dtype=torch.float64).view(-1)
    dense[support.indices.long()] = state.values.detach().double()
    return low + dense.view(support.shape)


def llama_config(**fields):
    return LlamaConfig(
        **{
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "tie_word_embeddings": False, **fields,
        }
    )  # fmt: skip


def pretrain_config(**fields):
    return SLTrainConfig(
        scale=1.0, **{"mode": "pretrain", "r": 8, "alpha": 8, "density": 0.1, "target_modules": "all-linear", **fields}
    )


# ---------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("shape", [(17,), (4, 17), (2, 3, 17), (0, 17)])
def test_output_is_that_of_the_dense_weight(conv1d, resident, shape):
    torch.manual_seed(0)
    base = TwoLayers(conv1d=conv1d)
    model = sltrain(copy.deepcopy(base), resident=resident)
    x = torch.randn(*shape)
    twin = copy.deepcopy(base).double()
    for name, layer in layers(model).items():
        getattr(twin, name).weight.data += delta(layer)
    want = twin(x.double())
    assert torch.allclose(model(x).double(), want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(model(x).double(), want, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_dense_weight():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(13, 7))
    model = sltrain(copy.deepcopy(base), target_modules=["0"])
    (layer,) = layers(model).values()
    state = layer.deltas["default"]
    x = torch.randn(5, 13, requires_grad=True)
    out = model(x)
    up = torch.randn_like(out)
    out.backward(up)
    dense = up.double().t() @ x.detach().double()
    assert torch.allclose(state.A.grad.double(), state.scale * state.B.detach().double().t() @ dense, atol=1e-4)
    assert torch.allclose(state.B.grad.double(), state.scale * dense @ state.A.detach().double().t(), atol=1e-4)
    assert torch.allclose(
        state.values.grad.double(), dense.view(-1)[layer.support("default").indices.long()], atol=1e-4
    )
    weight = base[0].weight.detach().double() + delta(layer)
    assert torch.allclose(x.grad.double(), up.double() @ weight, atol=1e-4)


def test_starts_as_the_base_to_the_bit():
    base = TwoLayers()
    model = sltrain(copy.deepcopy(base), random=False)
    x = torch.randn(4, 17)
    assert torch.equal(model(x), base(x))


def test_without_its_sparse_part_it_is_lora_and_without_the_low_rank_it_is_sparse():
    torch.manual_seed(0)
    base = TwoLayers()
    model = sltrain(copy.deepcopy(base), r=4, alpha=8)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=NAMES))
    sparse = get_peft_model(copy.deepcopy(base), SparseConfig(density=0.1, scale=1.0, target_modules=NAMES))
    x = torch.randn(6, 17)
    kept = {}
    for name, layer in layers(model).items():
        state, other = layer.deltas["default"], getattr(lora.base_model.model, name)
        other.lora_A["default"].weight.data, other.lora_B["default"].weight.data = state.A.data, state.B.data
        kept[name] = state.values.data.clone()
        layers(sparse)[name].deltas["default"].values.data.copy_(state.values.data)
        state.values.data.zero_()
    assert torch.allclose(model(x), lora(x), atol=1e-6)
    model(x).square().sum().backward()
    lora(x).square().sum().backward()
    for name, layer in layers(model).items():
        other = getattr(lora.base_model.model, name).lora_A["default"].weight
        assert torch.allclose(layer.deltas["default"].A.grad, other.grad, rtol=1e-4, atol=1e-4)
    for name, layer in layers(model).items():
        layer.deltas["default"].values.data.copy_(kept[name])
        layer.deltas["default"].B.data.zero_()
        assert torch.equal(layer.support("default").indices, layers(sparse)[name].support("default").indices)
    assert torch.allclose(model(x), sparse(x), atol=1e-6)


def test_only_the_support_changes_besides_the_low_rank():
    model = sltrain()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        model(torch.randn(8, 17)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in layers(model).values():
        off = layer.get_delta_weight("default") - layer.low_rank_weight("default")
        outside = torch.ones(off.numel(), dtype=torch.bool)
        outside[layer.support("default").indices.long()] = False
        assert bool((off.view(-1)[outside] == 0).all())
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default").double()) > 3


def test_file_round_trip(tmp_path):
    model = sltrain(trainable_scale=True)
    base = TwoLayers()
    with model.disable_adapter():
        base.load_state_dict({k: getattr(layers(model)[k.split(".")[0]].base_layer, k.split(".")[1]).data
                              for k in base.state_dict()})  # fmt: skip
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} >= {"A", "B", "values", "theta"}
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    x = torch.randn(3, 17)
    assert torch.equal(loaded(x), model(x))
    tensors.pop("base_model.model.first.sparse_peft_sltrain_adapter.B")

    with pytest.raises(ValueError, match="no B for layer first"):
        set_peft_model_state_dict(loaded, tensors)


def test_trainable_scale():
    model = sltrain(trainable_scale=True)
    state = layers(model)["first"].deltas["default"]
    _down, up = state.factors()
    assert torch.allclose(up, state.B * math.tanh(1.0))
    model(torch.randn(2, 17)).sum().backward()
    assert state.theta.grad is not None and state.theta.grad.abs() > 0


def test_positions_from_gradients_and_from_the_residual_of_a_decomposition():
    torch.manual_seed(0)
    base = TwoLayers()
    config = SLTrainConfig(target_modules=NAMES, density=0.1, selection="gradient")
    gradients = {f"{name}.weight": torch.randn_like(getattr(base, name).weight) for name in NAMES}
    model = get_peft_model(copy.deepcopy(base), select_support(base, config, gradients=gradients))
    for name, layer in layers(model).items():
        chosen = layer.support("default").indices.long()
        score = gradients[f"{name}.weight"].abs().view(-1)
        assert set(chosen.tolist()) == set(score.topk(chosen.numel()).indices.tolist())
    with torch.no_grad():  # a spectrum with a gap after the second value
        for name in NAMES:
            rows, cols = getattr(base, name).weight.shape
            getattr(base, name).weight.add_(torch.randn(rows, 2) @ torch.randn(2, cols), alpha=3)
    model = sltrain(copy.deepcopy(base), selection="residual", principal_rank=2)
    for name, layer in layers(model).items():
        weight = getattr(base, name).weight.detach()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        score = (weight - u[:, :2] * s[:2] @ v[:2]).abs().view(-1)
        chosen = layer.support("default").indices.long()
        best = set(score.topk(chosen.numel()).indices.tolist())
        assert len(best & set(chosen.tolist())) >= 0.9 * len(best)


def test_positions_change_in_training():
    torch.manual_seed(0)
    model = sltrain(selection="rigl", reselect_every=3, random=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = SparsityController(model, optimizer, total_steps=12)
    before = {name: layer.support("default").indices.clone() for name, layer in layers(model).items()}
    for _ in range(12):
        model(torch.randn(8, 17)).square().mean().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert controller.history and any(
        not torch.equal(before[name], layer.support("default").indices) for name, layer in layers(model).items()
    )


# ---------------------------------------------------------------------------------------------------- pretraining


def test_layers_have_no_weight_and_everything_trains():
    model = build_for_pretraining(llama_config(), pretrain_config())
    assert all(parameter.requires_grad for parameter in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    assert not any("base_layer.weight" in name for name in names) and len(layers(model)) == 14
    assert not any(t.device.type == "meta" for t in [*model.parameters(), *model.buffers()])
    for layer in layers(model).values():
        rows, cols = layer.stored_shape
        trained = sum(p.numel() for p in layer.parameters())
        assert (
            trained == 8 * (rows + cols) + math.floor(0.1 * rows * cols + 0.5)
            or abs(trained - 8 * (rows + cols) - 0.1 * rows * cols) <= 1
        )


def test_dense_weights_are_never_allocated():
    config = llama_config(hidden_size=256, intermediate_size=512, num_hidden_layers=1, vocab_size=16)
    with LargestTensor() as largest:
        build_for_pretraining(
            config, pretrain_config(r=4, density=0.01, target_modules=["gate_proj", "up_proj", "down_proj"])
        )
    # the largest that is left: q_proj and its like, which are no targets here
    assert largest.nbytes <= 256 * 256 * 4 < 256 * 512 * 4


def test_the_rest_is_initialised_as_transformers_does():
    model = build_for_pretraining(llama_config(hidden_size=128, vocab_size=512), pretrain_config())
    want = AutoModelForCausalLM.from_config(llama_config(hidden_size=128, vocab_size=512))
    inner = model.base_model.model
    assert torch.equal(inner.model.rotary_emb.inv_freq, want.model.rotary_emb.inv_freq)
    assert torch.equal(inner.model.norm.weight, want.model.norm.weight)
    for mine, theirs in ((inner.lm_head, want.lm_head), (inner.model.embed_tokens, want.model.embed_tokens)):
        assert mine.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.05)


def test_first_weight_is_the_sparse_part():
    model = build_for_pretraining(llama_config(hidden_size=256), pretrain_config(density=0.03, init_scale=2.0))
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    weight = layer.get_delta_weight("default")
    assert int((weight != 0).sum()) == layer.deltas["default"].values.numel()
    assert weight.var().item() == pytest.approx(4 * 0.03 / (3 * 256), rel=0.1)
    other = build_for_pretraining(llama_config(hidden_size=256), pretrain_config(density=0.03))
    same = layers(other)["model.layers.0.self_attn.q_proj"].support("default")
    assert torch.equal(layer.support("default").indices, same.indices)


@pytest.mark.parametrize("backend", ["composed", "factored", "auto"])
def test_backends_train_alike(backend):
    losses = []
    for kind in ("composed", backend):
        torch.manual_seed(0)
        model = build_for_pretraining(llama_config(), pretrain_config(backend=kind))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] < 4.2


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_for_pretraining(llama_config(), pretrain_config())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(12)[None]
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*grads, strict=True))


def test_whole_model_is_saved_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = build_for_pretraining(llama_config(tie_word_embeddings=True), pretrain_config())
    ids = torch.arange(10)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    config = SLTrainConfig.from_pretrained(str(tmp_path))
    fresh = build_for_pretraining(llama_config(tie_word_embeddings=True), config)
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(fresh(input_ids=ids).logits, want)
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=True)), str(tmp_path)
    )
    assert torch.equal(loaded(input_ids=ids).logits, want)


def test_merged_model_is_an_ordinary_one(tmp_path):
    torch.manual_seed(0)
    model = build_for_pretraining(llama_config(attention_bias=True), pretrain_config())
    ids = torch.arange(10)[None]
    model.eval()
    want = model(input_ids=ids).logits
    model.merge_adapter()
    assert torch.allclose(model(input_ids=ids).logits, want, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=ids).logits, want)
    dense = model.merge_and_unload()
    assert type(dense.model.layers[0].self_attn.q_proj) is nn.Linear
    assert not any("sltrain" in key for key in dense.state_dict())
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, want, atol=1e-5)


def test_casting_reaches_the_merged_weight():
    model = build_for_pretraining(llama_config(), pretrain_config()).to(torch.bfloat16)
    ids = torch.arange(6)[None]
    assert model(input_ids=ids).logits.dtype == torch.bfloat16
    assert model.merge_and_unload().model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_what_cannot_be_done_says_why():
    model = build_for_pretraining(llama_config(), pretrain_config())
    with pytest.raises(RuntimeError, match=r"cannot be disabled.*no weight besides it"), model.disable_adapter():
        pass
    with pytest.raises(RuntimeError, match=r"unload\(\).*merge_and_unload"):
        model.base_model.unload()
    with pytest.raises(ValueError, match="one adapter and no other"):
        model.add_adapter("other", pretrain_config())
    with pytest.raises(ValueError, match="r=None with mode='pretrain'"):
        SLTrainConfig(mode="pretrain")
    with pytest.raises(ValueError, match="selection='nonzero': the low-rank part changes every entry, zeros too"):
        SLTrainConfig(selection="nonzero")
    with pytest.raises(ValueError, match="reselect_every=5 with selection='principal': positions are not chosen anew"):
        SLTrainConfig(selection="principal", reselect_every=5)
    with pytest.raises(ValueError, match="selection='magnitude' with mode='pretrain'"):
        pretrain_config(selection="magnitude")
    with pytest.raises(TypeError, match=r"first of type Conv1D.*plain"):
        get_peft_model(TwoLayers(conv1d=True), pretrain_config(target_modules=NAMES))
    with pytest.raises(ValueError, match="mode='finetune': build_for_pretraining"):
        build_for_pretraining(llama_config(), SLTrainConfig())


def test_positions_may_change_while_pretraining():
    torch.manual_seed(0)
    config = pretrain_config(selection="rigl", reselect_every=2)
    model = build_for_pretraining(llama_config(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = SparsityController(model, optimizer, total_steps=8)
    ids = torch.arange(12)[None]
    for _ in range(8):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert sum(record.replaced for record in controller.history) > 0


@pytest.mark.parametrize(
    "name, hidden, ffn, depth, rank, density, heads, millions",
    [
        ("60M", 512, 1376, 8, 128, 0.03, 8, 43.5),
        ("130M", 768, 2048, 12, 256, 0.03, 12, 96.5),
        ("350M", 1024, 2736, 24, 256, 0.03, 16, 194.3),
        ("1B", 2048, 5461, 24, 512, 0.03, 32, 645.5),
    ],
)
def test_parameter_counts_of_the_papers_models(name, hidden, ffn, depth, rank, density, heads, millions):
    """SLTrain, table 2: what the configs give, counted without allocating anything."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=depth,
        num_attention_heads=heads, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        rest = sum(p.numel() for n, p in base.named_parameters() if "_proj" not in n)
        shapes = [tuple(p.shape) for n, p in base.named_parameters() if "_proj" in n]
    entries = sum(math.floor(density * m * n) for m, n in shapes)
    total = rest + sum(rank * (m + n) for m, n in shapes) + entries
    assert total / 1e6 == pytest.approx(millions, abs=0.06)
    if name == "60M":  # and what is built has as many, up to the rounding of each layer's budget
        model = build_for_pretraining(config, pretrain_config(r=rank, density=density))
        assert abs(sum(p.numel() for p in model.parameters()) - total) <= len(shapes)

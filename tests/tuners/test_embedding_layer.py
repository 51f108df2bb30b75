"""Embeddings with trained entries: gradients by id, residency, and the contract of adapters."""

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from benchmarks.measure import LargestTensor
from sparse_peft import (
    S2FTConfig,
    SaRAConfig,
    SketchConfig,
    SLTrainConfig,
    SnellaConfig,
    SoRAConfig,
    SparseConfig,
    panel_limit,
    select_support,
)
from sparse_peft.tuners.sparse.layer import SparseEmbedding
from tests.helpers.embedding_models import (
    COLS,
    IDS,
    ROWS,
    Words,
    adapted,
    backward,
    hooked,
    layers,
    scaled,
    wanted_gradients,
    with_deltas,
)
from tests.helpers.language_models import llama
from tests.helpers.memory import saved_bytes

# What may be different about the base, and the path that its forward takes.
BASES = {
    "resident": ({}, {}, "resident"),
    "not resident": ({}, {"resident": False}, "overlay"),
    "padding": ({"padding_idx": 2}, {}, "resident"),
    "padding, not resident": ({"padding_idx": 2}, {"resident": False}, "overlay"),
    "by frequency": ({"scale_grad_by_freq": True}, {}, "resident"),
    "sparse": ({"sparse": True}, {}, "resident"),
}


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize(
    "ids", [IDS, IDS.view(-1), IDS[:, 1:2].to(torch.int32), IDS[:0]], ids=lambda ids: str(tuple(ids.shape))
)
def test_gradients_are_autograds_at_the_support(case, ids):
    settings, config, path = BASES[case]
    model, reference = adapted(Words(**settings).double(), **config)
    layer = layers(model)["emb"]
    assert isinstance(layer, SparseEmbedding) and layer.path(ids) == path
    dense = with_deltas(reference, model)
    dense.emb.sparse = False  # the same gradient, as a dense tensor
    torch.testing.assert_close(backward(model, ids), backward(dense, ids))
    gradient = layer.deltas["default"].values.grad
    torch.testing.assert_close(gradient, wanted_gradients(dense, model)["emb"], rtol=1e-12, atol=1e-12)
    used = torch.isin(layer.support("default").rows, ids)
    used &= layer.support("default").rows != settings.get("padding_idx", -1)
    assert torch.equal(gradient != 0, used)


@pytest.mark.parametrize("change", [hooked, scaled])
@pytest.mark.parametrize("names", [["emb"], ["emb", "head"]])
def test_a_base_with_hooks_or_a_forward_of_its_own(change, names):
    model, reference = adapted(change(Words()).double(), names)
    layer = layers(model)["emb"]
    assert layer.path(IDS) == "additive"
    dense = with_deltas(reference, model)
    torch.testing.assert_close(backward(model, IDS), backward(dense, IDS))
    for name, wanted in wanted_gradients(dense, model).items():
        torch.testing.assert_close(layers(model)[name].deltas["default"].values.grad, wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), dense(IDS))


def test_a_base_without_torchs_embedding_function_is_refused():
    class Gathered(nn.Embedding):
        def forward(self, ids):
            return self.weight[ids]

    model, _ = adapted(nn.Sequential(Gathered(ROWS, COLS)), ["0"])
    with pytest.raises(RuntimeError, match=r"layer 0: Gathered computes without torch's embedding function"):
        model(IDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_way_gives_the_rows_of_the_merged_weight(dtype):
    ways = {}
    for way, change, config in (
        ("resident", lambda m: m, {}),
        ("overlay", lambda m: m, {"resident": False}),
        ("hooked", hooked, {}),
    ):
        model, reference = adapted(change(Words().to(dtype)), **config)
        embedding = model.base_model.model.emb
        ways[way] = embedding(IDS)
        assert torch.equal(model.eval().base_model.model.emb(IDS), ways[way])
        merged = with_deltas(reference, model).emb(IDS)
        assert ways[way].dtype == dtype and torch.equal(ways[way], merged), way
        model.merge_adapter()
        assert torch.equal(embedding(IDS), merged)
        model.unmerge_adapter()
        model.base_model.release()
        assert torch.equal(embedding.base_layer.weight, reference.emb.weight)


def test_no_tensor_of_the_weights_size_and_only_the_ids_are_kept():
    base = nn.Embedding(4000, 32)
    model, _ = adapted(nn.Sequential(base), ["0"], density=0.01)
    ids = torch.randint(0, 4000, (2, 8))
    kept, out = saved_bytes(model, ids)
    assert kept == 0  # besides the ids
    with LargestTensor() as largest:
        out.square().sum().backward()
    assert largest.nbytes < base.weight.nbytes / 20


def test_small_panels_change_nothing():
    results = []
    for limit in (2**26, 64):
        model, _ = adapted(Words().double())
        with panel_limit(limit):
            backward(model, IDS)
        results.append(layers(model)["emb"].deltas["default"].values.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- the contract


def two_adapters(dtype=torch.bfloat16, **config):
    model, reference = adapted(Words().to(dtype), ["emb", "head"], **config)
    other = SparseConfig(target_modules=["emb"], density=0.2, init_weights=False, scale=1.0, seed=3)
    model.add_adapter("other", other)
    return model.eval(), reference


@pytest.mark.parametrize("resident", [True, False])
def test_switching_adding_and_disabling(resident):
    model, reference = two_adapters(resident=resident)
    for names in (["default"], ["other"], ["default", "other"], ["default"]):
        model.base_model.set_adapter(names)
        assert torch.equal(model(IDS), with_deltas(reference, model, names)(IDS))
    with model.disable_adapter():
        assert torch.equal(model(IDS), reference(IDS))
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(model(IDS), with_deltas(reference, model, ["other"])(IDS))
    assert torch.equal(model.unload().emb.weight, reference.emb.weight)


@pytest.mark.parametrize("change", [lambda m: m, hooked, scaled])
@pytest.mark.parametrize("ids", [IDS, IDS[:, 0]])
def test_mixed_batches_give_each_input_its_adapters_rows(change, ids):
    model, _ = adapted(change(Words().to(torch.bfloat16)))
    other = SparseConfig(target_modules=["emb"], density=0.2, init_weights=False, scale=1.0, seed=3)
    model.add_adapter("other", other)
    model.eval()
    with torch.no_grad():
        mixed = model(ids, adapter_names=["other", "__base__", "default"])
        model.set_adapter("other")
        assert torch.equal(mixed[0], model(ids)[0])
        model.set_adapter("default")
        assert torch.equal(mixed[2], model(ids)[2])
        with model.disable_adapter():
            assert torch.equal(mixed[1], model(ids)[1])


def test_a_merged_layer_copies_and_moves():
    model, reference = adapted(Words())
    merged = with_deltas(reference, model)
    model.merge_adapter()
    twin = copy.deepcopy(model).double()
    torch.testing.assert_close(twin(IDS).float(), merged(IDS), rtol=1e-6, atol=1e-6)
    twin.unmerge_adapter()
    assert torch.equal(twin.unload().emb.weight, reference.emb.weight.double())
    model.unmerge_adapter()
    assert torch.equal(model.merge_and_unload().emb.weight, merged.emb.weight)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["embed_tokens", "q_proj", "lm_head"], r".*(embed_tokens|lm_head)"]
)
def test_saving_and_loading(tmp_path, low_cpu_mem_usage, targets):
    config = SparseConfig(target_modules=targets, density=0.1, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not [name for name in tensors if name.endswith("weight")]  # PEFT would save whole embeddings
    entries = sum(layer.support("default").nnz for layer in layers(model).values())
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 7 * entries  # of small layers
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again.eval()(IDS).logits, expected)
    plain = llama().eval()
    plain.load_adapter(tmp_path)
    assert torch.equal(plain(IDS).logits, expected)


def test_checkpoints_of_torch_continue():
    model, _ = adapted(Words())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other, _ = adapted(Words(), seed=5)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(IDS), model(IDS))


def test_compiled_and_transformed_passes():
    model, reference = adapted(Words().double())
    layer, dense = layers(model)["emb"], with_deltas(reference, model)
    wanted = backward(dense, IDS)
    gradient = wanted_gradients(dense, model)["emb"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # with the base's own weight, and with one that holds the entries
        layer.deltas["default"].values.grad = None
        torch.testing.assert_close(backward(compiled, IDS), wanted)
        torch.testing.assert_close(layer.deltas["default"].values.grad, gradient)
        model.eval()(IDS)
    name, values = next((n, p.detach()) for n, p in model.named_parameters() if p.requires_grad)

    def loss(values):
        return torch.func.functional_call(model, {name: values}, (IDS,)).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(values), gradient)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        config = SparseConfig(target_modules=["embed_tokens", "up_proj"], density=0.1, init_weights=False)
        model = get_peft_model(llama(), config).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([layer.deltas["default"].values.grad for layer in layers(model).values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------- what trains


@pytest.mark.parametrize("selection", ["fisher", "gradient", "gallop"])
def test_positions_from_data_are_those_of_the_dense_gradient(selection):
    base = Words(padding_idx=2)
    dense = copy.deepcopy(base)
    backward(dense, IDS)
    config = SparseConfig(target_modules=["emb"], selection=selection, num_params=9)
    by_data = select_support(base, config, [IDS], loss_fn=lambda model, ids: model(ids).square().sum())
    by_gradient = select_support(base, config, gradients={"emb": dense.emb.weight.grad})
    assert torch.equal(by_data.supports["emb"].indices, by_gradient.supports["emb"].indices)
    assert not torch.isin(by_data.supports["emb"].rows, torch.tensor([2, 7])).any()


def test_an_ids_input_norm_is_the_root_of_its_occurrences():
    base = Words(padding_idx=2)
    config = SparseConfig(target_modules=["emb"], selection="wanda", num_params=9)
    chosen = select_support(base, config, [IDS], loss_fn=lambda model, ids: model(ids)).supports["emb"]
    counts = torch.bincount(IDS.view(-1), minlength=ROWS).double()
    counts[2] = 0
    scores = base.emb.weight.detach().double().abs() * counts.sqrt()[:, None]
    assert torch.equal(chosen.indices.long(), scores.view(-1).topk(9).indices.sort().values)


@pytest.mark.parametrize("granularity", ["entry", "block"])
@pytest.mark.parametrize("selection", ["random", "magnitude", "magnitude_smallest", "principal", "residual"])
def test_positions_from_the_weight_are_those_of_a_linear_layer(selection, granularity):
    if granularity == "block" and selection == "principal":
        pytest.skip("has no blocks")
    base = Words()
    linear = nn.ModuleDict({"emb": nn.Linear(COLS, ROWS, bias=False)})
    linear["emb"].weight = nn.Parameter(base.emb.weight.detach().clone())
    settings = {
        "selection": selection,
        "granularity": granularity,
        "block_size": 1,
        "density": 0.2,
        "principal_rank": 2,
    }
    found = [layers(adapted(model, **settings)[0])["emb"].support("default") for model in (base, linear)]
    assert torch.equal(found[0].indices, found[1].indices)


def test_the_smallest_weights_of_sara():
    base = Words()
    smallest = base.emb.weight.detach().abs().view(-1).topk(8, largest=False).indices.sort().values
    model = get_peft_model(base, SaRAConfig(target_modules=["emb"], num_params=8))
    assert torch.equal(layers(model)["emb"].support("default").indices.long(), smallest)
    backward(model, IDS)
    assert type(layers(model)["emb"]).__name__ == "SaRAEmbedding"


# ---------------------------------------------------------------------- refusals


def test_other_methods_refuse_embeddings():
    for config in (
        S2FTConfig(ratio=0.5),
        SnellaConfig(r=2),
        SketchConfig(),
        SLTrainConfig(r=2),
        SoRAConfig(r=2),
    ):
        config.target_modules = ["emb"]
        message = r"Target module emb of type Embedding is not supported.*exclude_modules.*SparseConfig and SaRAConfig"
        with pytest.raises(TypeError, match=message):
            get_peft_model(Words(), config)


def test_embeddings_that_change_their_weight_or_are_quantised_are_refused():
    with pytest.raises(ValueError, match=r"Target module emb has max_norm=1\.0.*exclude_modules"):
        adapted(Words(max_norm=1.0))
    quantised = Words()
    quantised.emb.weight = nn.Parameter(torch.zeros(ROWS, COLS, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"Target module emb of type .*Embedding is a quantised embedding \(Parameter, torch\.int8\)"
    ):
        adapted(quantised)


@pytest.mark.parametrize(
    "field",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [1]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
    ],
)
def test_an_embedding_that_trains_in_two_ways_is_refused(field):
    name = next(iter(field))
    model = llama()
    with pytest.raises(
        ValueError, match=rf"{name}.* names model\.embed_tokens, and target_modules model\.embed_tokens"
    ):
        get_peft_model(model, SparseConfig(target_modules=["embed_tokens"], density=0.1, **field))
    assert type(model.model.embed_tokens) is nn.Embedding


def test_all_linear_leaves_embeddings_and_the_head_out():
    config = SparseConfig(target_modules="all-linear", density=0.1)
    assert not [name for name in layers(get_peft_model(llama(), config)) if "embed" in name or "head" in name]


# ---------------------------------------------------------------------- new tokens


def test_a_few_new_tokens_are_a_file_of_kilobytes(tmp_path):
    """PEFT's ``trainable_token_indices`` trains their rows beside any adapter of this package."""
    base = llama(tie_word_embeddings=True)
    base.resize_token_embeddings(40, mean_resizing=False)
    start = copy.deepcopy(base)
    new = list(range(32, 40))
    config = SparseConfig(
        target_modules=["q_proj"], num_params=100, trainable_token_indices=new, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    ids = torch.tensor([[1, 33, 34, 5]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) < 8 * 32 * 4 + 100 * 10 + 600
    other = copy.deepcopy(start)
    with torch.no_grad():
        other.model.embed_tokens.weight[32:] = 7.0  # rows that another resize drew
    again = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(again(ids).logits, expected)
    merged = again.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight[:32], start.model.embed_tokens.weight[:32])
    assert merged.lm_head.weight is merged.model.embed_tokens.weight

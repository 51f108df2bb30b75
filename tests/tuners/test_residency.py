"""The base weight holds the adapter's entries between passes, and is its own again whenever somebody looks."""

import copy
import io
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import sparse_peft
from sparse_peft.ops import triton_kernels
from sparse_peft.tuners import delta_layer, ledger, residency
from tests.helpers.two_layers import (
    TwoLayers,
    adapted,
    assert_base_untouched,
    effective_weights,
    layers_of,
    oracle_output,
)


def values_of(model):
    return [p for n, p in model.named_parameters() if n.endswith("values")]


def holding(model):
    return [not layer.ledger.is_own for layer in layers_of(model).values()]


def run(model, n=4):
    y = model(torch.randn(n, 17))
    assert all(holding(model))
    return y


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def pair(request):
    return adapted(TwoLayers().to(request.param))


def as_base(model):
    return model.base_model.model.first.base_layer.weight.dtype


@pytest.mark.parametrize(
    "leave", ["disable", "set_adapter", "state_dict", "delete", "unload", "save", "to", "context"]
)
def test_everything_that_leaves_the_adapter_gives_the_base_back(pair, leave, tmp_path):
    model, reference = pair
    config = sparse_peft.SparseConfig(density=0.3, seed=9, target_modules=["first", "second"])
    model.add_adapter("other", config)
    model(torch.randn(3, 17).to(as_base(model))).sum().backward()
    assert all(holding(model))
    if leave == "disable":
        with model.disable_adapter():
            assert_base_untouched(model, reference)
    elif leave == "set_adapter":
        model.set_adapter("other")
    elif leave == "state_dict":
        state = model.state_dict()
        assert torch.equal(state["base_model.model.first.base_layer.weight"], reference.first.weight)
    elif leave == "delete":
        model.delete_adapter("default")
    elif leave == "unload":
        base = model.unload()
        for (name, a), b in zip(base.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(a, b), name
        return
    elif leave == "save":
        model.save_pretrained(tmp_path)
    elif leave == "to":
        model.to("cpu", torch.float64)
        reference.to(torch.float64)
    else:
        with sparse_peft.base_weights(model):
            assert_base_untouched(model, reference)
    assert_base_untouched(model, reference)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_after_an_optimizer_step_the_base_is_its_own_and_the_next_pass_is_current(optimizer):
    model, reference = adapted()
    step = optimizer(values_of(model), lr=0.1)
    x = torch.randn(4, 17)
    for _ in range(3):
        model(x).pow(2).sum().backward()
        step.step()
        step.zero_grad()
        assert_base_untouched(model, reference)
        expected = oracle_output(reference, effective_weights(model, reference), x.double())
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["copy_", "data_copy_", "data_assign", "parameter", "load_state_dict"])
def test_values_changed_by_hand_are_seen(how):
    model, reference = adapted()
    x = torch.randn(4, 17)
    run(model)
    layer = layers_of(model)["first"]
    delta = layer.deltas["default"]
    new = torch.randn_like(delta.values)
    if how == "data_copy_":  # leaves no trace in torch, so it is looked for after every backward pass only
        model(x).sum().backward()
        delta.values.data.copy_(new)
    with torch.no_grad():
        if how == "copy_":
            delta.values.copy_(new)
        elif how == "data_assign":
            delta.values.data = new
        elif how == "parameter":
            delta.values = torch.nn.Parameter(new)
        elif how == "load_state_dict":
            delta.load_state_dict({**delta.state_dict(), "values": new})
    expected = oracle_output(reference, effective_weights(model, reference), x.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_loading_other_positions_while_resident_restores_the_old_ones_first():
    model, reference = adapted()
    other, _ = adapted(seed=77)
    run(model)
    state = {k: v for k, v in other.state_dict().items() if "sparse_peft_delta" in k}
    model.load_state_dict(state, strict=False)
    x = torch.randn(4, 17)
    expected = oracle_output(reference, effective_weights(model, reference), x.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    with sparse_peft.base_weights(model):
        assert_base_untouched(model, reference)


def test_a_thousand_merges_in_bfloat16_are_bit_exact():
    model, reference = adapted(TwoLayers().to(torch.bfloat16))
    x = torch.randn(2, 17, dtype=torch.bfloat16)
    with torch.no_grad():
        merged = model(x)
        for i in range(1000):
            model.merge_adapter()
            if i % 100 == 0:
                assert torch.equal(model(x), merged)
            model.unmerge_adapter()
    assert_base_untouched(model, reference)


def test_merge_and_resident_forward_give_the_same_bits(pair):
    model, _reference = pair
    x = torch.randn(3, 17).to(as_base(model))
    with torch.no_grad():
        resident = model(x)
        assert torch.equal(model.merge_and_unload()(x), resident)


def test_disabling_between_forward_and_backward_as_preference_tuning_does():
    model, reference = adapted()
    x = torch.randn(4, 17, requires_grad=True)
    policy = model(x)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), reference(x))
    policy.pow(2).sum().backward()
    got = [x.grad.clone(), *(p.grad.clone() for p in values_of(model))]
    x.grad = None
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for a, b in zip(got, [x.grad, *(p.grad for p in values_of(model))], strict=True):
        assert torch.equal(a, b)


def test_base_pass_with_gradients_survives_the_adapter_acting_before_its_backward():
    model, reference = adapted()
    x = torch.randn(4, 17, requires_grad=True)
    with model.disable_adapter():
        y = model(x)
    model(torch.randn(2, 17))  # the weight holds the adapter's entries now
    y.sum().backward()
    xr = x.detach().clone().requires_grad_()
    reference(xr).sum().backward()
    torch.testing.assert_close(x.grad, xr.grad)


def test_switching_adapters_between_forward_and_backward():
    model, _ = adapted()
    model.add_adapter(
        "other", sparse_peft.SparseConfig(density=0.3, seed=4, target_modules=["first", "second"], init_weights=False)
    )
    x = torch.randn(4, 17, requires_grad=True)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    y = model(x)
    model.set_adapter("other")
    model(torch.randn(2, 17))
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_values_changed_between_forward_and_backward():
    model, _ = adapted()
    x = torch.randn(4, 17, requires_grad=True)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    y = model(x)
    with torch.no_grad():
        values_of(model)[0].add_(1)
    y.sum().backward()  # the base still holds what the forward pass saw
    assert torch.equal(x.grad, expected)

    y = model(x)
    with torch.no_grad():
        values_of(model)[0].add_(1)
    model.base_model.release()  # now nothing does
    with pytest.raises(RuntimeError, match="adapter default in layer first were changed between the forward"):
        y.sum().backward()


def test_an_exception_in_the_model_leaves_the_base_its_own():
    class Fails(TwoLayers):
        def forward(self, x):
            super().forward(x)
            raise ZeroDivisionError("in the model")

    model, reference = adapted(Fails())
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(3, 17))
    assert_base_untouched(model, reference)


def test_writing_to_a_base_that_holds_entries_is_noticed():
    model, _ = adapted()
    run(model)
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"base weight of layer first was changed.*base_weights"):
        model.state_dict()


def test_base_changed_inside_base_weights_is_taken_as_the_base():
    model, reference = adapted()
    run(model)
    with sparse_peft.base_weights(model), torch.no_grad():
        model.base_model.model.first.base_layer.weight.data.mul_(2)
        reference.first.weight.mul_(2)
    x = torch.randn(3, 17)
    expected = oracle_output(reference, effective_weights(model, reference), x.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_resident_model_are_independent(copier):
    model, reference = adapted()
    x = torch.randn(3, 17)
    y = model(x)
    twin = copier(model)
    assert_base_untouched(twin, reference)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        for p in values_of(twin):
            p.zero_()
    assert torch.equal(twin(x), reference(x))
    assert torch.equal(model(x), y)
    twin.delete_adapter("default")
    assert_base_untouched(twin, reference)


def test_whole_model_file_holds_the_base_weights():
    model, reference = adapted()
    run(model)
    buffer = io.BytesIO()
    torch.save(model.base_model.model.state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()))
    assert torch.equal(state["first.base_layer.weight"], reference.first.weight)


def test_gradient_accumulation_writes_nothing_the_optimizer_did_not_change():
    model, _ = adapted()
    run(model).sum().backward()
    before = [layer.base_layer.weight.clone() for layer in layers_of(model).values()]
    run(model).sum().backward()
    for layer, weight in zip(layers_of(model).values(), before, strict=True):
        assert torch.equal(layer.base_layer.weight, weight)


def test_merging_one_after_the_other_equals_merging_both(pair):
    model, reference = pair
    model.add_adapter(
        "other", sparse_peft.SparseConfig(density=0.5, seed=4, target_modules=["first", "second"], init_weights=False)
    )
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    one_by_one = [layer.base_layer.weight.clone() for layer in layers_of(model).values()]
    model.unmerge_adapter()
    assert_base_untouched(model, reference)
    model.merge_adapter(["default", "other"])
    for layer, weight in zip(layers_of(model).values(), one_by_one, strict=True):
        assert torch.equal(layer.base_layer.weight, weight)
    with model.disable_adapter():
        assert torch.equal(
            model(torch.ones(2, 17).to(as_base(model))), reference(torch.ones(2, 17).to(as_base(model)))
        )
    assert_base_untouched(model, reference)


def test_a_merged_model_may_be_cast_and_unmerged():
    model, reference = adapted()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert_base_untouched(model, reference.to(torch.bfloat16))


def test_safe_merge_touches_nothing_when_it_fails():
    model, reference = adapted()
    with torch.no_grad():
        layers_of(model)["second"].deltas["default"].values[0] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be"):
            model.merge_and_unload(safe_merge=True)
        second = layers_of(model)["second"]
        assert not second.merged and torch.equal(second.base_layer.weight, reference.second.weight)


def test_a_switch_may_be_made_before_the_next_pass(monkeypatch):
    model, reference = adapted()
    config = sparse_peft.SparseConfig(density=0.3, target_modules=["first"], seed=2, init_weights=False)
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.base_model.make_resident()
    assert holding(model) == [True, False]
    x = torch.randn(3, 17)
    weights = {"second": reference.second.weight.double()} | effective_weights(model, reference, ("other",))
    with torch.no_grad():
        for layer in layers_of(model).values():
            monkeypatch.setattr(layer, "hold", None)
        torch.testing.assert_close(
            model(x).double(), oracle_output(reference, weights, x.double()), rtol=1e-4, atol=1e-4
        )
    with model.disable_adapter():
        model.base_model.make_resident()
        assert_base_untouched(model, reference)


def test_a_training_step_writes_all_layers_in_one_transition_and_a_settled_model_in_none(monkeypatch):
    model, _ = adapted()
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    written = []
    write_all = ledger.write_all
    for module in (residency, delta_layer):
        monkeypatch.setattr(module, "write_all", lambda writes: (written.append(len(writes)), write_all(writes)))
    for _ in range(2):
        run(model).sum().backward()
        optimizer.step()
    assert written == [2, 2]
    with torch.no_grad():
        for _ in range(3):
            run(model)
    assert written == [2, 2, 1, 1]  # without gradients each layer sees for itself that it has something to write


def test_optimizers_of_other_models_leave_the_entries_where_they_are():
    model, reference = adapted()
    y = run(model)
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert all(holding(model))
    y.sum().backward()
    torch.optim.SGD(values_of(model), lr=0.0).step()
    assert not any(holding(model))
    assert_base_untouched(model, reference)


def test_reloaded_adapter_gives_the_same_bits(pair, tmp_path):
    model, reference = pair
    model.eval()
    x = torch.randn(3, 17).to(as_base(model))
    with torch.no_grad():
        y = model(x)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(reference, tmp_path)
        assert torch.equal(again(x), y)


def interpreted():
    return triton_kernels.usable(torch.device("cpu"))


@pytest.mark.skipif(not interpreted(), reason="needs Triton and TRITON_INTERPRET=1")
def test_kernels_write_all_layers_in_one_launch_and_give_them_back_in_one(monkeypatch):
    launches = []
    kernels = triton_kernels.kernels("entries")
    write = kernels.write_many_

    def counted(table, *arguments):
        launches.append((table.shape[1], arguments[-1]))
        return write(table, *arguments)

    monkeypatch.setattr(kernels, "write_many_", counted)
    entering, leaving = [(2, "take"), (2, "resync")], [(2, "restore")]
    model, reference = adapted()
    x = torch.randn(3, 17)
    expected = model(x)
    assert_base_untouched_after_release(model, reference)
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    with sparse_peft.use_backend("triton"):
        output = model(x)
        assert launches == entering and all(holding(model))
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        optimizer.step()
        assert launches == entering + leaving and not any(holding(model))
        assert_base_untouched(model, reference)
        again = model(x)
        assert launches == entering + leaving + entering
    oracle = oracle_output(reference, effective_weights(model, reference), x.double())
    torch.testing.assert_close(again.double(), oracle, rtol=1e-5, atol=1e-5)


def assert_base_untouched_after_release(model, reference):
    with sparse_peft.base_weights(model):
        assert_base_untouched(model, reference)


# ------------------------------------------------------------------------------------------- held in products only

IN_PRODUCTS = {
    "sparse": lambda **k: sparse_peft.SparseConfig(density=0.2, **k),
    "sara": lambda **k: sparse_peft.SaRAConfig(density=0.2, nuclear_weight=0.0, progressive=None, **k),
    "s2ft": lambda **k: sparse_peft.S2FTConfig(r=2, **k),
    "sltrain": lambda **k: sparse_peft.SLTrainConfig(mode="finetune", r=2, density=0.2, **k),
}


class Checkpointed(TwoLayers):
    """Runs its layers twice."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


def trained_steps(config, base, x):
    """Outputs, gradients and values of three steps, and the model."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["first", "second"], init_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=0.05), []
    for _ in range(3):
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.float().square().sum().backward()
        found += [y.detach(), inputs.grad, *(p.grad.clone() for p in trained)]
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *(p.detach().clone() for p in trained)], model


@pytest.mark.parametrize("method", IN_PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("block", [TwoLayers, Checkpointed])
def test_entries_held_in_products_train_to_the_same_bits(method, dtype, block):
    base, x = block().to(dtype), torch.randn(2, 3, 17, dtype=dtype)
    expected, _ = trained_steps(IN_PRODUCTS[method], base, x)
    found, model = trained_steps(lambda **k: IN_PRODUCTS[method](resident="product", **k), base, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_base_untouched(model, base)


def test_entries_held_in_products_keep_no_originals_in_training():
    model, reference = adapted(resident="product")
    kept = []
    for layer in layers_of(model).values():
        layer.register_forward_hook(lambda layer, *_: kept.append(layer.ledger.backup))
    y = model(torch.randn(4, 17))
    assert_base_untouched(model, reference)
    y.square().sum().backward()
    assert_base_untouched(model, reference)
    assert kept == [None, None]


def test_entries_held_in_products_stay_in_evaluation_until_training_goes_on():
    model, reference = adapted(resident="product")
    x = torch.randn(4, 17)
    with torch.no_grad():
        y = model.eval()(x)
    assert all(holding(model))
    assert torch.equal(model(x), y)  # with gradients, too
    assert torch.equal(model.train()(x), y)
    assert_base_untouched(model, reference)


def test_a_failed_product_leaves_no_entries(monkeypatch):
    model, reference = adapted(resident="product")

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch.nn.functional, "linear", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model(torch.randn(4, 17))
    assert_base_untouched(model, reference)


def test_copies_are_multiplied_where_products_may_not_write():
    model, reference = adapted(resident="product")
    x = torch.randn(4, 17)
    expected = model(x)
    with sparse_peft.base_weights(model):
        y = model(x)
        assert_base_untouched(model, reference)
        y.sum().backward()
    torch.testing.assert_close(y, expected)


def test_other_residencies_are_refused():
    with pytest.raises(ValueError, match="resident='products'"):
        sparse_peft.SparseConfig(resident="products")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_held_in_products_too(tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **sizes))
    ids, values = torch.arange(16).view(2, 8), []
    for resident in (True, "product"):
        torch.manual_seed(0)
        names = ["embed_tokens", "q_proj"]
        config = sparse_peft.SparseConfig(density=0.2, target_modules=names, resident=resident, init_weights=False)
        model = get_peft_model(copy.deepcopy(base), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.05)
        for _ in range(2):
            loss = model.train()(input_ids=ids, labels=ids).loss
            held = [layer.ledger.backup is not None for layer in layers_of(model).values()]
            assert held == [resident is True] * len(held)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        values.append([p.detach() for p in trained])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))

"""Learnt mixtures, against Adam on the weights of dense float64 deltas."""

import copy
from itertools import cycle, islice

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model

from sparse_peft import SLTrainConfig, SoRAConfig, SparseConfig
from sparse_peft.adapters import compose, learn_mixture
from tests.helpers.two_layers import TwoLayers

NAMES = ("a", "b", "c")
METHODS = {
    "sparse": lambda seed: SparseConfig(density=0.3, seed=seed, scale=1.0),
    "sora": lambda seed: SoRAConfig(r=2),
    "sltrain": lambda seed: SLTrainConfig(r=2, density=0.2, seed=seed),
}


def base():
    torch.manual_seed(0)
    return TwoLayers(7, 9, 4)


def adapted(method="sparse", dtype=torch.float64):
    model = None
    for seed, name in enumerate(NAMES):
        config = METHODS[method](seed)
        config.target_modules, config.init_weights = ["first", "second"], False
        torch.manual_seed(seed)
        if model is None:
            model = get_peft_model(base().to(dtype), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.to(dtype)


def loss(model, batch):
    return F.cross_entropy(model(batch[0].to(next(model.parameters()).dtype)), batch[1])


def data(count=2):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(6, 7, generator=generator), torch.randint(0, 4, (6,), generator=generator)) for _ in range(count)
    ]


def mixed(deltas, weights, number):
    return sum(weight * deltas[name][number] for name, weight in zip(NAMES, weights, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_dense_deltas(method):
    model = adapted(method).eval()
    plain = base().double()
    deltas = {
        name: [layer.get_delta_weight(name).double().detach() for layer in layers(model)] for name in NAMES
    }  # fmt: skip
    weights = torch.full((3,), 1 / 3, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    losses = []
    for x, y in islice(cycle(data()), 6):
        first, second = (
            getattr(plain, part).weight.detach()
            + sum(w * deltas[name][n] for w, name in zip(weights, NAMES, strict=True))
            for n, part in enumerate(("first", "second"))
        )
        found = F.cross_entropy(F.linear(F.linear(x.double(), first, plain.first.bias).relu(), second), y)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))
    before = copy.deepcopy(model.state_dict())
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        output = model(data()[0][0].double())
    mixture = learn_mixture(model, data(), steps=6, rate=0.1, loss_fn=loss)
    assert list(mixture.weights.values()) == pytest.approx(weights.tolist(), rel=1e-4)
    assert mixture.losses == pytest.approx(losses, rel=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert trains == [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        assert torch.equal(model(data()[0][0].double()), output)


def layers(model):
    return [getattr(model.base_model.model, name) for name in ("first", "second")]


def test_the_mixture_is_exported_as_one_sparse_adapter(tmp_path):
    model = adapted(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    mixture = learn_mixture(model, data(), steps=4, loss_fn=loss, adapters=["a", "c"])
    config = compose([tmp_path / "a", tmp_path / "c"], tmp_path / "mix", weights=list(mixture.weights.values()))
    assert type(config) is SparseConfig
    mixed = PeftModel.from_pretrained(base(), tmp_path / "mix").eval()
    expected = base()
    for n, name in enumerate(("first", "second")):
        for adapter, weight in mixture.weights.items():
            getattr(expected, name).weight.data += weight * layers(model)[n].get_delta_weight(adapter)
    x = data()[0][0]
    torch.testing.assert_close(mixed(x), expected(x))


def test_what_does_not_fit_is_refused_and_errors_leave_the_model_as_it_was():
    model = adapted()
    for given, message in (
        ({"adapters": ["a"]}, "at least two"),
        ({"adapters": ["a", "d"]}, r"\['a', 'd'\]"),
        ({"batches": []}, "batches has none"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(ValueError, match=message):
            learn_mixture(model, **{"batches": data(), **given})

    def fails(model, batch):
        loss(model, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_mixture(model, data(), loss_fn=fails)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    lora = get_peft_model(base(), LoraConfig(target_modules=["first"]))
    lora.add_adapter("other", LoraConfig(target_modules=["first"]))
    with pytest.raises(TypeError, match=r"'default' is of another package.*convert"):
        learn_mixture(lora, data(), loss_fn=loss)

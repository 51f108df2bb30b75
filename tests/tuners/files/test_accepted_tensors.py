"""A file's tensors are those that saving the adapter writes; every other is refused by name, by all methods."""

import copy
import json
import shutil
from itertools import cycle

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sparse_peft.adapters import load_adapter
from tests.helpers.language_models import llama
from tests.helpers.methods import METHODS
from tests.helpers.versions import transformers_adapters

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
TARGETS = ["q_proj", "o_proj", "v_proj", "up_proj", "down_proj"]  # with pairs, for methods that choose structures
SEVENS = torch.full((32, 32), 7.0)
RESOLVED = {"num_entries", "num_channels", "sides", "ranks", "weight_shapes"}  # of the config, by layer
TOKENS = torch.tensor([[3, 4, 5]])


def make_config(method, **fields):
    config_cls, options = METHODS[method]
    return config_cls(**{**options, "target_modules": TARGETS, "init_weights": False, **fields})


def saved_to(folder, method, model=None, **fields):
    torch.manual_seed(0)
    get_peft_model(model or llama(), make_config(method, **fields)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``{method: folder}`` of honest adapters."""
    return {method: saved_to(tmp_path_factory.mktemp(method), method) for method in METHODS}


@pytest.fixture
def folder_of(tmp_path, saved):
    """``folder_of(method, {tensor name: tensor})``: an honest adapter's folder with these tensors added."""

    def make(method, added, **fields):
        folder = shutil.copytree(saved[method], tmp_path / "adapter", dirs_exist_ok=True)
        add(folder, added)
        change(folder, **fields)
        return folder

    return make


def add(folder, tensors):
    found = load_file(folder / WEIGHTS)
    save_file({**found, **tensors}, folder / WEIGHTS, metadata={"format": "pt"})


def change(folder, **fields):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **fields}))


def by_peft(model, folder, name="default"):
    return PeftModel.from_pretrained(model, folder, name)


def beside_another(model, folder, name="default"):
    config = PeftConfig.from_pretrained(folder)
    method = next(method for method, (config_cls, _) in METHODS.items() if type(config) is config_cls)
    model = get_peft_model(model, make_config(method, target_modules=config.target_modules), "other")
    model.load_adapter(folder, name)
    model.set_adapter(name)
    return model


def by_us(model, folder, name="default"):
    load_adapter(model, folder, name)
    return model


def by_transformers(model, folder, name="default"):
    model.load_adapter(str(folder), name)
    return model


LOADERS = {
    "PeftModel.from_pretrained": by_peft,
    "PeftModel.load_adapter": beside_another,
    "sparse_peft.adapters.load_adapter": by_us,
    "model.load_adapter": by_transformers,
}
MARKS = {loader: transformers_adapters for loader in (by_us, by_transformers)}  # ours calls transformers' add_adapter
NAMES = ["model", "layers", "0", "v_proj"]  # of adapters, as of modules
pytestmark = pytest.mark.parametrize(
    "loader", [pytest.param(loader, marks=MARKS.get(loader, ()), id=name) for name, loader in LOADERS.items()]
)


def weights_of(model):
    """``{name in the base: copy}``."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
    }


def assert_refused(loader, folder, *messages, name="default"):
    model = llama()
    before, layers = weights_of(model), {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError) as refusal:
        loader(model, folder, name)
    assert all(message in str(refusal.value) for message in messages), refusal.value
    after = weights_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    if loader is not beside_another:
        assert layers == {name: type(module) for name, module in model.named_modules()}


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_the_base(folder_of, loader, method):
    weights = {"lm_head.weight": SEVENS, "model.embed_tokens.weight": SEVENS, "model.norm.weight": SEVENS[0]}
    for weight, tensor in weights.items():
        folder = folder_of(method, {f"{PREFIX}{weight}": tensor.clone()})
        assert_refused(loader, folder, f"{weight}, a weight of the base model")


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_the_base_below_a_module_that_is_called_as_the_adapter(folder_of, loader, name):
    weight = "model.layers.0.self_attn.v_proj.base_layer.weight"
    folder = folder_of("sparse", {f"{PREFIX}{weight}": SEVENS.clone()})
    assert_refused(loader, folder, f"{weight}, a weight of the base model", name=name)


@pytest.mark.parametrize(("method", "name"), zip(METHODS, cycle(NAMES)))
def test_adapters_that_are_called_as_a_module_load(folder_of, loader, method, name):
    folder = folder_of(method, {})
    with torch.no_grad():
        expected = by_peft(llama(), folder)(TOKENS).logits
        assert_close(loader(llama(), folder, name)(TOKENS).logits, expected)


def test_biases_that_the_config_does_not_name(tmp_path, loader):
    saved_to(tmp_path, "sparse", llama(attention_bias=True))
    weight = "model.layers.0.self_attn.q_proj.base_layer.bias"
    add(tmp_path, {f"{PREFIX}{weight}": SEVENS[0].clone()})
    with pytest.raises(ValueError, match=f"{weight}, a weight of the base model.*bias='none'"):
        loader(llama(attention_bias=True), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_the_config_leaves_out(folder_of, loader, method):
    folder = folder_of(method, {})
    content = json.loads((folder / CONFIG).read_text())
    by_layer = {name: content[name] for name in RESOLVED if content.get(name)}
    kept = {name: {k: v for k, v in found.items() if "o_proj" in k} for name, found in by_layer.items()}
    change(folder, target_modules=["o_proj"], **kept)
    message = (
        r"for a layer that the config leaves out (target_modules={'o_proj'}); load it with the adapter_config.json"
    )
    assert_refused(loader, folder, message)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layer", "tensor", "message"),
    [
        ("model.layers.7.self_attn.q_proj", "{}", "for a layer that this model does not have"),
        ("model.layers.0.self_attn.k_proj", "{}", "for a layer that the config leaves out (target_modules="),
        ("model.layers.0.self_attn.o_proj", "surplus", "an unknown tensor of an adapted layer"),
    ],
    ids=["no such layer", "no target", "no such tensor"],
)
def test_tensors_without_a_place(folder_of, loader, method, layer, tensor, message):
    folder = folder_of(method, {})
    found = load_file(folder / WEIGHTS)
    key = next(key for key in found if "layers.0.self_attn.o_proj" in key)
    container, _, last = key.partition("o_proj.")[2].rpartition(".")
    name = f"{layer}.{container}.{tensor.format(last)}"
    add(folder, {f"{PREFIX}{name}": found[key].clone()})
    assert_refused(loader, folder, name, message)


def test_tensors_that_are_no_adapters(folder_of, loader):
    folder = folder_of("sparse", {"noise": torch.ones(3)})
    assert_refused(loader, folder, "noise, which is no tensor of this adapter")


def test_tensors_that_the_file_lacks(folder_of, loader):
    folder = folder_of("sora", {})
    found = load_file(folder / WEIGHTS)
    del found[f"{PREFIX}model.layers.0.self_attn.o_proj.sparse_peft_sora_adapter.B"]
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    assert_refused(loader, folder, "the adapter file has no B for layer model.layers.0.self_attn.o_proj")


def test_values_that_are_not_finite(folder_of, loader):
    broken = {f"{PREFIX}model.layers.0.self_attn.o_proj.sparse_peft_sora_adapter.B": torch.full((32, 4), torch.inf)}
    assert_refused(loader, folder_of("sora", broken), "model.layers.0.self_attn.o_proj", "NaN or infinite")


# ---------------------------------------------------------------------- accepted


@pytest.mark.parametrize("method", METHODS)
def test_what_the_config_names_comes_in_beside_the_base(tmp_path, loader, method):
    fields = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 4]}}
    model = get_peft_model(llama(), make_config(method, **fields))
    wrapper = model.base_model.model.lm_head
    wrapper.modules_to_save["default"].weight.data.add_(1)
    model.save_pretrained(tmp_path)
    loaded = loader(llama(), tmp_path)
    with torch.no_grad():
        assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    head = next(module for name, module in loaded.named_modules() if name.endswith("lm_head"))
    assert torch.equal(head.original_module.weight, llama().lm_head.weight)


@pytest.mark.parametrize("bias", ["all", "layers"])
@pytest.mark.parametrize("method", METHODS)
def test_biases_that_the_config_names(tmp_path, loader, method, bias):
    config = make_config(method)
    config.bias = bias if bias == "all" else f"{config.method.lower()}_only"
    model = get_peft_model(llama(attention_bias=True), config)
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").get_base_layer().bias.data.add_(1)
    model.save_pretrained(tmp_path)
    loaded = loader(llama(attention_bias=True), tmp_path)
    with torch.no_grad():
        assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


def test_embeddings_that_repeat_the_base(tmp_path, loader):
    """PEFT saves them below an adapted lm_head, or where it is asked to."""
    model = get_peft_model(llama(), make_config("sparse", target_modules=[*TARGETS, "lm_head"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    with torch.no_grad():
        assert torch.equal(loader(llama(), tmp_path)(TOKENS).logits, model(TOKENS).logits)
        narrow = copy.deepcopy(llama()).bfloat16()
        assert torch.equal(weights_of(loader(narrow, tmp_path))["lm_head.weight"], llama().lm_head.weight.bfloat16())
    add(tmp_path, {f"{PREFIX}lm_head.base_layer.weight": SEVENS.clone()})
    assert_refused(loader, tmp_path, "lm_head.base_layer.weight, a weight of the base model")


def test_embeddings_of_a_resized_vocabulary(tmp_path, loader):
    llama().save_pretrained(tmp_path / "base")

    def resized():
        torch.manual_seed(torch.initial_seed() + 1)  # new rows that differ
        model = type(llama()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(40, mean_resizing=False)
        return model

    model = get_peft_model(resized(), make_config("sparse"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = loader(resized(), tmp_path / "adapter")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(weights_of(loaded)[name], weights_of(model)[name])
    add(tmp_path / "adapter", {f"{PREFIX}model.norm.weight": SEVENS[0].clone()})
    with pytest.raises(ValueError, match=r"model.norm.weight, a weight of the base model"):
        loader(resized(), tmp_path / "adapter")

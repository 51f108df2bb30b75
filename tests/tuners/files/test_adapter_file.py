"""The sizes in a config are bounded by the tensors of the adapter's file, for all loaders and all kinds of files."""

import json
import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from sparse_peft.tuners.base_model import BaseSparseModel
from tests.helpers.language_models import llama
from tests.helpers.methods import METHODS

WEIGHTS, CONFIG, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
TARGETS = ["q_proj", "o_proj", "v_proj", "up_proj", "down_proj"]  # with pairs, for methods that choose structures
HUB_ID, COMMIT = "tester/adapter", "0" * 40
# sizes that the layers allow: {method: (fields of the config, the field in the error)}
CLAIMS = {
    "snella": ({"r": 12}, "r / 2: 6"),
    "sltrain": ({"r": 12}, "r: 12"),
    "sora": ({"ranks": None, "r": 12}, "ranks: 12"),
    "sparse": ({"num_entries": None, "num_params": None, "density": 1.0}, "num_entries: 1536"),
    "sara": ({"num_entries": None, "num_params": None, "density": 0.9}, "num_entries: "),
    "s2ft": ({"num_channels": None, "sides": None, "ratio": 0.9}, "num_channels: "),
    "sketch": ({"groups": 8}, "groups: 8"),
    "prune": ({"trains": "low_rank+sparse", "density": 0.5}, "density: "),
    "monarch": ({"blk_r": 12}, "blk_r: 12"),
    "sst": ({"r": 12}, "r: 12"),
    "sparse_ift": ({"r": 12}, "r: "),
}


def make_config(method, **fields):
    config_cls, options = METHODS[method]
    return config_cls(**{**options, "target_modules": TARGETS, "init_weights": False, **fields})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``{method: folder}`` of honest adapters."""
    folders = {}
    for method in METHODS:
        torch.manual_seed(0)
        folders[method] = tmp_path_factory.mktemp(method)
        get_peft_model(llama(), make_config(method)).save_pretrained(folders[method])
    return folders


def as_folder(folder, _):
    return folder, {}


def as_bin(folder, _):
    """PEFT's older file format."""
    torch.save(load_file(folder / WEIGHTS), folder / PICKLED)
    (folder / WEIGHTS).unlink()
    return folder, {}


def in_subfolder(folder, parent):
    folder.rename(parent / "sub")
    return parent, {"subfolder": "sub"}


def on_hub(folder, parent):
    """The Hub's cache, as after a download of the adapter."""
    repo = parent / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    return HUB_ID, {"cache_dir": parent / "hub"}


def by_peft(model, source, options, method=None):
    return PeftModel.from_pretrained(model, source, **options)


def beside_another(model, source, options, method):
    model = get_peft_model(model, make_config(method), "other")
    model.load_adapter(source, "default", **options)
    model.set_adapter("default")
    return model


def by_transformers(model, source, options, method=None):
    model.load_adapter(str(source), adapter_kwargs=options)
    return model


LOADERS = {
    "PeftModel.from_pretrained": by_peft,
    "PeftModel.load_adapter": beside_another,
    "model.load_adapter": by_transformers,
}
KINDS = [as_folder, as_bin, in_subfolder, on_hub]
loaders = pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def copy_of(folder, parent, **fields):
    copied = shutil.copytree(folder, parent / "adapter")
    content = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps({**content, **fields}))
    return copied


@pytest.fixture
def makes_no_layer(monkeypatch):
    make = BaseSparseModel._create_and_replace

    def make_other(self, config, adapter_name, *args, **kwargs):
        assert adapter_name == "other", "a layer was made before the sizes were checked"
        make(self, config, adapter_name, *args, **kwargs)

    monkeypatch.setattr(BaseSparseModel, "_create_and_replace", make_other)


def assert_refused(load, message):
    with pytest.raises(ValueError) as refusal:
        load()
    text = str(refusal.value)
    assert message in text and "of which the adapter's file has" in text, text


def skip_what_transformers_lacks(loader, kind):
    if loader is by_transformers and kind is in_subfolder and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers before 5.23 looks for the config of a local adapter in the folder itself")


@loaders
@kinds
def test_a_size_that_the_layers_allow(saved, tmp_path, makes_no_layer, loader, kind):
    skip_what_transformers_lacks(loader, kind)
    fields, message = CLAIMS["snella"]
    source, options = kind(copy_of(saved["snella"], tmp_path, **fields), tmp_path)
    assert_refused(lambda: loader(llama(), source, options, "snella"), message)


@pytest.mark.parametrize("method", METHODS)
def test_every_size_of_a_config(saved, tmp_path, makes_no_layer, method):
    fields, message = CLAIMS[method]
    source, options = on_hub(copy_of(saved[method], tmp_path, **fields), tmp_path)
    assert_refused(lambda: by_peft(llama(), source, options), message)


def test_a_state_dict_in_place_of_a_file(saved, tmp_path, makes_no_layer):
    config, tensors = make_config("snella", r=12), load_file(saved["snella"] / WEIGHTS)
    assert_refused(lambda: llama().load_adapter(peft_config=config, adapter_state_dict=tensors), "r / 2: 6")


def test_the_config_is_given_beside_the_file(saved, makes_no_layer):
    config = make_config("snella", r=12)
    assert_refused(lambda: PeftModel.from_pretrained(llama(), saved["snella"], config=config), "r / 2: 6")


def test_a_file_without_the_adapters_tensors(saved, tmp_path, makes_no_layer):
    folder = copy_of(saved["snella"], tmp_path, weight_shapes=None, r=12)
    torch.save({}, folder / PICKLED)
    (folder / WEIGHTS).unlink()
    assert_refused(lambda: by_peft(llama(), folder, {}), "r / 2: 6")


@pytest.mark.parametrize("loader", [by_peft, by_transformers])
def test_no_file_at_all(saved, tmp_path, makes_no_layer, loader):
    folder = copy_of(saved["snella"], tmp_path, r=12)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"neither {WEIGHTS} nor {PICKLED} is there"):
        loader(llama(), folder, {})


@loaders
@kinds
def test_honest_adapters_load(saved, tmp_path, loader, kind):
    wanted = by_peft(llama(), saved["sparse"], {})
    if loader is by_transformers and kind is as_bin:
        pytest.skip("transformers looks for a safetensors file alone in a folder")
    skip_what_transformers_lacks(loader, kind)
    source, options = kind(copy_of(saved["sparse"], tmp_path), tmp_path)
    model = loader(llama(), source, options, "sparse")
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, wanted.eval()(tokens).logits)


def test_sizes_that_a_given_config_leaves_open(saved):
    """They are resolved, and then compared with the file's."""
    model = PeftModel.from_pretrained(llama(), saved["sparse"], config=make_config("sparse"))
    content = json.loads((saved["sparse"] / CONFIG).read_text())
    assert model.peft_config["default"].num_entries == content["num_entries"]

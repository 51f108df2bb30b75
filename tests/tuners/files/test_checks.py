"""Adapter files: sizes, checks on load, whole or not at all."""

import copy
import json
import signal

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_peft import SparseConfig
from sparse_peft.support import Support, index_dtype
from sparse_peft.tuners.base_model import BaseSparseModel
from sparse_peft.tuners.files.positions import NAMES as POSITIONS
from sparse_peft.tuners.files.positions import file_layout, pack, unpack
from tests.helpers.methods import METHODS
from tests.helpers.two_layers import TwoLayers, adapted, layers_of

NAME = "adapter_model.safetensors"
KEY = "base_model.model.first.sparse_peft_delta_adapter."


@pytest.fixture
def saved(tmp_path):
    """``(folder, untouched base)`` of a saved adapter of TwoLayers."""
    model, reference = adapted()
    model.save_pretrained(tmp_path)
    return tmp_path, reference


def rewrite(folder, change):
    tensors = load_file(folder / NAME)
    change(tensors)
    save_file(tensors, folder / NAME)


def flat(support):
    """A file's positions as flat ones, for tests that change them."""

    def change(tensors):
        for name in ("cols", "row_counts"):
            tensors.pop(KEY + name)
        tensors[KEY + "indices"] = support.clone()

    return change


def positions(folder, layer):
    tensors = load_file(folder / NAME)
    mine = {name: tensors[KEY + name] for name in POSITIONS if KEY + name in tensors}
    return unpack(mine, layer.stored_shape, layer.name)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("density", [0.001, 0.005, 0.01, 0.1])
@pytest.mark.parametrize(("save_dtype", "limit"), [("float32", 6.5), ("bfloat16", 4.5), ("float16", 4.5)])
def test_bytes_on_disk(tmp_path, save_dtype, limit, density, low_cpu_mem_usage):
    model = get_peft_model(
        nn.Sequential(nn.Linear(512, 512)),
        SparseConfig(target_modules=["0"], density=density, save_dtype=save_dtype, init_weights=False),
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / NAME)
    entries = round(density * 512 * 512)
    assert {t.dtype for t in tensors.values()} <= {getattr(torch, save_dtype), torch.uint16, torch.uint8}
    header = int.from_bytes((tmp_path / NAME).read_bytes()[:8], "little") + 8
    assert (tmp_path / NAME).stat().st_size - header <= limit * entries
    again = PeftModel.from_pretrained(
        nn.Sequential(nn.Linear(512, 512)), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    values = again.base_model.model[0].deltas["default"].values
    expected = model.base_model.model[0].deltas["default"].values.to(getattr(torch, save_dtype)).float()
    assert values.dtype == torch.float32 and torch.equal(values, expected)
    support = again.base_model.model[0].support("default")
    assert support == model.base_model.model[0].support("default") and support.indices.dtype == torch.int32


def test_positions_beyond_two_to_the_31_use_int64():
    assert index_dtype((46_340, 46_340)) == torch.int32
    assert index_dtype((2**17, 2**15)) == torch.int64


def test_no_pickle_and_nothing_left_behind(saved):
    folder, _ = saved
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_config.json", NAME]


@pytest.mark.parametrize("cut", [3, 40, -1])
def test_truncated_file(saved, cut):
    folder, reference = saved
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(data[:cut])
    with pytest.raises(ValueError, match=rf"{NAME}: .*the adapter is damaged: save, copy or download it again"):
        PeftModel.from_pretrained(reference, folder)


def test_corrupt_header_and_config(saved):
    folder, reference = saved
    whole = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(whole[:8] + b"\xff" * 4 + whole[12:])
    with pytest.raises(ValueError, match="no valid safetensors header"):
        PeftModel.from_pretrained(reference, folder)
    (folder / NAME).write_bytes(whole)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"adapter_config\.json is not valid JSON"):
        SparseConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[KEY + "cols"].__setitem__(-1, 17), r"layer first: cols contain 17, but a 33 x 17 weight"),
        (lambda t: t[KEY + "row_counts"].__setitem__(0, 17), r"layer first: \(112,\) cols and \(33,\) row_counts"),
        (lambda t: t[KEY + "cols"][:2].fill_(3), r"layer first: indices must increase strictly"),
        (lambda t: t[KEY + "values"].__setitem__(0, float("nan")), r"cannot load layer first: 1 of 112 values"),
        (lambda t: t[KEY + "values"].__setitem__(0, float("inf")), r"cannot load layer first: 1 of 112 values"),
        (
            lambda t: t.update({KEY + "values": t[KEY + "values"][:-1].clone()}),
            "112 for layer first, of which .* file has 111",
        ),
        (lambda t: t.update({KEY + "values": t[KEY + "values"].int()}), r"layer first: values of dtype torch.int32"),
        (lambda t: t.pop(KEY + "cols"), "no positions for layer first"),
        (
            lambda t: t.pop(KEY + "values"),
            "112 for layer first, of which .* file has no values",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if KEY in k],
            "112 for layer first, of which .* has no values",
        ),
    ],
    ids=["too_large", "counts", "repeated", "nan", "inf", "fewer_values", "ints", "no_idx", "no_values", "no_layer"],
)
def test_bad_entries_are_refused_by_layer_and_value(saved, change, message):
    folder, reference = saved
    rewrite(folder, change)
    with pytest.raises((ValueError, TypeError), match=message):
        PeftModel.from_pretrained(reference, folder)
    for name, module in (("first", reference.first), ("second", reference.second)):
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        assert base.weight.isfinite().all(), name


@pytest.mark.parametrize(("at", "value", "message"), [(-1, 561, "561"), (0, -5, "-5"), (3, None, "increase")])
def test_flat_positions_are_read_too_and_checked(saved, at, value, message):
    folder, reference = saved
    model = PeftModel.from_pretrained(copy.deepcopy(reference), folder)
    indices = layers_of(model)["first"].support("default").indices
    rewrite(folder, flat(indices))
    again = PeftModel.from_pretrained(copy.deepcopy(reference), folder)
    assert torch.equal(layers_of(again)["first"].support("default").indices, indices)
    rewrite(folder, lambda t: t[KEY + "indices"].__setitem__(at, int(indices[2]) if value is None else value))
    with pytest.raises(ValueError, match=f"layer first.*{message}"):
        PeftModel.from_pretrained(reference, folder)


@pytest.mark.parametrize(
    ("shape", "entries", "names"),
    [
        ((64, 100), 64, {"cols", "row_counts"}),
        ((64, 100), 63, {"indices"}),
        ((4, 65_535), 100, {"cols", "row_counts"}),
        ((4, 65_536), 100, {"low", "high"}),
        ((512, 129), 2047, {"low", "high"}),
        ((512, 129), 2048, {"cols", "row_counts"}),
        ((512, 128), 600, {"cols", "row_counts"}),  # a small weight, as in version 0.1.0
        ((70_000, 70_000), 1000, {"indices"}),  # 75,000 high bits would take more
        ((70_000, 70_000), 50_000, {"low", "high"}),
        ((2, 65_535), 2 * 65_535, {"cols", "row_counts"}),
    ],
)
def test_positions_take_the_smaller_form_and_come_back(shape, entries, names):
    support = Support.random(shape, entries, seed=0, name="layer")
    packed = pack(support)
    assert set(packed) == names == set(file_layout(shape, entries))
    assert {name: (t.numel(), t.dtype) for name, t in packed.items()} == file_layout(shape, entries)
    assert torch.equal(unpack(packed, shape, "layer"), support.indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["high"].zero_(), "layer a: 100 positions in low, and 0 in high"),
        (lambda t: t.update(low=t["low"][:-1]), "layer a: 99 positions in low, and 100 in high"),
        (lambda t: t.update(high=t["high"].int()), r"layer a: high of dtype torch\.int32"),
        (lambda t: t.update(low=t["low"][None]), r"layer a: low of dtype torch\.uint16 and shape \(1, 100\)"),
        (
            lambda t: t.update(high=torch.cat([torch.zeros(9, dtype=torch.uint8), t["high"]])),
            r"layer a: low and high contain \d+, but a 300 x 300 weight",
        ),
    ],
)
def test_damaged_parts_of_positions_are_refused(change, message):
    tensors = pack(Support.random((300, 300), 100, seed=0, name="a"))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        unpack(tensors, (300, 300), "a")


def test_parts_of_positions_that_repeat_are_refused(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(300, 300)), SparseConfig(target_modules=["0"], density=0.002))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / NAME)
    next(tensor for name, tensor in tensors.items() if name.endswith("low"))[:3] = 7
    save_file(tensors, tmp_path / NAME, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layer 0: indices must increase strictly"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(300, 300)), tmp_path)


def test_another_number_of_entries_than_the_config_says(saved):
    folder, reference = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    config["num_entries"]["first"] = 50
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"layer first: the adapter file has 112 entries where this model's .* has 50"
    ):
        PeftModel.from_pretrained(reference, folder)


def test_base_of_other_shapes(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match=r"made for a weight of shape \(33, 17\) in layer first.*\(33, 18\)"):
        PeftModel.from_pretrained(TwoLayers(n_in=18), folder)


def test_base_with_other_layers(saved):
    folder, _ = saved

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(17, 33)

    with pytest.raises(
        ValueError, match=r"num_entries is for other layers.*missing \[\], not in the model \['second'\]"
    ):
        PeftModel.from_pretrained(One(), folder)


def seeded_layers():
    torch.manual_seed(0)
    return TwoLayers()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sst"])  # whose values stay float32
def test_values_too_large_for_the_file_are_not_saved_and_the_old_adapter_stays(tmp_path, method):
    make, fields = METHODS[method]
    config = make(**{**fields, "target_modules": ["first", "second"]}, save_dtype="float16")
    model = get_peft_model(seeded_layers(), config)
    model.save_pretrained(tmp_path)
    before = (tmp_path / NAME).read_bytes()
    state = next(BaseSparseModel.sparse_layers(model)).deltas["default"]
    rounded = next(name for name in state._parameters if name not in state.full_precision)
    with torch.no_grad():
        state.get_parameter(rounded).view(-1)[0] = -1e5
    with pytest.raises(
        ValueError, match=r"save layer first: its largest value, 100000, exceeds .*'float16', 65504; set"
    ):
        model.save_pretrained(tmp_path)
    assert (tmp_path / NAME).read_bytes() == before
    model.peft_config["default"].save_dtype = "float32"
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(seeded_layers(), tmp_path)


def test_nan_is_not_saved_and_the_old_adapter_stays(tmp_path):
    model, _reference = adapted()
    model.save_pretrained(tmp_path)
    before = (tmp_path / NAME).read_bytes()
    with torch.no_grad():
        layers_of(model)["second"].deltas["default"].values[1] = float("nan")
    with pytest.raises(ValueError, match="cannot save layer second: 1 of 33 values are NaN or infinite"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / NAME).read_bytes() == before


def test_a_write_that_fails_half_way_leaves_the_old_adapter(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    model, _reference = adapted(TwoLayers(64, 512, 64), density=0.5)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        layers_of(model)["first"].deltas["default"].values.add_(1)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, old[1]))  # a disk that is full after 64 KiB
    try:
        with pytest.raises(Exception, match=r"[Ff]ile|I/O|space|large"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    PeftModel.from_pretrained(TwoLayers(64, 512, 64), tmp_path)


def test_best_model_reload_into_a_living_adapter(saved):
    folder, reference = saved
    model = get_peft_model(reference, SparseConfig(target_modules=["first", "second"], density=0.2, seed=42))
    model(torch.randn(2, 17))
    model.load_adapter(folder, "default", is_trainable=True)
    tensors = load_file(folder / NAME)
    layer = layers_of(model)["first"]
    assert torch.equal(layer.deltas["default"].support.indices, positions(folder, layer))
    assert torch.equal(layers_of(model)["first"].deltas["default"].values, tensors[KEY + "values"])

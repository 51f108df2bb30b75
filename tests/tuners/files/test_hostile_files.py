"""Adapter files written to do damage, or damaged: refused with a reason, without a crash and without much memory."""

import copy
import json
import re
import shutil
import struct
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load, load_file, save, save_file

from sparse_peft.adapters import load_adapter
from tests.helpers.methods import METHODS
from tests.helpers.two_layers import TwoLayers

resource = pytest.importorskip("resource")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INPUT = torch.ones(2, 17)
MEMORY = 2**29  # bytes that one attempt may allocate
RESERVED = ("keys", "values", "items", "pop", "training", "forward", "parameters", "_modules", "copy")
FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def make_config(method, **fields):
    config_cls, options = METHODS[method]
    return config_cls(**{**options, "target_modules": ["first", "second"], "init_weights": False, **fields})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``{method: folder}`` of honest adapters for TwoLayers."""
    folders = {}
    for method in METHODS:
        torch.manual_seed(0)
        folders[method] = tmp_path_factory.mktemp(method)
        get_peft_model(TwoLayers(), make_config(method)).save_pretrained(folders[method])
    return folders


@pytest.fixture
def workbench(tmp_path, saved):
    """``copy_of(method)``: a folder with an honest adapter, anew at each call."""

    def copy_of(method):
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[method], folder)
        return folder

    return copy_of


@contextmanager
def little_memory():
    """Allocations of more than ``MEMORY`` bytes fail inside the block."""
    with Path("/proc/self/statm").open() as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def base():
    torch.manual_seed(0)
    return TwoLayers()


def by_peft(folder):
    return PeftModel.from_pretrained(base(), folder)


def by_us(folder):
    model = base()
    load_adapter(model, folder)
    return model


LOADERS = {"PeftModel.from_pretrained": by_peft, "load_adapter": by_us}


def attempt(loader, folder):
    """The model, which then computes, or the reason why not; any other kind of exception is a failure."""
    with little_memory():
        try:
            model = LOADERS[loader](folder)
        except (ValueError, TypeError) as refusal:
            assert len(str(refusal)) > 20, f"{type(refusal).__name__} without a reason"
            # Python's own complaints about types are no reason
            assert isinstance(refusal, ValueError) or re.search("expected|not supported", str(refusal)), refusal
            return str(refusal)
        with torch.no_grad():
            assert model(INPUT).shape == (2, 5)
        return model


def test_honest_files_pass(workbench):
    with little_memory(), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2 * MEMORY, dtype=torch.uint8)
    for method in METHODS:
        folder = workbench(method)
        outputs = [attempt(loader, folder)(INPUT) for loader in LOADERS]
        assert torch.equal(*outputs)


# ---------------------------------------------------------------------- configs

numbers = st.integers() | st.sampled_from([0, -1, 2**31, 2**63, 10**400]) | st.floats()
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(["first", "../second", "("])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
per_layer = st.dictionaries(st.sampled_from(["first", "second", "../first", "third"]), scalars, max_size=3)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("method", METHODS)
def test_configs_with_anything_in_them(workbench, method, loader):
    folder = workbench(method)
    honest = json.loads((folder / CONFIG).read_text())
    # PEFT looks the method up before it asks the method's own class
    fields = sorted(set(honest) - {"peft_type", "runtime_config"})

    @FEW
    @given(st.dictionaries(st.sampled_from(fields), values | per_layer, min_size=1, max_size=3))
    def run(changes):
        (folder / CONFIG).write_text(json.dumps({**honest, **changes}))
        attempt(loader, folder)

    run()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("sparse", {"num_entries": {"first": 10**12, "second": 1}}, "num_entries: 1000000000000 for layer first"),
        ("sparse", {"num_entries": {"../first": 5, "second": 1}}, r"num_entries is for other layers.*\.\./first"),
        ("sparse", {"num_entries": {"first": 56.5, "second": 1}}, r"num_entries\['first'\]=56.5: an int is expected"),
        ("sparse", {"num_entries": [1, 2]}, r"num_entries=\[1, 2\]: a dict of ints"),
        ("sparse", {"density": "1"}, r"adapter_config.json: density='1': a share in \(0, 1\] or None is expected"),
        ("sparse", {"density": float("nan")}, "density=nan"),
        ("sparse", {"seed": 10**400}, "seed=1000"),
        ("sltrain", {"r": 10**12}, "r: 1000000000000 for layer first, of which the adapter.s file has"),
        ("sora", {"ranks": {"first": 10**12, "second": 4}}, "ranks: 1000000000000 for layer first"),
        ("sora", {"ranks": {"first": -4, "second": 4}}, "ranks: a rank of -4 for layer first"),
        ("s2ft", {"num_channels": {"first": 10**12, "second": 1}}, "num_channels: 1000000000000 for layer first"),
        ("snella", {"r": 6_000_000}, "r / 2: 3000000 for layer first, of which the adapter.s file has 2"),
        ("snella", {"r": 6}, "r / 2: 3 for layer first, of which the adapter.s file has 2"),
        ("sketch", {"groups": 10**9}, "groups: 1000000000 for layer first, of which the adapter.s file has 1"),
        ("sketch", {"groups_pattern": {"second": 3}}, "groups: 3 for layer second, of which the adapter.s file has 1"),
        ("sketch", {"bits": 4}, r"2 \*\* bits: 16 for layer first, of which the adapter.s file has 8"),
    ],
)  # fmt: skip
def test_configs_that_ask_for_too_much(workbench, loader, method, change, message):
    folder = workbench(method)
    honest = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**honest, **change}))
    refusal = attempt(loader, folder)
    assert isinstance(refusal, str) and re.search(message, refusal), refusal


def test_sizes_of_layers_that_the_file_lacks(workbench):
    folder = workbench("sparse")
    tensors = load_file(folder / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if "first" not in key}, folder / WEIGHTS)
    refusal = attempt("PeftModel.from_pretrained", folder)
    assert isinstance(refusal, str) and re.search("num_entries: 56 for layer first, of which .* no values", refusal)


def test_sizes_without_a_file_are_bounded_by_the_layers():
    with pytest.raises(ValueError, match="r: a rank of 6000000 for layer first of 33 x 17 weights; 0 to 64"):
        get_peft_model(TwoLayers(), make_config("snella", r=6_000_000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "adapter_config.json is not valid JSON"),
        ("\0\xff", "adapter_config.json is not valid JSON"),
        ("[1, 2]", "adapter_config.json holds a list where an adapter's config is an object"),
        ('{"peft_type": "NOT_HERE"}', "peft_type='NOT_HERE' is no method that is known here"),
        ('{"peft_type": ["LORA"]}', r"peft_type=\['LORA'\] is no method"),
        ("{}", "peft_type=None is no method"),
        (" " * 2**26, "where an adapter's config has at most"),
    ],
    ids=["nested", "bytes", "list", "unknown", "typed", "empty", "large"],
)
def test_configs_that_are_none(workbench, text, message):
    folder = workbench("sparse")
    (folder / CONFIG).write_text(text)
    refusal = attempt("load_adapter", folder)
    assert isinstance(refusal, str) and re.search(message, refusal), refusal
    if "peft_type" not in message:
        with pytest.raises(ValueError, match=message):
            type(make_config("sparse")).from_pretrained(folder)


# ---------------------------------------------------------------------- weights: the container


def parts(folder):
    data = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_together(folder, header, body, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("method", METHODS)
def test_headers_with_anything_in_them(workbench, method, loader):
    folder = workbench(method)
    header, body = parts(folder)
    keys = sorted(set(header) - {"__metadata__"})
    sizes = st.integers(-2, 200) | st.sampled_from([2**31, 2**62, 2**64, 10**30])
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F64", "I64", "U16", "BOOL", "F8_E4M3", "C64", "?"]) | scalars,
            "shape": st.lists(sizes, max_size=3) | scalars,
            "data_offsets": st.lists(sizes, min_size=1, max_size=3) | scalars,
        },
    )

    @FEW
    @given(st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), entry | scalars, min_size=1, max_size=2))
    def run(changes):
        changed = copy.deepcopy(header)
        for key, change in changes.items():
            changed[key] = {**changed.get(key, {}), **change} if isinstance(change, dict) else change
        put_together(folder, changed, body)
        attempt(loader, folder)

    run()


@pytest.mark.parametrize("loader", LOADERS)
def test_bytes_changed_anywhere(workbench, loader):
    folder = workbench("sparse")
    honest = (folder / WEIGHTS).read_bytes()

    @FEW
    @given(st.integers(0, len(honest) - 1), st.binary(min_size=1, max_size=8), st.integers(0, len(honest)))
    def run(at, change, stop):
        data = honest[:at] + change + honest[at + len(change) :]
        (folder / WEIGHTS).write_bytes(data if stop % 2 else data[:stop])
        attempt(loader, folder)

    run()


@pytest.mark.parametrize("loader", LOADERS)
def test_headers_that_announce_more_than_there_is(workbench, loader):
    folder = workbench("sparse")
    header, body = parts(folder)
    huge = copy.deepcopy(header)
    key = next(key for key in header if key.endswith("first.sparse_peft_delta_adapter.values"))
    huge[key] |= {"shape": [2**40], "data_offsets": [0, 2**42]}
    for changed, size, message in (
        (huge, None, "bytes where its header announces"),
        (header, 2**63, "too short for a safetensors header"),
        (b"[" * 100_000, None, "no valid safetensors header"),
        (b"{}", 2, "bytes where its header announces"),
        ({**header, "x": {}}, None, "no valid safetensors header"),
        ({**header, "x": {"data_offsets": []}}, None, "no valid safetensors header"),
        ({key: {**header[key], "shape": [2**40]}}, None, "no valid safetensors header"),
    ):
        tail = body[: header[key]["data_offsets"][1]] if len(changed) == 1 else body
        put_together(folder, changed, tail, size)
        refusal = attempt(loader, folder)
        assert isinstance(refusal, str) and re.search(message, refusal), refusal


# ---------------------------------------------------------------------- weights: the tensors

DTYPES = [torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint16, torch.bool]
with suppress(KeyError):  # safetensors before 0.7
    save({"x": torch.zeros(1, dtype=torch.complex64)})
    DTYPES.append(torch.complex64)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("method", METHODS)
def test_tensors_with_anything_in_them(workbench, method, loader):
    folder = workbench(method)
    honest = load((folder / WEIGHTS).read_bytes())  # no views of the file, which is written over
    shapes = st.sampled_from(["same", "shorter", "longer", "empty", "2-D", "0-D"])

    def tensor_of(old, dtype, shape, seed):
        generator = torch.Generator().manual_seed(seed)
        length = old.shape[0] if old.ndim else 1
        size = {"same": old.shape, "shorter": (max(0, length - 1),), "longer": (length + 3,), "empty": (0,)}
        size |= {"2-D": (1, old.numel()), "0-D": ()}
        if dtype.is_floating_point or dtype.is_complex:
            drawn = torch.randn(size[shape], generator=generator)
            return (drawn * (float("nan") if seed % 7 == 0 else 1)).to(dtype)
        most = 2 if dtype == torch.bool else [40, 600, 2**15][seed % 3]
        drawn = torch.randint(0, most, size[shape], generator=generator)
        if dtype in (torch.int32, torch.int64) and seed % 5 == 0:
            drawn = drawn - 20
        if dtype == torch.int64 and seed % 11 == 0:
            drawn = drawn + 2**62
        return (drawn.sort().values if seed % 2 and drawn.ndim else drawn).to(dtype)

    @FEW
    @given(st.sampled_from(sorted(honest)), st.sampled_from(DTYPES), shapes, st.integers(0, 2**20), st.booleans())
    def run(key, dtype, shape, seed, removed):
        tensors = dict(honest)
        old = tensors.pop(key)
        if not (removed and seed % 4 == 0):
            tensors[key] = tensor_of(old, dtype, shape, seed)
        save_file(tensors, folder / WEIGHTS)
        attempt(loader, folder)

    run()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2**62, 2**62, 2**62, 2**62], "row_counts contain 4611686018427387904, but a row of the weight has 17"),
        ([-1, 57], "row_counts contain -1, but a row of the weight has 17 columns"),
    ],
)
def test_row_counts_whose_sum_wraps_around(workbench, loader, counts, message):
    folder = workbench("sparse")
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if "first" in key and key.endswith("row_counts"))
    tensors[key] = torch.cat([torch.tensor(counts), torch.zeros(len(tensors[key]) - len(counts), dtype=torch.int64)])
    save_file(tensors, folder / WEIGHTS)
    assert message in attempt(loader, folder)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("method", METHODS)
def test_files_that_would_change_the_base(workbench, method, loader):
    for key in ("first.base_layer.weight", "second.base_layer.weight"):
        folder = workbench(method)
        tensors = load_file(folder / WEIGHTS)
        tensors[f"base_model.model.{key}"] = torch.full_like(base().get_parameter(key.replace(".base_layer", "")), 7.0)
        save_file(tensors, folder / WEIGHTS)
        refusal = attempt(loader, folder)
        assert isinstance(refusal, str) and re.search(f"{key}, a weight of the base model", refusal), refusal


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["../escaped", "/etc/escaped", "a/b", "a\\b", "..", ".", "a.b", "", "C:x", "a\nb", "a\0b"]
)
@pytest.mark.parametrize("method", METHODS)
def test_adapter_names_that_would_leave_the_folder(tmp_path, workbench, method, name):
    folder = workbench(method)
    attempts = [
        lambda: get_peft_model(TwoLayers(), make_config(method), name),
        lambda: get_peft_model(TwoLayers(), make_config(method)).add_adapter(name, make_config(method)),
        lambda: inject_adapter_in_model(make_config(method), TwoLayers(), name),
        lambda: PeftModel.from_pretrained(TwoLayers(), folder, adapter_name=name),
        lambda: load_adapter(TwoLayers(), folder, name),
    ]
    for run in attempts:
        with pytest.raises(ValueError, match=f"adapter_name={re.escape(repr(name))}: a name is expected"):
            run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("__base__", "in mixed batches this means no adapter"),
        *((name, "have an attribute of this name; choose another, such as") for name in RESERVED),
        ("x" * 256, "256 bytes, and a folder's name has at most 255"),
        ("ü" * 128, "256 bytes"),
    ],
)
def test_adapter_names_that_mean_something_else(workbench, name, message):
    for run in (
        lambda: get_peft_model(TwoLayers(), make_config("sparse"), name),
        lambda: PeftModel.from_pretrained(TwoLayers(), workbench("sparse"), adapter_name=name),
        lambda: load_adapter(TwoLayers(), workbench("sparse"), name),
    ):
        with pytest.raises(ValueError, match=f"adapter_name='.*{message}"):
            run()


def test_names_that_are_allowed(tmp_path):
    for name in ("style 2", "größe_3", "a-b", "v1"):
        model = get_peft_model(TwoLayers(), make_config("sparse"), name)
        model.save_pretrained(tmp_path)
        assert (tmp_path / name / WEIGHTS).is_file()
        PeftModel.from_pretrained(TwoLayers(), tmp_path / name, adapter_name=name)

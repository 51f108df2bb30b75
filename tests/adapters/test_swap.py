"""Hot swap: the outputs of a freshly loaded adapter, bit for bit, without compiling again; or nothing changes."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import sparse_peft
from sparse_peft import S2FTConfig, SaRAConfig, SoRAConfig, SparseConfig
from sparse_peft.adapters import AdapterPool, prepare_for_swaps, swap_adapter
from tests.helpers.expert_models import IDS, mixture
from tests.helpers.expert_models import config as experts_config
from tests.helpers.interrupts import first_of_each, interrupted, lines_of
from tests.helpers.threads import together
from tests.helpers.two_layers import TwoLayers, assert_base_untouched, layers_of

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BOTH = ["first", "second"]
CONFIGS = {
    "sparse": lambda n, **k: SparseConfig(**{"density": 0.1 * n, "seed": n, **k}),
    "sara": lambda n, **k: SaRAConfig(**{"density": 0.1 * n, **k}),
    "s2ft": lambda n, **k: S2FTConfig(**{"ratio": 0.2 * n, "seed": n, "side": "in", **k}),
    "s2ft, outputs": lambda n, **k: S2FTConfig(**{"ratio": 0.2 * n, "seed": n, "side": "out", **k}),
}


def base(dtype=torch.float32, **kwargs):
    torch.manual_seed(3)
    return TwoLayers(**kwargs).to(dtype).eval()


def saved(folder, config, model=None):
    config.init_weights = False
    config.target_modules = config.target_modules or BOTH
    get_peft_model(base() if model is None else model, config).save_pretrained(folder)
    return folder


def loaded(folder, model=None, **kwargs):
    return PeftModel.from_pretrained(base() if model is None else model, folder, **kwargs).eval()


def output(model, x):
    with torch.no_grad():
        return model(x)


def pair(tmp_path, method="sparse", unequal=False, **kwargs):
    """Folders of two adapters of other positions, values and scale."""
    make, sizes = CONFIGS[method], (1, 2 if unequal else 1)
    second = make(sizes[1], scale=0.3)
    second.seed = 7
    return [
        saved(tmp_path / name, config, base(**kwargs))
        for name, config in (("a", make(sizes[0], scale=2.0)), ("b", second))
    ]


QUICK = {("sparse", "eager"), ("s2ft", "eager")}
X = torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", CONFIGS)
def test_outputs_are_those_of_the_freshly_loaded_adapter(tmp_path, method, dtype, unequal):
    folders, x = pair(tmp_path, method, unequal, dtype=dtype), X.to(dtype)
    model, expected = loaded(folders[0], base(dtype)), [output(loaded(f, base(dtype)), x) for f in folders]
    for number in (1, 0, 1, 1, 0):
        swap_adapter(model, folders[number])
        assert torch.equal(output(model, x), expected[number])
    with sparse_peft.base_weights(model):
        assert_base_untouched(model, base(dtype))
    with model.disable_adapter():
        assert torch.equal(output(model, x), base(dtype)(x))


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_the_saved_adapter_is_the_new_one(tmp_path, method, conv1d):
    old, new = pair(tmp_path, method, unequal=True, conv1d=conv1d)
    model = loaded(old, base(conv1d=conv1d))
    swap_adapter(model, new)
    model.save_pretrained(tmp_path / "c")
    for name, tensor in load_file(new / FILE).items():
        assert torch.equal(tensor, load_file(tmp_path / "c" / FILE)[name])
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (new, tmp_path / "c")]
    assert configs[0] == configs[1] and configs[0]["scale"] == 0.3


COMPILED = [
    pytest.param(method, backend, marks=() if (method, backend) in QUICK else pytest.mark.compile)
    for method in CONFIGS
    for backend in ("eager", "inductor")
]


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("method, backend", COMPILED)
def test_a_compiled_model_is_not_compiled_again(tmp_path, method, unequal, backend):
    torch._dynamo.reset()
    folders = pair(tmp_path, method, unequal)
    expected, model = [output(loaded(f), X) for f in folders], loaded(folders[0])
    if unequal:
        prepare_for_swaps(model, [folders[1]])
    compiled, counters = torch.compile(model, backend=backend, fullgraph=True), torch._dynamo.utils.counters
    torch.testing.assert_close(output(compiled, X), expected[0])
    graphs = counters["stats"]["unique_graphs"]
    for number in (1, 0, 1):
        swap_adapter(compiled, folders[number])
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(output(compiled, X), expected[number])
    assert counters["stats"]["unique_graphs"] == graphs
    swap_adapter(compiled, folders[0])
    assert torch.equal(output(model, X), expected[0])  # without a graph: to the bit, padded or not
    torch._dynamo.reset()


def test_without_preparation_other_sizes_compile_again(tmp_path):
    torch._dynamo.reset()
    old, new = pair(tmp_path, unequal=True)
    compiled = torch.compile(loaded(old), backend="eager")
    output(compiled, X)
    swap_adapter(compiled, new)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        output(compiled, X)
    torch._dynamo.reset()


def test_a_padded_adapter_is_saved_and_loaded(tmp_path):
    old, new = pair(tmp_path, unequal=True)
    expected, model = [output(loaded(folder), X) for folder in (old, new)], loaded(old)
    prepare_for_swaps(model, [new])
    assert torch.equal(output(model, X), expected[0])
    entries = [layer.deltas["default"].values.numel() for layer in layers_of(model).values()]
    assert entries == [layer.deltas["default"].values.numel() for layer in layers_of(loaded(new)).values()]
    model.save_pretrained(tmp_path / "c")
    assert torch.equal(output(loaded(tmp_path / "c"), X), expected[0])
    third = saved(tmp_path / "d", SparseConfig(density=0.5))
    with pytest.raises(
        ValueError, match=r"layer first: .* has \d+ entries, and the model is prepared for at most \d+"
    ):
        swap_adapter(model, third)
    with pytest.raises(ValueError, match="compiled already"):
        prepare_for_swaps(torch.compile(model), [third])


def test_other_adapters_are_left_alone(tmp_path):
    folders = pair(tmp_path, unequal=True)
    model, x = loaded(folders[0], adapter_name="one"), X[0]
    model.load_adapter(folders[1], "two")
    alone = {"one": output(model, x)}
    model.set_adapter("two")
    alone["two"] = output(model, x)
    swap_adapter(model, folders[1], "one")  # not the active one
    assert torch.equal(output(model, x), alone["two"])
    model.set_adapter("one")
    assert torch.equal(output(model, x), alone["two"])
    swap_adapter(model, folders[0])
    with torch.no_grad():
        mixed = model(x, adapter_names=["one", "two", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([alone["one"][0], alone["two"][1], base()(x)[2]]))
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"adapter_name: 2 adapters are active \(one, two\)"):
        swap_adapter(model, folders[0])
    before = output(model, x)
    swap_adapter(model, folders[1], "one")
    twice = output(model, x)
    assert not torch.equal(twice, before)
    swap_adapter(model, folders[0], "one")
    assert torch.equal(output(model, x), before)


def test_merged_adapters(tmp_path):
    old, new = pair(tmp_path)
    model = loaded(old, adapter_name="one")
    model.load_adapter(new, "two")
    model.merge_adapter(["one"])
    before = output(model, X)
    with pytest.raises(ValueError, match=r"'one' is merged into the base weight of layer first: call unmerge_adapter"):
        swap_adapter(model, new, "one")
    assert torch.equal(output(model, X), before)
    swap_adapter(model, old, "two")  # beside a merged one
    assert torch.equal(output(model, X), before)
    model.unmerge_adapter()
    swap_adapter(model, new, "one")
    model.merge_adapter(["one"])
    assert torch.equal(output(model, X), output(loaded(new), X))


def test_gradients_and_optimizers(tmp_path):
    old, new = pair(tmp_path)
    model = loaded(old, is_trainable=True)
    values = layers_of(model)["first"].deltas["default"].values
    model(X).sum().backward()
    swap_adapter(model, new)
    assert (
        values.grad is None and values.requires_grad and layers_of(model)["first"].deltas["default"].values is values
    )
    loss = model(X).sum()
    swap_adapter(model, old)
    with pytest.raises(RuntimeError, match="changed between the forward pass and its backward pass"):
        loss.backward()
    model(X).sum().backward()
    fresh = loaded(old, is_trainable=True)
    fresh(X).sum().backward()
    assert torch.equal(values.grad, layers_of(fresh)["first"].deltas["default"].values.grad)


def test_experts(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        get_peft_model(mixture(), experts_config(seed=seed, density=0.1 + 0.1 * seed)).save_pretrained(folder)
    model = PeftModel.from_pretrained(mixture(), folders[0])
    expected = [output(PeftModel.from_pretrained(mixture(), folder), IDS).logits for folder in folders]
    for number in (1, 0):
        swap_adapter(model, folders[number])
        assert torch.equal(output(model, IDS).logits, expected[number])


def test_on_bases_that_hold_no_entries(tmp_path):
    quantized = pytest.importorskip("tests.helpers.quantized")
    for kind, made in (("4bit", lambda: quantized.build("4bit")), ("overlay", base)):
        folders, x = [], torch.randn(3, 128 if kind == "4bit" else 17)
        for seed in (1, 2):
            config = SparseConfig(density=0.1 * seed, seed=seed, resident=kind == "4bit")
            folders.append(saved(tmp_path / f"{kind}{seed}", config, made()))
        model = loaded(folders[0], made())
        expected = [output(loaded(folder, made()), x) for folder in folders]
        for number in (1, 0, 1):
            swap_adapter(model, folders[number])
            assert torch.equal(output(model, x), expected[number])


def test_in_inference_mode(tmp_path):
    folders = pair(tmp_path, unequal=True)
    model = loaded(folders[0])
    with torch.inference_mode():
        for number in (1, 0):
            swap_adapter(model, folders[number])
            assert torch.equal(model(X), output(loaded(folders[number]), X))
    assert not layers_of(model)["first"].deltas["default"].values.is_inference()


def test_threads_see_the_old_or_the_new_weight(tmp_path):
    one = [saved(tmp_path / str(n), SparseConfig(density=0.1 * n, seed=n, target_modules=["first"])) for n in (1, 2)]
    model, expected = loaded(one[0]), [output(loaded(folder), X) for folder in one]

    def swap():
        for _ in range(15):
            for folder in one[::-1]:
                swap_adapter(model, folder)

    found, _ = together(lambda: [output(model, X) for _ in range(150)], swap)
    assert all(any(torch.equal(y, e) for e in expected) for y in found)
    assert torch.equal(output(model, X), expected[0])


def test_an_interrupt_at_any_line_leaves_one_of_the_two_whole(tmp_path):
    old, new = pair(tmp_path, unequal=True)
    expected = [output(loaded(folder), X) for folder in (old, new)]

    original, found = loaded(old), set()
    output(original, X)

    def copied():
        model = copy.deepcopy(original)
        output(model, X)
        return model

    model = copied()
    lines = lines_of(lambda: swap_adapter(model, new))
    steps = [*first_of_each(lines, ("contents", "delta_layer", "residency")), len(lines) - 1]
    for number in steps:
        model = copied()
        interrupted(lambda model=model: swap_adapter(model, new), number)
        outputs = [torch.equal(output(model, X), e) for e in expected]
        assert any(outputs), lines[number]
        assert model.peft_config["default"].scale == (2.0, 0.3)[outputs.index(True)]
        found.add(outputs.index(True))
        with sparse_peft.base_weights(model):
            assert_base_untouched(model, base())
    assert found == {0, 1} and len(steps) > 30


# ------------------------------------------------------------------------------------------------------------ refusals


def edited(folder, tensors=None, config=None):
    found = {**load_file(folder / FILE), **(tensors or {})}
    save_file({n: t for n, t in found.items() if t is not None}, folder / FILE, metadata={"format": "pt"})
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **(config or {})}))


KEY = "base_model.model.first.sparse_peft_delta_adapter"
HIDDEN = torch.tensor([float("nan")] * 56)
REFUSED = {
    "other method": (lambda f: saved(f, S2FTConfig(k=1)), "Incompatible PEFT types found: .* is SPARSE_PEFT_S2FT"),
    "LoRA": (
        lambda f: get_peft_model(base(), LoraConfig(target_modules=BOTH)).save_pretrained(f),
        "Incompatible PEFT types found: adapter 'default' is SPARSE_PEFT_DELTA, and .* is LORA",
    ),
    "fewer layers": (
        lambda f: saved(f, SparseConfig(density=0.1, target_modules=["first"])),
        "other layers than those of adapter 'default': not for second",
    ),
    "other shapes": (
        lambda f: saved(f, SparseConfig(density=0.1), TwoLayers(hidden=31)),
        r"weight_shapes: the adapter was made for a weight of shape \(31, 17\) in layer first",
    ),
    "a module saved whole": (
        lambda f: saved(f, SparseConfig(density=0.1, target_modules=["first"], modules_to_save=["second"])),
        r"modules_to_save=\['second'\]",
    ),
    "biases": (lambda f: saved(f, SparseConfig(density=0.1, bias="all")), "bias='all'"),
    "nothing": (lambda f: f.mkdir(), "neither adapter_model.safetensors nor"),
    "not finite": (
        lambda f: edited(saved(f, SparseConfig(density=0.1)), {f"{KEY}.values": HIDDEN}), "56 of 56 values are NaN"
    ),
    "no positions": (
        lambda f: edited(saved(f, SparseConfig(density=0.1)), {f"{KEY}.cols": None, f"{KEY}.row_counts": None}),
        "no positions for layer first",
    ),
    "out of range": (
        lambda f: edited(saved(f, SparseConfig(density=0.1)), {f"{KEY}.cols": torch.full((56,), 99).to(torch.uint16)}),
        "cols contain 99",
    ),
    "a tensor of the base": (
        lambda f: edited(saved(f, SparseConfig(density=0.1)), {"base_model.model.first.bias": torch.zeros(33)}),
        "first.bias",
    ),
    "larger sizes in the config": (
        lambda f: edited(saved(f, SparseConfig(density=0.1)), config={"num_entries": {"first": 2**40, "second": 16}}),
        "num_entries: 1099511627776 for layer first",
    ),
    "a config that is none": (
        lambda f: (saved(f, SparseConfig(density=0.1)) / CONFIG).write_text("[]"), "holds a list"
    ),
    "cut off": (
        lambda f: (saved(f, SparseConfig(density=0.1)) / FILE).write_bytes((f / FILE).read_bytes()[:-3]),
        "bytes where its header announces",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_changes_nothing(tmp_path, fault):
    make, message = REFUSED[fault]
    old = saved(tmp_path / "old", SparseConfig(density=0.1))
    model = loaded(old)
    before, config = output(model, X), copy.deepcopy(model.peft_config["default"])
    make(tmp_path / "new")
    with pytest.raises(ValueError, match=message):
        swap_adapter(model, tmp_path / "new")
    with sparse_peft.base_weights(model):
        assert_base_untouched(model, base())
    assert torch.equal(output(model, X), before) and model.peft_config["default"] == config
    swap_adapter(model, old)
    assert torch.equal(output(model, X), before)


def test_models_that_have_nothing_to_swap(tmp_path):
    folder = saved(tmp_path / "a", SparseConfig(density=0.1))
    with pytest.raises(TypeError, match="a PeftModel with an adapter of this package is expected, not TwoLayers"):
        swap_adapter(base(), folder)
    with pytest.raises(TypeError, match="not PeftModel"):
        swap_adapter(get_peft_model(base(), LoraConfig(target_modules=BOTH)), folder)
    with pytest.raises(ValueError, match="adapter_name='other': the model's adapters are 'default'"):
        swap_adapter(loaded(folder), folder, "other")
    with pytest.raises(ValueError, match="SPARSE_PEFT_SORA: swaps are for methods that train nothing but entries"):
        swap_adapter(get_peft_model(base(), SoRAConfig(r=2, target_modules=BOTH)), folder)


# ---------------------------------------------------------------------------------------------------------------- pool


def test_a_pools_adapter_is_replaced_in_place(tmp_path):
    a, b = pair(tmp_path, unequal=True)
    narrow = saved(tmp_path / "c", SparseConfig(density=0.2, target_modules=["second"]))
    pool = AdapterPool(base())
    pool.add("x", a)
    pool.add("other", a)

    def served(name="x"):
        with pool.use(name) as model:
            return output(model, X)

    fresh = {folder: output(loaded(folder), X) for folder in (a, b, narrow)}
    assert torch.equal(served("other"), fresh[a])
    for folder in (b, a, b, narrow, b):
        pool.replace("x", folder)
        assert torch.equal(served(), fresh[folder])
    assert torch.equal(served("other"), fresh[a])
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        pool.replace("nobody", a)
    (a / FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="header"):
        pool.replace("x", a)
    assert torch.equal(served(), fresh[b])


def test_a_replacement_counts_for_the_budget(tmp_path):
    a, b = pair(tmp_path, unequal=True)
    pool = AdapterPool(base())
    for name in ("x", "y"):
        pool.add(name, a)
        with pool.use(name):
            pass
    pool.max_bytes = pool.statistics.loaded_bytes
    pool.replace("x", b)
    assert pool.loaded == ["x"] and pool.statistics.loaded_bytes <= pool.max_bytes
    pool.max_bytes = pool.statistics.loaded_bytes
    larger = saved(tmp_path / "c", SparseConfig(density=0.6))
    with pytest.raises(ValueError, match="max_bytes="):
        pool.replace("x", larger)
    with pool.use("x") as model:
        assert torch.equal(output(model, X), output(loaded(b), X))

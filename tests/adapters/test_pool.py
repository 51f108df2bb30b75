"""A pool of adapters serves what a freshly loaded model does, and its base weights stay their own, bit for bit."""

import copy
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_peft
from sparse_peft import S2FTConfig, SparseConfig
from sparse_peft.adapters import AdapterPool
from tests.helpers.language_models import small_llama
from tests.helpers.two_layers import TwoLayers
from tests.peft_suite.cases import CASES

OURS = [case for case in CASES if not case.baseline]
BUILT = {}


def make_base(dtype=torch.float32):
    torch.manual_seed(3)
    return TwoLayers().to(dtype).eval()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Of each method: three adapters of different layers and sizes, and what a freshly loaded model makes of x."""

    def build(method):
        if method.name in BUILT:
            return BUILT[method.name]
        x, folders, expected = torch.randn(4, 17), {}, {}
        targets = {"a": ["first", "second"], "b": ["second"], "c": ["first"]}
        for name, kwargs in (("a", method.kwargs), ("b", method.other), ("c", method.kwargs)):
            config = method.config_cls(target_modules=targets[name], init_weights=False, **kwargs)
            model = get_peft_model(make_base(), config)
            folders[name] = tmp_path_factory.mktemp(method.name) / name
            model.save_pretrained(folders[name])
            fresh = PeftModel.from_pretrained(make_base(), folders[name])
            with torch.no_grad():
                expected[name] = fresh(x)
        with torch.no_grad():
            expected[None] = make_base()(x)
        BUILT[method.name] = x, folders, expected
        return BUILT[method.name]

    return build


def own_parameters(model):
    return {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "sparse_peft_" not in n}


def assert_base_is_its_own(pool, base, reference):
    with sparse_peft.base_weights(base):
        found = own_parameters(base)
        for name, parameter in reference.named_parameters():
            assert torch.equal(found[name], parameter), name


def size_of(folders, name):
    pool = AdapterPool(make_base())
    pool.add(name, folders[name])
    with pool.use(name):
        return pool.statistics.loaded_bytes


NAMES = st.sampled_from(["a", "b", "c", None])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), NAMES),
        st.tuples(st.just("batch"), st.lists(NAMES, min_size=4, max_size=4)),
        st.tuples(st.just("pin"), st.sampled_from("abc")),
        st.tuples(st.just("unpin"), st.sampled_from("abc")),
        st.tuples(st.just("remove"), st.sampled_from("abc")),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
def test_any_sequence_serves_what_fresh_models_do(built, method):
    x, folders, expected = built(method)
    sizes = {name: size_of(folders, name) for name in folders}

    # a loaded machine says nothing about the drawn sequences
    @settings(
        max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(steps=STEPS, scarce=st.booleans())
    def check(steps, scarce):
        base = make_base()
        # room for the largest, or for any two
        limit = max(sizes.values()) if scarce else sum(sizes.values()) - min(sizes.values())
        pool = AdapterPool(base, max_bytes=limit)
        for name, folder in folders.items():
            pool.add(name, folder)
        for action, argument in steps:
            try:
                if action == "use":
                    with pool.use(argument) as model, torch.no_grad():
                        assert torch.equal(model(x), expected[argument])
                elif action == "batch":
                    with pool.use_batch(argument) as model, torch.no_grad():
                        rows = torch.stack([expected[name][row] for row, name in enumerate(argument)])
                        torch.testing.assert_close(model(x), rows, rtol=1e-4, atol=1e-4)
                elif action == "remove":
                    pool.remove(argument)
                    pool.add(argument, folders[argument])
                else:
                    pool.pin(argument, action == "pin")
            except ValueError as error:
                assert "max_bytes=" in str(error)  # more pinned, or in one batch, than there is room for
            assert pool.statistics.loaded_bytes == sum(sizes[name] for name in pool.loaded) <= limit
        assert_base_is_its_own(pool, base, make_base())

    check()


def llama_folders(tmp_path, count=3, **config):
    folders = {}
    for n in range(count):
        settings_of = dict(target_modules=["q_proj", "down_proj"], density=0.1, seed=n, task_type="CAUSAL_LM")
        model = get_peft_model(small_llama(), SparseConfig(**settings_of, init_weights=False, **config))
        folders[f"adapter{n}"] = tmp_path / f"adapter{n}"
        model.save_pretrained(folders[f"adapter{n}"], save_embedding_layers=False)
    return folders


@pytest.fixture
def pool_of_llamas(tmp_path):
    pool = AdapterPool(small_llama())
    for name, folder in llama_folders(tmp_path).items():
        pool.add(name, folder)
    return pool


def test_least_recently_used_are_unloaded_and_counted(pool_of_llamas):
    pool = pool_of_llamas
    with pool.use("adapter0"):
        one = pool.statistics.loaded_bytes
    pool.max_bytes = 2 * one
    for name in ("adapter1", "adapter0", "adapter2", "adapter0", "adapter1"):
        with pool.use(name):
            pass
    assert pool.loaded == ["adapter0", "adapter1"]
    assert (pool.statistics.hits, pool.statistics.misses, pool.statistics.evictions) == (2, 4, 2)
    pool.pin("adapter0")
    with pool.use("adapter2"):
        assert pool.loaded == ["adapter0", "adapter2"]
    pool.pin("adapter2")
    too_large = pytest.raises(
        ValueError, match=r"adapter 'adapter1' takes \d+ bytes, and 2 pinned .*adapter0, adapter2"
    )
    with too_large, pool.use("adapter1"):
        pass
    assert pool.loaded == ["adapter0", "adapter2"] and pool.statistics.loaded_bytes == 2 * one


def test_bytes_are_those_of_all_tensors_of_an_adapter(pool_of_llamas):
    pool = pool_of_llamas
    with pool.use("adapter0") as model:
        model(torch.randint(0, 40, (1, 5)))
        layers = [m for m in model.modules() if hasattr(m, "deltas")]
        entries = sum(layer.deltas["adapter0"].values.numel() for layer in layers)
        rows = sum(layer.stored_shape[0] + 1 for layer in layers)
    # float32 values, columns of two bytes, int32 row pointers
    assert pool.statistics.loaded_bytes == 6 * entries + 4 * rows


def test_generation_with_one_adapter_and_in_mixed_batches(pool_of_llamas, tmp_path):
    pool, ids = pool_of_llamas, torch.randint(1, 40, (3, 4))
    alone = {}
    for name in ("adapter0", "adapter1", None):
        with pool.use(name) as model:
            alone[name] = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with pool.use_batch(["adapter0", None, "adapter1"]) as model:
        mixed = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, name in enumerate(["adapter0", None, "adapter1"]):
        assert mixed[row].tolist() == alone[name][row].tolist()
    with pool.use_batch(["adapter0", None, "adapter1"], num_beams=2) as model:
        model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)


def test_adapters_of_the_same_layers_are_added_without_a_pass_over_the_others(built, monkeypatch):
    """PEFT's loading asks every module of every adapter, so that each takes longer than the one before it."""
    (method,) = [case for case in OURS if case.name == "sparse"][:1]
    x, folders, expected = built(method)
    pool, passes, load = AdapterPool(make_base()), [], PeftModel.load_adapter
    monkeypatch.setattr(PeftModel, "load_adapter", lambda *args, **kwargs: passes.append(1) or load(*args, **kwargs))
    for number in range(4):
        pool.add(f"a{number}", folders["a"])
    pool.add("b", folders["b"])
    for number in range(4):
        with pool.use(f"a{number}") as model, torch.no_grad():
            assert torch.equal(model(x), expected["a"])
    assert len(passes) == 1
    with pool.use("b") as model, torch.no_grad():  # of other layers
        assert torch.equal(model(x), expected["b"])
    assert len(passes) == 2
    with pool.use_batch(["a2", "b", None, "a3"]) as model, torch.no_grad():
        mixed = model(x)
    for row, name in enumerate(["a", "b", None, "a"]):
        torch.testing.assert_close(mixed[row], expected[name][row])
    assert not any(p.requires_grad for p in pool._base.parameters())
    assert_base_is_its_own(pool, pool._base, make_base())


def python_calls(act):
    """How many Python functions an action calls."""
    found = 0

    def count(_, event, __):
        nonlocal found
        found += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(before)
    return found


def test_switches_mixed_batches_and_removals_ask_nothing_of_the_other_adapters(built):
    x, folders, _ = built(next(case for case in OURS if case.config_cls is SparseConfig))

    def costs(count):
        pool = AdapterPool(make_base())

        def switch(name):
            with pool.use(name) as model, torch.no_grad():
                model(x)

        def batch():
            with pool.use_batch(["0", "1", "0", None]) as model, torch.no_grad():
                model(x)

        for number in reversed(range(count)):
            pool.add(str(number), folders["a"])
            switch(str(number))
        batch()
        switch("1")
        return [python_calls(act) for act in (lambda: switch("0"), batch, lambda: pool.remove("1"))]

    few, many = costs(3), costs(15)
    # two layers of 12 adapters more would be 24 calls more
    assert all(abs(a - b) < 10 for a, b in zip(few, many, strict=True)), (few, many)


def test_a_module_saved_whole_travels_with_its_adapter(tmp_path):
    folders = llama_folders(tmp_path, 2, modules_to_save=["lm_head"])
    tensors = load_file(folders["adapter1"] / "adapter_model.safetensors")
    head = next(name for name in tensors if "lm_head" in name)
    save_file({**tensors, head: torch.zeros_like(tensors[head])}, folders["adapter1"] / "adapter_model.safetensors")
    pool, ids = AdapterPool(small_llama()), torch.randint(1, 40, (2, 4))
    for name, folder in folders.items():
        pool.add(name, folder)
    with torch.no_grad():
        with pool.use("adapter1") as model:
            assert not model(ids).logits.any()
        with pool.use("adapter0") as model:
            own = model(ids).logits
            assert own.any()
        with pool.use_batch(["adapter1", "adapter0"]) as model:
            mixed = model(ids).logits
        assert not mixed[0].any()
        torch.testing.assert_close(mixed[1], own[1], rtol=1e-4, atol=1e-4)
        with pool.use(None) as model:
            torch.testing.assert_close(model(ids).logits, small_llama()(ids).logits)
    assert pool.statistics.loaded_bytes > 2 * 4 * tensors[head].numel()


def test_half_precision(tmp_path):
    base = make_base(torch.bfloat16)
    config = SparseConfig(density=0.3, target_modules=["first", "second"], init_weights=False)
    model = get_peft_model(make_base(torch.bfloat16), config)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 17).bfloat16()
    pool = AdapterPool(base)
    pool.add("a", tmp_path)
    with torch.no_grad():
        for _ in range(50):
            with pool.use("a") as found:
                assert torch.equal(found(x), model(x))
            with pool.use(None):
                pass
    assert_base_is_its_own(pool, base, make_base(torch.bfloat16))


def test_threads_wait_for_each_other(pool_of_llamas):
    pool, ids, wrong = pool_of_llamas, torch.randint(1, 40, (2, 6)), []
    expected = {}
    for name in pool.names:
        with pool.use(name) as model, torch.no_grad():
            expected[name] = model(ids).logits
    pool.max_bytes = pool.statistics.loaded_bytes * 2 // 3

    def serve(names):
        for name in names:
            with pool.use(name) as model, torch.no_grad():
                if not torch.equal(model(ids).logits, expected[name]):
                    wrong.append(name)

    orders = [pool.names * 3, pool.names[::-1] * 3]
    threads = [threading.Thread(target=serve, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.statistics.hits + pool.statistics.misses == 3 + 18


# ------------------------------------------------------------------------------------------------------------- errors


def test_what_does_not_fit_is_refused_when_it_is_registered(tmp_path, pool_of_llamas):
    pool = pool_of_llamas
    get_peft_model(small_llama(), S2FTConfig(k=2)).save_pretrained(tmp_path / "s2ft")
    with pytest.raises(
        ValueError, match=r"'other' .* is of PEFT type SPARSE_PEFT_S2FT, where 'adapter0' is SPARSE_PEFT_D"
    ):
        pool.add("other", tmp_path / "s2ft")
    get_peft_model(small_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="of PEFT type LORA; a pool serves SPARSE_PEFT_"):
        pool.add("other", tmp_path / "lora")
    with pytest.raises(ValueError, match="name='adapter0' is registered already"):
        pool.add("adapter0", tmp_path / "lora")
    with pytest.raises(ValueError, match=r"name='a\.b': a name without dots"):
        pool.add("a.b", tmp_path / "lora")
    unknown = pytest.raises(ValueError, match="no adapter 'nobody' in this pool; it has 'adapter0'")
    with unknown, pool.use("nobody"):
        pass
    nested = pytest.raises(RuntimeError, match=r"use\('adapter1'\) inside a block that uses 'adapter0'")
    with nested, pool.use("adapter0"), pool.use("adapter1"):
        pass
    with pytest.raises(TypeError, match="made of the base model"):
        AdapterPool(get_peft_model(small_llama(), S2FTConfig(k=2)))
    with pytest.raises(ValueError, match="max_bytes=0"):
        AdapterPool(small_llama(), max_bytes=0)


def test_biases_and_other_bases_are_refused_by_name(tmp_path):
    base = small_llama()
    base.name_or_path = "owner/right"
    config = SparseConfig(target_modules=["q_proj"], density=0.1, base_model_name_or_path="owner/wrong")
    get_peft_model(small_llama(), config).save_pretrained(tmp_path / "a")
    config = sparse_peft.SparseConfig.from_pretrained(tmp_path / "a")
    config.base_model_name_or_path = "elsewhere/wrong"
    config.save_pretrained(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"'a' .* was made for the base model 'elsewhere/wrong', this pool's is 'owner/r"
    ):
        AdapterPool(base).add("a", tmp_path / "a")
    AdapterPool(base, check_base_name=False).add("a", tmp_path / "a")
    config.base_model_name_or_path = "elsewhere/right"
    config.save_pretrained(tmp_path / "a")
    AdapterPool(base).add("a", tmp_path / "a")
    get_peft_model(make_base(), SparseConfig(density=0.1, bias="all", target_modules=["first"])).save_pretrained(
        tmp_path / "b"
    )
    with pytest.raises(ValueError, match=r"'b' .* has bias='all'"):
        AdapterPool(make_base()).add("b", tmp_path / "b")


@pytest.mark.parametrize("first", [True, False], ids=["as the first", "beside others"])
@pytest.mark.parametrize("fault", ["other shapes", "truncated", "not finite"])
def test_an_adapter_that_cannot_be_loaded_leaves_the_pool_as_it_was(tmp_path, fault, first):
    base, x = make_base(), torch.randn(3, 17)
    config = SparseConfig(density=0.3, target_modules=["first"], init_weights=False)
    good = get_peft_model(make_base(), copy.deepcopy(config))
    good.save_pretrained(tmp_path / "good")
    source = TwoLayers(hidden=31) if fault == "other shapes" else make_base()
    get_peft_model(source, config).save_pretrained(tmp_path / "bad")
    path = tmp_path / "bad" / "adapter_model.safetensors"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif fault == "not finite":
        save_file({k: v / 0 if v.is_floating_point() else v for k, v in load_file(path).items()}, path)
    pool = AdapterPool(base)
    pool.add("good", tmp_path / "good")
    pool.add("bad", tmp_path / "bad")
    expected = {"good": good(x), None: make_base()(x)}
    with torch.no_grad():
        for name in [] if first else ["good"]:
            with pool.use(name) as model:
                assert torch.equal(model(x), expected[name])
        for _ in range(2):
            with pytest.raises(ValueError, match=r"adapter 'bad' .* cannot be loaded"), pool.use("bad"):
                pass
            assert "bad" not in pool.loaded
        for name in ("good", None, "good"):
            with pool.use(name) as model:
                assert torch.equal(model(x), expected[name])
    assert_base_is_its_own(pool, base, make_base())


def test_one_larger_than_the_budget_is_refused_and_the_others_stay(tmp_path):
    pool = AdapterPool(make_base())
    for name, density in (("small", 0.05), ("large", 0.5)):
        config = SparseConfig(density=density, target_modules=["first", "second"])
        get_peft_model(make_base(), config).save_pretrained(tmp_path / name)
        pool.add(name, tmp_path / name)
    with pool.use("small"):
        pool.max_bytes = 2 * pool.statistics.loaded_bytes
    with pytest.raises(ValueError, match="adapter 'large' takes"), pool.use("large"):
        pass
    assert pool.loaded == ["small"] and isinstance(pool._base.first, nn.Module)

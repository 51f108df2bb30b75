"""An engine that gets publications has the merged model's bits, and gets its base back."""

import copy
import dataclasses
import gc
import weakref
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from sparse_peft import SparseConfig
from sparse_peft.support import Support
from sparse_peft.sync import (
    AdapterSource,
    Kind,
    PatchError,
    Publication,
    Publisher,
    Receiver,
    WeightPatch,
    apply_patches_,
    from_bytes,
    named_patches,
    receive,
    to_bytes,
)
from tests.helpers.expert_models import CONFIGS, adapted, mixture
from tests.helpers.language_models import small_llama
from tests.helpers.methods import METHODS, config
from tests.helpers.two_layers import TwoLayers, layers_of


def adapted_llama(method, dtype=torch.float32, **fields):
    base = small_llama().to(dtype)
    engine = copy.deepcopy(base)
    torch.manual_seed(1)
    return get_peft_model(base, config(method, init_weights=False, **fields)), engine


def move(model):
    """What a step may do to an adapter's values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def reselect(model, seed):
    """New positions in every layer, some of them the old ones."""
    for number, layer in enumerate(layers_of(model).values()):
        state = layer.deltas["default"]
        old, count = state.support, state.support.nnz
        fresh = Support.random(old.shape, count, seed=seed + number, name="fresh")
        both = torch.cat([old.indices[::2], fresh.indices]).unique()[:count]
        state.support = Support(old.shape, both)


def assert_equal_to_merged(engine, model):
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, tensor in engine.state_dict().items():
        assert torch.equal(tensor, merged[name]), name


def assert_same(engine, base):
    for name, tensor in engine.state_dict().items():
        assert torch.equal(tensor, base[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_engine_has_the_merged_models_bits(method, dtype):
    model, engine = adapted_llama(method, dtype)
    base = copy.deepcopy(engine.state_dict())
    publisher, receiver = Publisher(model), Receiver(engine)
    for _ in range(3):
        publication = from_bytes(to_bytes(publisher.publish()))
        receiver.apply_(publication)
        publisher.acknowledge(publication.sequence)
        assert_equal_to_merged(engine, model)
        move(model)
    receiver.restore_()
    assert_same(engine, base)


def test_the_scale_of_the_delta_is_published():
    model, engine = adapted_llama("sparse", scale=8.0)
    Receiver(engine).apply_(Publisher(model).publish())
    assert_equal_to_merged(engine, model)


@pytest.mark.parametrize("bias", ["none", "all", "sparse_peft_delta_only"])
def test_modules_saved_whole_and_biases_are_published(bias):
    base = small_llama(attention_bias=True)
    engine = copy.deepcopy(base)
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": bias}
    model = get_peft_model(base, config("sparse", init_weights=False, **fields))
    publisher, receiver = Publisher(model), Receiver(engine)
    for _ in range(2):
        move(model)
        publication = publisher.publish()
        receiver.apply_(publication)
        publisher.acknowledge(publication.sequence)
        assert_equal_to_merged(engine, model)


def test_values_alone_are_sent_while_positions_stand_still():
    model, engine = adapted_llama("sparse")
    publisher, receiver = Publisher(model), Receiver(engine)
    first = publisher.publish()
    assert {patch.kind for patch in first} == {Kind.POSITIONS}
    receiver.apply_(first)
    publisher.acknowledge(first.sequence)
    move(model)
    second = publisher.publish()
    assert {patch.kind for patch in second} == {Kind.HELD}
    assert second.nbytes == sum(patch.values.numel() * 4 for patch in first)
    receiver.apply_(second)
    publisher.acknowledge(second.sequence)
    assert publisher.publish().patches == ()


def test_in_bfloat16_only_changed_entries_are_sent():
    model, engine = adapted_llama("sparse", torch.bfloat16)
    publisher, receiver = Publisher(model), Receiver(engine)
    first = publisher.publish()
    receiver.apply_(first)
    publisher.acknowledge(first.sequence)
    with torch.no_grad():  # beside bfloat16's base entries 1e-6 of a value is nothing, but where they are tiny
        for layer in layers_of(model).values():
            layer.deltas["default"].values *= 1 + 1e-6
            layer.deltas["default"].values[3] += 1.0
    second = publisher.publish()
    assert {patch.kind for patch in second} == {Kind.SOME}
    assert second.nbytes < first.nbytes / 20
    receiver.apply_(second)
    assert_equal_to_merged(engine, model)


@pytest.mark.parametrize("explicit", [False, True])
def test_given_up_entries_go_back_to_the_base(explicit):
    model, engine = adapted_llama("sparse")
    publisher, receiver = Publisher(model), Receiver(engine)
    for seed in range(3):
        publication = publisher.publish(explicit=explicit)
        receiver.apply_(publication)
        publisher.acknowledge(publication.sequence)
        assert_equal_to_merged(engine, model)
        reselect(model, seed)
        move(model)


def test_explicit_patches_need_no_receiver():
    """Engines as vLLM write indices and values, and hold nothing."""
    model, engine = adapted_llama("sparse", torch.bfloat16)
    weights, publisher = engine.state_dict(), Publisher(model)
    for seed in range(3):
        publication = publisher.publish(explicit=True)
        for patch in publication:
            assert patch.indices.dtype == torch.int32
            weights[patch.name].view(-1).index_copy_(0, patch.indices.long(), patch.values)
        publisher.acknowledge(publication.sequence)
        assert_equal_to_merged(engine, model)
        reselect(model, seed)
        move(model)


def test_named_patches_are_the_difference_to_the_base():
    model, engine = adapted_llama("sparse")
    weights = engine.state_dict()
    for patch in named_patches(model):
        assert torch.equal(patch.indices, patch.indices.unique())
        weights[patch.name].view(-1).index_copy_(0, patch.indices.long(), patch.values)
    assert_equal_to_merged(engine, model)


def test_publishing_changes_neither_model_nor_training():
    model, _ = adapted_llama("sparse")
    tokens = torch.randint(40, (2, 7))
    before = model(tokens).logits
    publisher = Publisher(model)
    publisher.publish()
    assert torch.equal(model(tokens).logits, before)


FAULTS = ["lose", "double", "reorder", "cut", "interrupt", "trainer restarts", "engine restarts", "another adapter"]
EVENTS = st.lists(st.sampled_from(["train", "reselect", "switch", "publish", *FAULTS]), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=EVENTS, half=st.booleans(), seed=st.integers(0, 99))
def test_any_sequence_of_faults_ends_in_a_correct_engine(events, half, seed):
    torch.manual_seed(seed)
    base = TwoLayers().to(torch.bfloat16 if half else torch.float32)
    engine = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    untouched = copy.deepcopy(engine)
    peft_config = SparseConfig(density=0.2, target_modules=["first", "second"], init_weights=False)
    model = get_peft_model(base, peft_config)
    model.add_adapter("other", dataclasses.replace(peft_config, seed=7))
    publisher, receiver = Publisher(model, "default"), Receiver(engine)

    def deliver(publication):
        try:
            receiver.apply_(publication)
        except PatchError:
            publication = publisher.publish(full=True)
            receiver.apply_(publication)
        publisher.acknowledge(publication.sequence)
        assert_merged("default")

    def assert_merged(name):
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[name]).state_dict()
        assert all(torch.equal(engine[name], merged[name]) for name in engine)

    for number, event in enumerate(events):
        if event == "train":
            move(model)
        elif event == "reselect":
            reselect(model, 100 * seed + number)
        elif event == "switch":
            model.set_adapter("other" if model.active_adapter == "default" else "default")
        elif event == "publish":
            deliver(publisher.publish())
        elif event == "reorder":
            early, late = publisher.publish(), publisher.publish()
            deliver(late)
            with pytest.raises(PatchError):
                receiver.apply_(early)
        elif event == "lose":  # the trainer takes it for delivered
            publisher.acknowledge(publisher.publish().sequence)
        elif event == "double":
            publication = publisher.publish()
            deliver(publication)
            with pytest.raises(PatchError):
                receiver.apply_(publication)
        elif event == "cut":
            message = to_bytes(publisher.publish())
            with pytest.raises(PatchError):
                receiver.apply_(from_bytes(message[: len(message) - 1 - number]))
        elif event == "interrupt":
            interrupted(receiver, publisher.publish(full=True))
        elif event == "trainer restarts":
            publisher = Publisher(model, "default")
        elif event == "engine restarts":
            for name, tensor in untouched.items():
                engine[name].copy_(tensor)
            receiver = Receiver(engine)
        else:
            receiver.apply_(Publisher(model, "other").publish())
            assert_merged("other")
    deliver(publisher.publish())
    receiver.restore_()
    assert all(torch.equal(engine[name], untouched[name]) for name in engine)


def interrupted(receiver, publication):
    """The engine's process gets a signal after the first parameter."""
    written = []

    def write(item, original=receive._write):
        if written:
            raise KeyboardInterrupt
        written.append(item)
        original(item)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(receive, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            receiver.apply_(publication)


# ------------------------------------------------------------------ refusals


@pytest.fixture
def pair():
    torch.manual_seed(0)
    base = TwoLayers()
    engine = copy.deepcopy(base)
    peft_config = SparseConfig(density=0.2, target_modules=["first", "second"], init_weights=False)
    return get_peft_model(base, peft_config), engine


def replaced(publication, **fields):
    """A publication whose first patch has other fields."""
    first, *others = publication.patches
    return dataclasses.replace(publication, patches=(dataclasses.replace(first, **fields), *others))


def damages(patch):
    """``{part of the message: fields}``."""
    nan, beyond, negative = patch.values.clone(), patch.indices.clone(), patch.indices.clone()
    nan[0], beyond[-1], negative[0] = float("nan"), 10**6, -1
    held = set(patch.indices.tolist())
    free = next(position for position in count() if position not in held)
    return {
        "not finite": {"values": nan},
        "increase strictly": {"indices": patch.indices.flip(0)},
        "has positions 0 to": {"indices": beyond},
        "was cut": {"values": patch.values[:-1]},
        "same dtype": {"values": patch.values.half()},
        "vectors": {"indices": patch.indices.long()},
        "the trainer's": {"shape": (33, 18)},
        "no parameter": {"name": "third.weight"},
        "without positions": {"kind": Kind.HELD, "indices": None},
        "given up positions": {"given_up": torch.tensor([free], dtype=torch.int32)},
        "among the positions": {"kind": Kind.SOME},
        "positions 0 to": {"indices": negative},
        "1-D": {"indices": patch.indices[None]},
    }


@pytest.mark.parametrize("number", range(13))
def test_damaged_patches_are_refused_before_anything_is_written(pair, number):
    model, engine = pair
    base = copy.deepcopy(engine.state_dict())
    publication = Publisher(model).publish()
    message, fields = list(damages(publication.patches[0]).items())[number]
    with pytest.raises(PatchError, match=message):
        apply_patches_(engine, replaced(publication, **fields))
    assert_same(engine, base)


def test_two_patches_of_one_parameter_are_refused(pair):
    model, engine = pair
    base = copy.deepcopy(engine.state_dict())
    publication = Publisher(model).publish()
    first, *others = publication.patches
    with pytest.raises(PatchError, match="two patches in publication 1"):
        apply_patches_(engine, dataclasses.replace(publication, patches=(first, first, *others)))
    assert_same(engine, base)


def test_another_base_is_refused(pair):
    model, engine = pair
    with torch.no_grad():
        engine.first.weight[0, 0] += 1
    with pytest.raises(PatchError, match="for the base"):
        apply_patches_(engine, Publisher(model).publish())


def test_another_run_is_refused(pair):
    model, engine = pair
    receiver = apply_patches_(engine, Publisher(model).publish())
    other = Publisher(model)
    other.acknowledge(other.publish().sequence)
    move(model)
    with pytest.raises(PatchError, match="full publication"):
        receiver.apply_(other.publish())


def test_values_that_are_not_finite_are_not_published(pair):
    model, _ = pair
    with torch.no_grad():
        layers_of(model)["first"].deltas["default"].values[0] = float("inf")
    with pytest.raises(ValueError, match="nothing is published"):
        Publisher(model).publish()


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_adapter_is_published_as_it_is(method):
    """TRL's asynchronous GRPO merges before it sends weights."""
    model, engine = adapted_llama(method, torch.bfloat16)
    publisher, receiver = Publisher(model), Receiver(engine)
    receiver.apply_(publisher.publish())
    publisher.acknowledge(1)
    move(model)
    model.merge_adapter()
    receiver.apply_(publisher.publish())
    model.unmerge_adapter()
    assert_equal_to_merged(engine, model)


def test_a_publisher_is_made_before_merging(pair):
    model, _ = pair
    model.merge_adapter()
    with pytest.raises(ValueError, match="before merge_adapter"):
        Publisher(model)


def test_other_merged_adapters_are_not_published(pair):
    model, _ = pair
    publisher = Publisher(model)
    model.add_adapter("other", SparseConfig(density=0.1, target_modules=["first"], init_weights=False))
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="call unmerge_adapter"):
        publisher.publish()


def test_the_adapter_is_named_where_it_is_not_clear(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="adapters are 'default'"):
        Publisher(model, "other")
    model.add_adapter("other", SparseConfig(density=0.1, target_modules=["first"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="name one"):
        Publisher(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_experts_are_published_under_their_parameters_names(name):
    model, engine = adapted(name), mixture(name)
    base = copy.deepcopy(engine.state_dict())
    publisher, receiver = Publisher(model), Receiver(engine)
    for _ in range(2):
        move(model)
        publication = from_bytes(to_bytes(publisher.publish()))
        assert any(".experts." in patch.name and not patch.name.endswith(".weight") for patch in publication)
        receiver.apply_(publication)
        publisher.acknowledge(publication.sequence)
        assert_equal_to_merged(engine, model)
    receiver.restore_()
    assert_same(engine, base)


@pytest.mark.parametrize("method", METHODS)
def test_a_snapshot_after_another_is_that_of_a_fresh_look(method):
    model, _ = adapted_llama(method, torch.bfloat16)
    source = AdapterSource(model)
    earlier = source.snapshot()
    for seed in range(3):
        move(model)
        if method == "sparse" and seed == 1:
            reselect(model, seed)
        fresh, earlier = source.snapshot(), source.snapshot(earlier)
        for name, held in fresh.items():
            assert torch.equal(held.values, earlier[name].values)
            assert held.indices is None or torch.equal(held.indices, earlier[name].indices)


def test_publications_that_are_never_acknowledged_do_not_pile_up(pair):
    model, engine = pair
    publisher = Publisher(model, waiting=3)
    kept = []
    for _ in range(10):
        move(model)
        publication = publisher.publish()
        kept.append(weakref.ref(publication.patches[0].values))
    del publication
    gc.collect()
    assert [values() is not None for values in kept] == [False] * 7 + [True] * 3
    with pytest.raises(ValueError, match=r"sequence=7: this publisher waits for 8, 9, 10;.*\(waiting=\)"):
        publisher.acknowledge(7)
    receiver = Receiver(engine)
    receiver.apply_(publication := publisher.publish())
    publisher.acknowledge(publication.sequence)
    assert_equal_to_merged(engine, model)
    with pytest.raises(ValueError, match="waiting=0"):
        Publisher(model, waiting=0)


def test_positions_are_int64_from_two_to_the_31_entries_on():
    """The border of ``support.index_dtype``; on the meta device nothing is allocated."""
    for shape, dtype, other in (
        ((2**16, 2**15), torch.int64, torch.int32),
        ((2**16, 2**15 - 1), torch.int32, torch.int64),
    ):
        receiver = Receiver({"a.weight": torch.empty(shape, device="meta")}, base="base")
        indices = torch.tensor([0, shape[0] * shape[1] - 1])
        patch = WeightPatch("a.weight", Kind.POSITIONS, shape, torch.zeros(2), indices.to(dtype))
        publication = Publication("base", "run", 1, None, (patch,))
        with pytest.raises(PatchError, match=f"entries are {dtype} vectors, not {other}"):
            receiver.apply_(replaced(publication, indices=indices.to(other)))
        receiver.apply_(publication)
        assert receiver.sequence == 1


def test_acknowledging_twice_is_refused(pair):
    publisher = Publisher(pair[0])
    sequence = publisher.publish().sequence
    publisher.acknowledge(sequence)
    with pytest.raises(ValueError, match=f"sequence={sequence}"):
        publisher.acknowledge(sequence)

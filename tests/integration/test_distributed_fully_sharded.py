"""FSDP2 on two processes: entries lie in the processes' shards before weights are gathered, as on one process."""

from functools import partial
from multiprocessing import Manager

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sparse_peft import S2FTConfig, SaRAConfig, SparseConfig, SparsityController, base_weights
from sparse_peft.dynamics.full_tensor import full_tensor
from sparse_peft.ops import effective_entries, read_support
from sparse_peft.planning import DividedRun, reselection_traffic, step_traffic
from sparse_peft.tuners.ledger import Held
from sparse_peft.tuners.sources import LayerSource
from sparse_peft.tuners.traversal import tuner_layers
from tests.helpers.blocks import Net
from tests.helpers.processes import process_group, run_on_two
from tests.helpers.sent_bytes import SentBytes

pytestmark = pytest.mark.distributed
TARGETS = ["up", "down"]
CONFIGS = {
    "entries": partial(SparseConfig, density=0.2, scale=1.0),
    "few entries": partial(SparseConfig, selection="magnitude", density=0.02),
    "smallest": partial(SaRAConfig, density=0.2),
    "channels": partial(S2FTConfig, ratio=0.3),
    "input channels": partial(S2FTConfig, k=3, scale=0.5),
}
X = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))


def adapted(config="entries", dtype=torch.float32, **fields):
    config = CONFIGS[config](target_modules=TARGETS, init_weights=False, **fields)
    return get_peft_model(Net().to(dtype), config)


def sharded(model, blocks=True, root=True, **options):
    mesh = init_device_mesh("cpu", (2,))
    if blocks:
        for block in model.get_base_model().blocks:
            fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options) if root else model


WRAPPINGS = {
    "blocks and root": sharded,
    "root": partial(sharded, blocks=False),
    "blocks": partial(sharded, root=False),
    "kept gathered": partial(sharded, reshard_after_forward=False),
}


def half(rank):
    return X[4 * rank : 4 * rank + 4]


def gathered(model):
    """The whole base weights as the processes hold them now."""
    return [full_tensor(layer.base_layer.weight).clone() for layer in tuner_layers(model)]


def own(model):
    with base_weights(model):
        return gathered(model)


def bits_equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def gradients(model):
    return [full_tensor(state.values.grad).clone() for layer in tuner_layers(model) for state in layer.deltas.values()]


# ---------------------------------------------------------------------- what the processes check


def the_gathered_weight_is_the_adapted_one(rank):
    """Outputs are those of one process to the bit, and no row of a weight is copied."""

    def refuse(*_):
        raise AssertionError("a copy of a weight's rows")

    copies, LayerSource._copies = LayerSource._copies, refuse
    try:
        for wrap in WRAPPINGS.values():
            for config in CONFIGS:
                alone, model = adapted(config), wrap(adapted(config))
                before = own(alone)
                for training in (True, False):
                    for each in (alone, model):
                        each.train(training)
                    with torch.set_grad_enabled(training):
                        assert torch.equal(model(X), alone(X))
                assert all(isinstance(layer.ledger.content, Held) for layer in tuner_layers(model))
                model.state_dict()  # gives gathered copies up
                for layer, base in zip(tuner_layers(model), before, strict=True):
                    (delta,) = layer.deltas.values()
                    expected, values = base.clone().flatten(), full_tensor(delta.values) * delta.value_scale
                    entries = effective_entries(read_support(base, delta.support), values)
                    expected[delta.support.indices.long()] = entries
                    assert torch.equal(full_tensor(layer.base_layer.weight), expected.view(base.shape))
                assert bits_equal(own(model), before)
    finally:
        LayerSource._copies = copies


def steps(rank):
    """Gradients are means over processes; between steps the weights are the base's own."""
    for wrap in WRAPPINGS.values():
        alone, model = adapted(), wrap(adapted())
        before = gathered(alone)
        optimizers = [
            torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (alone, model)
        ]
        for step in range(3):
            for parts, each in ((X, alone), (half(rank), model)):
                chunks = parts.roll(step, 1).chunk(2)
                for chunk in chunks:  # gradient accumulation
                    (each(chunk).square().mean() / 2).backward()
            torch.testing.assert_close(gradients(model), gradients(alone), atol=1e-6, rtol=1e-4)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert bits_equal(gathered(model), before)
        torch.testing.assert_close(model(X), alone(X), atol=1e-5, rtol=1e-4)


def passes_of_several_kinds_before_one_backward(rank):
    """A reference pass between a pass and its backward, as preference optimisation has it."""

    def both(model, x):
        total = model(x).square().mean()
        with torch.no_grad(), model.disable_adapter():
            reference = model(x).abs().mean()
        (total * reference).backward()
        first = gradients(model)
        inputs = x.clone().requires_grad_()
        total = model(inputs).square().mean()
        with model.disable_adapter():
            total = total + model(inputs).abs().mean()
        total.backward()
        return first, gradients(model), total.detach()

    for wrap in WRAPPINGS.values():
        alone, model = adapted(), wrap(adapted())
        before = own(alone)
        torch.testing.assert_close(both(model, X), both(alone, X), atol=1e-6, rtol=1e-4)
        assert bits_equal(own(model), before)


def switching_and_merging(rank):
    for wrap in WRAPPINGS.values():
        pair = adapted(), adapted()
        for model in pair:
            torch.manual_seed(1)
            model.add_adapter("other", SparseConfig(density=0.3, seed=1, target_modules=TARGETS, init_weights=False))
        alone, model = pair[0].eval(), wrap(pair[1]).eval()
        before = own(alone)
        with torch.no_grad():
            for names in ("default", "other", ["default", "other"], "default"):
                for each in (alone, model):
                    each.base_model.set_adapter(names)
                assert torch.equal(model(X), alone(X))
                mixed = ["default", "__base__", "other", "default"] * 2
                for each in (alone, model):
                    each.merge_adapter()
                assert torch.equal(model(X), alone(X))
                assert not bits_equal(gathered(model), before)
                for each in (alone, model):
                    each.unmerge_adapter()
                assert bits_equal(gathered(model), before)
                torch.testing.assert_close(
                    model(X, adapter_names=mixed), alone(X, adapter_names=mixed), atol=1e-5, rtol=1e-4
                )
                with model.disable_adapter(), alone.disable_adapter():
                    assert torch.equal(model(X), alone(X))
            expected = model(X)
            assert torch.equal(model.merge_and_unload()(X) if wrap is WRAPPINGS["blocks"] else expected, expected)
    broken = sharded(adapted())
    layer = next(tuner_layers(broken))
    if rank == 0:  # a value in rows of one process
        layer.deltas["default"].values._local_tensor[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def state_dicts(rank):
    alone, model = adapted().eval(), sharded(adapted()).eval()
    before = own(alone)
    with torch.no_grad():
        expected = model(X)
    kept = model.state_dict()  # while entries are held
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    with base_weights(model), torch.no_grad():  # a pass with copies
        torch.testing.assert_close(model(X), expected)
        plain = model.state_dict()
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    for state in (kept, plain):
        weights = [
            full_tensor(state[f"base_model.model.{layer.name}.base_layer.weight"]) for layer in tuner_layers(model)
        ]
        assert bits_equal(weights, before)
    assert bits_equal(own(model), before)


def half_precision(rank):
    alone, model = adapted(dtype=torch.bfloat16), sharded(adapted(dtype=torch.bfloat16))
    assert torch.equal(model(X.bfloat16()), alone(X.bfloat16()))
    for each, part in ((alone, X), (model, half(rank))):
        each(part.bfloat16()).float().square().mean().backward()
    torch.testing.assert_close(gradients(model), gradients(alone), atol=2e-2, rtol=0.1)
    # weights in float32, gathered as bfloat16: the entries are written before the cast
    alone = adapted()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for wrap in (WRAPPINGS["blocks and root"], WRAPPINGS["root"]):
        model = wrap(adapted(), mp_policy=policy)
        merged = adapted().merge_and_unload().bfloat16()
        assert torch.equal(model(X), merged(X.bfloat16()))
        model(half(rank)).float().square().mean().backward()
        if not alone.base_model.model.blocks[0].up.deltas["default"].values.grad is not None:
            alone(X).square().mean().backward()
        torch.testing.assert_close(gradients(model), gradients(alone), atol=2e-2, rtol=0.1)
        assert bits_equal(own(model), own(alone))


def prefetching(rank):
    alone, model = adapted(), sharded(adapted())
    first, second = model.get_base_model().blocks
    for module, following in ((model, first), (first, second)):
        module.set_modules_to_forward_prefetch([following])
    for _ in range(2):
        assert torch.equal(model(X), alone(X))
        model(half(rank)).square().mean().backward()


def disabled_before_the_first_pass(rank):
    for wrap in WRAPPINGS.values():
        alone, model = adapted(), wrap(adapted())
        for each, part in ((alone, X), (model, half(rank))):
            with torch.no_grad(), each.disable_adapter():
                each(part)
            each(part).square().mean().backward()
        torch.testing.assert_close(gradients(model), gradients(alone), atol=1e-6, rtol=1e-4)


def adapters_that_come_later(rank):
    model = sharded(adapted())
    model(X)
    with pytest.raises(
        NotImplementedError, match=r"adapter 'other' in layer blocks\.0\.up: FSDP has wrapped the model"
    ):
        model.add_adapter("other", SparseConfig(density=0.1, target_modules=TARGETS))
    alone = adapted().eval()
    for each in (alone, model):
        torch.manual_seed(3)
        fields = {"inference_mode": True, "init_weights": False, "scale": 1.0, "target_modules": TARGETS}
        each.add_adapter("frozen", SparseConfig(density=0.1, **fields))
        each.set_adapter("frozen")
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(X), alone(X))
    late = [p for name, p in model.named_parameters() if "frozen" in name]
    assert late and not any(p.requires_grad for p in late)
    # nothing would average its gradients
    refused = r"adapter 'frozen' in layer blocks\.0\.up: FSDP has wrapped the model"
    with pytest.raises(NotImplementedError, match=refused):
        next(tuner_layers(model)).set_requires_grad("frozen")
    late[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=refused):
        SparsityController(model, torch.optim.SGD(late, lr=0.1), total_steps=4)


def dynamic_selection(rank):
    # every position is a candidate
    fields = {"selection": "rigl", "reselect_every": 1, "accumulate": 1, "replace_rate": 0.5, "candidates": 5.0}
    for wrap in WRAPPINGS.values():
        alone, model = adapted(**fields), wrap(adapted(**fields))
        before = gathered(alone)
        runs = []
        for each, part in ((alone, X), (model, half(rank))):
            optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
            controller = SparsityController(each, optimizer, total_steps=4)
            for _ in range(4):
                each(part).square().mean().backward()
                optimizer.step()
                controller.step()
                optimizer.zero_grad()
            runs.append([layer.support("default").indices.tolist() for layer in tuner_layers(each)])
        assert runs[0] == runs[1]
        torch.testing.assert_close(model(X), alone(X), atol=1e-5, rtol=1e-4)
        assert bits_equal(own(model), before)


def padded(tensor):
    """Bytes of a tensor as two processes hold it."""
    return tensor.nbytes // max(len(tensor), 1) * (len(tensor) + len(tensor) % 2)


def counted_bytes(rank):
    """What is sent is what the formulas of plans say."""
    model = adapted()
    layers = list(tuner_layers(model))
    values = sum(padded(layer.deltas["default"].values) for layer in layers)
    parameters = dict(model.named_parameters())
    frozen = {name: padded(tensor) for name, tensor in parameters.items() if not tensor.requires_grad}
    blocks = sum(size for name, size in frozen.items() if ".blocks." in name)
    own = 0
    for layer in layers:
        support = layer.support("default")
        half_of_values, half_of_rows = -(-support.nnz // 2), -(-support.shape[0] // 2)
        held = torch.arange(support.nnz) // half_of_values
        own += 4 * int(((support.rows // half_of_rows != rank) & (held == rank)).sum())
    sharded(model)
    for _ in range(2):  # in the first pass, the outermost module gathers before the model writes
        with SentBytes() as count:
            model(half(rank)).square().mean().backward()
    run = DividedRun(values // 4, blocks, sum(frozen.values()) - blocks, own_bytes=own)
    found, expected = count.by_kind, step_traffic(run, "fsdp2", 2)
    assert found["allgather_base"] == expected.weights
    assert found["reduce_scatter_base"] == expected.gradients
    assert found["alltoall_base"] == expected.own_values

    for window in (1, 3):
        every = {"reselect_every": 3, "accumulate": window, "candidates": 2.0}
        model = adapted(selection="rigl" if window == 1 else "accumulated_gradient", **every)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        controller = SparsityController(model, optimizer, total_steps=9)
        with SentBytes() as count:
            for _ in range(3):
                model(half(rank)).square().mean().backward()
                optimizer.step()
                controller.step()
                optimizer.zero_grad()
        entries = [layer.support("default").nnz for layer in tuner_layers(model)]
        expected = sum(reselection_traffic(n, 2 * n, 2, window) for n in entries)
        # lengths and flags
        assert 0 <= sum(count.by_kind.values()) - expected < 100 * len(entries), (window, count.by_kind, expected)


def counted_bytes_of_ddp(rank):
    """Likewise of DDP, which also sends buffers, thus positions, before each pass if it is let."""
    for sends_buffers in (True, False):
        model = adapted()
        called = nn.parallel.DistributedDataParallel(model, broadcast_buffers=sends_buffers)
        for _ in range(3):  # the second step arranges the buckets anew
            with SentBytes() as count:
                called(half(rank)).square().mean().backward()
        run = DividedRun(sum(p.numel() for p in model.parameters() if p.requires_grad), 0)
        positions = sum(buffer.nbytes for buffer in model.buffers()) // 2 if sends_buffers else 0
        assert count.by_kind["allreduce"] == step_traffic(run, "ddp", 2).total
        assert count.by_kind["broadcast"] == positions


CHECKS = (
    the_gathered_weight_is_the_adapted_one,
    steps,
    passes_of_several_kinds_before_one_backward,
    switching_and_merging,
    state_dicts,
    half_precision,
    prefetching,
    disabled_before_the_first_pass,
    adapters_that_come_later,
    dynamic_selection,
    counted_bytes,
    counted_bytes_of_ddp,
)


def process(rank, address, checks, results):
    with process_group(rank, address):
        for check in checks:
            check(rank)
            results[rank] = check.__name__


def test_two_processes_compute_what_one_does(tmp_path):
    with Manager() as manager:
        results = manager.dict()
        run_on_two(process, tmp_path / "rendezvous", CHECKS, results)
        assert dict(results) == {0: CHECKS[-1].__name__, 1: CHECKS[-1].__name__}

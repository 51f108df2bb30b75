"""Tensor parallelism on two processes, against one process with the same weights and batches, in float64."""

from multiprocessing import Manager

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from sparse_peft import S2FTConfig, SaRAConfig, SparseConfig, SparsityController, base_weights, select_support
from sparse_peft.planning import DividedRun, step_traffic
from sparse_peft.tuners.traversal import tuner_layers
from tests.helpers.processes import process_group, run_on_two
from tests.helpers.sent_bytes import SentBytes

pytestmark = pytest.mark.distributed

IDS = torch.randint(0, 31, (4, 7), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
STATIC = {
    "random": lambda: SparseConfig(selection="random", density=0.1, target_modules=TARGETS),
    "magnitude": lambda: SparseConfig(selection="magnitude", density=0.1, target_modules=TARGETS),
    "blocks": lambda: SparseConfig(selection="magnitude", density=0.1, block_size=(2, 3), target_modules=TARGETS[:6]),
    "smallest": lambda: SaRAConfig(density=0.1, target_modules=TARGETS, nuclear_min_size=4),
    "channels": lambda: S2FTConfig(ratio=0.3, target_modules=TARGETS[:-1]),
    "largest channels": lambda: S2FTConfig(ratio=0.3, selection="weight", target_modules=TARGETS[:-1]),
}
DATA = ("gradient", "fisher", "gallop", "wanda", "movement")
MOVING = {
    "rigl": {"accumulate": 1},
    "accumulated_gradient": {"accumulate": 2},
    "momentum": {"accumulate": 2},
    "principal": {"accumulate": 0, "principal_rank": 3},
}


def make(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 27, "num_attention_heads": 4, "num_key_value_heads": 2}
    biases = {"attention_bias": True, "mlp_bias": True}
    config = LlamaConfig(vocab_size=31, num_hidden_layers=2, tie_word_embeddings=False, **sizes, **biases)
    model = LlamaForCausalLM(config).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


class Pair:
    """The same model, divided and whole."""

    def __init__(self, folder, config=None, dtype=torch.float64, **fields):
        self.divided = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, distributed_config=DistributedConfig(tp_plan="auto")
        )
        for parameter in self.divided.parameters():
            if isinstance(parameter, DTensor):
                # on a GPU each part has memory of its own, on a CPU it is a view of the whole
                parameter._local_tensor = parameter._local_tensor.clone()
        self.whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if config is not None:
            self.models = get_peft_model(self.divided, config(**fields)), get_peft_model(self.whole, config(**fields))
            for model in self.models:
                model.train()
                # draws of the two models must not differ
                generator = torch.Generator().manual_seed(5)
                for layer in tuner_layers(model):
                    for state in layer.deltas.values():
                        values = torch.randn(state.values.numel(), generator=generator, dtype=torch.float64)
                        state.values.data.copy_(values * 0.1)

    def same(self, act, **tolerance):
        found, expected = (act(model) for model in self.models)
        torch.testing.assert_close(found, expected, **tolerance)
        return found


def logits(model, **kwargs):
    return model(IDS, **kwargs).logits


def loss(model, ids=IDS):
    return torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())


def states(model):
    return {f"{layer.name}.{name}": s for layer in tuner_layers(model) for name, s in layer.deltas.items()}


def gradients(model):
    model.zero_grad()
    loss(model).backward()
    return {name: state.values.grad for name, state in states(model).items()}


def positions(model):
    return {name: state.support.indices.tolist() for name, state in states(model).items()}


def bits(model):
    with base_weights(model):
        return [layer.base_parameter.clone() for layer in tuner_layers(model)]


# ---------------------------------------------------------------------- what the processes check


def forward_and_gradients(folder):
    for name, config in STATIC.items():
        pair = Pair(folder, config)
        assert positions(pair.models[0]) == positions(pair.models[1]), name
        pair.same(gradients)
        with torch.no_grad():
            pair.same(logits)
        assert all(layer.path() == "resident" for layer in tuner_layers(pair.models[0]))


def other_paths(folder):
    """Overlay, checkpointing, and passes without the adapter before the backward pass of one with it."""

    def both_ways(model):
        model.zero_grad()
        total = loss(model)
        with model.disable_adapter():
            embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
            total = total + model(inputs_embeds=embedded).logits.square().mean()
        total.backward()
        return {**{name: state.values.grad for name, state in states(model).items()}, "input": embedded.grad}

    pair = Pair(folder, lambda: SparseConfig(density=0.1, target_modules=TARGETS, resident=False))
    pair.same(gradients)
    pair = Pair(folder, STATIC["random"])
    pair.same(both_ways)
    for model in pair.models:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pair.same(gradients)


def several_adapters(folder):
    pair = Pair(folder, STATIC["random"])
    for model in pair.models:
        model.add_adapter("other", SparseConfig(density=0.2, seed=1, target_modules=TARGETS, scale=1.0))
        for name, state in states(model).items():
            if name.endswith("other"):
                state.values.data.fill_(0.02)
        model.base_model.set_adapter(["default", "other"])
    pair.same(gradients)
    with torch.no_grad():
        for names in (["default"], ["other"], ["default", "other"]):
            for model in pair.models:
                model.base_model.set_adapter(names)
            pair.same(logits)
        mixed = ["default", "other", "__base__", "default"]
        for model in pair.models:
            model.eval()
        pair.same(lambda model: logits(model, adapter_names=mixed))


def merging(folder):
    for config in STATIC.values():
        pair = Pair(folder, config)
        model = pair.models[0]
        before = bits(model)
        with torch.no_grad():
            adapted = pair.same(logits)
            for model in pair.models:
                model.merge_adapter()
            torch.testing.assert_close(pair.same(logits), adapted)
            for model in pair.models:
                model.unmerge_adapter()
            with pair.models[0].disable_adapter(), pair.models[1].disable_adapter():
                assert not torch.allclose(pair.same(logits), adapted)
        assert all(map(torch.equal, before, bits(pair.models[0])))
        with torch.no_grad():
            torch.testing.assert_close(pair.models[0].merge_and_unload()(IDS).logits, adapted)


def data_criteria(folder):
    def chosen(model, selection):
        config = SparseConfig(selection=selection, density=0.1, target_modules=TARGETS)
        found = select_support(model, config, [IDS, IDS.flip(1)], loss_fn=loss)
        return {name: support.indices.tolist() for name, support in found.supports.items()}

    pair = Pair(folder)
    for selection in DATA:
        assert chosen(pair.divided, selection) == chosen(pair.whole, selection), selection


def dynamic(folder):
    for selection, fields in MOVING.items():
        fields = {"selection": selection, "density": 0.1, "reselect_every": 2, "candidates": 10.0, **fields}
        pair = Pair(folder, SparseConfig, target_modules=TARGETS[:-1], **fields)
        before = positions(pair.models[0])
        runs = [train(model) for model in pair.models]
        for found, expected in zip(*runs, strict=True):
            assert found[0] == expected[0], selection
            torch.testing.assert_close(found[1], expected[1], msg=selection)
        assert positions(pair.models[0]) != before


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = SparsityController(model, optimizer, total_steps=8)
    seen = []
    for step in range(5):
        ids = IDS.roll(step, 1)
        loss(model, ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        seen.append((positions(model), {name: s.values.detach().clone() for name, s in states(model).items()}))
    return seen


def files(folder):
    rank = distributed.get_rank()
    for name, config in STATIC.items():
        pair = Pair(folder, config)
        paths = [folder / f"{name} {which} {rank}" for which in ("divided", "whole")]
        for model, path in zip(pair.models, paths, strict=True):
            model.save_pretrained(path)
        found, expected = (load_file(path / "adapter_model.safetensors") for path in paths)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), name
        # the file of either is loaded by the other
        other = Pair(folder)
        with torch.no_grad():
            wanted = pair.same(logits)
            for model, path in ((other.divided, paths[1]), (other.whole, paths[0])):
                torch.testing.assert_close(PeftModel.from_pretrained(model, path)(IDS).logits, wanted)


def half_precision(folder):
    pair = Pair(folder, STATIC["random"], dtype=torch.bfloat16)
    pair.same(gradients, atol=2e-2, rtol=0.1)
    before = bits(pair.models[0])
    with torch.no_grad():
        logits(pair.models[0])
    assert all(map(torch.equal, before, bits(pair.models[0])))


def counted_bytes(folder):
    """What is sent is what the formula of plans says, of the blocks."""
    pair = Pair(folder, lambda: SparseConfig(density=0.1, target_modules=TARGETS[:-1]), dtype=torch.float32)
    model = pair.models[0]
    embedded = torch.randn(4, 7, 16).requires_grad_()
    with SentBytes() as count:
        model.get_base_model().model(inputs_embeds=embedded).last_hidden_state.square().mean().backward()
    trained = sum(state.values.numel() for state in states(model).values())
    run = DividedRun(trained, 0, activation_bytes=embedded.nbytes, blocks=2)
    assert count.by_kind == {"allreduce": step_traffic(run, "tp", 2).total}


def refusals(folder):
    pair = Pair(folder)
    with pytest.raises(
        NotImplementedError, match=r"model.embed_tokens: tensor parallelism.*SparseModel needs it whole"
    ):
        get_peft_model(pair.divided, SparseConfig(target_modules=["embed_tokens"]))
    pair = Pair(folder)
    with pytest.raises(NotImplementedError, match=r"bias='all': tensor parallelism \(tp_plan\) divides the biases"):
        get_peft_model(pair.divided, SparseConfig(target_modules=TARGETS, bias="all"))
    pair = Pair(folder)
    pair.divided.tp_plan = {**pair.divided.tp_plan, "model.layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(NotImplementedError, match=r"up_proj has the tensor-parallel style 'packed_colwise'; adapters"):
        get_peft_model(pair.divided, SparseConfig(target_modules=TARGETS))
    pair = Pair(folder, STATIC["random"])
    pair.models[0].merge_adapter()
    with pytest.raises(RuntimeError, match="cannot be moved or cast then; unmerge_adapter"):
        pair.models[0].to(torch.float32)


CHECKS = (
    forward_and_gradients,
    other_paths,
    several_adapters,
    merging,
    data_criteria,
    dynamic,
    files,
    half_precision,
    counted_bytes,
    refusals,
)


def process(rank, address, folder, results):
    with process_group(rank, address):
        disable_progress_bar()
        for check in CHECKS:
            check(folder)
            results[rank] = check.__name__


def test_two_processes_compute_what_one_does(tmp_path):
    make(tmp_path)
    with Manager() as manager:
        results = manager.dict()
        run_on_two(process, tmp_path / "rendezvous", tmp_path, results)
        assert dict(results) == {0: CHECKS[-1].__name__, 1: CHECKS[-1].__name__}

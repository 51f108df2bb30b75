"""The table of docs/parallel.md, cell by cell, on two processes."""

import os
import re
from functools import partial
from multiprocessing import Manager
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from sparse_peft import (
    MonarchConfig,
    PruneConfig,
    S2FTConfig,
    SaRAConfig,
    SketchConfig,
    SLTrainConfig,
    SnellaConfig,
    SoRAConfig,
    SparseConfig,
    SparseIFTConfig,
    SparsityController,
    SSTConfig,
    base_weights,
)
from sparse_peft.dynamics.full_tensor import full_tensor
from sparse_peft.tuners.traversal import tuner_layers
from tests.helpers.processes import process_group, run_on, run_on_two

pytestmark = pytest.mark.distributed

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"
IDS = torch.arange(24).view(4, 6) % 31
COLUMNS = ("static", "dynamic", "merge", "mixed batch", "save")
TESTED, NOTHING = "tested", "none"
REGROWTH = {"selection": "rigl", "reselect_every": 1, "replace_rate": 0.5}
METHODS = {
    "SparseConfig": (partial(SparseConfig, density=0.1), REGROWTH),
    "SaRAConfig": (partial(SaRAConfig, density=0.1), {"progressive": 1}),
    "S2FTConfig": (partial(S2FTConfig, ratio=0.3), None),
    "SLTrainConfig": (partial(SLTrainConfig, r=2, density=0.1), REGROWTH),
    "SoRAConfig": (partial(SoRAConfig, r=2), {"penalty": 4.0, "prox_start": 0}),
    "SnellaConfig": (
        partial(SnellaConfig, r=2, init_weights=False),
        {"target_sparsity": 0.5, "allocate_start": 0, "allocate_every": 1},
    ),
    "SketchConfig": (partial(SketchConfig, bits=2), None),
    "MonarchConfig": (partial(MonarchConfig, nblocks=2, blk_r=2), None),
    "SSTConfig": (partial(SSTConfig, r=2), {"resample_every": 1, "draws_per_round": 1}),
    "SparseIFTConfig": (partial(SparseIFTConfig, r=2), {"reselect_every": 1, "reselect_stop": 1.0}),
    "PruneConfig": (partial(PruneConfig, r=2), {"recipe": "pst", "start": 0, "stop": 2, "mask_every": 1}),
}


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 26, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, num_hidden_layers=1, tie_word_embeddings=False, **sizes))


def adapted(model, method, dynamic=False):
    make, fields = METHODS[method]
    config = make(target_modules="all-linear", **(fields or {}) if dynamic else {})
    return get_peft_model(model, config)


# ---------------------------------------------------------------------- wrappers: (folder, method, dynamic) -> model


def ddp(folder, method, dynamic):
    model = adapted(base(), method, dynamic)
    return model, nn.parallel.DistributedDataParallel(model)


def fsdp2(folder, method, dynamic):
    model = adapted(base(), method, dynamic)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    return model, fully_shard(model, mesh=mesh)


def fsdp2_before(folder, method, dynamic):
    model = base()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    model = adapted(model, method, dynamic)
    return model, model


def fsdp1(folder, method, dynamic):
    model = adapted(base(), method, dynamic)
    return model, FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def tensor_parallel(folder, method, dynamic):
    loaded = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    model = adapted(loaded, method, dynamic)
    return model, model


WRAPPERS = {
    "DDP": ddp,
    "FSDP2, after the adapter": fsdp2,
    "FSDP2, before the adapter": fsdp2_before,
    "FSDP1": fsdp1,
    "tensor parallel (`tp_plan`)": tensor_parallel,
}


# ---------------------------------------------------------------------- columns


def loss(called):
    logits = called(IDS).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), IDS.flatten())


def train(model, called):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = SparsityController(called, optimizer, total_steps=2)
    losses = []
    for _ in range(2):
        losses.append(loss(called))
        losses[-1].backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach()


class Cells:
    """The columns of one line; each begins where the one before ended."""

    def __init__(self, make, method):
        self.make, self.method = make, method
        self.alone = adapted(base(), method).train()
        self.ready = False

    def train(self, model, called):
        return train(model, called)

    def static(self):
        """Losses and values equal to those of one process."""
        self.model, self.called = self.make(False)
        found = self.train(self.model.train(), self.called)
        torch.testing.assert_close(found, train(self.alone, self.alone), atol=1e-4, rtol=1e-4)
        assert found[1] != found[0]
        self.ready = True

    def dynamic(self):
        model, called = self.make(True)
        alone = adapted(base(), self.method, True).train()
        torch.testing.assert_close(self.train(model.train(), called), train(alone, alone), atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def save(self):
        """The file is that of one process: its positions to the bit, its values up to rounding."""
        found, expected = saved(self.model, self.called), get_peft_model_state_dict(self.alone)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)

    @torch.no_grad()
    def mixed_batch(self):
        self.model.eval()
        expected = self.called(IDS).logits
        with self.model.disable_adapter():
            expected[::2] = self.called(IDS).logits[::2]
        found = self.called(IDS, adapter_names=["__base__", "default"] * 2).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def merge(self):
        weights = [layer.base_parameter for layer in tuner_layers(self.model)]
        with base_weights(self.model):
            before = [full_tensor(weight).clone() for weight in weights]
        expected = self.called(IDS).logits
        self.model.merge_adapter()
        torch.testing.assert_close(self.called(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        self.model.unmerge_adapter()
        with base_weights(self.model):
            assert all(map(torch.equal, before, map(full_tensor, weights)))


def saved(model, called):
    if not isinstance(called, FullyShardedDataParallel):
        state = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
        return get_peft_model_state_dict(model, state_dict=state)
    with FullyShardedDataParallel.summon_full_params(called):
        return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def cells_of(cells):
    """``{column: "tested", an error or none}``."""
    found, error = {}, None
    for column in ("static", "dynamic", "save", "mixed batch", "merge"):
        if column == "dynamic" and METHODS[cells.method][1] is None:
            found[column] = NOTHING
            continue
        try:
            if column not in ("static", "dynamic") and not cells.ready:
                raise error  # the line's first
            getattr(cells, column.replace(" ", "_"))()
            found[column] = TESTED
        except Exception as raised:
            error = error or raised
            found[column] = f"{type(raised).__name__}: {raised}"
    return found


def process(rank, address, folder, results):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with process_group(rank, address):
        disable_progress_bar()
        results[rank] = {
            (wrapper, method): cells_of(Cells(partial(make, folder, method), method))
            for wrapper, make in WRAPPERS.items()
            for method in METHODS
        }


def expected_cells(wrappers):
    """``{(wrapper, method): {column: cell}}`` of the page, and its numbered errors."""
    text = PAGE.read_text()
    errors = dict(re.findall(r"^(\d+)\. > (.+)$", text, re.MULTILINE))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    found = {}
    for wrapper, methods, *row in lines:
        if wrapper in wrappers:
            for method in methods.replace("`", "").split(", "):
                found[wrapper, method] = dict(zip(COLUMNS, row, strict=True))
    assert set(found) == {(wrapper, method) for wrapper in wrappers for method in METHODS}
    return found, errors


def assert_as_said(wrappers, first, second):
    """Compare what happened in both processes with the page."""
    expected, errors = expected_cells(wrappers)
    assert first == second
    wrong = {}
    for line, row in expected.items():
        for column, cell in row.items():
            number = re.fullmatch(r"refused \((\d+)\)", cell)
            parts = [re.escape(part) for part in errors[number[1]].split("…")] if number else [re.escape(cell)]
            if not re.search(".*".join(parts), found := first[line][column], re.DOTALL):
                wrong[line, column] = cell, found
    assert not wrong


MESH = "tensor parallel with FSDP2"


def on_a_mesh(rank, address, folder, results):
    """Transformers divides a weight among four processes, in two ways, while it loads it."""
    with process_group(rank, address, size=4):
        disable_progress_bar()
        found = {}
        plan = DistributedConfig(tp_size=2, fsdp_size=2, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan)
        for method, (_, fields) in METHODS.items():
            with pytest.raises(NotImplementedError) as error:
                adapted(model, method)
            row = dict.fromkeys(COLUMNS, str(error.value))
            found[MESH, method] = row if fields is not None else {**row, "dynamic": NOTHING}
        results[rank] = found


def test_a_mesh_of_two_dimensions_is_refused(tmp_path):
    base().save_pretrained(tmp_path / "base")
    with Manager() as manager:
        results = manager.dict()
        run_on(4, on_a_mesh, tmp_path / "rendezvous", tmp_path / "base", results)
        assert_as_said([MESH], results[0], results[3])


def test_the_table_says_what_happens(tmp_path):
    base().save_pretrained(tmp_path / "base")
    with Manager() as manager:
        results = manager.dict()
        run_on_two(process, tmp_path / "rendezvous", tmp_path / "base", results)
        assert_as_said(WRAPPERS, results[0], results[1])

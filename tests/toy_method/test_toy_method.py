"""A method needs its folder and nothing else: the toy method does what the package's own methods do."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from transformers import LlamaForCausalLM

import sparse_peft
from sparse_peft import SparseConfig, SparsityController
from sparse_peft.adapters import compare, compose, export, save_as_lora, save_as_sparse, summarise
from sparse_peft.planning import PlanOptions, plan_training
from sparse_peft.registry import method_named, method_of
from sparse_peft.report import plot_report, read_history
from sparse_peft.structure import read_model_config
from tests.helpers.processes import run_code
from tests.helpers.training_loop import batch_at, optimizer_of, train
from tests.helpers.two_layers import TwoLayers
from tests.peft_suite.cases import CASES
from tests.toy_method import METHOD, BandConfig, BandModel

ROOT = Path(__file__).parents[2]
STEPS = 7


def base():
    torch.manual_seed(3)
    return TwoLayers()


def banded(**fields):
    fields = {"target_modules": ["first", "second"], "width": 3, **fields}
    return get_peft_model(base(), BandConfig(**fields))


def trained(**fields):
    model = banded(**fields)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer)
    train(model, optimizer, controller, range(STEPS))
    return model, controller


def saved(folder, **fields):
    model, _ = trained(**fields)
    model.save_pretrained(folder)
    return folder, model.eval()


def loaded(folder):
    return PeftModel.from_pretrained(base(), folder).eval()


def outputs(model):
    with torch.no_grad():
        return model(batch_at(0)[0])


def layers_of(model):
    return {layer.name: layer for layer in BandModel.sparse_layers(model)}


def test_no_other_file_knows_the_method():
    names = ("toy_method", "toy_move", "TOY_BAND", "BandConfig", "BandModel")
    folders = [ROOT / "sparse_peft", ROOT / "tests"]
    files = [path for folder in folders for path in folder.rglob("*.py*") if path.suffix in (".py", ".pyi")]
    files += [ROOT / "pyproject.toml", ROOT / "Makefile"]
    others = [path for path in files if Path(__file__).parent not in path.parents]
    assert len(others) > 200
    assert not [path for path in others if any(name in path.read_text() for name in names)]


def test_it_is_registered_and_peft_makes_it():
    assert method_named("band") is method_of(BandConfig()) is METHOD
    assert METHOD.prefix == "toy_band_" and BandConfig().peft_type is PeftType.TOY_BAND
    assert "BandConfig" not in sparse_peft.__all__
    model = banded()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {f"base_model.model.{n}.toy_band_adapter.default.values" for n in ("first", "second")}


def test_only_the_band_trains_and_it_moves():
    model, controller = trained(move_every=3)
    records = controller.history
    assert [record.step for record in records] == [3, 6] and [record.moves for record in records] == [1, 2]
    for name, layer in layers_of(model).items():
        rows, cols = layer.stored_shape
        delta = layer.get_delta_weight("default")
        assert (delta != 0).sum() <= 3 * rows
        first = records[-1].layers[name]
        assert first == int(layer.deltas["default"].first) == (records[0].layers[name] + 1) % cols
        row = torch.arange(rows)
        outside = torch.ones(rows, cols, dtype=torch.bool)
        for n in range(3):
            outside[row, (row + first + n) % cols] = False
        assert not delta[outside].any() and delta[~outside].any()


def test_its_history_is_drawn_and_kept(tmp_path):
    pytest.importorskip("matplotlib")
    model, controller = trained(move_every=2)
    files = plot_report(model, controller.history, tmp_path)
    assert [file.name for file in files] == ["moves.png", "supports.png", "sparsity_history.json"]
    assert read_history(tmp_path) == controller.history


def test_training_without_a_controller_warns():
    model = banded(move_every=3)
    optimizer = optimizer_of(model)
    model(batch_at(0)[0]).sum().backward()
    with pytest.warns(UserWarning, match="nothing moves its bands"):
        optimizer.step()


def test_a_resumed_run_with_its_record_is_the_uninterrupted_one(tmp_path):
    model, controller = trained(move_every=2)
    first = banded(move_every=2)
    optimizer = optimizer_of(first)
    train(first, optimizer, SparsityController(first, optimizer), range(3))
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    second = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    resumed = SparsityController(second, optimizer)
    train(second, optimizer, resumed, range(3, STEPS))
    assert torch.equal(outputs(second), outputs(model))
    assert resumed.history == controller.history and len(resumed.history) == 3
    assert resumed.history[-1].logs() == {"sparsity/moves": 3.0}


def test_it_is_saved_loaded_and_merged(tmp_path):
    folder, model = saved(tmp_path)
    again = loaded(folder)
    expected = outputs(model)
    assert not torch.equal(expected, outputs(base()))
    assert torch.equal(outputs(again), expected)
    again.merge_adapter()
    torch.testing.assert_close(outputs(again), expected)
    again.unmerge_adapter()
    assert torch.equal(outputs(again.unload()), outputs(base()))
    torch.testing.assert_close(outputs(model.merge_and_unload()), expected)


def test_adapters_of_one_band_are_composed_to_one_of_their_kind(tmp_path):
    folders = [saved(tmp_path / str(n), width=3, init_weights=n == 0)[0] for n in range(2)]
    config = compose(folders, tmp_path / "both", weights=[1.0, -0.5])
    assert type(config) is BandConfig
    deltas = [layers_of(loaded(folder)) for folder in (*folders, tmp_path / "both")]
    for name in deltas[0]:
        one, two, both = (found[name].get_delta_weight("default") for found in deltas)
        torch.testing.assert_close(both, one - 0.5 * two)


def test_adapters_of_other_bands_and_methods_are_composed_to_a_sparse_delta(tmp_path):
    folders = [saved(tmp_path / str(n), seed=n)[0] for n in range(2)]
    model = get_peft_model(base(), SparseConfig(target_modules=["first"], density=0.2, init_weights=False))
    model.save_pretrained(tmp_path / "sparse")
    config = compose([*folders, tmp_path / "sparse"], tmp_path / "all")
    assert type(config) is SparseConfig
    expected = base()
    for folder in (*folders, tmp_path / "sparse"):
        expected = PeftModel.from_pretrained(expected, folder).merge_and_unload()
    torch.testing.assert_close(outputs(loaded(tmp_path / "all")), outputs(expected))


def test_it_is_exported_merged_sparse_and_as_lora(tmp_path):
    _, model = saved(tmp_path / "adapter", width=1)
    expected = outputs(model)
    save_as_sparse(model, tmp_path / "sparse")
    assert torch.equal(outputs(loaded(tmp_path / "sparse")), expected)
    save_as_lora(model, tmp_path / "lora")
    torch.testing.assert_close(outputs(loaded(tmp_path / "lora")), expected)


def test_a_language_model_is_planned_adapted_and_exported(world, tmp_path):
    config = {"target_modules": "all-linear", "width": 2}
    plan = plan_training(read_model_config(world / "base"), BandConfig(**config), PlanOptions(flops=1e12))
    assert plan.method == "band"
    model = get_peft_model(LlamaForCausalLM.from_pretrained(world / "base"), BandConfig(**config, init_weights=False))
    layers = layers_of(model)
    assert plan.needs[0].trained == sum(2 * layer.stored_shape[0] for layer in layers.values())
    model.save_pretrained(tmp_path / "adapter")
    assert {layer.layer for layer in summarise(tmp_path / "adapter").layers} == set(layers)
    assert compare(tmp_path / "adapter", tmp_path / "adapter").layers
    export(tmp_path / "adapter", tmp_path / "merged", base=world / "base")
    merged, tokens = LlamaForCausalLM.from_pretrained(tmp_path / "merged"), torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, model.eval()(tokens).logits)


def test_the_command_line_lists_it_and_plans_it(world):
    pytest.importorskip("typer")
    code = "import sys, tests.toy_method\nfrom sparse_peft.cli import main\nsys.argv[1:] = {!r}\nmain()"
    said = run_code(code.format(["plan", "--help"]), env={"COLUMNS": "200"})
    assert said.returncode == 0 and "band" in said.stdout
    said = run_code(code.format(["doctor", "--json"]))
    assert "BandConfig as TOY_BAND" in said.stdout
    arguments = ["plan", str(world / "base"), "--method", "band", "--set", "width=3", "--flops", "1e12", "--json"]
    said = run_code(code.format([*arguments, "--target-modules", "all-linear"]))
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["method"] == "band"
    assert "band" in run_code(code.format(["plan", str(world / "base"), "--method", "bnad"])).stderr


def test_pefts_own_suite_runs_it():
    assert "band" in [case.name for case in CASES]

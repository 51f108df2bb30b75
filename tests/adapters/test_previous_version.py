"""Adapters that version 0.1.0 saved (`tests/data/adapters_0.1/make.py`): they load, compute and save as they did."""

import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

import sparse_peft  # noqa: F401

FOLDER = Path(__file__).parents[1] / "data" / "adapters_0.1"
MADE = runpy.run_path(str(FOLDER / "make.py"))
CASES = MADE["CASES"]


def load(name):
    with safe_open(FOLDER / name / "expected.safetensors", "pt") as file:
        base = MADE["Base"](int(file.metadata()["seed"]))
    return PeftModel.from_pretrained(base, FOLDER / name).eval()


def assert_same(got, want, exact):
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


def test_every_folder_is_a_case():
    assert CASES.keys() == {path.name for path in FOLDER.iterdir() if (path / "adapter_config.json").exists()}


@pytest.mark.parametrize("name", CASES)
def test_output_and_merged_weights_are_those_of_the_version(name):
    expected, case = load_file(FOLDER / name / "expected.safetensors"), CASES[name]
    model = load(name)
    with torch.no_grad():
        assert_same(model(expected["x"]), expected["output"], case.exact)
    merged = model.merge_and_unload()
    for layer in case.targets:
        assert_same(merged.get_submodule(layer).weight, expected[f"merged.{layer}"], case.exact)


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_adapter_is_saved_as_it_was(name, tmp_path):
    load(name).save_pretrained(tmp_path)
    for path in (FOLDER / name).glob("*.safetensors"):
        if path.name == "expected.safetensors":
            continue
        before, after = load_file(path), load_file(tmp_path / path.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)

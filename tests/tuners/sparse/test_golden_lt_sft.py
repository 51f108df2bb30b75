"""Extraction and a second training against LT-SFT's LotteryTicketSparseFineTuner."""

import torch
from peft import PeftModel

from sparse_peft import SparseConfig
from sparse_peft.adapters import extract
from tests.helpers.golden import LAYERS, Toy, adapted, agree, agree_all, parameter, positions, read, train, under

TOLERANCE = 1e-4
NUMBERS = read("lt_sft")


def toy():
    return Toy(under(NUMBERS, "base"))


def start(folder):
    """The adapter that LT-SFT's first phase leaves: its positions, with values of zero."""
    full = Toy({name: tensor for name, tensor in under(NUMBERS, "full").items() if name.endswith(".weight")})
    extract(toy(), full, folder, num_params=int(NUMBERS["number"]), allocation="global", target_modules=list(LAYERS))
    model = PeftModel.from_pretrained(toy(), folder, is_trainable=True)
    for layer in LAYERS:
        changes = NUMBERS[f"full.{layer}.weight"] - NUMBERS[f"base.{layer}.weight"]
        values = parameter(model, layer)
        agree(f"extracted values of {layer}", values, changes.flatten()[positions(model, layer).long()], TOLERANCE)
        values.data.zero_()
    return model


def test_mask(tmp_path):
    model = start(tmp_path)
    for layer in LAYERS:
        agree(f"positions of {layer}", positions(model, layer), NUMBERS[f"mask.{layer}.positions"], 0)


def test_20_steps(tmp_path):
    model = start(tmp_path)
    optimizer = torch.optim.AdamW([parameter(model, layer) for layer in LAYERS], lr=2e-3, weight_decay=0)

    def ours(layer, name):
        values = parameter(model, layer)
        return values.grad if name == "grad" else values

    steps = train(model, NUMBERS, optimizer, TOLERANCE)
    assert sum(agree_all(NUMBERS, f"step{step:02}", ours, TOLERANCE) for step in steps) == 4 * 2 + 2


def test_the_first_phase(tmp_path):
    """Full fine-tuning, as a delta of all entries."""
    config = SparseConfig(density=1.0, scale=1.0, target_modules=list(LAYERS))
    model = adapted(toy, config, {}, tmp_path)
    optimizer = torch.optim.AdamW([parameter(model, layer) for layer in LAYERS], lr=2e-3, weight_decay=0)
    full = under(NUMBERS, "full")
    assert len(list(train(model, full, optimizer, TOLERANCE))) == 20
    dense = model.merge_and_unload()
    for layer in LAYERS:
        agree(f"weight of {layer}", dense.get_submodule(layer).weight, full[f"{layer}.weight"], TOLERANCE)

"""Checkpoints in the layouts of the methods' authors, with numbers that their own code computed."""

import json
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_peft import build_for_pretraining
from sparse_peft.adapters import convert, convert_sltrain, sketchtune_config
from tests.helpers.golden import LAYERS, Toy, read, under

# ------------------------------------------------------------------ SaRA: weights below a threshold, by number

SARA = read("sara")


def sara_base():
    return Toy(under(SARA, "base"))


def sara_file(path, changes=None):
    """After 20 steps of the authors' optimizer."""
    weights = {number: SARA[f"nuclear0.step20.{layer}.weights"] for number, layer in enumerate(LAYERS)}
    torch.save({"threshold": 1.2e-2, **weights, **(changes or {})}, path)
    return path


def test_sara_in(tmp_path):
    config = convert(sara_file(tmp_path / "sara.ckpt"), tmp_path / "new", base=sara_base())
    merged = PeftModel.from_pretrained(sara_base(), tmp_path / "new").merge_and_unload()
    assert config.num_entries == {layer: SARA[f"positions.{layer}"].numel() for layer in LAYERS}
    for layer in LAYERS:
        expected = SARA[f"base.{layer}.weight"].clone()
        expected.view(-1)[SARA[f"positions.{layer}"].long()] = SARA[f"nuclear0.step20.{layer}.weights"]
        torch.testing.assert_close(merged.get_submodule(layer).weight.data, expected, rtol=0, atol=1e-8)


def test_sara_with_convolutions_norms_and_no_threshold(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(24, 5))

    limit, trained = 0.1, base()
    content = {}
    with torch.no_grad():
        for number, parameter in enumerate(trained.parameters()):
            mask = parameter.abs() < limit
            parameter[mask] += 0.01 * torch.randn(int(mask.sum()))
            content[number] = parameter[mask].clone()
    torch.save(content, tmp_path / "sara.pth")
    with pytest.raises(ValueError, match=r"threshold=None: it says which weights were trained"):
        convert(tmp_path / "sara.pth", tmp_path / "new", base=base())
    with pytest.raises(ValueError, match=r"changes more than linear layers, such as 0.bias"):
        convert(tmp_path / "sara.pth", tmp_path / "new", base=base(), threshold=limit)
    convert(tmp_path / "sara.pth", tmp_path / "new", base=base(), threshold=limit, others="save")
    x = torch.randn(2, 3, 4, 4)
    model = PeftModel.from_pretrained(base(), tmp_path / "new")
    torch.testing.assert_close(model(x), trained(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(base()(x), trained(x), atol=1e-3)


@pytest.mark.parametrize("changes, message", [
    ({0: torch.ones(3)}, r"fc1.weight: \(3,\) in the file, and 717 weights of the base model are below 0.012"),
    ({2: torch.ones(3)}, "3 parameters in the file and 2 in the base model; pass the module whose parameters"),
    ({1: torch.full((116,), torch.nan)}, "fc2.*NaN|fc2.*finite"),
    ({"threshold": "1"}, "threshold='1': it says which weights were trained"),
])  # fmt: skip
def test_damaged_sara_files(tmp_path, changes, message):
    path = sara_file(tmp_path / "sara.ckpt", changes)
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "new", base=sara_base())
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------ SLTrain: factors and entries in place of weights

SLTRAIN = read("sltrain")
THEIRS = {"A": "lora_A", "B": "lora_B", "values": "sparse_value", "positions": "sparse_index", "scale": "scaling"}


def sltrain_folder(folder, tensors, **changes):
    folder.mkdir()
    config = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "sp_ratio": 0.1, "target_modules": ["fc"]}
    (folder / "splora_config.json").write_text(json.dumps(config | changes))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def sltrain_tensors(case):
    """After 20 steps of the authors' model; positions do not change."""
    found = {}
    for layer in LAYERS:
        numbers = under(SLTRAIN, case, "init", layer) | under(SLTRAIN, case, "step20", layer)
        found |= {f"{layer}.{THEIRS[name]}": t for name, t in numbers.items() if name in THEIRS}
        found[f"{layer}.sparse_index"] = found[f"{layer}.sparse_index"].long()
    return found


@pytest.mark.parametrize("case", ["fixed", "trainable_scale"])
def test_sltrain_in(tmp_path, case):
    source = sltrain_folder(tmp_path / "theirs", sltrain_tensors(case))
    config = convert_sltrain(source, tmp_path / "new")
    assert config.trainable_scale == (case == "trainable_scale")
    zeros = {"fc1.weight": torch.zeros(32, 20), "fc2.weight": torch.zeros(20, 32)}  # which are dropped
    model = PeftModel.from_pretrained(Toy(zeros), tmp_path / "new", is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(model(SLTRAIN["probe.x"]), SLTRAIN[f"{case}.final.output"], rtol=1e-5, atol=1e-5)


def test_a_whole_language_model_of_sltrain(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = LlamaConfig(vocab_size=64, **sizes)
    torch.manual_seed(0)
    dense = LlamaForCausalLM(llama).eval()
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, parameter in dense.state_dict().items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            tensors[name] = parameter
            continue
        rows, cols = parameter.shape
        down, up = torch.randn(4, cols, generator=generator), torch.randn(rows, 4, generator=generator)
        flat = torch.randperm(rows * cols, generator=generator)[:40]  # theirs are sorted; nothing depends on it
        values = torch.randn(40, generator=generator)
        parameter.copy_((2 * up @ down).view(-1).index_add(0, flat, values).view(rows, cols))
        own = {"lora_A": down, "lora_B": up, "sparse_index": flat, "sparse_value": values}
        tensors |= {f"{layer}.{part}": tensor for part, tensor in own.items()}
    source = sltrain_folder(tmp_path / "theirs", tensors)
    llama.save_pretrained(source)
    config = convert_sltrain(source, tmp_path / "new")
    assert config.task_type == "CAUSAL_LM"
    model = build_for_pretraining(llama, config)
    model.load_adapter(tmp_path / "new", "default", is_trainable=True)
    x = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x).logits, dense(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left_out, message", [
    ("fc2.sparse_index", "layer fc2 has no sparse_index"),
    ("fc1.lora_B", "layer fc1 has no lora_B"),
])  # fmt: skip
def test_damaged_models_of_sltrain(tmp_path, left_out, message):
    tensors = sltrain_tensors("fixed")
    del tensors[left_out]
    with pytest.raises(ValueError, match=message):
        convert_sltrain(sltrain_folder(tmp_path / "theirs", tensors), tmp_path / "new")
    with pytest.raises(ValueError, match=r"r=5 in splora_config.json, and factors of another rank"):
        convert_sltrain(sltrain_folder(tmp_path / "other", sltrain_tensors("fixed"), r=5), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------ SketchTune: pickled tables and codes

SKETCH = read("sketch")
CASES = {"b4g1": 1, "b4g2": 2, "b3g2": 2, "b2g4": 4}


def sketch_content(case):
    """``{layer: (tables, codes)}`` as the authors pickle them."""
    content = {}
    for layer in LAYERS:
        tables, codes = SKETCH[f"{case}.init.{layer}.tables"], SKETCH[f"{case}.init.{layer}.codes"].to(torch.uint8)
        rows, cols = codes.shape
        packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).view(rows, CASES[case], cols // CASES[case] // 2)
        content[layer] = (tables, packed) if CASES[case] > 1 else (tables[:, 0], packed[:, 0])
    return content


def pickled(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize("case", CASES)
def test_sketches_in(tmp_path, case):
    source = pickled(tmp_path / "sketch.pkl", sketch_content(case))
    zeros = {f"{layer}.weight": torch.zeros_like(SKETCH[f"{case}.base.{layer}.weight"]) for layer in LAYERS}
    model = get_peft_model(Toy(zeros), sketchtune_config(source))
    dense = model.merge_and_unload()
    for layer in LAYERS:
        assert torch.equal(dense.get_submodule(layer).weight, SKETCH[f"{case}.base.{layer}.weight"])


def test_trained_tables_of_a_sketch(tmp_path):
    case = "b3g2"
    source = pickled(tmp_path / "sketch.pkl", sketch_content(case))
    trained = {layer: nn.Parameter(SKETCH[f"{case}.step20.{layer}.tables"]) for layer in LAYERS}
    config = sketchtune_config(source, pickled(tmp_path / "sketched_params.pkl", trained))
    zeros = {f"{layer}.weight": torch.zeros_like(SKETCH[f"{case}.base.{layer}.weight"]) for layer in LAYERS}
    dense = get_peft_model(Toy(zeros), config).merge_and_unload()
    for layer in LAYERS:
        tables, codes = SKETCH[f"{case}.step20.{layer}.tables"], SKETCH[f"{case}.init.{layer}.codes"].long()
        expected = tables.gather(2, codes.view(*tables.shape[:2], -1)).view_as(codes)
        assert torch.equal(dense.get_submodule(layer).weight, expected)
    other = pickled(tmp_path / "other.pkl", {"fc3": torch.zeros(3, 2, 8)})
    with pytest.raises(ValueError, match=r"layer fc3 is not in .*; the tables are for another sketch"):
        sketchtune_config(source, other)


class Evil:
    """What a pickle must never get to run."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("content, message", [
    ({"fc1": (Evil(), Evil())}, "it names (_?io|builtins).open. Files like that can run code"),
    ({"fc1": torch.zeros(4, 16)}, "layer fc1: a pair of tables and codes is expected"),
    ({"fc1": (torch.zeros(4, 1, 16), torch.zeros(4, 2, 8, dtype=torch.uint8))}, "codes .4, 2, 8.; .out, groups"),
    ({"fc1": (torch.zeros(4, 1, 8), torch.full((4, 1, 8), 255, dtype=torch.uint8))}, "code 15 for tables of 8"),
    ({"fc1": (torch.zeros(4, 1, 6), torch.zeros(4, 1, 8, dtype=torch.uint8))}, "tables of 6 entries; 4, 8 or 16"),
    ([], "a dict of the layers' tables and codes is expected"),
])  # fmt: skip
def test_other_pickles_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        sketchtune_config(pickled(tmp_path / "sketch.pkl", content))
    assert not (tmp_path / "ran").exists()

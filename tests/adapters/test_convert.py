"""Other programs' adapters in and out: equal logits through PEFT's own classes, and files that are refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_peft import S2FTConfig, SaRAConfig, SoRAConfig, SparseConfig
from sparse_peft.adapters import convert
from sparse_peft.adapters.foreign import _decode
from sparse_peft.compat import SupertuningConfig
from tests.helpers.trained_adapters import deltas, llama, loaded, saved

TARGETS = ["q_proj", "v_proj", "down_proj"]
FILE = "adapter_model.safetensors"
FOREIGN = {
    "shira": lambda **k: ShiraConfig(r=2, **k),
    "supertuning": lambda **k: SupertuningConfig(sparsity=0.85, **k),
}
needs_supertuning = pytest.mark.skipif(SupertuningConfig is None, reason="PEFT before 0.21 has no Super-Tuning")
PEFTS_OWN = ["shira", pytest.param("supertuning", marks=needs_supertuning)]
X = torch.arange(12).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model.eval()(X).logits


def foreign(folder, method, **fields):
    """An adapter that PEFT itself made, with random values."""
    torch.manual_seed(3)
    model = get_peft_model(llama(), FOREIGN[method](target_modules=TARGETS, init_weights=False, **fields))
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.mark.parametrize("method", PEFTS_OWN)
def test_pefts_own_sparse_methods_in(tmp_path, method):
    """SHiRA parity and import (sft.md, 4.h 1 and 5)."""
    folder, expected = foreign(tmp_path / "a", method, task_type="CAUSAL_LM")
    config = convert(folder, tmp_path / "b", base=llama())
    model = loaded(tmp_path / "b", llama)
    assert type(config) is SparseConfig and config.task_type == "CAUSAL_LM"
    assert torch.equal(logits(model), expected)
    original = load_file(folder / FILE)
    assert sum(config.num_entries.values()) == sum(t.numel() for n, t in original.items() if "indices" not in n)
    convert(tmp_path / "b", tmp_path / "c", method)  # and back
    again = PeftModel.from_pretrained(llama(), tmp_path / "c")
    assert again.peft_config["default"].peft_type.value == method.upper()
    assert torch.equal(logits(again), expected)
    back = load_file(tmp_path / "c" / FILE)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in original.items()}


CONFIGS = {
    "sparse": lambda: SparseConfig(density=0.1, allocation="erk"),
    "sara": lambda: SaRAConfig(density=0.1),
    "s2ft": lambda: S2FTConfig(k=2),
    "whole": lambda: SparseConfig(density=0.1, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("to", PEFTS_OWN)
@pytest.mark.parametrize("config", CONFIGS)
def test_pefts_own_sparse_methods_out(tmp_path, to, config):
    folder, model = saved(tmp_path / "a", CONFIGS[config](), base=llama, target_modules=TARGETS)
    if config == "whole":
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_()
        model.save_pretrained(folder)
    convert(folder, tmp_path / "b", to)
    other = PeftModel.from_pretrained(llama(), tmp_path / "b")
    assert type(other.base_model).__name__.lower().startswith(to)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-6)
    other.save_pretrained(tmp_path / "c")  # as PEFT writes it
    convert(tmp_path / "c", tmp_path / "d", base=llama())
    again = loaded(tmp_path / "d", llama)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    for layer, delta in deltas(model).items():
        assert torch.equal(deltas(again)[layer], delta)
    card = (tmp_path / "d" / "README.md").read_text()
    assert f"from {to.upper()}" in card


@needs_supertuning
def test_from_one_to_the_other(tmp_path):
    folder, expected = foreign(tmp_path / "a", "shira")
    convert(folder, tmp_path / "b", "supertuning", base=llama())
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "b")), expected)


@needs_supertuning
@pytest.mark.parametrize("density", [1 / 3, 0.07, 0.999, 1.0, 1e-3])
def test_supertunings_share_survives_rounding(tmp_path, density):
    folder, model = saved(tmp_path / "a", SparseConfig(density=density), base=llama, target_modules=TARGETS)
    convert(folder, tmp_path / "b", "supertuning")
    other = PeftModel.from_pretrained(llama(), tmp_path / "b")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-6)


def test_shira_has_no_room_for_dense_layers(tmp_path):
    folder, _ = saved(tmp_path / "a", SparseConfig(density=1.0), base=llama, target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"SHiRA has r \* \(rows \+ cols\).*Use to='supertuning'"):
        convert(folder, tmp_path / "b", "shira")
    assert not (tmp_path / "b").exists()


def test_what_the_others_cannot_hold(tmp_path):
    folder, _ = saved(tmp_path / "a", SparseConfig(density=0.1, bias="all"), base=llama, target_modules=TARGETS)
    with pytest.raises(ValueError, match="to='shira': the adapter trains biases too"):
        convert(folder, tmp_path / "b", "shira")
    folder, _ = saved(tmp_path / "c", SoRAConfig(r=2), base=llama, target_modules=TARGETS)
    with pytest.raises(ValueError, match="the deltas of SoRAConfig are not sparse"):
        convert(folder, tmp_path / "b", "shira")

    def gpt2():
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))

    folder, _ = saved(tmp_path / "d", SparseConfig(density=0.1), base=gpt2, target_modules=["c_fc"])
    with pytest.raises(ValueError, match=r"layer transformer\.h\.0\.mlp\.c_fc: a Conv1D; shira adapters are for"):
        convert(folder, tmp_path / "b", "shira", base=gpt2())
    with pytest.raises(ValueError, match="to='lora': one of sparse, shira, supertuning"):
        convert(folder, tmp_path / "b", "lora")
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------------------------------------------- SpIEL


def spiel(tmp_path, safe, **changes):
    """An adapter as SpIEL writes it, its positions in the order that reselection left them in."""
    _folder, model = saved(tmp_path / "source", SparseConfig(density=0.1), base=llama, target_modules=TARGETS)
    tensors = {}
    for layer in model.modules():
        if hasattr(layer, "deltas"):
            order = torch.randperm(layer.support("default").nnz)
            key = f"base_model.model.{layer.name}.sft_delta"
            tensors[f"{key}.values"] = layer.deltas["default"]().detach()[order].clone()
            tensors[f"{key}.indices"] = layer.support("default").indices[order].clone()
    tensors.update(changes)
    out = tmp_path / "spiel"
    out.mkdir()
    if safe:
        save_file(tensors, out / FILE)
    else:
        torch.save(tensors, out / "adapter_model.bin")
    config = {"peft_type": "SFT", "task_type": "CAUSAL_LM", "target_modules": TARGETS, "selection_algorithm": "rigl"}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out, logits(model)


@pytest.mark.parametrize("safe", [True, False])
def test_spiel_in(tmp_path, safe):
    folder, expected = spiel(tmp_path, safe)
    config = convert(folder, tmp_path / "new", base=llama())
    assert config.task_type == "CAUSAL_LM"
    assert torch.equal(logits(loaded(tmp_path / "new", llama)), expected)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.sft_delta"


@pytest.mark.parametrize("changes, message", [
    ({f"{KEY}.indices": torch.tensor([1, 1]), f"{KEY}.values": torch.ones(2)}, "q_proj: indices.*1 occurs twice"),
    ({f"{KEY}.indices": torch.tensor([1024]), f"{KEY}.values": torch.ones(1)}, "q_proj: indices contain 1024"),
    ({f"{KEY}.indices": torch.tensor([-1]), f"{KEY}.values": torch.ones(1)}, "q_proj: indices contain -1"),
    ({f"{KEY}.indices": torch.tensor([1]), f"{KEY}.values": torch.ones(2)}, r"\(2,\) values of .* for \(1,\)"),
    ({f"{KEY}.indices": torch.tensor([1]), f"{KEY}.values": torch.tensor([float("nan")])}, "q_proj: 1 of 1 values"),
    ({"base_model.model.else.sft_delta.values": torch.ones(1)}, "else.*has no indices"),
    ({"base_model.model.no.sft_delta.values": torch.ones(1),
      "base_model.model.no.sft_delta.indices": torch.ones(1).int()}, "layer no: the base model has no linear layer"),
])  # fmt: skip
def test_damaged_spiel_files(tmp_path, changes, message):
    folder, _ = spiel(tmp_path, True, **changes)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "new", base=llama())
    assert not (tmp_path / "new").exists()


def test_the_base_is_needed(tmp_path):
    folder, _ = spiel(tmp_path, True)
    with pytest.raises(ValueError, match="base: the file of a SFT adapter does not say how large the weights are"):
        convert(folder, tmp_path / "new")
    folder, expected = foreign(tmp_path / "a", "shira")
    llama().save_pretrained(tmp_path / "base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    convert(folder, tmp_path / "new")  # the config names a folder
    assert torch.equal(logits(loaded(tmp_path / "new", llama)), expected)


# ---------------------------------------------------------------------------------------------------- LT-SFT


def encoded(difference):
    """One tensor as LT-SFT stores it: gaps between column-major positions, the first a NumPy integer."""
    flat = difference.permute(*reversed(range(difference.ndim))).reshape(-1)
    where = flat.nonzero().squeeze(1).numpy()
    steps = [where[0], *(int(gap) for gap in np.diff(where))] if where.size else []
    return {"size": difference.shape, "index_steps": steps, "values": flat[flat != 0]}


def lt_sft(tmp_path, only=("q_proj.weight", "down_proj.weight"), **content):
    """A sparse fine-tuning of some tensors, as LT-SFT writes it, and the fine-tuned model."""
    before, after = llama(attention_bias=True), llama(attention_bias=True)
    torch.manual_seed(4)
    for name, p in after.named_parameters():
        if any(part in name for part in only):
            p.data += torch.randn_like(p) * (torch.rand_like(p) < 0.1)
    pairs = zip(before.named_parameters(), after.named_parameters(), strict=True)
    diffs = {name: encoded((q - p).detach()) for (name, p), (_, q) in pairs if name != "lm_head.weight"}
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / "pytorch_diff.bin"
    torch.save({"diffs": diffs, "abs": {}, **content}, file, pickle_protocol=2)
    return file, after


def test_the_formats_positions():
    """sft.md, 2h.6: [[0, 0, 7], [5, 0, 0]] has the column-major positions 1 and 4, so the steps 1 and 3."""
    entry = encoded(torch.tensor([[0.0, 0, 7], [5, 0, 0]]))
    assert list(entry["index_steps"]) == [1, 3] and entry["values"].tolist() == [5, 7]
    flat, values = _decode("t", entry, {"t": (2, 3)})
    assert flat.tolist() == [3, 2] and values.tolist() == [5, 7]
    empty = encoded(torch.zeros(2, 3))
    assert _decode("t", empty, {"t": (2, 3)})[0].tolist() == []
    for shape in ((7,), (3, 5), (2, 3, 4), (2, 3, 2, 5)):
        dense = torch.randn(shape) * (torch.rand(shape) < 0.5)
        flat, values = _decode("t", encoded(dense), {"t": shape})
        assert torch.equal(torch.zeros(dense.numel()).index_copy_(0, flat, values).view(shape), dense)


def test_lt_sft_in(tmp_path):
    file, after = lt_sft(tmp_path / "a")
    config = convert(file, tmp_path / "new", base=llama(attention_bias=True))
    assert config.target_modules == {f"model.layers.{n}.{part}" for n in (0, 1)
                                     for part in ("self_attn.q_proj", "mlp.down_proj")}  # fmt: skip
    model = loaded(tmp_path / "new", lambda: llama(attention_bias=True))
    torch.testing.assert_close(logits(model), logits(after), rtol=1e-5, atol=1e-6)


def test_lt_sft_with_embeddings_norms_biases_and_a_head(tmp_path):
    head = torch.randn(40, 32)
    only = ("q_proj", "norm", "embed_tokens")
    _file, after = lt_sft(tmp_path / "a", only=only, abs={"lm_head.weight": head})
    after.lm_head.weight.data.copy_(head)
    base = llama(attention_bias=True)
    with pytest.raises(ValueError, match=r"more than linear layers, such as .*others='save'"):
        convert(tmp_path / "a", tmp_path / "new", base=base)
    assert not (tmp_path / "new").exists()
    convert(tmp_path / "a", tmp_path / "new", base=base, others="save")
    model = loaded(tmp_path / "new", lambda: llama(attention_bias=True))
    torch.testing.assert_close(logits(model), logits(after), rtol=1e-5, atol=1e-6)
    config = convert(tmp_path / "a", tmp_path / "less", base=base, others="leave_out")
    assert config.modules_to_save is None and config.bias == "none"


@pytest.mark.parametrize("change, message", [
    ({"size": (3, 3)}, r"made for a tensor of \(3, 3\), the base model has \(32, 32\)"),
    ({"index_steps": [1, 0]}, "no gaps between increasing positions"),
    ({"index_steps": [-1, 5]}, "no gaps between increasing positions"),
    ({"index_steps": [1, 2**62]}, "no gaps between increasing positions"),
    ({"index_steps": [1, 1023]}, "positions up to 1024 for a tensor of 1024 entries"),
    ({"index_steps": [1]}, "1 positions but a different number of values"),
    ({"values": torch.tensor([float("inf"), 1])}, "1 of 2 values are NaN or infinite"),
    ({"values": [1.0, 2.0]}, "but a different number of values"),
])  # fmt: skip
def test_damaged_lt_sft_files(tmp_path, change, message):
    name = "model.layers.0.self_attn.q_proj.weight"
    entry = {"size": (32, 32), "index_steps": [1, 3], "values": torch.ones(2), **change}
    torch.save({"diffs": {name: entry}, "abs": {}}, tmp_path / "pytorch_diff.bin")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "new", base=llama())
    assert not (tmp_path / "new").exists()


class Evil:
    """What a pickle must never get to run."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("name", ["pytorch_diff.bin", "adapter_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_run_nothing(tmp_path, monkeypatch, name, zipped):
    monkeypatch.chdir(tmp_path)
    content = {"diffs": {"x": Evil()}, "abs": {}} if "diff" in name else {f"{KEY}.values": Evil()}
    if zipped:
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    if "adapter" in name:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SFT"}))
    with pytest.raises(
        ValueError, match=r"not read, since it has more in it than tensors.*save the adapter as safetensors"
    ):
        convert(tmp_path, tmp_path / "new", base=llama())
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("part, tensor, message", [
    ("shira_indices", torch.zeros(3, 128).int(), r"shira_indices of shape \(3, 128\)"),
    ("shira_indices", torch.full((2, 128), 32).int(), "outside of its 32 x 32 weight"),
    ("shira_indices", torch.zeros(2, 128).int(), "0 occurs twice"),
    ("shira_weight", torch.ones(5), r"\(5,\) values of .* for \(128,\) positions"),
])  # fmt: skip
def test_damaged_files_of_shira(tmp_path, part, tensor, message):
    refused(tmp_path, "shira", part, tensor, message)


@needs_supertuning
@pytest.mark.parametrize("part, tensor, message", [
    ("supertuning_indices", torch.zeros(153).int(), "0 occurs twice"),
    ("supertuning_indices", torch.arange(153).float(), "dtype torch.float32: integers"),
    ("supertuning_values", torch.ones(153).int(), "values of torch.int32"),
])  # fmt: skip
def test_damaged_files_of_supertuning(tmp_path, part, tensor, message):
    refused(tmp_path, "supertuning", part, tensor, message)


def refused(tmp_path, method, part, tensor, message):
    folder, _ = foreign(tmp_path / "a", method)
    tensors = load_file(folder / FILE)
    tensors[f"base_model.model.model.layers.0.self_attn.q_proj.{part}"] = tensor
    save_file(tensors, folder / FILE)
    with pytest.raises((ValueError, TypeError), match=message):
        convert(folder, tmp_path / "new", base=llama())
    assert not (tmp_path / "new").exists()


@needs_supertuning
def test_supertuning_that_has_more_or_less_than_positions(tmp_path):
    folder, _ = foreign(tmp_path / "a", "supertuning", r=2)
    with pytest.raises(ValueError, match=r"with low rank \(Supra\) is no sparse delta"):
        convert(folder, tmp_path / "new", base=llama())
    with pytest.warns(UserWarning, match="save_precomputed_indices"):
        folder, _ = foreign(tmp_path / "b", "supertuning", save_precomputed_indices=False)
    with pytest.raises(ValueError, match=r"the file has no positions.*Set it to true in adapter_config\.json"):
        convert(folder, tmp_path / "new", base=llama())
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "save_precomputed_indices": True}))
    again = PeftModel.from_pretrained(llama(), folder)
    again.save_pretrained(tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "new", base=llama())
    x = torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        expected, found = (model.eval()(x).logits for model in (again, loaded(tmp_path / "new", llama)))
    torch.testing.assert_close(found, expected)


def test_no_adapter_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"neither adapter_config\.json nor pytorch_diff\.bin"):
        convert(tmp_path, tmp_path / "new", base=llama())
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        convert(tmp_path, tmp_path / "new", base=llama())

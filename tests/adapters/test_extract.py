"""Adapters extracted from fully fine-tuned models against dense float64 references."""

import json
import warnings
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sparse_peft.adapters import extract
from sparse_peft.adapters.weight_reader import FolderWeights
from tests.helpers.trained_adapters import deltas, llama, loaded, support_masks, three

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def finetuned(model, share=1.0, only=None, scale=0.01):
    """The model after a dense fine-tuning, and what it was before."""
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if only is None or any(part in name for part in only):
            step = torch.randn_like(parameter) * scale
            parameter.data += step * (torch.rand_like(parameter) < share)
    return model


def differences(before, after):
    after = dict(after.named_parameters())
    return {name: after[name].detach().double() - p.detach().double() for name, p in before.named_parameters()}


def folders(tmp_path, before, after, shard="20KB"):
    before.save_pretrained(tmp_path / "base", max_shard_size=shard)
    after.save_pretrained(tmp_path / "finetuned")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    return tmp_path / "base", tmp_path / "finetuned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_everything_kept_is_the_finetuned_model_bit_for_bit(tmp_path, dtype, tied):
    before, after = (
        make(llama(tie_word_embeddings=tied, attention_bias=True).to(dtype)) for make in (nn.Module.eval, finetuned)
    )
    base, tuned = folders(tmp_path, before, after)
    result = extract(base, tuned, tmp_path / "new", density=1.0, others="save")
    assert result.kept == 1.0 and all(layer.inexact == 0 for layer in result.layers)
    assert result.config.bias == "sparse_peft_delta_only" and "model.embed_tokens" in result.config.modules_to_save
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), tmp_path / "new")
    merged = dict(model.merge_and_unload().state_dict())
    for name, tensor in after.state_dict().items():
        assert torch.equal(merged[name].to(dtype), tensor), name


def test_loaded_models_and_folders_give_the_same_adapter(tmp_path):
    before, after = llama(), finetuned(llama(), only=LINEAR)
    base, tuned = folders(tmp_path, before, after)
    options = {"density": 0.2, "base_model_name_or_path": "org/base"}
    for name, pair in {"folders": (base, tuned), "models": (before, after), "mixed": (before, tuned)}.items():
        extract(*pair, tmp_path / name, **options)
    first = load_file(tmp_path / "folders" / "adapter_model.safetensors")
    for name in ("models", "mixed"):
        other = load_file(tmp_path / name / "adapter_model.safetensors")
        assert first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("criterion", ["magnitude", "relative"])
@pytest.mark.parametrize("budget", [{"density": 0.13}, {"num_params": 700}, {"r": 1},
                                    {"density": 0.1, "density_pattern": {"q_proj": 0.5}}], ids=str)  # fmt: skip
def test_per_layer_the_best_entries_are_kept(tmp_path, criterion, budget):
    before, after = llama(), finetuned(llama(), only=LINEAR)
    result = extract(before, after, tmp_path / "new", criterion=criterion, **budget)
    change = differences(before, after)
    weights = dict(before.named_parameters())
    made = deltas(loaded(tmp_path / "new", llama))
    if "num_params" in budget:
        assert result.entries == 700
    for layer in result.layers:
        delta, weight = change[f"{layer.name}.weight"], weights[f"{layer.name}.weight"].detach().double()
        if "r" not in budget and "num_params" not in budget:
            own = 0.5 if "q_proj" in layer.name and "density_pattern" in budget else budget["density"]
            assert abs(layer.entries - own * layer.size) <= 1
        floor = 1e-3 * weight.square().mean().sqrt()
        score = delta.abs() if criterion == "magnitude" else delta.abs() / (weight.abs() + floor)
        best = score.flatten().topk(layer.entries).indices.sort().values
        expected = torch.zeros_like(delta).flatten().index_copy_(0, best, delta.flatten()[best]).view_as(delta)
        found = made[layer.name]
        wrong = (found != 0) != (expected != 0)
        assert int(wrong.sum()) <= 2  # ties in float32
        torch.testing.assert_close(found[~wrong], expected[~wrong], rtol=1e-6, atol=1e-9)
        assert layer.energy == pytest.approx(float(delta.square().sum()), rel=1e-6)
        assert layer.kept == pytest.approx(float(found.square().sum() / delta.square().sum()), rel=1e-5)
    total = sum(float(change[f"{n}.weight"].square().sum()) for n in made)
    kept = sum(float(d.square().sum()) for d in made.values())
    assert result.kept == pytest.approx(kept / total, rel=1e-5)
    assert f"{result.kept:.1%} of the squared difference" in (tmp_path / "new" / "README.md").read_text()


def test_the_principal_entries_of_the_change(tmp_path):
    before, after = (nn.ModuleDict({"a": nn.Linear(48, 40, bias=False)}) for _ in range(2))
    (layer,) = extract(
        before, after, tmp_path / "new", num_params=200, criterion="principal", target_modules=["a"]
    ).layers
    change = after["a"].weight.detach().double() - before["a"].weight.detach().double()
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    best = (u[:, :32] * s[:32] @ vh[:32]).abs().flatten().topk(200).indices
    mask = torch.zeros(40 * 48, dtype=torch.bool).index_fill_(0, best, True).view(40, 48)
    found = deltas(loaded(tmp_path / "new", lambda: nn.ModuleDict({"a": nn.Linear(48, 40, bias=False)})))["a"]
    assert int(((found != 0) != mask).sum()) <= 2
    assert int((change.abs() >= change.abs().flatten().topk(200).values[-1]).logical_and(~mask).sum()) > 10
    assert layer.kept == pytest.approx(float(found.square().sum() / change.square().sum()), rel=1e-5)


def test_a_global_budget_keeps_the_largest_changes_of_all_layers(tmp_path):
    """LT-SFT's mask: the global top K of the absolute changes (sft.md, 2h.3)."""
    before, after = llama(), finetuned(llama(), only=["q_proj", "down_proj"], scale=0.01)
    finetuned(after, only=["up_proj"], scale=0.05)
    result = extract(before, after, tmp_path / "new", num_params=600, allocation="global",
                     target_modules=["q_proj", "down_proj", "up_proj"])  # fmt: skip
    change = {name: d for name, d in differences(before, after).items() if bool(d.any())}
    threshold = torch.cat([d.abs().flatten() for d in change.values()]).topk(600).values[-1]
    expected = {name: int((d.abs() >= threshold).sum()) for name, d in change.items()}
    found = {f"{layer.name}.weight": layer.entries for layer in result.layers}
    assert result.entries == 600
    assert all(abs(found[name] - max(1, count)) <= 2 for name, count in expected.items())


def test_equal_entries_are_never_stored(tmp_path):
    before, after = llama(), finetuned(llama(), share=0.05, only=["q_proj"])
    result = extract(before, after, tmp_path / "new", density=0.5)
    change = {n: d for n, d in differences(before, after).items() if bool(d.any())}
    assert {f"{layer.name}.weight" for layer in result.layers} == set(change)
    for layer in result.layers:
        assert layer.entries == layer.changed == int((change[f"{layer.name}.weight"] != 0).sum())
        assert layer.kept == 1.0
    assert len(result.unchanged) == 12 and result.config.target_modules == {layer.name for layer in result.layers}
    masks = support_masks(loaded(tmp_path / "new", llama))
    assert all(torch.equal(masks[n.removesuffix(".weight")], d != 0) for n, d in change.items())


def test_other_tensors_are_reported_saved_or_refused(tmp_path):
    before, after = llama(), finetuned(llama(), only=["q_proj", "norm", "embed"])
    with pytest.warns(UserWarning, match="6 tensors differ and are no target weights, such as model.embed_tokens"):
        result = extract(before, after, tmp_path / "new", density=0.2)
    change = {n: d for n, d in differences(before, after).items() if bool(d.any()) and "q_proj" not in n}
    assert result.others == {n: pytest.approx(float(d.square().sum()), rel=1e-6) for n, d in change.items()}
    assert result.saved == () and result.config.modules_to_save is None
    with pytest.raises(ValueError, match="others='refuse': 6 tensors differ"):
        extract(before, after, tmp_path / "bad", density=0.2, others="refuse")
    assert not (tmp_path / "bad").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = extract(before, after, tmp_path / "saved", density=1.0, others="save")
    assert len(result.saved) == 6
    x = torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "saved", llama)(x).logits, after(x).logits)


def test_a_delta_that_float32_cannot_hold_is_counted(tmp_path):
    before, after = nn.ModuleDict({"a": nn.Linear(3, 2)}), nn.ModuleDict({"a": nn.Linear(3, 2)})
    after.load_state_dict(before.state_dict())
    before["a"].weight.data[0] = torch.tensor([1.0, 1.0, 1.0])
    after["a"].weight.data[0] = torch.tensor([1e-10, 1.5, 3.0])
    (layer,) = extract(before, after, tmp_path / "new", density=1.0, target_modules=["a"]).layers
    assert layer.inexact == 1  # 1 + (1e-10 - 1) is 0 in float32


def test_gpt2_whose_weights_lie_the_other_way(tmp_path):
    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).eval()

    before, after = gpt2(), finetuned(gpt2(), only=["c_fc.weight", "c_attn.weight"])
    base, tuned = folders(tmp_path, before, after, "2KB")
    extract(base, tuned, tmp_path / "new", density=1.0)
    merged = loaded(tmp_path / "new", gpt2).merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in after.state_dict().items())


def test_a_file_of_the_body_alone_fits_a_model_with_a_head(tmp_path):
    before, after = llama(), finetuned(llama(), only=["q_proj"])
    before.save_pretrained(tmp_path / "base")
    after.model.save_pretrained(tmp_path / "body")
    result = extract(tmp_path / "base", tmp_path / "body", tmp_path / "new", density=1.0)
    assert {layer.name for layer in result.layers} == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}


def test_one_tensor_of_each_model_at_a_time(tmp_path, monkeypatch):
    """Neither model is ever in memory whole: of all tensors read, two of one name are alive at most."""
    before, after = llama(), finetuned(llama(), only=LINEAR)
    base, tuned = folders(tmp_path, before, after)
    alive, most, read = [], [], FolderWeights.read

    def watched(self, name):
        tensor = read(self, name)
        alive.append((name, weakref.ref(tensor)))
        most.append({n for n, ref in alive if ref() is not None})
        return tensor

    monkeypatch.setattr(FolderWeights, "read", watched)
    extract(base, tuned, tmp_path / "new", density=0.1)
    assert len(most) > 28 and max(len(names) for names in most) <= 2


@pytest.mark.parametrize("options, message", [
    ({}, "exactly one of density, num_params and r"),
    ({"density": 0.1, "criterion": "fisher"}, "criterion='fisher': one of 'magnitude', 'relative', 'principal'"),
    ({"density": 0.1, "others": "x"}, "others='x': one of"),
    ({"density": 0.1, "allocation": "x"}, "allocation='x'"),
    ({"density": 0.1, "target_modules": ["nothing"]}, "no target layers"),
])  # fmt: skip
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        extract(llama(), finetuned(llama()), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_models_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="none of the 14 target layers differs"):
        extract(llama(), llama(), tmp_path / "new", density=0.1)
    with pytest.raises(ValueError, match=r"q_proj.weight has the shape .*these are different models"):
        extract(llama(), llama(hidden_size=64), tmp_path / "new", density=0.1)
    with pytest.raises(ValueError, match=r"no tensor first\.weight|no target layers"):
        extract(three(), llama(), tmp_path / "new", density=0.1, target_modules=["first"])
    broken = finetuned(llama())
    broken.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"q_proj: 1 of .* NaN"):
        extract(llama(), broken, tmp_path / "new", density=0.1)
    resized = finetuned(llama(), only=["q_proj"])
    resized.resize_token_embeddings(44)
    with pytest.raises(ValueError, match=r"of shape \(44, 32\), and the base model has \(40, 32\)"):
        extract(llama(), resized, tmp_path / "new", density=0.1, others="save")
    assert not (tmp_path / "new").exists()


def test_folders_that_are_refused(tmp_path):
    base, tuned = folders(tmp_path, llama(), finetuned(llama()))
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    for file, message in {
        "../finetuned/model.safetensors": "names the file '../finetuned/model.safetensors'; shards are",
        "/etc/passwd": "names the file '/etc/passwd'; shards are",
        "model.bin": "names the file 'model.bin'; shards are",
        "gone.safetensors": "names the file 'gone.safetensors', which is not there",
        7: "names the file 7",
    }.items():
        index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], name: file}}))
        with pytest.raises(ValueError, match=message):
            extract(base, tuned, tmp_path / "new", density=0.1)
    index.write_text("{")
    with pytest.raises(ValueError, match="no valid index of shards"):
        extract(base, tuned, tmp_path / "new", density=0.1)
    (tuned / "model.safetensors").write_bytes((tuned / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="no valid safetensors file"):
        extract(llama(), tuned, tmp_path / "new", density=0.1)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(llama().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Other formats are pickles, which are not read here"):
        extract(llama(), pickled, tmp_path / "new", density=0.1)
    with pytest.raises(ValueError, match=r"no config\.json"):
        extract(pickled, tuned, tmp_path / "new", density=0.1)
    with pytest.raises(ValueError, match="no such folder"):
        extract(llama(), tmp_path / "nowhere", tmp_path / "new", density=0.1)
    (pickled / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["os.system"]}))
    with pytest.raises(ValueError, match=r"'os\.system', which transformers has no class for"):
        extract(pickled, tuned, tmp_path / "new", density=0.1)
    assert not (tmp_path / "new").exists()


def test_values_stored_in_bfloat16_are_judged_as_stored(tmp_path):
    before, after = llama(), finetuned(llama(), only=["q_proj"])
    result = extract(before, after, tmp_path / "new", density=1.0, save_dtype="bfloat16")
    found = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {t.dtype for name, t in found.items() if name.endswith("values")} == {torch.bfloat16}
    change, made = differences(before, after), deltas(loaded(tmp_path / "new", llama))
    for layer in result.layers:
        delta = change[f"{layer.name}.weight"]
        left = float((delta - made[layer.name]).square().sum() / delta.square().sum())
        assert left > 0 and layer.kept == pytest.approx(1 - left, abs=1e-9)
        merged = dict(before.named_parameters())[f"{layer.name}.weight"].double() + made[layer.name]
        assert (
            layer.inexact == int((merged.float() != dict(after.named_parameters())[f"{layer.name}.weight"]).sum()) > 0
        )


def test_a_module_whose_name_ends_a_layers_cannot_be_stored_whole(tmp_path):
    before, after = (nn.ModuleDict({"q_proj": nn.Linear(4, 5), "proj": nn.Embedding(4, 5)}) for _ in range(2))
    with pytest.raises(ValueError, match=r"proj: .*the adapted layer q_proj ends like this"):
        extract(before, after, tmp_path / "new", density=0.5, target_modules=["q_proj"], others="save")

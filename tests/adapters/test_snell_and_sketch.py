"""Folders of methods whose deltas are no entries and no factors: SNELL's kernels, SketchTune's tables."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from sparse_peft import SketchConfig, SnellaConfig, SparseConfig
from sparse_peft.adapters import compare, compose, export, save_as_lora, save_as_sparse, summarise
from tests.helpers.two_layers import TwoLayers


def saved(config, folder, conv1d=False):
    torch.manual_seed(0)
    model = get_peft_model(TwoLayers(conv1d=conv1d), config).eval()
    model.save_pretrained(folder)
    return model


def dense(layer):
    return layer.get_delta_weight("default").detach().double()


@pytest.mark.parametrize("conv1d", [False, True])
def test_a_kernels_folder_is_looked_at_without_its_base(tmp_path, conv1d):
    config = SnellaConfig(r=4, sparsity=0.7, target_modules=["first", "second"], init_weights=False)
    model = saved(config, tmp_path / "snell", conv1d)
    layers = {name: model.base_model.model.get_submodule(name) for name in ("first", "second")}
    found = summarise(tmp_path / "snell")
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for summary in found.layers:
        delta = dense(layers[summary.layer])
        assert summary.shape == list(delta.shape) and summary.entries == int((delta != 0).sum())
        assert summary.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    save_as_sparse(model, tmp_path / "sparse")
    both = compare(tmp_path / "snell", tmp_path / "sparse")
    assert both.jaccard == 1.0 and both.cosine == pytest.approx(1.0) and both.difference == pytest.approx(0, abs=1e-5)
    # kernels do not add up, their entries do
    made = compose([tmp_path / "snell", tmp_path / "sparse"], tmp_path / "mixed", weights=[0.5, 0.5])
    assert type(made) is type(compose([tmp_path / "snell"] * 2, tmp_path / "sum", weights=[0.5, 0.5])) is SparseConfig
    for folder in ("mixed", "sum"):
        assert compare(tmp_path / folder, tmp_path / "snell").difference == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("mode", ["delta", "replace"])
def test_tables_need_the_weights_that_their_codes_are_of(tmp_path, mode):
    config = SketchConfig(mode=mode, bits=2, target_modules=["first", "second"], init_weights=False)
    model = saved(config, tmp_path / "sketch")
    for look in (summarise, lambda folder: compare(folder, folder), lambda folder: compose([folder], tmp_path / "x")):
        with pytest.raises(ValueError, match="SketchConfig adds is known on its base model only"):
            look(tmp_path / "sketch")
    assert not (tmp_path / "x").exists()
    torch.manual_seed(0)
    base, x = TwoLayers(), torch.randn(3, 17)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    export(tmp_path / "sketch", tmp_path / "merged", base=base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    with torch.no_grad():
        wanted = model(x)
        plain = TwoLayers()
        plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
        torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=1e-5)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(TwoLayers(), tmp_path / "sketch")
        assert torch.equal(again(x), wanted)


def test_a_kernels_lora_is_exact_and_tables_have_none(tmp_path):
    model = saved(SnellaConfig(r=4, sparsity=0.7, target_modules=["first"], init_weights=False), tmp_path / "snell")
    with pytest.raises(ValueError, match=r"more than the merged model.*rank 17 in layer first.*form='merged'"):
        export(model, tmp_path / "lora", "lora")
    assert not (tmp_path / "lora").exists()
    save_as_lora(model, tmp_path / "lora")
    torch.manual_seed(0)
    base, x = TwoLayers(), torch.randn(3, 17)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "lora")(x), model(x), rtol=1e-4, atol=1e-5)
    model = saved(SketchConfig(bits=2, target_modules=["first"], init_weights=False), tmp_path / "sketch")
    for form, rank in (("lora", None), ("low_rank", 2)):
        with pytest.raises(ValueError, match=r"layer first: the delta has no .* form because its tables.*merge"):
            export(model, tmp_path / "none", form, rank=rank)
    assert not (tmp_path / "none").exists()

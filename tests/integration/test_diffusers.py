"""diffusers: a small random UNet, transformers with every method, and the DreamBooth example on a small pipeline."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import PeftModel, inject_adapter_in_model
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from typer.testing import CliRunner

from examples.dreambooth_sara import main
from sparse_peft import SaRAConfig, SparsityController
from sparse_peft.adapters import load_adapter, save_adapter
from sparse_peft.tuners.delta_layer import SparseTunerLayer, TunerLayer
from tests.helpers.methods import METHODS, MOVING, ONE_OF_EACH_FAMILY

WIDTH = 16


def small_unet(channels=3):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    ).requires_grad_(False)


def inputs(batch=2, channels=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, 8, 8, generator=generator)
    return x, torch.tensor([3, 500])[:batch], torch.randn(batch, 4, WIDTH, generator=generator)


def train(unet, steps=6, lr=1e-2):
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    controller = SparsityController(unet, optimizer, total_steps=steps)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(unet(*inputs()).sample, torch.ones(2, 3, 8, 8))
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, controller


def test_a_unet_trains_by_its_smallest_weights():
    unet = small_unet()
    reference = copy.deepcopy(unet)
    expected = unet(*inputs()).sample
    unet.add_adapter(SaRAConfig(threshold=0.01, nuclear_min_size=8))
    assert torch.equal(unet(*inputs()).sample, expected)
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, SparseTunerLayer)}
    kinds = {type(m.get_base_layer()) for m in layers.values()}
    assert kinds == {nn.Linear, nn.Conv2d} and any("conv_shortcut" in n for n in layers)
    for name, layer in layers.items():
        weight = reference.get_submodule(name).weight
        assert torch.equal(layer.support("default").to_mask(), weight.abs().reshape(layer.stored_shape) < 0.01)
    losses, controller = train(unet)
    assert losses[-1] < losses[0]
    assert controller.history[0].step == 3 and controller.history[0].frozen > 0
    unet.disable_adapters()
    assert torch.equal(unet(*inputs()).sample, expected)
    for name, parameter in reference.named_parameters():
        module, _, leaf = name.rpartition(".")
        base = layers[module].get_base_layer() if module in layers else unet.get_submodule(module)
        assert torch.equal(getattr(base, leaf), parameter)


def test_gradients_are_the_dense_ones():
    unet, dense = small_unet(), small_unet().requires_grad_(True)
    unet.add_adapter(SaRAConfig(density=0.1, progressive=None, nuclear_weight=0, scale=1.0))
    for each in (unet, dense):
        each(*inputs()).sample.square().mean().backward()
    for name, layer in unet.named_modules():
        if isinstance(layer, SparseTunerLayer):
            wanted = dense.get_submodule(name).weight.grad.reshape(-1)[layer.support("default").indices.long()]
            found = layer.deltas["default"].values.grad
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7, msg=name)


UNET_TARGETS = {"target_modules": ["to_q", "to_out.0", "ff.net.2", "conv1"]}


@pytest.mark.parametrize("config", [
    SaRAConfig(density=0.05, progressive=None, nuclear_weight=0, init_weights=False),
    *(METHODS[m][0](**{**METHODS[m][1], **UNET_TARGETS, "init_weights": False}) for m in ("s2ft", "sora")),
], ids=["sara", "s2ft", "sora"])  # fmt: skip
def test_files_of_injected_adapters(tmp_path, config):
    unet = small_unet()
    unet.add_adapter(config)
    expected = unet(*inputs()).sample
    save_adapter(unet, tmp_path)
    again = small_unet()
    load_adapter(again, tmp_path, "style")
    assert torch.equal(again(*inputs()).sample, expected)
    assert not any(p.requires_grad for p in again.parameters())
    wrapped = PeftModel.from_pretrained(small_unet(), tmp_path)
    assert torch.equal(wrapped(*inputs()).sample, expected)
    wrapped.save_pretrained(tmp_path / "peft")
    third = small_unet()
    load_adapter(third, tmp_path / "peft", is_trainable=True)
    assert torch.equal(third(*inputs()).sample, expected)
    assert any(p.requires_grad for p in third.parameters())
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, UNet2DConditionModel)
    torch.testing.assert_close(merged(*inputs()).sample, expected)


TRANSFORMERS = {
    "dit": (
        DiTTransformer2DModel,
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "norm_num_groups": 4, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10},
        lambda: {"hidden_states": torch.ones(2, 4, 8, 8), "timestep": torch.tensor([3, 500]),
                 "class_labels": torch.tensor([1, 2])},
    ),
    "sd3": (
        SD3Transformer2DModel,
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
         "pooled_projection_dim": 12, "out_channels": 4},
        lambda: {"hidden_states": torch.ones(2, 4, 8, 8), "timestep": torch.tensor([3, 500]),
                 "encoder_hidden_states": torch.ones(2, 5, 16), "pooled_projections": torch.ones(2, 12)},
    ),
}  # fmt: skip


def transformer(kind):
    torch.manual_seed(0)
    cls, fields, _ = TRANSFORMERS[kind]
    return cls(**fields).requires_grad_(False).eval()  # DiT drops class labels at random in training


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("method", ONE_OF_EACH_FAMILY)
def test_transformers_train_and_their_files_come_back(tmp_path, kind, method):
    given = TRANSFORMERS[kind][2]()
    model = transformer(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(**given).sample
    config_cls, fields = METHODS[method]
    targets = {"target_modules": ["to_q", "to_v", "to_out.0", "net.2"]}
    config = config_cls(**{**fields, **MOVING.get(method, {}), **targets})
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
    else:  # DiT has none of diffusers' adapter methods
        inject_adapter_in_model(config, model)
    assert torch.equal(model(**given).sample, expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    controller = SparsityController(model, optimizer, total_steps=5)
    losses = []
    model.train()
    for _ in range(5):
        loss = F.mse_loss(model(**given).sample, torch.ones_like(expected))
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and bool(controller.history) == (method in MOVING)
    controller.close()
    model.eval()
    with torch.no_grad():
        wanted = model(**given).sample
        save_adapter(model, tmp_path)
        again = transformer(kind)
        load_adapter(again, tmp_path, "style")
        again.eval()  # new layers are in training mode, in which SNELL adds its delta to the weight first
        assert torch.equal(again(**given).sample, wanted)
        assert torch.equal(PeftModel.from_pretrained(transformer(kind), tmp_path)(**given).sample, wanted)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TunerLayer)}
        for layer in layers.values():
            layer.enable_adapters(False)
        assert torch.equal(model(**given).sample, expected)
    for name, layer in layers.items():
        assert torch.equal(layer.get_base_layer().weight, before[f"{name}.weight"]), name


def test_files_that_do_not_fit(tmp_path):
    unet = small_unet()
    unet.add_adapter(SaRAConfig(density=0.05))
    save_adapter(unet, tmp_path)
    with pytest.raises(ValueError, match="adapter_name='other': the model's adapters are 'default'"):
        save_adapter(unet, tmp_path, "other")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no such file"):
        load_adapter(small_unet(), tmp_path)


def test_styles_add_up_and_are_switched():
    unet = small_unet()
    base = unet(*inputs()).sample
    outputs = {}
    for n, name in enumerate(["one", "two"]):
        unet.add_adapter(SaRAConfig(density=0.02 * (n + 1), init_weights=False), name)
        outputs[name] = unet(*inputs()).sample.detach()
    unet.set_adapter("one")
    assert torch.equal(unet(*inputs()).sample, outputs["one"])
    unet.set_adapter(["one", "two"])
    assert not torch.equal(unet(*inputs()).sample, outputs["two"])
    unet.delete_adapters(["one", "two"])
    torch.testing.assert_close(unet(*inputs()).sample, base)


def small_pipeline(folder):
    alphabet = list("abcdefghijklmnopqrstuvwxyz")
    words = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{letter}</w>" for letter in alphabet)]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=small_unet(channels=4),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_the_dreambooth_example(tmp_path):
    pipeline = small_pipeline(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{n}.png")
    app = typer.Typer()
    app.command()(main)
    arguments = [
        "--pretrained", str(pipeline), "--images", str(photos), "--prompt", "a photo of sks", "--size", "16",
        "--class-prompt", "a photo", "--class-images", "1", "--steps", "6", "--density", "0.05",
        "--output", str(tmp_path / "adapter"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "weights have grown, and are frozen" in result.output and "the same output: yes" in result.output
    empty = tmp_path / "empty"
    empty.mkdir()
    result = CliRunner().invoke(app, [*arguments[:3], str(empty), *arguments[4:]])
    # in a box, whose lines end where the folder's name lets them
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and "has no images" in said

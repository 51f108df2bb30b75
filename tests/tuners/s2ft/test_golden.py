"""S2FT against the authors' converted Llama: o and down, v and up, and all four."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_peft import S2FTConfig
from tests.helpers.golden import adapted, agree, agree_all, parameter, read, under

TOLERANCE = 1e-4
NUMBERS = read("s2ft")
DECAY = {"od": 0.0, "vu": 0.0, "all": 0.01}
OUTPUTS = ("v_proj", "up_proj")  # train rows; the others train columns
HEAD = 4


def llama():
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(under(NUMBERS, "base"))
    return model


def channels_of(case):
    """``{layer: its channels}``."""
    found = {name: channels for name, channels in under(NUMBERS, case).items() if name.endswith(".channels")}
    return {name.removesuffix(".channels"): channels for name, channels in found.items()}


def start(folder, case, values=False):
    channels = channels_of(case)
    sizes = {layer: llama().get_submodule(layer).weight.shape for layer in channels}
    ratios = {}
    tensors = {}
    for layer, chosen in channels.items():
        rows = layer.endswith(OUTPUTS)
        ratios[layer] = chosen.numel() / sizes[layer][0 if rows else 1]
        tensors[layer] = {"rows" if rows else "columns": chosen}
        if values:
            tensors[layer]["values"] = NUMBERS[f"{case}.probe.{layer}.values"].flatten()
    config = S2FTConfig(ratio_pattern=ratios, coupled=False, scale=1.0, target_modules=list(channels))
    return adapted(llama, config, tensors, folder).eval()


def loss(model, tokens):
    return model(input_ids=tokens.long(), labels=tokens.long()).loss


@pytest.mark.parametrize("case", DECAY)
def test_forward_and_gradients(case, tmp_path):
    model = start(tmp_path, case, values=True)
    tokens = NUMBERS["probe.inputs"].long()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    agree("logits", output.logits, NUMBERS[f"{case}.probe.logits"], TOLERANCE)
    for layer in channels_of(case):
        agree(f"gradient of {layer}", parameter(model, layer).grad, NUMBERS[f"{case}.probe.{layer}.grad"], TOLERANCE)


@pytest.mark.parametrize("case", DECAY)
def test_20_steps_and_merging(case, tmp_path):
    model, layers = start(tmp_path, case), list(channels_of(case))
    trained = [parameter(model, layer) for layer in layers]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=DECAY[case])

    def ours(layer, name):
        values = parameter(model, layer)
        return values if name == "values" else optimizer.state[values][name]

    compared = 0
    for step, (tokens, theirs) in enumerate(zip(NUMBERS["inputs"], NUMBERS[f"{case}.losses"], strict=True), 1):
        optimizer.zero_grad()
        mine = loss(model, tokens)
        agree(f"loss of step {step}", mine, theirs, TOLERANCE)
        mine.backward()
        optimizer.step()
        compared += agree_all(under(NUMBERS, case), f"step{step:02}", ours, TOLERANCE, layers)
    assert compared == 6 * len(layers)  # values after 4 steps, and two moments after the last

    merged = model.merge_and_unload()
    with torch.no_grad():
        logits = merged(input_ids=NUMBERS["probe.inputs"].long()).logits
    agree("logits after merging", logits, NUMBERS[f"{case}.fused.logits"], TOLERANCE)


def test_fields_that_draw_as_the_authors_do():
    channels = channels_of("all")
    names = ("o_proj", "v_proj", "down_proj", "up_proj")
    theirs = {name: [c for layer, c in channels.items() if layer.endswith(name)] for name in names}
    sizes = {"o_proj": 32, "v_proj": 32, "down_proj": 48, "up_proj": 48}  # of both layers
    ratios = {name: sum(c.numel() for c in theirs[name]) / size for name, size in sizes.items()}
    config = S2FTConfig(
        scale=1.0,
        ratio_pattern=ratios,
        granularity="head",
        allocation="global",
        coupled=False,
        target_modules=list(names),
    )
    model = get_peft_model(llama(), config).get_base_model()
    for name in names:
        ours = [model.get_submodule(layer).support("default").channels for layer in channels if layer.endswith(name)]
        assert sum(c.numel() for c in ours) == sum(c.numel() for c in theirs[name])
        for chosen in ours + theirs[name]:
            if name in ("o_proj", "v_proj"):
                heads = chosen.view(-1, HEAD)
                assert torch.equal(heads, heads[:, :1] + torch.arange(HEAD)) and not (heads[:, 0] % HEAD).any()

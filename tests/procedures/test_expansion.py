"""Copied blocks: the same bits at first, chosen by the loss without them, in several architectures."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from sparse_peft.procedures import expand_layers
from tests.helpers.language_models import small_llama

IDS = torch.arange(3, 23).view(2, 10)
BATCH = {"input_ids": IDS, "labels": IDS}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40))


def gemma():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, vocab_size=40,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "make", [lambda: small_llama(num_hidden_layers=3), gpt2, gemma], ids=["llama", "gpt2", "gemma"]
)
def test_the_function_is_the_same_bit_for_bit(make):
    model = make().eval()
    plain = copy.deepcopy(model)
    found = expand_layers(model, blocks=[0, 2])
    assert found.copies == [1, 4] and model.config.num_hidden_layers == 5
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        # a cache has a place for each block
        assert torch.equal(
            model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False),
            plain.generate(IDS[:, :4], max_new_tokens=3, do_sample=False),
        )
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training and all(".1." in name or ".4." in name for name in training)
    model(**BATCH).loss.backward()
    assert sum(bool(p.grad is not None and p.grad.any()) for p in model.parameters()) >= 4


def test_the_blocks_that_matter_least_are_copied():
    model = small_llama(num_hidden_layers=4).eval()
    expected = {}
    for number in range(4):
        without = copy.deepcopy(model)
        del without.model.layers[number]
        without.config.num_hidden_layers = 3
        with torch.no_grad():
            expected[number] = float(without(**BATCH, use_cache=False).loss - model(**BATCH).loss)
    found = expand_layers(model, 1, batches=[BATCH])
    (least,) = found.copied
    assert expected[least] == min(expected.values()) and found.copies == [least + 1]
    assert found.importance == pytest.approx(expected, abs=1e-5)


def test_an_adapter_trains_the_copies():
    model = small_llama(num_hidden_layers=3)
    copies = expand_layers(model, blocks=[1]).copies
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=copies))
    names = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert names and all("layers.2." in name for name in names)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = small_llama(num_hidden_layers=3).eval()
    expected = model(IDS).logits
    for given, message in (
        ({}, "either batches"),
        ({"blocks": [3]}, "numbers from 0 to 2"),
        ({"blocks": [0], "writers": ["gate"]}, "has none of the layers gate"),
        ({"blocks": [0], "writers": ["down_proj"]}, "computes something else with copies of blocks"),
        ({"batches": []}, "batches has none"),
    ):
        with pytest.raises(ValueError, match=message):
            expand_layers(model, **given)
        assert len(model.model.layers) == model.config.num_hidden_layers == 3
        assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(ValueError, match="a model of transformers"):
        expand_layers(torch.nn.Linear(2, 2), blocks=[0])

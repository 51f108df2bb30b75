"""LT-SFT's two phases: entries that a training of whole layers moves most, rewinding, and a second training."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from sparse_peft import SparseConfig, select_support
from sparse_peft.adapters import compose, lottery_ticket
from tests.helpers.trained_adapters import deltas, llama, three

NAMES = ["first", "second", "third"]


def phase(seed, steps=4, lr=1e-2):
    """A training of whatever requires gradients, on data of its own."""

    def train(model):
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        model.train()
        for _ in range(steps):
            x = torch.randn(8, 7, generator=generator)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


@pytest.mark.parametrize("allocation", ["global", "numel"])
def test_the_entries_that_move_most(allocation):
    """LT-SFT's threshold over all tensors, in float64, on a copy of the model that is trained by hand."""
    model, trained = three(), three()
    supports = lottery_ticket(model, phase(1), num_params=40, allocation=allocation, target_modules=NAMES)
    phase(1)(trained)
    moved = {n: (getattr(trained, n).weight - getattr(model, n).weight).double().abs() for n in NAMES}
    assert sum(support.nnz for support in supports.values()) == 40
    if allocation == "global":
        best = torch.cat([m.flatten() for m in moved.values()]).topk(40).values.min()
        expected = {name: (m.flatten() >= best).nonzero().squeeze(1) for name, m in moved.items()}
    else:
        expected = {name: m.flatten().topk(supports[name].nnz).indices.sort().values for name, m in moved.items()}
    for name, support in supports.items():
        assert torch.equal(support.indices.long(), expected[name]), name


def test_the_model_is_rewound_to_the_bit_with_its_flags():
    model = three()
    model.first.bias.requires_grad_(False)
    model.third.requires_grad_(False)  # a target: it trains in the first phase
    model.second.train()
    before = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    seen = {}

    def train(net):
        seen.update({name: p.requires_grad for name, p in net.named_parameters()})
        phase(1)(net)

    lottery_ticket(model, train, density=0.1, target_modules=["third", "second"])
    assert seen == {**flags, "third.weight": True}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in (model, model.first, model.second)] == [False, False, True]


def test_a_second_round_adds_entries_that_moved_most_beside_the_known():
    model = three()
    first = lottery_ticket(model, phase(1), num_params=30, target_modules=NAMES)
    adapted = get_peft_model(
        copy.deepcopy(model), select_support(model, SparseConfig(selection="given", scale=1.0), supports=first)
    )
    phase(2)(adapted)
    merged = adapted.merge_and_unload().requires_grad_(True)
    before = copy.deepcopy(merged.state_dict())
    both = lottery_ticket(merged, phase(3), known=first, num_params=20, target_modules=NAMES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())
    phase(3)(merged)  # the same training by hand
    moved = {n: (getattr(merged, n).weight - getattr(model, n).weight).double().abs().flatten() for n in NAMES}
    for name, support in first.items():
        moved[name][support.indices.long()] = 0
    best = torch.cat(list(moved.values())).topk(20).values.min()
    for name in NAMES:
        chosen = moved[name] >= best
        if name in first:
            chosen[first[name].indices.long()] = True
        found = both[name].indices.long() if name in both else torch.tensor([], dtype=torch.int64)
        assert torch.equal(found, chosen.nonzero().squeeze(1)), name
    assert sum(support.nnz for support in both.values()) == 50
    with pytest.raises(ValueError, match="known: layer fourth is no target"):
        lottery_ticket(model, phase(1), known={"fourth": first[NAMES[0]]}, num_params=30, target_modules=NAMES)


def test_a_training_that_fails_is_rewound_as_well():
    model = three()
    before = copy.deepcopy(model.state_dict())

    def train(net):
        phase(1)(net)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lottery_ticket(model, train, density=0.1, target_modules=NAMES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="none of the 3 target layers differs"):
        lottery_ticket(model, lambda net: None, density=0.1, target_modules=NAMES)
    with pytest.raises(TypeError, match="both given"):
        from sparse_peft.adapters import ExtractOptions  # noqa: PLC0415

        lottery_ticket(model, phase(1), ExtractOptions(density=0.1), r=2)


def test_a_language_and_a_task_are_trained_and_composed(tmp_path):
    """The whole recipe with a Trainer: two phases each for two texts, and the sum."""
    base = llama()
    texts = {"language": torch.arange(0, 20), "task": torch.arange(20, 40)}

    def trainer(model, text, lr):
        generator = torch.Generator().manual_seed(0)
        order = [text[torch.randperm(20, generator=generator)] for _ in range(8)]
        data = [{"input_ids": ids, "labels": ids} for ids in order]
        args = TrainingArguments(
            tmp_path / "runs", max_steps=6, per_device_train_batch_size=4, learning_rate=lr, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(model, args, train_dataset=data).train()

    def loss(model, text):
        ids = text[None, torch.arange(19, -1, -1)]
        return cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item()

    before = copy.deepcopy(base.state_dict())
    found = {}
    for name, text in texts.items():
        supports = lottery_ticket(base, lambda net, text=text: trainer(net, text, 1e-3), density=0.05)
        config = select_support(base, SparseConfig(selection="given", scale=1.0), supports=supports)
        model = get_peft_model(base, config)
        trainer(model, text, 1e-2)
        model.save_pretrained(tmp_path / name)
        assert loss(model.eval(), text) < loss(model.unload().eval(), text)
        assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
        found[name] = supports
    compose([tmp_path / "language", tmp_path / "task"], tmp_path / "both")
    parts = [deltas(PeftModel.from_pretrained(llama(), tmp_path / name)) for name in (*texts, "both")]
    for layer, both in parts[2].items():
        zero = torch.zeros_like(both)
        assert torch.allclose(both, parts[0].get(layer, zero) + parts[1].get(layer, zero), atol=1e-7)
    both = PeftModel.from_pretrained(llama(), tmp_path / "both").eval()
    for text in texts.values():
        assert loss(both, text) < loss(llama(), text)

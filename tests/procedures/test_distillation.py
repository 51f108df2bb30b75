"""Distillation: parts against float64, teachers, trainers, packing and padding."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from sparse_peft import PruneConfig, SparseConfig
from sparse_peft.numerics import panel_limit
from sparse_peft.procedures import DistillationLoss
from sparse_peft.procedures.distillation import _Difference
from tests.helpers.language_models import llama

CONFIGS = {
    "lora": LoraConfig(r=4, target_modules="all-linear"),
    "sparse": SparseConfig(density=0.1, target_modules="all-linear"),
    "prune": PruneConfig(pattern="2:4", r=4, target_modules="all-linear"),
}


def student_of(kind="lora"):
    model = get_peft_model(llama(), copy.deepcopy(CONFIGS[kind]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch_of(size=3, length=7, padding=True):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[0, 4:] = mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100  # a prompt
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, labels


def dense_loss(student, teacher, labels, mask, *, ce=0.0, kl=0.0, squarehead=0.0, temperature=2.0):
    """In float64, token by token and layer by layer."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for place in range(1, labels.shape[1]):
            label = int(labels[row, place])
            if label == -100:
                continue
            count += 1
            s, t = (m["logits"][row, place - 1].double() for m in (student, teacher))
            total = total - ce * s.log_softmax(-1)[label]
            p = (t / temperature).softmax(-1)
            total = total + kl * temperature**2 * (p * (p.log() - (s / temperature).log_softmax(-1))).sum()
    total = total / count
    if squarehead:
        for s, t in list(zip(student["hidden_states"], teacher["hidden_states"], strict=True))[1:]:
            s, t = s.double()[mask == 1], t.double()[mask == 1]
            total = total + squarehead * (s - t).square().mean() / (
                t.square().mean() + torch.finfo(torch.bfloat16).eps
            )
    return total


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "weights", [{"kl": 1.5}, {"squarehead": 0.7}, {"ce": 0.5, "kl": 0.3, "squarehead": 0.2}], ids=str
)
def test_it_is_the_dense_loss_and_its_teacher_is_the_base(kind, weights):
    model, base = student_of(kind), llama().eval()
    inputs, labels = batch_of()
    loss_fn = DistillationLoss(model, **{"ce": 0.0, "kl": 0.0, **weights})
    with panel_limit(2000):  # three tokens at a time
        loss = loss_fn(model(**inputs), labels)
        loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss_fn.close()
    student = model(**inputs, output_hidden_states=True)
    with torch.no_grad():
        teacher = base(**inputs, output_hidden_states=True)
    wanted = dense_loss(student, teacher, labels, inputs["attention_mask"], **weights)
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    assert grads
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in grads)


def test_another_model_as_the_teacher_does_what_the_adapter_off_does():
    inputs, labels = batch_of()
    results = []
    for teacher in ("adapter_off", llama()):
        model = student_of()
        loss = DistillationLoss(model, teacher, kl=1.0, squarehead=1.0)(model(**inputs), labels)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        if isinstance(teacher, nn.Module):
            assert teacher.training and all(p.grad is None for p in teacher.parameters())
        assert all(p.requires_grad for name, p in model.named_parameters() if "lora" in name) and model.training
    assert len(results[0]) > 5
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_a_student_that_is_its_teacher_has_neither_loss_nor_gradient():
    model = get_peft_model(llama(), copy.deepcopy(CONFIGS["lora"]))
    inputs, labels = batch_of()
    loss = DistillationLoss(model, ce=0.0, kl=1.0, squarehead=1.0)(model(**inputs), labels)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-6


def test_padding_does_not_matter_and_accumulation_is_the_whole_batch():
    model = student_of()
    inputs, labels = batch_of()
    loss_fn = DistillationLoss(model, kl=1.0, squarehead=1.0)
    loss = loss_fn(model(**inputs), labels)
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 9)}
    torch.testing.assert_close(loss_fn(model(**other), labels), loss)
    whole = DistillationLoss(model, kl=1.0)
    items = (labels[:, 1:] != -100).sum()
    parts = [
        whole(model(**{name: t[row : row + 1] for name, t in inputs.items()}), labels[row : row + 1], items)
        for row in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole(model(**inputs), labels))


def test_squarehead_is_indifferent_to_scale_and_takes_layers():
    s, t = torch.randn(2, 5, 8), torch.randn(2, 5, 8) * 3
    one, ten = _Difference.apply(s, t, None), _Difference.apply(10 * s, 10 * t, None)
    torch.testing.assert_close(one, ten, rtol=1e-2, atol=0)
    model = student_of()
    inputs, labels = batch_of()

    def loss(**fields):
        loss_fn = DistillationLoss(model, ce=0.0, kl=0.0, squarehead=1.0, **fields)
        found = loss_fn(model(**inputs), labels)
        loss_fn.close()
        return found

    each = [loss(layers=[number]) for number in range(2)]
    torch.testing.assert_close(loss(), each[0] + each[1])
    torch.testing.assert_close(loss(reduction="mean"), (each[0] + each[1]) / 2)


def test_logits_from_the_batch_and_classifiers():
    model, base = student_of(), llama().eval()
    inputs, labels = batch_of()
    with torch.no_grad():
        logits = base(**inputs).logits
    of_model = DistillationLoss(model, base)
    wanted = of_model(model(**inputs), labels)
    of_model.close()
    loss_fn = DistillationLoss(model, "batch")
    torch.testing.assert_close(loss_fn(model(**inputs, teacher_logits=logits), labels), wanted)
    with pytest.raises(ValueError, match="the batch has no teacher_logits"):
        loss_fn(model(**inputs), labels)
    with pytest.raises(ValueError, match="teacher's logits have shape"):
        loss_fn(model(**inputs, teacher_logits=logits[..., :-1]), labels)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return CausalLMOutput(logits=self.head(x))

    student, teacher, x = Classifier(), Classifier(), torch.randn(5, 4)
    found = DistillationLoss(student, teacher, kl=1.0, temperature=1.0)(student(x), torch.tensor([0, 1, 2, 0, -100]))
    mine, theirs = (m(x).logits[:4].double().log_softmax(-1) for m in (student, teacher))
    kl = (theirs.exp() * (theirs - mine)).sum() / 4
    torch.testing.assert_close(found.double(), kl + F.nll_loss(mine, torch.tensor([0, 1, 2, 0])))


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_checkpointing_changes_nothing(kind):
    results = []
    for is_on in (False, True):
        model = student_of(kind)
        if is_on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        inputs, labels = batch_of()
        loss_fn = DistillationLoss(model, kl=1.0, squarehead=1.0)
        loss = loss_fn(model(**inputs, use_cache=False), labels)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_what_cannot_be_is_refused():
    model = student_of()
    with pytest.raises(ValueError, match="nothing would train"):
        DistillationLoss(model, ce=0, kl=0)
    with pytest.raises(TypeError, match="teacher='somebody'"):
        DistillationLoss(model, "somebody")
    with pytest.raises(ValueError, match="logits have no hidden states"):
        DistillationLoss(model, "batch", squarehead=1.0)
    with pytest.raises(ValueError, match="temperature"):
        DistillationLoss(model, temperature=0.0)
    inputs, labels = batch_of()
    with pytest.raises(ValueError, match="labels=None"):
        DistillationLoss(model)(model(**inputs), None)
    with pytest.raises(ValueError, match="no forward pass yet"):
        DistillationLoss(model)(SimpleNamespace(logits=None), labels)
    plain = llama()
    with pytest.raises(TypeError, match="has no adapter to switch off"):
        DistillationLoss(plain)(plain(**inputs), labels)

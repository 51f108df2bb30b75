"""Small models for procedures: PEFT's LoRA and a sparse delta on four blocks, and runs that stop and resume."""

import copy

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from sparse_peft import SparseConfig, SparsityController
from tests.helpers.training_loop import batch_at

KINDS = {
    "lora": lambda **fields: LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["up", "down"], **fields}),
    "sparse": lambda **fields: SparseConfig(
        **{"density": 0.2, "scale": 1.0, "target_modules": ["up", "down"], **fields}
    ),
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Four blocks in ``layers``, as language models name theirs, on the batches of ``training_loop``."""

    def __init__(self, width=7, blocks=4):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(17, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x)
        for block in self.layers:
            x = block(x)
        return self.head(x)


def adapted(kind="lora", dtype=torch.float32, **fields):
    base = Net().to(dtype)
    torch.manual_seed(1)
    model = get_peft_model(base, KINDS[kind](**fields), autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model, batch):
    x, y = batch
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


def batches(numbers):
    return [batch_at(number) for number in numbers]


def optimizer_of(model, kind=torch.optim.AdamW, **options):
    return kind([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **options})


def train(model, optimizer, controller, steps, called=None, part=slice(None)):
    """Optimizer steps with these numbers, each on its own batch; the loss of each."""
    losses = []
    for step in steps:
        batch = [tensor[part] for tensor in batch_at(step)]
        loss = loss_of(called or model, batch)
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(kind, *procedures, steps=9, dtype=torch.float32, optimizer=torch.optim.AdamW, **fields):
    """A trained model and its controller."""
    model = adapted(kind, dtype, **fields)
    stepped = optimizer_of(model, optimizer)
    controller = SparsityController(model, stepped, steps, procedures=procedures)
    train(model, stepped, controller, range(steps))
    return model, controller


def assert_resumes(kind, *procedures, steps=9, stops=(1, 4, 5), **fields):
    """A run that is resumed after each of these steps equals the uninterrupted one bit for bit."""
    whole, controller = run(kind, *procedures, steps=steps, **fields)
    for stop in stops:
        first = adapted(kind, **fields)
        optimizer = optimizer_of(first)
        train(first, optimizer, SparsityController(first, optimizer, steps, procedures=procedures), range(stop))
        saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
        second = adapted(kind, **fields)
        second.load_state_dict(saved[0])
        optimizer = optimizer_of(second)
        optimizer.load_state_dict(saved[1])
        resumed = SparsityController(second, optimizer, steps, procedures=procedures)
        assert resumed.completed_steps == stop
        train(second, optimizer, resumed, range(stop, steps))
        for name, tensor in whole.state_dict().items():
            assert torch.equal(second.state_dict()[name], tensor), f"{name} after a stop at {stop}"
        assert resumed.history == controller.history

"""A small stand-in for the utilities of PEFT's comparison: what a driver meets there, by PEFT's names."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from peft import get_peft_model
from peft.utils import infer_device
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

device = infer_device()
if device not in ["cuda", "xpu"]:
    raise RuntimeError("CUDA or XPU is not available, currently only CUDA or XPU is supported")

HERE = Path(__file__).parent
FILE_NAME_TRAIN_PARAMS = "training_params.json"
RESULT_PATH = str(HERE / "results")
RESULT_PATH_TEST = str(HERE / "temporary_results")
RESULT_PATH_CANCELLED = str(HERE / "cancelled_results")


def validate_experiment_path(path):
    parts = path.rstrip("/").split("/")
    if len(parts) != 3 or parts[0] != "experiments" or not Path(path).exists():
        raise ValueError(f"Path {path} does not have the correct structure")
    return "/".join(parts[1:])


def get_train_config(path):
    settings = json.loads((HERE / "default_training_params.json").read_text())
    return SimpleNamespace(**settings | json.loads(Path(path).read_text()))


def init_accelerator():
    accelerator = getattr(torch, device, torch.cuda)
    accelerator.reset_peak_memory_stats()
    accelerator.manual_seed_all(0)
    nn.Linear(1, 1).to(device)
    return accelerator.max_memory_reserved()


def get_tokenizer(*, model_id, max_seq_length):
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    tokenizer.model_max_length = max_seq_length
    return tokenizer


def get_model(*, model_id, peft_config):
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_id, device_map=device), peft_config)


def get_optimizer_and_scheduler(model, *, optimizer_type, max_steps, lr_scheduler_arg, **optimizer_kwargs):
    optimizer = getattr(torch.optim, optimizer_type)(model.parameters(), **optimizer_kwargs)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, max_steps)


def get_peft_branch():
    command = ["git", "rev-parse", "--abbrev-ref", "HEAD"]
    return subprocess.check_output(command, cwd=Path(peft.__file__).parent).decode().strip()

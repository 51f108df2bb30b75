import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# what is measured on one machine at one moment must not decide which path a test takes
os.environ.setdefault("SPARSE_PEFT_CALIBRATE", "0")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels then run in Python; read when a kernel is defined, so before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)

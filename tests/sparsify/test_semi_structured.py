"""torch's semi-structured tensors: on CUDA alone, with the same outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_peft.sparsify import prune, to_semi_structured
from tests.sparsify.models import gpt2, llama


@pytest.mark.parametrize(
    "make, pattern, options, message",
    [
        (llama, "2:4", {}, r"layer model\.layers\.0\.self_attn\.q_proj is on cpu, .*; move the model there, or use"),
        (llama, 0.5, {}, r"layer model\.layers\.0\.self_attn\.q_proj does not have 2 of every 4 inputs at zero"),
        (lambda: nn.Sequential(nn.Linear(6, 4)), 0.9, {}, "layer 0 does not have 2 of every 4"),
        (gpt2, "2:4", {}, r"layer transformer\.h\.0\.attn\.c_attn is a Conv1D"),
        (llama, "2:4", {"restorable": True}, "keeps its original weights"),
    ],
)
def test_what_has_no_kernel_is_refused_unchanged(make, pattern, options, message):
    model = make()
    prune(model, pattern, progress=False, **options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        to_semi_structured(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_are_the_dense_models(dtype):
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64, bias=False)).to("cuda", dtype)
    prune(model, "2:4", progress=False)
    dense, x = copy.deepcopy(model), torch.randn(32, 256, device="cuda", dtype=dtype)
    assert to_semi_structured(model) == ["0", "2"]
    torch.testing.assert_close(model(x), dense(x), rtol=2e-2, atol=2e-2)
    small = nn.Sequential(nn.Linear(8, 8)).to("cuda", dtype)
    prune(small, "2:4", progress=False)
    with pytest.raises(ValueError, match=r"layer 0: .*shape"):
        to_semi_structured(small)

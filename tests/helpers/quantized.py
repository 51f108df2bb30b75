"""Small models on bitsandbytes bases, and their dense reference."""

import pytest
import torch
from torch import nn

bnb = pytest.importorskip("bitsandbytes")


class Quantised(nn.Module):
    def __init__(self, kind, compute_dtype=torch.float32, zeros=0.0):
        super().__init__()
        dense = nn.Linear(128, 64), nn.Linear(64, 32, bias=False)
        for m in dense if zeros else ():
            m.weight.data[torch.rand(m.weight.shape) < zeros] = 0
        if kind == "4bit":
            self.first, self.second = (
                bnb.nn.Linear4bit(
                    m.in_features,
                    m.out_features,
                    bias=m.bias is not None,
                    compute_dtype=compute_dtype,
                    quant_type="nf4",
                    compress_statistics=True,
                )
                for m in dense
            )
        else:
            self.first, self.second = (
                bnb.nn.Linear8bitLt(m.in_features, m.out_features, bias=m.bias is not None, has_fp16_weights=False)
                for m in dense
            )
        for mine, m in zip((self.first, self.second), dense, strict=True):
            mine.load_state_dict(m.state_dict())

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def build(kind, **kwargs):
    torch.manual_seed(0)
    return Quantised(kind, **kwargs).to("cpu")


def dequantised(layer):
    return layer.dequantised().double()


def check_against_the_dense_reference(model, atol=1e-2):
    x = torch.randn(2, 5, 128, requires_grad=True)
    y = model(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    layers = [model.base_model.model.first, model.base_model.model.second]
    weights = [(dequantised(m) + m.get_delta_weight("default").double()).requires_grad_() for m in layers]
    xd = x.detach().double().requires_grad_()
    yd = torch.relu(xd @ weights[0].t() + layers[0].bias.double()) @ weights[1].t()
    yd.backward(grad.double())
    torch.testing.assert_close(y.double(), yd, rtol=1e-3, atol=atol)
    torch.testing.assert_close(x.grad.double(), xd.grad, rtol=1e-3, atol=atol)
    for layer, weight in zip(layers, weights, strict=True):
        state, where = layer.deltas["default"], layer.support("default").indices.long()
        values, gathered = state.values, state.value_scale * weight.grad.reshape(-1)[where]
        torch.testing.assert_close(values.grad.double(), gathered, rtol=1e-3, atol=atol * state.value_scale)
        assert (values.grad != 0).float().mean() > 0.5  # gradients reach every value that ReLU lets through


def four_bit_layer(rows, cols, block, quant_type="nf4", nested=True, dtype=torch.float32):
    layer = bnb.nn.Linear4bit(
        cols, rows, bias=False, compute_dtype=dtype, quant_type=quant_type, compress_statistics=nested
    )
    weight = torch.randn(rows, cols, dtype=dtype)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, blocksize=block, quant_type=quant_type, compress_statistics=nested
    )
    try:
        return layer.to("cpu")
    except RuntimeError as error:
        if "must be nf4 on CPU" in str(error) or "must be divisible by blocksize" in str(error):
            pytest.skip(f"bitsandbytes {bnb.__version__} has no such layers on a CPU")
        raise

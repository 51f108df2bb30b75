"""Forms that a method's states have without saying more than their parts."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_peft.adapters.delta_matrix import DeltaMatrix
from sparse_peft.adapters.entry_format import sparse_state
from sparse_peft.support import Support
from sparse_peft.tuners.base_state import TrainedState
from sparse_peft.tuners.forms import Entries, layer_of_factors, weightless_layer


class State(TrainedState):
    """A state of an unknown method, of the given parts."""

    value_name = "scale"

    def __init__(self, entries=None, factors=None):
        super().__init__("layer")
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.zeros(5, dtype=torch.int32))
        self.position_names = ("table",)
        self.parts = entries, factors

    def randomise(self):
        pass

    def sparse_part(self):
        return self.parts[0]

    def low_rank_part(self):
        return self.parts[1]


def entries(shape=(5, 7), lines=None, dim=0):
    """Random entries, in a few rows or columns if ``lines`` are given."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)
    if lines is not None:
        dense = torch.zeros(shape).index_copy(dim, torch.tensor(lines), dense.index_select(dim, torch.tensor(lines)))
    flat = dense.flatten().nonzero().squeeze(1)
    return Entries(Support(shape, flat), dense.flatten()[flat]), dense


def factors(rank=2, inputs=7, outputs=5):
    return torch.randn(rank, inputs), torch.randn(outputs, rank)


@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("dim, lines", [(0, [1, 3]), (1, [0, 2, 6]), (0, None)])
def test_entries_as_lora(in_dim, dim, lines):
    part, dense = entries(lines=lines, dim=dim)
    lora = State(part).lora_factors(in_dim)
    product = lora.B @ lora.A * lora.scale
    assert torch.equal(product, dense if in_dim == 1 else dense.t())
    assert lora.rank == min(int(dense.any(1).sum()), int(dense.any(0).sum()))
    assert torch.equal(lora.padded(9).B @ lora.padded(9).A, product)
    assert lora.bytes == 4 * lora.rank * 12


def test_factors_as_lora():
    down, up = factors()
    lora = State(factors=(down, up)).lora_factors(1)
    assert torch.equal(lora.A, down) and torch.equal(lora.B, up) and lora.scale == 1


@pytest.mark.parametrize("parts, form, reason", [
    ((None, None), "lora", "no LoRA form because it is given neither by entries nor by low-rank factors; merge"),
    ((None, None), "sparse", "no sparse form because it is given neither by entries nor by low-rank"),
    ((None, None), "matrix", "no matrix form because"),
    ((entries()[0], factors()), "lora", "full rank; merge it .* or save an approximation of low rank"),
    ((entries()[0], factors()), "sparse", "no sparse form because it has low-rank factors; merge .*approximation"),
    ((None, factors()), "sparse", "no sparse form because it has low-rank factors"),
])  # fmt: skip
def test_a_form_that_a_delta_lacks_is_explained(parts, form, reason):
    state = State(*parts)
    ask = {"lora": lambda: state.lora_factors(1), "sparse": state.as_sparse, "matrix": lambda: DeltaMatrix(state)}
    with pytest.raises(ValueError, match=f"layer layer: the delta has .*{reason}"):
        ask[form]()


def test_parts_add_up_to_the_delta():
    part, dense = entries()
    down, up = factors()
    total = DeltaMatrix(State(part, (down, up)))
    x = torch.randn(7, 3, dtype=torch.float64)
    expected = dense.double() + up.double() @ down.double()
    torch.testing.assert_close(total.times(x), expected @ x)
    torch.testing.assert_close(total.transposed_times(x[:5]), expected.t() @ x[:5])
    assert total.square() == pytest.approx(float(expected.square().sum()))
    assert State(part).is_sparse and not State(part, (down, up)).is_sparse and not State().is_sparse


def test_sizes_of_a_state_that_says_nothing():
    sizes = State().sizes(torch.bfloat16)
    assert sizes.parameters == (3,) and sizes.position_bytes == 20 and sizes.file_bytes == 20 + 6
    assert sizes.entries is None and sizes.rank is None and sizes.channels is None


def test_only_states_that_combine_are_combined_as_their_own_kind():
    delta = sparse_state(*vars(entries()[0]).values())
    assert delta.combines_with(delta) and not State().combines_with(State()) and not delta.combines_with(State())


@pytest.mark.parametrize("in_dim, taps, kind", [(1, 1, nn.Linear), (0, 1, Conv1D), (1, 3, nn.Conv1d)])
def test_layers_without_memory(in_dim, taps, kind):
    layer = weightless_layer((5, 6), in_dim, taps)
    assert type(layer) is kind and layer.weight.reshape(5, 6).shape == (5, 6)
    assert getattr(layer, "bias", None) is None
    assert layer.weight.untyped_storage().nbytes() == 4


def test_factors_fit_one_layer():
    def shapes(inputs, outputs):
        return {"A": (2, inputs), "B": (outputs, 2)}

    def layer(*sizes):
        return layer_of_factors(
            "layer", (5, 7), {n: torch.empty(s) for n, s in zip("AB", sizes, strict=False)}, shapes
        )

    assert type(layer((2, 7), (5, 2))) is nn.Linear and type(layer((2, 5), (7, 2))) is Conv1D
    assert type(layer((2, 7))) is nn.Linear  # what is missing, the file's reader names
    with pytest.raises(
        ValueError, match=r"layer layer: factors of shapes \(2, 8\), \(5, 2\), where a weight of 5 x 7"
    ):
        layer((2, 8), (5, 2))

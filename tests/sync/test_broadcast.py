"""Publications and entries over a process group."""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model

from sparse_peft import SparseConfig
from sparse_peft.sync import (
    Kind,
    Publisher,
    Receiver,
    UpdateInfo,
    WeightPatch,
    broadcast_entries,
    broadcast_publication,
    receive_entries,
)
from tests.helpers.processes import join_group, run_on_two
from tests.helpers.two_layers import TwoLayers


def base_model():
    torch.manual_seed(0)
    return TwoLayers().to(torch.bfloat16)


def adapted():
    config = SparseConfig(density=0.2, target_modules=["first", "second"], init_weights=False)
    return get_peft_model(base_model(), config)


def _two_processes(rank, store):
    join_group(rank, store)
    merged = copy.deepcopy(adapted()).merge_and_unload().state_dict()
    if rank == 0:
        publisher = Publisher(adapted())
        broadcast_publication(publisher.publish())
        broadcast_entries(publisher.publish(full=True, explicit=True).patches)
    else:
        engine = base_model()
        Receiver(engine).apply_(broadcast_publication(None))
        assert all(torch.equal(tensor, merged[name]) for name, tensor in engine.state_dict().items())
        weights = base_model().state_dict()
        info = UpdateInfo.of(Publisher(adapted()).publish(explicit=True))
        for patch in receive_entries(info):
            weights[patch.name].view(-1).index_copy_(0, patch.indices.long(), patch.values)
        assert all(torch.equal(tensor, merged[name]) for name, tensor in weights.items())
    dist.destroy_process_group()


@pytest.mark.distributed
def test_an_engine_in_another_process_has_the_merged_models_bits(tmp_path):
    run_on_two(_two_processes, tmp_path / "store")


def test_update_info_lists_what_is_sent():
    info = UpdateInfo.of(Publisher(adapted()).publish(explicit=True))
    assert info.names == ["first.weight", "second.weight"]
    assert info.dtype_names == ["bfloat16", "bfloat16"]
    assert info.shapes == [[33, 17], [5, 33]]
    assert info.num_updates_list == [round(0.2 * 33 * 17), round(0.2 * 5 * 33)]


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (WeightPatch("a", Kind.HELD, (2, 2), torch.ones(2)), "explicit=True"),
        (WeightPatch("a", Kind.WHOLE, (2, 2), torch.ones(4)), "export the adapter merged"),
        (WeightPatch("a", Kind.SOME, (2, 2), torch.ones(1), torch.tensor([1])), "int32 only"),
    ],
)
def test_patches_without_int32_positions_are_refused(patch, message):
    with pytest.raises(ValueError, match=message):
        broadcast_entries([patch])

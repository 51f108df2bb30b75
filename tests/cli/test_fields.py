import pytest

from sparse_peft import SparseConfig
from sparse_peft.cli.fields import parse_fields

FIELDS = {
    "density=0.5": 0.5,
    "r=none": None,
    "allocation=erk": "erk",
    "resident=false": False,
    "target_modules=q_proj,v_proj": ["q_proj", "v_proj"],
    "target_modules=all-linear": "all-linear",
    "target_modules=.*q_proj": ".*q_proj",
    "block_size=16,32": [16, 32],
    "reselect_stop=1": 1,
    "reselect_stop=1.0": 1.0,
    'density_pattern={"v_proj": 0.05}': {"v_proj": 0.05},
    "layers-to-transform=0,1": [0, 1],
}


@pytest.mark.parametrize("setting", FIELDS)
def test_fields_are_read_by_their_types(setting):
    (value,) = parse_fields(SparseConfig, [setting]).values()
    assert value == FIELDS[setting] and type(value) is type(FIELDS[setting])

"""Records: registered by their class, and read from the files of earlier versions."""

import json
from dataclasses import dataclass

import pytest

from sparse_peft.dynamics import records
from sparse_peft.dynamics.records import Record, record_from_dict
from sparse_peft.tuners.sara.records import Freezing, LayerFreezing
from sparse_peft.tuners.snella.records import Allocation, LayerAllocation
from sparse_peft.tuners.sora.records import LayerRanks, Ranks
from sparse_peft.tuners.sparse.records import LayerChange, Reselection

# as files have them
RECORDS = [
    (
        Reselection(5, "default", 0.2, {"q": LayerChange(100, 20, 1000, 0.5)}, (20, 40), (80, 15, 5)),
        {
            "event": "reselection",
            "step": 5,
            "adapter": "default",
            "rate": 0.2,
            "layers": {
                "q": {
                    "entries": 100,
                    "replaced": 20,
                    "numel": 1000,
                    "drop_threshold": 0.5,
                    "grow_threshold": None,
                }
            },
            "age_edges": [20, 40],
            "ages": [80, 15, 5],
        },
    ),
    (
        Freezing(3, "b", {"q": LayerFreezing(100, 20, 1000, 0.01)}),
        {
            "event": "freezing",
            "step": 3,
            "adapter": "b",
            "layers": {"q": {"entries": 100, "frozen": 20, "numel": 1000, "threshold": 0.01}},
        },
    ),
    (
        Ranks(7, "b", 0.5, {"q": LayerRanks(3, 4, 8)}),
        {
            "event": "ranks",
            "step": 7,
            "adapter": "b",
            "penalty": 0.5,
            "layers": {"q": {"alive": 3, "size": 4, "initial": 8}},
        },
    ),
    (
        Allocation(9, "b", 30, {"q": LayerAllocation(30, 100, 1.0)}),
        {
            "event": "allocation",
            "step": 9,
            "adapter": "b",
            "budget": 30,
            "layers": {"q": {"entries": 30, "numel": 100, "score": 1.0}},
        },
    ),
]


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(records, "_kinds", dict(records._kinds))


@pytest.mark.parametrize(("record", "plain"), RECORDS, ids=lambda value: getattr(value, "event", ""))
def test_files_keep_every_field_under_its_name(record, plain):
    assert record.to_dict() == plain
    assert list(record.to_dict()) == list(plain)
    assert record_from_dict(json.loads(json.dumps(plain))) == record


def test_a_new_record_is_read_once_its_class_exists(registry):
    @dataclass(frozen=True)
    class Shift(Record, event="shift"):
        offset: int
        layers: dict[str, int]
        path: tuple[int, ...] = ()

    record = Shift(4, "default", 3, {"q": 1}, (1, 2))
    assert record_from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert record.logs() == {"sparsity/offset": 3.0}
    assert Shift.plural == "shifts" and Shift.plot_name is None


def test_two_records_cannot_have_one_name(registry):
    with pytest.raises(ValueError, match=r"event='ranks'.*sora\.records\.Ranks has this name already"):

        class Other(Record, event="ranks"):
            pass

    assert record_from_dict(RECORDS[2][1]) == RECORDS[2][0]


def test_an_unknown_event_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"event='melting': the known records are .*reselection.*import the package"):
        record_from_dict({"event": "melting", "step": 1})
    with pytest.raises(TypeError, match="layers"):
        record_from_dict({"event": "freezing", "step": 1, "adapter": "default"})

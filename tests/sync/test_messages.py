"""Publications as bytes and as files: read back equal, refused when damaged."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sparse_peft.sync import Kind, PatchError, PatchFolder, Publication, WeightPatch, from_bytes, to_bytes

PATCHES = (
    WeightPatch("a.weight", Kind.POSITIONS, (4, 5), torch.randn(3), torch.tensor([0, 7, 19], dtype=torch.int32)),
    WeightPatch("b.weight", Kind.HELD, (4, 5), torch.randn(3, dtype=torch.bfloat16)),
    WeightPatch("c.bias", Kind.WHOLE, (5,), torch.randn(5)),
    WeightPatch(
        "d.weight",
        Kind.POSITIONS,
        (2, 2),
        torch.randn(2),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([3], dtype=torch.int32),
    ),
)
PUBLICATION = Publication("base", "run", 7, None, PATCHES, frozenset({"a.weight", "b.weight"}))


def assert_equal(read, publication=PUBLICATION):
    for field in ("base", "run", "sequence", "since", "adapted"):
        assert getattr(read, field) == getattr(publication, field)
    for found, patch in zip(read, publication, strict=True):
        assert (found.name, found.kind, found.shape) == (patch.name, patch.kind, patch.shape)
        for part in ("values", "indices", "given_up"):
            a, b = getattr(found, part), getattr(patch, part)
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def test_bytes_are_read_back():
    assert_equal(from_bytes(to_bytes(PUBLICATION)))


def test_an_empty_publication_is_read_back():
    empty = Publication("base", "run", 8, 7, ())
    assert_equal(from_bytes(to_bytes(empty)), empty)


def test_the_layout_is_the_documented_one(tmp_path):
    """Read by safetensors and JSON alone, as an engine without this package does."""
    path = tmp_path / "message.safetensors"
    path.write_bytes(to_bytes(PUBLICATION))
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["sparse_peft"])
        assert header["format"] == 1
        assert (header["base"], header["run"], header["sequence"], header["since"]) == ("base", "run", 7, None)
        assert header["patches"][0] == {"name": "a.weight", "kind": "positions", "shape": [4, 5]}
        assert torch.equal(file.get_tensor("0.indices"), PATCHES[0].indices)
        assert torch.equal(file.get_tensor("1.values"), PATCHES[1].values)
        assert set(file.keys()) == {
            *("0.values", "0.indices", "1.values", "2.values", "3.values", "3.indices", "3.given_up")
        }


@settings(deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_equal(data):
    """One byte changed: an error, or a publication (of other values), never anything else."""
    message = bytearray(to_bytes(PUBLICATION))
    position = data.draw(st.integers(0, len(message) - 1))
    message[position] ^= data.draw(st.integers(1, 255))
    try:
        read = from_bytes(bytes(message))
    except PatchError:
        return
    assert isinstance(read, Publication)


@settings(deadline=None)
@given(st.integers(0, 2000))
def test_cut_bytes_are_refused(cut):
    message = to_bytes(PUBLICATION)
    with pytest.raises(PatchError):
        from_bytes(message[: min(cut, len(message) - 1)])


def with_header(**changes):
    message = to_bytes(PUBLICATION)
    (length,) = struct.unpack_from("<Q", message)
    outer = json.loads(message[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["sparse_peft"])
    outer["__metadata__"]["sparse_peft"] = json.dumps({**header, **changes})
    text = json.dumps(outer).encode()
    return struct.pack("<Q", len(text)) + text + message[8 + length :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2"),
        ({"sequence": "7"}, "sequence='7'"),
        ({"sequence": True}, "sequence=True"),
        ({"adapted": [["a.weight"]]}, "other things than names"),
        ({"patches": []}, "unknown tensors"),
        ({"patches": [{"name": "a", "kind": "nothing", "shape": [1]}] * 4}, "fields"),
        ({"patches": [{"name": "a", "kind": "held", "shape": [-1]}] * 4}, "shape"),
        ({"patches": [1] * 4}, "no values"),
        ({"patches": [{"name": "a", "kind": "held", "shape": [1]}] * 5}, "no values"),
    ],
)
def test_headers_are_checked(changes, message):
    with pytest.raises(PatchError, match=message):
        from_bytes(with_header(**changes))


def test_nesting_without_end_is_refused():
    with pytest.raises(PatchError, match="no publication"):
        from_bytes(struct.pack("<Q", 10**6) + b"[" * 10**6)


def test_a_folder_has_complete_files_with_rising_numbers(tmp_path):
    folder = PatchFolder(tmp_path / "patches")
    assert folder.latest() is None
    folder.write(PUBLICATION)
    assert folder.sequences() == [7]
    assert_equal(folder.read(7))
    with pytest.raises(ValueError, match="not newer"):
        folder.write(PUBLICATION)
    folder.write(Publication("base", "run", 9, 7, PATCHES))
    folder.remove_before(9)
    assert folder.sequences() == [9]
    with pytest.raises(PatchError, match="no such publication"):
        folder.read(7)


def test_a_broken_write_leaves_no_file(tmp_path, monkeypatch):
    folder = PatchFolder(tmp_path)
    monkeypatch.setattr("sparse_peft.sync.folder.to_bytes", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.write(PUBLICATION)
    assert list(tmp_path.iterdir()) == []

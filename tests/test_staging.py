"""Files take their places once they are complete: one by one, or together."""

import contextlib
from pathlib import Path

import pytest

from sparse_peft.staging import is_waiting, replaced_together, staging_folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_staging_folder_moves_when_it_is_complete(tmp_path):
    (tmp_path / "a").write_text("old")
    with staging_folder(tmp_path / "new") as staging:
        (staging / "b").write_text("b")
        assert not (tmp_path / "new" / "b").exists()
    with pytest.raises(OSError, match="full"), staging_folder(tmp_path) as staging:
        (staging / "a").write_text("half")
        raise OSError("full")
    assert contents(tmp_path).keys() == {Path("a"), Path("new/b")}
    assert (tmp_path / "a").read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["a", "new"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt, None])
def test_several_move_together(tmp_path, failure):
    (tmp_path / "a").write_text("old")
    with contextlib.suppress(OSError, KeyboardInterrupt), replaced_together():
        for name in ("a", "b"):
            with staging_folder(tmp_path) as staging:
                (staging / name).write_text("new")
        assert is_waiting(tmp_path / "b") and not is_waiting(tmp_path / "c")
        assert contents(tmp_path).get(Path("a")) == b"old"
        if failure is not None:
            raise failure
    expected = ["a"] if failure else ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert (tmp_path / "a").read_text() == ("old" if failure else "new") and not is_waiting(tmp_path / "b")

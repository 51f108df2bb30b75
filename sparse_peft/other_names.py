"""Names of methods under which people search for them, and what they are here."""

from __future__ import annotations

# {name in lower case, without "config" and punctuation: what to use}
OTHER_NAMES = {
    "lora": "LoraConfig of peft",
    "spiel": "SparseConfig(selection='accumulated_gradient') for SpIEL-AG, selection='momentum' with SM3 for -MA",
    "shira": "SparseConfig(selection='random'), SHiRA with a random mask",
    "supertuning": "SparseConfig(selection='magnitude')",
    "rigl": "SparseConfig(selection='rigl')",
    "set": "SparseConfig(selection='set')",
    "sift": "SparseConfig(selection='gradient')",
    "fish": "SparseConfig(selection='fisher')",
    "lift": "SparseConfig(selection='principal')",
    "ltsft": "SparseConfig(selection='given') with the positions of sparse_peft.adapters.lottery_ticket",
    "rosa": "SLTrainConfig(selection='fisher'), a sparse delta beside low rank",
    "dsee": "SLTrainConfig(selection='residual'), a sparse delta beside low rank",
    "snell": "SnellaConfig without target_sparsity",
    "more": "MonarchConfig",
    "sketchtune": "SketchConfig",
}


def other_name(name: str) -> str | None:
    """What a name that the package does not have is here; None if it is not known."""
    plain = name.lower().replace("_", "").replace("-", "")
    for ending in ("config", "model", ""):
        found = OTHER_NAMES.get(plain.removesuffix(ending))
        if found is not None:
            return found
    return None

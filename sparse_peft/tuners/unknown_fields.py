"""Keyword arguments that a config does not have: which one was meant, and what takes the place of LoRA's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from peft import LoraConfig, PeftConfig

from _sparse_peft_startup.spelling import did_you_mean

VERSION_FIELD = "sparse_peft_version"
RATE_FIELD = "recommended_rate"
BUDGETS = ("density", "ratio", "k", "num_params", "r", "threshold")
# {LoraConfig's field: (fields that take its place, of which a config may have one; why another config has none)}
LORA_FIELDS = {
    "lora_alpha": (("alpha", "scale"), "the learning rate sets the size of its updates"),
    "lora_dropout": (
        ("dropout",),
        "inputs cannot be dropped for single entries of a weight",
    ),
    "init_lora_weights": (("init_weights",), ""),
    "rank_pattern": (("density_pattern", "ratio_pattern", "groups_pattern"), "its layers have one r"),
}


def settable_fields(config_class: type[PeftConfig]) -> list[str]:
    """A method's own fields that are set by hand: not PEFT's bookkeeping, nor what an adapter fills in."""
    resolved = getattr(config_class, "resolved_fields", ())
    hidden = {VERSION_FIELD, RATE_FIELD, *PeftConfig.__dataclass_fields__, *resolved}
    return [field.name for field in fields(config_class) if field.name not in hidden]


def explain_unknown_field(config_class: type[PeftConfig], name: str) -> str:
    """The cure for a field that the config does not have."""
    known = settable_fields(config_class)
    if name in LORA_FIELDS:
        replacements, reason = LORA_FIELDS[name]
        own = next((replacement for replacement in replacements if replacement in known), None)
        return f"a field of LoRA, {own!r} takes its place" if own else f"a field of LoRA; leave it out, {reason}"
    if name in LoraConfig.__dataclass_fields__:
        return "a field of LoRA without a counterpart; leave it out"
    if hint := did_you_mean([name], known):
        return hint.removeprefix("; ")
    if name in BUDGETS:
        return f"the budget is one of {', '.join(budget for budget in BUDGETS if budget in known)}"
    return f"the fields are {', '.join(known)}"


def unknown_fields_error(config_class: type[PeftConfig], names: Iterable[str]) -> TypeError:
    """The error for fields that the config does not have, with the cure for each.

    It starts as Python's own error does: PEFT looks for these words, and then ignores the fields of a file with a
    warning.
    """
    lora = [name for name in names if name in LoraConfig.__dataclass_fields__.keys() - LORA_FIELDS.keys()]
    others = [name for name in names if len(lora) == 1 or name not in lora]
    reasons = [f"{name!r}: {explain_unknown_field(config_class, name)}" for name in others]
    if len(lora) > 1:
        reasons.append(f"{', '.join(map(repr, lora))}: fields of LoRA without a counterpart; leave them out")
    return TypeError(f"{config_class.__name__}() got an unexpected keyword argument {'; '.join(reasons)}")

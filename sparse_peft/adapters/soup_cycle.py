"""Cycles of soups: prune, train copies that differ in little, average, and begin again from the average (SMS)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from peft import PeftModel, get_peft_model
from torch import nn

from ..constraints import Count, OneOf, Share, validated
from ..tuners.base_config import BaseSparseConfig
from .compose import compose
from .soup import Soup, greedy_soup, soup

HOW = ("uniform", "greedy")


def soup_cycle(
    base: Callable[[], nn.Module],
    config: BaseSparseConfig,
    train: Callable[[PeftModel, int, int], Any],
    folder: str | os.PathLike,
    *,
    keep: Sequence[float] = (1.0, 0.5, 0.5),
    members: int = 3,
    how: str = "uniform",
    score: Callable[[Path], float] | None = None,
) -> list[Soup]:
    """Prune an adapter in phases, each of which trains several copies on one support and averages them.

    Sparse model soups (Zimmer et al. 2024, https://arxiv.org/abs/2306.16788) train copies of one pruned model that
    differ in seed, data order, weight decay or learning rate. They have one support, so their average has it too, and
    the next phase prunes the average. Here it is an adapter that is pruned: each phase keeps the entries of the
    largest values in each layer.

    Args:
        base: makes the base model anew.
        config: of the adapter, with a support that does not change in training.
        train: ``train(model, phase, member)`` trains a copy; let seed and weight decay follow from the numbers.
        folder: gets ``phase-0/start``, ``phase-0/member-0`` ..., ``phase-0/soup`` and so on.
        keep: for each phase the share of the entries that are kept at its start; the first phase starts new.
        members: number of copies.
        how: ``"uniform"`` averages all copies, ``"greedy"`` those that help (see ``greedy_soup``).
        score: ``score(folder)`` of an adapter, with ``"greedy"``: the higher the better.

    Returns:
        The soup of each phase. The last one's adapter is in ``phase-<n>/soup``.

    Raises:
        ValueError: ``"greedy"`` without a score, a support that changes, or shares that are none.

    Example:
        >>> import tempfile, torch
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import soup_cycle
        >>> def base():
        ...     torch.manual_seed(0)
        ...     return torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> def train(model, phase, member):
        ...     torch.nn.init.normal_(model.base_model.model[0].deltas["default"].values)
        >>> config = SparseConfig(density=0.05, target_modules=["0"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     soups = soup_cycle(base, config, train, folder, keep=[1.0, 0.5], members=2)
        >>> soups[0].entries, soups[1].entries
        (102, 51)
    """
    how = validated("how", how, Annotated[str, OneOf(HOW)])
    members = validated("members", members, Count)
    shares = [validated(f"keep[{number}]", share, Share) for number, share in enumerate(keep)]
    if how == "greedy" and score is None:
        raise ValueError("how='greedy' without a score: copies are chosen by score(folder); pass one, or 'uniform'")
    if config.changes_in_training:
        raise ValueError(
            f"{type(config).__name__} changes its support during training, so copies would have different ones; use "
            "a static selection"
        )
    found: list[Soup] = []
    for phase, share in enumerate(shares):
        here = Path(folder) / f"phase-{phase}"
        if phase == 0:
            get_peft_model(base(), config).save_pretrained(str(here / "start"))
        else:
            last = Path(folder) / f"phase-{phase - 1}" / "soup"
            compose([last], here / "start", combination_type="magnitude_prune", density=share)
        copies = [here / f"member-{member}" for member in range(members)]
        for member, copy in enumerate(copies):
            model = PeftModel.from_pretrained(base(), here / "start", is_trainable=True)
            train(model, phase, member)
            model.save_pretrained(str(copy))
        found.append(
            greedy_soup(copies, here / "soup", score) if score and how == "greedy" else soup(copies, here / "soup")
        )
    return found

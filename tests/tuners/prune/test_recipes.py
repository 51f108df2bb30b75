"""Recipes in time: closed forms, ladders, and what contradicts itself."""

import math

import pytest

from sparse_peft import PruneConfig
from sparse_peft.sparsify import NM
from sparse_peft.tuners.prune.recipes import RECIPES, ladder_of


def test_the_mean_sparsity_of_a_cubic_run_is_its_closed_form():
    timeline = PruneConfig(recipe="gradual", pattern=0.8, mask_every=1).timeline(4000)
    kept = [timeline.wanted(step, 10**6)[1] for step in range(1, 4001)]
    assert kept == sorted(kept, reverse=True)
    assert {kept[step] for step in (0, 999)} == {10**6} and {kept[2999], kept[-1]} == {200_000}
    assert sum(kept) / 4000 / 10**6 == pytest.approx(1 - 0.625 * 0.8, abs=1e-3)
    assert [step for step in range(1, 20) if timeline.is_event(step)] == []
    assert timeline.is_event(1001) and timeline.is_event(3000) and not timeline.is_event(3001)


@pytest.mark.parametrize(
    ("pattern", "kind", "expected"),
    [
        (NM(1, 8), "stepwise", "7:8 4:8 2:8"),
        (NM(2, 8), "stepwise", "7:8 4:8"),
        (NM(2, 4), "stepwise", "3:4"),
        (NM(1, 16), "stepwise", "15:16 8:16 4:16 2:16"),
        (NM(2, 4), "geometric", "16:32 8:16 4:8"),
    ],
)
def test_ladders(pattern, kind, expected):
    assert " ".join(f"{p.n}:{p.m}" for p in ladder_of(pattern, kind)) == expected


def test_a_ladders_frames_are_equally_long_and_the_last_pattern_is_the_wanted_one():
    timeline = PruneConfig(recipe="sdgf", pattern="1:8", stop=100).timeline(None)
    seen = [timeline.wanted(step, 64)[0].n for step in range(120)]
    assert [seen.count(n) for n in (7, 4, 2, 1)] == [25, 25, 25, 45]


@pytest.mark.parametrize("decay", ["exp", "linear"])
def test_the_masks_zeros_decay_from_one_to_zero(decay):
    timeline = PruneConfig(recipe="mdgf", mask_decay=decay, stop=0.9).timeline(100)
    flow = [timeline.beta(step) for step in range(101)]
    assert flow[0] == 1 and flow == sorted(flow, reverse=True) and flow[90:] == [0.0] * 11
    assert flow[45] == pytest.approx(math.exp(-math.log(100) / 2) if decay == "exp" else 0.5)
    assert 0 < flow[89] < 0.012


def test_the_pull_rises_and_ends_with_the_mask():
    timeline = PruneConfig(recipe="ast", pull=0.2, pull_ramp=10, stop=50).timeline(100)
    assert timeline.pull_at(0) == 0 and timeline.pull_at(5) == pytest.approx(0.1)
    assert timeline.pull_at(10) == timeline.pull_at(50) == 0.2 and timeline.pull_at(51) == 0
    assert PruneConfig(recipe="ast", pull=0.2, pull_ramp=0).timeline(100).pull_at(1) == 0.2


def test_recipes_that_change_need_a_run_and_the_others_do_not():
    for name, recipe in RECIPES.items():
        config = PruneConfig(recipe=name)
        assert config.changes_in_training == recipe.changes and config.grad_flow
        if recipe.changes:
            with pytest.raises(ValueError, match="pass total_steps="):
                config.timeline(None)
            assert config.timeline(100).is_event(config.timeline(100).stop)
        assert config.timeline(100).beta(100) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "sdgf", "pattern": 0.5}, "pattern=0.5 with recipe='sdgf': n:m"),
        ({"recipe": "bdwp", "pattern": 0.5}, "pattern=0.5 with recipe='bdwp': n:m"),
        ({"recipe": "gradual", "pattern": "2:4"}, "a share of zeros is expected"),
        ({"recipe": "cast", "slorb": 4}, "slorb=4 with recipe='cast'"),
        ({"recipe": "ast", "score": "random"}, "score='random' with recipe='ast'"),
        ({"pattern": "half"}, "pattern='half'"),
        ({"pattern": 1.0}, "sparsity"),
        ({"recipe": "asp"}, "did you mean 'ast'"),
    ],
)
def test_what_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**fields)


def test_a_run_that_ends_before_its_mask_is_final_says_so():
    assert "stop=200 is after step 100" in next(PruneConfig(recipe="ast", stop=200).unreached_events(100))
    assert not list(PruneConfig(recipe="ast").unreached_events(100))
    with pytest.raises(ValueError, match="before start=50"):
        PruneConfig(recipe="ast", start=50, stop=20).timeline(100)

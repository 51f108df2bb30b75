import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_peft import SparseConfig
from sparse_peft.support import DECAYS, ReselectionSchedule, steps_of


def spiel(**fields):
    return SparseConfig(selection="accumulated_gradient", **fields)


def events(schedule, total):
    return [step for step in range(1, total + 1) if schedule.is_event(step)]


def test_the_trace_of_spiel_with_the_papers_defaults():
    schedule = spiel().reselection_schedule(100)
    trace = [(step, round(schedule.rate_at(step), 10)) for step in events(schedule, 100)]
    assert trace == [(5, 1.0), (25, 0.15), (45, 0.11), (65, 0.07), (85, 0.03)]
    windows = [[s for s in range(1, 101) if schedule.observes(s) and s <= e < s + 20] for e, _ in trace]
    assert windows == [list(range(e - 4, e + 1)) for e, _ in trace], "every window is 5 steps long"


@pytest.mark.parametrize("decay", DECAYS)
def test_decays_go_from_the_rate_to_nothing(decay):
    schedule = ReselectionSchedule(10, 0, False, 0.2, None, decay, 0, 100)
    rates = [schedule.rate_at(step) for step in range(0, 101)]
    assert rates[0] == 0.2
    assert rates[-1] == pytest.approx(0.2 if decay == "constant" else 0.0, abs=1e-15)
    assert rates == sorted(rates, reverse=True)


def test_decays_have_their_closed_forms():
    half = {name: ReselectionSchedule(1, 0, False, 1.0, None, name, 0, 4).rate_at(1) for name in DECAYS}
    assert half == pytest.approx({"constant": 1, "linear": 0.75, "cosine": (1 + 2**-0.5) / 2, "cubic": 0.75**3})


def test_set_and_rigl_begin_after_a_whole_period_without_a_full_replacement():
    for selection, window in (("set", 0), ("rigl", 1)):
        config = SparseConfig(selection=selection, reselect_every=7, schedule="cosine", reselect_stop=0.75)
        schedule = config.reselection_schedule(40)
        assert schedule.window == window
        assert events(schedule, 40) == [7, 14, 21, 28]
        assert [s for s in range(1, 41) if schedule.observes(s)] == ([7, 14, 21, 28] if window else [])
        assert 0 < schedule.rate_at(7) < 0.2


def test_start_and_stop_may_be_steps_or_shares():
    schedule = spiel(reselect_start=10, reselect_stop=0.5, reselect_every=10, accumulate=3).reselection_schedule(100)
    assert events(schedule, 100) == [13, 23, 33, 43]
    assert schedule.observes(11) and not schedule.observes(10)
    assert not any(schedule.observes(step) for step in range(44, 101)), "a window without an event observes nothing"
    assert schedule.rate_at(23) == pytest.approx(0.2 * (1 - 13 / 40))


def test_a_share_of_an_unknown_run_is_refused():
    with pytest.raises(ValueError, match=r"reselect_stop=1.0 is a share of the run.*total_steps="):
        spiel().reselection_schedule(None)
    assert spiel(reselect_stop=50).reselection_schedule(None).stop == 50
    assert steps_of(0.5, 101, "x") == 50
    with pytest.raises(ValueError, match=r"reselect_start=60 is step 60, after reselect_stop=0.5, step 50"):
        spiel(reselect_start=60, reselect_stop=0.5).reselection_schedule(100)


@given(
    every=st.integers(1, 30),
    window=st.integers(0, 30),
    leads=st.booleans(),
    start=st.integers(0, 40),
    length=st.integers(0, 120),
)
def test_each_event_has_exactly_its_window(every, window, leads, start, length):
    window = min(window, every)
    leads = leads and window > 0
    schedule = ReselectionSchedule(every, window, leads, 0.2, 1.0, "linear", start, start + length)
    at = events(schedule, 250)
    assert all(start < event <= start + length for event in at)
    assert all(b - a == every for a, b in itertools.pairwise(at))
    if length >= every:
        assert at[0] == start + (window if leads else every)
    observed = {step for step in range(1, 251) if schedule.observes(step)}
    assert observed == {step for event in at for step in range(event - window + 1, event + 1)}
    assert all(0 <= schedule.rate_at(event) <= 1 for event in at)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"reselect_every": 0}, ValueError, "reselect_every=0: an int of at least 1"),
        ({"reselect_every": 2.5}, TypeError, "reselect_every=2.5: an int"),
        ({"accumulate": 0}, ValueError, "accumulate=0: at least 1.*accumulated_gradient"),
        ({"accumulate": 21}, ValueError, "accumulate=21 and reselect_every=20"),
        ({"replace_rate": 0}, ValueError, "replace_rate=0: a share in"),
        ({"replace_rate": 1.5}, ValueError, "replace_rate=1.5"),
        ({"first_replace_rate": -1}, ValueError, "first_replace_rate=-1"),
        ({"schedule": "linaer"}, ValueError, "schedule='linaer': one of 'constant', 'linear', 'cosine', 'cubic'"),
        ({"reselect_start": -1}, ValueError, "reselect_start=-1: a number of optimizer steps"),
        ({"reselect_stop": 1.5}, ValueError, "reselect_stop=1.5"),
        ({"candidates": 0}, ValueError, "candidates=0"),
        ({"seed_moments": "ones"}, ValueError, "seed_moments='ones': one of 'gradient', 'zero'"),
        ({"selection": "set", "redistribute": True}, ValueError, "redistribute=True with selection='set'"),
        ({"selection": "spiel"}, ValueError, "selection='spiel'.*'accumulated_gradient', 'momentum', 'set', 'rigl'"),
    ],
)
def test_a_wrong_field_is_named(fields, error, message):
    with pytest.raises(error, match=message):
        SparseConfig(**{"selection": "accumulated_gradient", **fields})

"""Functions of other libraries are wrapped once, and a library without them is left alone."""

import functools

import peft.peft_model
import pytest
from peft import PeftModel
from transformers.integrations.peft import PeftAdapterMixin

from sparse_peft.tuners.files.card import guard_model_cards
from sparse_peft.tuners.files.refused_loads import guard_refused_loads
from sparse_peft.tuners.files.wrapped import wrap_once
from sparse_peft.tuners.files.writes import guard_adapter_writes


class Library:
    def double(self, number):
        return 2 * number

    @classmethod
    def name(cls):
        return cls.__name__


class Derived(Library):
    pass


def one_more(original, *args):
    """Add one."""
    return original(*args) + 1


def in_capitals(original, *args):
    """Shout."""
    return original(*args).upper()


@pytest.fixture
def library():
    return type("Library", (Library,), dict(vars(Library)))


def test_a_method_is_wrapped_once(library):
    for _ in range(3):
        wrap_once(library, "double", one_more)
    assert library().double(4) == 9 and library.double.__name__ == "double"


def test_somebody_elses_wrapper_on_top(library):
    wrap_once(library, "double", one_more)
    ours = library.double

    @functools.wraps(ours)
    def theirs(self, number):
        return 10 * ours(self, number)

    library.double = theirs
    wrap_once(library, "double", one_more)
    assert library().double(4) == 90


def test_two_wrappers_of_one_function(library):
    wrap_once(library, "double", one_more)
    wrap_once(library, "double", lambda original, *args: 10 * original(*args))
    assert library().double(4) == 90


def test_class_methods_get_the_class_and_inherited_ones_are_wrapped_for_the_heir_alone():
    wrap_once(Derived, "name", in_capitals)
    assert Derived.name() == "DERIVED" and Library.name() == "Library"


@pytest.mark.parametrize("missing", ["triple", "__doc__"])
def test_a_function_that_is_missing(library, missing):
    before = vars(library).copy()
    with pytest.warns(UserWarning, match=rf"Library.{missing} is missing in the installed .*Add one; install"):
        wrap_once(library, missing, one_more)
    assert vars(library) == before


def test_the_package_wraps_what_it_says_and_importing_it_again_changes_nothing():
    owners = {
        PeftModel: ("from_pretrained", "load_adapter", "save_pretrained", "create_or_update_model_card",
                    "_upload_modified_files"),
        PeftAdapterMixin: ("load_adapter",),
        peft.peft_model: ("safe_save_file",),
    }  # fmt: skip
    before = {(owner, name): getattr(owner, name) for owner, names in owners.items() for name in names}
    assert all("_sparse_peft_wrappers" in vars(getattr(f, "__func__", f)) for f in before.values())
    for guard in (guard_adapter_writes, guard_model_cards, guard_refused_loads):
        guard()
    assert before == {(owner, name): getattr(owner, name) for owner, name in before}

"""PEFT's own tests, unmodified, run against the methods that sparse_peft registers.

``python -m tests.peft_suite`` fetches the source distribution of the installed PEFT version from PyPI, replaces the
case lists of its test files by ours before collection and runs them. Nothing of PEFT is kept in this repository.

Environment:
    ``SPARSE_PEFT_PEFT_SDIST``: an unpacked PEFT source distribution to use in place of the download.
    ``SPARSE_PEFT_TEST_CACHE``: where the upstream files and the generated tiny models are kept
        (default: ``$XDG_CACHE_HOME/sparse_peft`` or ``~/.cache/sparse_peft``).
    ``SPARSE_PEFT_MUTANT``: run against a deliberately broken tuner, see ``mutants.py``.
"""

"""What other packages print about themselves is kept off the output of commands; warnings and errors are not."""

import logging
import os
import warnings

OF_LATER_VERSIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def quieten() -> None:
    """Leave out notices of deprecation, of missing kernels that nothing uses, and bars of dataset preparation.

    To be called before the packages are imported. Warnings of this package stay, and so do other packages' warnings
    of anything but deprecation.
    """
    quieten_bitsandbytes()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for category in OF_LATER_VERSIONS:
        warnings.filterwarnings("ignore", category=category, module=r"(?!sparse_peft\b)")


def quieten_bitsandbytes() -> None:
    """Leave out its warning of a kernel for CPUs: PEFT imports it, whether or not a weight has 4 bits."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

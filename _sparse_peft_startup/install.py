"""How the package is installed: the one place that says it."""

# What pip takes: a checkout's folder. On a package index it will be the name.
SOURCE = "."


def install_command(extra: str = "") -> str:
    """``pip install ".[extra]"``, for a checkout of the package."""
    return f'pip install "{SOURCE}[{extra}]"' if extra else f"pip install {SOURCE}"


def install_advice(extra: str = "") -> str:
    """The command, and where it runs."""
    return f"{install_command(extra)} in a checkout of sparse_peft"

"""Fetches the test files of the installed PEFT version."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SDIST_VARIABLE = "SPARSE_PEFT_PEFT_SDIST"
CACHE_VARIABLE = "SPARSE_PEFT_TEST_CACHE"

# Upstream's folder is called "tests" and so is ours; as a package it needs a name of its own.
PACKAGE = "peft_upstream_tests"
TEST_FILES = {
    "custom": "test_custom_models",
    "config": "test_config",
    "decoder": "test_decoder_models",
    "encdec": "test_encoder_decoder_models",
    "feature": "test_feature_extraction_models",
    "seqcls": "test_seq_classifier",
}
_SUPPORT_FILES = ("testing_common", "testing_utils")


class UpstreamUnavailableError(RuntimeError):
    """The tests of the installed PEFT version cannot be had here."""


def cache_folder() -> Path:
    explicit = os.environ.get(CACHE_VARIABLE)
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_peft"


def upstream_folder() -> Path:
    """The folder that holds the package ``peft_upstream_tests`` of the installed PEFT version, fetched if need be.

    Raises:
        UpstreamUnavailableError: the download failed, or the folder named in ``SPARSE_PEFT_PEFT_SDIST`` is of another
            version.
    """
    version = importlib.metadata.version("peft")
    folder = cache_folder() / f"peft-{version}"
    names = [f"{stem}.py" for stem in (*TEST_FILES.values(), *_SUPPORT_FILES)]

    def is_complete() -> bool:
        return all((folder / PACKAGE / name).is_file() for name in names)

    if is_complete():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        package = Path(temporary, "new", PACKAGE)
        package.mkdir(parents=True)
        unpacked = os.environ.get(SDIST_VARIABLE)
        if unpacked:
            _copy_from_folder(Path(unpacked), version, names, package)
        else:
            _copy_from_archive(_download(version, Path(temporary, "download")), names, package)
        (package / "__init__.py").touch()
        try:
            package.parent.rename(folder)
        except OSError:
            # a run beside this one was faster, or what is there is no longer all that is needed
            if not is_complete():
                shutil.rmtree(folder)
                package.parent.rename(folder)
    return folder


def _copy_from_folder(source: Path, version: str, names: list[str], package: Path) -> None:
    info = source / "PKG-INFO"
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    if f"Version: {version}" not in lines:
        raise UpstreamUnavailableError(
            f"{SDIST_VARIABLE}={source} is not an unpacked source distribution of the installed peft {version} "
            f"(looked for 'Version: {version}' in {info})"
        )
    for name in names:
        shutil.copyfile(source / "tests" / name, package / name)


def _copy_from_archive(archive: Path, names: list[str], package: Path) -> None:
    with tarfile.open(archive) as tar:
        for name in names:
            member = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/tests/{name}")
            (package / name).write_bytes(member.read())


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    if importlib.util.find_spec("setuptools"):
        command.append("--no-build-isolation")
    command += ["--dest", str(folder), f"peft=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("peft-*.tar.gz")) if done.returncode == 0 else []
    if len(archives) != 1:
        raise UpstreamUnavailableError(
            f"could not download the source distribution of peft {version} (development versions have none). Set "
            f"{SDIST_VARIABLE} to an unpacked copy. pip said:\n{done.stderr.strip() or done.stdout.strip()}"
        )
    return archives[0]

"""Publications in a folder that trainer and engines share."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..staging import staging_folder
from .messages import from_bytes, to_bytes
from .patches import PatchError, Publication

_NAME = re.compile(r"publication-(\d{8,})\.safetensors")


class PatchFolder:
    """One file for each publication, ``publication-00000001.safetensors`` and so on.

    A file appears complete or not at all. Numbers only rise, so that an engine sees what it missed.

    Args:
        folder: made when the first publication is written.

    Example:
        >>> PatchFolder("/shared/patches").write(publisher.publish())  # the trainer
        >>> folder = PatchFolder("/shared/patches")  # the engine
        >>> receiver.apply_(folder.read(folder.latest()))
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def write(self, publication: Publication) -> Path:
        """Write a publication's file.

        Returns:
            Its path.

        Raises:
            ValueError: the folder has this number or a later one.
        """
        latest = self.latest()
        if latest is not None and latest >= publication.sequence:
            raise ValueError(
                f"{self.folder}: publication {latest} is there, and {publication.sequence} is not newer; use an empty "
                "folder for each run"
            )
        path = self._path(publication.sequence)
        with staging_folder(self.folder) as staging:
            (staging / path.name).write_bytes(to_bytes(publication))
        return path

    def sequences(self) -> list[int]:
        """Numbers of the complete publications, in order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """The last publication's number; None without any."""
        return max(self.sequences(), default=None)

    def read(self, sequence: int) -> Publication:
        """One publication.

        Raises:
            PatchError: there is none of this number, or its file is damaged.
        """
        path = self._path(sequence)
        if not path.is_file():
            raise PatchError(f"{path}: no such publication; the folder has {self.sequences() or 'none'}")
        return from_bytes(path.read_bytes())

    def remove_before(self, sequence: int) -> None:
        """Delete older publications, once all engines have this one."""
        for number in self.sequences():
            if number < sequence:
                self._path(number).unlink()

    def _path(self, sequence: int) -> Path:
        return self.folder / f"publication-{sequence:08d}.safetensors"

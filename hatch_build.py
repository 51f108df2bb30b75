"""The wheel's description: README.md with links that work on a package index, too."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!https?:|mailto:|#)([^()\s]+)\)")


def with_absolute_links(text: str, repository: str) -> str:
    """Markdown whose relative links lead into a repository; without one they become plain text, and images vanish."""

    def replaced(match: re.Match[str]) -> str:
        image, label, path = match.groups()
        if not repository:
            return "" if image else label
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/main/{path})"

    return LINK.sub(replaced, text)


class ReadmeHook(MetadataHookInterface):
    """Fills in ``readme``, which pyproject.toml declares dynamic."""

    def update(self, metadata: dict) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = self.config["repository"].rstrip("/")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_absolute_links(text, repository)}

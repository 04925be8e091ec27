"""Whether `import` finds the oldest supported versions, and no others: `make test-floor` relies on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def pinned(file: str) -> dict[str, str]:
    """Distribution → version, as a file of requirements pins them for this Python."""
    lines = [line for line in (ROOT / "requirements" / file).read_text().splitlines() if line[:1] not in ("", "#", "-")]
    found = [each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate()]
    return {each.name: str(each.specifier).removeprefix("==") for each in found}


def wrong_versions(folder: Path) -> list[str]:
    """What `import` would find elsewhere than in `folder` or in another version than requirements/floor.txt's."""
    wrong = []
    for name, version in pinned("floor.txt").items():
        spec = importlib.util.find_spec(name.replace("-", "_"))
        place = Path(spec.origin).parent if spec and spec.origin else None
        if place is None or not place.is_relative_to(folder.resolve()):
            wrong.append(f"{name} would be imported from {place or 'nowhere'}, not from {folder}.")
        elif (found := importlib.metadata.version(name)) != version:
            wrong.append(f"{name} {found} is in {folder}; {version} is asked for.")
    return wrong

"""`python -m benchmarks.other_tree TREE MODULE ARGUMENT...`: MODULE of these benchmarks on another checkout's library.

So a commit is measured beside an earlier one (`git worktree add ../before COMMIT`) by one and the same driver.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

#: Packages of the library, and the folder of a checkout that holds them.
PACKAGES = {"fastdpo": ".", "fastdpo_kernels": "kernels"}


def take_from(tree: Path) -> None:
    """Import the library from `tree`. Raises ImportError where it comes from elsewhere."""
    folders = {package: (tree / folder).resolve() for package, folder in PACKAGES.items()}
    sys.path[:0] = [str(folder) for folder in folders.values()]
    for package, folder in folders.items():
        found = importlib.import_module(package).__file__
        if found is None or not Path(found).resolve().is_relative_to(folder / package):
            raise ImportError(f"{package} comes from {found!r}, not from {str(folder)!r}; name the root of a checkout.")


def main(arguments: Sequence[str] | None = None) -> None:
    tree, module, *rest = sys.argv[1:] if arguments is None else arguments
    take_from(Path(tree))
    importlib.import_module(module).main(rest)


if __name__ == "__main__":
    main()

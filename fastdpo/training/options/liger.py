"""`use_liger_kernel`: whether the package is here in a version whose functions were read."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

from fastdpo.training.options.kinds import OptionError

#: Their signatures, and what they write into, are those of these versions; as in pyproject.toml.
VERSIONS = ">=0.8.5,<0.9"


def check_liger(asked: bool) -> None:
    """Raise OptionError where liger-kernel is asked for and cannot be had."""
    if not asked:
        return
    try:
        version = importlib.metadata.version("liger-kernel")
        if SpecifierSet(VERSIONS).contains(version):
            return
        seen = f"version {version!r} is installed"
    except importlib.metadata.PackageNotFoundError:
        seen = "it is not installed"
    raise OptionError(
        f"use_liger_kernel=True needs liger-kernel {VERSIONS}, whose functions are known, and {seen}: "
        f"pip install 'liger-kernel{VERSIONS}', or drop it."
    )

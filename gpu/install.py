"""Install the kit into a folder of its own, without a network; part of gpu/prove.sh.

    python gpu/install.py [--kit gpu/kit] [--target gpu/site]

Prints one sentence: what was installed, or why not and what to do. Exit status 0 with the kit in place, 1 without.
Nothing but the standard library and pip is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KIT, TARGET = ROOT / "gpu" / "kit", ROOT / "gpu" / "site"
MANIFEST = "kit.json"
MIB = 2**20
#: Room that is asked for, in sizes of the wheels: they unpack to about three, and one is to spare.
UNPACKED = 4


class InstallError(Exception):
    """The kit cannot be installed; the message says what to do."""


def install(kit: Path, target: Path) -> str:
    """Install `kit` into `target`, which is replaced unless it holds this kit already. Returns what was done."""
    manifest = read_manifest(kit)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest["python"] != here:
        raise InstallError(
            f"the kit in {kit} is for Python {manifest['python']} and this is {here}. Make it again with "
            f"`make gpu-kit PYTHON_VERSION={here}`."
        )
    wheels = [kit / each["file"] for each in manifest["wheels"]]
    for path, each in zip(wheels, manifest["wheels"], strict=True):
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != each["sha256"]:
            raise InstallError(
                f"{path} is missing or is not what {MANIFEST} lists. Carry the whole folder {kit} again."
            )
    names = f"{len(wheels)} packages for Python {here}"
    if (target / MANIFEST).is_file() and (target / MANIFEST).read_bytes() == (kit / MANIFEST).read_bytes():
        return f"the kit's {names} are in {target} already."
    check_space(target, UNPACKED * sum(each["bytes"] for each in manifest["wheels"]))
    if target.exists():
        shutil.rmtree(target)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-cache-dir", "--no-compile", "--target", str(target)]
    done = subprocess.run([*command, *map(str, wheels)], check=False)
    if done.returncode:
        raise InstallError(
            f"pip could not install the kit into {target} (its message is above). Free space or name a folder that can "
            "be written, KIT_SITE=/some/folder bash gpu/prove.sh; without pip itself: python3 -m ensurepip."
        )
    shutil.copyfile(kit / MANIFEST, target / MANIFEST)  # last: an interrupted installation is not taken for whole
    return f"the kit's {names} are installed in {target}."


def read_manifest(kit: Path) -> dict[str, Any]:
    """kit.json. Raises InstallError where there is none, or part of one."""
    path = kit / MANIFEST
    if not path.is_file():
        raise InstallError(
            f"there is no kit in {kit}, so what this machine lacks stays out. Run `make gpu-kit` where there is a "
            "network and carry the folder here."
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and UTF-8's are both
        raise InstallError(f"{path} is torn ({error}). Carry the whole folder {kit} again.") from error
    return manifest


def check_space(target: Path, needed: int) -> None:
    """Raise InstallError where the disk of `target` has less than `needed` bytes free."""
    folder = next(parent for parent in (target, *target.parents) if parent.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InstallError(
            f"the kit needs about {needed / MIB:.0f} MiB in {target} and the disk has {free / MIB:.0f} MiB free. Free "
            "some, or name a folder on another disk: KIT_SITE=/some/folder bash gpu/prove.sh."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python gpu/install.py", description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, default=KIT, help="default gpu/kit")
    parser.add_argument("--target", type=Path, default=TARGET, help="default gpu/site")
    options = parser.parse_args(arguments)
    try:
        print(install(options.kit, options.target))
    except (InstallError, OSError) as error:
        print(f"no kit: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Gather the kit: wheels that a machine with a card and no network lacks, in one folder of at most 40 MiB.

    python gpu/kit.py [--python 3.12] [--folder gpu/kit]

Downloads what requirements/gpu-kit.txt pins, for Linux x86_64 and the given Python, and writes kit.json beside it:
{"python", "platform", "wheels": [{"name", "version", "file", "bytes", "sha256", "requires"}]}. Of bitsandbytes only the
libraries in KEPT_LIBRARIES stay, which takes its wheel from 41 MiB to 4. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements" / "gpu-kit.txt"
FOLDER = ROOT / "gpu" / "kit"
MANIFEST = "kit.json"
MIB = 2**20
#: The kit is carried with the repository, which may have to go as one small upload.
MAX_BYTES = 40 * MIB
LARGEST = 3
#: pip takes a platform tag to the letter, so every one that the wheels use is listed.
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64")
#: Package → its native libraries that are kept; the others are for other CUDA versions, ROCm and XPU.
KEPT_LIBRARIES = {"bitsandbytes": ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")}
#: TRL 1.16 asks for 3.11.
OLDEST_PYTHON = (3, 11)


class KitError(Exception):
    """The kit cannot be made; the message says what to do."""


def gather(python: str, folder: Path, requirements: Path = REQUIREMENTS) -> dict[str, Any]:
    """Fill `folder` anew and return the manifest. Raises KitError; the old folder then stays as it was."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kit-", dir=folder.parent) as made:
        staged = Path(made) / "kit"
        staged.mkdir()
        download(python, staged, requirements)
        for name, libraries in KEPT_LIBRARIES.items():
            for wheel in staged.glob(f"{name}-*.whl"):
                strip(wheel, libraries)
        check_size(staged)
        manifest = describe(staged, python)
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
    return manifest


def download(python: str, folder: Path, requirements: Path) -> None:
    """The wheels that `requirements` pins, for `python` on Linux x86_64, without what they need."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, "--dest", str(folder), "--requirement", str(requirements)], check=False)
    if done.returncode:
        raise KitError(
            f"pip could not download {requirements.name} for Python {python} (its message is above). Check the "
            "network and the pins, and that this Python has wheels of all of them."
        )


def strip(wheel: Path, libraries: Sequence[str]) -> None:
    """Drop the wheel's shared libraries but `libraries`, and their lines in RECORD.

    Raises KitError where one of `libraries` is not in it.
    """
    with zipfile.ZipFile(wheel) as source:
        names = [info.filename for info in source.infolist() if not info.is_dir()]
        present = {name.rsplit("/", 1)[-1] for name in names}
        if missing := sorted(set(libraries) - present):
            raise KitError(f"{wheel.name} has no {', '.join(missing)}. Mend KEPT_LIBRARIES in gpu/kit.py.")
        kept = [name for name in names if not name.endswith(".so") or name.rsplit("/", 1)[-1] in libraries]
        (record,) = (name for name in kept if name.endswith(".dist-info/RECORD"))
        stripped = wheel.with_suffix(".stripped")
        with zipfile.ZipFile(stripped, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
            lines = []
            for name in kept:
                if name != record:
                    data = source.read(name)
                    target.writestr(source.getinfo(name), data, zipfile.ZIP_DEFLATED, compresslevel=9)
                    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                    lines.append((name, f"sha256={digest}", len(data)))
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([*lines, (record, "", "")])
            target.writestr(record, text.getvalue())
    stripped.replace(wheel)


def check_size(folder: Path, limit: int = MAX_BYTES) -> None:
    """Raise KitError, naming the largest files, where the folder is over `limit`."""
    sizes = sorted(((path.stat().st_size, path.name) for path in folder.iterdir()), reverse=True)
    if (total := sum(size for size, _ in sizes)) > limit:
        largest = ", ".join(f"{name} {size / MIB:.1f} MiB" for size, name in sizes[:LARGEST])
        raise KitError(
            f"the kit takes {total / MIB:.1f} MiB, more than {limit / MIB:.0f}. Its largest files: {largest}. Drop or "
            f"strip one (KEPT_LIBRARIES in gpu/kit.py, requirements/{REQUIREMENTS.name})."
        )


def describe(folder: Path, python: str) -> dict[str, Any]:
    """The manifest of the wheels in `folder`."""
    wheels = []
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = Parser().parsestr(wheel.read(name).decode(), headersonly=True)
        requires = metadata.get_all("Requires-Dist") or []
        wheels.append(
            {
                "name": metadata["Name"],
                "version": metadata["Version"],
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "requires": [each for each in requires if "extra ==" not in each],
            }
        )
    return {"python": python, "platform": "linux x86_64", "wheels": wheels}


def python_version(text: str) -> str:
    """argparse's type of --python: "3.12"."""
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if match is None or (int(match[1]), int(match[2])) < OLDEST_PYTHON:
        raise argparse.ArgumentTypeError(
            f"{text!r}: two numbers such as 3.12, at least {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}; it is the Python of "
            "the card's machine (there: python3 --version)."
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python gpu/kit.py", description="Gather the wheels that a card's machine lacks.")
    parser.add_argument("--python", type=python_version, default="3.12", help="of the card's machine; default 3.12")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default gpu/kit; replaced")
    options = parser.parse_args(arguments)
    try:
        manifest = gather(options.python, options.folder)
    except (KitError, OSError) as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return 1
    for wheel in manifest["wheels"]:
        print(f"{wheel['bytes'] / MIB:6.2f} MiB  {wheel['name']} {wheel['version']}")
    total = sum(wheel["bytes"] for wheel in manifest["wheels"])
    print(f"{total / MIB:6.2f} MiB  in {options.folder}, for Python {options.python} on Linux x86_64")
    return 0


if __name__ == "__main__":
    sys.exit(main())

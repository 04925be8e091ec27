"""The oldest supported versions: pyproject.toml promises what `make test-floor` runs, and it runs nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import floor
import pytest


@pytest.mark.parametrize("name", ["triton", "transformers"])
def test_promised_floors_are_the_ones_that_are_run(name: str) -> None:
    promised = re.search(rf'"{name}>=([\d.]+)', (floor.ROOT / "pyproject.toml").read_text())
    assert promised, f"pyproject.toml states no floor for {name}"
    assert f"{floor.pinned('floor.txt')[name]}.".startswith(f"{promised[1]}.")


def test_other_versions_are_not_taken_for_the_floor(tmp_path: Path) -> None:
    """A folder that holds nothing, and one where one distribution of them all is another version."""
    names = list(floor.pinned("floor.txt"))
    environment = {**os.environ, "FASTDPO_TEST_FLOOR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert all(f"{name} would be imported from" in done.stderr for name in names)

    for name, version in floor.pinned("floor.txt").items():
        (tmp_path / name.replace("-", "_")).mkdir()
        (tmp_path / name.replace("-", "_") / "__init__.py").touch()
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        stated = "3.5.1" if name == "triton" else version
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {stated}\n")
    script = f"import floor, pathlib; print(floor.wrong_versions(pathlib.Path({str(tmp_path)!r})))"
    path = os.pathsep.join([str(tmp_path), str(Path(floor.__file__).parent)])
    environment["PYTHONPATH"] = path
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    asked = floor.pinned("floor.txt")["triton"]
    assert done.stdout.strip() == str([f"triton 3.5.1 is in {tmp_path}; {asked} is asked for."])

"""The kit for a card's machine: made, installed, and what can go wrong."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
Usage = namedtuple("Usage", "total used free")


def script(name: str) -> ModuleType:
    """gpu/NAME.py; `gpu` is a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", ROOT / "gpu" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit, install = script("kit"), script("install")


def make_wheel(folder: Path, name: str, version: str = "1.0") -> Path:
    """A wheel of NAME.py with an honest RECORD."""
    contents = {f"{name}.py": f"VERSION = {version!r}\n"}
    info = f"{name}-{version}.dist-info"
    contents |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: torch>=2.4\n"
        "Requires-Dist: ruff; extra == 'dev'\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        lines = []
        for each, text in contents.items():
            wheel.writestr(each, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
            lines.append(f"{each},sha256={digest},{len(text)}")
        wheel.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")
    return path


# The kit


def test_pins_are_those_of_the_other_requirements() -> None:
    """What the kit and the project's own environment both have is the same version."""
    pinned: dict[str, set[str]] = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for name, version, marker in re.findall(r"^([\w-]+)==([\w.]+)(.*)$", path.read_text("utf-8"), re.MULTILINE):
            if 'python_version < "3.11"' not in marker:
                pinned.setdefault(name.lower().replace("_", "-"), set()).add(version)
    kits = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements" / "gpu-kit.txt").read_text("utf-8"), re.MULTILINE))
    assert {"bitsandbytes", "datasets", "trl", "dill", "multiprocess", "xxhash"} <= kits
    assert {name: versions for name, versions in pinned.items() if name in kits and len(versions) > 1} == {}


def test_strip_keeps_the_named_libraries_and_an_honest_record(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "bits")
    with zipfile.ZipFile(wheel, "a") as archive:
        for name in ("cuda130", "cuda128", "cpu", "rocm71"):
            archive.writestr(f"bits/lib_{name}.so", name * 1000)
    before = wheel.stat().st_size
    kit.strip(wheel, ["lib_cuda130.so", "lib_cpu.so"])
    assert wheel.stat().st_size < before
    archive = zipfile.ZipFile(wheel)
    assert sorted(name for name in archive.namelist() if name.endswith(".so")) == [
        "bits/lib_cpu.so",
        "bits/lib_cuda130.so",
    ]
    record = [line.split(",") for line in archive.read("bits-1.0.dist-info/RECORD").decode().splitlines()]
    assert {line[0] for line in record} == set(archive.namelist())
    for name, digest, size in record:
        if name.endswith("RECORD"):
            assert (digest, size) == ("", "")
        else:
            data = archive.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={expected}", str(len(data)))
    with pytest.raises(kit.KitError, match=r"has no lib_cuda128\.so"):
        kit.strip(wheel, ["lib_cuda128.so"])


def test_size_names_the_largest_files(tmp_path: Path) -> None:
    for name, size in (("a.whl", 100), ("b.whl", 3000), ("c.whl", 2000), ("d.whl", 1000)):
        (tmp_path / name).write_bytes(b"x" * size)
    kit.check_size(tmp_path, 6100)
    with pytest.raises(kit.KitError, match=r"largest files: b\.whl .*, c\.whl .*, d\.whl [^,]*\. "):
        kit.check_size(tmp_path, 6099)
    assert kit.MAX_BYTES == 40 * 2**20


def test_manifest_lists_what_is_there_and_a_failure_leaves_the_old_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "KEPT_LIBRARIES", {})
    monkeypatch.setattr(kit, "download", lambda python, folder, requirements: make_wheel(folder, "small"))
    folder = tmp_path / "kit"
    manifest = kit.gather("3.12", folder)
    (wheel,) = manifest["wheels"]
    path = folder / wheel["file"]
    assert manifest == json.loads((folder / "kit.json").read_text("utf-8"))
    assert manifest["python"] == "3.12"
    assert (wheel["name"], wheel["version"], wheel["bytes"]) == ("small", "1.0", path.stat().st_size)
    assert wheel["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert wheel["requires"] == ["torch>=2.4"]
    monkeypatch.setattr(kit, "check_size", lambda folder: (_ for _ in ()).throw(kit.KitError("too large")))
    with pytest.raises(kit.KitError):
        kit.gather("3.13", folder)
    assert json.loads((folder / "kit.json").read_text("utf-8")) == manifest
    assert sorted(each.name for each in tmp_path.iterdir()) == ["kit"]


@pytest.mark.parametrize("text", ["3", "3.9", "cp312", "3.12.1"])
def test_python_version_that_no_kit_is_for(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        kit.main(["--python", text])
    assert f"{text!r}: two numbers such as 3.12, at least 3.11" in capsys.readouterr().err


# Its installation


@pytest.fixture
def small_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit of one package, for this Python."""
    monkeypatch.setattr(kit, "KEPT_LIBRARIES", {})
    monkeypatch.setattr(kit, "download", lambda python, folder, requirements: make_wheel(folder, "small"))
    kit.gather(HERE, tmp_path / "kit")
    return tmp_path / "kit"


def test_install_needs_no_network_and_runs_once(small_kit: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert "are installed in" in install.install(small_kit, site)
    done = subprocess.run([sys.executable, "-c", "import small; print(small.VERSION)"], env={"PYTHONPATH": str(site)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "1.0\n"
    (site / "small.py").unlink()
    assert "already" in install.install(small_kit, site)
    assert not (site / "small.py").exists()
    (site / "kit.json").unlink()  # as an installation that was interrupted leaves it
    install.install(small_kit, site)
    assert (site / "small.py").exists()


def test_bad_kits_are_one_sentence_with_the_next_step(
    small_kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(folder: Path) -> str:
        assert install.main(["--kit", str(folder), "--target", str(tmp_path / "site")]) == 1
        assert not (tmp_path / "site").exists()
        return capsys.readouterr().out

    assert "Run `make gpu-kit`" in said(tmp_path / "nowhere")
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: Usage(10, 9, 1))
    assert re.search(r"has 0 MiB free\. Free some, or name a folder on another disk: KIT_SITE=", said(small_kit))
    monkeypatch.undo()
    manifest = small_kit / "kit.json"
    own = manifest.read_text("utf-8")
    manifest.write_text(own.replace(f'"{HERE}"', '"3.99"'), "utf-8")
    assert f"is for Python 3.99 and this is {HERE}. Make it again with `make gpu-kit PYTHON_VERSION={HERE}`" in said(
        small_kit
    )
    for part in (own[: len(own) // 2].encode(), b"\xff\xfe"):
        manifest.write_bytes(part)
        assert re.search(r"kit\.json is torn \(.*\)\. Carry the whole folder .* again\.", said(small_kit))
    manifest.write_text(own, "utf-8")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    assert re.search(r"\(its message is above\)\. Free space or name .* KIT_SITE=", said(small_kit))
    monkeypatch.undo()
    with next(small_kit.glob("*.whl")).open("ab") as wheel:
        wheel.write(b"x")
    assert "is not what kit.json lists. Carry the whole folder" in said(small_kit)

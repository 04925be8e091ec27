"""What is installed: top-level names, data files, light imports, and no clash with Hugging Face's `kernels`."""

from __future__ import annotations

import importlib.util
import pkgutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--outdir", str(folder), str(ROOT))
    return folder


def test_wheel_holds_both_packages_their_data_and_nothing_else(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"fastdpo", "fastdpo_kernels"}, "a top-level `kernels` or `tests` would shadow other packages"
    for needed in ("fastdpo/py.typed", "fastdpo/demo/data/train.jsonl.gz", "fastdpo/demo/data/eval.meta.jsonl"):
        assert needed in names
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "fastdpo").rglob("*.py")}
    modules |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").rglob("*.py")}
    assert modules <= set(names), "a package is missing from pyproject's list"


def test_sdist_builds_the_same_wheel(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "LICENSE", "kernels/fastdpo_kernels/rng.py"} <= names


@pytest.mark.parametrize("installed", [True, False], ids=["with kernels", "without kernels"])
def test_repo_root_does_not_shadow_hugging_face_kernels(installed: bool, tmp_path: Path) -> None:
    """From the root of the repo, the folder `kernels/` must not be taken for Hugging Face's distribution `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    site = Path(importlib.util.find_spec("transformers").origin).parents[1]
    if installed and not list(site.glob("kernels-*.dist-info")):
        pytest.skip("the distribution `kernels` is not installed here")
    for entry in site.iterdir():
        if installed or (not entry.name.startswith(("kernels-", "kernels.")) and entry.name != "kernels"):
            (tmp_path / entry.name).symlink_to(entry)
    code = f"import sys; sys.path[:] = ['', {str(tmp_path)!r}, *sys.path[1:]]; "
    code += "import transformers.integrations.hub_kernels; from importlib.util import find_spec; "
    code += "spec = find_spec('kernels'); print(spec.origin if spec else None)"
    # -S: no site-packages but the folder of links
    origin = run("-S", "-c", code).strip()
    assert origin == (str(tmp_path / "kernels" / "__init__.py") if installed else "None")


def test_import_is_light() -> None:
    """The loss functions need torch only; transformers is loaded with the trainer."""
    out = run(
        "-c", "import sys, fastdpo; fastdpo.preference_loss; fastdpo.DynamicBeta; print('transformers' in sys.modules)"
    )
    assert out.strip() == "False"


def test_public_names_exist() -> None:
    run("-c", "import fastdpo; [getattr(fastdpo, name) for name in fastdpo.__all__]")


def test_no_public_name_is_a_submodule() -> None:
    """Importing a submodule sets its name on the package, where it would stand before a function of that name."""
    packages = [path.parent for path in (ROOT / "fastdpo").rglob("__init__.py") if "__all__" in path.read_text()]
    assert len(packages) > 3
    for folder in packages:
        package = importlib.import_module(".".join(folder.relative_to(ROOT).parts))
        assert not set(package.__all__) & {module.name for module in pkgutil.iter_modules([str(folder)])}, folder
    out = run("-c", "import fastdpo; fastdpo.preference_loss; fastdpo.FastDPOTrainer; print(*fastdpo.backends())")
    assert out.split() == ["torch", "triton"]

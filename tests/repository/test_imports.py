"""The direction of imports: every package imports from lower floors only, and no circle of files is left.

Read from the source of every file, imports within functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: From the ground up; what stands on one floor may not import from its neighbours. A name covers what is below it.
FLOORS = (
    (
        "fastdpo.version",
        "fastdpo.shown",
        "fastdpo_kernels.rng",
        "fastdpo_kernels.device_math",
        "fastdpo_kernels.launch_checks",
    ),
    ("fastdpo_kernels", "fastdpo.data", "fastdpo.formulas"),
    ("fastdpo.ops",),
    ("fastdpo.loss",),
    ("fastdpo.training.options", "fastdpo.training.ranks", "fastdpo.training.durable", "fastdpo.training.lock"),
    ("fastdpo.training.models",),
    ("fastdpo.training.rows",),
    ("fastdpo.training.memory",),
    ("fastdpo.training.body",),
    ("fastdpo.training.reference",),
    ("fastdpo.training.scoring",),
    ("fastdpo.training.runs",),
    ("fastdpo.training.objectives",),
    ("fastdpo.training.step", "fastdpo.training.datasets"),
    ("fastdpo.training.parts",),
    ("fastdpo.training.trainer",),
    ("fastdpo.estimate",),
    ("fastdpo.demo",),
    ("fastdpo.commands",),
    ("fastdpo",),
)


def modules() -> dict[str, Path]:
    """Import name → file, of the library and its kernels."""
    found = {}
    for top in ("fastdpo", "kernels/fastdpo_kernels"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to((ROOT / top).parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules of `known` that a file names in its imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in names if name in known)


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    files = modules()
    return {
        name: set(imports(ast.parse(path.read_text(encoding="utf-8")), set(files))) - {name}
        for name, path in files.items()
    }


def floor_of(module: str) -> tuple[int, str]:
    """The floor of a module and its room there: the longest name that covers it."""
    covering = [
        (len(room), level, room)
        for level, rooms in enumerate(FLOORS)
        for room in rooms
        if module == room or module.startswith(f"{room}.")
    ]
    _, level, room = max(covering)
    return level, room


def test_arrows_run_downwards_only(arrows: dict[str, set[str]]) -> None:
    wrong = []
    for module, targets in arrows.items():
        level, room = floor_of(module)
        for target in targets:
            below, other = floor_of(target)
            if other != room and below >= level and not module.startswith(f"{other}."):
                wrong.append(f"{module} imports {target}, from floor {below} on floor {level}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files(arrows: dict[str, set[str]]) -> None:
    """Removing files that import none of the rest, again and again, leaves none."""
    left = {name: set(targets) for name, targets in arrows.items()}
    # A package's own file imports its modules to export them; whoever names the package means these
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    for name in left:
        left[name] = {each for each in left[name] if not name.startswith(f"{each}.")}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle runs through {sorted(left)} (packages: {sorted(packages & left.keys())})"


def test_every_package_has_a_floor(arrows: dict[str, set[str]]) -> None:
    """A new package says where it stands: only the top of `fastdpo` may be covered by the last floor."""
    assert [name for name in arrows if floor_of(name)[1] == "fastdpo" and name != "fastdpo"] == ["fastdpo.training"]


def test_no_class_is_mixed_into_another() -> None:
    """No class is named a mixin, and from transformers' trainer to ours each class has one base, complete without what
    is built on it."""
    classes = {
        node.name: [ast.unparse(base) for base in node.bases]
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert not [name for name in classes if "mixin" in name.lower()]
    assert classes["FastDPOTrainer"] == ["SavingTrainer"]
    assert classes["SavingTrainer"] == ["InterruptibleTrainer"]
    assert classes["InterruptibleTrainer"] == ["Trainer"]


def test_no_file_reads_another_classs_private_attribute() -> None:
    """`x._name` on anything but self, cls or super(), for names that a class of the library gives itself."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules().values()}
    own: dict[str, set[Path]] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_private(node.attr):
                own.setdefault(node.attr, set()).add(path)
            if isinstance(node, ast.FunctionDef) and _is_private(node.name):
                own.setdefault(node.name, set()).add(path)
    read = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in own
        and path not in own[node.attr]
        and ast.unparse(node.value) not in ("self", "cls", "super()")
    ]
    assert not read, "\n".join(read)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")

"""From the `path` that a user names to local files, a saved data set, or a data set of the hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.exceptions import DatasetNotFoundError

from fastdpo.data.errors import DAMAGE, PreferenceDataError, cause, damage_is_named
from fastdpo.data.raw_rows import SUFFIXES, has_known_suffix
from fastdpo.shown import listed, shown

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = (*SUFFIXES, ".gz", ".csv", ".tsv", ".txt", ".arrow", ".xz", ".zst", ".zip")


@dataclass(frozen=True)
class SourceFile:
    """A local file and the name it has in example ids (relative to the folder that was named)."""

    path: Path
    label: str


def find_source(
    path: str | Path, *, split: str, name: str | None, cache_dir: str | None, revision: str | None, num_proc: int | None
) -> list[SourceFile] | datasets.Dataset:
    """The files of the split of a local path, or the split itself where it is a saved or a hub data set.

    Raises FileNotFoundError for a path that exists neither here nor on the hub, PreferenceDataError for a split that
    does not exist and for arguments that have no meaning for the path.
    """
    if not split or "[" in split:
        raise PreferenceDataError(
            f"split={split!r} must be the name of one split; to read fewer pairs use max_examples"
        )
    local = Path(path).expanduser()
    if local.exists():
        if revision is not None:
            raise PreferenceDataError(f"revision={revision!r} needs a hub name, but path={str(path)!r} is local")
        if local.is_file():
            return _file(local, split, name)
        if not local.is_dir():
            # Opening a pipe waits for a writer, and it could not be read twice
            raise PreferenceDataError(f"path={str(path)!r} is neither a file nor a folder; write the rows into a file")
        return _folder(local, split, name)
    for link in (local, *local.parents):
        if link.is_symlink() and not link.exists():
            raise FileNotFoundError(
                f"path={str(path)!r}: {str(link)!r} is a link to {os.readlink(link)!r}, which does not exist or leads "
                "back to itself"
            )
    if _is_hub_name(str(path), local):
        return _hub(str(path), split, name, cache_dir, revision, num_proc)
    raise FileNotFoundError(f"path={str(path)!r} does not exist; {_nearby(local)}")


def _is_hub_name(path: str, local: Path) -> bool:
    if not _HUB_NAME.fullmatch(path) or path.startswith(".") or path.lower().endswith(_FILE_SUFFIXES):
        return False
    return "/" not in path or not local.parent.is_dir()


def _nearby(local: Path) -> str:
    folder = local.parent
    while not folder.is_dir():
        folder = folder.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        return f"the folder {str(folder)!r} cannot be looked into ({error.strerror})"
    wanted = local.relative_to(folder).parts[0]
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5) or names[:5]
    found = f"near-by names: {shown(', '.join(near))}" if near else "the folder is empty"
    return f"in {str(folder)!r}, {found}"


def _file(path: Path, split: str, name: str | None) -> list[SourceFile]:
    if name is not None:
        raise PreferenceDataError(f"name={name!r} needs a folder or a hub name, but path={str(path)!r} is a file")
    if split != "train":
        raise PreferenceDataError(
            f"split={split!r}: a single file has the split 'train' only; pass that, or the folder with files named by "
            "split"
        )
    return [SourceFile(path, path.name)]


def _folder(path: Path, split: str, name: str | None) -> list[SourceFile] | datasets.Dataset:
    saved_dict = (path / "dataset_dict.json").is_file()
    if saved_dict or (path / "state.json").is_file():
        if name is not None:
            raise PreferenceDataError(
                f"name={name!r} has no meaning for the saved data set {str(path)!r}; leave it out"
            )
        what, advice = f"path={str(path)!r} is a saved data set that cannot be read", "write it again with save_to_disk"
        try:
            with damage_is_named(what, advice):
                saved = datasets.load_from_disk(str(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{what} ({cause(error)}); {advice}") from error
        if not saved_dict:
            # One saved split: 'train' stands for "the one there is", as it does for a file.
            recorded = str(saved.split) if saved.split is not None else "train"
            _check_split(split, {"train", recorded}, path)
            return saved
        _check_split(split, saved, path)
        return saved[split]
    return _data_files(path, split, name)


def _data_files(path: Path, split: str, name: str | None) -> list[SourceFile]:
    """Files in the layout of `datasets`: named or foldered by split, or listed in the README's configs."""
    subfolder = name is not None and (path / name).is_dir()
    try:
        builder = datasets.load_dataset_builder(
            str(path), name=None if subfolder else name, data_dir=name if subfolder else None
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"path={str(path)!r} holds no data files; accepted: {', '.join(SUFFIXES)}, or a save_to_disk folder"
        ) from error
    except ValueError as error:
        raise PreferenceDataError(
            f"path={str(path)!r}, name={name!r}: {shown(error)}; name must be a config of its README or one of its "
            "folders"
        ) from error
    except DAMAGE as error:
        raise PreferenceDataError(
            f"path={str(path)!r}: the layout of the folder cannot be read ({cause(error)}); mend the YAML at the top "
            "of its README.md, or name one file"
        ) from error
    files = builder.config.data_files or {}
    _check_split(split, files, path)
    sources = [SourceFile(Path(file), _label(Path(file), path)) for file in files[split]]
    wrong = [source.label for source in sources if not has_known_suffix(source.path)]
    if wrong:
        raise PreferenceDataError(
            f"path={str(path)!r}: unsupported suffix of {listed(wrong)}; accepted: {', '.join(SUFFIXES)}"
        )
    return sources


def _label(file: Path, folder: Path) -> str:
    # `datasets` resolves links of the folder in some layouts and not in others.
    bases = (folder.absolute(), folder.resolve())
    base = next((base for base in bases if file.is_relative_to(base)), bases[0])
    return Path(os.path.relpath(file, base)).as_posix()


def _check_split(split: str, available: Iterable[object], path: Path) -> None:
    names = sorted(str(name) for name in available)
    if split not in names:
        raise PreferenceDataError(f"split={split!r} does not exist in {str(path)!r}; accepted: {', '.join(names)}")


def _hub(
    path: str, split: str, name: str | None, cache_dir: str | None, revision: str | None, num_proc: int | None
) -> datasets.Dataset:
    try:
        configs = datasets.get_dataset_config_names(path, revision=revision)
        config, data_dir = (name, None) if name in configs else (None, name)
        return datasets.load_dataset(
            path, config, data_dir=data_dir, split=split, cache_dir=cache_dir, revision=revision, num_proc=num_proc
        )
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"path={path!r} is neither a local file or folder ({_nearby(Path(path))}) nor a data set that the hub "
            f"gives: {error}"
        ) from error
    except DAMAGE as error:
        raise PreferenceDataError(f"path={path!r}, name={name!r}, split={split!r}: {cause(error)}") from error

"""Reference log-probs of examples, computed once: in memory by the digest of token ids, and in a file.

The file is safetensors: `keys` (n, 16) uint8, ascending, and `logps` (n, K) float32, of their
completions: chosen and rejected, for pairs. Its header
says which reference, tokenisation and truncation the values belong to (the identity, see
`training.reference.fingerprint.reference_identity`) and holds a checksum of all of it. Equal content gives equal bytes.

A file is used whole or not at all. It is not used if it is torn, if its checksum disagrees, or if its identity is not
this cache's; one warning then says why, the values are computed again, and the next save replaces the file. Saving is
atomic and keeps what other runs with the same identity have put into the file meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.numpy import save as to_safetensors
from torch import Tensor

from fastdpo.training.durable import remove_incomplete, write_whole
from fastdpo.training.lock import hold

logger = logging.getLogger(__name__)

#: The cache's file in the folder of a run.
REFERENCE_CACHE_FILE = "reference_logps.safetensors"
#: Raised when the meaning of the file changes; a file of another version is computed again.
FORMAT_VERSION = 1
#: Seconds: saving takes well under one.
PATIENCE = 3.0
#: Bytes of an example's key, see `TokenBatch.key`.
KEY_BYTES = 16

#: The file's lock keeps other processes out, not this one's threads.
_ONE_THREAD = threading.Lock()

# One entry holds everything: safetensors writes several in no fixed order.
_HEADER = "fastdpo_reference_cache"
#: Key → log-probs of the completions.
_Entries = dict[bytes, tuple[float, ...]]


class Entry(NamedTuple):
    """One example's reference log-probs, as ranks exchange them."""

    key: bytes
    logps: tuple[float, ...]


class CachedLogps(NamedTuple):
    """What the cache knows of B examples.

    logps: (B, K) float32 on the host, NaN where missing.
    missing: positions of the examples that are still to be computed, ascending.
    """

    logps: Tensor
    missing: list[int]


class UnusableCacheError(ValueError):
    """A file whose values must not be used; the message says why."""


class NoCacheError(UnusableCacheError):
    """A file that no cache has written."""


class ForeignFileError(OSError):
    """Under the cache's name lies something that no cache has written: it stays."""


class ReferenceCache:
    """Reference log-probs by example, for one identity.

    A value that is stored is never replaced, neither by `put` nor by a file: a run sees one value of a pair for good.

    Args:
        identity: name → value of everything the log-probs depend on.
        completions: of an example, K.

    Attributes:
        patience: seconds that `save` waits for another process.
        hits: examples that `get` has answered.
        computed: examples that `put` has added.
    """

    def __init__(self, identity: Mapping[str, str], completions: int = 2) -> None:
        self.identity, self.completions = dict(identity), completions
        self.patience = PATIENCE
        self.hits = 0
        self.computed = 0
        self._entries: _Entries = {}
        self._new: list[bytes] = []
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, keys: Sequence[bytes]) -> CachedLogps:
        """The log-probs of the examples with these keys, as far as they are known."""
        unknown = (math.nan,) * self.completions
        values = torch.tensor([self._entries.get(key, unknown) for key in keys], dtype=torch.float32)
        missing = [i for i, key in enumerate(keys) if key not in self._entries]
        self.hits += len(keys) - len(missing)
        return CachedLogps(values.reshape(-1, self.completions), missing)

    def put(self, keys: Sequence[bytes], logps: Tensor) -> int:
        """Store the log-probs of examples, (B, K), in float32; returns how many examples were added.

        One with a value that is not finite is not stored: it stays missing, and the step that computed it says so.
        Raises ValueError if the shape does not fit or a key is not `KEY_BYTES` long.
        """
        if logps.shape != (len(keys), self.completions):
            raise ValueError(
                f"logps has shape {tuple(logps.shape)}; ({len(keys)}, {self.completions}) is needed, one log-prob for "
                "each completion of each of the keys."
            )
        rows = logps.detach().float().cpu().tolist()
        added = self._add(Entry(key, tuple(row)) for key, row in zip(keys, rows, strict=True))
        self._new += [entry.key for entry in added]
        self.computed += len(added)
        return len(added)

    def new_entries(self) -> list[Entry]:
        """What `put` has added since the last call, for the other ranks: each `merge`s what all have gathered."""
        new, self._new = self._new, []
        return [Entry(key, self._entries[key]) for key in new]

    def merge(self, entries: Iterable[Entry]) -> int:
        """Take over what other ranks have computed; returns how many examples were added. Raises as `put`."""
        return len(self._add(entries))

    def _add(self, entries: Iterable[Entry]) -> list[Entry]:
        added = []
        for entry in entries:
            if len(entry.key) != KEY_BYTES:
                raise ValueError(f"keys: one has {len(entry.key)} bytes; {KEY_BYTES} are needed, see TokenBatch.key.")
            if entry.key not in self._entries and all(map(math.isfinite, entry.logps)):
                self._entries[entry.key] = entry.logps
                added.append(entry)
        return added

    def load(self, path: str | Path) -> int:
        """Take over what the file at `path` holds; returns how many examples were added.

        A missing file adds nothing. Nor does one that must not be used, which is reported once as a warning. Raises
        OSError if there is a file and it cannot be read.
        """
        return self.merge(Entry(key, logps) for key, logps in self._usable(Path(path)).items())

    def save(self, path: str | Path) -> None:
        """Write everything to `path`, together with what a file of the same identity holds there already.

        A file that must not be used is replaced, but one that is no reference cache. A kill leaves the old file or the
        new one; a lock, waited for `patience` seconds, keeps savers in several processes from undoing each other's
        work. A folder that is missing is made. Raises OSError if the file cannot be written, LockedError (one too)
        naming who holds the lock, and ForeignFileError.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _ONE_THREAD, hold(path.with_name(f"_{path.name}.lock"), str(path), patience=self.patience):
            remove_incomplete(path)
            if path.is_symlink():
                raise ForeignFileError(f"{path} is a link, which is not followed; it stays")
            stored = self._usable(path, replacing=True)
            if path.is_file() and self._entries.keys() <= stored.keys():
                return
            write_whole(path, self.encoded(stored))

    def encoded(self, others: _Entries | None = None) -> bytes:
        """The bytes of a file with everything that is known, and `others`."""
        return _encode((others or {}) | self._entries, self.identity, self.completions)

    def _usable(self, path: Path, *, replacing: bool = False) -> _Entries:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            return _decode(content, self.identity, self.completions)
        except UnusableCacheError as error:
            if replacing and isinstance(error, NoCacheError):
                raise ForeignFileError(f"{path} is no reference cache, so it stays") from error
            message = f"{path} is not used, and its reference log-probs are computed again: {error}."
            if message not in self._reported:
                logger.warning("%s", message)
            self._reported.add(message)
            return {}


def _encode(entries: _Entries, identity: Mapping[str, str], completions: int) -> bytes:
    ordered = sorted(entries)
    keys = np.frombuffer(b"".join(ordered), np.uint8).reshape(-1, KEY_BYTES)
    logps = np.array([entries[key] for key in ordered], np.float32).reshape(-1, completions)
    header = {"version": FORMAT_VERSION, "identity": dict(identity)}
    header["checksum"] = _checksum(header, keys.tobytes(), logps.tobytes())
    return to_safetensors({"keys": keys, "logps": logps}, metadata={_HEADER: json.dumps(header)})


def _decode(content: bytes, identity: Mapping[str, str], completions: int) -> _Entries:
    """The entries in a file's bytes. Raises UnusableCacheError."""
    try:
        tensors = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        # The beginning of a file that was cut, or the zeros of a disk that crashed, are nobody's work
        torn = _HEADER.encode() in content or len(content) <= 8 or not any(content)
        kind = UnusableCacheError if torn else NoCacheError
        raise kind(f"it is torn or no safetensors file ({error})") from error
    # The container is sound, so these reads are in bounds.
    size = int.from_bytes(content[:8], "little")
    text = json.loads(content[8 : 8 + size]).get("__metadata__", {}).get(_HEADER)
    if text is None:
        raise NoCacheError("it is a safetensors file, but no reference cache")
    try:
        header = json.loads(text)
        version, checksum, stored = header["version"], header.pop("checksum"), dict(header["identity"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnusableCacheError(f"its header is corrupted ({type(error).__name__}: {error})") from error
    keys, logps = (tensors.get(name, {}) for name in ("keys", "logps"))
    if checksum != _checksum(header, keys.get("data", b""), logps.get("data", b"")):
        raise UnusableCacheError("its checksum disagrees with its contents, so it is corrupted")
    if version != FORMAT_VERSION:
        raise UnusableCacheError(f"it has format version {version}, this is version {FORMAT_VERSION}")
    if differences := _differences(stored, identity):
        raise UnusableCacheError(f"it belongs to another reference or tokenisation: {differences}")
    count = len(keys.get("data", b"")) // KEY_BYTES
    layout = [(each.get("dtype"), each.get("shape")) for each in (keys, logps)]
    if layout != [("U8", [count, KEY_BYTES]), ("F32", [count, completions])]:
        raise UnusableCacheError(f"keys and logps have dtypes and shapes {layout}, so it is corrupted")
    values = np.frombuffer(logps["data"], "<f4").reshape(-1, completions)
    if not np.isfinite(values).all():
        raise UnusableCacheError("it holds values that are not finite, so it is corrupted")
    joined = bytes(keys["data"])
    split = (joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES))
    return {key: tuple(row) for key, row in zip(split, values.tolist(), strict=True)}


def _checksum(header: Mapping[str, object], keys: bytes, logps: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (json.dumps(header, sort_keys=True).encode(), keys, logps):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _differences(stored: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    names = [*wanted, *(name for name in stored if name not in wanted)]
    return "; ".join(
        f"{name} was {stored.get(name, 'absent')}, is {wanted.get(name, 'absent')}"
        for name in names
        if stored.get(name) != wanted.get(name)
    )

"""The file itself: written atomically, signed, and read only if every byte is the one that was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None

FilePath = str | os.PathLike[str]
Tensors = dict[str, Tensor]

VERSION = 1
ENTRIES = {"network", "sde", "predicts", "time_input", "dtype", "ema", "training", "metadata"}
UNSIGNED = "0" * 64


class CheckpointError(ValueError):
    """A checkpoint could not be written, or a file is not the checkpoint that was expected."""


def serialize(tensors: Tensors, description: dict[str, Any]) -> bytes:
    owned = _apart(tensors)
    try:
        text = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"expected metadata that JSON can hold, found {description}: {error}"
        ) from error
    return safetensors.torch.save(owned, {"scoresde": text, "sha256": UNSIGNED})


def _apart(tensors: Tensors) -> Tensors:
    """On the host, copied only if strided or in the memory of one before: safetensors takes neither strided
    nor tied tensors."""
    apart, taken = {}, set()
    for key, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        apart[key] = own.clone() if place in taken else own
        taken.add(place)
    return apart


def check_place(path: FilePath) -> None:
    """Say before the work, and not after it, that no file can be written there. Raises CheckpointError."""
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise CheckpointError(f"expected a file to write, found the folder {path}; name a file in it")
    if files := [parent for parent in place.parents if parent.exists() and not parent.is_dir()]:
        raise CheckpointError(f"expected a file in a folder, found the file {files[0]} in {path}")


def write(path: Path, content: bytes) -> None:
    header = 8 + int.from_bytes(content[:8], "little")
    signature = hashlib.sha256(content).hexdigest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as file:
            file.write(content[:header].replace(f'"{UNSIGNED}"'.encode(), f'"{signature}"'.encode()))
            file.write(memoryview(content)[header:])
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error.strerror or error}); a file that was there before is "
            "unchanged. Free some space or choose another place"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place when it is complete and on the disk."""
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _hold(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _hold(file: BinaryIO) -> None:
    """Lock a file for as long as this process lives and writes it, where its file system has locks.

    Where it has none, `_sweep` gets none either and leaves every temporary file.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise


def _sweep(path: Path) -> None:
    """Remove what a killed process left: temporary files of `path` that nobody holds."""
    pattern = re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.tmp"
    for stale in path.parent.iterdir():
        if re.fullmatch(pattern, stale.name):
            with suppress(OSError), open(stale, "rb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    stale.unlink()
            if fcntl is None:
                with suppress(OSError):
                    stale.unlink()


def read(path: FilePath) -> tuple[dict[str, Any], Tensors]:
    with reading(path) as opened:
        return read_description(path, opened), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


@contextmanager
def reading(path: FilePath) -> Iterator[Any]:
    """A file whose bytes are those that were written."""
    try:
        with open(path, "rb") as file:
            _check_signature(path, file)
        with safetensors.safe_open(path, framework="pt") as opened:
            yield opened
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint file, found none that can be read ({error.strerror or error})"
        ) from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint, found a damaged file ({error}); use another copy"
        ) from error


def read_description(path: FilePath, opened: Any) -> dict[str, Any]:
    description = json.loads(opened.metadata()["scoresde"])
    version = description.get("version") if isinstance(description, dict) else None
    if version != VERSION:
        raise CheckpointError(
            f"{path}: expected a checkpoint of version {VERSION}, found version {version}; use a release of "
            "scoresde that reads it"
        )
    missing = ENTRIES - description.keys()
    if missing:
        raise CheckpointError(f"{path}: expected a complete description, found none of {sorted(missing)}")
    # What files from before there were other denoisers, and dtypes of single tensors, do not say.
    return {"denoiser": "Denoiser", "dtypes": None, **description}


def _check_signature(path: FilePath, file: BinaryIO) -> None:
    length = os.fstat(file.fileno()).st_size
    header = 8 + int.from_bytes(file.read(8), "little")
    if not 8 < header <= length:
        raise CheckpointError(
            f"{path}: expected a safetensors file, found {length} bytes that are none or a part of one; use "
            "another copy"
        )
    file.seek(0)
    head = file.read(header)
    signatures = re.findall(rb'"sha256":"([0-9a-f]{64})"', head)
    if len(signatures) != 1 or b'"scoresde":' not in head:
        raise CheckpointError(
            f"{path}: expected a checkpoint of this library, found another safetensors file or a damaged "
            "one; write it with checkpoint.save"
        )
    digest = hashlib.sha256(head.replace(signatures[0], UNSIGNED.encode()))
    while block := file.read(1 << 20):
        digest.update(block)
    if digest.hexdigest().encode() != signatures[0]:
        raise CheckpointError(
            f"{path}: expected SHA-256 {signatures[0].decode()}, found {digest.hexdigest()}: the file is "
            "truncated or was changed; use another copy"
        )

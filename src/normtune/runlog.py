"""The run folder: what is in it, and how files get there whole.

Scope: atomic files and folders (temporary name, fsync, rename), the run folder's layout, JSON lines, provenance.
Not here: what a checkpoint holds (training/), what an adapter holds (adapter/).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from normtune.errors import InputError, JobError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

PACKAGES = (
    "normtune",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",  # decodes and resizes images
    "pycocoevalcap",  # scores captions
)


def refuse_taken(path: Path) -> None:
    """Raises InputError where no new folder can be put in place as a whole, with what to do."""
    if path.is_symlink():
        raise InputError(f"{path} is a link, and would be replaced by a folder; give the folder that it names")
    if not path.exists():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise InputError(f"{path} exists already; choose another folder or remove it")
    if path.resolve() == Path.cwd() or path.is_mount():
        raise InputError(f"{path} is in use (the current folder, or a mount); give a new one in it: {path / 'new'}")


@contextlib.contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and nothing otherwise.

    Raises:
        InputError: `path` is taken (unless `replace`; see `refuse_taken`), or its parent cannot be written.
        JobError: the disk is full, or writing failed otherwise.
    """
    if not replace:
        refuse_taken(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write in {path.parent}: {error.strerror or error}; choose another folder") from None
    try:
        with wrapped_disk_errors(path):
            yield temporary
            sync_tree(temporary)
            os.chmod(temporary, 0o755)
            if replace and path.exists():
                retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
                os.replace(path, retired / "was")
                os.replace(temporary, path)
                shutil.rmtree(retired, ignore_errors=True)
            else:
                _into_place(temporary, path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _into_place(temporary: Path, path: Path) -> None:
    """Renames a folder to what is nothing, or an empty folder; InputError where another process was faster."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise InputError(f"{path} exists already; choose another folder or remove it") from None
        raise


@contextlib.contextmanager
def wrapped_disk_errors(path: Path) -> Iterator[None]:
    """Turns what the file system or safetensors raises into one line that names the path."""
    try:
        yield
    except OSError as error:
        raise JobError(f"cannot write {path}: {error.strerror or error}; free some space or choose --out") from None
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise JobError(f"cannot write {path}: {error}; free some space or choose --out") from None
        raise


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing; raises as `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    """Writes a whole file or nothing; without `sync` that holds when the process is killed, not when the power fails.

    Raises:
        JobError: the disk is full or the folder cannot be written.
    """
    with wrapped_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """A JSON file.

    Raises:
        InputError: missing, unreadable or wrong JSON, with line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {what} at {path}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path}, {place}: not valid JSON ({error.msg}); {what} is damaged") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line; a line that a crash cut off is closed first, so that it harms no other."""
    with wrapped_disk_errors(path):
        torn = False
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(record, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a log; torn ones, within a letter too, are left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().decode("utf-8", "replace").split("\n"):  # texts may hold other ends of lines
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def lock(opened: int, taken: str) -> None:
    """Locks an open file or folder until it is closed, which the end of a process does, too, however it ends.

    Where the file system has no such locks nobody is kept out. Raises InputError `taken` where another has locked it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(taken) from None
    except OSError:
        return


class Run:
    """The folder `runs/NAME/{recipe.yaml, log.jsonl, checkpoints/, adapter/, evaluations/}`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def write(self, record: dict[str, Any]) -> None:
        append_line(self.log, {"time": round(time.time(), 3), **record})

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from training into the folder, which is there.

        Raises:
            InputError: one is at it.
        """
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            lock(folder, f"{self.folder} is being trained into by another process; wait for it, or stop it first")
            yield
        finally:
            os.close(folder)

    @staticmethod
    def refuse_existing(folder: Path) -> None:
        """Raises InputError if something lies where a new run is to be."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"run folder {folder} exists already; go on with --resume, choose another with --out, or remove it"
            )
        refuse_taken(folder)

    @staticmethod
    def create(folder: Path, recipe_text: str) -> Run:
        """A new run folder.

        Raises:
            InputError: it exists already, or cannot be made.
        """
        Run.refuse_existing(folder)
        with atomic_folder(folder) as temporary:
            (temporary / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        return Run(folder)


def cache_folder() -> Path:
    """`$NORMTUNE_CACHE`, or `~/.cache/normtune`."""
    return Path(os.environ.get("NORMTUNE_CACHE") or "~/.cache/normtune").expanduser()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content in hex; OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance() -> dict[str, Any]:
    """Versions and hardware, as they are stored with every result."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident(key: str) -> int:
    """Bytes of this process in memory, as Linux counts: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak() -> None:
    """VmHWM starts anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

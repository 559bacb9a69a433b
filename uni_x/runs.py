"""Run folders: the recipe that made them, their log, their results, and what is needed to make them again."""

import errno
import glob
import json
import logging
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml
from safetensors import SafetensorError

from uni_x.errors import RunError

PACKAGES = ("uni-x", "torch", "transformers", "accelerate", "tokenizers", "numpy", "pillow", "pyarrow", "safetensors")

LOCK = ".lock"
START_FILES = {"recipe.yaml", "log.txt", "stages.json", "checkpoints"}  # what is there before anything is done

_LOGS = {".log", ".out", ".err"}
_PARTIAL = re.compile(r"\..+-(?P<process>\d+)\.partial")
_OTHERS_MAY_WRITE_SECONDS = 24 * 3600  # whether a process of another machine still runs cannot be seen


class RunFolder:
    """A folder that holds one run of one recipe; `begin` makes it one.

    Args:
        path: the folder.
        recipe: the resolved recipe. A folder that was made by another one is refused.
        may_differ: keys of which a run may change the value when it goes on.

    Raises:
        RunError: for a folder of another recipe, and one that holds other things than a run.
    """

    def __init__(self, path: str | Path, recipe: Mapping[str, Any], may_differ: Collection[str] = ()):
        self.path = Path(path)
        self._recipe = dict(recipe)
        self._lock: IO[str] | None = None
        self._refuse_anything_else(may_differ)

    def keep_others_away(self) -> None:
        """Holds the lock of a folder that has one, for as long as this object is there; `begin` holds that of any.

        Raises:
            RunError: for a folder that another process is at work in.
        """
        if (self.path / LOCK).exists():
            self._hold_lock()

    def begin(self) -> None:
        """Makes the folder and puts its recipe down, once everything that can be checked beforehand is.

        Raises:
            RunError: for a folder that cannot be written, or that another process is at work in.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            raise self._unusable(error) from None
        self._hold_lock()
        remove_leftovers(self.path)
        if not self.recipe_file.exists() or self._nothing_done():
            write_atomically(self.recipe_file, yaml.safe_dump(self._recipe, sort_keys=False, allow_unicode=True))
        self._log_to_file()

    def require(self, size: int) -> None:
        """Raises `RunError` where the disk has less than `size` bytes free."""
        free = shutil.disk_usage(self.path).free
        if free < size:
            raise RunError(
                f"{self.path}: the disk has {free / 2**20:.0f} MB free, this run needs {size / 2**20:.0f} MB; "
                "make room, or choose a folder on another disk"
            )

    @property
    def recipe_file(self) -> Path:
        """What the run was made by."""
        return self.path / "recipe.yaml"

    @property
    def results_file(self) -> Path:
        """Every figure of the run."""
        return self.path / "results.json"

    @property
    def report_file(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    def read_results(self) -> dict[str, Any]:
        """What `write_results` left; empty where nothing is there yet."""
        if not self.results_file.exists():
            return {}
        try:
            return json.loads(self.results_file.read_text(encoding="utf-8"))
        except ValueError:
            raise RunError(f"{self.results_file}: not valid JSON; delete it, and run again") from None

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes the figures together with where they come from."""
        write_atomically(self.results_file, json.dumps({**results, "provenance": provenance()}, indent=2) + "\n")

    def _hold_lock(self) -> None:
        """However the process ends, its lock does too; child processes do not have it."""
        try:
            import fcntl
        except ImportError:  # not there on Windows
            return
        if self._lock is not None:  # and to open the file again, and close it, would give the lock up
            return
        try:
            self._lock = (self.path / LOCK).open("a+")
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # on a full disk the lock holds all the same
                self._lock.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", file=self._lock, flush=True)
        except OSError as error:
            if self._lock is not None and error.errno in (errno.EACCES, errno.EAGAIN):
                self._lock.seek(0)
                holder = self._lock.readline().strip() or "another process"
                raise RunError(
                    f"{self.path}: {holder} is at work here; let it end, end it, or choose another folder"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # storage without locks
                raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> RunError:
        return RunError(f"{self.path}: cannot be used as a run folder ({getattr(error, 'strerror', None) or error})")

    def _log_to_file(self) -> None:
        logger = logging.getLogger("uni_x")
        target = (self.path / "log.txt").resolve()
        if any(getattr(handler, "baseFilename", None) == str(target) for handler in logger.handlers):
            return
        handler = logging.FileHandler(target, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)

    def _nothing_done(self) -> bool:
        """Whether an earlier call left nothing but its recipe here, so that another recipe may have the folder."""
        return _things_in(self.path) <= START_FILES and not any(self.path.glob("checkpoints/checkpoint-*"))

    def _refuse_anything_else(self, may_differ: Collection[str]) -> None:
        refuse_to_overwrite(self.path, own=self.recipe_file.name)
        if self._nothing_done():
            return
        try:
            earlier = yaml.safe_load(self.recipe_file.read_text(encoding="utf-8")) or {}
        except (ValueError, yaml.YAMLError):
            raise RunError(f"{self.recipe_file}: not valid YAML; choose another folder, or delete this one") from None
        allowed = tuple(may_differ)
        differ = _differences(earlier, self._recipe)
        if changed := [name for name in differ if not any(f"{name}.".startswith(f"{key}.") for key in allowed)]:
            raise RunError(
                f"{self.path}: was made by another recipe (other {', '.join(changed[:3])}); "
                "choose another folder, or delete this one"
            )


def refuse_to_overwrite(folder: Path, own: str | None = None) -> None:
    """Raises `RunError` where a folder that is to be written holds something, or is a file.

    A folder with a file or folder called `own` was begun by the same command, which goes on there; otherwise only logs
    may lie in it. Where `own` is left out, the folder will be replaced, so that it must be empty.
    """
    with writing_into(folder):
        if folder.is_file():
            raise RunError(f"{folder}: is a file; choose a folder")
        others = sorted(_names_in(folder) if own is None else _things_in(folder))
        # asked last: while the names were read, another process may have begun
        if others and (own is None or not (folder / own).exists()):
            raise RunError(f"{folder}: holds other things, such as {others[0]}; choose a new or an empty folder")


def _things_in(folder: Path) -> set[str]:
    """Names in a folder, but for locks, what is being written, and logs that shells and schedulers keep."""
    names = _names_in(folder) - {LOCK}
    return {name for name in names if Path(name).suffix not in _LOGS and not _PARTIAL.fullmatch(name)}


def _names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turns what the system says of a folder that cannot be written, or of a full disk, into a `RunError`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):  # a library's own, or a server's
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(folder) from None
        reason = error.strerror if _is_inside(error.filename, folder) else f"{error.strerror}: {error.filename}"
        raise RunError(f"{folder}: cannot be written ({reason}); choose another folder") from None
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise RunError(
            f"{folder}: a checkpoint cannot be written, most likely because the disk is full; free some space and run "
            "again, it will carry on from the one before"
        ) from None
    except SafetensorError as error:
        if "No space left" in str(error):
            raise _full(folder) from None
        raise RunError(f"{folder}: weights cannot be written or read ({error})") from None


def _is_inside(file: object, folder: Path) -> bool:
    """Whether naming the folder is enough; where no file is known, it is."""
    return not isinstance(file, str) or Path(file).is_relative_to(folder)


def _full(folder: Path) -> RunError:
    return RunError(f"{folder}: the disk is full; free some space and run again, it will carry on")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Writes a file so that it is whole on the disk or not there. Raises `RunError` where that cannot be done.

    Several processes may write the same file at the same time; that of the last one stays.
    """
    with writing_whole(file) as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def writing_whole(file: Path) -> Iterator[IO[bytes]]:
    """A stream whose content is at `file` once the block has ended, and nowhere if it fails; see `write_atomically`."""
    partial = file.with_name(f".{file.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        with writing_into(file.parent):
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes had begun to write into a folder, or to one file in it; what others write stays."""
    for partial in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.partial"):
        with suppress(OSError):
            if (begun := _PARTIAL.fullmatch(partial.name)) and not _is_being_written(partial, int(begun["process"])):
                partial.unlink()


def _is_being_written(partial: Path, process: int) -> bool:
    if partial.name.endswith(f".{socket.gethostname()}-{process}.partial"):
        return _is_running(process)
    return time.time() - partial.lstat().st_mtime < _OTHERS_MAY_WRITE_SECONDS


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def provenance() -> dict[str, Any]:
    """Command, git revision, versions and machine."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "uni-x"), *sys.argv[1:]]),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_revision() -> str | None:
    """The revision of the package's own checkout, None where it is installed from elsewhere."""
    package = Path(__file__).parent
    if _git(package, "rev-parse", "--show-prefix") != f"{package.name}/":
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=12")


def _git(folder: Path, *words: str) -> str | None:
    try:
        answer = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _differences(earlier: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*earlier, *now]))
        return [name for key in keys for name in _differences(earlier.get(key), now.get(key), f"{prefix}{key}.")]
    return [] if earlier == now else [prefix.rstrip(".")]

"""Run folders: the recipe that made them, their log, their results, and what is needed to make them again."""

import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from uni_x.errors import RunError

PACKAGES = ("uni-x", "torch", "transformers", "accelerate", "tokenizers", "numpy", "pillow", "pyarrow", "safetensors")


class RunFolder:
    """A folder that holds one run of one recipe.

    Args:
        path: the folder, made where it does not exist.
        recipe: the resolved recipe. A folder that was made by another one is refused.
        needs_bytes: free space that the run will want.

    Raises:
        RunError: for a folder of another recipe, one that cannot be written, or a disk without room.
    """

    def __init__(self, path: str | Path, recipe: Mapping[str, Any], needs_bytes: int = 0):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise RunError(f"{self.path}: cannot be used as a run folder ({error.strerror})") from None
        if free < needs_bytes:
            raise RunError(
                f"{self.path}: the disk has {free / 2**20:.0f} MB free, this run needs {needs_bytes / 2**20:.0f} MB; "
                "make room or choose another folder with --out"
            )
        self._settle_recipe(dict(recipe))

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
        return json.loads(self.results_file.read_text()) if self.results_file.exists() else {}

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes the figures together with where they come from."""
        write_atomically(self.results_file, json.dumps({**results, "provenance": provenance()}, indent=2) + "\n")

    def log_to_file(self) -> None:
        """Sends the package's log to `log.txt`."""
        logger = logging.getLogger("uni_x")
        target = (self.path / "log.txt").resolve()
        if any(getattr(handler, "baseFilename", None) == str(target) for handler in logger.handlers):
            return
        handler = logging.FileHandler(target)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)

    def _settle_recipe(self, recipe: dict[str, Any]) -> None:
        file = self.path / "recipe.yaml"
        if not file.exists():
            write_atomically(file, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
            return
        earlier = yaml.safe_load(file.read_text()) or {}
        if changed := _differences(earlier, recipe):
            raise RunError(
                f"{self.path}: was made by another recipe ({', '.join(changed[:3])} differ); "
                "choose another folder with --out, or delete this one"
            )


def write_atomically(file: Path, text: str) -> None:
    """Writes a text file so that it is whole or not there. Raises `RunError` where the disk is full."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror})") from None


def provenance() -> dict[str, Any]:
    """Command, git revision, versions and machine."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _differences(earlier: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*earlier, *now]))
        return [name for key in keys for name in _differences(earlier.get(key), now.get(key), f"{prefix}{key}.")]
    return [] if earlier == now else [prefix.rstrip(".")]

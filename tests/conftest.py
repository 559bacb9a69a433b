import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# read once, when torch is loaded: spinning threads make a suite ten times slower as soon as anything runs beside it
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

RunCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture
def uni_x(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Runs `uni-x` with the given words; returns exit code, output and errors."""
    from uni_x import cli

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["uni-x", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run

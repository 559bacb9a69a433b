"""Golden data from the published implementation.

The cases of the folder in `UNI_X_GOLDEN` are run, by default those beside the tests; what a folder lacks is left out.
"""

import os
from pathlib import Path

GOLDEN = Path(os.environ.get("UNI_X_GOLDEN", Path(__file__).parents[1] / "fixtures"))


def folders(part: str) -> list[Path]:
    """Model folders below `reference` or `published`."""
    return sorted(path.parent for path in (GOLDEN / part).glob("*/config.json") if path.parent.name != "vqgan")


if not folders("reference") and not folders("published"):
    raise FileNotFoundError(f"{GOLDEN}: no golden data in it")

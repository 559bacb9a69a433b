"""Reads the tensors of a torch checkpoint whose pickle names foreign classes, without running any foreign code.

`torch.load(weights_only=True)` refuses such files (training frameworks leave callbacks and configurations in
them). Here only what rebuilds tensors is understood; every other name in the pickle becomes an empty class of ours that
swallows whatever is done to it. Nothing is imported, and nothing that the file names is called.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uni_x.errors import DataError

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Stub:
    """Stands for an object of a class that we do not know: takes part in unpickling, does nothing, keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        """Takes any arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        """Does nothing."""
        return Stub()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Swallows an item."""

    def extend(self, items: Any) -> None:
        """Swallows items."""

    def add(self, item: Any) -> None:
        """Swallows an item."""


def read_inert(path: Path) -> Any:
    """What `torch.save` wrote to `path` (the zip format, torch 1.6 and later): tensors real, foreign objects stubs.

    Raises `DataError` where the file is no such archive or does not unpickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next((name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("data.pkl")), None)
            if root is None:
                raise DataError(f"{path}: not a torch checkpoint (there is no data.pkl in it)")
            with archive.open(f"{root}data.pkl") as pickled:
                return InertUnpickler(pickled, archive, root).load()
    except DataError:
        raise
    except Exception as error:  # a broken pickle can raise anything at all
        raise DataError(f"{path}: not a readable torch checkpoint ({type(error).__name__}: {error})") from None


class InertUnpickler(pickle.Unpickler):
    """Resolves names to the few that rebuild tensors, and to stubs."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self.archive = archive
        self.root = root

    def find_class(self, module: str, name: str) -> Any:
        """The one door through which a pickle reaches code."""
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _rebuild_parameter
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name.rpartition(".")[2], (Stub,), {"__module__": f"stub of {module}"})

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """The numbers of one storage, as a flat tensor."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise DataError(f"a storage of unknown kind {kind!r}")
        numbers = bytearray(self.archive.read(f"{self.root}data/{key}"))
        return torch.frombuffer(numbers, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _rebuild_tensor(
    storage: torch.Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    return tensor

"""Reading files of weights without running anything that is in them: torch.save, safetensors, plain pickles of numpy
arrays.

A pickle can call any function of any module. torch's own reader (``weights_only=True``) builds tensors, plain
containers and the classes of :data:`HARMLESS`, which training scripts put beside them and which only hold values. For
detectron2's ``.pkl`` :class:`ArrayUnpickler` builds plain containers and arrays, the latter with code of its own: not
even numpy's unpickling functions run.
"""

import argparse
import json
import pathlib
import pickle
import re
import shlex
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
]
"""Namespaces of options, paths and numbers of numpy."""
_REMEDY = "load it where its program is installed and save its state dict alone with torch.save"


_OTHERS = (
    (rb"\Z", "is empty: get a good copy"),
    (rb"version https://git-lfs", "is a pointer of Git LFS and not the file itself: run `git lfs pull` where it lies"),
    (rb"\s*<(?:!doctype|html|\?xml)", "is a web page, perhaps of a failed download: get the file itself"),
    (
        rb"\x89HDF\r\n",
        "is an HDF5 file, as of Keras: save its weights with torch.save, under torchvision's names",
    ),
    (rb"\x1f\x8b", "is compressed: unpack it with gunzip"),
)
"""Beginnings of files that are none of weights -> what to say."""


def read_content(path: Path) -> Any:
    """What a file of weights holds: nested dictionaries with tensors.

    Raises:
        ValueError: it is damaged, of no known format, or holds other objects, whose class is named.
        ImportError: safetensors is missing.
    """
    with path.open("rb") as file:
        start = file.read(64)
    for head, what in _OTHERS:
        if re.match(head, start, re.DOTALL | re.IGNORECASE):
            raise ValueError(f"{path} {what}")
    if path.suffix == ".safetensors" or re.match(rb'.{8}\{\s*"', start, re.DOTALL):
        return _read_safetensors(path)
    if path.suffix == ".pkl" and start[:2] != b"PK":
        return _read_pickle(path)
    return _read_torch(path)


def import_safetensors() -> Any:
    """``safetensors.torch``, or one line that says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"safetensors files need the package safetensors ({error}): pip install safetensors"
        ) from None
    return safetensors.torch


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    load_file = import_safetensors().load_file
    try:
        return dict(load_file(path))
    except Exception as error:  # its own class of errors is not public
        raise ValueError(f"{path} is no safetensors file ({str(error)[:200]}); export it again") from None


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # about pickles; what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own message advises to load the pickle unsafely
        if zipfile.is_zipfile(path) and _is_torchscript(path):
            code = f'import torch; torch.save(torch.jit.load({json.dumps(str(path))}).state_dict(), "weights.pth")'
            raise ValueError(
                f"{path} is a TorchScript program: `python -c {shlex.quote(code)}` runs it and saves its weights"
            ) from None
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise ValueError(_other_object(path, found[1])) from None
        raise ValueError(
            f"{path} cannot be read as plain tensors: it is no file of torch.save, or damaged; {_REMEDY}"
        ) from None


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _other_object(path: Path, name: str) -> str:
    return (
        f"{path} cannot be read as plain tensors: it also holds a {name}, which only its program can build; {_REMEDY}"
    )


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _tensors(ArrayUnpickler(file, encoding="latin1").load())
    except _OtherObjectError as error:
        raise ValueError(_other_object(path, str(error))) from None
    except Exception as error:  # whatever a damaged pickle makes of the machine that reads it
        raise ValueError(
            f"{path} is no pickle of numpy arrays ({type(error).__name__}: {str(error)[:200]}); restore the file"
        ) from None


class _OtherObjectError(Exception):
    """The name of a class or function that a pickle asks for and does not get."""


class _Dtype:
    """What stands for a numpy dtype while a pickle is read: a number of a fixed size."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>=|]?(?:[fiu][1248]|b1|\?)", str(code)):
            raise _OtherObjectError(f"numpy.dtype {str(code)[:20]!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """What stands for a numpy array while a pickle is read."""

    value: NDArray[Any]

    def __init__(self, *_: Any) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if is_fortran else "C")


def _array(raw: Any, dtype: _Dtype, shape: Any, order: str) -> NDArray[Any]:
    data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    return np.frombuffer(data, dtype=dtype.dtype).reshape(tuple(int(n) for n in shape), order=order)  # type: ignore[call-overload]


def _from_buffer(raw: Any, dtype: _Dtype, shape: Any, order: str) -> _Array:
    array = _Array()
    array.value = _array(raw, dtype, shape, str(order))
    return array


def _scalar(dtype: _Dtype, raw: Any) -> Any:
    return _array(raw, dtype, (), "C").item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _OtherObjectError(f"_codecs.encode to {encoding[:20]!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """``bytes()``, as old protocols write an empty one."""
    return b""


class ArrayUnpickler(pickle.Unpickler):
    """Reads dict, list, tuple, str, bytes, numbers, and arrays of numbers; everything else is an error."""

    _KNOWN = {  # noqa: RUF012
        **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
        **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
        **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
        "_codecs.encode": _encode,
        "__builtin__.bytes": _no_bytes,
        "builtins.bytes": _no_bytes,
        "collections.OrderedDict": dict,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name that pickles of arrays have; nothing is imported."""
        try:
            return self._KNOWN[f"{module}.{name}"]
        except KeyError:
            raise _OtherObjectError(f"{module}.{name}") from None


def _tensors(value: Any) -> Any:
    """Arrays as tensors, in nested dictionaries and lists."""
    if isinstance(value, dict):
        return {name: _tensors(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_tensors(one) for one in value]
    if isinstance(value, _Array):
        array = value.value
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    return value

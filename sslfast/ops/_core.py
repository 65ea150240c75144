"""Loads the compiled core ``sslfast/_C.so``, which registers ``torch.ops.sslfast.*``.

Where it was not installed, the ops are defined here and :mod:`sslfast.ops._fallback` computes them.
"""

import ctypes
import multiprocessing
import warnings
from pathlib import Path

import torch

PATH = Path(__file__).parents[1] / "_C.so"
REMEDY = (
    "install a wheel, or build it in this environment: `pip install --no-build-isolation -e .` in a checkout, "
    "`pip install --force-reinstall --no-deps sslfast` elsewhere"
)
# As csrc/library.cpp defines them; a test compares the two.
SCHEMAS = (
    "negative_rows(Tensor index, Tensor? step_tensor, int step, int num_negatives, int num_rows, int seed, "
    "bool exclude_self, bool shared) -> Tensor",
    "bank_nce(Tensor query, Tensor bank, Tensor index, Tensor? negatives, Tensor? step_tensor, int step, "
    "Tensor? z_tensor, float z, int num_negatives, float temperature, bool binary, bool exclude_self, int seed, "
    "int first_row=0, int num_rows=-1) -> (Tensor, Tensor, Tensor)",
    "bank_nce_dense(Tensor query, Tensor bank, Tensor index, Tensor? negatives, Tensor? z_tensor, float z, "
    "float temperature, bool binary, bool exclude_self) -> (Tensor, Tensor, Tensor)",
    "bank_update_(Tensor(a!) bank, Tensor index, Tensor features, float momentum) -> ()",
    "bank_enqueue_(Tensor(a!) bank, Tensor(b!) head, Tensor keys) -> ()",
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor? momentum_tensor, float momentum) -> ()",
    "rotate90(Tensor images, Tensor quarter_turns) -> Tensor",
    "render_views(Tensor crops, Tensor parameters, Tensor? quarter_turns, Tensor? permutation, Tensor? offsets, "
    "int grid, int patch_size, float mean_r, float mean_g, float mean_b, float std_r, float std_g, float std_b, "
    "ScalarType dtype, bool channels_last, bool photometric, bool blur) -> Tensor",
    "rgb_to_lab(Tensor pixels, bool channels_last) -> Tensor",
    "jigsaw_patches(Tensor images, Tensor permutation, Tensor offsets, int grid, int patch_size) -> Tensor",
)


def _load() -> tuple[ctypes.CDLL | None, torch.library.Library | None]:
    """(core, None), or (None, the ops' definitions, which live as long as the second object)."""
    if PATH.is_file():
        try:
            torch.ops.load_library(PATH)
        except OSError as error:
            raise ImportError(
                f"sslfast's compiled core does not load with torch {torch.__version__}: {error}; {REMEDY}"
            ) from error
        return ctypes.CDLL(str(PATH)), None
    if multiprocessing.parent_process() is None:  # workers would repeat it
        is_archive = not PATH.parent.is_dir()  # imported by zipimport; the system loads libraries from files alone
        why = "cannot be loaded from an archive" if is_archive else "is not installed"
        warnings.warn(
            f"sslfast's compiled core {why} ({PATH} is {'no file' if is_archive else 'missing'}): its ops run as their "
            f"references in torch, slower and with more memory; {REMEDY}",
            RuntimeWarning,
            stacklevel=2,
        )
    definitions = torch.library.Library("sslfast", "DEF")
    for schema in SCHEMAS:
        definitions.define(schema)
    return None, definitions


core, definitions = _load()


def is_compiled() -> bool:
    """Whether the ops are the compiled kernels; False: they run as their references."""
    return core is not None


def build_info() -> dict[str, str]:
    """Facts about the compiled core: version, note, cuda_architectures, compiler."""
    if core is None:
        return {
            "version": "none",
            "note": f"no compiled core: ops run as their references in torch; {REMEDY}",
            "cuda_architectures": "",
            "compiler": "none",
        }
    core.sslfast_build_info.restype = ctypes.c_char_p
    return dict(line.split("=", 1) for line in core.sslfast_build_info().decode().splitlines())

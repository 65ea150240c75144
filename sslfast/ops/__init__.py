"""Ops: the C++ and CUDA kernels as functions on tensors (losses against a memory bank, updates of banks and momentum
encoders, the view stage), each with a reference in torch that specifies it; counter-based random numbers (``philox``);
the pixel operations of the view stage in torch (``pixels``); sets of permutations (``permutations``); crops of images
(``crops``). Imports torch and the compiled core, nothing else. Without the core the ops run as their references, and
importing them warns.
"""

from sslfast.ops import crops, permutations, philox, pixels
from sslfast.ops._core import build_info, is_compiled
from sslfast.ops.bank_enqueue_ import bank_enqueue_, bank_enqueue_reference
from sslfast.ops.bank_nce import bank_nce, bank_nce_reference, estimate_z
from sslfast.ops.bank_nce_dense import bank_nce_dense, bank_nce_dense_reference
from sslfast.ops.bank_update_ import bank_update_, bank_update_reference
from sslfast.ops.ema_update_ import ema_update_, ema_update_reference
from sslfast.ops.jigsaw_patches import jigsaw_patches, jigsaw_patches_reference
from sslfast.ops.negative_rows import negative_rows, negative_rows_reference
from sslfast.ops.render_views import render_views, render_views_reference
from sslfast.ops.rgb_to_lab import rgb_to_lab, rgb_to_lab_reference
from sslfast.ops.rotate90 import rotate90, rotate90_reference
from sslfast.ops.view_parameters import ViewParameter, neutral_parameters

if not is_compiled():
    from sslfast.ops import _fallback  # noqa: F401, registers the references

__all__ = [
    "ViewParameter",
    "bank_enqueue_",
    "bank_enqueue_reference",
    "bank_nce",
    "bank_nce_dense",
    "bank_nce_dense_reference",
    "bank_nce_reference",
    "bank_update_",
    "bank_update_reference",
    "build_info",
    "crops",
    "ema_update_",
    "ema_update_reference",
    "estimate_z",
    "is_compiled",
    "jigsaw_patches",
    "jigsaw_patches_reference",
    "negative_rows",
    "negative_rows_reference",
    "neutral_parameters",
    "permutations",
    "philox",
    "pixels",
    "render_views",
    "render_views_reference",
    "rgb_to_lab",
    "rgb_to_lab_reference",
    "rotate90",
    "rotate90_reference",
]

"""The ops of sslfast. Importing this needs torch and the compiled core, nothing else."""

from sslfast.ops._library import build_info
from sslfast.ops.bank_update_ import bank_update_, bank_update_reference
from sslfast.ops.negative_rows import negative_rows, negative_rows_reference

__all__ = [
    "bank_update_",
    "bank_update_reference",
    "build_info",
    "negative_rows",
    "negative_rows_reference",
]

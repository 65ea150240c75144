"""Other projects' interfaces on our ops. Imports ``models`` and ``ops``, and no package but torch."""

from sslfast.adapters.lightly_memory_bank import MemoryBankModule, NTXentLoss
from sslfast.adapters.nce_average import NCEAverage

__all__ = ["MemoryBankModule", "NCEAverage", "NTXentLoss"]

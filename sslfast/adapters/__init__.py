"""Interfaces of other projects, implemented with the ops of sslfast. Imports ``models``, ``distributed`` and ``ops``;
torch is the only package needed."""

from sslfast.adapters.lightly_memory_bank import MemoryBankModule, NTXentLoss
from sslfast.adapters.nce_average import NCEAverage

__all__ = ["MemoryBankModule", "NCEAverage", "NTXentLoss"]

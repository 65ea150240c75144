"""Interfaces of other projects, implemented with the ops of sslfast. Imports ``models``, ``distributed`` and ``ops``;
torch is the only package needed.

=============================================  ========================================================================
``MemoryBankModule``, ``NTXentLoss``           lightly 1.5.26
``NCEAverage``                                 lemniscate.pytorch (also VISSL's inner pair and CMC's ``MemoryInsDis``)
``NCELossWithMemory``                          VISSL
``CMCAverage``                                 CMC's ``NCEAverage``; ``sslfast.adapters.cmc.NCEAverage`` by its own name
``RGBMem``, ``CMCMem``                         PyContrast
=============================================  ========================================================================
"""

from sslfast.adapters.cmc import NCEAverage as CMCAverage
from sslfast.adapters.lightly_memory_bank import MemoryBankModule, NTXentLoss
from sslfast.adapters.nce_average import NCEAverage
from sslfast.adapters.pycontrast import CMCMem, RGBMem
from sslfast.adapters.vissl import NCELossWithMemory

__all__ = ["CMCAverage", "CMCMem", "MemoryBankModule", "NCEAverage", "NCELossWithMemory", "NTXentLoss", "RGBMem"]

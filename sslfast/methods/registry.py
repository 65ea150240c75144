"""The methods that there are."""

from typing import TypeAlias

from sslfast.methods.pirl import PIRL

MethodConfig: TypeAlias = PIRL.Config
"""Configuration of any method; ``name`` says which."""

"""The command ``sslfast``. May import every package; nothing imports it."""

__all__ = ["main"]

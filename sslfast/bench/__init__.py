"""What users time on their own machine: ops, loaders, training steps. Imports ``recipes`` and what lies below.

``timing`` has the clocks and ``peers`` the plain torch forms that ops are compared with; ``charts`` draws the numbers.
The project's claims of speed are measured with these in ``benchmarks/``.
"""

__all__ = ["charts", "loader", "ops", "peers", "step", "timing"]

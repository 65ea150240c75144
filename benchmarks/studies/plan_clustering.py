"""What DeepCluster and SeLa hold and exchange for N rows of D columns on R ranks. Computed, not measured.

    python -m benchmarks.studies.plan_clustering

prints the table of docs/scale.md. tests/distributed/test_clustering_memory.py compares the bytes with a small run's.
"""

from dataclasses import dataclass

from benchmarks.studies.plan_bank import quantity


@dataclass(kw_only=True, frozen=True)
class Clustering:
    """One clustering. Bytes are those of one rank."""

    rows: int
    ranks: int
    columns: int = 2048
    """D, of a feature."""
    element: int = 2
    """Bytes of a stored element: 4 fp32, 2 bf16."""
    clusters: int = 10000
    """K; of SeLa those of one head."""
    dimensions: int = 256
    """d, whitened components; 0: the features themselves."""
    heads: int = 0
    """H of SeLa; 0: DeepCluster."""
    iterations: int = 20
    """Of k-means, or of Sinkhorn for one head."""

    @property
    def share(self) -> int:
        """Rows of a rank, at most."""
        return -(-self.rows // self.ranks)

    def features(self) -> int:
        """On the device or on disk, and in checkpoints."""
        return self.share * self.columns * self.element

    def second(self) -> int:
        """While it clusters, in memory or on disk: whitened points, or the logits of one head."""
        return 4 * self.share * (self.clusters if self.heads else self.dimensions)

    def replicated(self) -> int:
        """On every rank: labels and what has been seen; while an epoch is ordered or labels are gathered 24 more."""
        return self.rows * (4 * max(self.heads, 1) + 1)

    def memory(self) -> int:
        """While it clusters beside all that: sums, covariance and eigenvectors, or blocks of float64 logits."""
        if self.heads:
            return 3 * 8 * 8192 * self.clusters
        return 3 * 8 * self.columns**2 + 3 * 8 * self.clusters * max(self.dimensions, 1) + 8 * (1 << 14) * self.columns

    def reduced(self) -> int:
        """Bytes that ranks sum in a clustering."""
        if self.heads:
            return 8 * self.clusters * self.iterations * self.heads
        return 8 * (self.columns**2 + self.iterations * self.clusters * self.dimensions)

    def flops(self) -> float:
        """Of a rank: of distances and components, or of the logits where they are kept."""
        if self.heads:
            return 2.0 * self.share * self.columns * self.clusters * self.heads
        fit = 2.0 * self.columns**2 + 2.0 * self.columns * self.dimensions
        return self.share * (fit + 2.0 * self.dimensions * self.clusters * (self.iterations + 1))


def table() -> str:
    """Markdown."""
    lines = [
        "| | rows | ranks | features of a rank | points or logits of a rank | on every rank | memory beside | summed |"
        " FLOP of a rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rows, ranks in ((1_281_167, 8), (100_000_000, 64), (1_000_000_000, 256)):
        for name, extra in (
            ("DeepCluster, K = 10000", {"clusters": 10000}),
            ("SeLa, K = 3000, 10 heads", {"clusters": 3000, "heads": 10, "iterations": 100}),
        ):
            plan = Clustering(rows=rows, ranks=ranks, **extra)
            sizes = [plan.features(), plan.second(), plan.replicated(), plan.memory(), plan.reduced()]
            cells = [name, f"{rows:,}", str(ranks), *(quantity(size, "B") for size in sizes)]
            lines.append(f"| {' | '.join(cells)} | {quantity(plan.flops(), 'FLOP')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

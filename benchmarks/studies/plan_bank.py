"""What a memory bank of N rows costs per rank and step: bytes held, read and sent, and FLOPs. Computed, not measured.

    python -m benchmarks.studies.plan_bank --rows 1e9 --cases 8x4096 64x8192 256x16384

prints the table of docs/scale.md, which explains its columns. tests/benchmarks/test_plan_bank.py compares the bytes
with those that a small run over gloo really holds and sends.
"""

import argparse
from dataclasses import dataclass
from typing import Literal

Negatives = Literal["sampled", "shared", "full"]
Layout = Literal["replicated", "sharded", "host"]

PHILOX = 100  # integer operations for two rows drawn: ten rounds of two wide products, four xors, two sums
FLOAT, INDEX = 4, 8  # bytes: queries, gradients and features travel in fp32, rows are int64
TRUNK_FLOPS = 3 * 2 * 4.09e9  # ResNet-50 at 224 px: 4.09e9 multiply-adds forward, twice that backward
CASES = ["8x4096", "64x8192", "256x16384"]
TRUNK_SHARE = 1.73  # a PIRL sample, image and nine patches, in images


@dataclass(kw_only=True, frozen=True)
class Cluster:
    """Vendor figures for one of eight H100 SXM of a DGX H100; peaks, which no run reaches."""

    device_bytes: float = 80e9
    read: float = 3.35e12
    """HBM3, bytes/s."""
    fp32: float = 66.9e12
    """FLOP/s without tensor cores."""
    bf16: float = 989.4e12
    """FLOP/s of the tensor cores, dense."""
    int32: float = 33.5e12
    """Integer operations/s."""
    nvlink: float = 450e9
    """Bytes/s one way (900 GB/s both ways) between the devices of a node."""
    network: float = 50e9
    """Bytes/s one way: one 400 Gb/s InfiniBand port per device."""
    pcie: float = 64e9
    """Bytes/s one way: PCIe 5.0 x16, 128 GB/s both ways."""
    devices_per_node: int = 8
    host_bytes: float = 2e12
    """Memory of a node's host."""


@dataclass(kw_only=True, frozen=True)
class Bank:
    """A bank and its use in one step. ``batch`` is global."""

    rows: int
    batch: int
    ranks: int
    negatives: Negatives
    num_negatives: int
    columns: int = 128
    element: int = 4
    """Bytes of a stored element: 4 fp32, 2 bf16."""
    views: int = 2
    layout: Layout = "replicated"
    """host: sharded, with the rows in pinned host memory, read over PCIe."""

    @property
    def shards(self) -> int:
        return 1 if self.layout == "replicated" else self.ranks

    @property
    def scored(self) -> int:
        """K, negatives of a query."""
        return self.rows - 1 if self.negatives == "full" else self.num_negatives

    def held(self) -> int:
        """Bytes of the largest shard."""
        return -(-self.rows // self.shards) * self.columns * self.element

    def buffers(self) -> int:
        """Bytes beside the bank while scoring: queries, gradients and copies of them, six arrays ``[V, B, D]`` fp32."""
        queries = self.batch if self.shards > 1 else self.batch // self.ranks
        return 6 * self.views * queries * self.columns * FLOAT

    def read(self) -> float:
        """Least bytes of bank rows that a rank reads to score: "sampled" rows once for all views of a sample, others
        once for all queries. Expected value for a shard."""
        if self.negatives == "sampled":
            return self.batch / self.ranks * (self.scored + 1) * self.columns * self.element
        return (self.scored + 1) / self.shards * self.columns * self.element

    def flops(self) -> float:
        """Products and sums of scores and of weighted rows: 4 D for every score."""
        return 4.0 * self.columns * self.views * (self.batch / self.ranks) * (self.scored + 1)

    def draws(self) -> float:
        """Negatives drawn by a rank. Every rank draws for all samples and keeps the rows of its shard."""
        if self.negatives == "full":
            return 0
        return self.scored * (1 if self.negatives == "shared" else self.batch / (self.ranks / self.shards))

    def payloads(self) -> dict[str, int]:
        """Total bytes of the tensors gathered, reduced and scattered in a step."""
        features = self.batch * (INDEX + self.columns * FLOAT)  # the update
        if self.shards == 1:
            return {"gather": features if self.ranks > 1 else 0, "reduce": 0, "scatter": 0}
        queries = self.views * self.batch
        return {
            "gather": features + self.batch * INDEX + queries * self.columns * FLOAT,
            "reduce": 2 * queries * FLOAT,  # maxima, sums of exponentials
            "scatter": queries * (1 + self.columns) * FLOAT,
        }

    def received(self) -> float:
        """Bytes that a rank receives over the network in a step, with ring algorithms: a reduction passes twice."""
        payload = self.payloads()
        return (self.ranks - 1) / self.ranks * (payload["gather"] + 2 * payload["reduce"] + payload["scatter"])

    def seconds(self, cluster: Cluster) -> dict[str, float]:
        """Least seconds for drawing, reading, computing and sending at the cluster's peaks."""
        tensor_cores = self.element == 2 and self.negatives != "sampled"
        link = cluster.nvlink if self.ranks <= cluster.devices_per_node else cluster.network
        return {
            "draw": self.draws() / 2 * PHILOX / cluster.int32,
            "read": self.read() / (cluster.pcie if self.layout == "host" else cluster.read),
            "compute": self.flops() / (cluster.bf16 if tensor_cores else cluster.fp32),
            "send": self.received() / link,
        }

    def fits(self, cluster: Cluster) -> bool:
        """Whether bank and buffers fit in three quarters of the memory; the rest is for network and images."""
        if self.layout == "host":
            return self.held() * min(self.ranks, cluster.devices_per_node) <= 0.75 * cluster.host_bytes
        return self.held() + self.buffers() <= 0.75 * cluster.device_bytes


def quantity(value: float, unit: str) -> str:
    """A number with three digits, SI prefix and unit."""
    for prefix, scale in (
        ("T", 1e12),
        ("G", 1e9),
        ("M", 1e6),
        ("k", 1e3),
        ("", 1.0),
        ("m", 1e-3),
        ("µ", 1e-6),
        ("n", 1e-9),
    ):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"0 {unit}"


HEADINGS = (
    "ranks", "batch", "negatives", "bank", "held", "fits", "rows read", "FLOPs", "of the trunk's", "received",
    "t draw", "t read", "t compute", "t send",
)  # fmt: skip


def table(banks: list[Bank], cluster: Cluster) -> str:
    """Markdown, one row per bank; every number is per rank and step."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    for bank in banks:
        trunk = TRUNK_FLOPS * TRUNK_SHARE * bank.batch / bank.ranks
        kind = f"{bank.layout} {'bf16' if bank.element == 2 else 'fp32'}"
        cells = [
            str(bank.ranks),
            str(bank.batch),
            bank.negatives,
            kind,
            quantity(bank.held(), "B"),
            "yes" if bank.fits(cluster) else "no",
            quantity(bank.read(), "B"),
            quantity(bank.flops(), "FLOP"),
            f"{100 * bank.flops() / trunk:.2f}%",
            quantity(bank.received(), "B"),
            *(quantity(seconds, "s") for seconds in bank.seconds(cluster).values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def banks(rows: int, cases: list[tuple[int, int]], *, num_negatives: int, columns: int) -> list[Bank]:
    """Every kind of negatives, layout and storage for every case of ranks and batch."""
    kinds: list[tuple[Layout, int]] = [("replicated", 4), ("sharded", 4), ("sharded", 2), ("host", 2)]
    negatives: tuple[Negatives, ...] = ("sampled", "shared", "full")
    return [
        Bank(
            rows=rows, batch=batch, ranks=r, negatives=n, num_negatives=num_negatives, columns=columns,
            layout=layout, element=element,
        )
        for r, batch in cases
        for n in negatives
        for layout, element in kinds
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e9)
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--num-negatives", type=int, default=32768)
    parser.add_argument("--cases", nargs="+", default=CASES, help="ranks x global batch")
    for name, value in vars(Cluster()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="of a device")
    options = vars(parser.parse_args())
    cluster = Cluster(**{name: options.pop(name) for name in vars(Cluster())})
    cases = [(int(ranks), int(batch)) for ranks, batch in (case.split("x") for case in options.pop("cases"))]
    print(table(banks(int(options.pop("rows")), cases, **options), cluster), end="")


if __name__ == "__main__":
    main()

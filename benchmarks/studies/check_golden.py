"""Recorded numbers of VISSL and PyContrast against sslfast's: loss, gradient, Z and bank over two steps.

    python -m benchmarks.studies.check_golden DIR [-o FILE.md]

DIR holds ``vissl_nce.npz`` and ``pycontrast_infonce.npz`` (fp32, CPU): a bank, two batches of embeddings, the rows that
each project drew, and its results. sslfast scores the same rows through ``sslfast.adapters.nce_average``. VISSL adds
2**-23 to the denominators inside the logarithms of its NCE; its loss is therefore also compared with the formula that
has this term. Exit status 1 when a difference exceeds its tolerance.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.adapters import NCEAverage
from sslfast.ops import build_info

TEMPERATURE, MOMENTUM, VISSL_EPS = 0.07, 0.5, 2.0**-23


@dataclass(kw_only=True)
class Difference:
    """One line of the table."""

    source: str
    step: int
    what: str
    recorded: float
    """The recorded number, of an array its largest magnitude."""
    ours: float
    difference: float
    """Largest absolute difference."""
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within its tolerance; NaN is not."""
        return self.difference <= self.tolerance


def compare(source: str, step: int, what: str, recorded: Tensor, ours: Tensor, tolerance: float) -> Difference:
    """Largest absolute difference of two tensors of one shape."""
    if recorded.shape != ours.shape:
        raise ValueError(f"{source} {what}: recorded {list(recorded.shape)}, ours {list(ours.shape)}")
    a, b = recorded.double(), ours.detach().double()
    return Difference(
        source=source,
        step=step,
        what=what,
        recorded=a.abs().max().item() if a.dim() else a.item(),
        ours=b.abs().max().item() if b.dim() else b.item(),
        difference=(a - b).abs().max().item(),
        tolerance=tolerance,
    )


def load(path: Path) -> dict[str, Tensor]:
    """The arrays of a file as tensors."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def vissl_term(embedding: Tensor, bank: Tensor, rows: Tensor, z: float, *, eps: float) -> Tensor:
    """VISSL's criterion of one view in float64: P = exp(s) / Z, noise K / N, ``eps`` added to every denominator."""
    unit = normalize(embedding.double(), dim=1)
    p = (torch.einsum("bd,bkd->bk", unit, bank.double()[rows]) / TEMPERATURE).exp() / z
    noise = (rows.shape[1] - 1) / len(bank)
    positive = (p[:, 0] / (p[:, 0] + (noise + eps))).log()
    negatives = (noise / (p[:, 1:] + (noise + eps))).log().sum(dim=1)
    return -(positive + negatives).mean()


def run(recorded: dict[str, Tensor], module: NCEAverage, step: int, idx: Tensor) -> dict[str, Tensor]:
    """One training step of the adapter: loss, gradients, memory afterwards."""
    image = recorded[f"image{step}"].clone().requires_grad_()
    patches = recorded[f"patches{step}"].clone().requires_grad_()
    loss = module(image, recorded[f"index{step}"], patches, idx=idx)
    grad_image, grad_patches = torch.autograd.grad(loss, (image, patches))
    return {"loss": loss, "grad_image": grad_image, "grad_patches": grad_patches, "bank": module.memory.clone()}


def adapter(recorded: dict[str, Tensor], negatives: int, **options: Any) -> NCEAverage:
    """The adapter with the recorded bank as its memory."""
    rows, columns = recorded["bank0"].shape
    module = NCEAverage(columns, rows, negatives, TEMPERATURE, MOMENTUM, **options)
    module.load_state_dict({"memory": recorded["bank0"]})
    return module


def vissl(recorded: dict[str, Tensor]) -> list[Difference]:
    """NCE, Z of the first batch's patch scores, own draw per view, bank updated from the image embedding."""
    name = "VISSL"
    module = adapter(recorded, recorded["rows_image1"].shape[1] - 1, z_from="x_jig", norm_embedding=True)
    table = []
    for step in (1, 2):
        before = module.memory.clone()
        rows = [recorded[f"rows_{view}{step}"] for view in ("patches", "image")]
        out = run(recorded, module, step, torch.stack(rows))
        z = recorded[f"z{step}"]
        table.append(compare(name, step, "Z", z, module.z.float(), 3e-6 * z.item()))
        loss = recorded[f"loss{step}"]
        table.append(compare(name, step, "loss, ours without VISSL's 2^-23", loss, out["loss"], 2e-4))
        pairs = [
            (recorded[f"{view}{step}"], before, own, module.z.item())
            for view, own in zip(("patches", "image"), rows, strict=True)
        ]
        with_eps, without = (
            torch.stack([vissl_term(*pair, eps=eps) for pair in pairs]).mean() for eps in (VISSL_EPS, 0.0)
        )
        table.append(compare(name, step, "loss, formula with 2^-23", loss, with_eps, 1e-6))
        table.append(compare(name, step, "formula without it, our loss", without, out["loss"], 2e-6))
        for key in ("grad_image", "grad_patches"):
            table.append(compare(name, step, key, recorded[f"{key}{step}"], out[key], 2e-6))
        table.append(compare(name, step, "bank after the step", recorded[f"bank{step}"], out["bank"], 1.2e-7))
    return table


def pycontrast(recorded: dict[str, Tensor]) -> list[Difference]:
    """InfoNCE, one draw for both views, bank updated from the image embedding."""
    name = "PyContrast"
    module = adapter(recorded, recorded["rows1"].shape[1] - 1, loss="infonce")
    table = []
    for step in (1, 2):
        before = module.memory.clone()
        out = run(recorded, module, step, recorded[f"rows{step}"])
        table.append(compare(name, step, "loss", recorded[f"loss{step}"], out["loss"], 2e-6))
        for view in ("image", "patches"):
            alone = adapter(recorded | {"bank0": before}, module.K, loss="infonce").eval()
            value = alone(recorded[f"{view}{step}"], recorded[f"index{step}"], idx=recorded[f"rows{step}"])
            table.append(compare(name, step, f"loss of {view}", recorded[f"loss_{view}{step}"], value, 2e-6))
        for key in ("grad_image", "grad_patches"):
            table.append(compare(name, step, key, recorded[f"{key}{step}"], out[key], 1e-5))
        table.append(compare(name, step, "bank after the step", recorded[f"bank{step}"], out["bank"], 1.2e-7))
    return table


def render(table: list[Difference]) -> str:
    """Markdown."""
    lines = ["| recorded by | step | quantity | recorded | ours | largest difference | tolerance | |", "|" + "---|" * 8]
    for row in table:
        verdict = "ok" if row.holds else "**outside**"
        lines.append(
            f"| {row.source} | {row.step} | {row.what} | {row.recorded:.7g} | {row.ours:.7g} | {row.difference:.1e} | "
            f"{row.tolerance:.1e} | {verdict} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Print the table, and write it where -o says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder of the two .npz files")
    parser.add_argument("-o", "--output", type=Path, help="also write the table here, as Markdown")
    chosen = parser.parse_args()
    files = [chosen.directory / name for name in ("vissl_nce.npz", "pycontrast_infonce.npz")]
    for path in files:
        if not path.is_file():
            raise SystemExit(f"check_golden: {path} does not exist; give the folder that holds it")
    table = vissl(load(files[0])) + pycontrast(load(files[1]))
    text = render(table)
    print(text)
    if chosen.output is not None:
        chosen.output.write_text(
            "# Recorded numbers of VISSL and PyContrast against sslfast\n\n"
            "`python -m benchmarks.studies.check_golden DIR -o FILE`: N = 1000, B = 16, K = 512, D = 128, temperature "
            f"{TEMPERATURE}, bank momentum {MOMENTUM}, fp32\non the CPU, two consecutive steps on the rows that each "
            f"project drew; torch {torch.__version__}, {build_info()['note']}.\n"
            "Of arrays, `recorded` and `ours` show the largest magnitude. VISSL adds 2^-23 to the denominators inside\n"
            "its logarithms: the formula with this term, in float64, gives its loss; ours is the formula\n"
            f"without the term.\n\n{text}\n"
        )
    return 0 if all(row.holds for row in table) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Published numbers of the recipes, and the table of methods of docs/recipes.md, which is made from them:
``python -m sslfast.recipes.published docs/recipes.md``.

Numbers are ImageNet linear top-1 in percent, as the source prints them. No run of ours is among them.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sslfast.files import replacing

VISSL, MMSELFSUP = "facebookresearch/vissl MODEL_ZOO.md", "open-mmlab/mmselfsup configs/selfsup/"
PIRL = "Misra & van der Maaten, CVPR 2020, "


@dataclass(frozen=True, kw_only=True)
class Published:
    """A number that somebody has published of what a recipe runs."""

    top1: float
    """ImageNet linear top-1 in percent."""
    source: str
    """Paper with table or section, or repository with file."""
    epochs: int | None = None
    """Of the pretraining; None: the source does not say."""
    trunk: str = "ResNet-50"
    """The network, where it is not torchvision's ResNet-50."""
    note: str = ""
    """How it was measured, where not on the pooled last layer or the best one."""

    def __str__(self) -> str:
        where = [f"{self.epochs} epochs" if self.epochs else "", self.trunk.removeprefix("ResNet-50"), self.note]
        words = ", ".join(word.strip(" ,") for word in where if word.strip(" ,"))
        return f"{self.top1:.2f}".removesuffix("0") + (f" ({words})" if words else "")


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "pirl-paper": (Published(top1=63.6, epochs=800, source=PIRL + "table 2"),),
    "pirl-vissl": (
        Published(top1=64.29, epochs=800, source=VISSL),
        Published(top1=62.55, epochs=200, source=VISSL),
    ),
    "pirl-mlp-blur": (
        Published(top1=69.9, epochs=800, source="facebookresearch/vissl projects/PIRL/README.md"),
        Published(top1=65.8, epochs=200, source="facebookresearch/vissl projects/PIRL/README.md"),
    ),
    "pirl-rotation": (Published(top1=60.2, epochs=400, source=PIRL + "table 5"),),
    "pirl-rotation-jigsaw": (Published(top1=63.1, epochs=400, source=PIRL + "table 5"),),
    "npid": (Published(top1=54.0, epochs=200, source=PIRL + "table 2, of Wu et al., CVPR 2018"),),
    "npid-plus-plus": (
        Published(top1=59.0, epochs=800, source=PIRL + "table 2", note="paper"),
        Published(top1=56.68, epochs=800, source=VISSL, note="VISSL"),
    ),
    "moco-v1": (Published(top1=60.6, epochs=200, source="facebookresearch/moco README.md, models"),),
    "moco-v2": (
        Published(top1=67.5, epochs=200, source="facebookresearch/moco README.md, mean of five runs"),
        Published(top1=71.1, epochs=800, source="facebookresearch/moco README.md, models"),
    ),
    "simclr": (Published(top1=69.1, source="google-research/simclr README.md, ResNet50 (1x)"),),
    "simclr-vissl": (
        Published(top1=66.61, epochs=200, source=VISSL),
        Published(top1=69.68, epochs=800, source=VISSL),
        Published(top1=68.8, epochs=1000, source=VISSL),
    ),
    "byol": (
        Published(
            top1=74.3,
            epochs=1000,
            source="Grill et al., NeurIPS 2020, abstract; deepmind-research byol/README.md: 74.0 to 74.5",
        ),
    ),
    "simsiam": (Published(top1=68.1, epochs=100, source="facebookresearch/simsiam README.md"),),
    "barlow-twins": (Published(top1=73.5, epochs=1000, source="facebookresearch/barlowtwins README.md"),),
    "vicreg": (Published(top1=73.2, epochs=1000, source="facebookresearch/vicreg README.md"),),
    "swav": (
        Published(top1=75.3, epochs=800, source="facebookresearch/swav README.md"),
        Published(top1=74.6, epochs=400, source="facebookresearch/swav README.md"),
        Published(top1=73.9, epochs=200, source="facebookresearch/swav README.md"),
        Published(top1=72.1, epochs=100, source="facebookresearch/swav README.md"),
    ),
    "jigsaw": (
        Published(top1=46.73, epochs=105, source=VISSL, note="VISSL"),
        Published(top1=45.7, source=PIRL + "table 2, of Goyal et al. 2019", note="Goyal 2019"),
    ),
    "rotation": (
        Published(top1=48.2, epochs=105, source=VISSL, note="VISSL"),
        Published(top1=48.9, source=PIRL + "table 2", note="PIRL's paper"),
    ),
    "relative-position": (
        Published(top1=51.2, epochs=70, source=MMSELFSUP + "relative_loc/README.md", note="best layer"),
        Published(top1=40.4, epochs=70, source=MMSELFSUP + "relative_loc/README.md", note="pooled last layer"),
    ),
    "deepcluster": (
        Published(
            top1=46.92, epochs=200, source=MMSELFSUP + "deepcluster/metafile.yml", trunk="ResNet-50 with Sobel input"
        ),
        Published(
            top1=57.71,
            epochs=200,
            source=MMSELFSUP + "deepcluster/README.md",
            trunk="ResNet-50 with Sobel input",
            note="best layer",
        ),
    ),
    "sela": (
        Published(
            top1=61.5,
            epochs=400,
            source="yukimasano/self-label README.md and scripts/resnet.sh",
            trunk="pre-activation ResNet-50",
        ),
    ),
    "sela-aug": (Published(top1=68.8, epochs=280, source="yukimasano/self-label README.md, Aug++ R50 10x3k"),),
}
"""By recipe; those without an entry have no number of a ResNet on ImageNet whose source they follow."""

METHODS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("pirl-paper",), "PIRL-jigsaw as published: ResNet-50, batch 1024, 32,000 negatives, NCE"),
    (
        ("pirl-vissl",),
        "the same as VISSL runs it (negatives may hold the sample itself, drawn per view; Z from the patch scores)",
    ),
    (("pirl-mlp-blur",), "VISSL's improved PIRL: MLP heads, InfoNCE, SimCLR's augmentation"),
    (("pirl-rotation", "pirl-rotation-jigsaw"), "the paper's ablations: 4,096 negatives"),
    (("npid", "npid-plus-plus"), "instance discrimination (Wu 2018) with 4,096 negatives; λ = 0 of PIRL with 32,000"),
    (
        ("moco-v1", "moco-v2"),
        "momentum encoder, queue of 65,536 keys, shuffled BN over 32 samples; v2: MLP head, blur",
    ),
    (
        ("simclr", "simclr-vissl"),
        "NT-Xent over the gathered batch of 4096, streamed, LARS; as its authors and as VISSL",
    ),
    (("byol",), "predicts a momentum encoder's projection, no negatives (Grill 2020); LARS, batch 4096"),
    (("simsiam",), "the same without a momentum encoder (Chen & He 2021); SGD, batch 512"),
    (("barlow-twins", "vicreg"), "decorrelated dimensions (Zbontar 2021; Bardes 2022); LARS, batch 2048"),
    (("swav",), "swapped assignments to prototypes, multi-crop (Caron 2020); LARS, batch 4096"),
    (("dino",), "self-distillation with a momentum teacher, multi-crop (Caron 2021); ResNet-50, 100 epochs"),
    (("cpc",), "7 x 7 overlapping patches, predictions from a causal context, InfoNCE"),
    (("jigsaw",), "which of 2,000 orders of nine patches (Noroozi 2016), as VISSL"),
    (("rotation",), "which of four rotations (Gidaris 2018), as VISSL"),
    (("relative-position",), "which of eight neighbours a patch is (Doersch 2015), as mmselfsup"),
    (("relative-position-doersch",), "the same with the authors' patches: one channel kept, resampled, 96 px"),
    (("autoencoder",), "denoising, pixel L2 (Vincent 2008)"),
    (("colorization",), "ab bins from lightness, rare colours weighted up (Zhang 2016)"),
    (("super-resolution",), "x4, pixel L1, optional perceptual term from a random network"),
    (("inpainting",), "random regions from what is around them (Pathak 2016, λ_rec)"),
    (
        ("deepcluster",),
        'k-means pseudo-labels (Caron 2018), as mmselfsup, by faiss: `pip install ".[deepcluster]"`',
    ),
    (("sela", "sela-aug"), "self-labelling by Sinkhorn-Knopp, ten heads (Asano 2020); with MoCo v2's augmentation"),
)
"""Rows of the table: recipes, and what they are."""

_HEAD = "| recipe | what | published, ImageNet linear top-1 |"


def table(recipes: Mapping[str, object]) -> str:
    """The Markdown table of methods, of the recipes that there are; no line end behind it."""
    lines = [_HEAD, "|---|---|---|"]
    for names, what in METHODS:
        numbers = "; ".join(", ".join(map(str, PUBLISHED[name])) if name in PUBLISHED else "–" for name in names)
        lines.append(f"| {_listed(names)} | {what} | {numbers} |")
    small = tuple(name for name in recipes if name.endswith("-small"))
    lines.append(f"| {_listed(small)} | the same for images up to 64 px, ResNet-18 | |")
    lines.append("| `demo` | minutes on two CPU cores | |")
    return "\n".join(lines)


def replaced(text: str, recipes: Mapping[str, object]) -> str:
    """A document with its table of methods brought up to date.

    Raises:
        ValueError: it has none.
    """
    start = text.find(_HEAD)
    if start < 0:
        raise ValueError(f"there is no line {_HEAD!r} to put the table of methods at")
    return text[:start] + table(recipes) + text[text.index("\n\n", start) :]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main(path: Path) -> None:
    """Bring the table of the file up to date."""
    from sslfast.recipes import RECIPES

    text = replaced(path.read_text(), RECIPES)
    with replacing(path) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A small folder in the format of a Pascal VOC devkit: a coloured shape or two on every picture."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"bird": (220, 30, 30), "car": (30, 200, 40), "dog": (40, 50, 230)}


def write_voc(root: Path, *, trainval: int, test: int, side: int = 48) -> Path:
    """``root/VOC2007`` with splits trainval and test of so many images. Every fourth image shows two classes, every
    ninth shows its second class as a difficult object."""
    voc = root / "VOC2007"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (voc / part).mkdir(parents=True)
    rng, number = np.random.default_rng(5), 0
    for split, count in (("trainval", trainval), ("test", test)):
        lines: dict[str, list[str]] = {name: [] for name in COLOURS}
        ids = []
        for _ in range(count):
            number += 1
            name = f"{number:06d}"
            first, second = list(COLOURS)[number % 3], list(COLOURS)[(number + 1) % 3]
            shown = {first: False}
            if number % 9 == 0:
                shown[second] = True
            elif number % 4 == 0:
                shown[second] = False
            write_image(voc, name, shown, rng, side)
            ids.append(name)
            for class_name, of in lines.items():
                label = -1 if class_name not in shown else 0 if shown[class_name] else 1
                of.append(f"{name} {label:2d}")
        for class_name, of in lines.items():
            (voc / "ImageSets" / "Main" / f"{class_name}_{split}.txt").write_text("\n".join(of) + "\n")
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return voc


def write_image(voc: Path, name: str, shown: dict[str, bool], rng: np.random.Generator, side: int) -> None:
    """A grey picture with a box of the colour of each class, and its annotation; difficult ones are faint."""
    picture = Image.fromarray(rng.integers(110, 140, (side, side + 6, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(picture)
    objects = []
    for position, (class_name, difficult) in enumerate(shown.items()):
        half = side // 2
        left, top = (int(v) for v in rng.integers(2, 6, 2))
        box = (left, top + position * half, left + side - 12, top + position * half + half - 10)
        draw.rectangle(box, fill=(120, 120, 125) if difficult else COLOURS[class_name])
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (edge + 1 for edge in box), strict=True)
        objects.append(
            f"<object><name>{class_name}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>{int(difficult)}</difficult><bndbox>"
            + "".join(f"<{corner}>{edge}</{corner}>" for corner, edge in corners)
            + "</bndbox><part><name>head</name></part></object>"
        )
    picture.save(voc / "JPEGImages" / f"{name}.jpg", quality=95)
    (voc / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><filename>{name}.jpg</filename><size><width>{side + 6}</width><height>{side}</height>"
        f"<depth>3</depth></size>{''.join(objects)}</annotation>"
    )

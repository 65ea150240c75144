"""Pictures that a run draws while it trains: its views, and nearest neighbours among its images."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslfast.data import Manifest
from sslfast.evaluation import nearest_neighbours
from sslfast.files import ANOTHER_PLACE, save_picture
from sslfast.report.neighbours import Neighbour, Query, neighbour_sheet
from sslfast.report.preview import manifest_preview

_IMAGES, _QUERIES, _NEIGHBOURS = 4, 8, 6


def draw_pictures(config: Any, manifest: Manifest, embedded: tuple[Manifest, Tensor], folder: Path) -> dict[str, Path]:
    """Draw ``preview.png``, once, and ``neighbours.png``; the files by name.

    Args:
        config: the :class:`sslfast.training.TrainConfig` of the run.
        manifest: its images.
        embedded: images, all or some of them, and their embeddings ``[N, D]``.
        folder: created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    preview = folder / "preview.png"
    if not preview.exists():
        panels = partial(config.method.preview_panels, seed=config.seed)
        sheet = manifest_preview(
            manifest, config.method.preview_views(), count=_IMAGES, seed=config.seed, panels=panels
        )
        save_picture(sheet, preview, remedy=ANOTHER_PLACE)
        found["preview"] = preview
    images, embeddings = embedded
    if len(images) > _NEIGHBOURS:
        path = found["neighbours"] = folder / "neighbours.png"
        title = f"images and the {_NEIGHBOURS} others most similar to them"
        sheet = neighbour_sheet(_queries(images, embeddings), title=title)
        save_picture(sheet, path, remedy=ANOTHER_PLACE)
    return found


def _queries(manifest: Manifest, embeddings: Tensor) -> list[Query]:
    count = min(_QUERIES, len(manifest))
    rows = torch.arange(count) * len(manifest) // count
    own = rows.to(embeddings.device)
    similarity, nearest = nearest_neighbours(embeddings[own].float(), embeddings, _NEIGHBOURS, own=own)
    queries = []
    for row, values, others in zip(rows.tolist(), similarity.tolist(), nearest.tolist(), strict=True):
        label = int(manifest.labels[row])
        queries.append(
            Query(
                location=manifest.location(row),
                label=manifest.classes[label] if label >= 0 else Path(manifest.paths[row]).name,
                neighbours={
                    "embeddings": [
                        Neighbour(
                            location=manifest.location(other),
                            similarity=value,
                            same_class=int(manifest.labels[other]) == label if label >= 0 else None,
                        )
                        for value, other in zip(values, others, strict=True)
                    ]
                },
            )
        )
    return queries

"""Pictures that a run draws while it trains: its views, and nearest neighbours among its images."""

from functools import partial
from pathlib import Path
from typing import Any

from sslfast.data import Manifest
from sslfast.evaluation import NearestImages
from sslfast.files import ANOTHER_PLACE, save_picture
from sslfast.report.neighbours import Neighbour, Query, neighbour_sheet
from sslfast.report.preview import manifest_preview

_IMAGES = 4


def draw_pictures(config: Any, manifest: Manifest, nearest: NearestImages | None, folder: Path) -> dict[str, Path]:
    """Draw ``preview.png``, once, and ``neighbours.png``; the files by name.

    Args:
        config: the :class:`sslfast.training.TrainConfig` of the run.
        manifest: its images.
        nearest: neighbours among its images; None: there are too few.
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
    if nearest is not None:
        path = found["neighbours"] = folder / "neighbours.png"
        title = f"images and the {nearest.neighbours.shape[1]} others most similar to them"
        sheet = neighbour_sheet(_queries(nearest), title=title)
        save_picture(sheet, path, remedy=ANOTHER_PLACE)
    return found


def _queries(found: NearestImages) -> list[Query]:
    images = found.images
    columns = (found.queries.tolist(), found.similarity.tolist(), found.neighbours.tolist())
    queries = []
    for row, values, others in zip(*columns, strict=True):
        label = int(images.labels[row])
        queries.append(
            Query(
                location=images.location(row),
                label=images.classes[label] if label >= 0 else Path(images.paths[row]).name,
                neighbours={
                    "embeddings": [
                        Neighbour(
                            location=images.location(other),
                            similarity=value,
                            same_class=int(images.labels[other]) == label if label >= 0 else None,
                        )
                        for value, other in zip(values, others, strict=True)
                    ]
                },
            )
        )
    return queries

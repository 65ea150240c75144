"""Sections of the report about labelled images: accuracy by class, nearest neighbours, embedding map."""

import base64
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslfast.data import ImageLocation, decode_full, quiet_pillow
from sslfast.evaluation import L2_STRENGTHS, TRAINED, EvaluationSet, nearest_neighbours, train_probe
from sslfast.report.charts import figure
from sslfast.report.neighbours import choose_queries
from sslfast.report.page import table, text
from sslfast.text import printable

_TILE = 48  # pixels of a picture in the map's sprite
_MOST_NAMED = 50  # classes with names at the confusion matrix
_NAME = 18  # characters of each
_MOST_CLASSES = 30  # rows of the per-class table; of more classes, the best and the worst


def by_class(evaluation: EvaluationSet) -> str:
    """Accuracy of the linear probe for every class, its confusion matrix and the pairs most often confused."""
    classes = len(evaluation.classes)
    probe = train_probe(
        evaluation.train[TRAINED], evaluation.train_labels, classes=classes, strengths=L2_STRENGTHS[1:4]
    )
    predicted = probe(evaluation.val[TRAINED]).argmax(1)
    confusion = confusion_matrix(predicted, evaluation.val_labels, classes)
    counts = confusion.sum(1)
    share = confusion.diagonal() / counts.clamp(min=1)
    overall = confusion.diagonal().sum() / counts.sum()
    order = [i for i in share.argsort(descending=True).tolist() if counts[i] > 0]
    shown = order if len(order) <= _MOST_CLASSES else [*order[: _MOST_CLASSES // 2], *order[-_MOST_CLASSES // 2 :]]
    rows: list[list[str | float]] = [
        [
            text(evaluation.classes[i]),
            f'<span class="bar" style="width:{160 * float(share[i]):.0f}px"></span> {100 * float(share[i]):.0f} %',
            int(counts[i]),
        ]
        for i in shown
    ]
    off = confusion - confusion.diagonal().diag()
    worst = [divmod(k, classes) for k in off.flatten().argsort(descending=True, stable=True)[:10].tolist()]
    pairs: list[list[str | float]] = [
        [evaluation.classes[a], evaluation.classes[b], int(off[a, b])] for a, b in worst if off[a, b] > 0
    ]
    words = (
        f"Linear probe on the frozen trunk: {100 * float(overall):.1f} % of {int(counts.sum()):,} validation images."
    )
    if len(order) > len(shown):
        words += f" Best and worst {_MOST_CLASSES // 2} of {len(order)} classes."
    confused = f"<h3>Most often confused</h3>{table(['true', 'predicted', 'images'], pairs)}" if pairs else ""
    return (
        f'<p>{words}</p><div class="grid2"><div>{table(["class", "right", "images"], rows, html=True)}</div><div>'
        f"<h3>Confusion</h3><p class='faint'>Rows: true class, columns: predicted, in the order of the folders; "
        f"stronger colours: more often.</p>{_heat_map(confusion, evaluation.classes)}{confused}</div></div>"
    )


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``[classes, classes]`` float64 counts: true class down, predicted class across."""
    flat = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes).double()


def _heat_map(confusion: Tensor, classes: list[str]) -> str:
    """A square for every pair of classes that occurs, with names and counts where there is room for them. Its colour is
    transparent, so that it stands out on a light and on a dark page."""
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    level = share.sqrt()  # the root: rare confusions stay visible
    count = len(classes)
    if count > _MOST_NAMED:
        pixels = np.empty((count, count, 4), np.uint8)
        pixels[..., :3], pixels[..., 3] = (59, 130, 246), (255 * level).round().numpy()
        factor = max(1, 400 // count)
        picture = Image.fromarray(pixels).resize((count * factor, count * factor), Image.Resampling.NEAREST)
        return f'<img class="picture" alt="confusion matrix" src="{data_url(picture, "PNG")}">'
    cell = max(10, min(40, 400 // count))
    names = [printable(name) for name in classes]
    short = [name if len(name) <= _NAME else name[: _NAME - 1] + "…" for name in names]
    left = 12 + 6.5 * max(map(len, short))
    parts = []
    for i, name in enumerate(short):
        at = left + (i + 0.5) * cell
        parts.append(f'<text x="{left - 6:.1f}" y="{at - left + 3.5:.1f}" text-anchor="end">{text(name)}</text>')
        turned = f'transform="rotate(-60 {at:.1f} {count * cell + 12})"'
        parts.append(f'<text x="{at:.1f}" y="{count * cell + 12}" text-anchor="end" {turned}>{text(name)}</text>')
    for i, k in confusion.nonzero().tolist():
        words = f"{names[i]} taken for {names[k]}: {int(confusion[i, k])} of {int(confusion[i].sum())}"
        parts.append(
            f'<rect class="cell" x="{left + k * cell:.1f}" y="{i * cell}" width="{cell}" height="{cell}" '
            f'fill-opacity="{float(level[i, k]):.3f}"><title>{text(words)}</title></rect>'
        )
    frame = f'<rect class="frame" x="{left:.1f}" y="0" width="{count * cell}" height="{count * cell}"/>'
    width, height = left + count * cell + 4, count * cell + left
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px"'
    return f'<svg {size} role="img" aria-label="confusion matrix">{"".join(parts)}{frame}</svg>'


def neighbour_rows(evaluation: EvaluationSet, *, queries: int, k: int) -> str:
    rows = choose_queries(evaluation.val_labels, queries)
    k = min(k, len(evaluation.train_labels))
    similarity, found = nearest_neighbours(evaluation.val[TRAINED][rows], evaluation.train[TRAINED], k)
    parts = []
    for position, row in enumerate(rows.tolist()):
        label = int(evaluation.val_labels[row])
        tiles = [_tile(evaluation.val_locations[row], evaluation.classes[label], "")]
        for value, neighbour in zip(similarity[position].tolist(), found[position].tolist(), strict=True):
            other = int(evaluation.train_labels[neighbour])
            words = f"{evaluation.classes[other]}, cosine {value:.3f}"
            tiles.append(_tile(evaluation.train_locations[neighbour], words, "same" if other == label else "other"))
        name = f'<span class="faint">{text(evaluation.classes[label])}</span>'
        parts.append(f'<div class="tiles">{name}{"".join(tiles)}</div>')
    words = "A validation image, then the training images most similar to it: green, of its class; red, of another."
    return f"<p>{words}</p>{''.join(parts)}"


def embedding_map(evaluation: EvaluationSet, *, most: int) -> str:
    total = len(evaluation.val_labels)
    rows = torch.arange(min(most, total)) * total // min(most, total)
    positions = embed_in_plane(evaluation.val[TRAINED][rows])
    columns = math.ceil(math.sqrt(len(rows)))
    sprite = Image.new("RGB", (columns * _TILE, -(-len(rows) // columns) * _TILE))
    points = []
    with quiet_pillow():
        for i, row in enumerate(rows.tolist()):
            location = evaluation.val_locations[row]
            sprite.paste(_thumbnail(location, _TILE), (i % columns * _TILE, i // columns * _TILE))
            x, y = (round(v, 4) for v in positions[i].tolist())
            points.append([x, y, int(evaluation.val_labels[row]), printable(Path(str(location)).name)])
    data = {
        "points": points,
        "classes": [printable(name) for name in evaluation.classes],
        "columns": columns,
        "tile": _TILE,
        "sprite": data_url(sprite, "JPEG"),
    }
    body = (
        '<div class="map"><canvas width="1200" height="900" aria-label="embedding map"></canvas>'
        '<div class="names"></div>'
        '<div class="shown"><div class="thumb"></div><div class="words faint">Point at a dot, or touch it.</div></div>'
        "</div>"
    )
    return figure(f"t-SNE of {len(rows):,} validation images", body, note="one colour a class", data=data, kind="map")


def embed_in_plane(features: Tensor) -> Tensor:
    """``[N, D]`` features to ``[N, 2]`` coordinates in the unit square: t-SNE on cosine distances, initialised by PCA
    and deterministic. Fewer than 5 images, or features that are all the same, are set on a circle."""
    count = len(features)
    unit = torch.nn.functional.normalize(features.float(), dim=1).numpy()
    if count < 5 or unit.shape[1] < 2 or np.ptp(unit, axis=0).max() < 1e-6:
        angle = torch.arange(count) * 2 * math.pi / max(count, 1)
        return torch.stack((angle.cos(), angle.sin()), 1) / 2 + 0.5
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ImportError("the embedding map needs scikit-learn: pip install 'sslfast[evaluation]'") from None
    perplexity = min(30.0, (count - 1) / 4)
    plane = TSNE(2, perplexity=perplexity, init="pca", random_state=0, metric="cosine").fit_transform(unit)
    found = torch.from_numpy(np.ascontiguousarray(plane)).double()
    low, high = found.amin(0), found.amax(0)
    return (found - low) / (high - low).clamp(min=1e-12)


def _thumbnail(location: ImageLocation, side: int) -> Image.Image:
    """The centre square of a picture."""
    picture = Image.fromarray(decode_full(location.read(), location.source.decoding)).convert("RGB")
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    return picture.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short))


def _tile(location: ImageLocation, words: str, css: str) -> str:
    with quiet_pillow():
        picture = _thumbnail(location, 96)
    name = text(words)
    return f'<img class="{css}" alt="{name}" title="{name}" src="{data_url(picture, "JPEG")}">'


def data_url(picture: Image.Image, kind: str) -> str:
    """The picture inside the page: ``data:image/...;base64,...``."""
    buffer = io.BytesIO()
    picture.convert("RGBA" if kind == "PNG" and picture.mode == "RGBA" else "RGB").save(buffer, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

"""Weighted k-nearest-neighbour accuracy of frozen features, the protocol of NPID (Wu et al., CVPR 2018, section 3.4).

``s_i = cos(f, f_i)`` for every training image; the k most similar vote for their class with weight ``exp(s_i / τ)``;
the class with the largest sum wins. Nothing is trained, so the number depends on the features alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.distributed import resolve_device
from sslfast.evaluation.features import (
    EvaluationSet,
    OnBadImage,
    load_evaluation_set,
    standard_error,
    write_result,
)
from sslfast.evaluation.table import accuracy_table

MAX_ENTRIES = 2**24
"""Most similarities that exist at once (64 MiB of float32)."""
SOURCE = "Wu et al., CVPR 2018, section 3.4"


@dataclass(kw_only=True)
class Accuracy:
    """Share of queries whose class is the first, or among the first five."""

    top1: float
    top5: float


def nearest_neighbours(
    queries: Tensor, bank: Tensor, k: int, *, max_entries: int = MAX_ENTRIES
) -> tuple[Tensor, Tensor]:
    """The k bank rows of largest cosine similarity, in falling order.

    Args:
        queries: ``[Q, D]`` float, any norm.
        bank: ``[N, D]`` float, any norm.
        k: ``1 <= k <= N``.
        max_entries: most similarities that exist at once; both sides are cut to keep it.

    Returns:
        Similarities ``[Q, k]`` float32 and bank rows ``[Q, k]`` int64, on the device of ``queries``.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be in [1, {len(bank)}], the number of training images, got {k=}")
    queries, bank = normalize(queries.float(), dim=1), normalize(bank.float(), dim=1)
    bank_step = max(1, min(len(bank), max_entries))
    query_step = max(1, max_entries // bank_step)
    found: list[tuple[Tensor, Tensor]] = []
    for some in queries.split(query_step):
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, len(bank), bank_step):
            similarity = some @ bank[start : start + bank_step].T
            values, columns = similarity.topk(min(k, similarity.shape[1]), dim=1)
            rows = columns + start
            if best is not None:
                values, rows = torch.cat((best[0], values), 1), torch.cat((best[1], rows), 1)
                values, order = values.topk(min(k, values.shape[1]), dim=1)
                rows = rows.gather(1, order)
            best = values, rows
        assert best is not None
        found.append(best)
    return torch.cat([values for values, _ in found]), torch.cat([rows for _, rows in found])


def class_scores(similarity: Tensor, labels: Tensor, *, classes: int, temperature: float = 0.07) -> Tensor:
    """Votes ``[Q, classes]`` float64: the sum of ``exp((s_i - s_1) / τ)`` over the neighbours of each class.

    Args:
        similarity: ``[Q, k]``, largest first.
        labels: ``[Q, k]`` int64, class of each neighbour.
        classes: number of classes.
        temperature: τ. Dividing every weight of a query by ``exp(s_1 / τ)`` changes no order and cannot overflow.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature=}")
    similarity = similarity.double()
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return torch.zeros(len(labels), classes, dtype=torch.float64, device=labels.device).scatter_add_(1, labels, weights)


def accuracy(scores: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 and top-5 of ``[Q, C]`` votes; a class without any vote counts for neither."""
    values, order = scores.topk(min(5, scores.shape[1]), dim=1)
    hits = (order == labels[:, None]) & (values > 0)
    return Accuracy(top1=hits[:, 0].double().mean().item(), top5=hits.any(1).double().mean().item())


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: Sequence[int] = (1, 5, 20),
    temperature: float = 0.07,
    max_entries: int = MAX_ENTRIES,
) -> dict[int, Accuracy]:
    """Accuracy for every k from one search.

    Args:
        queries: ``[Q, D]`` float, with int64 labels ``[Q]``.
        bank: ``[N, D]`` float, with int64 labels ``[N]``, all at least 0.
        k: neighbours that vote, each in ``[1, N]``.
        temperature: τ.
        max_entries: see :func:`nearest_neighbours`.
    """
    check_k(k, len(bank))
    similarity, rows = nearest_neighbours(queries, bank, max(k), max_entries=max_entries)
    votes = bank_labels[rows]
    classes = int(torch.cat((query_labels, bank_labels)).max()) + 1
    return {
        some: accuracy(
            class_scores(similarity[:, :some], votes[:, :some], classes=classes, temperature=temperature), query_labels
        )
        for some in k
    }


def check_k(k: Sequence[int], images: int) -> None:
    """Raises ValueError where no k is given or one does not fit the number of training images."""
    if not k:
        raise ValueError("k is empty; give at least one number of neighbours, for example 20")
    for some in k:
        if not 1 <= some <= images:
            raise ValueError(f"k must be in [1, {images}], the number of training images, got k={some}; lower it")


def evaluate_knn(
    run: Path,
    data: Path,
    *,
    k: tuple[int, ...] = (1, 5, 20),
    temperature: float = 0.07,
    size: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    on_bad_image: OnBadImage = "error",
    output: Path | None = None,
) -> dict[str, Any]:
    """Weighted kNN accuracy of a run's encoder, beside the untrained encoder and raw pixels.

    Args:
        run: run directory that sslfast pretrain wrote.
        data: folder with train/<class>/ (the bank) and val/<class>/ (the queries).
        k: numbers of neighbours.
        temperature: τ of the weights.
        size: side of the images in pixels; default: that of the run.
        batch_size: images per forward pass.
        workers: decoding threads; 0: none besides the main one.
        device: auto, cpu, cuda or cuda:N.
        on_bad_image: error: stop at an image that cannot be used. skip: leave it out and count it.
        output: JSON file to write; default: RUN/evaluation/knn.json.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature=}")
    check_k(k, 2**62)
    evaluation = load_evaluation_set(
        run, data, size=size, batch_size=batch_size, workers=workers, device=device, on_bad_image=on_bad_image
    )
    return knn_result(
        evaluation,
        k=k,
        temperature=temperature,
        device=device,
        output=Path(run) / "evaluation" / "knn.json" if output is None else output,
    )


def knn_result(
    evaluation: EvaluationSet,
    *,
    k: tuple[int, ...] = (1, 5, 20),
    temperature: float = 0.07,
    device: str = "auto",
    output: Path | None = None,
) -> dict[str, Any]:
    """The result of :func:`evaluate_knn` from features that are already there."""
    chosen = resolve_device(device)
    check_k(k, len(evaluation.train_labels))
    train_labels, val_labels = evaluation.train_labels.to(chosen), evaluation.val_labels.to(chosen)
    rows = []
    for name in evaluation.train:
        bank, queries = evaluation.train[name].to(chosen), evaluation.val[name].to(chosen)
        found = knn_accuracy(queries, val_labels, bank, train_labels, k=k, temperature=temperature)
        for some, value in found.items():
            rows.append(
                {
                    "encoder": name,
                    "protocol": f"knn-cosine-tau{temperature:g}-k{some}",
                    "k": some,
                    "features": bank.shape[1],
                    "top1": value.top1,
                    "top1_standard_error": standard_error(value.top1, len(val_labels)),
                    "top5": value.top5,
                    "top5_standard_error": standard_error(value.top5, len(val_labels)),
                }
            )
    result = {
        "protocol": f"knn-cosine-tau{temperature:g}",
        "source": SOURCE,
        "k": list(k),
        "temperature": temperature,
        "results": rows,
        **evaluation.facts,
    }
    if output is not None:
        write_result(result, output)
    return result


def render_table(result: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    return accuracy_table(result)

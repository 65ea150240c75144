"""Weighted k-nearest-neighbour accuracy of frozen features, the protocol of NPID (Wu et al., CVPR 2018, section 3.4).

``s_i = cos(f, f_i)`` for every training image; the k most similar vote for their class with weight ``exp(s_i / τ)``;
the class with the largest sum wins. Nothing is trained, so the number depends on the features alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.config import to_dict
from sslfast.data import Manifest
from sslfast.device import resolve_device
from sslfast.distributed import distributed_device, gather_rows, gather_uneven, own_rows, sum_over_ranks, world_size
from sslfast.evaluation.dataset import EvaluationSet, FeatureConfig, load_evaluation_set
from sslfast.evaluation.encoders import load_run
from sslfast.evaluation.results import departures, evaluation_folder, standard_error, write_result
from sslfast.evaluation.table import accuracy_table

K = (1, 5, 20, 200)
"""200 is NPID's; those above the number of training images are left out of this default."""
TEMPERATURE = 0.07
MAX_ENTRIES = 2**24
"""Maximum number of similarities in memory at once (64 MiB of float32)."""
QUERIES_AT_ONCE = 1024
"""Queries per block of similarities: enough for a matrix product at full speed."""
SOURCES = {
    "head": "Wu et al., CVPR 2018 (NPID), section 3.4: the head's 128-d embeddings, k = 200",
    "trunk": "Caron et al., ICCV 2021 (DINO), eval_knn: the trunk's features; votes as in NPID (Wu et al., CVPR 2018)",
}


@dataclass(frozen=True, kw_only=True)
class KnnConfig(FeatureConfig):
    """Settings of :func:`evaluate_knn`."""

    k: tuple[int, ...] = K
    """Numbers of neighbours; NPID reports 200, DINO 20."""
    temperature: float = TEMPERATURE
    """τ of the weights."""
    features: Literal["trunk", "head"] = "trunk"
    """trunk: pooled features of the trunk. head: the embeddings of the projection head that the method trained with,
    which NPID's published accuracies are of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got temperature={self.temperature}")
        check_k(self.k, 2**62)


@dataclass(kw_only=True)
class Accuracy:
    """Share of queries whose class is ranked first, or among the first five."""

    top1: float
    top5: float


def nearest_neighbours(
    queries: Tensor, bank: Tensor, k: int, *, own: Tensor | None = None, max_entries: int = MAX_ENTRIES
) -> tuple[Tensor, Tensor]:
    """The k bank rows of largest cosine similarity, in decreasing order.

    Args:
        queries: ``[Q, D]`` float, any norm.
        bank: ``[N, D]`` float, any norm, on any device; read once, a part at a time, so it may be a mapped file.
        k: ``1 <= k <= N``, without ``own``; else ``k < N``.
        own: ``[Q]`` int64: a bank row that each query must not find (itself).
        max_entries: maximum number of similarities in memory at once, and of numbers in a part of the bank; both sides
            are split to stay below it.

    Returns:
        Similarities ``[Q, k]`` float32 and bank rows ``[Q, k]`` int64, on the device of ``queries``.
    """
    most = len(bank) - (own is not None)
    if not 1 <= k <= most:
        raise ValueError(f"k must be in [1, {most}], the number of training images, got {k=}; lower --k")
    return _nearest(queries, bank, k, own=own, max_entries=max_entries)


def _nearest(queries: Tensor, bank: Tensor, k: int, *, own: Tensor | None, max_entries: int) -> tuple[Tensor, Tensor]:
    """:func:`nearest_neighbours`, where there may be fewer than k beside ``own``: its similarity is -infinity."""
    queries = normalize(queries.float(), dim=1)
    if not len(queries) or not len(bank):
        return queries.new_zeros(len(queries), k), torch.zeros(
            len(queries), k, dtype=torch.int64, device=queries.device
        )
    wide = max(queries.shape[1], min(len(queries), QUERIES_AT_ONCE))  # few queries: a part of the bank is bounded too
    bank_step = max(1, min(len(bank), max_entries // wide))
    query_step = max(1, max_entries // bank_step)
    values: list[Tensor] = []
    rows: list[Tensor] = []
    for start in range(0, len(bank), bank_step):  # the bank is read once, and may be larger than the memory
        part = normalize(bank[start : start + bank_step].to(queries.device).float(), dim=1).T
        for number, first in enumerate(range(0, len(queries), query_step)):
            similarity = queries[first : first + query_step] @ part
            if own is not None:
                column = own[first : first + query_step, None] - start
                inside = (column >= 0) & (column < similarity.shape[1])
                column = column.clamp(0, similarity.shape[1] - 1)
                similarity.scatter_(1, column, torch.where(inside, -torch.inf, similarity.gather(1, column)))
            best, columns = similarity.topk(min(k, similarity.shape[1]), dim=1)
            found = columns + start
            if start:
                best, found = torch.cat((values[number], best), 1), torch.cat((rows[number], found), 1)
                best, order = best.topk(min(k, best.shape[1]), dim=1)
                values[number], rows[number] = best, found.gather(1, order)
            else:
                values.append(best)
                rows.append(found)
    return torch.cat(values), torch.cat(rows)


def class_scores(similarity: Tensor, labels: Tensor, *, classes: int, temperature: float = TEMPERATURE) -> Tensor:
    """Votes ``[Q, classes]`` float64: the sum of ``exp((s_i - s_1) / τ)`` over the neighbours of each class.

    Args:
        similarity: ``[Q, k]``, largest first.
        labels: ``[Q, k]`` int64, class of each neighbour.
        classes: number of classes.
        temperature: τ. Dividing all weights of a query by ``exp(s_1 / τ)`` keeps their order and avoids overflow.
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
    k: Sequence[int] = K,
    temperature: float = TEMPERATURE,
    max_entries: int = MAX_ENTRIES,
) -> dict[int, Accuracy]:
    """Accuracy for every k, from one search.

    Args:
        queries: ``[Q, D]`` float, with int64 labels ``[Q]``.
        bank: ``[N, D]`` float, with int64 labels ``[N]``, all at least 0.
        k: neighbours that vote, each in ``[1, N]``.
        temperature: τ.
        max_entries: see :func:`nearest_neighbours`.
    """
    check_k(k, len(bank))
    similarity, rows = nearest_neighbours(queries, bank, max(k), max_entries=max_entries)
    return _vote(similarity, bank_labels[rows], query_labels, bank_labels, k=k, temperature=temperature)


def shared_knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: Sequence[int],
    device: torch.device,
    temperature: float = TEMPERATURE,
) -> dict[int, Accuracy]:
    """:func:`knn_accuracy` on ``device``, of features that may be mapped files; the ranks share the queries."""
    query_labels, bank_labels = query_labels.to(device), bank_labels.to(device)
    own = own_rows(len(query_labels))
    found = nearest_neighbours(queries[own.start : own.stop].to(device), bank, max(k))
    similarity, rows = map(gather_uneven, found)
    return _vote(similarity, bank_labels[rows], query_labels, bank_labels, k=k, temperature=temperature)


def _vote(
    similarity: Tensor, votes: Tensor, labels: Tensor, bank_labels: Tensor, *, k: Sequence[int], temperature: float
) -> dict[int, Accuracy]:
    """Accuracy for every k of neighbours ``[Q, max(k)]``, nearest first, that vote for ``votes``."""
    classes = int(torch.cat((labels, bank_labels)).max()) + 1
    return {
        some: accuracy(
            class_scores(similarity[:, :some], votes[:, :some], classes=classes, temperature=temperature), labels
        )
        for some in k
    }


@torch.no_grad()
def bank_knn(
    bank_rows: Tensor,
    labels: Tensor,
    k: Sequence[int] = (20,),
    tau: float = TEMPERATURE,
    *,
    queries: int | None = None,
    is_split: bool = False,
    max_entries: int = MAX_ENTRIES,
) -> dict[int, Accuracy]:
    """Leave-one-out kNN accuracy of a memory bank, which needs no image and no forward pass.

    Every row is a query against all other rows. Bank rows are moving averages of the features of augmented training
    images, so the accuracy follows training; it is not the accuracy on validation images, and rows that no step has
    visited yet are random.

    Args:
        bank_rows: ``[N, D]`` float, row r of image r of the manifest, any norm.
        labels: ``[N]`` int64, class of each row (``Manifest.labels``); rows with -1 are left out.
        k: numbers of neighbours.
        tau: temperature of the weights.
        queries: maximum number of queries, evenly spaced over the labelled rows; None: all of them.
        is_split: ``bank_rows`` are those of this rank alone (:func:`~sslfast.distributed.own_rows` of N): no rank
            gathers them, and all call this.
        max_entries: maximum number of similarities in memory at once.

    Raises:
        ValueError: shapes that do not fit, fewer than two labelled rows or classes, k out of range.
    """
    own = own_rows(len(labels)) if is_split else range(len(labels))
    if bank_rows.ndim != 2 or labels.ndim != 1 or len(bank_rows) != len(own):
        raise ValueError(
            f"bank_rows must be [N, D] and labels [N], got {list(bank_rows.shape)} and {list(labels.shape)}"
            + (f" on one of {world_size()} ranks, whose part is {len(own)} rows" if is_split else "")
        )
    if queries is not None and queries < 1:
        raise ValueError(f"queries must be at least 1 or None, got {queries=}")
    labels = labels.to(bank_rows.device)
    labelled = (labels >= 0).nonzero()[:, 0]
    bank_labels = labels[labelled]
    if not len(labelled) or int(bank_labels.min()) == int(bank_labels.max()):
        raise ValueError(
            "the images have no labels of two classes at least; put each image into the folder of its class"
        )
    check_k(k, len(labelled) - 1)
    count = len(labelled) if queries is None else min(queries, len(labelled))
    chosen = torch.arange(count, device=labels.device) * len(labelled) // count
    here = (labelled >= own.start) & (labelled < own.stop)  # consecutive
    bank = bank_rows if len(labelled) == len(labels) else bank_rows[labelled[here] - own.start]
    first = int((labelled < own.start).sum())
    similarity, rows = bank_neighbours(
        bank, chosen, max(k), first_row=first, is_split=is_split, max_entries=max_entries
    )
    return _vote(similarity, bank_labels[rows], bank_labels[chosen], bank_labels, k=k, temperature=tau)


@torch.no_grad()
def bank_neighbours(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    first_row: int = 0,
    is_split: bool = False,
    max_entries: int = MAX_ENTRIES,
) -> tuple[Tensor, Tensor]:
    """The k rows of a bank that are most similar to some of its rows, which do not find themselves.

    Args:
        bank: ``[N, D]`` float, any norm.
        queries: ``[Q]`` int64 rows of it, the same on every rank.
        k: ``1 <= k < N``.
        first_row: number of the first row of ``bank``.
        is_split: ``bank`` holds the rows of this rank alone, from ``first_row`` on. All ranks call this, none gathers
            them: ranks exchange the queries and the k nearest that each has found.
        max_entries: see :func:`nearest_neighbours`.

    Returns:
        Cosine similarities ``[Q, k]`` float32, in decreasing order, and rows ``[Q, k]`` int64, on the bank's device.
    """
    place = queries.to(bank.device) - first_row
    inside = (place >= 0) & (place < len(bank))
    vectors = bank.new_zeros(len(place), bank.shape[1], dtype=torch.float32)
    vectors[inside] = bank[place[inside]].float()
    if is_split:
        vectors = sum_over_ranks(vectors)
    similarity, rows = _nearest(vectors, bank, min(k, len(bank)), own=place, max_entries=max_entries)
    rows = rows + first_row
    return _nearest_of_all(similarity, rows, k) if is_split else (similarity, rows)


def _nearest_of_all(similarity: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``[Q, k]``: the largest similarities of all ranks, and the rows that they are of, on every rank.

    Args:
        similarity, rows: ``[Q, n]`` of this rank, n at most k.
        k: at most the rows of all.
    """
    missing = k - similarity.shape[1]
    similarity = torch.nn.functional.pad(similarity, (0, missing), value=-torch.inf)
    rows = torch.nn.functional.pad(rows, (0, missing))
    best = []
    for part in zip(similarity.split(QUERIES_AT_ONCE), rows.split(QUERIES_AT_ONCE), strict=True):
        values, found = (gather_rows(x[None].contiguous()).transpose(0, 1).flatten(1) for x in part)
        values, order = values.topk(k, dim=1)
        best.append((values, found.gather(1, order)))
    return torch.cat([values for values, _ in best]), torch.cat([found for _, found in best])


@dataclass(frozen=True, kw_only=True)
class NearestImages:
    """Some images, and the others whose embeddings are most similar to theirs."""

    images: Manifest
    """The images that rows are of."""
    queries: Tensor
    """``[Q]`` int64 rows, evenly spread."""
    neighbours: Tensor
    """``[Q, k]`` int64 rows, the most similar first."""
    similarity: Tensor
    """``[Q, k]`` cosines."""


def check_k(k: Sequence[int], images: int) -> None:
    """Raises ValueError where no k is given or one does not fit the number of training images."""
    if not k:
        raise ValueError("k is empty; give at least one number of neighbours, for example 20")
    for some in k:
        if not 1 <= some <= images:
            raise ValueError(f"k must be in [1, {images}], the number of training images, got k={some}; lower --k")


def evaluate_knn(
    run: Path,
    data: Path,
    config: KnnConfig = KnnConfig(),
    *,
    output: Path | None = None,
) -> dict[str, Any]:
    """Weighted kNN accuracy of a run's encoder, beside the untrained encoder and raw pixels.

    Args:
        run: run directory, or a file of weights (a checkpoint, sslfast export, VISSL, PyContrast, MoCo), whose
            results go to FILE.evaluation in place of RUN/evaluation.
        data: folder with train/<class>/ (the bank) and val/<class>/ (the queries), or lists, archives or .beton files
            of these names.
        config: settings.
        output: JSON file to write; default: RUN/evaluation/knn.json.

    Under torchrun the processes share images and queries.
    """
    with distributed_device(config.device) as device:
        config = replace(config, device=str(device))
        evaluation = load_evaluation_set(
            run,
            data,
            config,
            loaded=load_run(run, head=config.features == "head", prefix=config.prefix, patches=config.patches),
            check=lambda train: check_k(config.k if config.k != K else K[:1], len(train)),  # those that fit
        )
        return knn_result(evaluation, config, output=output or evaluation_folder(run) / "knn.json")


def knn_result(
    evaluation: EvaluationSet, config: KnnConfig = KnnConfig(), *, output: Path | None = None
) -> dict[str, Any]:
    """The result of :func:`evaluate_knn` for features that are already computed; written where ``output`` is given."""
    k, temperature, device = config.k, config.temperature, resolve_device(config.device)
    if k == K:
        k = tuple(some for some in k if some <= len(evaluation.train_labels))
    check_k(k, len(evaluation.train_labels))
    train_labels, val_labels = evaluation.train_labels, evaluation.val_labels
    rows = []
    for name, bank in evaluation.train.items():
        found = shared_knn_accuracy(
            evaluation.val[name], val_labels, bank, train_labels, k=k, device=device, temperature=temperature
        )
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
        "source": SOURCES[config.features],
        "encoder_output": config.features,
        "k": list(k),
        "temperature": temperature,
        "departures": departures(
            {
                "temperature": TEMPERATURE,
                "size": 224,
                "preprocessing": "centre-crop" if config.features == "head" else "centre-crop-bicubic",
            },
            {
                "temperature": temperature,
                "size": evaluation.facts["size"],
                "preprocessing": evaluation.facts["preprocessing"].partition(":")[0],
            },
        ),
        "config": to_dict(config),
        "results": rows,
        **evaluation.facts,
    }
    if output is not None:
        write_result(result, output)
    return result


def render_table(result: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    return accuracy_table(result)

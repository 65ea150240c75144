import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from sslfast.distributed.collectives import gather_uneven, own_rows
from sslfast.distributed.process_group import destroy_process_group
from sslfast.methods.deepcluster import DeepCluster
from sslfast.methods.shared.kmeans import fill_empty, kmeans, means, whiten
from sslfast.methods.shared.pseudo_labels import (
    CollectedFeatures,
    central_view,
    pseudo_label_loss,
    uniform_over_clusters,
)
from sslfast.models.build import build_trunk
from sslfast.models.init import seeded
from sslfast.models.resnet import ResNetConfig
from sslfast.ops.philox import Stream, random_uint32
from sslfast.optim import build_optimizer
from sslfast.recipes.clustering import deepcluster, deepcluster_small
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer
from sslfast.views.crops import crop_boxes
from sslfast.views.stage import ViewStage
from sslfast.views.types import Batch, CropConfig, JigsawConfig, View, ViewConfig
from tests.distributed.test_training import enter, run
from tests.methods.harness import (
    ROWS,
    assert_resumes,
    assert_two_processes_train_as_one,
    build,
    final,
    first_batch,
    losses,
    tiny,
    tiny_trunks,
    train,
)
from tests.tiny import same


def config(**changes: Any) -> TrainConfig:
    return tiny(deepcluster_small(), **{"clusters": 4, "pca_dimensions": 8, "feature_columns": 12, **changes})


def blobs(count: int, clusters: int, *, spread: float = 0.01) -> tuple[Tensor, Tensor]:
    """Points around the corners of a simplex, and their groups."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(count) % clusters
    return torch.eye(clusters, 6)[owner] + spread * torch.randn(count, 6, generator=generator), owner


def clustered(method: DeepCluster) -> None:
    """The start of a run: features of all rows, then the labels of the first epoch."""
    points = torch.randn(method.features.vectors.shape, generator=torch.Generator().manual_seed(1))
    method.features.vectors.copy_(points)
    method.features.seen.fill_(True)
    method.start_epoch(0)


def test_the_last_features_of_a_row_stay() -> None:
    features = CollectedFeatures(6, 2)
    features.store_(torch.tensor([4, 1, 4, 0]), torch.arange(8.0).view(4, 2))
    features.store_(torch.tensor([1, 4, 3, 3]), torch.arange(8.0, 16.0).view(4, 2))
    assert features.vectors.tolist() == [[6, 7], [8, 9], [0, 0], [14, 15], [10, 11], [0, 0]]
    assert features.seen.tolist() == [True, True, False, True, True, False]


def test_the_view_of_the_feature_pass_is_the_plain_image() -> None:
    """Of the same size and normalisation, for every seed and epoch."""
    augment = replace(deepcluster().method.image_view.augment, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    view = central_view(ViewConfig(crop=CropConfig(size=8), rotation=True, augment=augment))
    crops = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.mean, augment.std))
    expected = (crops / 255 - mean) / std
    for seed, epoch in ((0, 0), (7, 3)):
        batch = Batch(sample_ids=torch.tensor([0, 5, 9]), crops={"image": crops}, epoch=epoch)
        torch.testing.assert_close(ViewStage({"image": view}, seed=seed)(batch)["image"].pixels, expected)
    for draw in (0.0, 0.3, 0.999):
        boxes = crop_boxes(np.full((3, 22), draw), np.array([[30, 20], [16, 48], [20, 20]]), view.crop)
        assert boxes.tolist() == [[5, 0, 25, 20], [0, 16, 16, 32], [0, 0, 20, 20]]


def test_loss_is_the_formula() -> None:
    logits = torch.zeros(4, 10)
    labels = torch.tensor([0, 9, -1, 3])
    assert pseudo_label_loss(logits, labels, torch.ones(4)).item() == pytest.approx(math.log(10))
    assert pseudo_label_loss(100 * torch.eye(10)[:4], torch.tensor([0, 1, 2, -1]), torch.ones(4)).item() == 0
    assert pseudo_label_loss(logits, torch.full((4,), -1), torch.ones(4)).item() == 0
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(4, 10, generator=generator), torch.tensor([1.0, 2.0, 3.0, 4.0])
    each = -logits.double().log_softmax(1)[[0, 1, 3], [0, 9, 3]]
    expected = (each * weights[[0, 1, 3]]).sum() / 7
    torch.testing.assert_close(pseudo_label_loss(logits, labels, weights).double(), expected)


def test_kmeans_finds_separate_groups_and_depends_on_its_arguments_alone() -> None:
    points, owner = blobs(60, 3)
    for seed in range(3):
        labels = kmeans(points, 3, iterations=10, seed=seed, epoch=1)
        if len({(int(o), int(y)) for o, y in zip(owner, labels, strict=True)}) == 3:
            break
    else:
        raise AssertionError("no start of three found the three groups")
    assert torch.equal(kmeans(points, 3, iterations=10, seed=seed, epoch=1), labels)
    points = torch.randn(90, 6, generator=torch.Generator().manual_seed(3))
    starts = [kmeans(points, 9, iterations=1, seed=seed, epoch=epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    assert not any(torch.equal(starts[0], other) for other in starts[1:])


def test_first_centroids_are_rows_drawn_by_seed_and_epoch() -> None:
    words = random_uint32(torch.arange(6), 1, seed=5, stream=Stream.CLUSTERS, step=3)[:, 0]
    assert torch.equal(kmeans(torch.eye(6), 6, iterations=0, seed=5, epoch=3), words.argsort().argsort())


def test_kmeans_ends_at_a_fixed_point_of_lloyds_algorithm() -> None:
    """Every row is nearest to the mean of its own cluster."""
    points = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    labels = kmeans(points, 7, iterations=100, seed=0, epoch=1)
    assert torch.equal(torch.cdist(points, means(points, labels, 7)).argmin(1), labels)


def test_empty_clusters_take_half_of_the_largest() -> None:
    points = torch.arange(12.0)[:, None].expand(-1, 2).contiguous()
    labels = fill_empty(points, torch.tensor([0] * 9 + [2] * 3), 4)
    counts = labels.bincount(minlength=4)
    assert counts.sum() == 12
    assert counts.min() >= 1
    assert (labels[9:] == 2).all()
    low = labels[:9]  # cut along the line that the rows lie on: 5 and 4 rows, then the 5 again
    assert sorted(counts[[0, 1, 3]].tolist()) == [2, 3, 4]
    assert all((low == y).nonzero().diff(dim=0).eq(1).all() for y in (0, 1, 3))
    same = fill_empty(torch.ones(5, 2), torch.zeros(5, dtype=torch.int64), 5)  # nothing to cut along
    assert sorted(same.tolist()) == [0, 1, 2, 3, 4]
    labels = kmeans(torch.ones(8, 3), 4, iterations=3, seed=0, epoch=1)
    assert labels.bincount(minlength=4).min() >= 1


def test_whitening() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    white = whiten(mixed, 6)
    torch.testing.assert_close(white.norm(dim=1), torch.ones(500))
    # Undo the length: directions are those of torch's own whitening up to a rotation.
    centred = (mixed - mixed.mean(0)).double()
    covariance = centred.T @ centred / 500
    mahalanobis = (centred @ covariance.inverse() * centred).sum(1).sqrt()
    inner = (centred @ covariance.inverse() @ centred.T) / mahalanobis.outer(mahalanobis)
    torch.testing.assert_close((white @ white.T).double(), inner, rtol=1e-3, atol=1e-4)
    assert whiten(mixed, 2).shape == (500, 2)
    flat = whiten(torch.cat((mixed, mixed[:, :1]), dim=1), 7)  # one direction has no variance
    assert flat.isfinite().all()


def test_components_of_a_sample() -> None:
    """Fitted on evenly spaced rows alone; bf16 points are whitened as their float32 values are."""
    points = torch.randn(600, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    rows = torch.arange(200) * 3
    torch.testing.assert_close(whiten(points, 3, sample=200)[rows], whiten(points[rows], 3), rtol=1e-5, atol=1e-5)
    assert torch.equal(whiten(points, 3, sample=600), whiten(points, 3))
    assert torch.equal(whiten(points, 3, sample=10_000), whiten(points, 3))
    short = points.bfloat16()
    torch.testing.assert_close(whiten(short, 3), whiten(short.float(), 3), rtol=1e-6, atol=1e-6)


def test_all_features_are_kept_unless_columns_are_named() -> None:
    method = build(config(feature_columns=0, feature_dtype="bf16"))
    assert isinstance(method, DeepCluster)
    assert method.projection is None
    assert method.features.vectors.shape == (ROWS, 24)
    views, rows = first_batch(config())
    method.store_features(views, rows)
    with torch.no_grad():
        expected = method.trunk(views["image"].pixels)
    torch.testing.assert_close(method.features.vectors[rows].float(), expected, rtol=1e-2, atol=1e-2)
    clustered(method)
    assert set(method.labels.tolist()) == set(range(4))


def test_the_classifier_has_no_momentum_where_asked() -> None:
    for momentum, expected in ((True, {0.9}), (False, {0.0, 0.9})):
        whole = config(head_momentum=momentum)
        method = build(whole)
        optimizer = build_optimizer(method, whole.optim, lr=0.1, options=method.parameter_options())
        found = {id(p): group["momentum"] for group in optimizer.param_groups for p in group["params"]}
        assert set(found.values()) == expected
        assert found[id(method.head.weight)] == (0.9 if momentum else 0.0)  # type: ignore[union-attr]
        assert found[id(next(method.trunk.parameters()))] == 0.9


def test_an_epoch_is_uniform_over_clusters() -> None:
    """25 + 1 of each: of the large cluster without replacement, of the small ones with it, no unlabelled row."""
    sizes = {0: 60, 1: 30, 3: 2, 4: 6}  # 2 is empty
    labels = torch.tensor([k for k, size in sizes.items() for _ in range(size)] + [-1, -1])
    labels = labels[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    order = uniform_over_clusters(labels, 5, seed=3, epoch=2)
    assert order.shape == (100,)
    drawn = labels[torch.from_numpy(order)]
    counts = drawn.bincount(minlength=5)
    assert counts[2] == 0
    assert counts[[0, 1, 3, 4]].max() <= 26
    assert counts[[0, 1, 3, 4]].min() >= 26 - 4
    for cluster in (0, 1):
        rows = order[(drawn == cluster).numpy()]
        assert len(set(rows.tolist())) == len(rows)
    assert len(set(order[(drawn == 3).numpy()].tolist())) == 2
    assert np.array_equal(order, uniform_over_clusters(labels, 5, seed=3, epoch=2))
    for other in (uniform_over_clusters(labels, 5, seed=3, epoch=3), uniform_over_clusters(labels, 5, seed=4, epoch=2)):
        assert not np.array_equal(order, other)
    balanced = torch.arange(40) % 4
    times = np.bincount(
        np.concatenate([uniform_over_clusters(balanced, 4, seed=0, epoch=e) for e in range(300)]), minlength=40
    )
    assert abs(times - 300).max() < 6 * math.sqrt(300)
    with pytest.raises(ValueError, match="no row has a label to draw an epoch by"):
        uniform_over_clusters(torch.full((4,), -1), 2, seed=0, epoch=0)


def test_a_run_trains_on_rows_drawn_over_clusters(tmp_path: Path) -> None:
    with tiny_trunks():
        trainer = Trainer(config(sampling="clusters"), ROWS, tmp_path, report=lambda _line: None)
    seen: list[Tensor] = []
    forward = trainer.method.forward

    def watched(views: dict[str, View], sample_ids: Tensor, *, step: Tensor) -> dict[str, Tensor]:
        seen.append(sample_ids.clone())
        return forward(views, sample_ids, step=step)

    trainer.method.forward = watched  # type: ignore[method-assign]
    trainer.fit()
    method = trainer.method
    assert isinstance(method, DeepCluster)
    assert (method.weights == 1).all()
    last = torch.cat(seen[3:])  # of the second epoch, by the labels that it began with
    assert torch.equal(last, torch.from_numpy(method.epoch_order(1)))
    assert method.labels[last].bincount(minlength=4).min() >= 4


def test_a_run_labels_every_row(tmp_path: Path) -> None:
    trainer = train(config(), tmp_path)
    assert min(losses(tmp_path)) > 0
    method = trainer.method
    assert isinstance(method, DeepCluster)
    assert method.features.seen.all()
    counts = method.labels.bincount(minlength=4).double()
    assert counts.sum() == ROWS
    assert counts.min() >= 1
    torch.testing.assert_close(method.weights.double(), ROWS / (4 * counts), rtol=1e-6, atol=0)
    # Every cluster has the same total weight, as if samples were drawn uniformly over clusters.
    torch.testing.assert_close((method.weights.double() * counts), torch.full((4,), ROWS / 4, dtype=torch.float64))
    state = final(tmp_path)["method"]
    assert state["labels"].dtype == torch.int32
    again = build(config())
    again.load_state_dict({**state, "labels": state["labels"].long()})  # as earlier versions wrote it
    assert torch.equal(again.labels, state["labels"])  # type: ignore[arg-type]


def test_a_step_weighs_samples_by_their_cluster() -> None:
    method = build(config())
    assert isinstance(method, DeepCluster)
    views, _ = first_batch(config())
    rows = torch.arange(8) * 3
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 2, 3])
    method.labels[rows] = labels.int()
    method.weights.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    each = -method.head(method.trunk(views["image"].pixels)).log_softmax(1)[range(8), labels]
    expected = (0.5 * each[:5].sum() + each[5] + 2 * each[6] + 4 * each[7]) / 9.5
    torch.testing.assert_close(method(views, rows, step=0)["loss"], expected)


def test_classifier_is_initialised_after_every_clustering() -> None:
    method = build(config(every_epochs=2))
    assert isinstance(method, DeepCluster)
    clustered(method)
    second = method.head.weight.detach().clone()
    method.start_epoch(1)
    assert torch.equal(method.head.weight, second)
    method.start_epoch(2)
    third = method.head.weight.detach().clone()
    assert not torch.equal(second, third)
    method.start_epoch(2)
    assert torch.equal(method.head.weight, third)
    assert 0.005 < third.std() < 0.02
    assert (method.head.bias == 0).all()


def classifier(seed: int) -> Tensor:
    return 0.01 * torch.randn(4, 24, generator=torch.Generator().manual_seed(seed))


def test_weights_and_projection_are_drawn_from_the_seed() -> None:
    whole = replace(config(), seed=5)
    method = build(whole)
    assert isinstance(method, DeepCluster)
    with tiny_trunks():
        trunk = build_trunk(whole.model, seed=5)
    with seeded(6):
        torch.nn.Linear(24, 4)
        projection = torch.linalg.qr(torch.randn(24, 12))[0]
    assert same(method.trunk.state_dict(), trunk.state_dict())
    assert method.projection is not None
    assert torch.equal(method.projection, projection)
    assert torch.equal(method.head.weight, classifier(7))


def test_a_clustering_is_that_of_the_rows_seen_by_seed_and_epoch() -> None:
    method = build(replace(config(iterations=1, every_epochs=2), seed=5))
    assert isinstance(method, DeepCluster)
    method.features.vectors.copy_(torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(1)))
    method.features.seen.fill_(True)
    method.start_epoch(0)
    method.features.seen[[0, 7]] = False
    method.start_epoch(4)
    points = method.features.vectors[method.features.seen]
    expected = kmeans(whiten(points, 8), 4, iterations=1, seed=5, epoch=4)
    assert torch.equal(method.labels[method.features.seen], expected)
    assert method.labels[[0, 7]].tolist() == [-1, -1]
    assert torch.equal(method.head.weight, classifier(11))


def test_stores_features_of_a_batch() -> None:
    method = build(config(every_epochs=3))
    assert isinstance(method, DeepCluster)
    assert [epoch for epoch in range(8) if method.needs_feature_pass(epoch)] == [0, 3, 6]
    views, rows = first_batch(config())
    method.store_features(views, rows)
    assert method.features.seen.nonzero()[:, 0].tolist() == sorted(rows.tolist())
    with torch.no_grad():
        expected = method.trunk(views["image"].pixels) @ method.projection
    torch.testing.assert_close(method.features.vectors[rows], expected)
    method.config.clusters = 9
    with pytest.raises(RuntimeError, match=r"only 8 images could be read, fewer than method.clusters=9"):
        method.start_epoch(0)


def test_learns_its_labels_and_gradients_reach_the_trunk() -> None:
    tiny_config = config()
    method = build(tiny_config)
    assert isinstance(method, DeepCluster)
    views, rows = first_batch(tiny_config)
    method(views, rows, step=0)["loss"].backward()
    assert all((p.grad == 0).all() for p in method.parameters() if p.grad is not None)  # no label yet
    clustered(method)
    method.zero_grad()
    method(views, rows, step=0)["loss"].backward()
    for name, parameter in method.trunk.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    values = []
    for step in range(40):
        optimizer.zero_grad()
        out = method(views, rows, step=step)
        out["loss"].backward()
        optimizer.step()
        method.after_step()
        values.append(out["loss"].item())
    assert values[0] == pytest.approx(math.log(4), abs=0.1)
    assert max(values[-3:]) < 0.2 * values[0]
    assert out["accuracy"] == 1


def test_labels_of_other_rows_do_not_matter() -> None:
    method = build(config())
    assert isinstance(method, DeepCluster)
    clustered(method)
    views, rows = first_batch(config())
    loss = method(views, rows, step=0)["loss"]
    others = torch.ones(ROWS, dtype=torch.bool)
    others[rows] = False
    method.labels[others] = (method.labels[others] + 1) % 4
    method.features.vectors.normal_(generator=torch.Generator().manual_seed(9))
    assert method(views, rows, step=7)["loss"] == loss
    views["image"] = View(pixels=views["image"].pixels.flip(0))
    assert method(views, rows.flip(0), step=0)["loss"].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("sampling", ["rows", "clusters"])
def test_resumes(tmp_path: Path, sampling: str) -> None:
    assert_resumes(config(sampling=sampling), tmp_path, stops=(3, 5))


def test_two_processes(tmp_path: Path) -> None:
    assert_two_processes_train_as_one(config(), tmp_path)


def shared(rank: int, ranks: int, port: int, folder: Path) -> None:
    from sslfast.distributed.process_group import init_process_group, process_group

    enter(rank, ranks, port)
    init_process_group(process_group(), torch.device("cpu"))
    for count in (5, 1, 0):  # of one row some ranks have none
        assert torch.equal(gather_uneven(torch.tensor([*own_rows(count)], dtype=torch.int64)), torch.arange(count))
    points = torch.load(folder / "points.pt", weights_only=True)
    part = own_rows(len(points))
    own = slice(part.start, part.stop)
    some = torch.arange(len(part))[part.start % 2 :: 2]  # rows of even number
    white = whiten(points[own], 4)
    assert torch.equal(white, whiten(points[own], 4, target=torch.empty(len(part), 4)))
    found = {
        "white": white,
        "sampled": whiten(points[own], 4, sample=17),
        "even": whiten(points[own], 4, rows=some),
        "labels": kmeans(white, 5, iterations=20, seed=0, epoch=1),
        "short": kmeans(points[own].bfloat16(), 5, iterations=3, seed=1, epoch=0),
        "many": kmeans(white, 40, iterations=1, seed=2, epoch=0),
        "filled": fill_empty(points[own], torch.full((len(part),), 3), 9),
        "same": kmeans(torch.ones(len(part), 2), 7, iterations=1, seed=0, epoch=0),
    }
    torch.save({name: gather_uneven(value) for name, value in found.items()}, folder / f"{rank}.pt")
    destroy_process_group()


@pytest.mark.parametrize(("ranks", "count"), [(2, 61), (3, 61), (4, 58)])
def test_kmeans_on_several_ranks_is_that_of_one(ranks: int, count: int, tmp_path: Path) -> None:
    """Each holds its own rows alone."""
    points = blobs(count, 5, spread=0.1)[0]
    torch.save(points, tmp_path / "points.pt")
    run(shared, ranks, tmp_path)
    white = whiten(points, 4)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    assert all(same(part, parts[0]) for part in parts)  # bit-equal on all ranks
    found = parts[0]
    expected = {"white": white, "sampled": whiten(points, 4, sample=17), "even": whiten(points[::2], 4)}
    for name, value in expected.items():
        torch.testing.assert_close(found[name] @ found[name].T, value @ value.T, rtol=1e-4, atol=1e-5)
    assert torch.equal(found["labels"], kmeans(white, 5, iterations=20, seed=0, epoch=1))
    assert torch.equal(found["short"], kmeans(points.bfloat16(), 5, iterations=3, seed=1, epoch=0))
    assert torch.equal(found["many"], kmeans(white, 40, iterations=1, seed=2, epoch=0))
    assert torch.equal(found["filled"], fill_empty(points, torch.full((count,), 3), 9))
    assert found["same"].bincount(minlength=7).min() >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": 1}, "method.clusters must be at least 2, got 1"),
        ({"clusters": 13}, r"method.clusters must be at most 12, half of the 24 images, got 13; lower it"),
        (
            {"image_view": ViewConfig(jigsaw=JigsawConfig())},
            "method.image_view.jigsaw must not be set",
        ),
        ({"every_epochs": 0}, "method.every_epochs must be at least 1, got 0"),
        ({"iterations": 0}, "method.iterations must be at least 1, got 0"),
        ({"pca_dimensions": 13}, r"method.pca_dimensions must be in \[0, feature_columns=12\], got 13"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(**changes))
    with pytest.raises(ValueError, match=r"clusters must be in \[1, 3\], the number of points, got 4"):
        kmeans(torch.zeros(3, 2), 4, iterations=1, seed=0, epoch=0)


def test_faiss_is_missing() -> None:
    with patch.dict(sys.modules, {"faiss": None}), pytest.raises(ImportError, match="pip install faiss-cpu"):
        build(config())


def test_recipe() -> None:
    recipe = deepcluster()
    assert isinstance(recipe.method, DeepCluster.Config)
    assert (recipe.method.clusters, recipe.method.pca_dimensions, recipe.method.feature_columns) == (10000, 256, 0)
    assert (recipe.batch_size, recipe.optim.peak_lr(recipe.batch_size), recipe.optim.weight_decay) == (512, 0.1, 1e-5)
    assert isinstance(recipe.model, ResNetConfig)
    assert recipe.model.input == "sobel"

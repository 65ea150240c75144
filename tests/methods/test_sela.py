import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslfast.config import load_json
from sslfast.distributed.collectives import gather_uneven, own_rows
from sslfast.distributed.process_group import destroy_process_group
from sslfast.methods.sela import SeLa
from sslfast.methods.shared.sinkhorn import Transport, sinkhorn
from sslfast.models.build import build_trunk
from sslfast.models.init import seeded
from sslfast.recipes.clustering import sela, sela_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import JigsawConfig, View, ViewConfig
from tests.distributed.test_training import enter, run
from tests.methods.harness import (
    ROWS,
    assert_resumes,
    assert_two_processes_train_as_one,
    build,
    first_batch,
    losses,
    tiny,
    tiny_trunks,
    train,
)
from tests.tiny import context, same


def config(**changes: Any) -> TrainConfig:
    return tiny(sela_small(), **{"heads": 3, "clusters": 4, **changes})


def scores(count: int, clusters: int, *, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 25 * (scale * torch.randn(count, clusters, generator=generator).double()).log_softmax(1)


def solve(s: Tensor, **options: Any) -> Transport:
    return sinkhorn(lambda rows: s[rows], len(s), s.shape[1], **options)


@pytest.mark.parametrize(("count", "clusters"), [(50, 7), (1, 1), (3, 5), (64, 2)])
def test_marginals(count: int, clusters: int) -> None:
    s = scores(count, clusters, scale=0.2)
    found = solve(s, tolerance=1e-10, max_iterations=5000, block=13)
    q = s + found.columns
    q = (q - q.logsumexp(1, keepdim=True)).exp() / count
    torch.testing.assert_close(q.sum(1), torch.full((count,), 1 / count, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(q.sum(0), torch.full((clusters,), 1 / clusters, dtype=torch.float64), rtol=1e-9, atol=0)
    assert found.error <= 1e-10
    assert torch.equal(found.labels, q.argmax(1))
    # Of the form diag(α) P^λ diag(β): log q - s is a sum of a row's and a column's number.
    rest = q.log() - s
    torch.testing.assert_close(rest - rest[:1] - rest[:, :1] + rest[0, 0], torch.zeros_like(rest), rtol=0, atol=1e-8)


def test_blocks_and_shifts_do_not_matter() -> None:
    s = scores(101, 6)
    whole = solve(s, tolerance=1e-6, max_iterations=5000)
    for other in (
        solve(s, tolerance=1e-6, max_iterations=5000, block=10),
        solve(s - 4000 * torch.arange(101)[:, None], tolerance=1e-6, max_iterations=5000),  # p^λ far below 1e-308
    ):
        assert torch.equal(other.labels, whole.labels)
        torch.testing.assert_close(other.columns, whole.columns, rtol=1e-6, atol=1e-6)
    permuted = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(permuted[solve(s[:, permuted], tolerance=1e-6, max_iterations=5000).labels], whole.labels)


def test_clusters_become_equal() -> None:
    s = scores(1200, 12, scale=3)
    s[:, 0] += 400  # plain argmax puts every row here
    assert s.argmax(1).bincount(minlength=12)[0] > 1100
    counts = solve(s, tolerance=1e-3).labels.bincount(minlength=12)
    assert counts.min() >= 96
    assert counts.max() <= 104
    best = 25 * torch.eye(8).repeat(5, 1).double()  # a balanced labelling does not change
    assert torch.equal(solve(best).labels, torch.arange(8).repeat(5))


def test_iterations_are_limited_and_no_rows_is_an_error() -> None:
    s = scores(100, 10, scale=3)
    assert solve(s, tolerance=1e-12, max_iterations=3).iterations == 3
    with pytest.raises(ValueError, match="there are no rows to label"):
        solve(s[:0])


def test_uniform_logits_perfect_prediction_and_heads() -> None:
    tiny_config = config()
    method = build(tiny_config)
    assert isinstance(method, SeLa)
    views, rows = first_batch(tiny_config)
    assert method(views, rows, step=0)["loss"] == 0  # no label yet
    method.labels.copy_(torch.arange(3 * ROWS).view(3, ROWS) % 4)
    nn.init.zeros_(method.head.weight)
    nn.init.zeros_(method.head.bias)
    assert method(views, rows, step=0)["loss"].item() == pytest.approx(math.log(4))
    method.labels[0], method.labels[1], method.labels[2] = 1, 2, 0  # each head has its own labels
    with torch.no_grad():
        method.head.bias[[1, 4 + 2, 8 + 0]] = 100.0
    out = method(views, rows, step=0)
    assert out["loss"] == 0
    assert out["accuracy"] == 1


def test_labels_are_the_transport_of_every_head() -> None:
    method = build(config(heads=2, tolerance=1e-4))
    assert isinstance(method, SeLa)
    method.features.vectors.copy_(torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(1)))
    method.features.seen[: ROWS - 2] = True
    method.start_epoch(0)
    logits = (method.features.vectors @ method.head.weight.T + method.head.bias).detach().view(ROWS, 2, 4)
    for head in range(2):
        expected = solve(25 * logits[: ROWS - 2, head].double().log_softmax(1), tolerance=1e-4, max_iterations=500)
        assert torch.equal(method.labels[head, : ROWS - 2].long(), expected.labels)
    assert (method.labels[:, ROWS - 2 :] == -1).all()  # never seen


@pytest.mark.parametrize("label_views", ["central", "augmented"])
def test_statistics_of_a_feature_pass(label_views: str) -> None:
    """Those of the batch before the first step, since the running ones are still 0 and 1, and for augmented views;
    nothing of the trunk changes."""
    tiny_config = config(label_views=label_views)
    method = build(tiny_config)
    assert isinstance(method, SeLa)
    assert isinstance(tiny_config.method, SeLa.Config)
    is_plain = tiny_config.method.feature_views()["image"] != tiny_config.method.image_view
    assert is_plain == (label_views == "central")
    views, rows = first_batch(tiny_config)
    for trained in (False, True):
        if trained:
            method.start_epoch(0)
            method.train()(views, rows, step=0)
        before = {name: value.clone() for name, value in method.trunk.state_dict().items()}
        method.eval().store_features(views, rows)
        assert same(method.trunk.state_dict(), before)
        assert not any(module.training for module in method.modules())
        by_batch = not trained or label_views == "augmented"
        with torch.no_grad():
            expected = method.trunk.train(by_batch)(views["image"].pixels)
        assert torch.equal(method.features.vectors[rows], expected)
        method.trunk.load_state_dict(before)


def test_weights_are_drawn_from_the_seed() -> None:
    whole = replace(config(), seed=5)
    method = build(whole)
    assert isinstance(method, SeLa)
    with tiny_trunks():
        trunk = build_trunk(whole.model, seed=5)
    with seeded(6):
        head = nn.Linear(24, 3 * 4)
    assert same(method.trunk.state_dict(), trunk.state_dict())
    assert same(method.head.state_dict(), head.state_dict())


def test_schedule() -> None:
    every = SeLa.Config(every_epochs=3)
    assert [epoch for epoch in range(10) if every.labels_in(epoch)] == [0, 3, 6, 9]
    paper = sela().method
    assert isinstance(paper, SeLa.Config)
    assert (paper.heads, paper.clusters, paper.sharpness) == (10, 3000, 25.0)
    assert paper.labelling_epochs == 0
    resolved = paper.resolve(context(sela().model, 3000, epochs=sela().epochs))
    assert resolved == replace(paper, labelling_epochs=400)  # what the recipe said in earlier versions
    epochs = [epoch for epoch in range(sela().epochs) if resolved.labels_in(epoch)]
    assert epochs == sorted({math.floor(400 * (k / 100) ** 2) for k in range(100)})
    assert resolved.labelling_epochs == sela().epochs == 400
    assert epochs[:5] == [0, 1, 2, 3, 4]
    gaps = torch.tensor(epochs).diff()
    assert gaps[:7].max() == 1
    assert gaps[-10:].min() >= 3
    assert epochs[-1] <= 399


def test_labellings_are_spread_over_the_run(tmp_path: Path) -> None:
    """The built method and config.json know the epochs of the run; a value in the configuration stays."""
    derived, explicit = config(labellings=3), config(labellings=3, labelling_epochs=9)
    run = context(derived.model, ROWS, epochs=4)
    with tiny_trunks():
        methods = [each.method.build(run) for each in (derived, explicit)]
    assert [[e for e in range(9) if m.needs_feature_pass(e)] for m in methods] == [[0, 1], [0, 1, 4]]
    assert config().method.resolve(run) == config().method
    train(derived, tmp_path / "run")
    assert load_json(tmp_path / "run" / "config.json")["method"]["labelling_epochs"] == 2
    train(config(labellings=3, labelling_epochs=2), tmp_path / "run")  # the same run: it resumes
    with pytest.raises(ValueError, match=r"method\.labelling_epochs was 2, is 1"):
        train(config(labellings=3, labelling_epochs=1), tmp_path / "run")


def test_stores_features_of_a_batch() -> None:
    method = build(config(every_epochs=2))
    assert isinstance(method, SeLa)
    assert [method.needs_feature_pass(epoch) for epoch in range(4)] == [True, False, True, False]
    views, rows = first_batch(config())
    method.store_features(views, rows)
    torch.testing.assert_close(method.features.vectors[rows], method.trunk(views["image"].pixels).detach())
    assert method.features.seen.nonzero()[:, 0].tolist() == sorted(rows.tolist())


def test_a_run_labels_every_row(tmp_path: Path) -> None:
    trainer = train(config(), tmp_path)
    assert min(losses(tmp_path)) > 0
    method = trainer.method
    assert isinstance(method, SeLa)
    assert method.features.seen.all()
    counts = torch.stack([labels.long().bincount(minlength=4) for labels in method.labels])
    assert (counts - ROWS / 4).abs().max() <= 3  # the transport is balanced, its argmax nearly
    assert not torch.equal(method.labels[0], method.labels[1])


def test_learns_its_labels_and_gradients_reach_the_trunk() -> None:
    tiny_config = config()
    method = build(tiny_config)
    assert isinstance(method, SeLa)
    method.features.vectors.normal_(generator=torch.Generator().manual_seed(1))
    method.features.seen.fill_(True)
    method.start_epoch(0)
    views, rows = first_batch(tiny_config)
    method(views, rows, step=0)["loss"].backward()
    for name, parameter in method.trunk.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name
    optimizer = torch.optim.SGD(method.parameters(), lr=0.2, momentum=0.9)
    values = []
    for step in range(60):
        optimizer.zero_grad()
        loss = method(views, rows, step=step)["loss"]
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert max(values[-3:]) < 0.3 * values[0]
    before = method(views, rows, step=0)["loss"]
    method.features.vectors.zero_()  # neither features nor labels of other rows are seen
    others = torch.ones(ROWS, dtype=torch.bool)
    others[rows] = False
    method.labels[:, others] = 0
    assert method(views, rows, step=5)["loss"] == before
    flipped = {"image": View(pixels=views["image"].pixels.flip(0))}
    assert method(flipped, rows.flip(0), step=0)["loss"].item() == pytest.approx(before.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("feature_dtype", ["fp32", "bf16"])
def test_resumes(tmp_path: Path, feature_dtype: str) -> None:
    assert_resumes(config(feature_dtype=feature_dtype), tmp_path, stops=(3, 4))


def test_two_processes(tmp_path: Path) -> None:
    assert_two_processes_train_as_one(config(), tmp_path)


def shared(rank: int, ranks: int, port: int, folder: Path) -> None:
    from sslfast.distributed.process_group import init_process_group, process_group

    enter(rank, ranks, port)
    init_process_group(process_group(), torch.device("cpu"))
    for count in (61, 1):
        part = own_rows(count)
        own = scores(count, 5)[part.start : part.stop]
        found = solve(own, tolerance=1e-6, max_iterations=5000, block=9)
        torch.save((gather_uneven(found.labels), found.columns), folder / f"{count}-{rank}.pt")
    destroy_process_group()


def test_sinkhorn_on_three_ranks_is_that_of_one(tmp_path: Path) -> None:
    run(shared, 3, tmp_path)
    for count in (61, 1):
        whole = solve(scores(count, 5), tolerance=1e-6, max_iterations=5000)
        for rank in range(3):
            labels, columns = torch.load(tmp_path / f"{count}-{rank}.pt", weights_only=True)
            assert torch.equal(labels, whole.labels)
            torch.testing.assert_close(columns, whole.columns, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "method.heads must be at least 1, got 0"),
        ({"clusters": 1}, "method.clusters must be at least 2, got 1"),
        ({"clusters": 25}, "method.clusters must be at most the 24 images, got 25; lower it"),
        ({"image_view": ViewConfig(jigsaw=JigsawConfig())}, "method.image_view.jigsaw must not be set"),
        ({"sharpness": 0.0}, "method.sharpness must be at least 0.001, got 0.0"),
        ({"tolerance": math.inf}, "method.tolerance must be a finite number, got inf"),
        ({"labellings": -1}, "method.labellings must be at least 0, got -1"),
        ({"labelling_epochs": -1}, "method.labelling_epochs must be at least 0, got -1"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(**changes))

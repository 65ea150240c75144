import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sslfast.distributed.process_group import destroy_process_group, init_process_group, process_group
from sslfast.methods.base import BatchSplit
from sslfast.methods.moco import MoCo, batch_order, queue_loss
from sslfast.models.build import build_trunk
from sslfast.models.heads import MLPHead
from sslfast.models.init import seeded
from sslfast.models.memory_bank import initial_rows
from sslfast.models.resnet import ResNetConfig
from sslfast.ops.philox import Stream, random_uint32
from sslfast.optim.optimizers import OptimConfig
from sslfast.recipes import RECIPES
from sslfast.recipes.contrastive import moco_v1_small, moco_v2_small
from sslfast.training.config import TrainConfig
from sslfast.training.dry_run import summary
from sslfast.training.trainer import Trainer
from sslfast.views.types import JigsawConfig, ViewConfig
from tests.distributed.test_training import enter, run
from tests.methods import harness
from tests.tiny import context, same

QUEUE = 20  # not a multiple of the batch


def config(**changes: Any) -> TrainConfig:
    return harness.tiny(moco_v1_small(), queue_size=QUEUE, dimensions=16, **changes)


def build(whole: TrainConfig) -> MoCo:
    method = harness.build(whole)
    assert isinstance(method, MoCo)
    return method


def unit(count: int, dimensions: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dimensions, dtype=torch.float64, generator=generator), dim=1)


@pytest.mark.parametrize("size", [1, 7, 300])
def test_loss_of_identical_embeddings_is_the_log_of_their_number(size: int) -> None:
    query = unit(1, 8, 0).expand(3, 8).contiguous()
    loss = queue_loss(query, torch.ones(3, dtype=torch.float64), query[:1].repeat(size, 1), temperature=0.07)
    torch.testing.assert_close(loss, torch.full((3,), math.log(size + 1), dtype=torch.float64))


def test_loss_of_orthogonal_negatives() -> None:
    basis = torch.eye(8)
    loss = queue_loss(basis[:2], torch.ones(2), basis[2:], temperature=0.2)
    torch.testing.assert_close(loss, torch.full((2,), math.log(1 + 6 * math.exp(-1 / 0.2))))


def test_loss_and_gradients_are_those_of_cross_entropy() -> None:
    query, key, queue = unit(5, 12, 1).requires_grad_(), unit(5, 12, 2).requires_grad_(), unit(33, 12, 3)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    loss = queue_loss(query, (query * key).sum(1), queue, temperature=0.1)
    scores = torch.cat(((query * key).sum(1, keepdim=True), query @ queue.T), dim=1) / 0.1
    expected = cross_entropy(scores, torch.zeros(5, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(loss, expected)
    for mine, dense in zip(
        torch.autograd.grad((loss * weights).sum(), (query, key)),
        torch.autograd.grad((expected * weights).sum(), (query, key)),
        strict=True,
    ):
        torch.testing.assert_close(mine, dense)


def test_step_is_the_formula_and_keys_take_no_gradient() -> None:
    whole = config(projection="mlp", temperature=0.2)
    method = harness.assert_gradients_reach_the_trunk(whole)
    fresh, (views, _) = build(whole), harness.first_batch(whole)
    query = normalize(fresh.projection(fresh.trunk(views["query"].pixels)), dim=1)
    key = normalize(fresh.key_projection(fresh.key_trunk(views["key"].pixels)), dim=1)
    scores = torch.cat(((query * key).sum(1, keepdim=True), query @ fresh.queue.T), dim=1) / 0.2
    expected = cross_entropy(scores, torch.zeros(len(query), dtype=torch.int64))
    out = build(whole)(views, torch.arange(8), step=0)
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(out["similarity"], (query * key).sum(1).mean())
    for name, parameter in method.named_parameters():
        assert name.startswith("key_") == (parameter.grad is None), name


def test_the_key_encoder_starts_equal_and_follows_by_momentum() -> None:
    whole = config(momentum=0.75)
    method = build(whole)
    views, rows = harness.first_batch(whole)
    pairs = list(zip(method.key_trunk.parameters(), method.trunk.parameters(), strict=True))
    pairs += zip(method.key_projection.parameters(), method.projection.parameters(), strict=True)
    assert all(torch.equal(k, q) and k.data_ptr() != q.data_ptr() for k, q in pairs)
    before = [k.clone() for k, _ in pairs]
    method(views, rows, step=0)["loss"].backward()
    with torch.no_grad():
        for _, q in pairs:
            q += 0.1
    assert all(torch.equal(k, old) for (k, _), old in zip(pairs, before, strict=True))  # not before the step
    method.after_step()
    for (k, q), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(k, 0.75 * old + 0.25 * q)
    with pytest.raises(RuntimeError, match="after_step was called before a forward pass"):
        method.after_step()


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_weights_and_queue_are_drawn_from_the_seed(projection: str) -> None:
    whole = replace(config(projection=projection), seed=5)
    method = build(whole)
    with harness.tiny_trunks():
        trunk = build_trunk(whole.model, seed=5)
    with seeded(6):
        head = torch.nn.Linear(24, 16) if projection == "linear" else MLPHead(24, 24, 16)
    assert same(method.trunk.state_dict(), trunk.state_dict())
    assert same(method.projection.state_dict(), head.state_dict())
    assert torch.equal(method.queue, initial_rows(QUEUE, 16, seed=5))


def test_the_order_of_the_keys_is_that_of_the_step() -> None:
    method = build(config())
    views, rows = harness.first_batch(config())
    steps: list[Any] = []

    def encode(pixels: Tensor, step: Any) -> tuple[Tensor, Tensor]:
        steps.append(step)
        keys = unit(len(pixels), 16, 0).float()
        return keys, keys

    method._encode_keys = encode  # type: ignore[method-assign]
    out = method(views, rows, step=7)
    assert steps == [7]
    assert not out["similarity"].requires_grad


def test_the_queue_is_a_ring_in_order() -> None:
    whole = config()
    method = build(whole)
    views, rows = harness.first_batch(whole)
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(QUEUE))
    expected, head = method.queue.clone(), 0
    for step in range(4):
        parts = 1 + step % 2
        with torch.no_grad():
            keys = normalize(method.key_projection(method.key_trunk(views["key"].pixels)), dim=1)
        for _ in range(parts):  # micro-batches
            method(views, rows, step=step)
        torch.testing.assert_close(method.queue, expected)  # the batch's own keys are no negatives
        for key in keys.repeat(parts, 1):
            expected[head % QUEUE] = key
            head += 1
        method.after_step()
        torch.testing.assert_close(method.queue, expected)
        assert method.head.item() == head % QUEUE


def test_shuffled_order() -> None:
    order = batch_order(64, seed=3, step=5)
    assert torch.equal(order.sort().values, torch.arange(64))
    words = random_uint32(torch.arange(64), 1, seed=3, stream=Stream.BATCH_ORDER, step=5)[:, 0]
    assert torch.equal(words[order], words.sort().values)
    assert torch.equal(order, batch_order(64, seed=3, step=torch.tensor(5)))
    assert not torch.equal(order, batch_order(64, seed=3, step=6))
    assert not torch.equal(order, batch_order(64, seed=4, step=5))


def encode_on_two_ranks(rank: int, ranks: int, port: int) -> None:
    enter(rank, ranks, port)
    init_process_group(process_group(), torch.device("cpu"))
    method = build(replace(config(), seed=5))
    everyone = torch.arange(6.0)[:, None] + torch.tensor([0.25, 0.5])
    own = slice(3 * rank, 3 * rank + 3)
    seen: list[Tensor] = []

    def key(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return pixels

    method._key = key  # type: ignore[method-assign]
    keys, all_keys = method._encode_keys(everyone[own], 7)
    assert torch.equal(keys, everyone[own])
    assert torch.equal(all_keys, everyone)
    assert torch.equal(seen[0], everyone[batch_order(6, seed=5, step=7)[own]])
    method.config.shuffle = False
    assert torch.equal(method._encode_keys(everyone[own], 7)[1], everyone)
    assert torch.equal(seen[1], everyone[own])
    destroy_process_group()


def test_ranks_encode_each_others_keys() -> None:
    assert not torch.equal(batch_order(6, seed=5, step=7)[:3].sort().values, torch.arange(3))
    run(encode_on_two_ranks, 2)


def test_parts_of_a_batch_have_statistics_of_their_own() -> None:
    """As on two ranks: queries in order, keys in the shuffled one, each part by its own BatchNorm."""
    whole = replace(config(batchnorm_samples=4), seed=5)
    method = build(whole)
    views, rows = harness.first_batch(whole)
    out = method(views, rows, step=7)
    other = build(whole)
    queries = torch.cat([other._query(part) for part in views["query"].pixels.chunk(2)])
    order = batch_order(8, seed=5, step=7)
    keys = torch.empty(8, 16)
    with torch.no_grad():
        keys[order] = torch.cat([other._key(part) for part in views["key"].pixels[order].chunk(2)])
    torch.testing.assert_close(out["similarity"], (queries * keys).sum(1).mean())
    torch.testing.assert_close(method._pending[0], keys)
    assert not torch.allclose(queries, build(whole)._query(views["query"].pixels), atol=1e-3)
    assert [MoCo.Config(batchnorm_samples=32).parts(samples) for samples in (256, 100, 24)] == [8, 3, 1]


def test_the_plan_says_where_queries_and_keys_share_statistics(tmp_path: Path) -> None:
    split = BatchSplit(batch_size=256)
    for changes, changed, shares in (
        ({}, split, True),
        ({"batchnorm_samples": 32}, split, False),
        ({"batchnorm_samples": 200}, split, True),
        ({"batchnorm_samples": 32, "shuffle": False}, split, True),
        ({}, replace(split, ranks=8), False),
        ({}, replace(split, ranks=8, sync_batchnorm=True), True),
    ):
        assert bool(MoCo.Config(**changes).remarks(changed)) == shares, (changes, changed)
    with harness.tiny_trunks():
        trainer = Trainer(config(), harness.ROWS, tmp_path / "run", report=lambda _line: None)
    assert "gives positives away" in dict(summary(trainer))["note"]
    trainer.close()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    harness.assert_two_processes_train_as_one(config(), tmp_path)


def test_resumes(tmp_path: Path) -> None:
    harness.assert_resumes(config(projection="mlp"), tmp_path)


def test_overfits_to_the_copies_in_the_queue() -> None:
    """A full queue holds 20 / 8 older copies of every query's own image."""
    losses = harness.overfit(config(momentum=0.99), steps=40, lr=0.03)
    assert max(losses[-3:]) < 0.7 * max(losses)
    assert max(losses[-3:]) < 1.1 * math.log(1 + QUEUE / harness.BATCH)


def test_state_and_heads() -> None:
    method = build(config())
    assert {"queue", "head", "key_trunk.conv1.weight", "trunk.conv1.weight"} <= method.state_dict().keys()
    assert [tensor.shape for tensor in method.replicated()] == [(QUEUE, 16), ()]
    assert isinstance(method.projection, torch.nn.Linear)
    head = build(config(projection="mlp")).projection
    assert isinstance(head, MLPHead)
    features = torch.randn(3, 24)
    torch.testing.assert_close(head(features), head[2](head[0](features).relu()))
    copied = copy.deepcopy(method)
    copied.load_state_dict(build(replace(config(), seed=1)).state_dict())
    assert not torch.equal(copied.queue, method.queue)


def test_recipes_are_the_published_numbers() -> None:
    for name in ("moco-v1", "moco-v2"):
        whole = RECIPES[name]()
        method = whole.method
        assert isinstance(method, MoCo.Config)
        assert (method.queue_size, method.momentum, method.dimensions, method.shuffle) == (65536, 0.999, 128, True)
        assert method.batchnorm_samples == 32
        assert (whole.epochs, whole.batch_size, whole.model) == (200, 256, ResNetConfig())
        assert (whole.optim.lr_per_256_images, whole.optim.weight_decay, whole.optim.momentum) == (0.03, 1e-4, 0.9)
        assert list(method.views().values()) == [method.image_view] * 2
        assert method.image_view.crop.scale == (0.2, 1.0)
        version_two = name == "moco-v2"
        assert method.temperature == (0.2 if version_two else 0.07)
        assert method.projection == ("mlp" if version_two else "linear")
        assert method.image_view.augment.blur_probability == (0.5 if version_two else 0.0)
    assert isinstance(moco_v2_small().optim, OptimConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "method.temperature must be positive and finite, got 0.0"),
        ({"queue_size": 0}, "method.queue_size must be at least 1, got 0"),
        ({"dimensions": 0}, "method.dimensions must be at least 2, got 0"),
        ({"momentum": 1.5}, r"method.momentum must be in \[0, 1\], got 1.5"),
        ({"image_view": ViewConfig(jigsaw=JigsawConfig())}, "method.image_view.jigsaw must not be set"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoCo.Config(**changes).build(context(ResNetConfig(name="resnet18"), 10, seed=0))


def test_the_momentum_can_rise_to_1() -> None:
    method = build(config(momentum=0.8, momentum_schedule="cosine"))  # of 2 epochs of 3 steps
    views, rows = harness.first_batch(config())
    for step, momentum in ((0, 0.8), (torch.tensor(3), 0.9), (6, 1.0)):
        before = [p.clone() for p in method.key_trunk.parameters()]
        method(views, rows, step=step)["loss"].backward()
        with torch.no_grad():
            for p in method.trunk.parameters():
                p += 0.1
        method.after_step()
        for key, p, old in zip(method.key_trunk.parameters(), method.trunk.parameters(), before, strict=True):
            torch.testing.assert_close(key, momentum * old + (1 - momentum) * p)

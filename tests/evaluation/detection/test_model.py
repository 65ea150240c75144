import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from sslfast.evaluation.detection.data import IGNORED, Sample
from sslfast.evaluation.detection.model import FasterRCNN, Sampler, check_trunk, targets_of
from sslfast.evaluation.detection.train import MOCO, PIRL, PIRL_PAPER, PIRL_SUPERVISED
from sslfast.evaluation.encoders import TrunkEncoder, load_run
from sslfast.models import ResNetConfig, build_trunk
from tests.evaluation.detection.fixtures import write_narrow_run

CPU = torch.device("cpu")
BOXES = torch.tensor([[8.0, 8.0, 40.0, 36.0], [50.0, 20.0, 76.0, 60.0]])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TrunkEncoder:
    found = load_run(write_narrow_run(tmp_path_factory.mktemp("run") / "run")).encoders["trained"]
    assert isinstance(found, TrunkEncoder)
    return found


def model_of(encoder: TrunkEncoder, *, moco: bool = False, **changes: Any) -> FasterRCNN:
    protocol = MOCO if moco else PIRL
    options = {
        "classes": 2,
        "seed": 0,
        "frozen_norm": protocol.frozen_norm,
        "freeze_at": protocol.freeze_at,
        "extra_norm": protocol.extra_norm,
        "anchors": (16, 32),
        "regions": 16,
    }
    return FasterRCNN(encoder, **(options | changes))  # type: ignore[arg-type]


def samples(labels: tuple[int, ...] = (1, 2)) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    pictures = [
        torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in ((64, 80), (70, 78))
    ]
    return [Sample(image=picture, boxes=BOXES.clone(), labels=torch.tensor(labels)) for picture in pictures]


def losses_of(model: FasterRCNN, some: list[Sample], **options: Any) -> dict[str, torch.Tensor]:
    found = model([one.image for one in some], targets_of(some, CPU), **({"sample_ids": (5, 9)} | options))
    assert isinstance(found, dict)
    return found


def test_geometry(encoder: TrunkEncoder) -> None:
    model = model_of(encoder).eval()
    shapes: dict[str, Any] = {}
    model.roi_heads.box_roi_pool.register_forward_hook(lambda m, i, o: shapes.update(pooled=o.shape))
    model.roi_heads.box_head.layer4.register_forward_hook(lambda m, i, o: shapes.update(res5=o.shape))
    model.backbone.register_forward_hook(lambda m, i, o: shapes.update(res4=o.shape))
    model([one.image for one in samples()])
    assert shapes["res4"] == (2, 32, 5, 5)  # 64 x 80 and 70 x 78 in a batch of 70 x 80, stride 16
    assert shapes["pooled"][1:] == (32, 14, 14)
    assert shapes["res5"][1:] == (64, 7, 7)
    pool = model.roi_heads.box_roi_pool
    assert (pool.spatial_scale, pool.sampling_ratio, pool.aligned) == (1 / 16, 0, True)
    # Aligned: the pooled values of a ramp are its values at the centres of the bins.
    ramp = torch.arange(10.0).expand(1, 1, 10, 10)
    row = pool(ramp, [torch.tensor([[16.0, 16.0, 16 + 16 * 7.0, 16 + 16 * 7.0]])])[0, 0, 0]
    torch.testing.assert_close(row, 1 - 0.5 + (torch.arange(14) + 0.5) * 0.5)


def test_anchors(encoder: TrunkEncoder) -> None:
    model = model_of(encoder, anchors=(32, 64, 128, 256, 512))
    maps = torch.zeros(2, 32, 4, 5)
    # 58 x 70: the stride is 16 whatever the sides are.
    anchors, same = model.rpn.anchor_generator(ImageList(torch.zeros(2, 3, 58, 70), [(58, 70)] * 2), [maps])
    assert torch.equal(anchors, same)
    expected = []
    for row in range(4):
        for column in range(5):
            for side in (32, 64, 128, 256, 512):
                for ratio in (0.5, 1.0, 2.0):
                    width = math.sqrt(side**2 / ratio)  # detectron2: of area side^2 and this height over width
                    height = ratio * width
                    x, y = 16 * column, 16 * row
                    expected.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    torch.testing.assert_close(anchors, torch.tensor(expected), rtol=0, atol=2e-5)
    assert model.rpn.head.cls_logits.out_channels == 15


def test_batches_are_as_large_as_their_largest_sides(encoder: TrunkEncoder) -> None:
    """347 pixels stay 347: more rows of zeros would change the last rows of res4."""
    model = model_of(encoder).eval()
    assert model.batch([one.image for one in samples()]).tensors.shape == (2, 3, 70, 80)
    image = torch.full((3, 75, 83), 200, dtype=torch.uint8)
    batch = model.batch([image])
    assert torch.equal(batch.tensors, encoder.prepare(image[None]))


def test_resnet50_is_r50_c4() -> None:
    trunk = build_trunk(ResNetConfig(), seed=0)
    model = FasterRCNN(TrunkEncoder(trunk), classes=20, seed=0, frozen_norm=True, freeze_at=2, extra_norm=False)
    assert model.rpn.head.conv[0][0].weight.shape == (1024, 1024, 3, 3)
    assert model.roi_heads.box_predictor.cls_score.weight.shape == (21, 2048)
    assert model.roi_heads.box_predictor.bbox_pred.weight.shape == (84, 2048)
    first = model.roi_heads.box_head.layer4[0]
    assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (2, 2))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("moco", [False, True])
def test_weights_of_the_run_are_loaded(encoder: TrunkEncoder, moco: bool) -> None:
    model = model_of(encoder, moco=moco)
    state, trunk = model.state_dict(), encoder.trunk.state_dict()
    assert any(value.abs().sum() > 0 for value in trunk.values())
    for name, value in trunk.items():
        if moco or not name.endswith("num_batches_tracked"):
            where = "roi_heads.box_head." if name.startswith("layer4") else "backbone."
            assert torch.equal(state[where + name], value), name
    assert isinstance(model.roi_heads.box_head.norm, nn.BatchNorm2d if moco else nn.Identity)
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules()) == (0 if moco else 20)


@pytest.mark.parametrize("moco", [False, True])
def test_what_trains(encoder: TrunkEncoder, moco: bool) -> None:
    before = encoder.identity()["weights"]
    model = model_of(encoder, moco=moco).train()
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for iteration in range(2):
        optimizer.zero_grad()
        sum(losses_of(model, samples(), iteration=iteration).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, begun[name])}
    fixed = {
        name
        for name in begun
        if ".bn" in name or "downsample.1" in name or name.startswith(("backbone.conv1", "backbone.layer1"))
    }
    assert same == (set() if moco else fixed)
    assert moco or {"backbone.bn1.running_mean", "roi_heads.box_head.layer4.0.bn1.weight"} <= same
    assert encoder.identity()["weights"] == before


def test_losses_at_the_start(encoder: TrunkEncoder) -> None:
    """Scores near zero: ln 3 for two classes and the background, ln 2 for each sampled anchor of 256 per image."""
    model = model_of(encoder).train()
    state = torch.random.get_rng_state()
    losses = losses_of(model, samples(), iteration=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert losses["loss_class"].item() == pytest.approx(math.log(3), abs=0.1)
    assert 0.1 * math.log(2) < losses["loss_objectness"].item() < math.log(2) + 0.05
    again = losses_of(model, samples(), iteration=3)
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    other = losses_of(model, samples(), iteration=4)
    assert not torch.equal(losses["loss_class"], other["loss_class"])


def test_bfloat16_keeps_pixels(encoder: TrunkEncoder) -> None:
    model = model_of(encoder).train()
    exact = losses_of(model, samples())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses_of(model, samples())
        (found, _) = model.eval()([one.image for one in samples()])
    for name, loss in exact.items():
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(loss.item(), rel=0.1, abs=0.02), name
    assert found["boxes"].dtype == torch.float32
    model.rpn.head.bbox_pred.register_forward_hook(lambda m, i, o: o.bfloat16())
    images = model.batch([one.image for one in samples()])
    proposals, _ = model.rpn(images, {"0": model.backbone(images.tensors)})
    assert proposals[0].dtype == torch.float32


def test_proposal_losses_against_the_formula(encoder: TrunkEncoder) -> None:
    model = model_of(encoder).train()
    generator = torch.Generator().manual_seed(1)
    labels = [torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0]), torch.tensor([0.0, -1.0, -1.0, 1.0, 0.0])]
    scores, deltas = torch.randn(10, 1, generator=generator), torch.randn(10, 4, generator=generator)
    wanted = list(torch.randn(10, 4, generator=generator).split(5))
    model.rpn.fg_bg_sampler.at(0, 0, (0, 1))
    objectness, boxes = model.rpn.compute_loss(scores, deltas, labels, wanted)
    label, x = torch.cat(labels).double(), scores.double().flatten()
    known = label >= 0
    formula = binary_cross_entropy_with_logits(x[known], label[known], reduction="sum") / (2 * 256)
    assert float(objectness) == pytest.approx(float(formula), rel=1e-5)
    distance = (deltas.double() - torch.cat(wanted).double()).abs().sum(1)[label == 1].sum() / (2 * 256)
    assert float(boxes) == pytest.approx(float(distance), rel=1e-5)


def test_ignored_boxes_are_neither_objects_nor_background(encoder: TrunkEncoder) -> None:
    model = model_of(encoder).train()
    images = model.batch([one.image for one in samples()])
    maps = [model.backbone(images.tensors)]
    anchors = model.rpn.anchor_generator(images, maps)
    plain, _ = model.rpn.assign_targets_to_anchors(anchors, targets_of(samples((1, 2)), CPU))
    with_ignored, _ = model.rpn.assign_targets_to_anchors(anchors, targets_of(samples((1, IGNORED)), CPU))
    for one, other, boxes in zip(plain, with_ignored, anchors, strict=True):
        changed = one != other
        assert changed.any()
        assert set(other[changed].tolist()) == {-1.0}
        centres = (boxes[changed, :2] + boxes[changed, 2:]) / 2
        assert (centres[:, 0] > 40).all()  # those on the second box
        assert ((other == 1) & (one == 1)).any()
    nudged = BOXES[1] + 1
    proposals = [torch.stack((BOXES[0] + 2, nudged, torch.tensor([0.0, 60.0, 9.0, 69.0]))) for _ in range(2)]
    for sampler in model.samplers:
        sampler.at(0, 0, (0, 1))
    regions, _, labels, _ = model.roi_heads.select_training_samples(
        list(proposals), targets_of(samples((1, IGNORED)), CPU)
    )
    for region, label in zip(regions, labels, strict=True):
        assert sorted(label.tolist()) == [0, 1, 1]  # background, the first box and its neighbour
        assert not (region == nudged).all(1).any()
        assert not (region == BOXES[1]).all(1).any()
    everything_ignored = losses_of(model, samples((IGNORED, IGNORED)))
    assert everything_ignored["loss_rpn_box_reg"].item() == everything_ignored["loss_box"].item() == 0.0
    assert all(loss.isfinite() for loss in everything_ignored.values())


def test_sampler() -> None:
    sampler = Sampler(8, 0.25, stream=50)
    label = torch.tensor([1, 2, 0, 0, -1, 3, 0, 0, 0, 0, 0, 0, -1, 1])
    sampler.at(0, 7, (3,))
    (objects,), (background,) = sampler([label])
    assert (int(objects.sum()), int(background.sum())) == (2, 6)
    assert (label[objects] >= 1).all()
    assert (label[background] == 0).all()
    sampler.at(0, 7, (4, 3))  # the same image in another batch
    both = sampler([torch.zeros(5), label])
    assert torch.equal(both[0][1], objects)
    assert torch.equal(both[1][1], background)
    assert (int(both[0][0].sum()), int(both[1][0].sum())) == (0, 5)
    counts = torch.zeros(len(label))
    for iteration in range(200):
        sampler.at(0, iteration, (3,))
        (objects,), (background,) = sampler([label])
        counts += objects | background
    assert (counts[label < 0] == 0).all()
    assert ((counts[label >= 1] - 100).abs() < 30).all()  # 2 of 4
    assert ((counts[label == 0] - 150).abs() < 30).all()  # 6 of 8


def test_schedules_are_the_published_ones() -> None:
    pirl = PIRL.schedule(sets=2, iterations=None, batch_size=16, lr=None)
    assert (pirl.iterations, pirl.drops, pirl.warmup, pirl.precise_norm) == (25_000, (17_000,), 1000, 0)
    rates = {0: 2e-6, 500: 0.002 * 0.5005, 1000: 0.002, 16_999: 0.002, 17_000: 0.0002, 24_999: 0.0002}
    for iteration, rate in rates.items():
        assert pirl.learning_rate(iteration) == pytest.approx(rate)
    single = PIRL.schedule(sets=1, iterations=None, batch_size=8, lr=None)
    assert (single.iterations, single.drops, single.lr) == (12_500, (9500,), 0.001)
    paper = PIRL_PAPER.schedule(sets=2, iterations=None, batch_size=16, lr=None)
    assert paper.learning_rate(0) == pytest.approx(0.001)
    assert paper.learning_rate(1000) == pytest.approx(0.003)
    supervised = PIRL_SUPERVISED.schedule(sets=2, iterations=None, batch_size=16, lr=None)
    for iteration, rate in {0: 0.02 / 3, 100: 0.02, 16_999: 0.02, 17_000: 0.002}.items():
        assert supervised.learning_rate(iteration) == pytest.approx(rate)
    one_set = MOCO.schedule(sets=1, iterations=None, batch_size=16, lr=None)
    assert (one_set.iterations, one_set.drops) == (9_000, (6_750, 8_250))
    assert PIRL.schedule(sets=2, iterations=None, batch_size=16, lr=None, warmup=7).warmup == 7
    moco = MOCO.schedule(sets=2, iterations=None, batch_size=16, lr=None)
    assert (moco.iterations, moco.drops, moco.warmup, moco.lr, moco.precise_norm) == (
        24_000, (18_000, 22_000), 100, 0.02, 200,
    )  # fmt: skip
    assert moco.learning_rate(21_999) == pytest.approx(0.002)
    assert moco.learning_rate(22_000) == pytest.approx(0.0002)
    short = PIRL.schedule(sets=2, iterations=2500, batch_size=16, lr=0.01)
    assert (short.drops, short.warmup, short.lr) == ((1700,), 100, 0.01)
    assert short.published_iterations == 25_000


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ResNetConfig(name="resnet18", stem="small"), "needs stride 16 at res4, and model.stem=small has 4; pretrain"),
        (ResNetConfig(name="resnet18", norm="layer"), "needs BatchNorm, and the run has model.norm=layer"),
        (ResNetConfig(name="resnet18", input="sobel"), "gives the trunk RGB images, and the run has model.input=sobel"),
    ],
)
def test_unfit_trunks(config: ResNetConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_trunk(config)

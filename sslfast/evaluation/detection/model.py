"""Faster R-CNN on a C4 trunk: conv1 to res4 as the backbone of stride 16, res5 as the head of every region.

As detectron2's R50-C4 with ``Res5ROIHeads`` (Ren et al. 2015; He et al. 2016): one feature level, anchors of five sizes
and three aspect ratios, regions pooled to 14 x 14 by aligned RoIAlign, res5 with stride 2 to 7 x 7, averaged, then
class and box. Built from torchvision's parts with detectron2's losses (L1 for boxes; the proposal losses are divided by
a fixed number of anchors), its anchors and its padding: a batch is as large as its largest sides. One difference from
detectron2: a batch mixes portrait and landscape images.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, l1_loss
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FrozenBatchNorm2d, RoIAlign

from sslfast.evaluation.detection.data import IGNORED, Sample
from sslfast.evaluation.encoders import TrunkEncoder
from sslfast.models import TrunkConfig, require_resnet, seeded
from sslfast.ops.philox import Stream, random_uint32

STRIDE = 16
POOLED = 14
ANCHORS = (32, 64, 128, 256, 512)
SHAPES = (0.5, 1.0, 2.0)
_BLOCKS = 1 << 20
"""Philox counters of an image: four numbers each, so an image may have 4 million anchors."""

Target = dict[str, Tensor]


def check_trunk(config: TrunkConfig) -> None:
    """ValueError unless a trunk of this configuration has the stride and normalisation that C4 needs."""
    config = require_resnet(config, purpose="detect")
    if config.stem != "imagenet":
        raise ValueError(
            f"detect needs stride 16 at res4, and model.stem={config.stem} has 4; pretrain with --model.stem imagenet"
        )
    if config.norm != "batch":
        raise ValueError(f"detect needs BatchNorm, and the run has model.norm={config.norm}")
    if config.input != "rgb":
        raise ValueError(f"detect gives the trunk RGB images, and the run has model.input={config.input}")


def freeze_norms(module: nn.Module) -> None:
    """Replace every BatchNorm inside by FrozenBatchNorm2d with the same values and names."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


class Anchors(nn.Module):
    """Anchors of one map of stride 16, unrounded, as detectron2's DefaultAnchorGenerator with offset 0.

    For every cell ``(i, j)``, side s and ratio r (height over width), in this order: a box of height ``s sqrt(r)`` and
    width ``s / sqrt(r)`` centred at ``(16 j, 16 i)``.
    """

    def __init__(self, sides: Sequence[int], ratios: Sequence[float] = SHAPES) -> None:
        super().__init__()
        shapes = [(side / ratio**0.5, side * ratio**0.5) for side in sides for ratio in ratios]
        self.cell = torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes], dtype=torch.float64)

    def num_anchors_per_location(self) -> list[int]:
        """Of the one map."""
        return [len(self.cell)]

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """``[h * w * anchors, 4]`` for each image, of the map ``[B, C, h, w]``."""
        (found,) = maps
        rows, columns = (torch.arange(edge, device=found.device) * STRIDE for edge in found.shape[-2:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres = torch.stack((x, y, x, y), -1).view(-1, 1, 4)
        anchors = (centres + self.cell.to(found.device)).view(-1, 4).to(found.dtype)
        return [anchors] * len(images.image_sizes)


class FasterRCNN(nn.Module):
    """The heads of Faster R-CNN on a copy of a trunk.

    Args:
        encoder: provides trunk, normalisation and device; not modified.
        classes: number of classes without the background.
        seed: of the new layers and of the samplers.
        frozen_norm: freeze the trunk's BatchNorm (:func:`freeze_norms`).
        freeze_at: number of frozen stages: 1 conv1, 2 also res2.
        extra_norm: BatchNorm behind res5.
        anchors: sides in pixels.
        regions: sampled from each training image.
    """

    def __init__(
        self,
        encoder: TrunkEncoder,
        *,
        classes: int,
        seed: int,
        frozen_norm: bool,
        freeze_at: int,
        extra_norm: bool,
        anchors: Sequence[int] = ANCHORS,
        regions: int = 512,
    ) -> None:
        super().__init__()
        self.encoder, self.seed = encoder, seed
        trunk: Any = copy.deepcopy(encoder.trunk)
        if frozen_norm:
            freeze_norms(trunk)
        stages = [[trunk.conv1, trunk.bn1], [trunk.layer1], [trunk.layer2], [trunk.layer3], [trunk.layer4]]
        for module in (module for stage in stages[:freeze_at] for module in stage):
            module.requires_grad_(False)
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.backbone = nn.Sequential()
        for name in names:
            self.backbone.add_module(name, getattr(trunk, name))
        width = int(trunk.out_features)
        channels = width // 2
        shape = Anchors(anchors)
        with seeded(seed):
            self.rpn = _Proposals(
                shape,
                _ProposalHead(channels, shape.num_anchors_per_location()[0]),
                fg_iou_thresh=0.7,
                bg_iou_thresh=0.3,
                batch_size_per_image=256,
                positive_fraction=0.5,
                pre_nms_top_n={"training": 12000, "testing": 6000},
                post_nms_top_n={"training": 2000, "testing": 1000},
                nms_thresh=0.7,
            )
            predictor = FastRCNNPredictor(width, classes + 1)
            nn.init.normal_(predictor.cls_score.weight, std=0.01)
            nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
            nn.init.zeros_(predictor.cls_score.bias)
            nn.init.zeros_(predictor.bbox_pred.bias)
        self.roi_heads = _Regions(
            RoIAlign(POOLED, spatial_scale=1 / STRIDE, sampling_ratio=0, aligned=True),
            _Res5(trunk.layer4, nn.BatchNorm2d(width) if extra_norm else nn.Identity()),
            predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=regions,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )
        self.samplers = [
            Sampler(256, 0.5, stream=Stream.DETECTION + 2),
            Sampler(regions, 0.25, stream=Stream.DETECTION + 3),
        ]
        self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler = self.samplers

    def batch(self, images: Sequence[Tensor]) -> ImageList:
        """Network input from uint8 ``[3, h, w]`` images on the device, padded below and right with zeros."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (max(edges) for edges in zip(*sizes, strict=True))
        dtype = self.rpn.head.cls_logits.weight.dtype
        inputs = torch.zeros(len(images), 3, height, width, device=images[0].device, dtype=dtype)
        for slot, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            inputs[slot, :, :h, :w] = self.encoder.prepare(image[None])[0]
        return ImageList(inputs.contiguous(memory_format=self.encoder.layout), sizes)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: list[Target] | None = None,
        *,
        iteration: int = 0,
        sample_ids: Sequence[int] = (),
    ) -> Any:
        """With targets, losses by name; without, ``boxes``, ``scores`` and ``labels`` of each image.

        Args:
            images: uint8 ``[3, h, w]``.
            targets: of each image ``boxes`` ``[n, 4]`` and ``labels`` ``[n]`` (:data:`IGNORED`: neither object nor
                background).
            iteration, sample_ids: with the seed, these determine the sampled anchors and regions.
        """
        batch = self.batch(images)
        features = _at_least_float32(self.backbone(batch.tensors))
        for sampler in self.samplers:
            sampler.at(self.seed, iteration, sample_ids)
        proposals, losses = self.rpn(batch, {"0": features}, targets)
        found, more = self.roi_heads(features, proposals, batch.image_sizes, targets)
        return found if targets is None else {**losses, **more}


def targets_of(samples: Sequence[Sample], device: torch.device) -> list[Target]:
    """Targets of :class:`FasterRCNN`."""
    return [{"boxes": sample.boxes.to(device), "labels": sample.labels.to(device)} for sample in samples]


class Sampler:
    """Samples the anchors or regions of each image that enter the loss: ``count``, of them up to ``share`` objects.

    A function of (seed, iteration, sample id, index of the candidate). ``sampler(labels)`` maps the labels of each
    image (from 1 on: object, 0: background, below: ignored) to a mask of objects and a mask of background.
    """

    def __init__(self, count: int, share: float, *, stream: int) -> None:
        self.count, self.share, self.stream = count, share, stream
        self.at(0, 0, ())

    def at(self, seed: int, iteration: int, sample_ids: Sequence[int]) -> None:
        """Set the keys of the next draw."""
        self.seed, self.iteration, self.sample_ids = seed, iteration, sample_ids

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [self._image(label, keys) for label, keys in zip(labels, self._keys(labels), strict=True)]
        return [objects for objects, _ in pairs], [rest for _, rest in pairs]

    def _keys(self, labels: list[Tensor]) -> list[Tensor]:
        blocks = [-(-len(label) // 4) for label in labels]
        device = labels[0].device
        pairs = zip(self.sample_ids, blocks, strict=True)
        counters = [sample_id * _BLOCKS + torch.arange(n, device=device) for sample_id, n in pairs]
        draws = random_uint32(torch.cat(counters), 4, seed=self.seed, stream=self.stream, step=self.iteration)
        return [part.flatten()[: len(label)] for part, label in zip(draws.split(blocks), labels, strict=True)]

    def _image(self, label: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        objects = _smallest(label >= 1, keys, int(self.count * self.share))
        return objects, _smallest(label == 0, keys, self.count - int(objects.sum()))


def _smallest(candidates: Tensor, keys: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` candidates with the smallest keys."""
    indices = torch.where(candidates)[0]  # host sync: their number, as in all of torchvision's matching
    chosen = torch.zeros_like(candidates)
    chosen[indices[keys[indices].argsort(stable=True)[:count]]] = True
    return chosen


def _at_least_float32(x: Tensor) -> Tensor:
    """float32, or float64 where the detector's weights are float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _ProposalHead(RPNHead):
    """torchvision's with results in float32: boxes have their type, and bfloat16 cannot resolve single pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [_at_least_float32(score) for score in scores], [_at_least_float32(delta) for delta in deltas]


class _Proposals(RegionProposalNetwork):
    """torchvision's, with ignored boxes and detectron2's losses."""

    fg_bg_sampler: Sampler

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for label, boxes, target in zip(labels, matched, targets, strict=True):
            ignored = target["boxes"][target["labels"] == IGNORED]
            if len(ignored):
                of_ignored = (boxes[:, None] == ignored).all(2).any(1)
                label[of_ignored & (label == 1)] = -1.0
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        objects, background = (torch.cat(masks) for masks in self.fg_bg_sampler(labels))
        count = self.fg_bg_sampler.count * len(labels)
        wanted, sampled = torch.cat(regression_targets), objects | background
        scores = objectness.flatten()[sampled]
        found = binary_cross_entropy_with_logits(scores, torch.cat(labels)[sampled], reduction="sum")
        boxes = l1_loss(pred_bbox_deltas[objects], wanted[objects], reduction="sum")
        return found / count, boxes / count


class _Res5(nn.Module):
    """``[R, C, 14, 14]`` -> ``[R, 2 C]``."""

    def __init__(self, layer4: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer4, self.norm = layer4, norm

    def forward(self, regions: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.layer4(regions)).mean((2, 3)))


class _Regions(RoIHeads):
    """torchvision's for one feature level, with an L1 loss."""

    def forward(
        self,
        features: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        if targets is not None:
            # Ignored boxes are among the candidates too; their label keeps them from being sampled.
            proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        scores, deltas = _at_least_float32(scores), _at_least_float32(deltas)
        if targets is None:
            boxes, probabilities, names = self.postprocess_detections(scores, deltas, proposals, image_shapes)
            parts = zip(boxes, probabilities, names, strict=True)
            return [{"boxes": box, "scores": score, "labels": name} for box, score, name in parts], {}
        label = torch.cat(labels)
        objects = torch.where(label > 0)[0]
        own = deltas.view(len(label), -1, 4)[objects, label[objects]]
        boxes_loss = l1_loss(own, torch.cat(wanted)[objects], reduction="sum") / max(1, len(label))
        return [], {"loss_class": cross_entropy(scores, label), "loss_box": boxes_loss}

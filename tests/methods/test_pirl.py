import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.methods.pirl import PIRL
from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.models.build import build_trunk
from sslfast.models.heads import MLPHead, PatchHead
from sslfast.models.init import seeded
from sslfast.models.memory_bank import MemoryBank, initial_rows
from sslfast.models.resnet import ResNetConfig
from sslfast.ops import bank_nce_reference
from sslfast.recipes import RECIPES
from sslfast.recipes.pirl import pirl_paper, pirl_vissl
from sslfast.views.types import CropConfig, JigsawConfig, View, ViewConfig
from tests.tiny import context, same

MODEL = ResNetConfig(name="resnet18")
JIGSAW = ViewConfig(crop=CropConfig(size=48), jigsaw=JigsawConfig(grid=3, patch_size=16))
ROWS = 40


def build(**changes: object) -> PIRL:
    config = PIRL.Config(num_negatives=64, jigsaw_view=JIGSAW, **changes)  # type: ignore[arg-type]
    return config.build(context(MODEL, ROWS, seed=3))


def batch(method: PIRL, size: int = 4) -> tuple[dict[str, View], Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = {"image": View(pixels=torch.randn(size, 3, 32, 32, generator=generator))}
    if method.config.pretext_weight > 0:
        shape = (size, 3, 32, 32) if method.config.pretext == "rotation" else (size, 9, 3, 16, 16)
        views["pretext"] = View(pixels=torch.randn(shape, generator=generator))
    return views, torch.arange(size) * 3


@pytest.mark.parametrize("pretext", ["jigsaw", "rotation", "rotation+jigsaw"])
@pytest.mark.parametrize(
    ("loss", "negatives"), [("nce", "sampled"), ("infonce", "sampled"), ("nce", "full"), ("infonce", "shared")]
)
def test_loss_is_the_formula(pretext: str, loss: str, negatives: str) -> None:
    method = build(pretext=pretext, loss=loss, pretext_weight=0.3, negatives=negatives)
    views, rows = batch(method)
    out = method(views, rows, step=5)

    pixels = views["pretext"].pixels
    method = build(pretext=pretext, loss=loss, pretext_weight=0.3)  # batch norm statistics as before the step
    patches = pixels if pixels.dim() == 4 else pixels.flatten(0, 1)
    transformed = method.trunk(patches)
    transformed = transformed if pixels.dim() == 4 else transformed.reshape(4, 9, -1)
    g = normalize(method.pretext_head(transformed), dim=1)  # type: ignore[misc]
    f = normalize(method.image_head(method.trunk(views["image"].pixels)), dim=1)
    options = {"loss": loss, "negatives": negatives, "num_negatives": 64, "seed": 3, "step": 5}
    both = bank_nce_reference(torch.stack((g, f)), method.bank.vectors, rows, **options)
    expected = 0.3 * both[0].mean() + 0.7 * both[1].mean()
    torch.testing.assert_close(out["loss"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss_pretext"], both[0].mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss_image"], both[1].mean(), rtol=1e-5, atol=1e-5)
    assert [name for name, value in out.items() if value.requires_grad] == ["loss"]


def test_bank_moves_toward_the_image_embedding_only() -> None:
    method = build(bank_momentum=0.25)
    views, rows = batch(method)
    before = method.bank.vectors.clone()
    with torch.no_grad():
        image = normalize(method.image_head(method.trunk(views["image"].pixels)), dim=1)
    method(views, rows, step=0)
    torch.testing.assert_close(method.bank.vectors, before)  # scoring does not change the bank
    method(views, rows + 1, step=0)  # a second micro-batch
    method.after_step()
    for moved in (rows, rows + 1):
        torch.testing.assert_close(method.bank.vectors[moved], normalize(0.25 * before[moved] + 0.75 * image, dim=1))
    others = torch.ones(ROWS, dtype=torch.bool)
    others[torch.cat((rows, rows + 1))] = False
    assert torch.equal(method.bank.vectors[others], before[others])
    with pytest.raises(RuntimeError, match="after_step was called before a forward pass"):
        method.after_step()


def test_npid_is_pirl_without_the_transformed_view() -> None:
    npid = build(pretext_weight=0.0)
    assert list(npid.config.views()) == ["image"]
    assert npid.pretext_head is None
    views, rows = batch(npid)
    loss = npid(views, rows, step=1)["loss"]
    with_weight_one_half = build(pretext_weight=0.5, separate_draws=False, z_from="all")
    both_views, _ = batch(with_weight_one_half)
    infonce = {"loss": "infonce"}
    alone = build(pretext_weight=0.0, **infonce)(views, rows, step=1)["loss"]
    pirl = build(**infonce)
    pirl_image = pirl(both_views, rows, step=1)["loss_image"]
    torch.testing.assert_close(alone, pirl_image, rtol=1e-5, atol=1e-5)  # same draw, same image term
    assert loss.isfinite()


def test_gradients_reach_trunk_and_heads_and_never_the_bank() -> None:
    method = build()
    views, rows = batch(method)
    method(views, rows, step=0)["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert not method.bank.vectors.requires_grad


@pytest.mark.parametrize(
    "recipe", ["pirl-paper", "pirl-vissl", "pirl-rotation", "pirl-rotation-jigsaw", "npid", "npid-plus-plus"]
)
def test_first_loss_of_the_recipes(recipe: str) -> None:
    """The first loss of every ImageNet recipe: ln(K+1)+1 for NCE with Z ~ N exp(1 / (2 D T^2)), see the README.

    The embeddings are replaced by isotropic ones, so that the values are those of the loss alone.
    """
    config = replace(RECIPES[recipe]().method, num_negatives=4096)
    method = config.build(context(MODEL, 5000, seed=0))
    generator = torch.Generator().manual_seed(1)
    views = len(config.views())
    method.embed = lambda _: normalize(torch.randn(views, 64, 128, generator=generator), dim=-1)  # type: ignore
    out = method({}, torch.arange(64), step=0)
    isotropic = 1 / (2 * 128 * 0.07**2)
    assert abs(out["z"].item() / (5000 * math.exp(isotropic)) - 1) < 0.1
    # Positive: softplus(log(Z K / N) - s_0) with E s_0 = 0; negatives: just under 1.
    assert abs(out["loss"].item() - (math.log(4097) + isotropic + 1)) < 0.35
    method = replace(config, loss="infonce").build(context(MODEL, 5000, seed=0))
    method.embed = lambda _: normalize(torch.randn(views, 64, 128, generator=generator), dim=-1)  # type: ignore
    out = method({}, torch.arange(64), step=0)
    assert abs(out["loss"].item() - (math.log(4097) + isotropic)) < 0.35


@pytest.mark.parametrize("running_stats", ["image", "mixed"])
def test_running_statistics(running_stats: str) -> None:
    method = build(running_stats=running_stats)
    views, rows = batch(method)
    method(views, rows, step=0)
    alone = build(pretext_weight=0.0)
    alone(views, rows, step=0)
    same = torch.equal(method.trunk.bn1.running_mean, alone.trunk.bn1.running_mean)  # type: ignore[arg-type]
    assert same == (running_stats == "image")
    assert {m.momentum for m in method.trunk.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


def test_z_frozen_running_and_resumed() -> None:
    frozen, running = build(), build(z="running", z_momentum=0.5)
    values = {}
    for method in (frozen, running):
        assert method.z.isnan()
        views, rows = batch(method)
        values[method] = []
        for step in range(3):
            method(views, rows, step=step)
            method.after_step()
            values[method].append(method.z.item())
    assert len(set(values[frozen])) == 1
    assert len(set(values[running])) == 3
    resumed = build()
    resumed.load_state_dict(frozen.state_dict())
    views, rows = batch(resumed)
    resumed(views, rows, step=3)
    assert resumed.z.item() == values[frozen][0]


def test_running_z_keeps_the_momentum_of_the_old_value() -> None:
    running = build(z="running", z_momentum=0.75)
    views, rows = batch(running)
    estimates = []
    for step in range(2):
        running(views, rows, step=step)
        once = build()
        once(views, rows, step=step)
        estimates.append(once.z)
    assert estimates[0] != estimates[1]
    torch.testing.assert_close(running.z, 0.75 * estimates[0] + 0.25 * estimates[1], rtol=1e-5, atol=0)


def test_z_is_estimated_again_where_the_first_step_was_undone() -> None:
    method = build(pretext_weight=0.0)
    views, rows = batch(method)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method({"image": View(pixels=views["image"].pixels * torch.nan)}, rows, step=0)
    method.after_step()
    for name, value in method.state_dict().items():
        value.copy_(before[name])  # what on_nonfinite=skip does
    assert method(views, rows, step=1)["loss"].isfinite()
    z = method.z.clone()
    method(views, rows, step=2)
    assert torch.equal(method.z, z)


def test_z_from_the_pretext_view_and_separate_draws() -> None:
    changed = build(z_from="pretext", separate_draws=True, exclude_self=False)
    views, rows = batch(changed)
    out = changed(views, rows, step=0)
    same = build(z_from="pretext", exclude_self=False)
    reference = same(views, rows, step=0)
    torch.testing.assert_close(out["loss_pretext"], reference["loss_pretext"])
    assert out["loss_image"] != reference["loss_image"]  # other negatives, drawn with the next seed


def test_state_dict_holds_everything_and_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build()
    assert torch.equal(torch.get_rng_state(), state)
    assert {"bank.vectors", "z", "image_head.weight", "trunk.conv1.weight"} <= first.state_dict().keys()
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b) or (a.isnan().all() and b.isnan().all()), name


def test_weights_and_bank_are_drawn_from_the_seed() -> None:
    method = build()
    with seeded(4):
        image_head, pretext_head = torch.nn.Linear(512, 128), PatchHead(512, 128, 9)
    assert method.pretext_head is not None
    assert same(method.trunk.state_dict(), build_trunk(MODEL, seed=3).state_dict())
    assert same(method.image_head.state_dict(), image_head.state_dict())
    assert same(method.pretext_head.state_dict(), pretext_head.state_dict())
    assert torch.equal(method.bank.vectors, initial_rows(ROWS, 128, seed=3))


def test_mlp_heads() -> None:
    """VISSL's: a hidden layer with ReLU; behind the second layer of a patch a ReLU too, then the linear layer."""
    method = PIRL(PIRL.Config(projection="mlp", dimensions=16), context(MODEL, ROWS, seed=3))
    assert isinstance(method.image_head, MLPHead)
    assert isinstance(method.pretext_head, PatchHead)
    x = torch.randn(2, 9, 512, generator=torch.Generator().manual_seed(0))
    first = method.pretext_head.patch[0]  # type: ignore[index]
    hidden = first[2](first[0](x).relu()).relu()
    torch.testing.assert_close(method.pretext_head(x), method.pretext_head.combine(hidden.flatten(1)))
    assert (first[0].out_features, method.image_head[0].out_features) == (512, 512)
    recipe = RECIPES["pirl-mlp-blur"]()
    assert (recipe.method.loss, recipe.method.temperature, recipe.method.projection) == ("infonce", 0.1, "mlp")
    assert (
        recipe.method.image_view.augment.blur_probability == recipe.method.jigsaw_view.augment.blur_probability == 0.5
    )


def test_presets_are_the_published_numbers() -> None:
    paper, vissl = pirl_paper(), pirl_vissl()
    for config in (paper, vissl):
        method = config.method
        assert (method.temperature, method.num_negatives, method.dimensions) == (0.07, 32000, 128)
        assert (method.bank_momentum, method.pretext_weight, method.loss) == (0.5, 0.5, "nce")
        assert (config.epochs, config.batch_size, config.model.name) == (800, 1024, "resnet50")
        assert config.optim.lr_per_256_images * 4 == pytest.approx(0.12)
        assert config.optim.final_lr_per_256_images * 4 == pytest.approx(1.2e-4)
        assert (config.optim.momentum, config.optim.weight_decay, config.optim.nesterov) == (0.9, 1e-4, False)
        views = method.views()
        assert views["image"].crop == CropConfig(size=224, scale=(0.08, 1.0))
        assert views["pretext"].crop == CropConfig(size=255, scale=(0.6, 1.0))
        assert views["pretext"].jigsaw.grid == 3  # type: ignore[union-attr]
        assert views["pretext"].jigsaw.patch_size == 64  # type: ignore[union-attr]
    assert paper.method.exclude_self
    assert not vissl.method.exclude_self
    assert vissl.method.views()["pretext"].jigsaw.max_offset == 20  # type: ignore[union-attr]
    assert RECIPES["pirl-rotation"]().method.views()["pretext"].rotation
    both = RECIPES["pirl-rotation-jigsaw"]().method.views()["pretext"]
    assert both.rotation
    assert both.jigsaw is not None
    for name, negatives, epochs, batch, own in (
        ("npid", 4096, 200, 256, True),
        ("npid-plus-plus", 32000, 800, 1024, True),
    ):
        config = RECIPES[name]()
        method = config.method
        assert (method.pretext_weight, method.loss, method.temperature) == (0, "nce", 0.07)
        assert (method.num_negatives, method.exclude_self, config.epochs) == (negatives, not own, epochs)
        assert (config.batch_size, config.optim.lr_per_256_images) == (batch, 0.03)
    assert RECIPES["npid-small"]().method == replace(RECIPES["pirl-small"]().method, pretext_weight=0.0)
    for name, recipe in RECIPES.items():
        assert recipe().recipe == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretext_weight": 1.5}, r"method.pretext_weight must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "method.temperature must be positive"),
        ({"num_negatives": 0}, "method.num_negatives must be at least 1"),
        ({"bank_momentum": 2.0}, r"method.bank_momentum must be in \[0, 1\]"),
        ({"image_view": ViewConfig(jigsaw=JigsawConfig())}, "method.image_view.jigsaw must not be set"),
        ({"jigsaw_view": ViewConfig()}, "method.jigsaw_view.jigsaw must be set"),
        ({"pretext_weight": 0.0, "z_from": "pretext"}, "z_from=pretext needs pretext_weight > 0"),
    ],
)
def test_bad_configurations(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PIRL.Config(), **changes).build(context(MODEL, 10, seed=0))


def test_needs_two_images() -> None:
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        PIRL.Config().build(context(MODEL, 1, seed=0))


def test_bank_vectors_are_unit_and_independent_of_the_size() -> None:
    rows = initial_rows(70_000, 16, seed=4)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(70_000))
    assert torch.equal(rows[:100], initial_rows(100, 16, seed=4))
    assert rows.mean().abs() < 0.01
    assert not torch.equal(rows[:100], initial_rows(100, 16, seed=5))
    half = MemoryBank(100, 16, momentum=0.5, seed=4, dtype=torch.bfloat16)
    torch.testing.assert_close(half.vectors, rows[:100].bfloat16())


def test_patch_head_depends_on_the_order_of_patches() -> None:
    head = PatchHead(6, 4, 9)
    features = torch.randn(2, 9, 6)
    expected = head.combine(torch.cat([head.patch(features[:, i]) for i in range(9)], dim=1))
    torch.testing.assert_close(head(features), expected)
    assert not torch.allclose(head(features.flip(1)), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_trunk_is_torchvisions(name: str) -> None:
    import torchvision

    trunk = build_trunk(ResNetConfig(name=name), seed=0)  # type: ignore[arg-type]
    net = getattr(torchvision.models, name)()
    missing, unexpected = net.load_state_dict(trunk.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
    net.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(trunk.eval()(images), net.eval()(images), rtol=1e-4, atol=1e-5)
    maps = trunk.stages(images)
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4, 2]
    torch.testing.assert_close(maps[-1].mean(dim=(2, 3)), trunk(images), rtol=1e-4, atol=1e-5)


def test_gradients_of_strided_convolutions_on_single_pixels() -> None:
    """16 px patches reach res5 as 1x1 maps; the bf16 weight gradient there is that of fp32, rounded."""
    conv = build_trunk(ResNetConfig(name="resnet18"), seed=0).layer4[0].conv1  # type: ignore[index]
    maps = torch.randn(64, 256, 1, 1)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        junk = [torch.full((512 * 256 * 9,), float("nan")) for _ in range(4)]
        del junk  # uninitialised memory is NaN now
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = conv(maps)
        assert out.shape == (64, 512, 1, 1)
        out.float().square().sum().backward()
        gradients.append(conv.weight.grad.clone())
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


def test_small_stem_keeps_resolution() -> None:
    trunk = build_trunk(ResNetConfig(name="resnet18", stem="small"), seed=0)
    assert [m.shape[-1] for m in trunk.stages(torch.randn(1, 3, 32, 32))] == [32, 32, 16, 8, 4]


def test_a_crop_is_mirrored_before_it_is_cut() -> None:
    images, rows = batch(build())
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(len(rows))])
    views = {**images, "pretext": replace(images["pretext"], permutation=order)}
    mirrored = {**views, "pretext": replace(images["pretext"], pixels=images["pretext"].pixels.flip(-1))}
    expected = build(loss="infonce")(mirrored, rows, step=2)
    found = build(loss="infonce", crop_flip_probability=1.0)(views, rows, step=2)
    assert torch.equal(found["loss"], expected["loss"])
    assert not torch.equal(found["loss"], build(loss="infonce")(views, rows, step=2)["loss"])
    gray = build(loss="infonce", crop_grayscale_probability=1.0)(views, rows, step=2)
    assert not torch.equal(gray["loss_pretext"], found["loss_pretext"])
    assert torch.equal(gray["loss_image"], found["loss_image"])


@pytest.mark.parametrize("changes", [{"pretext": "rotation"}, {"pretext_weight": 0.0}])
def test_changes_of_crops_need_patches(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"crop_flip_probability .* change crops that are cut into patches, .* set both"
    ):
        build(crop_flip_probability=0.5, **changes)


def test_the_preview_shows_changed_crops_by_their_cells() -> None:
    views, rows = batch(build())
    views["pretext"] = replace(views["pretext"], permutation=torch.arange(9).repeat(len(rows), 1))
    config = replace(build().config, crop_flip_probability=1.0)
    shown = config.preview_panels(views, rows, seed=0)["the patches in their cells"]
    space = PixelSpace(JIGSAW.augment)
    first = space.to_rgb(views["pretext"].pixels[:, 2]).flip(-1)  # of the top row the last cell comes first
    torch.testing.assert_close(shown[:, :, :16, :16], first)
    assert not build().config.preview_panels(views, rows, seed=0)

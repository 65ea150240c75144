"""10, 12 or 14 bits stored in 16: what the file states, the option for the rest, and that everybody uses the same."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sslfast.cli import main as cli
from sslfast.data import open_data
from sslfast.data.contents import Contents, combined, recorded_decoding, sample_contents
from sslfast.data.images import DEFAULT_DECODING, BadImageError, Decoding, decode_full, decode_pixels, open_image
from sslfast.data.manifest import Manifest
from sslfast.data.prepare import PrepareConfig, prepare_beton
from sslfast.data.verify import verify_images
from sslfast.evaluation.config import ImageConfig
from sslfast.evaluation.extract import ImageReader
from sslfast.loaders.registry import LoaderConfig, build_loader
from sslfast.views.types import CropConfig, ViewConfig
from tests.pictures import encoded, picture, pixels, png, png_chunk, tiff

RGB = pixels(24, 18)
GRAY = RGB[..., 0]
OPAQUE = np.full(GRAY.shape, 65535, np.uint16)


def stored(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint16]:
    """The 8-bit values in the high bits of ``bits``, with something in the low ones."""
    return (values.astype(np.uint16) << (bits - 8)) + (1 << (bits - 8)) - 1


def files(bits: int) -> dict[str, tuple[bytes, NDArray[np.uint8]]]:
    gray, colour, white = stored(GRAY, bits), stored(RGB, bits), 2**bits - 1
    head = b"%s 24 18 65535\n"
    return {
        "gray PNG": (png(gray, bits=16, colour=0), GRAY),
        "RGB PNG": (png(colour, bits=16, colour=2), RGB),
        "gray and alpha PNG": (png(np.dstack([gray, OPAQUE]), bits=16, colour=4), GRAY),
        "RGB and alpha PNG": (png(np.dstack([colour, OPAQUE]), bits=16, colour=6), RGB),
        "PGM": (head % b"P5" + gray.astype(">u2").tobytes(), GRAY),
        "PPM": (head % b"P6" + colour.astype(">u2").tobytes(), RGB),
        "0 is white TIFF": (tiff(white - gray, bits=16, photometric=0), GRAY),
        **{
            f"{name} TIFF {order}{compression}": (
                tiff(samples, bits=16, photometric=kind, order=order, compression=compression),
                expected,
            )
            for order in "<>"
            for compression in (1, 8)
            for name, samples, kind, expected in (("gray", gray, 1, GRAY), ("RGB", colour, 2, RGB))
        },
    }


def agree(data: bytes, expected: NDArray[np.uint8], decoding: Decoding = DEFAULT_DECODING) -> None:
    wide = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    assert np.array_equal(decode_full(data, decoding), wide)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("name", files(16))
def test_the_option_in_every_format(name: str, bits: int) -> None:
    data, expected = files(bits)[name]
    agree(data, expected, Decoding(white_level=2**bits - 1))
    if name != "0 is white TIFF":
        agree(data, expected >> (16 - bits))


def test_levels_that_are_no_power_of_two_and_values_above() -> None:
    samples = np.arange(18 * 24, dtype=np.uint16).reshape(18, 24) * 10
    data = png(samples, bits=16, colour=0)
    agree(data, np.minimum(samples.astype(int) * 256 // 3001, 255).astype(np.uint8), Decoding(white_level=3000))
    opened = open_image(data, Decoding(white_level=3000))
    decode_pixels(opened)
    assert (opened.peak, opened.white) == (4310, 3000)
    for level in (254, 65536, 0):
        with pytest.raises(ValueError, match=rf"white_level must be in \[255, 65535\], got {level}"):
            Decoding(white_level=level)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_significant_bits_of_a_png(bits: int) -> None:
    for samples, colour, expected in ((GRAY, 0, GRAY), (RGB, 2, RGB)):
        said = png_chunk(b"sBIT", bytes([bits] * (3 if colour else 1)))
        low = png(stored(samples, bits), bits=16, colour=colour, extra=said)
        agree(low, expected)
        # As the standard asks for it: scaled to all 16 bits.
        high = png(stored(samples, bits) << (16 - bits), bits=16, colour=colour, extra=said)
        agree(high, expected)
        # A damaged one is as if it were not there.
        agree(low.replace(said, said[:-1] + bytes([said[-1] ^ 1])), expected >> (16 - bits))


def test_what_the_file_states_holds() -> None:
    other = Decoding(white_level=1023)
    agree(b"P5 24 18 4095\n" + stored(GRAY, 12).astype(">u2").tobytes(), GRAY, other)
    agree(tiff(stored(GRAY, 12), bits=12, photometric=1), GRAY, other)
    agree(png(RGB, bits=8, colour=2), RGB, other)
    planes = tiff(stored(RGB, 12), bits=16, photometric=2, compression=8, planes=True)
    agree(planes, RGB >> 4)
    with pytest.raises(BadImageError, match="not supported with a white level: RGB TIFF of 3 x 16 bits"):
        decode_full(planes, Decoding(white_level=4095))


def data_set(root: Path) -> Path:
    """Two classes of 12 bits in 16, and a JPEG."""
    for key in range(8):
        path = root / f"{key % 2}" / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(stored(pixels(40, 36, key)[..., 0], 12), bits=16, colour=0))
    (root / "0" / "photo.jpg").write_bytes(encoded(picture(40, 36)))
    return root


def test_verify_counts_and_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = data_set(tmp_path / "data"), tmp_path / "out.tsv"
    assert cli.main(["data", "verify", str(root), "-o", str(out), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "8 images of 16 bits a channel, with white at 65535" in said
    assert re.search(r"8 of 8 images of 16 bits .* no value above \d+ of 65535.*pass --white-level 4095\n", said)
    assert sample_contents(Manifest.scan(root)).dark == 8
    assert recorded_decoding(out) == DEFAULT_DECODING

    assert cli.main(["data", "verify", str(root), "-o", str(out), "--workers", "0", "--white-level", "4095"]) == 0
    said = capsys.readouterr().out
    assert "8 images of 16 bits a channel, with white at 4095" in said
    assert "--white-level" not in said
    assert recorded_decoding(out) == Decoding(white_level=4095) == open_data(out).source.decoding

    assert cli.main(["data", "verify", str(root), "-o", str(out), "--workers", "0", "--white-level", "1023"]) == 0
    assert re.search(r"8 of 8 .* above their white level, up to \d+, .* --white-level 4095\n", capsys.readouterr().out)


def test_pretrain_says_so_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_set(tmp_path / "data")
    command = f"pretrain {root} --recipe pirl-small --epochs 1 --batch-size 4 --loader.workers 0 --progress off"
    command += f" --model.width 0.25 --method.num-negatives 4 --output {tmp_path / 'run'} --dry-run"
    assert cli.main(command.split()) == 0
    assert re.search(
        r"of a sample: 8 of 8 .* pass --loader.white-level 4095", " ".join(capsys.readouterr().out.split())
    )
    assert cli.main([*command.split(), "--loader.white-level", "4095"]) == 0
    assert "of a sample" not in capsys.readouterr().out
    assert cli.main([*command.split(), "--loader.white-level", "5"]) == 2
    assert "loader.white_level must be at least 255, got 5" in capsys.readouterr().err


def test_the_level_belongs_to_the_data() -> None:
    asked, known = Decoding(white_level=4095), Decoding(white_level=1023, max_pixels=10_000)
    assert combined(DEFAULT_DECODING, asked, where="x") == asked
    assert (
        combined(known, DEFAULT_DECODING, where="x") == combined(known, Decoding(white_level=1023), where="x") == known
    )
    with pytest.raises(
        ValueError, match="x was made with white level 1023, and 4095 is asked for: verify the data again"
    ):
        combined(known, asked, where="x")
    with pytest.raises(ValueError, match=r"x was made with white level 65535, and 4095 .* prepare it again"):
        combined(DEFAULT_DECODING, asked, where="x", is_final=True)


VIEWS = {"image": ViewConfig(crop=CropConfig(size=16))}


def test_all_loaders_and_evaluations_use_the_same_level(tmp_path: Path) -> None:
    root, archive = data_set(tmp_path / "data"), tmp_path / "data.beton"
    prepare_beton(root, archive, PrepareConfig(mode="raw", white_level=4095), workers=0)
    verify_images(root, workers=0, decoding=Decoding(white_level=4095))[0].save(tmp_path / "data.tsv")
    seen = {}
    for name, data, level in (
        ("pillow", root, 4095),
        ("pillow", tmp_path / "data.tsv", None),
        ("dali", root, 4095),
        ("ffcv", archive, None),
        ("ffcv", archive, 4095),
    ):
        config = LoaderConfig(name=name, workers=0, white_level=level)  # type: ignore[arg-type]
        loader = build_loader(config, views=VIEWS, batch_size=9, seed=0, manifest=open_data(data))
        batch = next(loader.epoch(0))
        seen[name, data, level] = {
            int(row): crop for row, crop in zip(batch.sample_ids, batch.crops["image"], strict=True) if row != 4
        }
        loader.close()
    first, *others = seen.values()
    assert max(int(crop.max()) for crop in first.values()) > 200
    for other in others:
        assert all((first[row].int() - other[row].int()).abs().max() <= 1 for row in first)
    with pytest.raises(ValueError, match=r"made with white level 4095, and 1023 is asked for: prepare it again"):
        build_loader(LoaderConfig(white_level=1023), views=VIEWS, batch_size=9, seed=0, manifest=open_data(archive))
    run = tmp_path / "run"
    run.mkdir()
    open_data(archive).save(run / "manifest.tsv")
    assert ImageConfig().decoding(run) == Decoding(white_level=4095)
    assert ImageConfig(white_level=1023).decoding(run) == Decoding(white_level=1023)
    assert ImageConfig().decoding(tmp_path / "weights.pt") == DEFAULT_DECODING
    manifest = Manifest.scan(root).decoded(Decoding(white_level=4095))
    ((_, images),) = ImageReader(manifest, 16)([0])
    assert images.max() > 150


def test_a_lower_pixel_limit() -> None:
    data = encoded(Image.fromarray(RGB), "PNG")
    agree(data, RGB, Decoding(max_pixels=24 * 18))
    with pytest.raises(BadImageError, match="too large: 24 x 18, at most 431 pixels"):
        open_image(data, Decoding(max_pixels=431))
    with pytest.raises(ValueError, match=r"max_pixels must be in \[64, 89478485\], got 100000000"):
        Decoding(max_pixels=100_000_000)


def test_counts() -> None:
    contents = Contents()
    assert (contents.lines(), contents.warnings("--x")) == ([], [])
    buffer = io.BytesIO()
    Image.fromarray(RGB).quantize(8).save(buffer, "GIF", save_all=True, append_images=[picture(24, 18, 1)])
    from sslfast.data.contents import facts_of

    opened = open_image(buffer.getvalue())
    decode_pixels(opened)
    contents.add(facts_of(opened))
    assert contents.lines() == ["1 image with a palette", "1 image with several pictures, of which the first is used"]

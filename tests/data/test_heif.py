"""HEIC files, with the package pillow-heif: read by the policy of all others."""

import io
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from sslfast.data import open_data, verify_images
from sslfast.data.images import BadImageError, decode_full
from sslfast.data.left_out import left_out
from tests.pictures import picture, pixels


def heic(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=-1, **options)
    return file.getvalue()


def test_other_files_are_what_they_were() -> None:
    with pytest.raises(BadImageError, match="not an image, or of a format that is not supported"):
        decode_full(b"no image")


def test_a_heic_file_is_an_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.HEIC").write_bytes(heic(picture(64, 48)))
    (tmp_path / "a" / "2.heif").write_bytes(heic(picture(64, 48))[:-600])
    (tmp_path / "a" / "3.jxl").write_bytes(b"\xff\x0a")
    manifest = open_data(tmp_path)
    assert manifest.paths == ["a/1.HEIC", "a/2.heif"]
    assert left_out(manifest.ignored)[0].startswith("1 x .jxl: pictures in formats that are not read; convert them to")
    found = decode_full(manifest.source.read(0)).astype(int)
    assert np.abs(found - pixels(64, 48)).mean() < 2
    _, bad = verify_images(tmp_path, workers=0)
    assert [path for path, _ in bad] == ["a/2.heif"]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(64, 48)
    file = io.BytesIO()
    pillow_heif.register_heif_opener()
    image.save(file, "HEIF", quality=-1, exif=exif.tobytes())
    upright = {1: lambda a: a, 3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a, -1), 8: np.rot90}[orientation]
    found = decode_full(file.getvalue()).astype(int)
    wanted = upright(pixels(64, 48))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).mean() < 2


def test_transparency_and_small_sizes_follow_the_policy() -> None:
    rgba = np.dstack([pixels(64, 48), np.full((48, 64), 0, np.uint8)])
    assert (decode_full(heic(Image.fromarray(rgba))) > 250).all()
    with pytest.raises(BadImageError, match="too small: 6 x 48, smallest side is 8"):
        decode_full(heic(picture(6, 48)))

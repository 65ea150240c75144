"""What kinds of pixels the images of a data set have, in numbers, and what looks wrong about them."""

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path, PurePath

from sslfast.data.deep import FULL
from sslfast.data.images import (
    BadImageError,
    Decoding,
    OpenImage,
    decode_pixels,
    has_transparency,
    open_image,
    quiet_pillow,
)
from sslfast.data.manifest import Manifest
from sslfast.data.source import ImageSource

_DARK = 16_383
"""Files of 16 bits a channel without a value above this one decode to the lowest quarter of the gray levels or less."""
_SAMPLED = 32
_SAMPLE_SECONDS = 2.0
_LOSSLESS = frozenset({".png", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".jp2", ".j2k"})


@dataclass
class Facts:
    """Of one decoded image."""

    kinds: tuple[str, ...] = ()
    """What the policy converted or applied."""
    peak: int | None = None
    """Of 16 bits a channel: the largest sample value."""
    white: int | None = None
    """Of 16 bits a channel: the sample value that became white."""


@dataclass
class Contents:
    """Counts over images."""

    kinds: Counter[str] = field(default_factory=Counter)
    deep: int = 0
    """Images of 16 bits a channel."""
    dark: int = 0
    """Of these, with white at 65535, those without a value above 16383."""
    dark_peak: int = 0
    """The largest sample value of those."""
    clipped: int = 0
    """Images with values above the white level."""
    clipped_peak: int = 0

    def add(self, facts: Facts) -> None:
        self.kinds.update(facts.kinds)
        if facts.peak is None or facts.white is None:
            return
        self.deep += 1
        if facts.white == FULL and facts.peak <= _DARK:
            self.dark, self.dark_peak = self.dark + 1, max(self.dark_peak, facts.peak)
        if facts.peak > facts.white:
            self.clipped, self.clipped_peak = self.clipped + 1, max(self.clipped_peak, facts.peak)

    def lines(self) -> list[str]:
        """One for each kind, the most frequent first."""
        ordered = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        return [f"{count:,} image{'s' if count != 1 else ''} {kind}" for kind, count in ordered]

    def warnings(self, option: str) -> list[str]:
        """What looks wrong, with the remedy; ``option``: the name of the option for the white level."""
        found = []
        if self.dark:
            level = max(2 ** self.dark_peak.bit_length() - 1, 255)
            found.append(
                f"{self.dark:,} of {self.deep:,} images of 16 bits a channel have no value above {self.dark_peak} of "
                f"65535, so they decode to at most {self.dark_peak >> 8} of 255: if white is {level} in them, pass "
                f"{option} {level}"
            )
        if self.clipped:
            found.append(
                f"{self.clipped:,} of {self.deep:,} images of 16 bits a channel have values above their white level, "
                f"up to {self.clipped_peak}, which all become white: if white is higher, pass {option} "
                f"{2 ** self.clipped_peak.bit_length() - 1}"
            )
        return found


def facts_of(opened: OpenImage) -> Facts:
    """Of an image that was opened and decoded."""
    image, stripped = opened.image, opened.stripped
    kinds = []
    if opened.orientation != 1:
        kinds.append("turned upright by their orientation tag")
    if image.mode in ("La", "RGBa") or has_transparency(image) or stripped.key is not None:
        kinds.append("with transparency, composited on white")
    elif image.mode in ("CMYK", "YCbCr", "HSV"):
        kinds.append(f"in {image.mode}, converted to RGB without a colour profile")
    if image.mode in ("P", "PA"):
        kinds.append("with a palette")
    if opened.white is not None:
        kinds.append(f"of 16 bits a channel, with white at {opened.white}")
    if stripped.several or (image.format in ("GIF", "AVIF") and _is_animated(image)):
        kinds.append("with several pictures, of which the first is used")
    return Facts(tuple(kinds), opened.peak, opened.white)


def inspect(source: ImageSource, row: int) -> Facts:
    """Decode an image whole. Raises BadImageError."""
    opened = open_image(source.read(row), source.decoding)
    decode_pixels(opened)
    return facts_of(opened)


def sample_contents(manifest: Manifest) -> Contents:
    """Of up to 32 images in lossless formats, evenly spread over the rows, decoded for at most 2 seconds."""
    contents = Contents()
    rows = [row for row, path in enumerate(manifest.paths) if PurePath(path).suffix.lower() in _LOSSLESS]
    if manifest.source.loader is not None:
        return contents
    end = time.monotonic() + _SAMPLE_SECONDS
    with quiet_pillow():
        for row in rows[:: max(1, -(-len(rows) // _SAMPLED))]:
            if time.monotonic() > end:
                break
            try:
                contents.add(inspect(manifest.source, row))
            except BadImageError:  # reported where the image is used
                continue
    return contents


def combined(recorded: Decoding, asked: Decoding, *, where: object, is_final: bool = False) -> Decoding:
    """How the images of a data set are decoded: as recorded with it, and as asked for where nothing is recorded.

    Args:
        recorded: in the manifest or .beton file.
        asked: by the user's options.
        where: the data, for the message.
        is_final: what is recorded was applied already.

    Raises:
        ValueError: the two contradict each other.
    """
    level, most = recorded.white_level, recorded.max_pixels
    if asked.white_level not in (None, level) and (level is not None or is_final):
        remedy = "prepare it again with this level" if is_final else "verify the data again with this level"
        raise ValueError(
            f"{where} was made with white level {level or FULL}, and {asked.white_level} is asked for: {remedy}, or "
            "leave the option out"
        )
    return Decoding(white_level=level or asked.white_level, max_pixels=asked.max_pixels or most)


def recorded_decoding(manifest: Path) -> Decoding:
    """What a manifest file records; the defaults where there is no such file."""
    values: dict[str, int] = {}
    try:
        with open(manifest, encoding="utf-8", errors="surrogateescape") as file:
            for line in takewhile(lambda line: line.startswith("#"), file):
                name, _, value = line.removeprefix("# ").strip().partition("\t")
                if name in asdict(Decoding()):
                    values[name] = int(value)
    except OSError:
        return Decoding()
    return Decoding(**values)


def _is_animated(image: object) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except (OSError, EOFError, ValueError, SyntaxError):  # a damaged second frame
        return True

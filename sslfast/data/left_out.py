"""Files that a source finds and does not use: system folders, hidden files, pictures that are not read as they are.

They are counted under a key in :attr:`Manifest.ignored`, and :func:`left_out` makes lines for the screen of the counts:

=============================== ======================================================================================
key                             what is counted
=============================== ======================================================================================
``@eaDir/``, ``._*``            system folders, and the AppleDouble files that macOS writes beside others
``.*``                          other hidden folders and pictures: their name begins with a dot
``.heic``                       files by the suffix that their name ends with; empty: without one
``.jpg_large holding JPEG``     files that are pictures by their first bytes and not by their suffix
``.json holding no label``      members of archives beside an image, without a label of it
``.cls holding labels``         members of archives with a label of none of its images
=============================== ======================================================================================
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from sslfast.data.images import FORMATS, HAS_HEIF, SUFFIXES

SYSTEM_FOLDERS = (
    # network storage: thumbnails, recycle bins, snapshots
    *("@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "@Transcode", "@sharebin", "#recycle", "#snapshot"),
    *(
        "@appstore",
        "@database",
        "@sharesnap",
        "@SynoResource",
        "Network Recycle Bin",
        "~snapshot",
        ".snapshot",
        ".snapshots",
        ".zfs",
        ".@__thumb",
        ".@upload_cache",
    ),
    # Windows, macOS, Linux, Android
    *("$RECYCLE.BIN", "RECYCLER", "RECYCLED", "System Volume Information", "__MACOSX", ".AppleDouble", ".Trashes"),
    *(".Trash", ".Spotlight-V100", ".fseventsd", ".DocumentRevisions-V100", ".TemporaryItems", "Network Trash Folder"),
    *("Temporary Items", "lost+found", "FOUND.000", "LOST.DIR", ".thumbnails", ".thumbcache"),
    # programs
    *(".ipynb_checkpoints", "__pycache__", ".git", ".svn", ".hg"),
)
"""Folders that systems and programs keep for themselves, in any letter case; also ``.Trash-N``. No data set's class has
such a name."""
_SYSTEM = re.compile(
    rf"(?:^|/)({'|'.join(map(re.escape, SYSTEM_FOLDERS))}|\.Trash-[0-9]+)/|(?:^|/)(\._)", re.IGNORECASE
)
_SPELLED = {name.lower(): name for name in SYSTEM_FOLDERS}
APPLE_DOUBLE, HIDDEN = "._*", ".*"
NO_LABEL = ".json holding no label"
NO_IMAGE = "labels"

_NOT_READ = frozenset(
    f".{name}"
    for names in (
        "heic heif heics heifs hif avci avcs avifs jxl jxr wdp hdp jpx jpf jpm jpc j2c jph jhc jls qoi bpg flif",
        "dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw 3fr fff iiq mos mrw x3f erf kdc dcr gpr raw",
        "mef rwl rwz bay cap dcs drf eip k25 ptx pxn r3d",
        "tga icb vda vst psd psb xcf kra exr hdr pfm sgi rgb rgba bw pcx ras sun dds ico icns cur svg svgz eps wmf emf",
        "pam fits fit fts wbmp xbm xpm pict pct jp2k jpg2",
        "dcm dicom svs ndpi mrxs scn vms czi apng mng jng jpeg-xl",
    )
    for name in names.split()
)
"""Suffixes of pictures in formats that are not read."""
_NO_PICTURES = frozenset(
    f".{name}"
    for names in (
        "txt csv tsv json jsonl xml yaml yml toml ini cfg md rst html htm log pdf doc docx xls xlsx cls caption id",
        "py pyc ipynb sh c h cpp js css npy npz npz pt pth pkl h5 hdf5 mat bin safetensors parquet arrow lmdb mdb db",
        "zip tar gz tgz bz2 tbz2 xz txz zst 7z rar beton tfrecord rec idx lst md5 sha1 sha256 lock part aria2",
        "mp4 avi mov mkv webm m4v mpg mpeg mp3 wav flac ogg m4a aae xmp thm dbf shp prj",
    )
    for name in names.split()
)
"""Suffixes of files that are not opened to see whether they hold a picture."""
UNPACK = {
    **dict.fromkeys((".gz", ".tgz", ".z"), "gunzip -k"),
    **dict.fromkeys((".bz2", ".tbz", ".tbz2"), "bunzip2 -k"),
    **dict.fromkeys((".xz", ".txz", ".lzma"), "unxz -k"),
    **dict.fromkeys((".zst", ".tzst"), "unzstd"),
    **dict.fromkeys((".7z", ".rar"), "7z x"),
    ".zip": "unzip",
    ".tar": "tar -xf",
}
"""Suffix of an archive -> the program that unpacks it."""
_DATABASES = frozenset({".arrow", ".lmdb", ".mdb", ".tfrecord", ".rec", ".h5", ".hdf5", ".npz", ".npy"})
SNIFFED = 132
"""Bytes at the start of a file that tell what picture it is."""
_HEADS = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"GIF8[79]a", "GIF"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"BM....\0\0\0\0....[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    (rb"(?:II[*+]\0|MM\0[*+])", "TIFF"),
    (rb"....ftypavi[fs]", "AVIF"),
    (rb"....ftyp(?:hei|hev|mif1|msf1)", "HEIF"),
    (rb"(?:\xff\x0a|\0\0\0\x0cJXL )", "JPEG XL"),
    (rb"(?:\0\0\0\x0cjP  |\xff\x4f\xff\x51)", "JPEG 2000"),
    (rb"P[1-6][ \t\r\n]+(?:#|[0-9])", "PPM"),
    (rb"8BPS", "PSD"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
    (rb".{128}DICM", "DICOM"),
)
_PICTURE_HEADS = [(re.compile(head, re.DOTALL), kind) for head, kind in _HEADS]
_READ = frozenset({"JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF", "JPEG 2000", "PPM", *(set(FORMATS) & {"AVIF", "HEIF"})})


def suffix_of(path: str) -> str:
    """In lower case, with its dot; empty where there is none."""
    return os.path.splitext(path)[1].lower()


def system_key(path: str) -> str | None:
    """The key of a relative path whose folders or name are a system's; of a folder it must end in ``/``."""
    found = _SYSTEM.search(path)
    if found is None:
        return None
    if found[2]:
        return APPLE_DOUBLE
    return f"{_SPELLED.get(found[1].lower(), found[1])}/"


def hidden_key(path: str) -> str | None:
    """:func:`system_key`, or that of another hidden file or folder; None for a path that is not hidden."""
    found = system_key(path)
    if found is not None or not (path.startswith(".") or "/." in path):
        return found
    return HIDDEN if any(part.startswith(".") and part != ".." for part in path.split("/")) else None


def listed_system_keys(paths: Sequence[str]) -> list[str | None]:
    """:func:`system_key` of paths that a list names: below the folder that is common to all, which was named on
    purpose."""
    first, last = min(paths, default="").split("/")[:-1], max(paths, default="").split("/")[:-1]
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    start = sum(len(part) + 1 for part in first[:same])
    return [system_key(path[start:]) for path in paths]


def unpack_remedy(path: Path) -> str:
    """The command that makes a compressed archive readable; empty for other files."""
    suffix = suffix_of(path.name)
    command = UNPACK.get(suffix)
    if suffix in _DATABASES:
        return f"{suffix} files are not read; write their images into a folder of class folders, or into .tar shards"
    if command is None:
        return ""
    result = "folder" if command in ("7z x", "unzip") else "file"
    return (
        f"compressed archives cannot be read at random; run `{command} {shlex.quote(str(path))}` and give the {result} "
        "that this makes"
    )


def may_be_picture(suffix: str) -> bool:
    """Whether the first bytes of a file with this suffix, which is none of a readable image, say what it is."""
    return suffix not in _NOT_READ and suffix not in _NO_PICTURES


def other_key(suffix: str, head: bytes) -> str:
    """The key of a file that is no image by its suffix; ``head``: its first ``SNIFFED`` bytes."""
    if may_be_picture(suffix):
        for pattern, kind in _PICTURE_HEADS:
            if pattern.match(head):
                return f"{suffix} holding {kind}"
    return suffix


def named_counts(ignored: Mapping[str, int]) -> str:
    """``40 x .heic, 1 x no suffix``."""
    return ", ".join(f"{count:,} x {_shown(key)}" for key, count in sorted(ignored.items()))


def left_out(ignored: Mapping[str, int]) -> list[str]:
    """What looks like pictures, or is a system's, and is not used: a line for each reason, with the remedy."""
    system, unread, renamed, packed, stores, tables, silent, orphans = {}, {}, {}, {}, {}, {}, {}, {}
    for key, count in ignored.items():
        suffix, holds, kind = key.partition(" holding ")
        if key.endswith("/") or key in (APPLE_DOUBLE, HIDDEN):
            system[key] = count
        elif key == NO_LABEL:
            silent[key] = count
        elif kind == NO_IMAGE:
            orphans[key] = count
        elif suffix in _NOT_READ or (holds and kind not in _READ):
            unread[key] = count
        elif holds:
            renamed[key] = count
        elif suffix in UNPACK:
            packed[key] = count
        elif suffix in _DATABASES:
            stores[key] = count
        elif suffix == ".parquet":
            tables[key] = count
    return [
        f"{named_counts(found)}: {why}"
        for found, why in (
            (unread, f"pictures in formats that are not read; convert them to JPEG or PNG{_plugin(unread)}"),
            (
                renamed,
                "pictures by their content, and not by their names; rename them (.jpg, .png, ...), or name them in a "
                "list (.csv, .txt), which takes any name",
            ),
            (stores, "not read; write the images in them into a folder of class folders, or into .tar shards"),
            (tables, "not read beside images or .tar shards; give them a folder of their own"),
            (packed, f"archives, which are not read inside a folder or an archive; {_unpack(packed)}"),
            (silent, "beside images, without a key label, cls, class, ... that holds one number or name"),
            (orphans, "of no image here: the names of an image and of its label begin alike, as 0.jpg and 0.cls do"),
            (system, "folders and files of the system, and hidden ones; move out what belongs to the data"),
        )
        if found
    ]


def misplaced(root: Path, ignored: Mapping[str, int]) -> list[str]:
    """What to name in place of a folder without images."""
    found = ["a .beton file is read by itself: name one of them, not their folder"] if ".beton" in ignored else []
    if (root / "checkpoints").is_dir():
        found.append("it is a run directory: name its images, or its manifest.tsv")
    return found


def _plugin(unread: Mapping[str, int]) -> str:
    """What else helps for some of the formats."""
    heif = any(key in (".heic", ".heif", ".hif") or key.endswith(" holding HEIF") for key in unread)
    return ", or pip install pillow-heif, which reads .heic and .heif" if heif and not HAS_HEIF else ""


def _unpack(packed: Mapping[str, int]) -> str:
    """What to do about archives, by their suffixes."""
    commands = (f"`{UNPACK[suffix]}` each {suffix}" for suffix in sorted(packed) if suffix != ".zip")
    return ", ".join([*(["name one .zip as DATA"] if ".zip" in packed else []), *commands])


def image_suffixes() -> str:
    """For error texts."""
    return " ".join(sorted(SUFFIXES))


def _shown(key: str) -> str:
    suffix, holds, kind = key.partition(" holding ")
    return f"{suffix or 'no suffix'}{f' ({kind})' if holds else ''}"

"""Images and annotation files with one peculiarity each, made by code, and what must happen to each of them.

`write` makes a folder of all of them. `IMAGES`, `LABELS`, `COCO` and `PANOPTIC` list them with the expected outcome:

- load: is read without a word; `size` is the (width, height) of the upright image
- warn: is read, and a warning says what is odd
- reject: ends in one error message that names the file; nothing is written, and little memory is used
- load_or_reject: either

The image of nearly all of them is `plain.jpg`, 160 x 104 pixels.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.tiny import rle_counts

HEIGHT, WIDTH = 104, 160
TRANSPOSED = {3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90}
TRANSPOSED[8] = Image.Transpose.ROTATE_270


class Entry(NamedTuple):
    """One file, relative to the folder, and what must happen to it."""

    file: str
    expect: str
    size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return self.file.split("/")[1]


def _loaded(*names, size=(WIDTH, HEIGHT)):
    return [Entry(f"images/{name}", "load", size) for name in names]


def _rejected(folder, *names):
    return [Entry(f"{folder}/{name}", "reject") for name in names]


IMAGES = [
    *_loaded("plain.jpg", "trailing_garbage.jpg", "cmyk.jpg", "gray.jpg", "progressive.jpg"),
    *_loaded(*(f"exif_orientation_{number}.jpg" for number in TRANSPOSED)),
    *_loaded("exif_corrupt.jpg", size=(HEIGHT, WIDTH)),
    *_loaded("rgb16.png", "gray16.png", "bilevel.png", "rgba_hidden_color.png"),
    *_loaded("palette_alpha.png", "palette_4bit.png", "gray_alpha.png"),
    *_loaded("tiny_1x1.png", "tiny_1x1.jpg", size=(1, 1)),
    *_loaded("strip_1x400.png", size=(1, 400)),
    *_loaded("strip_400x1.png", size=(400, 1)),
    *_loaded("odd_33x17.png", size=(33, 17)),
    *_loaded("constant_black.png", size=(96, 64)),
    *_loaded("png_named.jpg", "jpeg_named.PNG", "näme with späce 图.jpg", "animated.gif", "animated.webp"),
    *_loaded("multipage.tiff", size=(80, 60)),
    Entry("images/float_nan.tiff", "load_or_reject", (80, 60)),
    *_rejected("images", "truncated.jpg", "truncated_header.jpg", "empty.jpg", "html_error_page.jpg", "bad_crc.png"),
    *_rejected("images", "huge_header.png", "huge_header.jpg", "bomb_20000x20000.png", "directory_named.jpg"),
]
LABELS = [  # for plain.jpg, with 11 classes and 255 for ignored
    *(Entry(f"labels/{name}.png", "load") for name in ("good", "all_ignored", "palette", "ids16")),
    *_rejected("labels", "half_size.png", "transposed.png", "id_out_of_range.png", "rgb_colors.png", "lossy.jpg"),
    Entry("labels/binary_0_255.png", "warn"),  # the only class that is not 0 is the ignored one
    Entry("labels/rgba_gray_ids.png", "load_or_reject"),
]


def write(folder: Path) -> Path:
    """Write all files into a new folder."""
    for name in ("images/directory_named.jpg", "labels", "coco", "panoptic/masks"):
        (folder / name).mkdir(parents=True)
    _write_images(folder / "images")
    _write_labels(folder / "labels")
    for name, (_, content) in _coco_files().items():
        (folder / "coco" / name).write_bytes(content)
    for name, (_, document) in _panoptic_files().items():
        (folder / "panoptic" / name).write_text(json.dumps(document))
    _write_panoptic_masks(folder / "panoptic/masks")
    return folder


# Images


def _photo() -> np.ndarray:
    """Smooth colors with some noise, (HEIGHT, WIDTH, 3): compressed by JPEG as well as a photograph."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 10, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
    return np.clip(smooth + rng.integers(-3, 4, smooth.shape), 0, 255).astype(np.uint8)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, bits: int, color_type: int, data: bytes) -> bytes:
    """Return a PNG file with any header, however little `data` (a zlib stream) there is."""
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def png_of_16_bits(values: np.ndarray) -> bytes:
    """Return a PNG with the values (H, W, 3), which Pillow cannot write."""
    rows = values.astype(">u2").reshape(len(values), -1).view(np.uint8)
    filtered = np.hstack([np.zeros((len(rows), 1), dtype=np.uint8), rows])
    return _png(values.shape[1], values.shape[0], 16, 2, zlib.compress(filtered.tobytes()))


def _all_zero_stream(size: int) -> bytes:
    """Compress `size` zero bytes piece by piece."""
    compressor, piece = zlib.compressobj(1), bytes(1 << 20)
    parts = [compressor.compress(piece[: min(len(piece), size - start)]) for start in range(0, size, len(piece))]
    return b"".join([*parts, compressor.flush()])


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _write_images(folder: Path) -> None:
    photo = _photo()
    image = Image.fromarray(photo)
    gray = image.convert("L")
    image.save(folder / "plain.jpg", quality=95)
    plain = (folder / "plain.jpg").read_bytes()

    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    gray.save(folder / "gray.jpg", quality=95)
    image.save(folder / "progressive.jpg", quality=95, progressive=True)
    for number, transposed in TRANSPOSED.items():
        image.transpose(transposed).save(folder / f"exif_orientation_{number}.jpg", quality=95, exif=_exif(number))
    turned = (folder / "exif_orientation_6.jpg").read_bytes()
    entries = turned.index(b"Exif\0\0") + 14  # after the TIFF header: the number of tags, then the first tag
    (folder / "exif_corrupt.jpg").write_bytes(turned[:entries] + b"\xff" * 6 + turned[entries + 6 :])

    (folder / "rgb16.png").write_bytes(png_of_16_bits(photo.astype(np.uint16) * 257))
    Image.fromarray(np.asarray(gray, dtype=np.uint16) * 16).save(folder / "gray16.png")  # 12 of 16 bits are used
    gray.convert("1").save(folder / "bilevel.png")
    hidden = np.dstack([photo, np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)])
    hidden[:, : WIDTH // 3] = (255, 0, 255, 0)
    Image.fromarray(hidden).save(folder / "rgba_hidden_color.png")
    image.quantize(64).save(folder / "palette_alpha.png", transparency=bytes(range(0, 256, 4)))
    image.quantize(16).save(folder / "palette_4bit.png", bits=4)
    Image.merge("LA", [gray, Image.fromarray(hidden[..., 3])]).save(folder / "gray_alpha.png")

    small = {"tiny_1x1": (1, 1), "strip_1x400": (1, 400), "strip_400x1": (400, 1), "odd_33x17": (33, 17)}
    for name, size in small.items():
        image.resize(size).save(folder / f"{name}.png")
    image.resize((1, 1)).save(folder / "tiny_1x1.jpg")
    Image.new("RGB", (96, 64)).save(folder / "constant_black.png")

    frames = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("RGB", image.size)]
    for name in ("animated.gif", "animated.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=80)
    image.resize((80, 60)).save(folder / "multipage.tiff", save_all=True, append_images=[image.resize((40, 30))])
    values = np.linspace(0, 1, 60 * 80, dtype=np.float32).reshape(60, 80)
    values[10:12] = np.nan
    Image.fromarray(values).save(folder / "float_nan.tiff")

    image.save(folder / "png_named.jpg", format="PNG")
    whole = (folder / "png_named.jpg").read_bytes()
    (folder / "jpeg_named.PNG").write_bytes(plain)
    (folder / "näme with späce 图.jpg").write_bytes(plain)
    (folder / "trailing_garbage.jpg").write_bytes(plain + bytes(range(256)))
    (folder / "truncated.jpg").write_bytes(plain[: len(plain) * 3 // 5])
    (folder / "truncated_header.jpg").write_bytes(plain[:100])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "html_error_page.jpg").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>\n")
    (folder / "directory_named.jpg/keep.txt").write_text("")
    middle = len(whole) // 2
    (folder / "bad_crc.png").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])

    (folder / "huge_header.png").write_bytes(_png(60000, 60000, 8, 2, zlib.compress(bytes(1000))))
    frame = plain.index(b"\xff\xc0") + 5  # height and width, two bytes each
    (folder / "huge_header.jpg").write_bytes(plain[:frame] + struct.pack(">HH", 65500, 65500) + plain[frame + 4 :])
    bomb = _all_zero_stream(20000 * (1 + 20000 // 8))
    (folder / "bomb_20000x20000.png").write_bytes(_png(20000, 20000, 1, 0, bomb))


# Label images


def _write_labels(folder: Path) -> None:
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    ids[HEIGHT // 2 :] = 1
    ids[20:40, 20:60] = 3
    ids[-8:] = 255
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[[0, 1, 3, 255]] = (128, 64, 128), (192, 0, 64), (0, 128, 192), (224, 224, 192)
    odd = ids.copy()
    odd[60:64, 100:110] = 200
    palette = Image.frombytes("P", (WIDTH, HEIGHT), ids.tobytes())
    palette.putpalette(colors.ravel().tolist())
    images = {
        "good.png": Image.fromarray(ids),
        "half_size.png": Image.fromarray(np.ascontiguousarray(ids[::2, ::2])),
        "transposed.png": Image.fromarray(np.ascontiguousarray(ids.T)),
        "id_out_of_range.png": Image.fromarray(odd),
        "all_ignored.png": Image.fromarray(np.full_like(ids, 255)),
        "rgb_colors.png": Image.fromarray(colors[ids]),
        "palette.png": palette,
        "lossy.jpg": Image.fromarray(ids),
        "ids16.png": Image.fromarray(ids.astype(np.uint16)),
        "binary_0_255.png": Image.fromarray(np.where(ids == 3, 255, 0).astype(np.uint8)),
        "rgba_gray_ids.png": Image.fromarray(np.dstack([ids, ids, ids, np.full_like(ids, 255)])),
    }
    for name, image in images.items():
        image.save(folder / name)


# COCO instances


def _rectangle(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def _object(**changes):
    entry = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 1200.0, "bbox": [10, 10, 40, 30]}
    entry |= {"segmentation": [_rectangle(10, 10, 50, 40)], **changes}
    return {key: value for key, value in entry.items() if value is not None}


def _document(*objects, image=None, **changes):
    image = {"id": 1, "file_name": "plain.jpg", "width": WIDTH, "height": HEIGHT} | (image or {})
    document = {"info": {}, "images": [image], "annotations": list(objects or [_object()])}
    document |= {"categories": [{"id": 1, "name": "thing"}], **changes}
    return {key: value for key, value in document.items() if value is not None}


def _coco_files() -> dict[str, tuple[str, bytes]]:
    """Return the expected outcome and the bytes of each file."""
    small = {"area": 400.0, "bbox": [60, 10, 20, 20], "segmentation": [_rectangle(60, 10, 80, 30)]}
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[20:50, 30:90] = True
    runs = {"size": [HEIGHT, WIDTH], "counts": rle_counts(mask)}
    region = {"area": 1800, "bbox": [30, 20, 60, 30]}
    two_parts = {"area": 800.0, "bbox": [10, 10, 70, 20]}
    two_parts["segmentation"] = [_rectangle(10, 10, 30, 30), _rectangle(60, 10, 80, 30)]
    outside = {"bbox": [-30, -30, 80, 70], "segmentation": [_rectangle(-30, -30, 50, 40)]}
    classes = [{"id": 90, "name": "c"}, {"id": 3, "name": "a"}, {"id": 17, "name": "b"}]
    text_id = "000000000001"
    documents = {
        "good": ("load", _document()),
        "no_annotations": ("load", _document(annotations=[])),
        "no_annotations_key": ("load", _document(annotations=None)),
        "missing_image_file": ("reject", _document(image={"file_name": "not_there.jpg"})),
        "path_escape": ("reject", _document(image={"file_name": "../../outside.jpg"})),
        "wrong_image_size": ("reject", _document(image={"width": 320})),
        "unknown_category": ("reject", _document(_object(category_id=7))),
        "unknown_image_id": ("reject", _document(_object(image_id=99))),
        "duplicate_annotation_ids": ("reject", _document(_object(), _object(**small))),
        "annotation_id_zero": ("warn", _document(_object(id=0))),  # COCO's evaluator takes match 0 for none
        "sparse_category_ids": ("load", _document(_object(category_id=90), categories=classes)),
        "two_point_polygon": ("reject", _document(_object(segmentation=[[10, 10, 50, 10]]))),
        "empty_segmentation": ("reject", _document(_object(segmentation=[]))),
        "zero_area_box": ("warn", _document(_object(area=0, bbox=[10, 10, 0, 30]))),
        "polygon_outside_image": ("warn", _document(_object(**outside))),
        "self_intersecting_polygon": ("load", _document(_object(segmentation=[[10, 10, 50, 40, 50, 10, 10, 40]]))),
        "multi_part_polygon": ("load", _document(_object(**two_parts))),
        "compressed_rle": ("load", _document(_object(**region, segmentation=runs | {"counts": _compressed(mask)}))),
        "crowd_uncompressed_rle": (
            "warn",
            _document(_object(), _object(**region, id=2, iscrowd=1, segmentation=runs)),
        ),
        "rle_wrong_size": ("reject", _document(_object(segmentation=runs | {"size": [WIDTH, HEIGHT]}))),
        "string_ids": ("load_or_reject", _document(_object(image_id=text_id), image={"id": text_id})),
        "box_only": ("load_or_reject", _document(_object(segmentation=None))),
        "nan_values": ("reject", _document(_object(bbox=[float("nan"), 10, 40, 30]))),
    }
    files = {f"{name}.json": (expect, json.dumps(document).encode()) for name, (expect, document) in documents.items()}
    good = files["good.json"][1]
    return files | {"truncated.json": ("reject", good[:180]), "utf8_bom.json": ("load", b"\xef\xbb\xbf" + good)}


def _compressed(mask: np.ndarray) -> str:
    """Write the run lengths as COCO's text: six bits a character, each count less the one two before it."""
    counts = rle_counts(mask)
    text = ""
    for i, count in enumerate(counts):
        value = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | 32 if more else bits) + 48)
    return text


# COCO panoptic


def _panoptic_files() -> dict[str, tuple[str, dict]]:
    """Return the expected outcome and the document of each file."""
    top = {"id": 5, "category_id": 2, "iscrowd": 0, "area": 7520, "bbox": [0, 0, 160, 52]}
    bottom = {"id": 70000, "category_id": 3, "iscrowd": 0, "area": 8320, "bbox": [0, 52, 160, 52]}
    thing = {"id": 12, "category_id": 1, "iscrowd": 0, "area": 800, "bbox": [20, 20, 40, 20]}
    absent = {"id": 999, "category_id": 1, "iscrowd": 0, "area": 10, "bbox": [0, 0, 5, 2]}
    good = [top, bottom, thing]

    def document(segments, mask="plain.png"):
        names = {"thing": 1, "stuff": 0, "other stuff": 0}
        return {
            "images": [{"id": 1, "file_name": "plain.jpg", "width": WIDTH, "height": HEIGHT}],
            "annotations": [{"image_id": 1, "file_name": mask, "segments_info": segments}],
            "categories": [{"id": i, "name": name, "isthing": names[name]} for i, name in enumerate(names, 1)],
        }

    return {
        "good.json": ("load", document(good)),
        "two_stuff_segments_of_a_class.json": ("load_or_reject", document([top, bottom | {"category_id": 2}, thing])),
        "segment_missing_in_json.json": ("reject", document([top, bottom])),
        "segment_missing_in_png.json": ("reject", document([*good, absent])),
        "grayscale_png.json": ("reject", document([top, thing], "plain_gray.png")),  # ids above 255 are lost
        "png_missing.json": ("reject", document(good, "nope.png")),
        "crowd_segment.json": ("load", document([top, bottom, thing | {"iscrowd": 1}])),
        "all_void.json": ("load", document([], "all_void.png")),
    }


def _write_panoptic_masks(folder: Path) -> None:
    ids = np.full((HEIGHT, WIDTH), 5, dtype=np.uint32)
    ids[HEIGHT // 2 :] = 70000
    ids[20:40, 20:60] = 12
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(colors).save(folder / "plain.png")
    Image.fromarray(np.ascontiguousarray(colors[..., 0])).save(folder / "plain_gray.png")
    Image.fromarray(np.zeros_like(colors)).save(folder / "all_void.png")


COCO = [Entry(f"coco/{name}", expect) for name, (expect, _) in _coco_files().items()]
PANOPTIC = [Entry(f"panoptic/{name}", expect) for name, (expect, _) in _panoptic_files().items()]

"""The format of a dataset is detected from its layout, and the result can be opened."""

import numpy as np
import pytest
from PIL import Image

from maskwright.data.check.check import check
from maskwright.data.formats.detect import detect_format
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import DatasetError
from tests import datasets_on_disk, tiny
from tests.full_size import find, full_size

SETS = {
    "sample": ("coco_panoptic", "panoptic", {"train": 24, "val": 8}),
    "camvid": ("camvid", "semantic", {"train": 367, "val": 101, "test": 198}),
    "nuclei": ("coco_panoptic", "panoptic", {"train": 533, "val": 90}),
    "coco_instance_100": ("coco", "instance", {"train": 50, "val": 42}),
    "coco_panoptic": ("coco", "panoptic", {"val": 2}),
    "ade20k_sample": ("ade20k", "panoptic", {"train": 3}),
    "camvid_cityscapes_layout": ("cityscapes", "panoptic", {"train": 14, "val": 6}),
    "coco_instance_100/annotations/instances_val2017.json": ("coco_instance", "instance", {"val": 42}),
    "nuclei/annotations/panoptic_val.json": ("coco_panoptic", "panoptic", {"val": 90}),
}
LAYOUTS = {
    "cityscapes": (datasets_on_disk.cityscapes, datasets_on_disk.packed_cityscapes, "panoptic"),
    "ade20k": (datasets_on_disk.ade20k, datasets_on_disk.packed_ade20k, "panoptic"),
    "coco": (datasets_on_disk.coco, datasets_on_disk.packed_coco, "panoptic"),
    "mapillary": (datasets_on_disk.mapillary, datasets_on_disk.packed, "panoptic"),
    "voc": (datasets_on_disk.voc, datasets_on_disk.tarred, "panoptic"),
    "coco_stuff_10k": (datasets_on_disk.coco_stuff_10k, datasets_on_disk.packed, "semantic"),
    "yolo": (datasets_on_disk.yolo, datasets_on_disk.packed, "instance"),
}


def detected(path):
    """The first section: the task that uses most annotations."""
    return detect_format(path)[0]


def open_all(config):
    """Read the first image of each split; return their sizes."""
    sizes = {}
    for split in ("train", "val", "test"):
        if getattr(config, split) is not None:
            annotated = open_annotations(config, split)
            sizes[split] = len(annotated)
            annotated.sample(0)
    return sizes


@pytest.mark.parametrize("name", [name if name == "sample" else full_size(name) for name in SETS])
def test_real_data_set_is_detected_and_opens(name):
    config = detected(find(name))
    assert (config.format, config.task, open_all(config)) == SETS[name]


@pytest.mark.parametrize("form", LAYOUTS)
def test_published_layout_is_detected_in_a_folder_and_in_archives(tmp_path, form):
    write, pack, task = LAYOUTS[form]
    folder = write(tmp_path / "folder")
    (tmp_path / "download").mkdir()
    sizes = []
    for root in (folder, pack(folder, tmp_path / "download")):
        config = detected(root)
        assert (config.format, config.task) == (form, task)
        sizes.append(open_all(config))
    assert sizes[0] == sizes[1]
    assert set(sizes[0]) >= {"train", "val"}


def test_sample_of_the_package_is_a_panoptic_set():
    assert open_all(detected("sample")) == {"train": 24, "val": 8}


def test_classes_of_custom_label_images_are_the_values_that_occur(tmp_path):
    tiny.write_labels(tmp_path, ignored=(1,))
    config = detected(tmp_path)
    assert [entry.id for entry in config.categories] == [3, 7, 8, 20]
    assert config.ignore_values == (255,)
    assert len(open_annotations(config, "train").target(0)) == 4


def test_unreadable_label_does_not_hide_the_others(tmp_path):
    tiny.write_labels(tmp_path, ignored=(1,))
    first = min(path for path in tmp_path.rglob("*.png") if "label" in str(path.relative_to(tmp_path)))
    first.write_bytes(b"no image")
    assert detected(tmp_path).format == "label_maps"
    report = check(tmp_path, workers=1)
    assert report.images > 1
    assert [
        first.name in problem.where or first.name in problem.found
        for problem in report.problems
        if problem.severity == "error"
    ] == [True]


def test_splits_are_found_above_and_below_images_and_labels(tmp_path):
    for number, pattern in enumerate(("{}/{}", "{1}/{0}")):
        root = tmp_path / str(number)
        for split in ("train", "validation"):
            for kind in ("images", "masks"):
                folder = root / pattern.format(kind, split)
                folder.mkdir(parents=True)
                Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "a.png")
        assert open_all(detected(root)) == {"train": 1, "val": 1}


@pytest.mark.parametrize("writer", [tiny.write_panoptic, tiny.write_instances])
def test_folder_with_a_json_of_any_name_is_coco(tmp_path, writer):
    assert open_all(detected(writer(tmp_path / "set"))) == {"train": 4}
    assert open_all(detected(datasets_on_disk.pack(tmp_path / "set", tmp_path / "set.zip", "zip"))) == {"train": 4}


def test_voc_folder_of_an_annotation_tool_with_one_list_is_detected(tmp_path):
    root = datasets_on_disk.voc(tmp_path) / "VOCdevkit/VOC2012"
    lists = root / "ImageSets/Segmentation"
    (lists / "trainval.txt").rename(lists / "default.txt")
    (lists / "train.txt").unlink()
    (lists / "val.txt").unlink()
    assert open_all(detected(root)) == {"train": 5}


def test_yolo_yaml_and_tables_are_detected(tmp_path):
    datasets = pytest.importorskip("datasets")
    yolo = datasets_on_disk.yolo(tmp_path / "yolo")
    assert detected(yolo / "data.yaml").format == "yolo"
    rows = {"image": [str(path) for path in sorted((yolo / "images/train").iterdir())]}
    table = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "dict"))
    table.save_to_disk(str(tmp_path / "single"))
    (tmp_path / "hub/data").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "hub/data/train-00000-of-00001.parquet"))
    for name, has_val in {"dict": True, "single": False, "hub": False}.items():
        config = detected(tmp_path / name)
        assert (config.format, config.train is not None, config.val is not None) == ("huggingface", True, has_val)
    assert detected(tmp_path / "hub/data/train-00000-of-00001.parquet").format == "huggingface"


def test_unknown_layout_and_missing_path_are_described(tmp_path):
    (tmp_path / "stuff").mkdir()
    with pytest.raises(DatasetError, match=r"not recognized \(found: stuff, all empty\)"):
        detected(tmp_path)
    with pytest.raises(DatasetError, match="no such file"):
        detected(tmp_path / "nowhere")
    (tmp_path / "a.yaml").write_text("x: 1")
    with pytest.raises(DatasetError, match="no 'names'"):
        detected(tmp_path / "a.yaml")


def jpeg_masks(root):
    for name in ("images/a.png", "masks/a.jpg"):
        datasets_on_disk.save(root / name, np.full((4, 4, 3), 7, np.uint8))


def images_without_labels(root):
    datasets_on_disk.save(root / "images/a.png", np.zeros((4, 4, 3), np.uint8))


def broken_yaml(root):
    (root / "data.yaml").write_text("train: images\nval: images\nnames: [a, b\n")


def yaml_without_names(root):
    (root / "data.yaml").write_text("train: images\n")


def cut_json(root):
    (root / "all.json").write_text('{"images": [\n')


def json_without_its_images(root):
    images = [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 4}]
    datasets_on_disk.write(root / "all.json", images, [], [{"id": 1, "name": "x"}])


def voc_without_lists(root):
    datasets_on_disk.save(root / "SegmentationClass/a.png", np.zeros((4, 4), np.uint8))


def cityscapes_without_images(root):
    datasets_on_disk.save(root / "gtFine/train/a/a_gtFine_labelIds.png", np.zeros((4, 4), np.uint8))


def ade20k_without_annotations(root):
    (root / "objectInfo150.txt").write_text("x")


def coco_stuff_without_matlab(root):
    (root / "imageLists").mkdir()
    (root / "imageLists/train.txt").write_text("a")


def damaged_hugging_face(root):
    (root / "dataset_dict.json").write_text("{")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (jpeg_masks, r"masks/a\.jpg.*JPEG"),
        (images_without_labels, r"a folder images, but none of label images"),
        (broken_yaml, r"data\.yaml: not valid YAML, line \d"),
        (yaml_without_names, r"data\.yaml: has no 'names'"),
        (cut_json, r"all\.json: not valid JSON, line 2"),
        (json_without_its_images, r"all\.json: its images are not found, the first is a\.jpg"),
        (voc_without_lists, "SegmentationClass, but no list"),
        (cityscapes_without_images, "Cityscapes needs the folders leftImg8bit and gtFine"),
        (ade20k_without_annotations, "ADE20K needs images/training"),
        (coco_stuff_without_matlab, r"COCO-Stuff 10k needs a folder annotations with \.mat files"),
        (damaged_hugging_face, r"dataset_dict\.json is not a JSON of Hugging Face datasets"),
    ],
)
def test_layout_that_nearly_matches_is_refused_with_the_reason(tmp_path, write, reason):
    write(tmp_path)
    with pytest.raises(DatasetError, match=reason) as error:
        detect_format(tmp_path)
    assert "\n" not in str(error.value)


def test_single_json_whose_files_are_missing_names_the_first(tmp_path):
    json_without_its_images(tmp_path / "set/annotations")
    with pytest.raises(DatasetError, match=r"its images are not found, the first is a\.jpg, neither beside it"):
        detect_format(tmp_path / "set/annotations/all.json")


def test_every_format_has_a_detector():
    from maskwright.data.formats import detect

    assert {module.__module__.rpartition(".")[2] for module in detect._DETECTORS} == {
        "huggingface", "cityscapes", "ade20k", "coco_2017", "mapillary", "voc", "coco_stuff", "camvid", "yolo",
        "polygon_json", "coco_json", "unread", "detect_label_maps", "mask_files",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("LATEST.JSON", "train"),
        ("trainval.json", "train"),
        ("minival2014.json", "val"),
        ("test-dev.json", "test"),
        ("interval.json", "train"),
        ("evaluation.json", "val"),
    ],
)
def test_split_of_a_coco_json_is_a_word_of_its_name(tmp_path, name, split):
    file = tiny.write_instances(tmp_path) / "instances.json"
    file.rename(tmp_path / name)
    assert getattr(detected(tmp_path), split) is not None


def test_second_json_of_a_split_is_named(tmp_path, caplog):
    file = tiny.write_instances(tmp_path) / "instances.json"
    file.with_name("batch2.json").write_bytes(file.read_bytes())
    detected(tmp_path)
    assert "instances.json is not used, because batch2.json is the annotations of 'train' already" in caplog.text


CAMVID_COLORS = "0 0 0 background\n64 0 128 Cat\n64 192 0 Dog\n"


def write_pair(image, label, palette=None):
    """Write an image, and a label image with the values 0, 1 and 2, painted if there is a palette."""
    values = np.arange(48 * 64).reshape(48, 64) // 1100
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tiny.scene_image(0, (48, 64))).save(image)
    Image.fromarray(values.astype(np.uint8) if palette is None else np.array(palette, np.uint8)[values]).save(label)


def test_cvats_camvid_export_has_its_own_classes(tmp_path):
    palette = [[0, 0, 0], [64, 0, 128], [64, 192, 0]]
    for name in ("train", "Validation"):
        write_pair(tmp_path / f"{name}/a.png", tmp_path / f"{name}annot/a.png", palette)
    (tmp_path / "label_colors.txt").write_text(CAMVID_COLORS)
    config = detected(tmp_path)
    assert [entry.name for entry in config.categories] == ["background", "Cat", "Dog"]
    assert open_all(config) == {"train": 1, "val": 1}


def test_roboflows_masks_are_beside_their_images(tmp_path):
    for name in ("train", "valid"):
        write_pair(tmp_path / f"{name}/a_jpg.rf.1.jpg", tmp_path / f"{name}/a_jpg.rf.1_mask.png")
        (tmp_path / f"{name}/_classes.csv").write_text("Pixel Value, Class\n0, background\n1, crack\n2, spall\n")
    config = detected(tmp_path)
    assert [(entry.id, entry.name) for entry in config.categories] == [(0, "background"), (1, "crack"), (2, "spall")]
    assert open_all(config) == {"train": 1, "val": 1}


def test_images_and_masks_may_have_ends_of_their_own_in_one_folder(tmp_path):
    for number in (1, 2):
        write_pair(tmp_path / f"train/{number}_sat.jpg", tmp_path / f"train/{number}_mask.png")
    config = detected(tmp_path)
    assert (config.image_suffix, config.label_suffix) == ("_sat", "_mask")
    assert open_all(config) == {"train": 2}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("annotations.xml", "<annotations/>", "CVAT's own format; export COCO 1.0"),
        ("Annotations/a.xml", "<annotation/>", "XML files of boxes"),
        ("images/ADE/training/bar/ADE_train_00000001_seg.png", "", "full ADE20K dataset"),
        ("project.json", '[{"id": 1, "data": {}, "annotations": []}]', "Label Studio's own format"),
        ("task-1-annotation-4-by-1-tag-Cat-0.png", "", "mask of Label Studio without its image"),
        ("annotations/default.json", '{"items": [], "categories": {}}', "Datumaro's own format"),
        ("a.json", '{"item": {"name": "a.jpg"}, "annotations": []}', "V7 Darwin's own format"),
        ("a.jpg___objects.json", '{"metadata": {}, "instances": []}', "SuperAnnotate's own format"),
        ("export.ndjson", '{"data_row": {}}\n{"data_row": {}}\n', "Labelbox's own format"),
        ("p.json", '{"project": {}, "file": {}, "view": {}}', "project of VIA 3"),
        ("a.geojson", '{"type": "FeatureCollection", "features": []}', "GeoJSON"),
        ("results.json", '[{"image_id": 1, "category_id": 1, "score": 0.5}]', "COCO results file"),
        ("train.csv", "ImageId,EncodedPixels\na.jpg,1 3\n", "run lengths in a table"),
        ("masks/a.mat", "", "the folder masks has no label images, but 1 .mat"),
        ("imagesTr/a.nii", "", "the folder imagesTr has no images, but 1 .nii"),
    ],
)
def test_files_of_tools_that_are_not_read_are_named_with_the_export_that_is(tmp_path, name, content, reason):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=reason):
        detect_format(tmp_path)

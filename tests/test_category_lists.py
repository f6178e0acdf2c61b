"""Class lists: the built-in ones are complete, and every source is checked."""

import pytest

from maskwright.config.categories import category_list_names, distinct_colors, load_categories
from maskwright.config.schema import CategoryConfig
from maskwright.errors import DatasetError


@pytest.mark.parametrize(
    ("name", "count", "things", "first", "last"),
    [
        ("ade20k", 150, 100, 1, 150),
        ("camvid", 11, 3, 0, 10),
        ("cityscapes", 19, 8, 7, 33),
        ("coco_instance", 80, 80, 1, 90),
        ("coco_panoptic", 133, 80, 1, 200),
        ("coco_stuff", 171, 80, 1, 182),
        ("mapillary_vistas", 65, 37, 0, 64),
        ("nuclei", 2, 1, 1, 2),
    ],
)
def test_built_in_list_has_its_published_size(name, count, things, first, last):
    categories = load_categories(name)
    assert (len(categories), sum(category.is_thing for category in categories)) == (count, things)
    assert (categories[0].id, categories[-1].id) == (first, last)
    assert len({category.name for category in categories}) == count
    assert name in category_list_names()


def test_cityscapes_list_agrees_with_the_official_scripts():
    table = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    expected = [(row.id, row.name, row.hasInstances, row.color) for row in table if 0 <= row.trainId < 255]
    found = [(c.id, c.name, c.is_thing, c.color) for c in load_categories("cityscapes")]
    assert found == expected


def test_json_list_is_sorted_by_id_and_things_unless_it_says_otherwise():
    entries = [
        {"id": 90, "name": "c"},
        {"id": 3, "name": "a", "isthing": 0},
        {"id": 17, "name": "b", "color": [1, 2, 3]},
    ]
    categories = load_categories(None, entries)
    assert [(c.id, c.name, c.is_thing) for c in categories] == [(3, "a", False), (17, "b", True), (90, "c", True)]
    assert categories[1].color == (1, 2, 3)


def test_list_of_the_recipe_keeps_its_order_and_gets_colors():
    categories = load_categories((CategoryConfig(id=5, name="x"), CategoryConfig(id=2, name="y", is_thing=False)))
    assert [c.id for c in categories] == [5, 2]
    assert [c.color for c in categories] == distinct_colors(2)


def test_yaml_file_is_read(tmp_path):
    (tmp_path / "mine.yaml").write_text("- {id: 1, name: left}\n- {id: 2, name: right, is_thing: false}\n")
    assert [c.is_thing for c in load_categories(str(tmp_path / "mine.yaml"))] == [True, False]


def test_classes_of_one_name_are_told_apart_by_their_ids():
    assert [c.name for c in load_categories(None, [{"id": 1, "name": "screen"}, {"id": 9, "name": "screen"}])] == [
        "screen 1",
        "screen 9",
    ]


@pytest.mark.parametrize(
    ("source", "annotations", "words"),
    [
        ("camvit", None, "nearest built-in list: camvid"),
        (None, None, "set data.categories"),
        (None, [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "more than one class has the id 1"),
        (None, [{"name": "a"}], "expected an integer 'id'"),
        ((), None, "empty"),
    ],
)
def test_unusable_list_is_a_dataset_error(source, annotations, words):
    with pytest.raises(DatasetError, match=words):
        load_categories(source, annotations)


def test_malformed_yaml_names_file_and_field(tmp_path):
    (tmp_path / "bad.yaml").write_text("- {id: one, name: left}\n")
    with pytest.raises(DatasetError, match=r"bad\.yaml.*0\.id"):
        load_categories(str(tmp_path / "bad.yaml"))


def test_generated_colors_are_fixed_and_far_apart():
    colors = distinct_colors(60)
    assert colors[:10] == distinct_colors(10)
    assert len(set(colors)) == 60
    assert all(0 <= part <= 255 for color in colors for part in color)

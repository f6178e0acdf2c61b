"""Targets whose objects overlap, and padding."""

import pytest
import torch

from maskwright.structures.annotations import Target, pad_images


@pytest.fixture
def overlapping():
    """A car (label 4), a person (2) in front of it and another car, in two layers."""
    layers = torch.tensor([[[1, 1, 0, 0], [1, 1, 3, 0]], [[0, 2, 2, 0], [0, 2, 2, 0]]], dtype=torch.uint8)
    return Target(layers, torch.tensor([4, 2, 4]), torch.tensor([False, False, True]), "image", (2, 4))


def test_masks_are_whole_where_objects_overlap(overlapping):
    assert overlapping.masks.int().tolist() == [
        [[1, 1, 0, 0], [1, 1, 0, 0]],
        [[0, 1, 1, 0], [0, 1, 1, 0]],
        [[0, 0, 0, 0], [0, 0, 1, 0]],
    ]


def test_of_several_objects_the_last_labels_a_pixel(overlapping):
    assert overlapping.label_map().tolist() == [[4, 2, 2, 255], [4, 2, 4, 255]]
    assert overlapping.label_map(ignore_index=9)[0].tolist() == [4, 2, 2, 9]
    assert overlapping.labeled_pixels == 6


def test_selected_objects_keep_their_order_and_masks(overlapping):
    kept = overlapping.select(torch.tensor([False, True, True]))
    assert torch.equal(kept.masks, overlapping.masks[1:])
    assert (kept.labels.tolist(), kept.is_crowd.tolist()) == ([2, 4], [False, True])


def test_merged_classes_are_one_layer_without_crowds(overlapping):
    merged = overlapping.merge_classes()
    assert merged.labels.tolist() == [2, 4]
    assert merged.id_maps.tolist() == [[[2, 2, 1, 0], [2, 2, 2, 0]]]
    assert not merged.is_crowd.any()


def test_padding_is_right_of_and_below_each_image():
    small, large = torch.full((3, 2, 5), 7), torch.full((3, 4, 3), 8)
    images, padding = pad_images([small, large], divisor=4)
    assert images.shape == (2, 3, 4, 8)
    for number, (height, width) in enumerate([(2, 5), (4, 3)]):
        assert not padding[number, :height, :width].any()
        assert padding[number].sum() == 4 * 8 - height * width
        assert (images[number][:, padding[number]] == 0).all()
        assert (images[number, :, :height, :width] == 7 + number).all()

"""The samples of a step depend on seed, step and batch size only; their transforms on seed, epoch and index only."""

import gc
import itertools
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.config.recipe import parse_recipe
from maskwright.data.build import evaluation_loader, open_dataset, train_loader
from maskwright.data.images.load import load_image
from maskwright.data.loader import Sample, TrainingSampler, collate
from maskwright.errors import DatasetError, ImageError, RecipeError
from maskwright.structures.annotations import Target

COUNT = 7


@pytest.fixture
def folder(tmp_path):
    """Seven images of different sizes, each with one to three rectangles and a crowd."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for i in range(COUNT):
        height, width = 40 + 3 * i, 70 - 5 * i
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        for n in range(i % 3 + 2):
            x, y = 3 * n, 4 * n
            polygon = [[x, y, x + 20, y, x + 20, y + 20, x, y + 20]]
            crowd = int(n == i % 3 + 1)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": crowd, "segmentation": polygon}
            )
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    return tmp_path


def recipe(folder, *, evaluate=None, **train):
    split = {"images": "images", "annotations": "a.json"}
    augment = {"resize": "short_side", "crop_size": [32, 48], "scale_range": [0.5, 2.0], "color_jitter": True}
    values = {
        "name": "tiny",
        "model": {"backbone": "resnet18"},
        "data": {"format": "coco_instance", "root": str(folder), "task": "instance", "train": split, "val": split},
        "train": {"steps": 10, "batch_size": 4, "num_workers": 0, "augment": augment} | train,
        "evaluate": {"task": "instance"} | (evaluate or {}),
    }
    return parse_recipe(values, "tiny")


def steps(loader, count):
    return list(itertools.islice(iter(loader), count))


def refusal(kind, loader):
    """Return the message of the error in the first steps; unlike `pytest.raises` this keeps no frame alive."""
    try:
        steps(loader, 3)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def assert_same(first, second):
    assert first.keys == second.keys
    assert first.paths == second.paths
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.padding, second.padding)
    for one, other in zip(first.targets, second.targets, strict=True):
        assert torch.equal(one.id_maps, other.id_maps)
        assert torch.equal(one.labels, other.labels)


def test_every_epoch_holds_every_image_once():
    batches = itertools.islice(TrainingSampler(COUNT, 4, seed=3), 7)
    keys = [key for batch in batches for key in batch]
    for epoch in range(4):
        assert sorted(key.index for key in keys if key.epoch == epoch) == list(range(COUNT))
    assert [key.index for key in keys if key.epoch == 0] != [key.index for key in keys if key.epoch == 1]


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_and_micro_batches_split_the_same_steps(world_size, accumulation_steps):
    whole = list(itertools.islice(TrainingSampler(COUNT, 4, seed=3), 6))
    split = {"world_size": world_size, "accumulation_steps": accumulation_steps}
    micro_batches = [
        list(itertools.islice(TrainingSampler(COUNT, 4, seed=3, rank=rank, **split), 6 * accumulation_steps))
        for rank in range(world_size)
    ]
    for step in range(6):
        of_step = slice(step * accumulation_steps, (step + 1) * accumulation_steps)
        keys = [key for of_rank in micro_batches for micro_batch in of_rank[of_step] for key in micro_batch]
        assert keys == whole[step]


@pytest.mark.parametrize("start_step", [1, 2, 13])
def test_sampler_can_start_at_any_step(start_step):
    whole = list(itertools.islice(TrainingSampler(COUNT, 4, seed=3), 20))
    assert list(itertools.islice(TrainingSampler(COUNT, 4, seed=3, start_step=start_step), 5)) == whole[start_step:][:5]


def test_batch_larger_than_the_dataset_spans_epochs():
    first = next(iter(TrainingSampler(3, 8, seed=0)))
    assert [key.epoch for key in first] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_batch_that_cannot_be_split_is_refused(folder):
    with pytest.raises(RecipeError, match=r"train\.batch_size: 4 is not a multiple of 3"):
        train_loader(recipe(folder), rank=0, world_size=3)


def test_seeds_differ_and_negative_ones_work():
    orders = {tuple(next(iter(TrainingSampler(50, 50, seed=seed)))) for seed in (-1, 0, 1, 2**40)}
    assert len(orders) == 4


def test_workers_and_restarts_do_not_change_a_single_pixel(folder):
    plain = steps(train_loader(recipe(folder)), 6)
    with_workers = steps(train_loader(recipe(folder, num_workers=2)), 6)
    restarted = steps(train_loader(recipe(folder, num_workers=2), start_step=3), 3)
    for (one,), (other,) in zip(plain, with_workers, strict=True):
        assert_same(one, other)
    for (one,), (other,) in zip(plain[3:], restarted, strict=True):
        assert_same(one, other)


def test_two_processes_see_together_what_one_sees(folder):
    (whole,) = steps(train_loader(recipe(folder)), 1)[0]
    halves = [steps(train_loader(recipe(folder), rank=rank, world_size=2), 1)[0][0] for rank in range(2)]
    assert halves[0].keys + halves[1].keys == whole.keys
    for number, (half, i) in enumerate(itertools.product(halves, range(2))):
        height, width = sizes(half)[i]
        assert sizes(half)[i] == sizes(whole)[number]
        assert torch.equal(half.images[i, :, :height, :width], whole.images[number, :, :height, :width])


def test_step_is_a_list_of_micro_batches(folder):
    step = steps(train_loader(recipe(folder, gradient_accumulation_steps=2)), 1)[0]
    assert [len(batch) for batch in step] == [2, 2]


def test_loader_leaves_the_global_random_state_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps(train_loader(recipe(folder)), 2)
    list(evaluation_loader(recipe(folder)))
    assert torch.equal(torch.get_rng_state(), before)


def test_crowds_are_dropped_in_training_and_kept_in_evaluation(folder):
    for (batch,) in steps(train_loader(recipe(folder)), 3):
        assert not any(target.is_crowd.any() for target in batch.targets)
    assert all(target.is_crowd.sum() == 1 for _, target, _ in evaluation_loader(recipe(folder)))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_image_once_in_order_at_the_size_of_its_file(folder, workers):
    images = evaluation_loader(recipe(folder, num_workers=workers, evaluate={"batch_size": 2, "short_side": 32}))
    for _ in range(2):  # can be iterated again
        samples = list(images)
        assert [Path(path).name for _, _, path in samples] == [f"{i}.png" for i in range(COUNT)]
        assert len(samples) == len(images)
        for image, target, path in samples:
            assert tuple(image.shape[:2]) == target.original_size == tuple(target.id_maps.shape[1:])
            assert np.array_equal(image.numpy(), load_image(path))


def test_processes_share_the_evaluation_without_gaps_or_repeats(folder):
    shares = [evaluation_loader(recipe(folder), rank=rank, world_size=3) for rank in range(3)]
    assert [len(share) for share in shares] == [len(range(rank, COUNT, 3)) for rank in range(3)]
    paths = sorted(path for share in shares for _, _, path in share)
    assert [Path(path).name for path in paths] == [f"{i}.png" for i in range(COUNT)]


def test_evaluation_stops_at_its_limit(folder):
    assert len(list(evaluation_loader(recipe(folder, evaluate={"max_images": 3, "batch_size": 2})))) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_file_ends_as_one_line_that_names_it(folder, workers):
    (folder / "images/4.png").write_bytes(b"<html>")
    message = refusal(ImageError, train_loader(recipe(folder, num_workers=workers)))
    assert "4.png" in message
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_size_that_contradicts_the_annotation_ends_training(folder, workers):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "images/2.png")
    assert "2.png: the image has 9 x 9" in refusal(DatasetError, train_loader(recipe(folder, num_workers=workers)))


def test_empty_training_set_is_refused(folder):
    (folder / "a.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]})
    )
    with pytest.raises(DatasetError, match=r"data\.train: lists no images"):
        train_loader(recipe(folder))


def sizes(batch):
    """Return the (height, width) of each image without its padding."""
    return [(int((~padding).any(1).sum()), int((~padding).any(0).sum())) for padding in batch.padding]


@pytest.mark.parametrize("resize", [{"scale_range": [1.0, 1.0]}, {"short_sides": [64]}])
def test_samples_are_smaller_in_the_first_steps_wherever_a_run_begins(folder, resize):
    augment = {"resize": "short_side", "crop_size": [64, 96], "flip_probability": 0} | resize
    progressive = [{"until": 0.3, "size": 0.5}, {"until": 0.6, "size": 0.75}]
    configured = recipe(folder, augment=augment, progressive_resizing=progressive)
    whole = steps(train_loader(configured), 8)
    crops = [tuple(batch.images.shape[-2:]) for (batch,) in whole]
    assert crops == [(32, 64)] * 3 + [(64, 64)] * 3 + [(64, 96)] * 2
    for (batch,) in whole[:3]:
        for path, padding in zip(batch.paths, batch.padding, strict=True):
            height = 40 + 3 * int(Path(path).stem)
            shown = 32 if "short_sides" in resize else min(32, int(height / 2 + 0.5))
            assert int((~padding[:, 0]).sum()) == shown  # rows of the image, half of those in the file
    for first, second in zip(whole[4:], steps(train_loader(configured, start_step=4), 4), strict=True):
        assert_same(first[0], second[0])


def test_shares_of_steps_with_smaller_samples_must_grow(folder):
    with pytest.raises(RecipeError, match=r"phases until \[0.5, 0.5\] of the steps, expected ascending"):
        recipe(folder, progressive_resizing=[{"until": 0.5, "size": 0.5}, {"until": 0.5, "size": 0.7}])


def sample(height, width, objects=1):
    size = (height, width)
    maps = torch.zeros(1, *size, dtype=torch.int32)
    for number in range(1, objects + 1):
        maps[0, number] = number
    target = Target(maps, torch.arange(objects), torch.zeros(objects, dtype=torch.bool), height, size)
    return Sample(torch.full((3, height, width), 200, dtype=torch.uint8), target, (0, height), f"{height}.png")


def test_collate_pads_right_and_bottom_to_a_multiple_of_32():
    batch = collate([sample(30, 70), sample(33, 20, objects=3)], min_size=(40, 60))
    assert batch.images.shape == (2, 3, 64, 96)
    assert sizes(batch) == [(30, 70), (33, 20)]
    assert batch.images[0, :, :30, :70].eq(200).all()
    assert batch.images.eq(0)[batch.padding[:, None].expand_as(batch.images)].all()
    assert [tuple(target.id_maps.shape) for target in batch.targets] == [(1, 64, 96)] * 2
    assert batch.targets[1].masks.flatten(1).sum(1).tolist() == [20, 20, 20]
    assert (batch.keys, batch.paths) == ([(0, 30), (0, 33)], ["30.png", "33.png"])


def test_training_samples_are_padded_to_the_crop_whatever_they_are_batched_with():
    batch = collate([sample(30, 20)], min_size=(64, 128))
    assert batch.images.shape == (1, 3, 64, 128)
    assert batch.targets[0].id_maps.shape == (1, 64, 128)
    assert sizes(batch) == [(30, 20)]


def test_divisor_can_be_chosen():
    assert collate([sample(30, 70)], min_size=(8, 8), size_divisor=8).images.shape == (1, 3, 32, 72)


def test_forked_workers_do_not_wait_for_threads_of_the_parent(folder):
    """The parent uses torch's threads before it forks, which blocks a child that uses them as well."""
    script = textwrap.dedent(f"""
        import itertools, sys, torch
        sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
        from test_loader import recipe
        from maskwright.data.build import train_loader
        torch.set_num_threads(2)
        x = torch.randn(512, 512)
        (x @ x).sum(); torch.nn.functional.conv2d(torch.randn(8, 3, 64, 64), torch.randn(8, 3, 3, 3)).exp().sum()
        loader = train_loader(recipe({str(folder)!r}, num_workers=2))
        print(sum(len(batch) for step in itertools.islice(iter(loader), 4) for batch in step))
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "16", result.stderr


def test_sixteen_samples_per_batch_cross_from_workers_within_few_file_descriptors(folder):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        kept = steps(train_loader(recipe(folder, num_workers=2, batch_size=16)), 5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(kept) == 5


def test_open_dataset_gives_the_annotated_images_of_a_split(folder):
    annotated = open_dataset(recipe(folder), "val")
    assert len(annotated) == COUNT
    assert [category.name for category in annotated.categories] == ["x"]
    assert annotated.file(3).name.endswith("/3.png")


def test_workers_end_at_once_after_an_error(folder):
    (folder / "images/4.png").write_bytes(b"<html>")
    loader = train_loader(recipe(folder, num_workers=2))
    refusal(ImageError, loader)
    start = time.perf_counter()
    del loader
    gc.collect()
    assert time.perf_counter() - start < 4  # joining a worker that is not told to stop takes 5 seconds

"""EoMT: logits, losses and training steps of transformers' live model, published layouts there and back, annealing."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers.models.eomt_dinov3 import EomtDinov3ForUniversalSegmentation

from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.checkpoints.convert import convert
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.config.recipe import load_recipe
from maskwright.config.schema import EvaluateConfig, ModelConfig, TrainConfig
from maskwright.errors import CheckpointError, RecipeError
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.predictor import Predictor
from maskwright.inference.preprocess import prepare_whole
from maskwright.inference.sliding_window import even_starts
from maskwright.models import build_model
from maskwright.models.blocks import backbone_depths, freeze_stages
from maskwright.models.eomt import upscale_by_product
from maskwright.models.lora import LoraConfig, add_adapters
from maskwright.structures.annotations import Category
from maskwright.training import train as train_module
from maskwright.training.train import train
from tests import tiny
from tests.parity import live

CATEGORIES = tuple(Category(i, f"class {i}", i > 0, (i, 0, 0)) for i in range(3))
SIZES = {"embed_dim": 48, "depth": 4, "num_heads": 3}
REGISTERS = "vit_small_patch14_reg4_dinov2"
DINOV3 = "vit_small_patch16_dinov3_qkvb"
KINDS = {
    "dinov2": (REGISTERS, {"img_size": 64, "patch_size": 16}),
    "dinov2-gated": ("vit_giant_patch14_reg4_dinov2", {"img_size": 64, "patch_size": 16, "mlp_ratio": 256 / 48}),
    "dinov3": (DINOV3, {"mlp_ratio": 2}),
}
IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def model_of(kind, **changes):
    name, options = KINDS[kind]
    values = {"backbone": name, "backbone_options": SIZES | options, "num_queries": 7, "query_blocks": 2}
    torch.manual_seed(2)
    return build_model(ModelConfig(family="eomt", **values | changes), CATEGORIES)


def normalized(model, images):
    return (images.float() - model.pixel_mean) / model.pixel_std


def checkpoint_of(model):
    return Checkpoint(model.config, CATEGORIES, EvaluateConfig(task="panoptic", pad_size=(64, 64)), model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probability", [1.0, 0.0], ids=["masked", "unmasked"])
def test_a_folder_of_transformers_gives_its_logits(kind, probability, tmp_path):
    theirs = live.build_theirs(kind)
    theirs.attn_mask_probs.fill_(probability)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.backbone == (REGISTERS if kind == "dinov2" else KINDS[kind][0])
    with torch.no_grad():
        expected, found = theirs(normalized(ours, IMAGES)), ours(IMAGES).final
    torch.testing.assert_close(found.class_logits, expected.class_queries_logits, rtol=0, atol=5e-4)
    torch.testing.assert_close(found.mask_logits(), expected.masks_queries_logits, rtol=0, atol=5e-4)
    assert expected.masks_queries_logits.std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_models_come_back_as_they_were_from_both_layouts_and_transformers_computes_the_same(kind, tmp_path):
    ours = model_of(kind).eval()
    ours.mask_probabilities.copy_(torch.tensor([0.0, 1.0]))
    ours.load_state_dict(ours.state_dict())
    save_checkpoint(tmp_path / "ours.safetensors", checkpoint_of(ours))
    convert(tmp_path / "ours.safetensors", tmp_path / "folder", to="transformers")
    convert(tmp_path / "ours.safetensors", tmp_path / "pytorch_model.bin", to="eomt")
    for path in (tmp_path / "folder", tmp_path / "pytorch_model.bin"):
        back = read_checkpoint(path)
        built = load_model(path)
        assert back.state.keys() == ours.state_dict().keys()
        assert all(torch.equal(back.state[key], tensor) for key, tensor in ours.state_dict().items())
        if path.is_dir():
            assert [c.name for c in back.categories] == [c.name for c in CATEGORIES]
            assert back.evaluate.pad_size == (64, 64)
            with torch.no_grad():
                assert torch.equal(built(IMAGES).final.class_logits, ours(IMAGES).final.class_logits)
    kind_of = EomtDinov3ForUniversalSegmentation if kind == "dinov3" else transformers.EomtForUniversalSegmentation
    theirs = kind_of.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        found = theirs(normalized(ours, IMAGES)).class_queries_logits
        torch.testing.assert_close(found, ours(IMAGES).final.class_logits, rtol=0, atol=5e-4)


def test_the_original_computes_a_folder_of_windows_for_semantic_and_a_padded_square_otherwise(tmp_path):
    ours = model_of("dinov2")
    for task, changes in (
        ("semantic", {"short_side": 64, "window_size": (64, 64), "window_stride": "even"}),
        ("panoptic", {"short_side": 64, "max_side": 64, "pad_size": (64, 64)}),
    ):
        checkpoint = checkpoint_of(ours)
        checkpoint.evaluate = EvaluateConfig(task=task, **changes)
        save_checkpoint(tmp_path / f"{task}.safetensors", checkpoint)
        convert(tmp_path / f"{task}.safetensors", tmp_path / task, to="transformers")
        config = json.loads((tmp_path / task / "config.json").read_text())
        del config["maskwright"]  # as if somebody else had written it
        (tmp_path / task / "config.json").write_text(json.dumps(config))
        found = read_checkpoint(tmp_path / task).evaluate
        assert {key: getattr(found, key) for key in changes} == changes


DINOV3_NAMES = {"embeddings.": "patch_embed.", "layer.": "blocks.", "norm.": "norm."}


def original_dinov3(base):
    """The file that the original writes for a model with transformers' DINOv3: differences to `base`."""
    written = {}
    for key, tensor in base.state_dict().items():
        name = key.removeprefix("model.")
        start = next(start for start in DINOV3_NAMES if name.startswith(start))
        if "mask_token" not in name:
            written[f"network.encoder.backbone.{DINOV3_NAMES[start]}{name.removeprefix(start)}"] = tensor
    return written


def test_delta_weights_name_their_base_and_are_completed_by_it(tmp_path):
    settings = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
    base = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**settings, num_register_tokens=4))
    base.save_pretrained(tmp_path / "base")
    ours = model_of("dinov3")
    save_checkpoint(tmp_path / "ours.safetensors", checkpoint_of(ours))
    convert(tmp_path / "ours.safetensors", tmp_path / "whole.bin", to="eomt")
    whole = torch.load(tmp_path / "whole.bin")["state_dict"]
    backbone = original_dinov3(base)
    assert {key for key in whole if ".backbone." in key} == backbone.keys()
    delta = {key: tensor - backbone[key] if key in backbone else tensor for key, tensor in whole.items()}
    delta |= {f"network.encoder.pixel_{name}": torch.zeros(1, 3, 1, 1) for name in ("mean", "std")}
    torch.save({"state_dict": delta}, tmp_path / "delta.bin")

    with pytest.raises(CheckpointError, match=r"deltas from their base.*convert --base") as caught:
        load_model(tmp_path / "delta.bin")
    assert "\n" not in str(caught.value)
    convert(tmp_path / "delta.bin", tmp_path / "complete.safetensors", base=str(tmp_path / "base"))
    complete = read_checkpoint(tmp_path / "complete.safetensors")
    for key, tensor in ours.state_dict().items():
        if key != "mask_probabilities":
            torch.testing.assert_close(complete.state[key], tensor, rtol=0, atol=1e-6)
    assert not complete.state["mask_probabilities"].any()
    with pytest.raises(CheckpointError, match="complete, not deltas"):
        convert(tmp_path / "whole.bin", tmp_path / "again.safetensors", base=str(tmp_path / "base"))


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224"])
def test_a_network_without_tokens_is_refused(name):
    with pytest.raises(RecipeError, match=f"plain ViT, which '{name}' is not"):
        build_model(ModelConfig(family="eomt", backbone=name), CATEGORIES)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("coco-panoptic-eomt", r"needs one \[start, end\] for each of 4 blocks \(model.query_blocks\), found 1"),
        ("camvid-lite", r"is for model.family eomt; set it to \[\]"),
    ],
)
def test_mask_annealing_has_to_fit_the_model(recipe, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, ["train.mask_annealing=[[0.1, 0.3]]"])


def test_more_query_blocks_than_blocks_are_refused():
    with pytest.raises(RecipeError, match=r"query_blocks: 5, but the network has 4 blocks"):
        model_of("dinov2", query_blocks=5)


def test_blocks_with_queries_cannot_be_frozen():
    with pytest.raises(RecipeError, match=r"the last 2 process the queries.*set it to 2 or less"):
        freeze_stages(model_of("dinov2"), 3)
    freeze_stages(model_of("dinov2"), 2)


def test_layer_decay_can_spare_the_blocks_with_queries():
    model = model_of("dinov2")
    names = [f"backbone.network.blocks.{index}.attn.qkv.weight" for index in range(4)]
    assert [backbone_depths(model)[name] for name in names] == [3, 2, 1, 0]
    assert [backbone_depths(model, skip_query_blocks=True)[name] for name in names] == [3, 2, 0, 0]


def test_adapters_go_to_the_blocks_and_the_head_is_trained():
    model = model_of("dinov3")
    add_adapters(model, LoraConfig())
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"backbone", "head"}
    frozen = [name for name, p in model.named_parameters() if name.startswith("head") and not p.requires_grad]
    assert all("upscale" in name for name in frozen)
    output = model.train()(IMAGES, intermediate=True)
    loss = sum((p.class_logits.sum() + p.mask_logits().sum()) for p in [*output.intermediate, output.final])
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_windows_that_cut_patches_are_refused_also_before_training(tmp_path):
    message = r"window_size: \[60, 64\] are not multiples of the patch size 16; \[64, 64\] are the nearest"
    config = EvaluateConfig(task="semantic", window_size=(60, 64))
    with pytest.raises(RecipeError, match=message):
        Pipeline(model_of("dinov2"), config)
    recipe = eomt_recipe(tmp_path).model_copy(update={"evaluate": config})
    with pytest.raises(RecipeError, match=message):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize("name", live.CASES)
def test_logits_attention_bits_and_losses_are_those_of_transformers(name):
    assert not live.CASES[name]().failures


def test_a_crop_that_cuts_patches_is_refused(tmp_path):
    recipe = eomt_recipe(tmp_path, backbone_options=SIZES)
    with pytest.raises(RecipeError, match=r"\[64, 64\], not to multiples of the patch size 14; use multiples of 224"):
        train(recipe, tmp_path / "run")


def eomt_recipe(folder, *, steps=4, **model):
    values = tiny.values(tiny.write_panoptic(folder / "data"), train__steps=steps)
    name, options = KINDS["dinov2"]
    values["model"] = {"family": "eomt", "backbone": name, "backbone_options": SIZES | options, "num_queries": 7}
    values["model"] |= {"query_blocks": 2} | model
    values["train"] |= {"mask_annealing": [[0.25, 0.5], [0.5, 1.0]], "checkpoint_every": 1}
    values["evaluate"]["pad_size"] = [64, 64]
    return tiny.parse_recipe(values, "tiny")


def test_probabilities_fall_block_by_block_as_the_original_schedules_them():
    model = model_of("dinov2")
    found = []
    augment = {"resize": "short_side", "crop_size": (64, 64), "scale_range": (1.0, 1.0)}
    config = TrainConfig(steps=100, augment=augment, mask_annealing=((0.1, 0.5), (0.5, 0.9)))
    for step in (0, 9, 10, 30, 50, 70, 90, 99):
        model.begin_step(step, config)
        found.append(model.mask_probabilities.tolist())
    middle = 0.5**0.9
    expected = [[1, 1], [1, 1], [1, 1], [middle, 1], [0, 1], [0, middle], [0, 0], [0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_disabled_mask_shows_everything_to_its_query_and_training_draws_them():
    """With probability 0 in training, the result is that without masks; between, some queries have one."""
    model = model_of("dinov2").train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0, 0.4)
        outputs = {}
        for probability in (0.0, 0.5, 1.0):
            model.probabilities = [probability] * 2
            torch.manual_seed(0)
            outputs[probability] = model(IMAGES).final.class_logits
        model.eval().probabilities = [0.0] * 2
        unmasked = model(IMAGES).final.class_logits
    torch.testing.assert_close(outputs[0.0], unmasked)
    assert not torch.allclose(outputs[0.5], outputs[0.0], atol=1e-3)
    assert not torch.allclose(outputs[0.5], outputs[1.0], atol=1e-3)


def test_the_product_of_an_upscaling_block_is_its_transposed_convolution():
    conv = torch.nn.ConvTranspose2d(6, 6, 2, stride=2).double()
    inputs = [torch.randn(2, 6, 3, 5, dtype=torch.double, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    found, expected = upscale_by_product(conv, inputs[0]), conv(inputs[1])
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(expected)
    leaves = [(value, conv.weight, conv.bias) for value in inputs]
    gradients = [torch.autograd.grad(y, own, upstream) for y, own in zip((found, expected), leaves, strict=True)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_training_resumes_exactly_and_ends_without_masks(tmp_path, monkeypatch):
    recipe = eomt_recipe(tmp_path)
    train(recipe, tmp_path / "whole")
    folder = tmp_path / "again"
    save = train_module.save_progress

    def stop(session):
        save(session)
        if session.progress.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "save_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder)
    train(recipe, folder)
    whole, resumed = (read_checkpoint(tmp_path / name / "last.safetensors").state for name in ("whole", "again"))
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    whole = read_checkpoint(tmp_path / "whole" / "last.safetensors")
    assert whole.state["mask_probabilities"][0] == 0
    assert (
        load_model(tmp_path / "whole" / "last.safetensors").probabilities == whole.state["mask_probabilities"].tolist()
    )


@pytest.mark.parametrize(("length", "window", "starts"), [(64, 64, [0]), (65, 64, [0, 1]), (160, 64, [0, 48, 96])])
def test_windows_are_as_few_as_possible_and_evenly_spaced(length, window, starts):
    assert even_starts(length, window) == starts


@pytest.mark.parametrize("size", [(96, 200), (200, 96), (80, 80)], ids=["wide", "tall", "square"])
def test_semantic_maps_are_those_of_the_processor_of_transformers(size, tmp_path):
    theirs = live.build_theirs("dinov2")
    theirs.save_pretrained(tmp_path)
    processor = transformers.EomtImageProcessor(
        size={"shortest_edge": 64, "longest_edge": None}, do_split_image=True, do_pad=False
    )
    processor.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.evaluate_config.window_size == (64, 64)
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.stack([columns * 255 // size[1], rows * 255 // size[0], (rows + columns) % 256], -1).astype(np.uint8)
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = theirs(inputs["pixel_values"], patch_offsets=inputs["patch_offsets"])
    (expected,) = processor.post_process_semantic_segmentation(
        outputs, [size], size={"shortest_edge": 64, "longest_edge": None}
    )
    found = predict(model, image).label_map
    assert len(expected.unique()) > 1
    assert (found == expected.numpy()).mean() > 0.99  # images are resized by Pillow here, by torchvision there


def test_objects_are_those_of_an_image_padded_to_the_square_with_black():
    model = model_of("dinov2").eval()
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    square = np.zeros((64, 64, 3), dtype=np.uint8)
    square[:48] = image
    config = EvaluateConfig(task="instance", pad_size=(64, 64), top_k=20)
    padded = Pipeline(model, config)
    (progress,) = padded.predict([(prepare_whole(image, config), 0)])
    (crop,) = progress.predictions
    with torch.no_grad():
        expected = model(torch.from_numpy(square).permute(2, 0, 1)[None]).final
    assert crop.padded_size == (64, 64)
    assert crop.input_size == (48, 64)
    assert torch.equal(crop.prediction.class_logits, expected.class_logits)


def predict(model, image):
    config = model.evaluate_config
    ((result, _),) = Pipeline(model, config).segment([(prepare_whole(image, config), 0)])
    return result


@pytest.mark.slow
def test_the_service_answers_as_predict_does(tmp_path):
    pytest.importorskip("fastapi", reason="the service needs the extra `serve`")
    pytest.importorskip("psutil", reason="psutil finds the model process")
    from tests.service import Service, encoded, expected

    checkpoint = checkpoint_of(model_of("dinov2"))
    checkpoint.evaluate = EvaluateConfig(task="semantic", short_side=64, window_size=(64, 64), window_stride="even")
    save_checkpoint(tmp_path / "eomt.safetensors", checkpoint)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    service = Service(tmp_path, "--device", "cpu", models=[f"tiny={tmp_path / 'eomt.safetensors'}"])
    try:
        answer = service.segment(encoded(image)).json()
    finally:
        service.process.terminate()
        service.process.wait()
    assert answer == expected(Predictor(tmp_path / "eomt.safetensors", device="cpu"), image)
    assert answer["segments"]

"""Check the tests: apply one small mistake at a time to a copy of the package, and see whether a test notices it.

    python tests/mutants.py               all mutants, in one process; about half an hour
    python tests/mutants.py losses step   those with one of the words in their row of the table
    python tests/mutants.py --list        only check that each text is found, exactly once

A mutant is killed if a test fails; an endless loop counts as a failure. The exit status is 1 if fewer than 95 % are
killed, and 2 if the unchanged package fails its tests or a text is not found exactly once: then the table below has to
follow the code. A mutant that survives is a test to write, or a change that makes no difference; the second kind is
taken out of the table with a better one in its place.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/maskwright")
REQUIRED_SHARE = 0.95
TIMEOUT = 10  # times as long as the unchanged package takes; an endless loop is a mistake that is noticed


class Mutant(NamedTuple):
    """One mistake: a text of a file, what stands there instead, and arguments of pytest that should notice."""

    file: str
    old: str
    new: str
    tests: str


def of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    """Return the mutants of one file that the same tests should notice."""
    return [Mutant(file, old, new, tests) for old, new in changes]


LOSSES = "test_losses.py test_step.py"
RESUME = "test_train.py -k 'interrupted_anywhere or damaged_latest'"
HOSTILE = "test_hostile_weights.py -k each_message"
POSTPROCESS = "test_postprocess.py"

MUTANTS = [
    *of(
        "training/losses/criterion.py",
        LOSSES,
        ("class_weights=matched_weight + no_object_weight * unmatched", "class_weights=matched_weight + unmatched"),
        ("unmatched = queries * len(targets) - matched", "unmatched = queries * len(targets)"),
        ("weights[no_object] = self.no_object_weight", "weights[no_object] = 1.0"),
        ("topk(num_uncertain, 1, largest=False", "topk(num_uncertain, 1, largest=True"),
        ("int(self.num_points * self.oversample_ratio)", "int(self.num_points * 3.0)"),
        ("int(self.num_points * self.importance_sample_ratio)", "int(self.num_points * 0.75)"),
        ("(overlap + 1) / (probabilities.sum(1)", "overlap / (probabilities.sum(1)"),
        ('truth, reduction="none").mean(1)', 'truth, reduction="none").sum(1)'),
        ("image_labels[queries] = target.labels[objects]", "image_labels[queries] = target.labels[: len(queries)]"),
        ("min(self.ohem_pixels * len(targets), losses.numel())", "min(self.ohem_pixels, losses.numel())"),
        (
            "resized, labels, weights, ignore_index=_NO_CLASS, reduction",
            "resized, labels.clamp(min=0), weights, reduction",
        ),
        ("Matcher(class_weight, mask_weight, dice_weight,", "Matcher(class_weight, dice_weight, mask_weight,"),
        ("/ _at_least_one(normalizers.objects)", "/ _at_least_one(len(targets))"),
        ('"semantic": semantic_weight,', '"semantic": 1.0,'),
        ("pixels = normalizers.pixels  #", "pixels = normalizers.labeled_pixels  #"),
        ("num_points, replace(self.matcher, num_points=num_points)", "num_points, self.matcher"),
    ),
    *of(
        "training/losses/criterion.py",
        "test_class_balance.py",
        ("weights = class_weights[target.labels.cpu().numpy()]", "weights = class_weights"),
        ("* min(len(weights), queries) if len(weights)", "* queries if len(weights)"),
        ("torch.tensor([*self.class_weights, 1.0])", "torch.ones(no_object + 1)"),
    ),
    *of(
        "training/losses/matcher.py",
        "test_class_balance.py",
        ("if self.class_weights is not None:", "if False:"),
    ),
    *of(
        "training/losses/matcher.py",
        "test_losses.py",
        ("class_cost = -classes[:, :, target.labels]", "class_cost = classes[:, :, target.labels]"),
        ("- truth @ logits) / num_points", "+ truth @ logits) / num_points"),
        ("dice_cost = 1 - (overlap + 1) / (areas + 1)", "dice_cost = (overlap + 1) / (areas + 1)"),
        ("overlap = 2 * (truth @ probabilities)", "overlap = truth @ probabilities"),
        (
            "self.mask_weight * mask_cost + self.dice_weight * dice_cost",
            "self.dice_weight * mask_cost + self.mask_weight * dice_cost",
        ),
        ("return self.class_weight * class_cost +", "return class_cost +"),
        ("if not np.isfinite(cost).all():", "if False:"),
        ("pairs[layer::layers]", "pairs[layer :: len(costs)]"),
    ),
    *of(
        "training/losses/point_sampling.py",
        "test_losses.py",
        ("x, y = x * width - 0.5, y * height - 0.5", "x, y = x * (width - 1), y * (height - 1)"),
        ("weights = torch.where(inside, weights, 0)", "weights = weights + 0"),
        ("own_id = (objects + 1)[:, None]", "own_id = objects[:, None]"),
        ("return result[1:]", "return result[:-1]"),
        ("(points[..., axis] * size + 0.5 for", "(points[..., axis] * size for"),
        ("(0, (1 - down) * (1 - right)),", "(0, (1 - down) * right),"),
        ("return masks.new_zeros(points.shape[:2]) + masks.sum()", "return masks.new_zeros(points.shape[:2])"),
        ("mix_seeds(seed, step, *key)", "mix_seeds(seed, *key)"),
        ("hit |= ids == own_id", "pass"),
    ),
    *of(
        "training/step.py",
        "test_step.py",
        ("(criterion.total(losses)) * accelerator.num_processes)", "(criterion.total(losses)))"),
        ("round(config.num_points * scale**2)", "round(config.num_points * scale)"),
        ("oversample_ratio=config.oversample_ratio,", "oversample_ratio=3.0,"),
        ("importance_sample_ratio=config.importance_sample_ratio,", "importance_sample_ratio=0.75,"),
        ("ohem_pixels=config.ohem_pixels,", "ohem_pixels=None,"),
        ("semantic_weight=config.semantic_loss_weight,", "semantic_weight=0.4,"),
        ("dice_weight=config.dice_loss_weight,", "dice_weight=config.mask_loss_weight,"),
        ("no_object_weight=config.no_object_weight,", "no_object_weight=0.1,"),
        ('reduce(torch.stack(flat).sum(0), "sum")', 'reduce(torch.stack(flat).mean(0), "sum")'),
        ("if accelerator.num_processes == 1:", "if True:"),
        ("optimizer.zero_grad(set_to_none=True)", "pass"),
        ("config.max_grad_norm or math.inf", "math.inf"),
    ),
    *of(
        "training/step.py",
        "test_train.py -k 'interrupted_anywhere or nonfinite'",
        ("torch.manual_seed(mix_seeds(config.seed, step, *batch.keys[0]))", "batch.keys[0]"),
        ("            result.check()", "            pass"),
    ),
    *of(
        "training/nan_guard.py",
        "test_host_waits.py test_train.py -k 'host_waits or nonfinite'",
        ("return loss * (loss.detach() * 0 + 1)", "return loss"),
        ("losses)) and (self.scaled or math.isfinite(norm)):", "losses)):"),
        ("self._check_all_but(0 if now else 1)", "self._check_all_but(1)"),
        ("flag if before is None else torch.maximum(before, flag)", "flag"),
        ("if kind is None or issubclass(kind, TrainingError):", "if kind is None:"),
        ('where=f"step {step + 1}"', 'where=f"step {step}"'),
    ),
    *of(
        "training/optimizer.py",
        "test_optimizer.py test_muon.py test_training_options.py -k 'not training_options or layer_decay'",
        ("config.layer_decay ** depths.get(full_name, 0)", "config.layer_decay ** 0"),
        ("nn.Embedding)) and name not in _TABLES_AND_TOKENS", "nn.Embedding))"),
        (
            '("relative_position_bias_table", "pos_embed", "cls_token", "reg_token")',
            '("relative_position_bias_table",)',
        ),
        ("isinstance(module, (*norms, nn.Embedding))", "isinstance(module, norms)"),
        ("_OTHER_NORMS if config.decay_batch_norms else", "_OTHER_NORMS if False else"),
        ("config.warmup_factor * (1 - done) + done", "config.warmup_factor * (1 - done)"),
        ("(1 - step / config.steps) ** config.poly_power", "(1 - (step + 1) / config.steps) ** config.poly_power"),
        ("for share in config.milestones], step)", "for share in config.milestones], step + 1)"),
        ("multiplier = config.backbone_lr_multiplier * config", "multiplier = config"),
        ("config.muon_lr_multiplier if orthogonal else 1.0", "1.0"),
        ("module.groups > 1)", "module.groups > 10**6)"),
        ("if not parameter.requires_grad:", "if False:"),
    ),
    *of(
        "training/ema.py",
        "test_training_options.py",
        ("1 - min(self.decay, (1 + step) / (10 + step))", "1 - self.decay"),
        ("self.tensors[name].copy_(tensor)", "pass"),
    ),
    *of(
        "training/training_checkpoint.py",
        "test_training_checkpoint.py",
        ("not is_undamaged(tensors, header)", "False"),
        ("    if ema:", "    if False:"),
        ("optimizer.state[parameters[key]][kind] = _empty_state(parameters[key], kind, optimizer)", "pass"),
        ('if kind != "step":', "if True:"),
        ("fsdp.copy_into(tensor.detach(), self.tensors[name])", "pass"),
    ),
    *of(
        "checkpoints/checkpoint.py",
        "test_checkpoint.py",
        ("if name in header and not is_undamaged(state, header):", "if False:"),
        ("zlib.crc32(_bytes(state[key]).data, crc32)", "crc32"),
        ("int(data[:whole].view(np.uint64).sum())", "0"),
    ),
    *of(
        "checkpoints/load.py",
        "test_checkpoint.py",
        ("check_fit(model.state_dict(), checkpoint.state)", "pass"),
    ),
    *of(
        "checkpoints/load.py",
        "test_hostile_weights.py -k number",
        ("        check_finite(checkpoint.state)", "        pass"),
    ),
    *of(
        "checkpoints/readers/torch_archive.py",
        HOSTILE,
        (".set_(view).numpy()) != self.crc32:", ".set_(view).numpy()) == -1:"),
        ("entry.CRC not in (0, zlib.crc32(content))", "entry.CRC == -1"),
        ("if max(math.prod(self.size), last + 1) > capacity:", "if False:"),
    ),
    *of(
        "checkpoints/readers/torch_archive.py",
        "test_checkpoint.py",
        ("if self.start < 0 or end > self.file.nbytes():", "if self.start < 0:"),
    ),
    *of(
        "checkpoints/readers/safe_pickle.py",
        "test_checkpoint.py",
        ("if full_name not in self.allowed:", 'if full_name.startswith("os."):'),
        ('"builtins.getattr": Placeholder,', '"builtins.getattr": getattr,'),
        ("if size > _MAX_TUPLE_VALUES:", "if False:"),
    ),
    *of(
        "checkpoints/readers/safe_pickle.py",
        HOSTILE,
        ('case "BUILD" if stack[-2] == _GLOBAL:', 'case "BUILD" if False:'),
        ("if not isinstance(data, bytes):", "if isinstance(data, float):"),
    ),
    *of(
        "inference/postprocess.py",
        POSTPROCESS,
        ("inside = logits > 0", "inside = logits > 1"),
        ("(inside.sum((1, 2)) + 1e-6)", "(inside.sum((1, 2)) + 1.0)"),
        ("kept = order[scores >= score_threshold]", "kept = order[scores > score_threshold]"),
        ("areas.append(inside.sum((1, 2)))", "areas.append(inside.sum((1, 2)) + 1)"),
        ("inside = probabilities >= 0.5", "inside = probabilities >= 0.6"),
        ("every = probabilities[:, :-1].flatten()", "every = probabilities[:, 1:].flatten()"),
        ("flat // len(things), flat % len(things)", "flat % len(probabilities), flat // len(probabilities)"),
        ("(scores > object_threshold)", "(scores >= object_threshold)"),
        ("((labels != no_object) & ", "("),
        ("torch.where(better, label + start, label_map)", "torch.where(better, label, label_map)"),
    ),
    *of(
        "inference/exported/postprocess.py",
        POSTPROCESS,
        ("won / area >= overlap_threshold", "won / area > overlap_threshold"),
        ("and won / area >= ", "and visible / area >= "),
        ("                if not things[label]:", "                if things[label]:"),
        ("stuff_segments.get(label, len(segments))", "len(segments)"),
        ("table += [0, segment]", "table += [segment, segment]"),
    ),
    *of(
        "inference/blockwise_postprocess.py",
        POSTPROCESS,
        ("kept = order[scores >= score_threshold]", "kept = order[scores > score_threshold]"),
        ("(2 * queries + (lower[queries, blocks] > 0)).int()", "(2 * queries + 1).int()"),
        ("(possible.sum(0) > 1) | (possible & border).any(0)", "possible.sum(0) > 1"),
        ("inside = probabilities >= 0.5", "inside = probabilities >= 0.6"),
        ("better = value > best_before", "better = value < best_before"),
        ("(((lower >= _LOGIT_ROUNDING) & ~competing).float()", "((lower >= _LOGIT_ROUNDING).float()"),
        ("chosen.gather(1, best.flatten(1)).view_as(best)", "best"),
        ("crop.flipped, at_input)", "False, at_input)"),
        ("(probabilities * quality[position]).sort(", "probabilities.sort("),
        ("(weights @ lower).amax(0), weights @ upper", "(weights @ upper).amax(0), weights @ lower"),
    ),
    *of(
        "inference/sliding_window.py",
        "test_tiles.py",
        ("values: Tensor = self.total / self.count", "values: Tensor = self.total"),
        ("max(length - window + stride - 1, 0) // stride + 1", "max(length - window, 0) // stride + 1"),
    ),
    *of(
        "inference/test_time_augmentation.py",
        "test_pipeline.py",
        ("rows.copy_(rows.softmax(0))", "rows.copy_(rows)"),
        ("return values.flip(-1) if scores.flipped else values", "return values"),
        ("return (first + second) / 2", "return first"),
        ("same = iou[rows, columns] > _SAME_MASK", "same = iou[rows, columns] > -1"),
        ("weights = (partners >= 0) / (partners >= 0).sum(0)", "weights = (partners >= 0).float()"),
    ),
    *of(
        "evaluation/metrics/average_precision.py",
        "test_metrics.py",
        ("sizes = areas(rles) if target.areas is None else target.areas", "sizes = areas(rles)"),
        ("if target.boxes is None:", "if True:"),
        ('"iscrowd": int(crowd)', '"iscrowd": 0'),
        ('"bbox": xywh[i].tolist(),', '"bbox": xywh[0].tolist(),'),
        ("int(image_id)", "int(image_id) % 3"),
        ('("AP50", 0), ("AP75", 5)', '("AP50", 0), ("AP75", 4)'),
    ),
    *of(
        "evaluation/metrics/panoptic_quality.py",
        "test_metrics.py",
        ("match = (2 * inside > union)", "match = (2 * inside >= union)"),
        ("+ pixels - inside - void  #", "+ pixels - inside  #"),
        (" & ~crowd[:, None]", ""),
        ("crowd, result.labels)) <= pixels", "crowd, result.labels)) < pixels"),
        ("rq = ratio(tp, tp + fp / 2 + fn / 2)", "rq = ratio(tp, tp + fp + fn / 2)"),
        ("missed, false = ~crowd, pixels > 0", "missed, false = ~crowd, pixels >= 0"),
        ("self.counts += other.counts", "self.counts = other.counts"),
    ),
    *of(
        "evaluation/metrics/mean_iou.py",
        "test_metrics.py",
        ("np.append(len(confusion) - 1, labels)", "np.append(0, labels)"),
        ("iou = ratio(hits, annotated + predicted - hits)", "iou = ratio(hits, annotated + predicted)"),
        ("ratio(np.nansum(annotated * iou), annotated.sum())", "ratio(np.nansum(iou), annotated.sum())"),
        ("target = target.merge_classes()", "pass"),
    ),
    *of(
        "evaluation/metrics/cityscapes_ap.py",
        "test_cityscapes_scores.py",
        ("matched = best[:, None] > THRESHOLDS", "matched = best[:, None] >= THRESHOLDS"),
        ("np.where(ignored & ~matched, _IGNORED, _FALSE)", "np.where(ignored, _IGNORED, _FALSE)"),
        ("inside[:, 0] += overlap[:, -1]", "pass"),
    ),
    *of(
        "evaluation/metrics/cityscapes_iou.py",
        "test_cityscapes_scores.py",
        ("self.weights[own[:, 0]] / own[:, 1]", "self.weights[own[:, 0]]"),
        ("~target.is_crowd.numpy() & ", ""),
    ),
    *of(
        "structures/id_maps.py",
        "test_id_maps.py test_metrics.py",
        ("flags[grouped:].nonzero()[0] + grouped)", "flags[grouped:].nonzero()[0][:0] + grouped)"),
        ("lengths[0] += 1", "pass"),
        ("np.uint8 if count < 256 else", "np.uint8 if count < 257 else"),
        ("indices += inside & 7", "indices += inside & 3"),
        ("translation[: len(table)] = table[:256]", "translation[: len(table) - 1] = table[:255]"),
    ),
    *of(
        "structures/annotations.py",
        "test_annotations.py",
        ("for index, image in enumerate(images):", "for index, image in enumerate(images[:1]):"),
        ("id_maps=_map_ids(table, self.id_maps).amax(0, keepdim=True)", "id_maps=_map_ids(table, self.id_maps)[:1]"),
        ("torch.count_nonzero(self.id_maps.amax(0))", "torch.count_nonzero(self.id_maps)"),
        ("ids = self.id_maps.amax(0).long()", "ids = self.id_maps[0].long()"),
        ("np.where(kept, kept.cumsum(), 0)", "np.where(kept, kept.cumsum() - 1, 0)"),
        ("padding[index, : image.shape[1], : image.shape[2]] = False", "padding[index, : image.shape[1]] = False"),
    ),
    *of(
        "data/transforms.py",
        "test_transforms.py",
        ("left = round(max(height - crop[0], 0) * position)", "left = round(max(height - crop[0], 0) * 0)"),
        ("np.asarray(plane)[:, ::-1] if crop.flip else np.asarray(plane)", "np.asarray(plane)"),
        ("take(columns[::-1] if crop.flip else columns, axis=2)", "take(columns, axis=2)"),
        ("steps[0] /= 2", "pass"),
        ("(np.sum(counts, axis=0)[1:] > 0) & ~target.is_crowd.numpy()", "np.sum(counts, axis=0)[1:] > 0"),
        ("class_areas.max() < class_areas.sum()", "class_areas.max() > class_areas.sum()"),
        ("random() < self.config.flip_probability", "random() > self.config.flip_probability"),
        ("areas=None, boxes=None", "areas=target.areas, boxes=target.boxes"),
        ("short_side = min(size) * generator", "short_side = max(size) * generator"),
        ("round(part.until * config.steps)", "round(part.until * config.steps) + 1"),
    ),
    *of(
        "data/formats/coco_panoptic.py",
        "test_formats.py -k 'panoptic or void'",
        ("known = {0: 0, **numbers}", "known = {0: 1, **numbers}"),
        ("void=None if all_trained else ids == 0", "void=None"),
    ),
    *of(
        "models/masked_decoder.py",
        "test_masked_attention.py",
        ("inside | ~inside.any(-1, keepdim=True)", "inside"),
        ("current = index % len(levels)", "current = (index + 1) % len(levels)"),
    ),
]


def find_faults(mutants: list[Mutant]) -> list[str]:
    """Return what is wrong with the table: texts that are not found exactly once."""
    faults = []
    for mutant in mutants:
        count = (ROOT / PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1:
            faults.append(f"{mutant.file}: {mutant.old!r} is found {count} times, expected 1")
    return faults


class QuickTestsFirst:
    """A plugin of pytest: files and the tests within a file run by their durations in the last run that passed.

    Files are not mixed, because their fixtures may be shared by all their tests.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.before: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.now: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests."""
        of_files: dict[Path, float] = {}
        for item in items:
            of_files[item.path] = of_files.get(item.path, 0) + self.before.get(item.nodeid, 0)
        items.sort(key=lambda item: (of_files[item.path], str(item.path), self.before.get(item.nodeid, 0)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the duration of a test, its setup or its teardown."""
        self.now[report.nodeid] = self.now.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Save the durations."""
        if exitstatus == 0:
            self.file.write_text(json.dumps(self.before | self.now), encoding="utf-8")


class Copy:
    """A copy of the repository, in which mutants are applied and tests run."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "copy"
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "build"))
        self.output, self.durations = folder / "output.txt", folder / "durations.json"
        self.writes = 0
        self.seconds: dict[str, float] = {}

    def survives(self, mutant: Mutant) -> tuple[bool, str]:
        """Apply one mutant, run its tests, and undo it."""
        path = self.root / PACKAGE / mutant.file
        text = path.read_text(encoding="utf-8")
        self._write(path, text.replace(mutant.old, mutant.new))
        try:
            return self.run_tests(mutant.tests)
        finally:
            self._write(path, text)

    def run_tests(self, tests: str) -> tuple[bool, str]:
        """Run tests until the first failure; return whether all passed, and the last line that pytest prints.

        They run in a fork of this process, which has imported PyTorch already. That takes half as long.
        """
        words = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(tests)]
        if not (child := os.fork()):
            os._exit(self._run_pytest(["-q", "-x", "-p", "no:cacheprovider", *words]))
        start = time.monotonic()
        limit = TIMEOUT * self.seconds.get(tests, math.inf)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            time.sleep(0.05)
            if time.monotonic() > start + limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False, f"no end after {limit:.0f} s"
        self.seconds.setdefault(tests, time.monotonic() - start)  # the first run is that of the unchanged package
        lines = self.output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return os.waitstatus_to_exitcode(ended[1]) == 0, (failed or lines or ["no output"])[-1][:160]

    def _run_pytest(self, arguments: list[str]) -> int:
        os.setsid()
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(self.root)
        sys.path[:0] = [str(self.root), str(self.root / "src")]
        os.environ["PYTHONPATH"] = str(self.root / "src")
        try:
            return int(pytest.main(arguments, plugins=[QuickTestsFirst(self.durations)]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _write(self, path: Path, text: str) -> None:
        """Write a source file with a time of its own, or else Python might use the bytecode of another mutant."""
        path.write_text(text, encoding="utf-8")
        self.writes += 1
        os.utime(path, (self.writes, self.writes))


def _import_for_all_forks() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
    for name in ("torch", "accelerate", "timm"):
        importlib.import_module(name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Apply one mistake at a time and see whether the tests notice it.")
    parser.add_argument("words", nargs="*", help="only mutants with one of these words in their row")
    parser.add_argument("--list", action="store_true", help="only check the table")
    chosen = parser.parse_args()
    mutants = [m for m in MUTANTS if not chosen.words or any(word in " ".join(m) for word in chosen.words)]
    if faults := find_faults(mutants):
        print("\n".join(faults))
        return 2
    print(f"{len(mutants)} mutants in {len({mutant.file for mutant in mutants})} files", flush=True)
    if chosen.list:
        return 0
    _import_for_all_forks()
    survivors = []
    with tempfile.TemporaryDirectory(prefix="maskwright-mutants-") as folder:
        copy = Copy(Path(folder))
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            passed, last = copy.run_tests(tests)
            if not passed:
                print(f"the unchanged package fails {tests}: {last}")
                return 2
            print(f"{copy.seconds[tests]:.0f} s  {tests}", flush=True)
        print("the unchanged package passes", flush=True)
        for number, mutant in enumerate(mutants, 1):
            start = time.perf_counter()
            survived, last = copy.survives(mutant)
            outcome = "SURVIVED" if survived else "killed"
            survivors += [mutant] if survived else []
            seconds = time.perf_counter() - start
            name = f"{mutant.file}: {mutant.new}"
            print(f"{number}/{len(mutants)} {outcome} {seconds:.0f} s  {name}  [{last}]", flush=True)
    killed = len(mutants) - len(survivors)
    for file in dict.fromkeys(mutant.file for mutant in mutants):
        survived, count = (sum(mutant.file == file for mutant in group) for group in (survivors, mutants))
        print(f"{count - survived}/{count}  {file}")
    print(f"\n{killed} of {len(mutants)} mutants killed ({killed / len(mutants):.1%}, required {REQUIRED_SHARE:.0%})")
    for mutant in survivors:
        print(f"survived: {mutant.file}\n  - {mutant.old}\n  + {mutant.new}\n  tests: {mutant.tests}")
    return int(killed < REQUIRED_SHARE * len(mutants))


if __name__ == "__main__":
    sys.exit(main())

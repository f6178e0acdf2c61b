"""Runs with several processes, micro-batches or sharded weights learn the same as a run of one process."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import maskwright.training.train as train_module
from maskwright.checkpoints.load import load_model
from maskwright.errors import MaskwrightError, RunInterrupted
from maskwright.evaluation.evaluate import evaluate
from maskwright.runtime.device import create_accelerator, gather_objects
from maskwright.training.fsdp import read_header
from maskwright.training.setup import check_same_step
from maskwright.training.train import train
from tests import tiny
from tests.in_process import skip_reports, train_until
from tests.processes import free_port, start, start_ranks, wait
from tests.run_files import last_weights, losses, rows

WHOLE_CROPS = {
    "resize": "large_scale_jitter",
    "scale_range": [1.0, 1.5],
    "crop_size": [64, 64],
}  # no padding, however divided
SPLIT = {"train__steps": 20, "train__batch_size": 4, "train__augment": WHOLE_CROPS, "train__learning_rate": 1e-4}
SWIN = {
    "model__backbone": "swin_tiny_patch4_window7_224",
    "model__backbone_options": {"depths": [1, 1, 2, 1], "embed_dim": 24, "num_heads": [1, 1, 2, 2]},
    "train__steps": 6,
    "train__ema_decay": 0.5,
}
NORMS = {"model__backbone_norm": "batch", "train__steps": 6}
MUON = SWIN | {"train__optimizer": "muon"}
# Images 1 and 3 have no objects, and one of two processes scores three of five images.
SPARSE = {"train__steps": 6, "train__batch_size": 2, "train__check_data": False}

# Parameters whose effect a softmax over keys, or a group norm with single-channel groups, cancels. Their gradients are
# rounding errors, which Adam scales to full steps in a direction that depends on the CPU.
WITHOUT_GRADIENT = re.compile(r"_attention\.key\.bias$|input_projections\.\d+\.conv\.bias$|attn\.qkv\.bias$")


pytestmark = pytest.mark.usefixtures("quick_report")


def train_in_two(place):
    """Run all training jobs of two processes one after the other, so that the processes are started once."""
    skip_reports()
    from maskwright.cli import configure_logging

    configure_logging()
    place = Path(place)
    train(tiny.recipe(place / "data", **SPLIT), place / "plain2")
    train(tiny.recipe(place / "sparse", "instance", **SPARSE), place / "sparse2")
    for name, change in (("norms", {}), ("average", {"train__ema_decay": 0.5}), ("shards", {"train__fsdp": True})):
        train_and_save_scored_weights(tiny.recipe(place / "data", **SPLIT | NORMS | change), place / f"{name}2")
    train(tiny.recipe(place / "data", train__fsdp=True, **SPLIT | SWIN), place / "sharded2")
    train(tiny.recipe(place / "data", train__fsdp=True, **SPLIT | MUON), place / "muon2")
    preempt_after(3, tiny.recipe(place / "data", train__fsdp=True, **SPLIT | SWIN), place / "preempted2")
    engine = create_accelerator("fp32")
    dist.barrier()  # both have finished writing the folder that is copied
    if engine.is_main_process:
        shutil.copytree(place / "preempted2", place / "preempted1")
        add_damaged_checkpoint(place)
    dist.barrier()
    train(tiny.recipe(place / "data", train__fsdp=True, **SPLIT | SWIN), place / "preempted2")
    train(tiny.recipe(place / "data", train__fsdp=True, **SPLIT | SWIN), place / "whole1")  # started by one process
    recipe = tiny.recipe(place / "data", **SPLIT)
    model = load_model(place / "plain2/best.safetensors")
    rank = engine.process_index
    whole = evaluate(model, recipe).scores
    share = evaluate(model, recipe, rank=rank, world=2, gather=lambda item: gather_objects(engine, item)).scores
    assert whole == share
    with pytest.raises(MaskwrightError, match="process 0 would resume from step 0, but process 1 from step 1; put"):
        check_same_step(engine, rank, place)
    hang_in_one(place, engine)


def train_and_save_scored_weights(recipe, run):
    """Train, and save the weights that each process scores last."""
    real = train_module.evaluate

    def wrapped(model, *arguments, **options):
        torch.save(model.state_dict(), run / f"scored{dist.get_rank()}")
        return real(model, *arguments, **options)

    train_module.evaluate = wrapped
    train(recipe, run)
    train_module.evaluate = real


def preempt_after(step, recipe, run):
    """Send SIGTERM to one process in a given step; all processes stop after the next step."""
    real = train_module.train_step

    def wrapped(*arguments):
        if arguments[-1] == step - 1 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    train_module.train_step = wrapped
    try:
        train(recipe, run)
    except RunInterrupted:
        return
    finally:
        train_module.train_step = real
    raise AssertionError("the run was not stopped")


def add_damaged_checkpoint(place):
    """Add a later sharded checkpoint with one wrong byte."""
    shutil.copytree(place / "preempted2/checkpoints/00000004", place / "preempted2/checkpoints/00000005")
    file = next((place / "preempted2/checkpoints/00000005").glob("__1_*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def hang_in_one(place, engine):
    """Make one process sleep in a step while the other waits for it."""
    real = train_module.train_step

    def wrapped(*arguments):
        if arguments[-1] == 1 and engine.process_index == 1:
            time.sleep(2.5)
        return real(*arguments)

    train_module.train_step = wrapped
    train(tiny.recipe(place / "data", val=False, train__steps=2, train__hang_timeout_seconds=1), place / "stalled")
    train_module.train_step = real


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the runs of two processes and their output."""
    place = tmp_path_factory.mktemp("two")
    tiny.write_panoptic(place / "data", count=5)
    tiny.write_instances(place / "sparse", count=5, empty=(1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskwright.training.report.curves", lambda log, file: file.write_text("curves"))
        patch.setattr("maskwright.training.report.report", lambda run, file, **content: file.write_text(str(content)))
        torch.set_num_threads(1)
        train_until(
            2, tiny.recipe(place / "data", **SPLIT | SWIN | {"train__checkpoint_every": 2}), place / "whole1", patch
        )
        processes = start_ranks(train_in_two, str(place), world=2, output=place / "out")
        train(tiny.recipe(place / "data", **SPLIT), place / "plain1")
        train(tiny.recipe(place / "data", train__gradient_accumulation_steps=2, **SPLIT), place / "parts")
        train(tiny.recipe(place / "sparse", "instance", **SPARSE), place / "sparse1")
        train(tiny.recipe(place / "data", **SPLIT | SWIN), place / "swin1")
        train(tiny.recipe(place / "data", **SPLIT | MUON), place / "muon1")
    printed = lambda: "\n".join((place / f"out{rank}").read_text() for rank in range(2))  # noqa: E731
    assert wait(*processes) == [0, 0], printed()
    return place


def gradient_norms(run):
    """Read the norms before clipping, which show a wrong scale of the gradients; AdamW's weights do not."""
    return torch.tensor([row["gradient_norm"] for row in rows(run) if "gradient_norm" in row], dtype=torch.float64)


def assert_close_runs(one, other, atol=1e-4):
    torch.testing.assert_close(losses(one), losses(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_norms(one), gradient_norms(other), rtol=1e-3, atol=1e-5)
    first, second = last_weights(one), last_weights(other)
    for key in first:
        if not WITHOUT_GRADIENT.search(key):
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize(
    ("one", "other"),
    [("plain1", "parts"), ("plain1", "plain2"), ("sparse1", "sparse2"), ("swin1", "sharded2"), ("muon1", "muon2")],
    ids=["two micro-batches", "two processes", "no objects in one of them", "sharded Swin with EMA", "Muon"],
)
def test_split_run_has_the_losses_and_weights_of_the_whole_one(place, one, other):
    assert_close_runs(place / one, place / other)
    alone, together = (rows(place / name)[-1]["evaluation"] for name in (one, other))
    assert together["images"] == alone["images"] == 5
    assert together == pytest.approx(alone, abs=0.02)  # weights differ by rounding; the split scored is the same


@pytest.mark.parametrize("name", ["norms2", "average2", "shards2"])
def test_all_processes_score_with_the_exported_statistics(place, name):
    """Each process has running statistics of its own images; those of the first are exported."""
    kept = load_model(place / name / "last.safetensors").state_dict()
    for rank in range(2):
        scored = torch.load(place / name / f"scored{rank}")
        statistics = [key for key in kept if "running" in key]
        assert statistics
        assert all(torch.equal(scored[key], kept[key]) for key in statistics)


def test_only_the_main_process_logs(place):
    first, second = ((place / f"out{rank}").read_text() for rank in range(2))
    assert "step 20/20  loss" in first
    assert not [line for line in second.split("process 1: no progress")[0].splitlines() if "maskwright" in line]
    assert "loss" not in second.split("process 1: no progress")[0]


def test_hang_prints_the_stacks_of_all_processes(place):
    for rank, culprit in ((0, "step_normalizers"), (1, "in wrapped")):
        assert f"process {rank}: no progress for 1 s" in (place / f"out{rank}").read_text()
        stacks = (place / f"stalled/stalls/rank-{rank}.txt").read_text()
        assert culprit in stacks


def test_sharded_checkpoint_resumes_in_two_processes_and_in_one(place):
    assert (
        "00000005: damaged: __1_0.distcp has changed since it was written; trying the checkpoint"
        in (place / "out0").read_text()
    )
    assert read_header(place / "preempted2/checkpoints/00000006")["format"] == "maskwright-training-2"
    assert_close_runs(place / "preempted2", place / "sharded2", atol=0)
    train(tiny.recipe(place / "data", **SPLIT | SWIN), place / "preempted1")
    assert_close_runs(place / "preempted1", place / "swin1")


def test_plain_checkpoint_resumes_sharded(place):
    assert {path.name for path in (place / "whole1/checkpoints").iterdir()} == {"00000004", "00000006"}
    assert "resuming from step 2/6" in (place / "out0").read_text()
    assert_close_runs(place / "whole1", place / "swin1")


def test_fsdp_with_one_process_is_refused(place, tmp_path):
    with pytest.raises(MaskwrightError, match=r"there is one; start several with torchrun, or set train\.fsdp=false"):
        train(tiny.recipe(place / "data", train__fsdp=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def alone_of_two():
    """Start accelerate with WORLD_SIZE=2 but without a process group."""
    import maskwright.runtime.device as device

    device.default_device = lambda: torch.device("meta")  # like an accelerator that accelerate does not know
    try:
        create_accelerator("fp32")
    except MaskwrightError as error:
        print(f"error: {error}")


def test_several_processes_without_a_group_are_an_error(tmp_path):
    process = start(alone_of_two, output=tmp_path / "out", environment={"WORLD_SIZE": "2"})
    wait(process)
    assert "error: WORLD_SIZE is 2, but the processes form no group: each would train" in (tmp_path / "out").read_text()


def run_torchrun(arguments):
    """Run `torchrun` in this process; it starts new processes for the ranks."""
    from torch.distributed.run import main

    main(arguments)


def test_torchrun_restarts_a_run_whose_process_died_and_it_resumes(tmp_path):
    folder = tiny.write_panoptic(tmp_path / "data", count=5)
    changes = SPLIT | {"train__steps": 6, "train__checkpoint_every": 2}
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    tiny.write_recipe(recipe, folder, **changes)
    launch = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    command = ["-m", "tests.dying_rank", "train", str(recipe), "--output", str(run)]
    process = start(run_torchrun, [*launch, *command], output=tmp_path / "out")
    assert wait(process, seconds=600) == [0], (tmp_path / "out").read_text()
    printed = (tmp_path / "out").read_text()
    assert "resuming from step 4/6" in printed
    assert [row["step"] for row in rows(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    train(tiny.recipe(folder, **changes), tmp_path / "one")
    assert_close_runs(run, tmp_path / "one")


@pytest.mark.slow
def test_accelerate_launch_equals_torchrun(place, tmp_path):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    tiny.write_recipe(recipe, place / "data", **SPLIT)
    launch = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [*launch, f"--main_process_port={free_port()}", "-m", "maskwright", "train", str(recipe)]
    process = start(run_accelerate, [*command, "--output", str(run)], output=tmp_path / "out")
    assert wait(process, seconds=600) == [0], (tmp_path / "out").read_text()
    assert_close_runs(run, place / "plain2")  # accelerate chooses the number of threads


def run_accelerate(arguments):
    import sys

    from accelerate.commands.accelerate_cli import main

    sys.argv = ["accelerate", "launch", *arguments]
    main()

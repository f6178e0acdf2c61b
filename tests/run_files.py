"""Read the files of a run."""

import json

import safetensors.torch
import torch

CLOCKS = ("seconds", "images_per_second", "data_wait", "memory_gb")  # keys of a log row that differ between runs


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def history(run):
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows(run)]


def losses(run):
    return torch.tensor([row["loss"] for row in rows(run) if "loss" in row], dtype=torch.float64)


def last_weights(run):
    return safetensors.torch.load_file(run / "last.safetensors")


def steps_kept(run):
    return [int(path.stem) for path in sorted((run / "checkpoints").iterdir())]


def partial_files(run):
    return [path for path in run.rglob("*") if path.name.endswith(".partial")]


def assert_same_run(one, other):
    assert history(one) == history(other)
    first, second = last_weights(one), last_weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    newest = sorted((one / "checkpoints").iterdir())[-1]
    first, second = (safetensors.torch.load_file(run / "checkpoints" / newest.name) for run in (one, other))
    assert all(torch.equal(first[key], second[key]) for key in first)

"""Commands and trainings that run in the process of the test."""

import sys

import pytest

import maskwright.training.train as train_module
from maskwright.cli import main


def run_command(monkeypatch, capsys, *arguments):
    """Run `maskwright` with arguments; return its exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["maskwright", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    output = capsys.readouterr()
    return status, output.out, output.err


def train_until(step, recipe, run, monkeypatch):
    """Train and stop with Ctrl-C in the step after `step`, whose checkpoint is kept."""
    real = train_module.train_step

    def wrapped(*arguments):
        if arguments[-1] == step:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", wrapped)
        with pytest.raises(KeyboardInterrupt):
            train_module.train(recipe, run)


def skip_reports(replace=setattr):
    """Replace the curves and the report of a run, which take longer than a small training."""
    replace(train_module.report, "curves", lambda log, file: file.write_text("curves"))
    replace(train_module.report, "report", lambda run, file, **content: file.write_text(str(content)))

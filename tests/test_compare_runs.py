"""`maskwright compare` and `maskwright plot`: errors worked out by hand, exit status, and the plots are written."""

import json
import math
import subprocess
import sys

import PIL.Image
import pytest

from maskwright.diagnostics.compare_runs import compare
from maskwright.errors import MaskwrightError
from maskwright.training.curves import comparison_figure, name_runs, runs_figure
from maskwright.training.read_logs import TrainingLog, read_log
from tests.test_read_logs import detectron2_row, mmengine_row, write


def log(losses, **terms):
    rows = [{"step": step, "loss": loss, **{key: terms[key][step] for key in terms}} for step, loss in losses.items()]
    return TrainingLog("log", "maskwright", rows)


def run(*arguments):
    command = [sys.executable, "-m", "maskwright", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_errors_are_means_over_the_common_steps():
    found = compare(log({10: 4.0, 20: 2.0, 30: 9.0}), log({5: 1.0, 10: 5.0, 20: 2.5, 40: 1.0}))
    assert found.steps == [10, 20]
    assert found.loss.relative == pytest.approx((1 / 5 + 0.5 / 2.5) / 2)
    assert found.loss.absolute == pytest.approx((1 + 0.5) / 2)
    assert "over 2 common steps, 10 to 20" in found.verdict()


def test_errors_of_different_signs_do_not_cancel():
    found = compare(log({1: 1.1, 2: 0.9}), log({1: 1.0, 2: 1.0}))
    assert found.loss.relative == pytest.approx(0.1)
    assert not found.passes


@pytest.mark.parametrize(
    ("ours", "theirs", "limits", "passes"),
    [
        (1.05, 1.0, (0.0501, 0.0002), True),  # relative alone
        (0.0003, 0.0001, (0.05, 0.0002), True),  # absolute alone
        (1.06, 1.0, (0.05, 0.0002), False),
        (1.06, 1.0, (0.07, 0.0), True),
        (2.0, 2.0, (0.0, 0.0), True),
        (0.0, 0.0, (0.05, 0.0), True),
        (0.1, 0.0, (0.05, 0.0), False),
    ],
)
def test_either_limit_suffices(ours, theirs, limits, passes):
    assert compare(log({1: ours}), log({1: theirs}), *limits).passes is passes


def test_terms_that_both_logs_have_are_compared_too():
    found = compare(log({1: 3.0}, loss_class={1: 2.0}, loss_mask={1: 1.0}), log({1: 3.0}, loss_class={1: 1.0}))
    assert {name: errors.absolute for name, errors in found.terms.items()} == {"class": 1.0}


def test_a_loss_that_is_not_finite_is_no_comparison():
    with pytest.raises(MaskwrightError, match="loss of step 0 is nan"):
        compare(log({0: 1.0, 1: 1.0}), log({0: math.nan, 1: 1.0}))
    assert compare(log({0: math.inf, 1: 1.0}), log({1: 1.0})).passes  # where only one of them was there


def test_logs_without_a_common_step_are_told_with_their_spans():
    with pytest.raises(MaskwrightError, match="no step is in both logs: 1 to 3 of log and 2 to 4 of log"):
        compare(log({1: 1.0, 3: 1.0}), log({2: 1.0, 4: 1.0}))


def test_a_run_of_ours_against_logs_of_others_from_the_command_line(tmp_path):
    ours = write(
        tmp_path / "ours/log.jsonl", [{"step": s, "loss": 9 / s, "loss_class": 3 / s} for s in range(5, 101, 5)]
    )
    write(tmp_path / "theirs/metrics.json", [detectron2_row(s - 1, 9.18 / s) for s in range(20, 101, 20)])
    done = run("compare", tmp_path / "ours", tmp_path / "theirs", "--plot", tmp_path / "both.png")
    assert done.returncode == 0, done.stderr
    assert "passes: over 5 common steps, 20 to 100, mean relative error 0.0196" in done.stdout
    assert done.stdout.splitlines()[2].split() == ["class", "0.0196", "0.00137"]
    assert PIL.Image.open(tmp_path / "both.png").width > 800

    write(tmp_path / "far.json", [mmengine_row(s, 12 / s) for s in (50, 100)])
    done = run("compare", ours, tmp_path / "far.json", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["loss"] == pytest.approx({"relative": 0.25, "absolute": 0.045})
    assert run("compare", ours, tmp_path / "far.json", "--relative", 0.3).returncode == 0

    (tmp_path / "log.txt").write_text("step 7 of 9: loss 3.5\n")
    done = run("compare", ours, tmp_path / "log.txt", "--pattern", r"step (?P<step>\d+) .* loss (?P<loss>[\d.]+)")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: no step is in both logs: 5 to 100 of {ours} and 7 to 7 of {tmp_path / 'log.txt'}; "
        "log at the same interval in both runs\n"
    )


def test_several_runs_are_plotted_in_one_figure(tmp_path):
    score = {"step": 40, "evaluation": {"PQ": 0.3, "images": 8}}
    for name, scale in (("a", 9), ("b", 5)):
        write(tmp_path / name / "log.jsonl", [*({"step": s, "loss": scale / s} for s in range(1, 41)), score])
    write(tmp_path / "d2/metrics.json", [detectron2_row(s - 1, 7 / s) for s in range(2, 41, 2)])
    done = run("plot", *(tmp_path / name for name in ("a", "b", "d2")), "--output", tmp_path / "new/curves.png")
    assert (done.returncode, done.stdout) == (0, f"Curves: {tmp_path / 'new/curves.png'}\n"), done.stderr
    assert PIL.Image.open(tmp_path / "new/curves.png").width > 800

    figure = runs_figure([read_log(tmp_path / name) for name in ("a", "b", "d2")], smoothing=1)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["Loss", "Loss: class", "Loss: dice", "Loss: mask", "Learning rate", "PQ (%)"]
    raw = figure.axes[0].lines[0].get_xydata().tolist()
    assert raw == [[step, 9 / step] for step in range(1, 41)]
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b", "d2"]


def test_nothing_to_plot_is_a_mistake():
    done = run("plot")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nothing to plot")


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    files = [tmp_path / name for name in ("a/run/log.jsonl", "b/run/log.jsonl", "b/other")]
    assert name_runs(files) == ["a/run", "b/run", "b/other"]
    assert name_runs(files[1:]) == ["run", "other"]
    assert name_runs([files[0], files[0].parent]) == ["run", "run"]


def test_the_comparison_is_drawn_as_it_was_computed(tmp_path):
    a, b = (
        read_log(write(tmp_path / name, [{"step": s, "loss": x / s} for s in (1, 2)]))
        for name, x in (("a", 3), ("b", 2))
    )
    figure = comparison_figure(a, b, compare(a, b).relative_by_step, 0.05)
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.5]]

"""Reading training logs: our own, those of other libraries, and plain text."""

import json
import logging

import pytest

from maskwright.errors import MaskwrightError
from maskwright.training.read_logs import find_logs, read_log, read_merged_rows


def write(path, rows, tail=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def detectron2_row(iteration, total):
    layers = {f"loss_{term}{layer}": total / 9 for term in ("ce", "mask", "dice") for layer in ("", "_0", "_1")}
    return {"data_time": 0.01, "eta_seconds": 9.5, "iteration": iteration, "lr": 1e-4, "total_loss": total, **layers}


def mmengine_row(step, loss, **more):
    layers = {
        f"decode.{layer}loss_{term}": loss / 9 for term in ("cls", "mask", "dice") for layer in ("", "d0.", "d1.")
    }
    return {"lr": 1e-4, "grad_norm": 7.0, "loss": loss, **layers, "time": 0.5, **more, "iter": step, "step": step}


# Ours


def test_our_log_is_read_from_its_file_or_its_folder(tmp_path):
    rows = [{"step": 0, "start": ["at random"]}, {"step": 1, "loss": 2.0, "loss_class": 0.5, "learning_rate": 1e-4}]
    file = write(tmp_path / "run/log.jsonl", rows)
    for source in (file, file.parent):
        log = read_log(source)
        assert (log.layout, log.source, log.rows) == ("maskwright", source, rows)
        assert log.series() == {1: 2.0}
        assert log.series("loss_class") == {1: 0.5}


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    file = write(tmp_path / "log.jsonl", [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 1, "loss": 3.0}])
    assert read_merged_rows(file) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 4.0}]


def test_a_last_line_that_is_still_being_written_is_skipped_silently(tmp_path, caplog):
    file = write(tmp_path / "log.jsonl", [{"step": 1, "loss": 2.0}], tail='{"step": 2, "lo')
    with caplog.at_level(logging.WARNING):
        assert read_log(file).series() == {1: 2.0}
    assert not caplog.records


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"loss": 3.0}', '{"step": "two"}', "\udcff\x00"])
def test_any_other_broken_line_is_skipped_with_a_warning(tmp_path, caplog, line):
    file = tmp_path / "log.jsonl"
    text = '{"step": 1, "loss": 2.0}\n' + line + '\n{"step": 3, "loss": 1.0}\n'
    file.write_text(text, encoding="utf-8", errors="replace")
    assert read_log(file).series() == {1: 2.0, 3: 1.0}
    assert "log.jsonl, line 2: not a row" in caplog.text


# Others


def test_detectron2_counts_from_zero_and_logs_its_layers_one_by_one(tmp_path):
    rows = [detectron2_row(19, 9.0), {"iteration": 19, "segm/AP": 40.0, "segm/AP-cat": None}, detectron2_row(39, 4.5)]
    log = read_log(write(tmp_path / "metrics.json", rows).parent)
    assert log.layout == "detectron2"
    assert log.series() == {20: 9.0, 40: 4.5}
    assert log.series("loss_class") == log.series("loss_mask") == pytest.approx({20: 3.0, 40: 1.5})
    assert log.series("learning_rate") == {20: 1e-4, 40: 1e-4}
    assert log.rows[0]["evaluation"] == {"segm/AP": 0.4}


def test_mmengine_logs_scores_by_steps_where_it_trains_by_steps(tmp_path):
    rows = [mmengine_row(50, 9.0), {"mIoU": 25.0, "data_time": 0.1, "time": 0.2, "step": 50}, mmengine_row(100, 8.1)]
    log = read_log(write(tmp_path / "work/20261121_1/vis_data/scalars.json", rows).parents[2])
    assert log.layout == "mmengine"
    assert log.series() == {50: 9.0, 100: 8.1}
    assert log.series("loss_class") == pytest.approx({50: 3.0, 100: 2.7})
    assert log.series("gradient_norm") == {50: 7.0, 100: 7.0}
    assert log.rows[0]["evaluation"] == {"mIoU": 0.25}


def test_mmengine_logs_scores_by_epochs_where_it_trains_by_epochs(tmp_path):
    rows = []
    for epoch in (1, 2):
        rows += [mmengine_row(step, 9.0 / step, epoch=epoch) for step in range(60 * epoch - 50, 60 * epoch + 1, 10)]
        rows.append({"coco/segm_mAP": 0.1 * epoch, "step": epoch})
    log = read_log(write(tmp_path / "scalars.json", rows))
    assert {row["step"]: row["evaluation"] for row in log.rows if "evaluation" in row} == {
        60: {"coco/segm_mAP": 0.1},
        120: {"coco/segm_mAP": 0.2},
    }


def test_files_of_a_resumed_mmengine_run_are_read_as_one(tmp_path):
    write(tmp_path / "20261120_1/vis_data/scalars.json", [mmengine_row(step, 9.0) for step in (10, 20, 30)])
    write(tmp_path / "20261121_1/vis_data/scalars.json", [mmengine_row(step, 5.0) for step in (30, 40)])
    assert len(find_logs(tmp_path)) == 2
    assert read_log(tmp_path).series() == {10: 9.0, 20: 9.0, 30: 5.0, 40: 5.0}


def mmcv_row(epoch, iteration, **more):
    return {"mode": "train", "epoch": epoch, "iter": iteration, "lr": 1e-4, "loss": 3.0, **more}


def test_mmcv_by_steps_keeps_its_step_numbers(tmp_path):
    rows = [{"env_info": "Python: 3.8", "seed": 0}, mmcv_row(1, 50), mmcv_row(1, 100), mmcv_row(2, 150)]
    rows.append({"mode": "val", "epoch": 2, "iter": 500, "mIoU": 0.4, "lr": 1e-4})
    log = read_log(write(tmp_path / "20200101_000000.log.json", rows).parent)
    assert log.layout == "mmcv"
    assert log.series() == {50: 3.0, 100: 3.0, 150: 3.0}
    assert [row["step"] for row in log.rows if "evaluation" in row] == [150]


def test_mmcv_by_epochs_is_counted_in_steps(tmp_path):
    log = read_log(write(tmp_path / "a.log.json", [mmcv_row(e, i) for e in (1, 2) for i in (40, 80)]))
    assert list(log.series()) == [40, 80, 120, 160]


def test_text_is_read_by_a_pattern(tmp_path):
    text = "hello\nstep 10 lr 1e-4 loss 3.5\nINFO step 20 lr 1e-4 loss 2.5 (best)\n"
    (tmp_path / "log.txt").write_text(text)
    pattern = r"step (?P<step>\d+) lr (?P<learning_rate>\S+) loss (?P<loss>[\d.]+)"
    log = read_log(tmp_path / "log.txt", ["iter (?P<step>.) (?P<loss>.)", pattern])
    assert log.layout == "text"
    assert log.rows == [
        {"step": 10, "learning_rate": 1e-4, "loss": 3.5},
        {"step": 20, "learning_rate": 1e-4, "loss": 2.5},
    ]


def test_a_pattern_without_steps_counts_its_matches(tmp_path):
    (tmp_path / "log.txt").write_text("begin\nloss=3\nsaved\nloss=nan\n")
    assert str(read_log(tmp_path / "log.txt", [r"loss=(?P<loss>\S+)"]).series()) == "{1: 3.0, 2: nan}"


# Errors


@pytest.mark.parametrize(
    ("text", "patterns", "message"),
    [
        ("step 1 loss 2", [], r"begins with 'step 1 loss 2', which is not JSON; add --pattern '"),
        ("", [], "begins with ''"),
        ("step 1 loss 2", ["("], "not a regular expression"),
        ("step 1 loss 2", ["step"], "has no group named loss"),
        ("step 1 loss 2", ["lost (?P<loss>.)"], "'lost .* matches none of its lines; the first is 'step 1 loss 2'"),
        ("step 1 loss 2", ["(?P<loss>step)"], "matched 'step' in 'step 1 loss 2', which is not a number"),
        ("1.5: 2", ["(?P<step>.*): (?P<loss>.)"], r"step 1\.5 is not a whole number"),
        ('{"a": 1, "b": 2}', [], "no step, iter or iteration, only a, b"),
        ('{"step": 1, "evaluation": {"PQ": 0.5}}', [], "no row has both a step and a loss"),
        ('{"iteration": 1, "segm/AP": 0.5}', [], "no row has both a step and a loss"),
    ],
)
def test_a_file_that_is_not_a_log_is_an_error_with_a_remedy(tmp_path, text, patterns, message):
    (tmp_path / "log").write_text(text)
    with pytest.raises(MaskwrightError, match=message) as caught:
        read_log(tmp_path / "log", patterns)
    assert "\n" not in str(caught.value)


def test_a_missing_log_and_a_folder_without_one_are_errors(tmp_path):
    with pytest.raises(MaskwrightError, match="no such file or folder"):
        read_log(tmp_path / "absent")
    with pytest.raises(MaskwrightError, match=r"contains none of log\.jsonl, metrics\.json"):
        read_log(tmp_path)

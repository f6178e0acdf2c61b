"""`maskwright train`: the loop, and what is scored and written on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from maskwright import __version__
from maskwright.checkpoints.checkpoint import checkpoint_of, save_checkpoint
from maskwright.config.recipe import Recipe, dump_recipe
from maskwright.data.build import train_loader
from maskwright.errors import RunInterrupted
from maskwright.evaluation.evaluate import Evaluation, evaluate, headline
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.runtime.device import gather_objects
from maskwright.structures.annotations import Batch
from maskwright.training import report
from maskwright.training.logger import is_due
from maskwright.training.nan_guard import StepNumbers, Unchecked
from maskwright.training.optimizer import rate_factor, set_rate
from maskwright.training.preemption import Interruption, Meeting
from maskwright.training.profiler import no_trace, trace_steps
from maskwright.training.run_folder import last_scores
from maskwright.training.setup import Session, open_session, whole_model
from maskwright.training.step import build_criterion, train_step
from maskwright.training.training_checkpoint import training_tensors

__all__ = ["build_criterion", "train", "train_step"]

logger = logging.getLogger(__name__)

EXAMPLES = 6  # pictures in the report


def train(recipe: Recipe, output: Path, *, profile: bool = False) -> dict | None:
    """Train a recipe, or go on with it where `output` holds an unfinished run.

    Args:
        recipe: complete and resolved.
        output: the run's folder.
        profile: also trace a few steps, into `profile-rank-N.json`.

    Returns:
        The last evaluation's scores, of a finished run those in its log; None without a validation split.

    Raises:
        MaskwrightError: the recipe, the data or the device cannot be used.
        TrainingError: a loss is not finite; the last checkpoint is kept.
        RunInterrupted: the process was asked to leave (SIGTERM); where it stood is saved.
    """
    session = open_session(recipe, output)
    if session is None:
        return last_scores(output)
    config, progress, journal = session.recipe.train, session.progress, session.journal
    rank, world = session.engine.process_index, session.engine.num_processes
    loader = train_loader(
        session.recipe, rank=rank, world_size=world, start_step=progress.step, annotated=session.dataset
    )
    scores = None
    tracing = trace_steps(output, rank) if profile else no_trace()
    with Interruption() as interruption, journal, session.watch as watch, tracing as tracer, Unchecked() as unchecked:
        if progress.step and is_evaluation_due(session):  # the process was ended before or during it
            scores = score(session, interruption)
        for numbers, rate in run_steps(session, loader):
            leaving = interruption.is_agreed(session.engine)
            unchecked.add(numbers, at_once=leaving or is_looked_at(session))
            journal.step(progress.step, session.criterion, numbers.losses, numbers.gradient_norm, rate)
            watch.beat()
            tracer.step()
            if leaving or is_due(progress.step, config.checkpoint_every, config.steps) or is_evaluation_due(session):
                save_progress(session)
            if leaving:
                raise _interrupted(session)
            if is_evaluation_due(session):
                scores = score(session, interruption)
            if progress.stopped:
                break
    if not session.recipe.data.val:
        finish_without_scores(session)
    session.engine.wait_for_everyone()
    return scores


def run_steps(session: Session, loader: Iterable[list[Batch]]) -> Iterator[tuple[StepNumbers, float]]:
    """Take the steps that are left, one for each that is asked for; each gives its numbers and its learning rate."""
    config, progress = session.recipe.train, session.progress
    for step, parts in zip(range(progress.step, config.steps), session.journal.awaited(loader), strict=False):
        rate = set_rate(session.optimizer, rate_factor(step, config))
        numbers = train_step(session.engine, session.network, session.stepper, session.criterion, parts, config, step)
        progress.step = step + 1
        if session.average:
            session.average.update(session.model, progress.step)
        yield numbers, rate


def is_evaluation_due(session: Session) -> bool:
    """Whether the validation split is to be scored now, and has not been."""
    step, config = session.progress.step, session.recipe.train
    due = session.recipe.data.val is not None and is_due(step, config.evaluate_every, config.steps)
    return due and session.progress.evaluated < step


def is_looked_at(session: Session) -> bool:
    """Whether something of the step that was just made is logged, kept or scored."""
    step, config = session.progress.step, session.recipe.train
    dates = (config.log_every, config.checkpoint_every)
    return any(is_due(step, every, config.steps) for every in dates) or is_evaluation_due(session)


def save_progress(session: Session) -> None:
    """Write a resumable checkpoint; all processes call it."""
    engine, progress = session.engine, session.progress
    progress.scaler = engine.scaler.state_dict() if engine.scaler else None
    tensors = training_tensors(session.model, session.optimizer, session.average)
    session.run.save(tensors, progress, engine)
    session.watch.beat()


def score(session: Session, interruption: Interruption) -> dict:
    """Score the validation split over all processes, log the scores, and keep the model if it is the best so far.

    Returns:
        The scores, on every process.
    """
    recipe, engine, run, progress = session.recipe, session.engine, session.run, session.progress
    start = time.perf_counter()
    meeting = Meeting(engine, interruption)

    def on_image(count: int) -> None:
        session.watch.beat()
        if meeting.is_off():  # the checkpoint before the evaluation is there already
            raise _interrupted(session)

    def gather(item: object) -> list:
        if not meeting.takes_place():
            raise _interrupted(session)
        return gather_objects(engine, item)

    model = whole_model(session)
    evaluation = evaluate(
        model,
        recipe,
        precision=recipe.train.precision,
        rank=engine.process_index,
        world=engine.num_processes,
        gather=gather,
        examples=EXAMPLES if engine.is_main_process else 0,
        on_image=on_image,
    )
    session.journal.pause(time.perf_counter() - start)
    _, value = headline(evaluation.scores, recipe.train.best_metric)
    better = value > progress.best
    progress.best = max(progress.best, value)
    progress.waited = 0 if better else progress.waited + 1
    progress.evaluated = progress.step
    progress.stopped = (
        recipe.train.early_stopping_patience is not None and progress.waited >= recipe.train.early_stopping_patience
    )
    if engine.is_main_process:
        session.journal.evaluation(progress.step, evaluation.scores, better)
        export_model(run.path / "last.safetensors", session, model, evaluation.scores)
        if better or not (run.path / "best.safetensors").is_file():
            export_model(run.path / "best.safetensors", session, model, evaluation.scores)
        write_report(session, evaluation)
    if progress.stopped:
        logger.info(
            "stopped after step %d: no better score in %d evaluations (train.early_stopping_patience)",
            progress.step,
            progress.waited,
        )
    save_progress(session)
    return evaluation.scores


def finish_without_scores(session: Session) -> None:
    """Keep the last model as the best one, where there is nothing to score it on; all processes call it."""
    model, folder = whole_model(session), session.run.path
    if session.engine.is_main_process:
        export_model(folder / "last.safetensors", session, model, None)
        write_report(session, Evaluation({}))
        export_model(folder / "best.safetensors", session, model, None)


def write_report(session: Session, evaluation: Evaluation) -> None:
    """Write curves and report."""
    run = session.run
    write_file_atomically(run.path / "curves.png", lambda file: report.curves(run.log_file, file))
    write_file_atomically(
        run.path / "report.html",
        lambda file: report.report(
            run.path,
            file,
            recipe_yaml=dump_recipe(session.recipe),
            evaluation=evaluation.scores,
            pictures=evaluation.examples,
            categories=session.model.categories,
            facts=session.journal.facts(session.progress.step) | {"start": " · ".join(session.start) or "at random"},
        ),
    )


def export_model(path: Path, session: Session, model: Segmenter, scores: dict | None) -> None:
    """Write the model in our format."""
    provenance = {
        "maskwright": __version__,
        "run": path.parent.name,
        "start": session.start,
        "step": session.progress.step,
        "weights": "moving average" if session.average else "last",
        "scores": scores,
    }
    save_checkpoint(path, checkpoint_of(model, session.recipe, provenance))


def _interrupted(session: Session) -> RunInterrupted:
    progress, steps = session.progress, session.recipe.train.steps
    return RunInterrupted(
        f"asked to leave (SIGTERM) after step {progress.step} of {steps}, which is saved; the same command goes on"
    )

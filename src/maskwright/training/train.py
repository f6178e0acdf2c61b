"""`maskwright train`: the training loop, with its checkpoints and evaluations."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from maskwright import __version__
from maskwright.checkpoints.adapter_file import Adapter, adapter_tensors
from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
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
from maskwright.training.nan_guard import DelayedChecks, StepResult
from maskwright.training.optimizer import set_learning_rate
from maskwright.training.preemption import PreemptibleBarrier, PreemptionHandler
from maskwright.training.profiler import profile_steps
from maskwright.training.run_folder import last_scores
from maskwright.training.run_lock import RunLock
from maskwright.training.setup import Session, evaluation_model, evaluation_state, open_session
from maskwright.training.step import train_step
from maskwright.training.training_checkpoint import training_tensors
from maskwright.training.zero_scores import ZERO, explain_zero_scores

logger = logging.getLogger(__name__)

REPORT_IMAGES = 6


def train(recipe: Recipe, output: Path, *, profile: bool = False) -> dict | None:
    """Train a recipe, or resume it if `output` holds an unfinished run.

    Args:
        recipe: complete and resolved.
        output: the run's folder.
        profile: also trace a few steps, into `profile-rank-N.json`.

    Returns:
        The scores of the last evaluation; None without a validation split.

    Raises:
        MaskwrightError: the recipe, the data or the device cannot be used.
        TrainingError: a loss is not finite; the last checkpoint is kept.
        RunInterrupted: the process received SIGTERM; its state is saved.
    """
    with RunLock(output) as lock:
        session = open_session(recipe, output, lock)
        return run_steps(session, profile=profile) if session else last_scores(output)


def run_steps(session: Session, *, profile: bool) -> dict | None:
    """Train the remaining steps of a run, see `train`."""
    config, progress, accelerator = session.recipe.train, session.progress, session.accelerator
    batches = load_batches(session)
    scores = None
    with (
        PreemptionHandler() as preemption,
        session.run_logger as run_logger,
        session.watchdog as watchdog,
        profile_steps(session.run.path, accelerator.process_index) if profile else nullcontext() as profiler,
        DelayedChecks() as checks,
    ):
        if progress.step and is_evaluation_due(session):  # the run ended before or during this evaluation
            scores = run_evaluation(session, preemption)
        while progress.step < config.steps and not progress.stopped_early:
            result, learning_rate = take_step(session, next(batches))

            stopping = preemption.should_stop(accelerator)
            evaluating = is_evaluation_due(session)
            saving = stopping or evaluating or is_due(progress.step, config.checkpoint_every, config.steps)
            checks.add(result, now=saving or is_due(progress.step, config.log_every, config.steps))

            run_logger.log_step(progress.step, session.criterion, result, learning_rate)
            watchdog.beat()
            if profiler:
                profiler.step()
            if saving:
                save_progress(session)
            if stopping:
                raise preempted(session)
            if evaluating:
                scores = run_evaluation(session, preemption)
    if not session.recipe.data.val:
        finish_without_evaluation(session)
    accelerator.wait_for_everyone()
    return scores


def load_batches(session: Session) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each remaining step of this process."""
    accelerator = session.accelerator
    loader = train_loader(
        session.recipe,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=session.progress.step,
        annotated=session.dataset,
        repeat_factors=session.repeat_factors,
    )
    return session.run_logger.time_data(loader)


def take_step(session: Session, micro_batches: list[Batch]) -> tuple[StepResult, float]:
    """Train on the micro-batches of one step; return its losses and its learning rate."""
    config, progress = session.recipe.train, session.progress
    learning_rate = set_learning_rate(session.optimizer, progress.step, config)
    result = train_step(
        session.accelerator,
        session.wrapped_model,
        session.wrapped_optimizer,
        session.criterion,
        micro_batches,
        config,
        progress.step,
    )
    progress.step += 1
    if session.adapter_check:
        session.adapter_check.after_step(last=progress.step == config.steps)
    if session.ema:
        session.ema.update(session.model, progress.step)
    return result, learning_rate


def is_evaluation_due(session: Session) -> bool:
    """Return whether the validation split must be scored after this step, and has not been."""
    step, config = session.progress.step, session.recipe.train
    due = session.recipe.data.val is not None and is_due(step, config.evaluate_every, config.steps)
    return due and session.progress.evaluated_step < step


def save_progress(session: Session) -> None:
    """Write a training checkpoint; all processes call it."""
    accelerator, progress = session.accelerator, session.progress
    session.lock.check()
    progress.scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    tensors = training_tensors(session.model, session.optimizer, session.ema)
    session.run.save(tensors, progress, accelerator)
    session.watchdog.beat()


def preempted(session: Session) -> RunInterrupted:
    """Return the error that ends a preempted run."""
    step, steps = session.progress.step, session.recipe.train.steps
    return RunInterrupted(
        f"stopped by SIGTERM at step {step}/{steps}, which is saved", remedy="run the same command to resume"
    )


def run_evaluation(session: Session, preemption: PreemptionHandler) -> dict:
    """Score the validation split in all processes; log the scores, export the model and write the report.

    Returns:
        The scores, in every process.
    """
    start = time.perf_counter()
    state = evaluation_state(session)
    model = evaluation_model(session, state)
    evaluation = evaluate_model(session, model, preemption)
    session.run_logger.exclude_time(time.perf_counter() - start)
    is_best = record_scores(session, evaluation.scores)
    if session.accelerator.is_main_process:
        session.run_logger.log_evaluation(session.progress.step, evaluation.scores, is_best)
        warn_of_zero_scores(session, evaluation)
        session.lock.check()
        folder = session.run.path
        export_model(folder / "last.safetensors", session, state, evaluation.scores)
        if is_best or not (folder / "best.safetensors").is_file():
            export_model(folder / "best.safetensors", session, state, evaluation.scores)
        write_report(session, evaluation)
    if session.progress.stopped_early:
        logger.info(
            "stopped early at step %d: the score has not improved in %d evaluations (train.early_stopping_patience)",
            session.progress.step,
            session.progress.evaluations_without_improvement,
        )
    save_progress(session)
    return evaluation.scores


def evaluate_model(session: Session, model: Segmenter, preemption: PreemptionHandler) -> Evaluation:
    """Evaluate a model on the validation split, each process on its share.

    Raises:
        RunInterrupted: a process received SIGTERM; the step before the evaluation is saved.
    """
    recipe, accelerator = session.recipe, session.accelerator
    barrier = PreemptibleBarrier(accelerator, preemption)

    def on_image(count: int) -> None:
        session.watchdog.beat()
        if barrier.is_abandoned():
            raise preempted(session)

    def gather(item: object) -> list:
        if not barrier.wait():
            raise preempted(session)
        return gather_objects(accelerator, item)

    return evaluate(
        model,
        recipe,
        precision=recipe.train.precision,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        gather=gather,
        examples=REPORT_IMAGES if accelerator.is_main_process else 0,
        on_image=on_image,
    )


def record_scores(session: Session, scores: dict) -> bool:
    """Update the progress after an evaluation; return whether its model is the best so far.

    Without a score, for lack of objects in the split, the last model is the best, and the run does not stop early.
    """
    config, progress = session.recipe.train, session.progress
    progress.evaluated_step = progress.step
    name, score = headline(scores, config.best_metric)
    if score is None:
        logger.warning(
            "step %d: %s has no value, because the validation split has no objects for it; best.safetensors is the "
            "last model as long as there is none",
            progress.step,
            name,
        )
        return progress.best_score < 0
    is_best = score > progress.best_score
    progress.best_score = max(progress.best_score, score)
    progress.evaluations_without_improvement = 0 if is_best else progress.evaluations_without_improvement + 1
    patience = config.early_stopping_patience
    progress.stopped_early = patience is not None and progress.evaluations_without_improvement >= patience
    return is_best


def warn_of_zero_scores(session: Session, evaluation: Evaluation) -> None:
    """Log the causes, as far as they can be found, if the first two evaluations of a run gave a score of zero."""
    name, _ = headline(evaluation.scores, session.recipe.train.best_metric)
    evaluations = [row["evaluation"] for row in session.run.rows() if "evaluation" in row]
    if len(evaluations) == 2 and all(abs(values.get(name, 1.0)) < ZERO for values in evaluations):
        causes = explain_zero_scores(session, evaluation.hint)
        logger.warning("step %d: %s is still 0 after two evaluations: %s", session.progress.step, name, causes)


def finish_without_evaluation(session: Session) -> None:
    """Export the last model as the best one, for a run without a validation split; all processes call it."""
    state, folder = evaluation_state(session), session.run.path
    if session.accelerator.is_main_process:
        session.lock.check()
        export_model(folder / "last.safetensors", session, state, None)
        write_report(session, Evaluation({}))
        export_model(folder / "best.safetensors", session, state, None)  # last: it marks the run as finished


def export_model(path: Path, session: Session, state: dict[str, Tensor], scores: dict | None) -> None:
    """Write the weights of `evaluation_state` as a checkpoint for inference, or as an adapter file."""
    provenance = {
        "maskwright": __version__,
        "run": path.parent.name,
        "start": session.start,
        "step": session.progress.step,
        "weights": "moving average" if session.ema else "last",
        "scores": scores,
    }
    model, recipe = session.model, session.recipe
    adapter = None
    if recipe.train.lora and session.progress.base:
        adapter = Adapter(session.progress.base, recipe.train.lora.alpha)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        state = adapter_tensors(state, trained, adapter.base)
    checkpoint = Checkpoint(model.config, model.categories, recipe.evaluate, state, recipe, provenance)
    save_checkpoint(path, checkpoint, adapter)


def write_report(session: Session, evaluation: Evaluation) -> None:
    """Write the curves and the report."""
    run = session.run
    facts = session.run_logger.facts(session.progress.step)
    write_file_atomically(run.path / "curves.png", lambda file: report.curves(run.log_file, file))
    write_file_atomically(
        run.path / "report.html",
        lambda file: report.report(
            run.path,
            file,
            recipe_yaml=dump_recipe(session.recipe),
            evaluation=evaluation.scores,
            images=evaluation.examples,
            categories=session.model.categories,
            facts=facts | {"start": " · ".join(session.start) or "at random"},
        ),
    )

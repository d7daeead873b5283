"""``check_task``: everything that densectx expects of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from densectx.testing import task_answers, task_contract, task_losses, task_metrics, task_state
from densectx.testing.ranks import two_processes_equal_one
from densectx.testing.report import Check, run_checks
from densectx.testing.subjects import Subject
from densectx.testing.task_case import TaskCase
from densectx.types import Sample, SourceInfo

CHECKS: Final[tuple[Callable[[TaskCase], None], ...]] = (
    task_contract.builds_from_a_spec,
    task_contract.is_documented,
    task_contract.declares_what_exists,
    task_contract.prepare_gives_what_it_declares,
    task_contract.prepare_leaves_the_batch,
    task_contract.prepare_is_repeatable,
    task_contract.prepare_takes_samples_one_by_one,
    task_contract.prepare_takes_every_size,
    task_contract.says_whether_it_changes_the_image,
    task_contract.keeps_its_mode,
    task_contract.leaves_the_process_as_it_was,
    task_losses.loss_gives_sums_and_weights,
    task_losses.loss_adds_up_over_samples,
    task_losses.loss_weights_are_counted,
    task_losses.loss_leaves_its_arguments,
    task_losses.loss_of_nothing_labelled_is_zero,
    task_losses.unlabelled_samples_count_nothing,
    task_losses.unlabelled_pixels_pull_nowhere,
    task_losses.padding_weighs_nothing,
    task_losses.gradient_reaches_every_parameter,
    task_losses.loss_falls,
    task_losses.ranks_add_up_to_one_process,
    task_answers.inputs_take_an_image_as_it_is,
    task_answers.postprocess_answers,
    task_answers.answers_are_what_output_says,
    task_answers.answers_at_every_size,
    task_answers.answers_at_every_size_with_a_strided_trunk,
    task_answers.answers_one_by_one,
    task_answers.answers_alike_in_tiles,
    task_answers.answers_gray_images,
    task_answers.answers_are_never_random,
    task_answers.answers_alike_in_bf16,
    task_answers.draws_pictures,
    task_answers.exports,
    task_metrics.metrics_have_sum_states,
    task_metrics.metrics_have_the_score,
    task_metrics.metrics_add_up,
    task_metrics.metrics_reset,
    task_metrics.metrics_compute_twice,
    task_metrics.metrics_of_nothing,
    task_metrics.unlabelled_samples_are_not_measured,
    task_metrics.update_leaves_its_arguments,
    task_state.tensors_are_registered,
    task_state.state_round_trip,
    task_state.state_holds_no_metrics,
    task_state.copies_answer_alike,
)


def task_checks(
    subject: Subject,
    *,
    info: SourceInfo | None = None,
    batch: Sample | None = None,
    options: Mapping[str, float | None] | None = None,
    model: Mapping[str, Any] | None = None,
    ranks: bool = False,
) -> list[Check]:
    """The checks of :func:`check_task` one by one, for ``pytest.mark.parametrize``; builds nothing yet.

    Args:
        subject: as in :func:`check_task`, and so are the others.
        info: its source.
        batch: samples.
        options: of ``predict``.
        model: config.
        ranks: whether to start two processes.
    """
    case = TaskCase(subject, info, batch, dict(options or {}), dict(model or {}))
    functions = (*CHECKS, *((two_processes_equal_one,) if ranks else ()))
    return [Check(function.__name__, partial(function, case)) for function in functions]


def check_task(
    subject: Subject,
    *,
    info: SourceInfo | None = None,
    batch: Sample | None = None,
    options: Mapping[str, float | None] | None = None,
    model: Mapping[str, Any] | None = None,
    expected_failed_checks: Mapping[str, str] | None = None,
    ranks: bool = False,
) -> None:
    """Does a task keep its contract (:class:`densectx.tasks.base.Task`)? Some seconds on a CPU, without data.

    It is put into a small model and fed a batch; nothing of the process is left changed.

    Args:
        subject: registered name, spec, class, or factory (``functools.partial`` for options).
        info: its source; default the first of several usual ones that it accepts (classes and masks, a map, labels,
            another picture, enlarged, gray).
        batch: collated samples of that source, at least two, for tasks that made-up ones do not suit; default four
            of 24 x 20 with random pictures, masks and targets (pictures, and maps of 1 to 3 channels, in 0..1), a
            corner unlabelled.
        options: run-time options for ``predict`` that have no default, ``{"sigma": 25.0}``.
        model: replaces keys of the small model's config, ``{"projection": {"channels": 8}}``.
        expected_failed_checks: {check: reason} that may fail; one that passes all the same is told.
        ranks: start two gloo processes, too, and compare their gradients with one process's (some ten seconds); the
            subject must be importable there: a registered name, or a class at the top of an importable module.

    Raises:
        ChecksFailed: an AssertionError with every failed check, what it found and what to do.
        ConfigError: an expected failure that is no check.
    """
    checks = task_checks(subject, info=info, batch=batch, options=options, model=model, ranks=ranks)
    run_checks(TaskCase(subject).name, checks, expected_failed_checks or {})

"""Checks for those who write parts of densectx: does a task, backbone, head, data set or loss keep its contract?

``check_task("edges")`` runs all checks and raises one AssertionError that lists what failed and what to do;
``task_checks("edges")`` gives them one by one, for ``pytest.mark.parametrize``. So for the other kinds.
"""

from densectx.testing.backbones import backbone_checks, check_backbone
from densectx.testing.contexts import check_context, context_checks
from densectx.testing.datasets import check_dataset, dataset_checks
from densectx.testing.heads import check_head, head_checks
from densectx.testing.losses import check_loss, loss_checks
from densectx.testing.report import Check, CheckFailed, ChecksFailed
from densectx.testing.samples import make_batch
from densectx.testing.tasks import check_task, task_checks

__all__ = [
    "Check",
    "CheckFailed",
    "ChecksFailed",
    "backbone_checks",
    "check_backbone",
    "check_context",
    "check_dataset",
    "check_head",
    "check_loss",
    "check_task",
    "context_checks",
    "dataset_checks",
    "head_checks",
    "loss_checks",
    "make_batch",
    "task_checks",
]

"""What metrics have counted, nested metrics included: only the outer one's is what torchmetrics' merge_state adds."""

from __future__ import annotations

from torchmetrics import Metric


def metrics_of(metric: Metric) -> list[Metric]:
    """The metric and those inside it, always in the same order."""
    return [part for part in metric.modules() if isinstance(part, Metric)]


def add_states(total: Metric, other: Metric) -> None:
    """Add what another metric of the same make has counted, as a reduction over ranks does.

    Args:
        total: what is added to, in place; all its states are sums, as a task's are.
        other: stays as it is.
    """
    for mine, its in zip(metrics_of(total), metrics_of(other), strict=True):
        for name, value in its.metric_state.items():
            setattr(mine, name, getattr(mine, name) + value)

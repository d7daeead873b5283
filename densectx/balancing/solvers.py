"""Small convex problems over a Gram matrix K (T, T) float64, each solved to rounding."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densectx.errors import NumericError


def shortest(gram: Tensor) -> Tensor:
    """Factors a >= 0 with sum 1 of the shortest combination: min a K a (Sener & Koltun 2018, equation 3).

    With K = A^T A and any s > 0 the non-negative least squares of |A v|^2 + s^2 (sum v - 1)^2 has the same conditions
    up to a factor: a = v / sum v. That ends in finitely many steps, however ill-conditioned K is, where Frank-Wolfe,
    the paper's algorithm 2, creeps.
    """
    from scipy.optimize import nnls

    # with a ridge that is far below what a step can resolve, by which equal gradients share alike
    unit = gram / gram.diagonal().mean() + 1e-12 * torch.eye(len(gram), dtype=gram.dtype)
    root = np.vstack([_root(unit), np.ones(len(gram))])
    found = torch.from_numpy(nnls(root, np.eye(len(root))[-1])[0]).to(gram.dtype)
    return found / found.sum()


def onto_dual_cone(gram: Tensor) -> Tensor:
    """Rows w_i of the factors of each gradient's projection onto {x: no gradient has a negative product with x}.

    Quinton & Rey 2024, proposition 1: w_i = e_i + v, v >= 0 least in (e_i + v) K (e_i + v). With K = A^T A that is
    a non-negative least squares problem: |A v + A e_i|.
    """
    from scipy.optimize import nnls

    root = _root(gram)
    rows = [torch.from_numpy(nnls(root, -root[:, i])[0]) for i in range(len(gram))]
    return torch.eye(len(gram), dtype=gram.dtype) + torch.stack(rows).to(gram.dtype)


def bargain(gram: Tensor) -> Tensor:
    """Factors a > 0 with K a = 1 / a (Navon et al. 2022, claim 3.1): the minimum of a K a / 2 - sum log a.

    Where gradients oppose each other so that no direction helps every task, the minimum runs away; a ridge of 1e-6
    of the diagonal, which is what a step can resolve, keeps it.
    """
    norms = gram.diagonal().sqrt()
    unit = gram / norms[:, None] / norms + 1e-6 * torch.eye(len(gram), dtype=gram.dtype)
    a = torch.ones_like(norms)
    for _ in range(200):
        slope = unit @ a - 1 / a
        move = torch.linalg.solve(unit + torch.diag(a**-2), slope)
        decrement = float((slope @ move).clamp_min(0).sqrt())
        # self-concordant: this damped step stays positive and always descends (Boyd & Vandenberghe 2004, 9.6)
        a = a - move / (1 + decrement if decrement > 0.25 else 1.0)
        if decrement < 1e-8:  # it is squared by the step
            found: Tensor = a / norms
            return found
    raise NumericError("nash_mtl: Newton's method did not converge; the gradients' Gram matrix is not finite.")


def _root(gram: Tensor) -> NDArray[np.float64]:
    """A with A^T A = K."""
    values, vectors = torch.linalg.eigh(gram)
    root: NDArray[np.float64] = (values.clamp_min(0).sqrt()[:, None] * vectors.T).numpy()
    return root

"""How alike the layers of a model represent the same tokens, and in how many directions: statistics that stream.

Scope: mean cosine, linear CKA and effective rank from the states of one batch after another; nothing of a batch is kept
but sums. Not here: where states come from (states.py).

Sources: CKA: Kornblith et al., arXiv 1905.00414; its minibatch estimator from the unbiased HSIC_1: Nguyen et al.,
arXiv 2010.15327 (HSIC_1: Song et al., 2012; by U-centred matrices: Szekely and Rizzo, 2014); effective rank: Roy and
Vetterli, 2007; merging covariances: Chan et al., 1979.

Legend: M layers (blocks + 1), T tokens of a batch, n of a group, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

GROUP = 256  # tokens of a minibatch of CKA
SMALLEST = 4  # HSIC_1 divides by n - 3


class Similarity:
    """Similarity of M layers over one kind of token: `add` states batch by batch, then `result`.

    Memory: M fp32 covariances of H x H (2.2 GB for 33 layers of 4096), and of each group of at most 256
    tokens M states and M Gram matrices in fp32.
    """

    def __init__(self, layers: int) -> None:
        self.layers, self.tokens = layers, 0
        self.cosine = torch.zeros(layers, layers, dtype=torch.float64)
        self.hsic = torch.zeros(layers, layers, dtype=torch.float64)
        self.mean: torch.Tensor | None = None  # [M, H]
        self.scatter: torch.Tensor | None = None  # [M, H, H], sum of (x - mean)(x - mean)^T
        self.generator = torch.Generator().manual_seed(0)

    def add(self, states: Sequence[torch.Tensor]) -> None:
        """M tensors [T, H] of any dtype, the same T tokens in every layer.

        Tokens are put into groups at random (with a seed of their own), so that a group mixes samples.
        """
        tokens = len(states[0])
        if not tokens:
            return
        order = torch.randperm(tokens, generator=self.generator)
        for group in order.tensor_split(-(-tokens // GROUP)):
            x = torch.stack([state.index_select(0, group.to(state.device)).float() for state in states])  # [M, n, H]
            unit = F.normalize(x, dim=-1).flatten(1)
            self.cosine += (unit @ unit.T).double().cpu()
            if len(group) >= SMALLEST:
                self.hsic += len(group) * hsic(x).cpu()
            self._merge(x)

    def _merge(self, x: torch.Tensor) -> None:
        """Mean and scatter of the tokens so far with those of a group [M, n, H]."""
        n, mean = x.shape[1], x.mean(1)
        centred = x - mean[:, None]
        if self.mean is None or self.scatter is None:
            self.mean, self.scatter = mean, centred.transpose(1, 2) @ centred
        else:
            step, total = mean - self.mean, self.tokens + n
            self.scatter.baddbmm_(centred.transpose(1, 2), centred)
            self.scatter.baddbmm_(step[:, :, None], step[:, None], alpha=n * self.tokens / total)
            self.mean = self.mean + step * (n / total)
        self.tokens += n

    def result(self) -> dict[str, Any] | None:
        """`cosine` and `cka` (M x M), their means over pairs of different layers, `effective_rank` (M), `tokens`.

        A figure that the tokens do not give is None: all of CKA for fewer than four, a layer's where its states are
        all alike. None without tokens.
        """
        if self.scatter is None:
            return None
        scale = self.hsic.diagonal().clamp_min(0).sqrt()
        cosine, cka = self.cosine / self.tokens, self.hsic / torch.outer(scale, scale)
        return {
            "tokens": self.tokens,
            "cosine": numbers(cosine),
            "cka": numbers(cka),
            "mean_cosine": between(cosine),
            "mean_cka": between(cka),
            "effective_rank": [effective_rank(torch.linalg.eigvalsh(s)) for s in self.scatter],
        }


def hsic(x: torch.Tensor) -> torch.Tensor:
    """HSIC_1 of the linear kernels of all pairs of layers, [M, n, H] fp32 -> [M, M] fp64.

    HSIC_1(K, K') = sum over i != j of A_ij A'_ij / (n (n - 3)), A the U-centred K. Centring the states first does not
    change it and keeps what is subtracted small.
    """
    n = x.shape[1]
    x = x - x.mean(1, keepdim=True)
    gram = x @ x.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).zero_()
    rows = gram.sum(2, keepdim=True)
    gram = gram - (rows + rows.transpose(1, 2)) / (n - 2) + rows.sum(1, keepdim=True) / ((n - 1) * (n - 2))
    gram.diagonal(dim1=1, dim2=2).zero_()
    flat = gram.flatten(1).double() if gram.device.type != "mps" else gram.flatten(1)
    return (flat @ flat.T).double() / (n * (n - 3))


def effective_rank(eigenvalues: torch.Tensor) -> float:
    """exp of the entropy of the normalized eigenvalues [H] of a covariance: 1 for one direction, H for all alike."""
    values = eigenvalues.double().cpu().clamp_min(0)
    total = float(values.sum())
    if total <= 0:
        return 0.0
    share = values / total
    return significant(float(torch.special.entr(share).sum().exp()))


def between(matrix: torch.Tensor) -> float | None:
    """The mean over pairs of different layers; None where there is none, or one that is no number."""
    other = ~torch.eye(len(matrix), dtype=torch.bool)
    mean = float(matrix[other].mean()) if len(matrix) > 1 else float("nan")
    return None if mean != mean else significant(mean)


def numbers(matrix: torch.Tensor) -> list[list[float | None]]:
    return [[None if value != value else significant(value) for value in row] for row in matrix.tolist()]


def significant(value: float) -> float:
    """Six digits: more than any of these estimates is worth."""
    return float(f"{value:.6g}")

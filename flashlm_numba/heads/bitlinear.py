"""The head of the MatMul-free LM: a ternary output layer of its own, with a norm, inputs rounded to int8, one scale."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from flashlm_numba.heads.base import loss_options
from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.heads.dense import DenseHead
from flashlm_numba.kernels import _check
from flashlm_numba.kernels import dense_head as kernels
from flashlm_numba.kernels.bitlinear import absmean_ternary
from flashlm_numba.kernels.bitlinear_head import bit_logits, bit_rows
from flashlm_numba.kernels.embedding import zero
from flashlm_numba.kernels.rmsnorm import rmsnorm_backward
from flashlm_numba.kernels.ternary import pack_ternary
from flashlm_numba.system.arrays import for_reading
from flashlm_numba.system.calls import Gate

__all__ = ["BitLinearHead"]


class BitLinearHead(DenseHead):
    """softmax(q(rmsnorm(h)) @ ternary(weight).T), exact; q rounds to int8, and ternary(weight) has one scale.

    weight : (V, C) float32, the head's own rows; training changes them, and computes with their ternary values
    dweight : (V, C) float32, to which the gradient of weight is added; allocated if None
    norm : (C,) float32, weight of the norm; ones if None
    embedding_gradient : (V, C) float32, which forward_backward clears with the head's own gradients; the head adds
        nothing to it
    Gradients pass straight through both roundings. A generated token reads 2 bits per weight. The other arguments are
    those of DenseHead. Raises ValueError if a shape, a dtype or a number is wrong.

    >>> head = BitLinearHead(np.array([[2, 2], [2, -2]], np.float32))
    >>> head.distribution(np.array([[1, 1]], np.float32)).round(2).tolist()
    [[0.9800000190734863, 0.019999999552965164]]
    """

    name = "bitlinear"
    has_int8 = False
    joins = False  # its rows are small
    ternary: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        weight: np.ndarray,
        dweight: np.ndarray | None = None,
        *,
        norm: np.ndarray | None = None,
        embedding_gradient: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight, dweight, **options)
        self.norm = np.ones(self.weight.shape[1], np.float32) if norm is None else np.asarray(norm)
        self._norm = for_reading(self.norm)
        _check.array("BitLinearHead", "norm", self._norm, self.weight.shape[1:])
        self._embedding_gradient = embedding_gradient
        self.parameters = {"weight": self.weight, "norm.weight": self.norm}
        self.gradients = {"weight": self.dweight, "norm.weight": np.zeros(self.norm.shape, np.float32)}
        self._changing = Gate()  # for what is computed from weight on first use
        self._rows: np.ndarray | None = None  # (V, C), ternary values times the scale, for training and scoring
        self._packed: tuple[np.ndarray, np.float32] | None = None  # 2 bits per weight and the scale, for generation
        self._rows_are_new = False

    @classmethod
    def training_bytes(cls, settings: HeadConfig, vocab_size: int, dim: int, positions: int) -> int:
        """See Head.training_bytes: besides the dense head's, weight, gradient, two moments and ternary values."""
        return super().training_bytes(settings, vocab_size, dim, positions) + 4 * 5 * vocab_size * dim

    @classmethod
    def from_settings(
        cls,
        settings: HeadConfig,
        weight: np.ndarray,
        dweight: np.ndarray,
        *,
        constants: dict[str, np.ndarray],
        parameters: dict[str, np.ndarray],
        counts: np.ndarray | None,
    ) -> BitLinearHead:
        """See Head.from_settings. The rows of a new head start as a copy of the embedding's."""
        own = parameters.get("weight")
        if own is None:
            own = weight.copy()
        _check.array("BitLinearHead", "weight", for_reading(own), weight.shape)
        return BitLinearHead(
            own,
            norm=parameters.get("norm.weight"),
            embedding_gradient=dweight,
            **loss_options(settings, constants),
        )

    def prepare(self) -> None:
        """Forget what was computed from the rows. Call this after every change of them."""
        super().prepare()
        with self._changing.writing():
            self._rows_are_new, self._packed = False, None

    def _ternary_rows(self) -> np.ndarray:
        with self._changing.writing():
            if self._rows is None or not self._rows_are_new:
                self._rows, scale = absmean_ternary(self._weight, self._rows)
                self._rows *= scale
                self._rows_are_new = True
            return self._rows

    def _packed_rows(self) -> tuple[np.ndarray, np.float32]:
        with self._changing.writing():
            if self._packed is None:
                values, scale = absmean_ternary(self._weight)
                self._packed = pack_ternary(values), scale
            return self._packed

    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns loss (N,), nll (N,), dh (N, C), and adds the gradients of sum(weights * loss) to `gradients`.

        accumulate : False replaces the previous gradients, and clears the embedding's
        Raises RuntimeError if another thread is in forward_backward of this head.
        """
        h = for_reading(h)
        with self._training.alone(), self._buffers() as scratch:
            if not accumulate:
                zero(self.dweight)
                self.gradients["norm.weight"][...] = 0
                if self._embedding_gradient is not None:
                    zero(self._embedding_gradient)
            rounded, rstd = bit_rows(h, self._norm)
            loss, nll, dnormed = kernels.dense_head_forward_backward(
                rounded,
                self._ternary_rows(),
                for_reading(targets),
                for_reading(weights),
                self.dweight,
                log_prior=self._log_prior,
                scratch=scratch,
                **self.settings,
            )
            dh = np.zeros_like(h)
            rmsnorm_backward(dnormed, h, self._norm, rstd, dh, self.gradients["norm.weight"])
        return loss, nll, dh

    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log p(target), (N,) float32."""
        with self._buffers() as scratch:
            _, nll = kernels.dense_head_forward(
                bit_rows(for_reading(h), self._norm)[0],
                self._ternary_rows(),
                for_reading(targets),
                log_prior=self._log_prior,
                soft_cap=self.settings["soft_cap"],
                scratch=scratch,
            )
        return -nll

    def use_int8(self) -> None:
        """Nothing: a generated token reads 2 bits per weight already."""

    def _products(self, h: np.ndarray) -> np.ndarray:
        packed, scale = self._packed_rows()
        return bit_logits(h, self._norm, packed, float(scale))

    def _exact_products(self, h: np.ndarray) -> np.ndarray:
        return self._products(h)

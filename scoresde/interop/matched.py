"""One denoiser, seen by another process. E[x_0 | x_t] depends on x_t/alpha and the noise level sigma/alpha
only, so models of different processes are matched by noise level, never by time or index."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..denoiser import BaseDenoiser, Rows, Wrapper, checked
from ..schedules import Time, holds, wide
from ..sde import LinearSDE, like

ROUNDING = 1e-6  # of log-SNR: the ends of a range may come in float32


class Matched(Wrapper):
    """See `under`."""

    def __init__(self, model: BaseDenoiser, sde: LinearSDE) -> None:
        super().__init__(model)
        self._sde = sde

    @property
    def sde(self) -> LinearSDE:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._sde

    def extra_repr(self) -> str:
        return f"under {self.sde}"

    def matched(self, t: Time) -> tuple[Tensor, Tensor]:
        """(c, s): the model's time s with the log-SNR of t, and the factor on the state, `alpha_s/alpha_t`.

        Raises ValueError for noise levels that the model's process does not have, where the host knows them.
        """
        t, its = wide(t), self.model.sde
        log_snr = self.sde.log_snr(t)
        lowest, highest = (its.log_snr(end) for end in (its.t_max, its.t_min))
        outside = (log_snr < lowest - ROUNDING) | (log_snr > highest + ROUNDING)
        if not holds(~outside):
            found = log_snr[outside].flatten()[0]
            level, least, most = ((-0.5 * v).exp().item() for v in (found, highest, lowest))
            raise ValueError(
                f"expected noise levels sigma/alpha in [{least:.6g}, {most:.6g}], those of {its}, found "
                f"{level:.6g}; begin and end within them"
            )
        # Within rounding on the host; levels on a GPU, which the host does not know, go to the nearest end.
        s = its.time(log_snr.clamp(lowest.to(t.device), highest.to(t.device)))
        return its.alpha(s) / self.sde.alpha(t), s

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        factor, s = self.matched(t)
        return checked(self.model(like(factor, x) * x, s, **cond), x)

    def rows(self, times: Tensor, x: Tensor, /, **cond: Any) -> Rows:
        factor, s = self.matched(times)
        inner, c = self.model.rows(s, x, **cond), factor.tolist()
        a = [on_x * scale for on_x, scale in zip(inner.a, c, strict=True)]
        return Rows(lambda state, k: inner.evaluate(state * c[k], k), a, inner.b)

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        return Matched(self.model.narrowed(rows, batch), self.sde)


def under(model: BaseDenoiser, sde: LinearSDE) -> BaseDenoiser:
    """`model` as a denoiser of the process `sde`: `D(x, t) = model((alpha_s/alpha_t) x, s)`, where the
    model's process has at s the log-SNR that `sde` has at t.

    Wherever both are defined it is the same conditional expectation. A noise level outside the model's own
    [t_min, t_max] raises ValueError where the host knows it (one on a GPU is taken to the nearest end).
    """
    if not isinstance(model, BaseDenoiser) or not isinstance(sde, LinearSDE):
        raise TypeError(f"expected a denoiser and an SDE, found {type(model)} and {sde!r}")
    return model if model.sde == sde else Matched(model, sde)

# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The noise schedule of a teacher: how noisy a sample is at `t`, and what its network's output means there."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)


EDM_SCHEDULERS = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
# Of the config of a consistency-model scheduler: the sigma at which the network is the identity, where that is not
# sigma_min. diffusers keeps such private fields and ignores them.
IDENTITY_SIGMA = "_identity_sigma"
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)

# (c_skip, c_out) of x0 = c_skip * x_t + c_out * network_output, as functions of alpha, sigma, sigma_data and the sigma
# at which the network is the identity (0 for EDM, sigma_min for consistency models: arXiv 2303.01469, appendix C).
# EDM: arXiv 2206.00364, table 1; v: arXiv 2202.00512, appendix D; flow: arXiv 2210.02747, velocity noise - x0.
PREDICTIONS: dict[str, Callable] = {
    "epsilon": lambda a, s, sd, s0: (1 / a, -s / a),
    "v_prediction": lambda a, s, sd, s0: (a, -s),
    "sample": lambda a, s, sd, s0: (torch.zeros_like(s), torch.ones_like(s)),
    "flow": lambda a, s, sd, s0: (torch.ones_like(s), -s),
    "edm": lambda a, s, sd, s0: (sd**2 / ((s - s0) ** 2 + sd**2), (s - s0) * sd * (s**2 + sd**2).rsqrt()),
    "edm_v": lambda a, s, sd, s0: (sd**2 / (s**2 + sd**2), -s * sd * (s**2 + sd**2).rsqrt()),
}


@dataclass(eq=False)
class NoiseSchedule:
    """x_t = alpha(t) * x0 + sigma(t) * noise, for every family of diffusers scheduler, with one meaning of `t`.

    `t` is a *noise index* in [0, N-1]: 0 is the least noise, N-1 the most. For DDPM-like schedulers it is the
    timestep itself; for EDM and consistency models it walks the Karras grid (N=1000, rho=7: sigma(0)=0.002,
    sigma(999)=80), so "draw t uniformly from [20, 980]" means the same for every teacher. Fractional values are
    interpolated. All arithmetic is float64; results have the shape of `t`.

    Args:
        alphas, sigmas: float64 [N], by ascending noise.
        prediction: what the network predicts, a key of `PREDICTIONS`.
        network_time: maps (t, sigma) to the time the network was trained on.
        noise_scale: standard deviation of the input of the one step at t = N-1 (80 for EDM, 1 for DDPM and flow).
        sigma_data: standard deviation of the data, for EDM's preconditioning; None where the input is not scaled.
        identity_sigma: where D(x) = x exactly; sigma_min for consistency models (unless their scheduler says otherwise,
            see `IDENTITY_SIGMA`), else 0.
    """

    alphas: torch.Tensor
    sigmas: torch.Tensor
    prediction: str
    network_time: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    noise_scale: float
    sigma_data: float | None = None
    identity_sigma: float = 0.0

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "NoiseSchedule":
        """Reads a diffusers scheduler: EDM, consistency-model, flow-matching, or DDPM-like (epsilon, v, sample).

        Raises:
            ValueError: if `scheduler` is of another family or its `prediction_type` is not one of that family's.
        """
        config = scheduler.config
        if isinstance(scheduler, EDM_SCHEDULERS):
            return _edm_schedule(scheduler)
        if isinstance(scheduler, CMStochasticIterativeScheduler):
            sigmas = torch.as_tensor(_karras(config.sigma_min, config.sigma_max, config.rho, 1000))
            ones = torch.ones_like(sigmas)
            identity_sigma = config.get(IDENTITY_SIGMA, config.sigma_min)
            return cls(ones, sigmas, "edm", _cm_time, config.sigma_max, config.sigma_data, identity_sigma)
        if isinstance(scheduler, FLOW_SCHEDULERS):
            n = config.num_train_timesteps
            s = torch.arange(1, n + 1, dtype=torch.float64) / n
            # With dynamic shifting the scheduler shifts by image size when it samples, not in training.
            shift = 1.0 if config.get("use_dynamic_shifting") else config.shift
            sigmas = shift * s / (1 + (shift - 1) * s)
            return cls(1 - sigmas, sigmas, "flow", lambda t, sigma: n * sigma, noise_scale=1.0)
        if "beta_schedule" in config:
            return _ddpm_schedule(scheduler)
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} has no known noise schedule; use an EDM, consistency-model, "
            "flow-matching or DDPM-like scheduler of diffusers"
        )

    @property
    def num_timesteps(self) -> int:
        """N, the number of noise levels."""
        return len(self.sigmas)

    @property
    def last(self) -> int:
        """N - 1, the index of pure noise, where the one-step student starts."""
        return self.num_timesteps - 1

    @property
    def ratios(self) -> torch.Tensor:
        """Noise-to-signal ratios sigma / alpha, float64 [N]; sigma itself for EDM. Infinite where alpha is 0."""
        return self.sigmas / self.alphas

    def alpha(self, t) -> torch.Tensor:
        """Scale of the data in x_t, float64."""
        return self._at(self.alphas, t)

    def sigma(self, t) -> torch.Tensor:
        """Standard deviation of the noise in x_t, float64."""
        return self._at(self.sigmas, t)

    def _at(self, table: torch.Tensor, t) -> torch.Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        # A NaN fails both comparisons, so it is refused too.
        if not bool(((t >= 0) & (t <= self.last)).all()):
            raise ValueError(f"t: noise indices must lie in [0, {self.last}], got {t.flatten()[:8].tolist()}")
        low = t.floor().long()
        high = (low + 1).clamp(max=self.last)
        return torch.lerp(table.to(t.device)[low], table.to(t.device)[high], t - low)

    def from_ratio(self, ratio) -> torch.Tensor:
        """The (fractional) noise index whose noise-to-signal ratio sigma / alpha is the given one, float64.

        For EDM, where alpha = 1, the ratio is sigma itself and this is the exact inverse of `sigma(t)`.

        Raises:
            ValueError: if `ratio` lies outside the schedule.
        """
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        ratios = self.ratios.numpy()
        # Bounds a rounding error wide: a solver's grid reaches the ends through a power and its root.
        if not bool(((ratio >= ratios[0] * (1 - 1e-9)) & (ratio <= ratios[-1] * (1 + 1e-9))).all()):
            raise ValueError(
                f"ratio: must lie in [{ratios[0]:.6g}, {ratios[-1]:.6g}], got {ratio.flatten()[:8].tolist()}"
            )
        index = np.interp(ratio.cpu().numpy(), ratios, np.arange(self.num_timesteps))
        return torch.as_tensor(index, dtype=torch.float64, device=ratio.device)

    def coefficients(self, t, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_in, c_skip, c_out) of x0 = c_skip x_t + c_out F(c_in x_t), ready to multiply `like` [B, ...].

        Computed in float64, cast once to the dtype of `like`.
        """
        alpha, sigma = self.alpha(t), self.sigma(t)
        c_skip, c_out = PREDICTIONS[self.prediction](alpha, sigma, self.sigma_data, self.identity_sigma)
        c_in = torch.ones_like(sigma) if self.sigma_data is None else (sigma**2 + self.sigma_data**2).rsqrt()
        return tuple(expand(c, like) for c in (c_in, c_skip, c_out))

    def timestep(self, t) -> torch.Tensor:
        """The time given to the network, float64: t, ln(sigma)/4, 250 ln(sigma) or N sigma, by family."""
        return self.network_time(torch.as_tensor(t, dtype=torch.float64), self.sigma(t))

    def to_x0(self, output: torch.Tensor, x_t: torch.Tensor, t) -> torch.Tensor:
        """Turns a network output at x_t into its x0 prediction, in the dtype of `x_t`."""
        _, c_skip, c_out = self.coefficients(t, x_t)
        return c_skip * x_t + c_out * output.to(x_t.dtype)

    def loss_weight(self, t) -> torch.Tensor:
        """lambda(t) = 1 / c_out^2, float64: with it, the x0 error is the plain error of the network's own output.

        EDM: 1/sigma^2 + 1/sigma_data^2 (arXiv 2206.00364, table 1). Epsilon: alpha^2/sigma^2, the plain MSE on
        epsilon. v and flow: 1/sigma^2. Sample: 1.
        """
        _, c_out = PREDICTIONS[self.prediction](self.alpha(t), self.sigma(t), self.sigma_data, 0.0)
        return c_out**-2

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t) -> torch.Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise, in the dtype of `x0` [B, ...]; t [B] or a scalar."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def sample_t(self, n: int, low: float = 0.0, high: float = 1.0, generator: torch.Generator | None = None):
        """Draws `n` noise indices uniformly from round(low N) .. min(round(high N), N-1), both inclusive.

        Args:
            n: how many.
            low, high: fractions of the schedule in [0, 1]; (0.02, 0.98) is [20, 980] of 1000 (arXiv 2405.14867).
            generator: CPU generator; the global one if None.

        Returns:
            LongTensor [n].
        """
        first, last = self.index_range(low, high)
        return torch.randint(first, last + 1, (n,), generator=generator)

    def index_range(self, low: float, high: float) -> tuple[int, int]:
        """The inclusive index range that `sample_t` draws from."""
        if not 0 <= low < high <= 1:
            raise ValueError(f"low, high: fractions with 0 <= low < high <= 1 expected, got {low} and {high}")
        return tuple(min(round(fraction * self.num_timesteps), self.last) for fraction in (low, high))


def expand(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Per-sample numbers [B] (or a scalar) in dtype, device and rank of `like` [B, ...]."""
    values = values.to(device=like.device, dtype=like.dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values


def _karras(sigma_min: float, sigma_max: float, rho: float, n: int) -> np.ndarray:
    """Ascending grid of arXiv 2206.00364, eq. 5."""
    return np.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), n, dtype=np.float64) ** rho


def _edm_time(t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return sigma.log() / 4


def _cm_time(t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return 250 * sigma.log()


def _ddpm_time(t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return t


def _prediction(scheduler: SchedulerMixin, known: dict[str, str]) -> str:
    """The key of `PREDICTIONS` for a scheduler's `prediction_type`."""
    prediction = scheduler.config.prediction_type
    if prediction not in known:
        raise ValueError(
            f"scheduler: prediction_type {prediction!r} of {type(scheduler).__name__} is not supported; "
            f"allowed: {', '.join(known)}"
        )
    return known[prediction]


def _edm_schedule(scheduler: SchedulerMixin) -> NoiseSchedule:
    config = scheduler.config
    n = config.num_train_timesteps
    if config.sigma_schedule == "karras":
        sigmas = _karras(config.sigma_min, config.sigma_max, config.rho, n)
    else:
        sigmas = np.geomspace(config.sigma_min, config.sigma_max, n, dtype=np.float64)
    prediction = _prediction(scheduler, {"epsilon": "edm", "v_prediction": "edm_v"})
    sigmas = torch.as_tensor(sigmas)
    return NoiseSchedule(torch.ones_like(sigmas), sigmas, prediction, _edm_time, config.sigma_max, config.sigma_data)


def _ddpm_schedule(scheduler: SchedulerMixin) -> NoiseSchedule:
    prediction = _prediction(scheduler, {p: p for p in ("epsilon", "v_prediction", "sample")})
    alpha_bar = scheduler.alphas_cumprod.double()
    if prediction == "epsilon" and float(alpha_bar[-1]) == 0:
        raise ValueError(
            "scheduler: with zero terminal SNR the noise prediction says nothing about x0 at the last timestep; "
            "use a v_prediction or sample teacher, or rescale_betas_zero_snr=False"
        )
    return NoiseSchedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), prediction, _ddpm_time, noise_scale=1.0)

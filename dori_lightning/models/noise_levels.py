"""How much signal and noise a noised latent has at each timestep, and what a prediction implies.

| the model predicts | clean latent | noise |
|---|---|---|
| noise e | (x - s e) / a | e |
| v = a e - s x_0 | a x - s v | s x + a v |
| velocity e - x_0, with a + s = 1 | x - s v | x + a v |
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

PREDICTIONS = ("epsilon", "v_prediction", "velocity")


@dataclass(frozen=True)
class NoiseLevels:
    """A checkpoint's noise schedule as tables over its T timesteps, fp32.

    Attributes:
        prediction: One of ``PREDICTIONS``.
        signal: a, the factor of the latent (T,).
        noise: s, the factor of the noise (T,).
        signal_variance: a squared (T,), which a diffusion schedule says and of which it is the
            root.
        noise_variance: s squared (T,).
        flow: Whether time is told as ``1000 s`` rather than as the timestep's number.
    """

    prediction: str
    signal: torch.Tensor
    noise: torch.Tensor
    signal_variance: torch.Tensor
    noise_variance: torch.Tensor
    flow: bool

    @classmethod
    def of(cls, scheduler: Any, device: torch.device) -> "NoiseLevels":
        """The tables of a scheduler of diffusers, on a device.

        Flow matching is trained on ``s = shift u / (1 + (shift - 1) u)`` with u = 1/T, ..., 1;
        without a shift where the scheduler shifts by an image's size, as diffusers' training
        scripts do.
        """
        config = scheduler.config
        if hasattr(scheduler, "alphas_cumprod"):
            signal = scheduler.alphas_cumprod.to(device, torch.float32)
            noise, prediction = 1 - signal, str(config["prediction_type"])
            return cls(prediction, signal.sqrt(), noise.sqrt(), signal, noise, flow=False)
        count = int(config["num_train_timesteps"])
        u = torch.arange(1, count + 1, dtype=torch.float64) / count
        shift = 1.0 if config["use_dynamic_shifting"] else float(config["shift"])
        share = shift * u / (1 + (shift - 1) * u)
        signal, noise = (table.to(device, torch.float32) for table in (1 - share, share))
        return cls("velocity", signal, noise, signal**2, noise**2, flow=True)

    def times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What a denoiser is told of timesteps (N,), in its scheduler's unit."""
        return 1000 * self.noise[timesteps] if self.flow else timesteps

    def nearest(self, times: torch.Tensor) -> torch.Tensor:
        """Timesteps (S,) that are nearest to what a sampler tells a denoiser (S,)."""
        last = len(self.signal) - 1
        if not self.flow:
            return times.round().long().clamp(0, last) if times.is_floating_point() else times
        away = (times.double()[:, None] / 1000 - self.noise.to(times.device).double()).abs()
        return away.argmin(1)

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Forward process: ``a x + s e`` (N, C, h, w)."""
        a, s = self._scales(timesteps)
        return a * latents + s * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What a model should predict (N, C, h, w)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "velocity":
            return noise - latents
        a, s = self._scales(timesteps)
        return a * noise - s * latents

    def implied_noise(
        self, output: torch.Tensor, noised: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noise (N, C, h, w) that a prediction implies."""
        if self.prediction == "epsilon":
            return output
        a, s = self._scales(timesteps)
        if self.prediction == "velocity":
            return noised + a * output
        return a * output + s * noised

    def implied_clean(
        self, output: torch.Tensor, noised: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Clean latent (N, C, h, w) that a prediction implies."""
        a, s = self._scales(timesteps)
        if self.prediction == "epsilon":
            return (noised - s * output) / a
        if self.prediction == "velocity":
            return noised - s * output
        return a * noised - s * output

    def _scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (N, 1, 1, 1)."""
        a, s = self.signal[timesteps], self.noise[timesteps]
        return a[..., None, None, None], s[..., None, None, None]


def sampler_from(kind: type[Any], config: Mapping[str, Any], **settings: Any) -> Any:
    """A sampler of diffusers out of what it knows of a checkpoint's scheduler.

    What is another sampler's alone is left out: diffusers would warn of it each time.

    Args:
        kind: Class of the sampler.
        config: Settings of the checkpoint's scheduler.
        settings: More, which come before those.
    """
    known = inspect.signature(kind.__init__).parameters
    own = {k: v for k, v in config.items() if k in known or k.startswith("_")}
    return kind.from_config(own, **settings)


def flow_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a sampler of diffusion models is told to draw by flow matching instead.

    Args:
        config: Settings of the checkpoint's scheduler.
    """
    return {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": config["shift"],
    }

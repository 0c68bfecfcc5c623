# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Every loss, as a pure function of tensors that gives one number per sample. Stages weigh and average, nobody else.

Notation: x a student's sample, R = D_teacher(x_t), F = D_fake_score(x_t), CHW the number of elements of a sample.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    """Mean over everything but the batch axis: [B, ...] -> [B]."""
    return values.reshape(len(values), -1).mean(dim=1)


def dm_loss(x: torch.Tensor, teacher_x0: torch.Tensor, fake_x0: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Distribution matching: descends the KL divergence from the student's distribution to the teacher's.

        g = (F - R) / mean_CHW|x - R|,    d loss_b / dx = g / CHW,    loss_b = mean_CHW g^2 / 2

    The gradient is put on x directly; the value is what the pseudo-target form 0.5 |x - (x - g)|^2 would give.

    Args:
        x: student samples [B, ...], with gradient.
        teacher_x0, fake_x0: R and F, predictions at the same noised x [B, ...]; no gradient passes through them.
        eps: floor of the denominator, which is 0 only where the teacher reproduces x exactly.

    Returns:
        [B], float32 (float64 for float64 input).

    Source: arXiv 2311.18828, eq. 7 and 8; in x0 form arXiv 2405.14867.
    """
    x, teacher_x0, fake_x0 = (v if v.dtype == torch.float64 else v.float() for v in (x, teacher_x0, fake_x0))
    with torch.no_grad():
        weight = _per_sample((x - teacher_x0).abs()).clamp_min(eps)
        g = (fake_x0 - teacher_x0) / weight.reshape(-1, *[1] * (x.ndim - 1))
    return _per_sample(g * (x - x.detach()) + g**2 / 2)


def denoising_loss(x0_prediction: torch.Tensor, x0: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """loss_b = lambda(t_b) mean_CHW (D(x_t) - x0)^2, the score-matching loss of teacher and fake score.

    Args:
        x0_prediction, x0: [B, ...].
        weight: lambda(t) [B], `NoiseSchedule.loss_weight`.

    Returns:
        [B]. Source: arXiv 2206.00364, eq. 2; arXiv 2405.14867 for the fake score.
    """
    return weight.to(x0) * _per_sample((x0_prediction - x0) ** 2)


def tsm_loss(student_x0: torch.Tensor, teacher_x0: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Teacher score matching: loss_b = lambda(t_b) mean_CHW (D_student(x_t) - D_teacher(x_t))^2 on noised real images.

    It gives a smaller student, which cannot copy the teacher's weights, a start. Args and returns as
    `denoising_loss`; no gradient passes to the teacher. Source: arXiv 2410.23274, the TSM stage.
    """
    return denoising_loss(student_x0, teacher_x0.detach(), weight)


def gan_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Non-saturating generator loss, loss_b = softplus(-l_fake), for logits [B, ...] -> [B].

    Source: arXiv 1406.2661, section 3; as in arXiv 2405.14867.
    """
    return _per_sample(F.softplus(-fake_logits))


def gan_discriminator_loss(fake_logits: torch.Tensor, real_logits: torch.Tensor) -> torch.Tensor:
    """loss_b = softplus(l_fake) + softplus(-l_real), for logits [B, ...] -> [B]. Source: as `gan_generator_loss`."""
    return _per_sample(F.softplus(fake_logits)) + _per_sample(F.softplus(-real_logits))


def l2_distance(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """mean_CHW (x - target)^2, [B, ...] -> [B]."""
    return _per_sample((x - target) ** 2)


def l1_distance(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """mean_CHW |x - target|, [B, ...] -> [B]."""
    return _per_sample((x - target).abs())


def lpips_distance() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Builds the perceptual distance of arXiv 1801.03924 (VGG) on images [B, 1 or 3, H, W] in [-1, 1].

    Raises:
        ImportError: without the extra `lpips`.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError(
            "regression_distance='lpips' needs the lpips package: pip install 'diffusers_msd[lpips]', "
            "or choose --regression_distance l2"
        ) from error
    net = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()

    def distance(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # VGG halves its input four times, so small images are enlarged to the 64 pixels it was calibrated from.
        pair = [F.interpolate(v.float().expand(-1, 3, -1, -1), size=max(64, v.shape[-1])) for v in (x, target)]
        return net.to(x.device)(*pair).flatten()

    return distance


# Each entry builds a distance [B, ...], [B, ...] -> [B].
DISTANCES: dict[str, Callable[[], Callable]] = {
    "l2": lambda: l2_distance,
    "l1": lambda: l1_distance,
    "lpips": lpips_distance,
}
# Those between images: for a teacher of latents, samples are decoded first.
PERCEPTUAL = {"lpips"}


def regression_loss(
    x: torch.Tensor, target: torch.Tensor, distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = l2_distance
) -> torch.Tensor:
    """loss_b = d(G(z_b, y_b), teacher's own sample from the same z_b, y_b): keeps the teacher's modes.

    Args:
        x: student samples from the noise of the pairs [B, ...].
        target: the teacher's samples [B, ...]; no gradient passes to them.
        distance: one of `DISTANCES`, built.

    Returns:
        [B]. Source: arXiv 2311.18828, eq. 9; on the full, unfiltered pair set: arXiv 2410.23274.
    """
    return distance(x, target.detach())

# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_msd.embedding_routing import EmbeddingRouter
from diffusers_msd.plots import plot_margins, plot_series


def router(*sizes: int) -> tuple[EmbeddingRouter, torch.Tensor]:
    """Two parts cut at 0 along the first axis, and points of the given numbers on the two sides."""
    points = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(0))
    points[:, 0] = points[:, 0].abs() + 0.01
    points[: sizes[0], 0] *= -1
    return EmbeddingRouter(2, "quadrants", torch.eye(3)[:1], torch.zeros(1), list(sizes)), points


def blue_and_orange(path) -> tuple[int, int]:
    """Pixels of the colours of students 0 and 1 in the right half, where the bars of the part sizes are."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    pixels = pixels[:, pixels.shape[1] // 2 :]
    return tuple(int((abs(pixels - color).sum(axis=-1) < 30).sum()) for color in ([31, 119, 180], [255, 127, 14]))


def test_the_bars_show_the_sizes_of_the_parts_of_these_embeddings(tmp_path):
    plot_margins(*router(300, 100), tmp_path / "uneven.png")
    blue, orange = blue_and_orange(tmp_path / "uneven.png")
    assert blue / orange == pytest.approx(3, rel=0.1)
    # The picture is of the embeddings given, whatever sizes the router was fitted with.
    plot_margins(router(300, 100)[0], router(200, 200)[1], tmp_path / "even.png")
    blue, orange = blue_and_orange(tmp_path / "even.png")
    assert blue / orange == pytest.approx(1, rel=0.1)


def test_the_histogram_is_of_the_margins(tmp_path):
    near, far = router(200, 200)[1], router(200, 200)[1]
    far[0, 0] = -100
    pictures = []
    for name, points in {"near": near, "far": far}.items():
        plot_margins(router(200, 200)[0], points, tmp_path / f"{name}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")))
        blue, orange = blue_and_orange(tmp_path / f"{name}.png")
        assert blue / orange == pytest.approx(1, rel=0.1)
    # One prompt far away stretches the axis of the margins; the sizes stay.
    half = pictures[0].shape[1] // 2
    assert (abs(pictures[0][:, :half].astype(int) - pictures[1][:, :half]).sum(axis=-1) > 100).mean() > 0.003


def test_one_student_has_no_margins_to_plot(tmp_path):
    with pytest.raises(ValueError, match="router: with one student"):
        plot_margins(EmbeddingRouter.fit_random(router(5, 5)[1], 1), router(5, 5)[1], tmp_path / "x.png")


def test_series_have_a_panel_each_and_a_line_for_every_name(tmp_path):
    low, high = {10: (1.0, 0.1), 100: (1.2, 0.1)}, {10: (3.0, 0.2), 100: (2.0, 0.2)}
    plot_series({"left": {"low": low}, "right": {"low": low, "high": high}}, "images", tmp_path / "both.png")
    blue, orange = blue_and_orange(tmp_path / "both.png")
    assert min(blue, orange) > 200
    plot_series({"left": {"low": low, "high": high}, "right": {"low": low}}, "images", tmp_path / "swapped.png")
    blue, orange = blue_and_orange(tmp_path / "swapped.png")
    assert blue > 200 and orange == 0

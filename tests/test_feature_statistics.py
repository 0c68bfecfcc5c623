# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import sys

import numpy as np
import pytest
import torch
from test_metrics import normal

from diffusers_msd.feature_statistics import FeatureStatistics, load_statistics, save_statistics
from diffusers_msd.inception import InceptionFeatures
from diffusers_msd.metrics import frechet_distance


def test_moments_in_batches_are_those_of_all_samples_whatever_the_batches():
    features = 3 * normal(101, 7) + 1e4
    for size in (1, 10, 101):
        statistics = FeatureStatistics.of(features.split(size))
        assert statistics.num_samples == 101
        torch.testing.assert_close(statistics.mean, features.mean(0), rtol=1e-14, atol=0)
        # At 1e4 from the origin, where squares minus squares would leave 8 digits of 16.
        torch.testing.assert_close(statistics.covariance, torch.cov(features.T), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n", [10, 300])
def test_distance_from_statistics_is_the_distance_from_features(n):
    """With fewer samples than the 24 features the covariances have no full rank."""
    real, generated = normal(n, 24, 1), 2 * normal(n + 3, 24, 2) + 0.5
    expected = frechet_distance(real, generated)
    of = [FeatureStatistics.of([features]) for features in (real, generated)]
    for pair in ((of[0], generated), (real, of[1]), of):
        # The root of a covariance has half the digits where there are no samples.
        assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(of[0], of[0]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="`generated` must have the 24 features of `real`, got 23"):
        frechet_distance(of[0], generated[:, :23])


def test_statistics_come_back_from_disk_and_the_same_ones_have_the_same_hash(tmp_path):
    statistics = FeatureStatistics.of([normal(20, 5)], feature_net="FeatureNet abc")
    hashes = []
    for name in ("a.npz", "b.npz"):
        save_statistics(tmp_path / name, statistics)
        loaded, sha256 = load_statistics(tmp_path / name, "reference")
        hashes.append(sha256)
        assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.covariance, statistics.covariance)
        assert (loaded.num_samples, loaded.feature_net) == (20, "FeatureNet abc")
    assert hashes[0] == hashes[1] and len(hashes[0]) == 64
    save_statistics(tmp_path / "b.npz", FeatureStatistics.of([normal(20, 5)]))
    assert load_statistics(tmp_path / "b.npz", "reference")[1] != hashes[0]


def test_a_file_as_edms_needs_mu_and_sigma_only(tmp_path):
    mu, sigma = normal(1, 3)[0].numpy(), torch.cov(normal(9, 3).T).numpy()
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    loaded, _ = load_statistics(tmp_path / "edm.npz", "reference")
    assert np.array_equal(loaded.mean, mu) and np.array_equal(loaded.covariance, sigma)
    assert loaded.num_samples is None and loaded.feature_net is None


def test_files_that_are_no_statistics_are_errors(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match="reference: .*a.npz is no file"):
        load_statistics(path, "reference")
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="reference: .*a.npz is no .npz of arrays mu and sigma"):
        load_statistics(path, "reference")
    eye = np.eye(3)
    for arrays, message in (
        ({"mu": eye[0]}, "no .npz of arrays mu and sigma"),
        ({"mu": eye[0], "sigma": np.array([{}])}, "no .npz of arrays mu and sigma .*allow_pickle"),
        ({"mu": eye[0], "sigma": eye[:2]}, r"mu \[3\] and sigma \[2, 3\]; \[D\] and \[D, D\] are needed"),
        ({"mu": eye[0] * np.nan, "sigma": eye}, "NaN or infinity"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match="reference: .*" + message):
            load_statistics(path, "reference")
    np.save(path.with_suffix(".npy"), eye)
    with pytest.raises(ValueError, match="no .npz"):
        load_statistics(path.with_suffix(".npy"), "reference")


@pytest.mark.parametrize("batches", [[], [normal(1, 3)], [normal(4, 3) / 0]])
def test_too_few_samples_and_values_that_are_not_finite_are_errors(batches):
    with pytest.raises(ValueError, match="batches: "):
        FeatureStatistics.of(batches)


def test_inception_without_its_packages_says_how_to_install_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"feature_net: 'inception' needs torch-fidelity .*diffusers_msd\[fid\]"):
        InceptionFeatures()


def test_inception_with_another_torchs_torchvision_says_so(monkeypatch, tmp_path):
    """Such a torchvision fails with a RuntimeError while it is imported."""
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    with pytest.raises(ImportError, match="a torchvision that fits the installed torch.*nms does not exist"):
        InceptionFeatures()

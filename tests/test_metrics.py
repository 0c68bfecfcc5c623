# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import importlib.util
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm

from diffusers_msd.data import FASHION_MNIST_DIR
from diffusers_msd.feature_net import FeatureNet, describe_feature_net, extract_features, weights_hash
from diffusers_msd.feature_statistics import FeatureStatistics
from diffusers_msd.metrics import (
    cross_seed_diversity,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from diffusers_msd.scores import evaluate_images


SCRIPTS = Path(__file__).parents[1] / "training_scripts"
ASSETS = SCRIPTS / "assets"


def normal(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(dim, seed=0):
    return torch.linalg.qr(normal(dim, dim, seed)).Q


def with_moments(n, mean, covariance, seed=0):
    """Samples whose sample mean and unbiased sample covariance are exactly the ones given."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(dim=0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def positive(dim, seed):
    root = normal(dim, dim, seed)
    return root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_feature_net", SCRIPTS / "train_feature_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits_net():
    return FeatureNet.from_pretrained(ASSETS / "features-digits", use_safetensors=True)


@pytest.fixture(scope="module")
def digits(script):
    return script.load_split("digits", "train", 8)


# Frechet distance


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    std_a, std_b = torch.tensor([0.5, 2.0, 1.0]).double(), torch.tensor([1.5, 0.1, 1.0]).double()
    rotation = orthogonal(3)
    real = with_moments(200, mean_a, torch.diag(std_a**2), seed=1) @ rotation
    generated = with_moments(300, mean_b, torch.diag(std_b**2), seed=2) @ rotation
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert frechet_distance(real, generated) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_of_two_dimensional_gaussians_is_the_closed_form():
    # In two dimensions tr(sqrt(M)) = sqrt(tr(M) + 2 sqrt(det(M))), whether or not the covariances commute.
    mean = torch.tensor([0.3, -0.4]).double()
    cov_a = torch.tensor([[2.0, 0.7], [0.7, 0.5]]).double()
    cov_b = torch.tensor([[0.4, -0.3], [-0.3, 3.0]]).double()
    product = cov_a @ cov_b
    root_trace = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = mean.square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace
    real, generated = with_moments(50, torch.zeros(2).double(), cov_a), with_moments(60, mean, cov_b, seed=1)
    assert frechet_distance(real, generated) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_agrees_with_the_matrix_square_root_of_the_covariance_product():
    dim = 24
    cov_a, cov_b = positive(dim, 1), positive(dim, 2)
    real, generated = with_moments(100, normal(1, dim, 3)[0], cov_a), with_moments(90, normal(1, dim, 4)[0], cov_b)
    root = sqrtm((cov_a @ cov_b).numpy()).real
    mean_term = (normal(1, dim, 3) - normal(1, dim, 4)).square().sum().item()
    expected = mean_term + (cov_a + cov_b).trace().item() - 2 * np.trace(root)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_equal_sets_is_zero_and_of_a_translated_set_the_squared_shift():
    for n in (5, 40, 400):  # fewer and more samples than the 64 features
        features = normal(n, 64)
        shift = normal(1, 64, seed=9)
        assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(features, features + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_frechet_distance_is_symmetric_orthogonally_invariant_and_scales_as_a_square():
    real, generated, rotation = normal(80, 32, 1), 2 * normal(70, 32, 2) + 1, orthogonal(32)
    distance = frechet_distance(real, generated)
    assert frechet_distance(generated, real) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(real @ rotation, generated @ rotation) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(3 * real, 3 * generated) == pytest.approx(9 * distance, rel=1e-10)


def test_frechet_distance_with_fewer_samples_than_features_is_the_one_in_their_own_subspace():
    # 10 samples that fill 3 of 50 dimensions: both covariances have rank 3.
    real, generated, basis = normal(10, 3, 1), 2 * normal(9, 3, 2) + 1, orthogonal(50)[:3]
    assert frechet_distance(real @ basis, generated @ basis) == pytest.approx(
        frechet_distance(real, generated), rel=1e-10
    )


def test_frechet_distance_of_sets_in_orthogonal_subspaces_has_no_cross_term():
    basis = orthogonal(40)
    real, generated = normal(6, 4, 1) @ basis[:4], normal(7, 4, 2) @ basis[4:8]
    expected = (real.mean(0) - generated.mean(0)).square().sum() + real.var(0).sum() + generated.var(0).sum()
    assert frechet_distance(real, generated) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_keeps_float64_accuracy_for_features_far_from_the_origin():
    features = normal(200, 8)
    assert frechet_distance(features + 1e4, 2 * features + 1e4) == pytest.approx(
        frechet_distance(features, 2 * features), rel=1e-7
    )


# Kernel distance


def kernel_mmd_by_loops(x, y):
    def kernel(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimator_written_out():
    real, generated = normal(12, 5, 1), normal(12, 5, 2) + 0.5
    mean, std = kernel_distance(real, generated, num_subsets=3, subset_size=12)
    assert mean == pytest.approx(kernel_mmd_by_loops(real.numpy(), generated.numpy()), rel=1e-10)
    assert std == pytest.approx(0, abs=1e-10)


def test_kernel_distance_averages_to_the_closed_form_of_the_moments():
    # In one dimension (xy + 1)^3 is a sum over moments: MMD^2 = d3^2 + 3 d2^2 + 3 d1^2 with d_j = E[x^j] - E[y^j].
    real, generated = normal(5000, 1, 1), normal(4000, 1, 2) + 1.0
    expected = 4**2 + 3 * 1**2 + 3 * 1**2  # moments of N(1, 1): 1, 2, 4; of N(0, 1): 0, 1, 0

    def within(x, power):  # the mean of (x_i x_j)^power over i != j
        return ((x**power).sum() ** 2 - (x ** (2 * power)).sum()) / (len(x) * (len(x) - 1))

    def mmd2(power):
        cross = (real**power).mean() * (generated**power).mean()
        return within(real, power) + within(generated, power) - 2 * cross

    unbiased = (mmd2(3) + 3 * mmd2(2) + 3 * mmd2(1)).item()
    mean, _ = kernel_distance(real, generated, num_subsets=1, subset_size=10)
    assert mean == pytest.approx(unbiased, rel=1e-10)
    assert abs(unbiased - expected) < 0.1 * expected


def test_kernel_distance_is_the_mean_over_all_subsets():
    real, generated = normal(5, 3, 1), normal(6, 3, 2) + 0.5
    choices = [[list(chosen) for chosen in itertools.combinations(range(n), 3)] for n in (5, 6)]
    estimates = [kernel_mmd_by_loops(real[x].numpy(), generated[y].numpy()) for x, y in itertools.product(*choices)]
    mean, std = kernel_distance(real, generated, num_subsets=2000, subset_size=3)
    assert mean == pytest.approx(np.mean(estimates), rel=1e-10)
    assert std == pytest.approx(np.std(estimates), rel=0.1)


def test_kernel_distance_of_one_distribution_scatters_around_zero():
    mean, std = kernel_distance(normal(4000, 16, 1), normal(4000, 16, 2), num_subsets=50, subset_size=200)
    assert abs(mean) < std
    estimates = [kernel_distance(normal(30, 4, 2 * i), normal(30, 4, 2 * i + 1), 1, 30)[0] for i in range(100)]
    assert min(estimates) < 0 < max(estimates)


def test_kernel_distance_is_repeatable_by_seed_and_leaves_the_global_generator_alone():
    real, generated = normal(60, 8, 1), normal(50, 8, 2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = kernel_distance(real, generated, num_subsets=5, subset_size=20, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel_distance(real, generated, num_subsets=5, subset_size=20, seed=3) == first
    assert kernel_distance(real, generated, num_subsets=5, subset_size=20, seed=4)[1] != first[1]


def test_kernel_distance_default_subsets_of_a_small_set_differ():
    assert kernel_distance(normal(40, 8, 1), normal(40, 8, 2))[1] > 1e-3


# Precision and recall


def manifold_share_by_loops(queries, samples, k):
    inside = 0
    for query in queries:
        for i, sample in enumerate(samples):
            others = sorted(np.linalg.norm(sample - other) for j, other in enumerate(samples) if j != i)
            if np.linalg.norm(query - sample) <= others[k - 1]:
                inside += 1
                break
    return inside / len(queries)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_the_definition_written_out(k):
    real, generated = normal(30, 3, 1), 1.5 * normal(25, 3, 2) + 1
    precision, recall = precision_recall(real, generated, k=k)
    assert precision == pytest.approx(manifold_share_by_loops(generated.numpy(), real.numpy(), k))
    assert recall == pytest.approx(manifold_share_by_loops(real.numpy(), generated.numpy(), k))
    assert 0 < precision < 1 and 0 < recall < 1


def test_generated_copies_of_real_samples_have_precision_one_even_where_duplicates_shrink_the_balls_to_points():
    for seed in range(10):
        points = normal(100, 64, seed) + 100  # far from the origin, where distances by matrix products are not exact
        real = points.repeat(5, 1)
        assert precision_recall(real, real.flip(0)) == (1.0, 1.0)
        assert precision_recall(real, points[:7])[0] == 1.0
        assert precision_recall(points, points[:1].repeat(50, 1)) == (1.0, 0.01)


def test_a_dropped_mode_costs_recall_and_a_false_mode_costs_precision():
    near, far = normal(100, 4, 1), normal(100, 4, 2) + 100
    both = torch.cat([near, far])
    precision, recall = precision_recall(both, normal(100, 4, 3))
    assert precision > 0.8 and 0.4 < recall <= 0.5
    precision, recall = precision_recall(near, torch.cat([normal(100, 4, 3), far]))
    assert 0.4 < precision <= 0.5 and recall > 0.8
    assert precision_recall(near, far) == (0.0, 0.0)


def test_precision_recall_over_several_blocks_equals_one_block():
    real, generated = normal(4200, 4, 1), 1.5 * normal(4100, 4, 2)  # 17.2 M distances: more than one block of 2**24

    def share(queries, samples):
        radii = torch.cdist(samples, samples).kthvalue(4, dim=1).values
        return (torch.cdist(queries, samples) <= radii).any(dim=1).double().mean().item()

    expected = (share(generated, real), share(real, generated))
    assert precision_recall(real, generated) == pytest.approx(expected, abs=1e-12)


# Density and coverage


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_are_the_definition_written_out(k):
    real, generated = normal(30, 3, 1).numpy(), 1.5 * normal(25, 3, 2).numpy() + 0.5
    radii = [sorted(np.linalg.norm(x - y) for y in real)[k] for x in real]
    inside = [[np.linalg.norm(x - y) <= radius for y in generated] for x, radius in zip(real, radii)]
    density, coverage = density_coverage(real, generated, k=k)
    assert density == pytest.approx(np.sum(inside) / (k * 25), rel=1e-12)
    assert coverage == pytest.approx(np.mean([any(row) for row in inside]), rel=1e-12)
    assert 0 < density and 0 < coverage < 1


def test_equal_sets_are_covered_and_a_missing_mode_is_not():
    near, far = normal(200, 4, 1), normal(200, 4, 2) + 100
    both = torch.cat([near, far])
    assert density_coverage(both, both.flip(0))[1] == 1.0
    assert density_coverage(both.repeat(7, 1), both)[1] == 1.0  # balls that are points
    density, coverage = density_coverage(both, normal(200, 4, 3))
    assert 0.4 < coverage < 0.5 and 0.8 < density < 1.2
    assert density_coverage(near, far) == (0.0, 0.0)


def test_density_and_coverage_of_few_generated_samples_are_defined():
    real = normal(100, 4)
    assert density_coverage(real, real[:1])[1] == pytest.approx(
        (torch.cdist(real, real).kthvalue(6, dim=1).values >= torch.cdist(real, real[:1])[:, 0]).double().mean()
    )


# Inception score


def test_inception_score_is_the_definition_written_out():
    logits = normal(12, 4, 1)
    p = (logits.exp() / logits.exp().sum(dim=1, keepdim=True)).numpy()

    def score(p):
        return np.exp(np.mean([sum(q * np.log(q / m) for q, m in zip(row, p.mean(axis=0))) for row in p]))

    assert inception_score(logits) == (pytest.approx(score(p), rel=1e-12), 0.0)
    expected = [score(p[:4]), score(p[4:8]), score(p[8:])]
    assert inception_score(logits, splits=3) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-12)


def test_inception_score_runs_from_one_to_the_number_of_classes():
    certain = 1000 * torch.eye(5).repeat(3, 1)
    assert inception_score(certain)[0] == pytest.approx(5, rel=1e-12)
    assert inception_score(certain[::5])[0] == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.zeros(6, 5))[0] == pytest.approx(1, rel=1e-12)
    with pytest.raises(ValueError, match="`logits` must hold at least 10 samples, got 6"):
        inception_score(torch.zeros(6, 5), splits=10)


# Cross-seed diversity


def test_diversity_is_the_mean_over_conditions_of_the_mean_over_pairs():
    features, labels = normal(11, 3), torch.tensor([4, 1, 4, 4, 1, 7, 0, 0, 0, 0, 0])
    means = []
    for condition in (0, 1, 4):  # 7 has one image
        mine = features[labels == condition].numpy()
        means.append(np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(mine, 2)]))
    assert cross_seed_diversity(features, labels) == pytest.approx(np.mean(means), rel=1e-12)
    assert cross_seed_diversity(features[:1].repeat(4, 1), torch.zeros(4).long()) == 0
    with pytest.raises(ValueError, match="`labels` must name a condition twice, got 11 conditions"):
        cross_seed_diversity(features, torch.arange(11))
    with pytest.raises(ValueError, match=r"`labels` must have shape \[11\], got \(10,\)"):
        cross_seed_diversity(features, labels[:10])


# Other implementations


def test_torchmetrics_gives_the_same_numbers():
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = normal(40, 6, 1), normal(40, 6, 2) + 0.3
    kid = KernelInceptionDistance(feature=torch.nn.Flatten(), subsets=1, subset_size=40)
    kid.set_dtype(torch.float64)
    score = InceptionScore(feature=torch.nn.Flatten(), splits=1)
    score.update(generated)
    for features, is_real in ((real, True), (generated, False)):
        kid.update(features, real=is_real)
    assert kernel_distance(real, generated)[0] == pytest.approx(kid.compute()[0].item(), rel=1e-6)
    assert inception_score(generated)[0] == pytest.approx(score.compute()[0].item(), rel=1e-6)


# Order


@pytest.mark.parametrize(
    "metric", [frechet_distance, kernel_distance, precision_recall, density_coverage, lambda _, x: inception_score(x)]
)
def test_the_order_of_the_images_changes_no_number(metric):
    real, generated = normal(60, 8, 1), normal(50, 8, 2) + 0.3
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        shuffled = [x[torch.randperm(len(x), generator=draw)] for x in (real, generated)]
        assert metric(*shuffled) == pytest.approx(metric(real, generated), rel=1e-10)


def test_the_order_of_the_images_does_not_change_the_diversity():
    features, labels = normal(40, 5), torch.arange(40) % 7
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    expected = cross_seed_diversity(features, labels)
    assert cross_seed_diversity(features[order], labels[order]) == pytest.approx(expected, rel=1e-12)


# Input


def test_no_more_samples_than_features_is_warned_of_with_the_effect_once():
    few, many = normal(8, 8, 1), normal(9, 8, 2)
    with pytest.warns(UserWarning, match="`generated` holds no more samples than its 8 features.*biased upwards"):
        frechet_distance(many, few)
    with pytest.warns(UserWarning, match="`real` holds no more samples than .*rank-deficient"):
        frechet_distance(FeatureStatistics.of([few]), many)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for n in (8, 7, 6, 5):
            frechet_distance(many, few[:n])
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(many, many)
        frechet_distance(FeatureStatistics(torch.zeros(8).double(), torch.eye(8).double()), many)


def test_the_fréchet_distance_of_few_samples_is_larger():
    """What the warning says: both sets are of one distribution."""
    distances = [frechet_distance(normal(n, 32, 1), normal(n, 32, 2)) for n in (20, 60, 600, 6000)]
    assert distances == sorted(distances, reverse=True) and distances[0] > 50 * distances[-1]


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall, density_coverage])
def test_numpy_and_torch_of_any_dtype_give_the_float64_result(metric):
    real, generated = normal(40, 6, 1).float(), normal(30, 6, 2).float() + 0.3
    expected = metric(real.double(), generated.double())
    assert metric(real, generated) == expected
    assert metric(real.numpy(), generated.numpy()) == expected
    assert metric(real.requires_grad_(), generated) == expected


nan_in_rows_2_and_5 = normal(9, 4).index_fill(0, torch.tensor([2, 5]), float("nan"))


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall, density_coverage])
@pytest.mark.parametrize(
    "real, generated, error, text",
    [
        (normal(9, 4), normal(9, 5), ValueError, "`generated` must have the 4 features of `real`, got 5"),
        (normal(1, 4), normal(9, 4), ValueError, "`real` must hold at least . samples, got 1"),
        (normal(9, 4), normal(0, 4), ValueError, "`generated` must hold at least . samples, got 0"),
        (normal(9, 4)[0], normal(9, 4), ValueError, r"`real` must have shape \[N, D\]"),
        (
            normal(9, 4),
            nan_in_rows_2_and_5,
            ValueError,
            r"`generated` must be finite, got NaN .* in 2 of 9 samples \(2, 5\)",
        ),
        (normal(9, 4).tolist(), normal(9, 4), TypeError, "`real` must be a torch.Tensor or a numpy.ndarray"),
        (normal(9, 4), normal(9, 4) + 0j, TypeError, "`generated` must hold real numbers"),
    ],
)
def test_bad_features_are_refused_by_the_name_of_the_argument(metric, real, generated, error, text):
    with pytest.raises(error, match=text):
        metric(real, generated)


def test_counts_out_of_range_are_refused_by_name():
    features = normal(10, 4)
    with pytest.raises(ValueError, match="`real` must hold at least 11 samples, got 10"):
        precision_recall(features, features, k=10)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        precision_recall(features, features, k=0)
    with pytest.raises(TypeError, match="`k` must be an int, got 1.5"):
        precision_recall(features, features, k=1.5)
    with pytest.raises(ValueError, match="`subset_size` must be at most the smaller set's 10 samples, got 11"):
        kernel_distance(features, features, subset_size=11)
    with pytest.raises(ValueError, match="`num_subsets` must be at least 1, got 0"):
        kernel_distance(features, features, num_subsets=0)


# Feature network


def test_feature_net_comes_back_from_disk_with_the_same_weights_features_and_accuracy(tmp_path):
    net = FeatureNet(in_channels=3, sample_size=16, num_classes=4, feature_dim=24, channels=(8, 16)).eval()
    net.register_to_config(heldout_accuracy={"16": 0.5})
    net.save_pretrained(tmp_path)
    loaded = FeatureNet.from_pretrained(tmp_path, use_safetensors=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert weights_hash(loaded) == weights_hash(net)
    assert describe_feature_net(loaded) == f"FeatureNet {weights_hash(net)}, held-out accuracy 50.00 % at 16 px"
    images = torch.randn(5, 3, 16, 16)
    features, logits = loaded(images)
    assert features.shape == (5, 24) and logits.shape == (5, 4)
    assert torch.allclose(features, net(images)[0], atol=1e-5)


def test_weights_hash_changes_with_any_one_weight():
    net = FeatureNet()
    hashes = {weights_hash(net)}
    for parameter in net.parameters():
        parameter.data.view(-1)[0] += 1e-3
        hashes.add(weights_hash(net))
    assert len(hashes) == len(list(net.parameters())) + 1


def test_feature_net_resizes_other_sizes_antialiased():
    net = FeatureNet(sample_size=16).eval()
    for size in (8, 16, 28):
        images = torch.randn(2, 1, size, size)
        resized = F.interpolate(images, (16, 16), mode="bilinear", antialias=True, align_corners=False)
        assert torch.equal(net(images)[0], net(resized)[0])


def test_features_of_an_image_do_not_depend_on_its_batch_or_on_training_mode():
    net, images = FeatureNet().train(), torch.randn(10, 1, 8, 8)
    together, _ = extract_features(net, images)
    assert net.training
    pairs, _ = extract_features(net, images, batch_size=3)
    assert torch.allclose(together, pairs, atol=1e-5)
    assert torch.allclose(together, net(images)[0], atol=1e-5)


def test_feature_net_refuses_wrong_channels_and_sizes():
    with pytest.raises(ValueError, match=r"`images` must have shape \[B, 1, H, W\], got \(2, 3, 8, 8\)"):
        FeatureNet()(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"`sample_size` must be >= 16 for \(8, 8, 8, 8\), got 8"):
        FeatureNet(sample_size=8, channels=(8, 8, 8, 8))
    with pytest.raises(ValueError, match=r"`channels` must be multiples of 8, got \(8, 12\)"):
        FeatureNet(channels=(8, 12))


def test_shipped_digits_net_measures_the_held_out_accuracy_it_states(script, digits_net):
    images, labels = script.load_split("digits", "test", 8)
    assert len(images) == 360 and labels.bincount().min() >= 34
    measured = script.accuracy(digits_net, images, labels)
    assert measured == pytest.approx(digits_net.config.heldout_accuracy["8"], abs=1e-9)
    assert measured >= 0.975


@pytest.mark.skipif(not FASHION_MNIST_DIR.is_dir(), reason="the Fashion-MNIST files are not on this machine")
@pytest.mark.parametrize("resolution", [32, 16])
def test_shipped_fashion_net_measures_the_held_out_accuracy_it_states(script, resolution):
    net = FeatureNet.from_pretrained(ASSETS / "features-fashion-mnist", use_safetensors=True)
    images, labels = script.load_split("fashion_mnist", "test", resolution)
    assert images.shape == (10000, 1, resolution, resolution)
    measured = script.accuracy(net, images, labels)
    # Another machine's rounding may turn a few of the 10,000 that lie between two classes.
    assert measured == pytest.approx(net.config.heldout_accuracy[str(resolution)], abs=5e-4)
    assert measured >= 0.9


def test_digits_split_is_disjoint_and_complete(script):
    train, test = (script.load_split("digits", split, 8)[0].flatten(1) for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    pool = torch.cat([train, test])
    # The 1797 scans are all different, so a sample in both splits would show as a duplicate.
    assert len(torch.unique(pool, dim=0)) == 1797


def test_shipped_nets_are_small_and_safetensors_only():
    for folder, limit in (("features-digits", 100_000), ("features-fashion-mnist", 120_000)):
        net = FeatureNet.from_pretrained(ASSETS / folder, use_safetensors=True)
        files = sorted(file.name for file in (ASSETS / folder).iterdir())
        assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
        assert sum(parameter.numel() for parameter in net.parameters()) <= limit
        assert sum(file.stat().st_size for file in (ASSETS / folder).iterdir()) <= 500_000
        assert all(accuracy >= 0.9 for accuracy in net.config.heldout_accuracy.values())


def test_training_script_is_deterministic_by_seed_and_saves_a_loadable_net(script, tmp_path):
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = ["--output_dir", str(tmp_path / name), "--num_train_epochs", "2", "--seed", str(seed)]
        script.main(script.parse_args(argv))
        net = FeatureNet.from_pretrained(tmp_path / name, use_safetensors=True)
        assert set(net.config.heldout_accuracy) == {"8"}
        hashes.append(weights_hash(net))
    assert hashes[0] == hashes[1] != hashes[2]


def test_shift_moves_each_image_by_at_most_one_pixel_and_mixes_none(script):
    images = torch.full((64, 1, 8, 8), -1.0)
    images[:, 0, 4, 4] = torch.linspace(0, 1, 64)
    shifted = script.shift(images, torch.Generator().manual_seed(0))
    assert torch.equal(shifted.amax(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3)))
    places = (shifted[:, 0] > -1).nonzero()[:, 1:]
    assert len(places) == 64 and places.min() == 3 and places.max() == 5 and len(torch.unique(places, dim=0)) == 9


def test_mirror_and_reduce_mirrors_about_half_and_reduces_the_first_half_of_the_batch_only(script):
    images = torch.full((64, 1, 32, 32), -1.0)
    images[..., 3] = 1.0
    out = script.mirror_and_reduce(images, torch.Generator().manual_seed(0))
    mirrored = out[:, 0, 0, 28] > out[:, 0, 0, 3]
    assert 10 < mirrored[:32].sum() < 22 and 10 < mirrored[32:].sum() < 22
    assert torch.equal(out[32:], torch.where(mirrored[32:, None, None, None], images[32:].flip(-1), images[32:]))
    small = F.avg_pool2d(torch.where(mirrored[:32, None, None, None], images[:32].flip(-1), images[:32]), 2)
    # What the network makes of a 16x16 image is what it was trained on.
    net = FeatureNet(sample_size=32)
    assert torch.allclose(net(out[:32])[0], net(small)[0], atol=1e-5)


# Evaluation


def test_evaluation_over_parts_equals_evaluating_each_part_alone(digits_net, digits):
    images, labels = digits
    generated, real = (images[:600], labels[:600]), (images[600:], labels[600:])
    parts = {0: torch.arange(5), 1: torch.arange(5, 10)}
    results = evaluate_images(digits_net, *generated, *real, parts)
    for part, classes in parts.items():
        chosen = [(x[torch.isin(y, classes)], y[torch.isin(y, classes)]) for x, y in (generated, real)]
        alone = evaluate_images(digits_net, *chosen[0], *chosen[1])
        assert results["parts"][part].keys() == alone.keys()
        assert all(results["parts"][part][key] == pytest.approx(alone[key], abs=1e-4, rel=1e-3) for key in alone)
    assert sum(results["parts"][part]["num_generated"] for part in parts) == results["num_generated"] == 600


def test_evaluation_is_the_metrics_on_the_nets_features(digits_net, digits):
    images, labels = digits
    results = evaluate_images(digits_net, images[:300], labels[:300], images[300:], labels[300:])
    with torch.no_grad():
        generated, real = digits_net(images[:300])[0], digits_net(images[300:])[0]
    assert results["fd"] == pytest.approx(frechet_distance(real, generated), rel=1e-3)
    assert (results["kid"], results["kid_std"]) == pytest.approx(kernel_distance(real, generated), abs=1e-5)
    assert (results["precision"], results["recall"]) == pytest.approx(precision_recall(real, generated), abs=0.01)
    assert (results["density"], results["coverage"]) == pytest.approx(density_coverage(real, generated), abs=0.01)
    assert results["diversity"] == pytest.approx(cross_seed_diversity(generated, labels[:300]), rel=1e-4)
    assert results["inception_score"] == pytest.approx(inception_score(digits_net(images[:300])[1])[0], rel=1e-4)
    assert "parts" not in results


def test_real_digits_score_well_noise_scores_badly_and_wrong_labels_cost_only_accuracy(digits_net, digits):
    images, labels = digits
    real, real_labels = images[700:], labels[700:]
    good = evaluate_images(digits_net, images[:700], labels[:700], real, real_labels)
    noise = torch.rand(700, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bad = evaluate_images(digits_net, noise, labels[:700], real, real_labels)
    assert good["class_accuracy"] > 0.99 and bad["class_accuracy"] < 0.3
    assert bad["fd"] > 10 * good["fd"] and bad["kid"] > 10 * abs(good["kid"])
    assert good["precision"] > 0.6 and bad["precision"] < 0.3
    mislabelled = evaluate_images(digits_net, images[:700], (labels[:700] + 1) % 10, real, real_labels)
    assert mislabelled["fd"] == good["fd"] and mislabelled["class_accuracy"] < 0.01


def test_evaluation_takes_any_module_that_gives_features_and_logits(digits):
    class Pixels(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1), torch.eye(10)[images.new_zeros(len(images)).long()]

    images, labels = digits
    results = evaluate_images(Pixels(), images[:200], labels[:200], images[200:], labels[200:])
    assert results["class_accuracy"] == pytest.approx((labels[:200] == 0).double().mean().item())
    assert results["fd"] == pytest.approx(frechet_distance(images[200:].flatten(1), images[:200].flatten(1)))


def test_bad_evaluation_input_is_refused_by_the_name_of_the_argument(digits_net, digits):
    images, labels = digits[0][:100], digits[1][:100]
    for arguments, error, text in (
        ((images, labels[:99], images, labels), ValueError, r"`labels` must have shape \[100\], got \(99,\)"),
        ((images, labels.float(), images, labels), TypeError, "`labels` must hold integers, got dtype torch.float32"),
        ((images, labels + 1, images, labels), ValueError, r"`labels` must lie in \[0, 10\), got 1 to 10"),
        ((images, labels, images, labels - 1), ValueError, r"`real_labels` must lie in \[0, 10\), got -1 to 8"),
        (
            (images / 0, labels, images, labels),
            ValueError,
            "`generated` must be finite, .* 100 of 100 .*0, 1, .*, 9, ...",
        ),
        ((images.byte(), labels, images, labels), ValueError, "`generated` must be a float tensor"),
        ((images, labels, images[0], labels), ValueError, "`real_images` must be a float tensor"),
        ((images.tolist(), labels, images, labels), TypeError, "`generated` must be a torch.Tensor"),
        ((images[:3], labels[:3], images, labels), ValueError, "`generated` must hold >= 4 images, got 3"),
    ):
        with pytest.raises(error, match=text):
            evaluate_images(digits_net, *arguments)
    with pytest.raises(ValueError, match=r"`generated` must hold >= 4 images of the classes in `parts\[7\]`, got 0"):
        evaluate_images(digits_net, images, labels, images, labels, {7: torch.tensor([12])})
    with pytest.raises(ValueError, match=r"`real_images` must hold >= 6 images of the classes in `parts\[1\]`, got 5"):
        only_five = (labels != 3) | ((labels == 3).cumsum(dim=0) <= 5)
        evaluate_images(digits_net, images, labels, images[only_five], labels[only_five], {1: torch.tensor([3])})

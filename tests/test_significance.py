"""Intervals, tests and corrections: against simulations with a known truth, scipy, and examples worked by hand."""
import numpy as np
import pytest

import significance
from significance import (compare, compare_systems, context_saved, detectable, holm, mcnemar_p, mean_intervals, percentiles,
                          bootstrap_means, queries_needed, randomisation_p, verdict)


def ndcg_of(ranks):
    """nDCG@10 of one gold document at each rank."""
    return np.where(ranks <= 10, 1 / np.log2(ranks + 1.0), 0.0)


def population(size=100_000, lift=1.0, seed=0):
    """nDCG@10 of two systems that share each query's difficulty; above 1, `lift` makes the second better."""
    rng = np.random.default_rng(seed)
    difficulty = rng.gamma(0.6, 12, size)
    before, after = (1 + rng.poisson(difficulty * rng.lognormal(0, 0.4, size) / x) for x in (1.0, lift))
    return ndcg_of(before), ndcg_of(after)


def samples(n, datasets, lift=1.0, seed=1):
    """(before, after) of shape (n, datasets) drawn from the population, and the population's true means."""
    before, after = population(lift=lift)
    rows = np.random.default_rng(seed).integers(0, len(before), (n, datasets))
    return before[rows], after[rows], before.mean(), after.mean()


@pytest.mark.parametrize("n", [30, 225])
def test_the_interval_of_a_change_holds_the_truth_95_times_in_100(n):
    before, after, true_before, true_after = samples(n, 1500, lift=1.5)
    low, high = percentiles(bootstrap_means(after - before, 0, 2000), n)
    assert 0.93 <= np.mean((low <= true_after - true_before) & (true_after - true_before <= high)) <= 0.97


def test_the_interval_of_a_mean_holds_the_truth_95_times_in_100():
    before, _, truth, _ = samples(100, 1500)
    low, high = mean_intervals(before, 0, 2000)
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97
    hits = (before == 1).astype(float)
    low, high = mean_intervals(hits, 0, 2000)
    truth = (population()[0] == 1).mean()
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97


@pytest.mark.parametrize("n", [30, 225])
def test_a_true_null_is_rejected_5_times_in_100(n):
    before, after, *_ = samples(n, 1500)
    assert 0.03 <= np.mean(randomisation_p(after - before, 0, 2000) < 0.05) <= 0.07


def test_the_verdict_is_wrong_about_a_true_null_at_most_5_times_in_100():
    before, after, *_ = samples(100, 1500)
    words = [verdict(c) for c in compare(before, after, 0, 2000)]
    assert 0.02 <= 1 - words.count("not distinguishable") / len(words) <= 0.06
    hits = [verdict(c) for c in compare((before == 1) * 1.0, (after == 1) * 1.0, 0, 2000)]
    assert hits.count("not distinguishable") / len(hits) >= 0.945  # exact, so on the safe side


def test_the_detectable_difference_is_found_four_times_in_five():
    before, after, *_ = samples(225, 1)
    differences = (after - before)[:, 0] - (after - before).mean()
    effect = detectable(differences)
    rows = np.random.default_rng(2).integers(0, 225, (225, 1500))
    found = randomisation_p(differences[rows] + effect, 0, 2000) < 0.05
    assert 0.77 <= found.mean() <= 0.83
    assert queries_needed(differences + effect) in (224, 225, 226)


def test_fewer_and_more_queries_are_needed_for_a_larger_and_a_smaller_difference():
    d = np.random.default_rng(0).normal(0.1, 0.5, 100)
    assert queries_needed(d + 0.1) < queries_needed(d)
    assert queries_needed(np.zeros(10)) is None and detectable(np.zeros(10)) == 0


def test_the_randomisation_p_is_scipys_exact_one_within_its_noise():
    from scipy.stats import permutation_test
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.3, 0.6):
        d = np.round(rng.normal(shift, 1, 12), 1)
        exact = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert abs(float(randomisation_p(d[:, None], 0)[0]) - exact) < 0.015


def test_mcnemar_counts_only_the_queries_that_changed():
    before = np.array([0] * 8 + [1] * 2 + [1] * 50)
    after = np.array([1] * 8 + [0] * 2 + [1] * 50)
    assert mcnemar_p(before, after) == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # at most 2 of 10 fair coins, twice
    assert mcnemar_p(before, before) == 1.0


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_twenty_hits_of_twenty_are_not_certainty():
    low, high = mean_intervals(np.ones((20, 1)), 0)[:, 0]
    z2 = 1.959963985**2
    assert low == pytest.approx(20 / (20 + z2)) and high == 1.0  # Wilson's bound for n of n


def test_the_bootstrap_interval_is_scipys_for_many_queries():
    from scipy.stats import bootstrap
    values = population(400)[0]
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(0)).confidence_interval
    assert percentiles(bootstrap_means(values[:, None], 0), 400)[:, 0] == pytest.approx(theirs, abs=0.003)


def test_for_few_queries_of_normal_spread_the_interval_is_students():
    from scipy.stats import norm, t
    values = norm.ppf((np.arange(10) + 0.5) / 10)
    theirs = t.interval(0.95, 9, 0, values.std(ddof=1) / np.sqrt(10))
    assert percentiles(bootstrap_means(values[:, None], 0, 40_000), 10)[:, 0] == pytest.approx(theirs, rel=0.03)


def test_samples_do_not_depend_on_how_many_are_held_in_memory(monkeypatch):
    d = np.random.default_rng(0).normal(size=(50, 3))
    whole = bootstrap_means(d, 7, 100), randomisation_p(d, 7, 100)
    monkeypatch.setattr(significance, "_CELLS", 350)
    parts = bootstrap_means(d, 7, 100), randomisation_p(d, 7, 100)
    assert np.allclose(whole[0], parts[0], atol=1e-12) and (whole[1] == parts[1]).all()


def test_two_systems_swapped_give_the_same_p_and_the_opposite_change():
    before, after, *_ = samples(60, 2, lift=2)
    for c, d in zip(compare(before, after, 0), compare(after, before, 0)):
        assert c["p"] == d["p"] and c["change"] == -d["change"]
        assert (c["win"], c["tie"], c["loss"]) == (d["loss"], d["tie"], d["win"])
        assert c["interval"] == pytest.approx([-d["interval"][1], -d["interval"][0]])


def test_one_query_is_no_evidence():
    c, = compare([[0.0]], [[1.0]], 0)
    assert verdict(c) == "not distinguishable"


def test_more_systems_make_the_other_p_values_larger_but_not_that_of_the_verdict():
    before, after, *_ = samples(100, 3, lift=2)
    few = compare_systems({"baseline": before, "finetuned": after}, 1, 0)
    many = compare_systems({"baseline": before, "finetuned": after} | {f"s{i}": before for i in range(20)}, 1, 0)
    assert few["finetuned"][1]["p_holm"] == many["finetuned"][1]["p_holm"] == few["finetuned"][1]["p"]
    assert many["finetuned"][0]["p_holm"] > few["finetuned"][0]["p_holm"]
    assert few["finetuned"][0]["p_holm"] == pytest.approx(holm([few["finetuned"][j]["p"] for j in (0, 2)])[0])


def test_context_saved_by_hand():
    ten = np.tile(np.arange(1, 11) * 100, (4, 1))  # every document has 100 tokens
    before, after = [2, 4, 4, 50], [1, 2, 2, 50]
    saved = context_saved((before, ten), (after, ten), 10, 0)
    # the baseline's Hit@10, 3 of 4, is there at its 4th document; the other has it at its 2nd
    assert (saved["hit"], saved["k_before"], saved["tokens_before"], saved["k"], saved["saved"]) == (0.75, 4, 400, 2, 0.5)
    worse = context_saved((after, ten), ([50, 50, 1, 1], ten), 10, 0)
    assert worse["k"] is None and worse["saved"] is None
    same = context_saved((before, ten), (before, ten), 10, 0)
    assert same["saved"] == 0 and same["interval"] == [0, 0]

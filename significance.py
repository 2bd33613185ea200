"""How far a result can be trusted: intervals, tests, corrections, and what a number of queries can show.

Pure functions on arrays. A row is a query, a column a metric or a system; two systems are always
compared on the same queries. A column that holds only 0 and 1 (Hit@K) gets the exact or score
methods for proportions, any other the resampling ones.
"""
import math

import numpy as np

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 10_000
_CELLS = 4_000_000  # largest array of random numbers held at once


def bootstrap_means(values, seed, resamples=RESAMPLES):
    """Means of each column in samples of the rows drawn with replacement: (resamples, columns).

    All columns are resampled together, so that a difference of two columns is a paired one. The
    samples are kept as counts of each row, which makes their means one matrix product.
    """
    values = np.asarray(values, float)
    n, rng = len(values), np.random.default_rng(seed)
    out = np.empty((resamples, values.shape[1]))
    step = max(1, _CELLS // n)
    for start in range(0, resamples, step):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        out[start:start + step] = counts @ values / n
    return out


def percentiles(means, n, level=LEVEL):
    """The interval (low, high) of each column of bootstrap_means() over `n` rows.

    Percentiles widened for small n as in Hesterberg (2015), "What Teachers Should Know About the
    Bootstrap", section 4.2 (the expanded percentile interval): plain ones are too narrow by the
    factor sqrt((n - 1) / n) and by the normal instead of Student's distribution.
    """
    from scipy.stats import norm, t
    tail = norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - level) / 2, n - 1)) if n > 1 else 0.0
    return np.quantile(means, [tail, 1 - tail], axis=0)


def is_binary(column) -> bool:
    return bool(np.isin(column, (0, 1)).all())


def mean_intervals(values, seed, resamples=RESAMPLES):
    """95% interval of the mean of each column, (2, columns): Wilson's for 0/1 columns, else bootstrap.

    The bootstrap gives [1, 1] for twenty hits of twenty; Wilson's score interval gives [0.84, 1].
    """
    from scipy.stats import binomtest
    values = np.asarray(values, float)
    n = len(values)
    out = percentiles(bootstrap_means(values, seed, resamples), n)
    for j, column in enumerate(values.T):
        if is_binary(column):
            out[:, j] = binomtest(int(column.sum()), n).proportion_ci(LEVEL, method="wilson")
    return out


def randomisation_p(differences, seed, resamples=RESAMPLES):
    """Two-sided p of each column of paired differences, by random changes of their signs.

    If neither system is better, each query's difference is as likely with the other sign (Fisher's
    randomisation test; Smucker, Allan & Carterette, CIKM 2007). The observed signs count as one of
    the samples, so that p is never 0 and never too small.
    """
    differences = np.asarray(differences, float)
    n, rng = len(differences), np.random.default_rng(seed)
    observed = np.abs(differences.sum(0)) - 1e-9  # sums of the same numbers in another order
    beyond, step = np.ones(differences.shape[1]), max(1, _CELLS // n)
    for start in range(0, resamples, step):
        signs = rng.integers(0, 2, size=(min(step, resamples - start), n)) * 2.0 - 1
        beyond += (np.abs(signs @ differences) >= observed).sum(0)
    return beyond / (resamples + 1)


def mcnemar_p(before, after) -> float:
    """Exact two-sided p of McNemar's test: of the queries that changed, is half a hit and half a miss?"""
    from scipy.stats import binomtest
    won, lost = int(np.sum(after > before)), int(np.sum(after < before))
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def holm(ps) -> list[float]:
    """Holm's (1979) correction: p values that hold for all comparisons of the family together."""
    order, out, largest = np.argsort(ps, kind="stable"), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = float(largest)
    return out


def detectable(differences) -> float:
    """The smallest mean difference that so many queries show in four runs of five.

    Two-sided at 5% with 80% power, by the normal approximation, from the spread of the observed
    differences: (z_0.975 + z_0.8) * sd / sqrt(n). 0 if no query differs.
    """
    return _effect() * _sd(differences) / math.sqrt(len(differences))


def queries_needed(differences) -> int | None:
    """Queries with which the observed mean difference would be seen in four runs of five; None if it is 0."""
    mean = abs(float(np.mean(differences)))
    return math.ceil((_effect() * _sd(differences) / mean) ** 2) if mean > 1e-12 else None


def _effect() -> float:
    from scipy.stats import norm
    return float(norm.ppf((1 + LEVEL) / 2) + norm.ppf(POWER))


def _sd(differences) -> float:
    return float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0


def compare(before, after, seed, resamples=RESAMPLES) -> list[dict]:
    """One dict a column of two systems' figures, (queries, columns) each: change, its interval, p, win/tie/loss."""
    before, after = np.asarray(before, float), np.asarray(after, float)
    differences = after - before
    low, high = percentiles(bootstrap_means(differences, seed, resamples), len(before))
    ps = randomisation_p(differences, seed, resamples)
    out = []
    for j, (d, b, a) in enumerate(zip(differences.T, before.T, after.T)):
        p = mcnemar_p(b, a) if is_binary(b) and is_binary(a) else float(ps[j])
        win, loss = int((d > 0).sum()), int((d < 0).sum())
        out.append({"change": float(d.mean()), "interval": [float(low[j]), float(high[j])], "p": p,
                    "win": win, "tie": len(d) - win - loss, "loss": loss})
    return out


def verdict(comparison) -> str:
    """"better", "worse" or "not distinguishable": p below 5% and an interval without 0, or neither word."""
    low, high = comparison["interval"]
    if comparison["p"] < 1 - LEVEL and (low > 0 or high < 0):
        return "better" if low > 0 else "worse"
    return "not distinguishable"


def compare_systems(values, primary, seed) -> dict[str, list[dict]]:
    """Every comparison of an evaluation: {label: [comparison]}, p also corrected, as `p_holm`.

    `values`: {label: (queries, metrics)}, of which "baseline" and "finetuned" are compared on every
    metric; any other system is compared with "finetuned" on the column `primary` alone. Baseline
    against fine-tuned on `primary` was fixed in advance and stands by itself; all others are one
    family for Holm.
    """
    others = [label for label in values if label not in ("baseline", "finetuned")]
    out = {"finetuned": compare(values["baseline"], values["finetuned"], seed)}
    if others:
        columns = np.stack([values[label][:, primary] for label in others], axis=1)
        against = np.repeat(values["finetuned"][:, [primary]], len(others), axis=1)
        out |= {label: [c] for label, c in zip(others, compare(against, columns, seed))}
    first = out["finetuned"][primary]
    family = [c for cs in out.values() for c in cs if c is not first]
    for c, p in zip([first, *family], [first["p"], *holm([c["p"] for c in family])]):
        c["p_holm"] = p
    return out


def context_saved(before, after, k, seed) -> dict:
    """How many documents, and what share of the tokens, a second system needs for the Hit@k of a first one.

    `before` and `after`: (ranks of gold, tokens of the first 1, 2, ... documents: (queries, depth)).
    The first system is given as few documents as have its Hit@k, which may be fewer than k. Returns
    "hit"; "k_before" and "tokens_before"; "k", the second system's smallest K with at least that
    Hit; "saved", 1 - its tokens over the first's; "interval" of that over queries. "k" and "saved"
    are None if no K within the depth is enough; samples in which none is count the whole depth.
    """
    depth = before[1].shape[1]
    table = np.hstack([part for ranks, tokens in (before, after)
                       for part in (np.asarray(ranks)[:, None] <= np.arange(1, depth + 1), tokens)]).astype(float)

    def needed(means):  # (samples, 4 * depth): hits and tokens of the first, then of the second system
        hits, tokens, own_hits, own_tokens = np.split(means, 4, axis=1)
        want, sample = hits[:, [min(k, depth) - 1]] - 1e-9, np.arange(len(means))
        first, own = (hits >= want).argmax(1), np.where(own_hits[:, -1:] >= want, own_hits >= want, np.arange(depth) == depth - 1).argmax(1)
        return first, tokens[sample, first], own, 1 - own_tokens[sample, own] / tokens[sample, first], own_hits[:, -1] >= want[:, 0]

    first, tokens, own, saved, reached = (x[0] for x in needed(table.mean(0, keepdims=True)))
    interval = percentiles(needed(bootstrap_means(table, seed))[3][:, None], len(table))[:, 0]
    return {"hit": float(table[:, min(k, depth) - 1].mean()), "k_before": int(first) + 1, "tokens_before": float(tokens),
            "k": int(own) + 1 if reached else None, "saved": float(saved) if reached else None, "interval": interval.tolist()}

"""The shipped sample keeps the promises that data/README.md makes."""
import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from common import ROOT, normalise
from reading import read_rows

SPLITS = ("train", "validation", "test")


def words(text):
    return re.findall(r"[a-z0-9+#.]+(?:['’-][a-z0-9+#]+)*", text.lower())


def grams(text, n):
    w = words(text)
    return {tuple(w[i:i + n]) for i in range(len(w) - n + 1)}


def highest_overlap(texts, n=5):
    """The pair of texts with the highest n-gram Jaccard similarity, as (similarity, i, j)."""
    sets = [grams(t, n) for t in texts]
    where = defaultdict(list)
    for i, s in enumerate(sets):
        for g in s:
            where[g].append(i)
    shared = Counter(pair for rows in where.values() for pair in combinations(rows, 2))
    return max((k / (len(sets[i]) + len(sets[j]) - k), i, j) for (i, j), k in shared.items())


@pytest.fixture(scope="module")
def splits():
    return {s: [row for _, row in read_rows(ROOT / "data" / f"{s}.jsonl")] for s in SPLITS}


@pytest.fixture(scope="module")
def ads(splits):
    documents = [row["text"] for _, row in read_rows(ROOT / "data" / "documents.jsonl")]
    return list(dict.fromkeys([r[k] for s in SPLITS for r in splits[s] for k in ("positive", "negative")] + documents))


def test_there_are_enough_rows_and_ads(splits, ads):
    assert len(splits["train"]) >= 700 and len(splits["validation"]) >= 100 and len(splits["test"]) >= 200
    assert len(ads) >= 1200


def test_the_counts_in_the_readme_are_true(splits, ads):
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for s in SPLITS:
        assert f"| `{s}.jsonl` | {len(splits[s])} |" in readme
    assert f"| `documents.jsonl` | {len(read_rows(ROOT / 'data' / 'documents.jsonl'))} |" in readme
    assert f"{len(ads):,} ads in all" in readme
    assert f"Jaccard similarity of {highest_overlap(ads)[0]:.3f}" in readme


def test_every_ad_is_a_text_of_its_own(ads):
    assert len({normalise(a) for a in ads}) == len(ads)
    similarity, i, j = highest_overlap(ads)
    assert similarity <= 0.25, f"{similarity:.2f}\n{ads[i]}\n---\n{ads[j]}"


def test_no_phrase_of_eight_words_recurs_in_one_percent_of_ads(ads):
    phrase, count = Counter(g for a in ads for g in grams(a, 8)).most_common(1)[0]
    assert count <= len(ads) / 100, " ".join(phrase)


def test_every_query_is_asked_once(splits):
    queries = Counter(normalise(r["query"]).lower() for s in SPLITS for r in splits[s])
    assert queries.most_common(1)[0][1] == 1 and len(queries) >= 900


def test_every_query_has_its_own_ad(splits):
    positives = Counter(normalise(r["positive"]) for s in SPLITS for r in splits[s])
    assert positives.most_common(1)[0][1] == 1


def test_no_text_stands_in_two_splits_nor_among_the_documents(splits):
    sides = [{normalise(r[k]) for r in splits[s] for k in ("query", "positive", "negative")} for s in SPLITS]
    sides.append({normalise(row["text"]) for _, row in read_rows(ROOT / "data" / "documents.jsonl")})
    for a, b in combinations(sides, 2):
        assert not a & b


def test_ads_have_sixty_to_a_hundred_and_eighty_words(ads):
    assert all(60 <= len(a.split()) <= 180 for a in ads)


def test_queries_copy_no_four_words_in_a_row_from_their_ad(splits):
    for s in SPLITS:
        for r in splits[s]:
            assert not grams(r["query"], 4) & grams(r["positive"], 4), r["query"]


def test_a_negative_is_another_text_than_its_positive(splits):
    assert all(normalise(r["negative"]) != normalise(r["positive"]) for s in SPLITS for r in splits[s])


def test_no_mail_address_phone_number_or_web_address(splits, ads):
    found = re.compile(r"\S@\S|https?:|www\.|\b\w+\.(?:com|org|net|io)\b|\+?\d[\d ()/-]{8,}\d")
    for text in ads + [r["query"] for s in SPLITS for r in splits[s]]:
        assert not found.search(text), found.search(text)

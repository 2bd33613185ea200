"""Stage 0: what enters the corpus, in which order, and what cannot be built."""
import json

import pytest

from common import UserError, normalise, text_id
from conftest import DOCUMENTS, ROWS, stage, write_jsonl


def make(data, out, *flags):
    stage(0).main(["--data", str(data), "--out", str(out / "corpus.jsonl"), *map(str, flags)])
    return [json.loads(line) for line in (out / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_gold_document_is_in_a_corpus_of_the_asked_size(data, tmp_path):
    corpus = make(data, tmp_path, "--size", 20)
    assert len(corpus) == 20 and {r[1] for r in ROWS[18:]} <= {d["text"] for d in corpus}
    assert all(d["_id"] == text_id(d["text"]) for d in corpus)
    assert [set(d) for d in corpus] == [{"_id", "title", "text", "source", "seen_in_training"}] * 20


def test_distractors_come_from_the_least_trained_source_first(data, tmp_path):
    counts = {size: [d["source"] for d in make(data, tmp_path, "--size", size)] for size in (10, 22, 40, 56)}
    assert {s: counts[10].count(s) for s in set(counts[10])} == {"gold": 6, "document": 4}
    assert {s: counts[22].count(s) for s in set(counts[22])} == {"gold": 6, "document": 8, "test negative": 6, "validation": 2}
    assert counts[40].count("validation") == 12 and counts[40].count("train") == 8
    assert counts[56].count("train") == 24


def test_documents_of_training_rows_are_marked_as_seen(data, tmp_path):
    seen = {t for r in ROWS[:12] for t in r[1:]}
    assert all(d["seen_in_training"] == (d["text"] in seen) for d in make(data, tmp_path, "--size", 56))


def test_a_document_that_training_contains_is_not_an_untouched_one(data, tmp_path):
    write_jsonl(tmp_path / "extra.jsonl", [{"text": ROWS[0][1] + "\n"}])
    corpus = make(data, tmp_path, "--size", 56, "--extra", tmp_path / "extra.jsonl")
    assert [d["source"] for d in corpus if d["text"] == ROWS[0][1] + "\n" or d["text"] == ROWS[0][1]] == ["train"]


def test_equal_texts_are_one_document_and_a_title_survives(data, tmp_path):
    write_jsonl(tmp_path / "extra.jsonl", [{"text": "  ".join(ROWS[20][1].split(" ")), "title": "Plaster"}, {"text": DOCUMENTS[0]}])
    corpus = make(data, tmp_path, "--size", 56, "--extra", tmp_path / "extra.jsonl")
    assert len({normalise(d["text"]) for d in corpus}) == 56
    assert [(d["title"], d["source"]) for d in corpus if d["_id"] == text_id(ROWS[20][1])] == [("Plaster", "gold")]
    record = json.loads((tmp_path / "corpus.run.json").read_text())
    assert record["result"]["equal_texts_merged"] == 2


def test_gold_does_not_come_first_and_the_seed_decides_the_order(data, tmp_path):
    first, again, other = (make(data, tmp_path, "--size", 56, "--seed", s) for s in (1, 1, 2))
    assert first == again and first != other
    assert sorted(d["_id"] for d in first) == sorted(d["_id"] for d in other)
    assert [d["source"] for d in first[:6]] != ["gold"] * 6


def test_a_size_below_the_golds_or_above_the_documents_says_what_there_is(data, tmp_path):
    kept = make(data, tmp_path, "--size", 20)
    with pytest.raises(UserError, match="--size 5 is below the 6 gold documents"):
        make(data, tmp_path, "--size", 5)
    with pytest.raises(UserError, match="there are 56 different documents .*--extra"):
        make(data, tmp_path, "--size", 57)
    assert [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()] == kept


def test_the_share_of_clipped_documents_is_counted_in_the_models_tokens():
    share, limit = stage(0).share_clipped(["word " * 254, "word " * 255, "short"])
    assert limit == 256 and share == pytest.approx(1 / 3)  # with [CLS] and [SEP]: 256, 257 and 3 tokens


def test_extra_documents_come_from_folders_and_named_columns(data, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text of its own")
    (tmp_path / "b.csv").write_text("text\nanother text\n")
    texts = {d["text"] for d in make(data, tmp_path, "--size", 58, "--extra", tmp_path / "texts", "--extra", tmp_path / "b.csv")}
    assert {"a text of its own", "another text"} <= texts

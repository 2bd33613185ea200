"""Inputs as people have them: every problem is named by file, line and field."""
import argparse
import json

import pytest

from common import UserError, looks_like_path, normalise, text_id
from conftest import ROWS, write_jsonl
from reading import Triplet, read_corpus, read_documents, read_queries, read_rows, read_triplets, split_by_component


def arguments(data, **more):
    return argparse.Namespace(**{"data": str(data), "query_col": "query", "positive_col": "positive", "negative_col": "negative",
                                 "offline": True, "limit": None, "queries": None, "qrels": None} | more)


def row(i=0, **changes):
    return dict(zip(("query", "positive", "negative"), ROWS[i])) | changes


def error_of(data, **more):
    with pytest.raises(UserError) as e:
        read_triplets(arguments(data, **more))
    return str(e.value)


@pytest.mark.parametrize("changes, says", [
    ({"positive": ""}, '"positive" is empty'),
    ({"positive": "  \n"}, '"positive" is empty'),
    ({"query": None}, '"query" is empty'),
    ({"query": 17}, '"query" is int, not text'),
    ({"query": float("nan")}, '"query" is NaN'),
    ({"negative": ["fine", 3]}, '"negative" is int, not text'),
    ({"negative": ""}, '"negative" is empty'),
    ({"positive": "half a pair: \ud800"}, "surrogate"),
])
def test_a_bad_field_is_named_with_file_and_line(tmp_path, changes, says):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(row(0)), "", json.dumps(row(1, **changes))]))
    assert error_of(tmp_path).startswith(f"{path}:3: ") and says in error_of(tmp_path)


def test_broken_json_is_named_with_its_line(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(row(0)) + '\n{"query": "a", \n')
    assert f"{tmp_path / 'train.jsonl'}:2: not valid JSON" in error_of(tmp_path)


def test_a_missing_column_is_named_and_the_cure_too(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "a", "positive": "b"}])
    assert 'no column "query"' in error_of(tmp_path) and "--query_col" in error_of(tmp_path)


def test_other_column_names_are_read_by_their_flags(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"q": "a", "good": "b", "bad": ["c", "d"]}])
    splits, _ = read_triplets(arguments(tmp_path, query_col="q", positive_col="good", negative_col="bad"))
    assert splits["test"][0][:3] == ("a", "b", ("c", "d"))


def test_a_file_without_rows_and_a_folder_without_splits_are_errors(tmp_path):
    assert "no train, validation or test" in error_of(tmp_path)
    (tmp_path / "train.jsonl").write_text("\n")
    assert error_of(tmp_path) == f"{tmp_path / 'train.jsonl'}: no rows"


def test_bom_and_crlf_are_read(tmp_path):
    text = "".join(json.dumps(row(i)) + "\r\n" for i in range(2))
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [r.query for r in read_triplets(arguments(tmp_path))[0]["test"]] == [ROWS[0][0], ROWS[1][0]]


def test_another_encoding_is_an_error_that_names_the_byte(tmp_path):
    (tmp_path / "test.csv").write_bytes("query,positive\nok,ok\ncafé,x\n".encode("latin-1"))
    assert error_of(tmp_path).startswith(f"{tmp_path / 'test.csv'}:3: byte 0xe9 is not UTF-8")


def test_all_formats_give_the_same_triplets(tmp_path):
    import pandas
    rows = [row(i) for i in range(3)] + [row(3, positive='a "quoted", cell\nof two lines; NA')]
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "a.jsonl", rows)
    for name in ("a.csv", "a.tsv", "a.parquet", "a.json", "a.jsonl"):
        assert [r for _, r in read_rows(tmp_path / name)] == rows, name


def test_the_text_na_in_a_csv_stays_text_and_an_empty_cell_is_none(tmp_path):
    (tmp_path / "a.csv").write_text("query,negative\nNA,\n")
    assert read_rows(tmp_path / "a.csv") == [(f"{tmp_path / 'a.csv'}:2", {"query": "NA", "negative": None})]


def test_csv_errors_name_the_line_where_the_record_starts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('query,positive\n"two\nlines",x\nonly one field\n')
    with pytest.raises(UserError, match=r"a\.csv:4: 1 fields, but the header names 2"):
        read_rows(path)


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text("query\na\u2028b\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl")[0][1] == read_rows(tmp_path / "a.csv")[0][1] == {"query": "a\u2028b"}



def test_a_row_may_have_no_negative(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"query": "a", "positive": "b"}])
    assert read_triplets(arguments(tmp_path))[0]["test"][0].negatives == ()


def test_one_file_is_split_so_that_no_text_stands_on_two_sides(tmp_path):
    rows = [{"query": f"q{i // 2}", "positive": f"p{(i + 1) // 2 % 40}"} for i in range(0, 100, 3)]
    rows += [{"query": f"alone {i}", "positive": f"only {i}"} for i in range(60)]
    write_jsonl(tmp_path / "all.jsonl", rows)
    splits, _ = read_triplets(arguments(tmp_path / "all.jsonl"))
    assert sum(map(len, splits.values())) == len(rows)
    for field in ("query", "positive"):
        sides = [{normalise(getattr(r, field)) for r in splits[s]} for s in ("train", "validation", "test")]
        assert all(sides) and not (sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2])
    assert 0.7 < len(splits["train"]) / len(rows) < 0.9


def test_chained_rows_are_one_component():
    rows = [Triplet("a", "1", (), "f:1"), Triplet("b", "1", (), "f:2"), Triplet("b", "2", (), "f:3"), Triplet("c", "3", (), "f:4")]
    split = split_by_component(rows, {"train": 0.5, "test": 0.5})
    assert sorted(map(len, split.values())) == [1, 3]


def test_a_file_too_small_to_split_is_an_error(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", [row(0), row(0)])
    assert "too few to split" in error_of(tmp_path / "all.jsonl")


def test_a_folder_without_validation_takes_it_from_train(tmp_path, data):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text((data / f"{name}.jsonl").read_text())
    splits, _ = read_triplets(arguments(tmp_path))
    assert len(splits["train"]) == 11 and len(splits["validation"]) == 1 and len(splits["test"]) == 6


def test_two_files_for_one_split_are_an_error(tmp_path):
    for suffix in (".jsonl", ".csv"):
        (tmp_path / f"train{suffix}").write_text("x")
    assert "holds both train.jsonl and train.csv" in error_of(tmp_path)


def test_documents_are_read_from_a_folder_of_texts_and_from_a_named_column(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "b.md").write_text("second")
    (tmp_path / "texts" / "deep" / "a.txt").write_text("first")
    (tmp_path / "texts" / "ignored.pdf").write_text("no")
    assert [(d.title, d.text) for d in read_documents(str(tmp_path / "texts"), "text", True)] == [("b", "second"), ("a", "first")]
    (tmp_path / "d.csv").write_text("body,title\nhello,T\n")
    assert read_documents(str(tmp_path / "d.csv"), "body", True)[0][:2] == ("T", "hello")
    with pytest.raises(UserError, match=r'd\.csv:2: no field "text"'):
        read_documents(str(tmp_path / "d.csv"), "text", True)


def test_equal_text_up_to_unicode_form_and_white_space_has_one_id():
    assert text_id("caf\u0065\u0301  au\u00a0lait\n") == text_id("caf\u00e9 au lait")
    assert text_id("Café") != text_id("café")


def test_a_corpus_that_misses_a_gold_document_is_an_error_with_the_cure(tmp_path, data):
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "something else"}])
    args = arguments(data, corpus=str(tmp_path / "corpus.jsonl"))
    with pytest.raises(UserError, match="lacks the positive of 6 test rows, the first at .*test.jsonl:1 .*0_build_corpus.py"):
        read_queries(args, read_corpus(args.corpus), {})


def test_equal_queries_are_one_query_with_all_its_positives(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"query": "a", "positive": "x"}, {"query": " a ", "positive": "y"}])
    corpus = [{"_id": "1", "text": "x "}, {"_id": "2", "text": "y"}]
    queries, qrels, _ = read_queries(arguments(tmp_path, corpus="c"), corpus, {})
    assert [t for _, t in queries] == ["a"] and list(qrels.values()) == [{"1": 1, "2": 1}]


def test_a_corpus_with_a_repeated_id_is_an_error(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [{"_id": "1", "text": "a"}, {"_id": "1", "text": "b"}])
    with pytest.raises(UserError, match=r'c\.jsonl:2: "_id" 1 was used before'):
        read_corpus(tmp_path / "c.jsonl")


def test_a_typo_in_a_path_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("./nope", "/abs/nope", "data/nope", "a/b/c", "mine/nope", "x.jsonl", "~/nope", "runs/finetuned/final"):
        assert looks_like_path(name), name
    for name in ("sentence-transformers/all-MiniLM-L6-v2", "squad", "BAAI/bge-base-en-v1.5"):
        assert not looks_like_path(name), name

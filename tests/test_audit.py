"""The audit of training rows: what it finds, what it leaves out, what it writes."""
import json

import pandas
import pytest
from conftest import ROWS, stage, write_jsonl

import audit
import retrieval
from common import UserError
from reading import Triplet

s1 = stage(1)


@pytest.fixture(scope="module")
def model(tiny_model):
    return retrieval.load_model(str(tiny_model), "cpu", "fp32", True)


def rows_of(*triplets):
    return [Triplet(q, p, tuple(n), f"train.jsonl:{i}") for i, (q, p, *n) in enumerate(triplets, 1)]


def problems(rows, model, validation=(), test=()):
    found, _ = audit.find_offences(rows, {"validation": list(validation), "test": list(test)}, model)
    return {(o.where.split(":")[1], o.problem) for o in found if o.problem != audit.FALSE_NEGATIVE}, found


def test_each_problem_is_found_in_its_row(model):
    (q1, p1, n1), (q2, p2, n2), (q3, p3, n3) = ROWS[:3]
    rows = rows_of((q1, p1, n1), (q1, "  " + p1 + "\n", n1),  # an equal row, but for white space
                   (q2, p2, p2.replace(" ", "  ")),           # its own positive as a negative
                   (q3, p3, n3), (q3, n3, n2),                # a negative that is the positive of another row of the query
                   (q2, p1, n2))
    found, offences = problems(rows, model)
    assert found == {("2", audit.REPEATED_ROW), ("1", audit.REPEATED_QUERY), ("1", audit.REPEATED_POSITIVE), ("2", audit.REPEATED_POSITIVE),
                     ("3", audit.NEGATIVE_IS_POSITIVE), ("3", audit.REPEATED_QUERY), ("4", audit.NEGATIVE_IS_POSITIVE),
                     ("4", audit.REPEATED_QUERY), ("5", audit.REPEATED_QUERY), ("6", audit.REPEATED_QUERY), ("6", audit.REPEATED_POSITIVE)}
    assert [o.detail for o in offences if o.problem == audit.NEGATIVE_IS_POSITIVE] == ["positive in train.jsonl:3", "positive in train.jsonl:5"]
    assert [r.where for r in audit.without_harm(rows, offences)] == ["train.jsonl:1", "train.jsonl:5", "train.jsonl:6"]


def test_only_the_bad_one_of_several_negatives_goes(model):
    q, p, n = ROWS[0]
    rows = rows_of((q, p, n, p), ROWS[1])
    _, offences = problems(rows, model)
    assert [r.negatives for r in audit.without_harm(rows, offences)] == [(n,), (ROWS[1][2],)]


def test_a_query_of_another_split_is_left_out_and_a_document_of_one_only_reported(model):
    rows = rows_of(*ROWS[:4])
    test = [Triplet(" " + ROWS[0][0], "a", (), "t:1"), Triplet("b", ROWS[1][1], (), "t:2")]
    validation = [Triplet("c", ROWS[2][2], (), "v:1")]
    found, offences = problems(rows, model, validation, test)
    assert found == {("1", "query is the query of a test row"), ("2", "positive is the positive of a test row"),
                     ("3", "negative is the positive of a validation row")}
    assert [r.where[-1] for r in audit.without_harm(rows, offences)] == ["2", "3", "4"]


def test_likely_false_negatives_are_those_that_the_base_model_scores_above_the_positive(model):
    rows = rows_of(*ROWS)
    found, _ = audit.find_offences(rows, {}, model)
    q, p, n = (model.encode(list(texts), normalize_embeddings=True) for texts in zip(*ROWS))
    above = [r.where for r, a, b in zip(rows, (q * p).sum(1), (q * n).sum(1)) if b > a + 1e-4]
    reported = [o.where for o in found if o.problem == audit.FALSE_NEGATIVE]
    assert 0 < len(above) < len(rows) and reported == above
    assert len(audit.without_harm(rows, found)) == len(rows)


def test_a_text_without_a_token_is_left_out(model):
    rows = rows_of((ROWS[0][0], "\u200b", ROWS[0][2]), ROWS[1])
    found, offences = problems(rows, model)
    assert found == {("1", audit.NO_TOKENS)} and len(audit.without_harm(rows, offences)) == 1


def test_the_shares_of_clipped_rows_and_tokens(model, tmp_path, capsys):
    long = " ".join(["saw"] * 100)  # 100 tokens, of which 62 are read, and 8 - 2 = 6 while training
    rows = rows_of(("saw", long, "saw saw"), ("saw", "saw", "saw saw"), ("saw saw", "saw", "saw"), ("saw", "saw", "saw"))
    found, figures = audit.find_offences(rows, {}, model)
    result = audit.report(rows, rows[:1], found, figures, 8, tmp_path / "audit.csv")
    total = 100 + 1 + 2 + 4 + 4 + 3
    assert result["clipped"] == {"while training": {"tokens_read": 6, "rows": 0.25, "tokens": 94 / total},
                                 "when encoding": {"tokens_read": 62, "rows": 0.25, "tokens": 38 / total}}
    assert "past 62 tokens: 25.0% of rows" in capsys.readouterr().out


def bad_data(folder, rows):
    for name, part in (("train", rows), ("validation", ROWS[12:18]), ("test", ROWS[18:])):
        write_jsonl(folder / f"{name}.jsonl", [dict(zip(("query", "positive", "negative"), r)) for r in part])
    return str(folder)


def test_the_audit_alone_writes_its_csv_and_trains_nothing(tiny_model, tmp_path, capsys):
    data = bad_data(tmp_path / "d", [*ROWS[:12], (ROWS[0][0], ROWS[20][1], ROWS[0][1]), ("=1+1", "x", "x")])
    s1.main(["--data", data, "--base_model", str(tiny_model), "--audit_only", "--out", str(tmp_path / "out")])
    table = pandas.read_csv(tmp_path / "out" / "audit.csv")
    assert tuple(table.columns) == audit.HEADER
    bad = table[table.left_out.notna()]
    assert [w.rsplit(":", 1)[1] for w in bad.row] == ["13", "14"] and set(bad.problem) == {audit.NEGATIVE_IS_POSITIVE}
    assert bad["query"].iloc[1] == "'=1+1" and bad.cosine_negative.notna().all()
    assert "2 of 14 rows are left out" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["audit.csv"]


def test_training_leaves_harmful_rows_out_and_records_it(tiny_model, tmp_path):
    data = bad_data(tmp_path / "d", [*ROWS[:12], ROWS[0], (ROWS[18][0], ROWS[1][1], ROWS[3][2])])
    s1.main(["--data", data, "--base_model", str(tiny_model), "--bsz", "4", "--epochs", "2", "--lr", "1e-3", "--out", str(tmp_path / "out")])
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["counts"]["rows"] == 12 and run["audit"]["left_out"] == 2


def test_rows_of_harm_alone_are_an_error(tiny_model, tmp_path):
    data = bad_data(tmp_path / "d", [(q, p, p) for q, p, _ in ROWS[:4]])
    with pytest.raises(UserError, match="leaves no training row"):
        s1.main(["--data", data, "--base_model", str(tiny_model), "--out", str(tmp_path / "out")])

"""Stages 0 to 3 in order, each in its real small mode."""
import csv
import json

from conftest import stage


def test_the_four_stages_hand_off_through_files(walk, data, tiny_model, capsys):
    search = ["--data", str(data), "--corpus", str(walk / "corpus.jsonl"), "--finetuned", str(walk / "finetuned" / "final")]
    stage(2).main(search + ["--out", str(walk / "eval")])
    stage(3).main(search + ["--out", str(walk / "rag.csv")])
    out = capsys.readouterr().out
    assert "baseline" in out and "Next: python 3_rag_batch_eval.py" in out and "retrieval only" in out
    metrics = json.loads((walk / "eval" / "metrics.json").read_text())
    assert metrics["models"]["baseline"] == str(tiny_model)
    assert metrics["queries"] == 6 and metrics["documents"] == 30
    with open(walk / "rag.csv", encoding="utf-8-sig", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 6 and list(rows[0])[:6] == ["query", "gold_id", "baseline_rank", "baseline_cosine", "finetuned_rank", "finetuned_cosine"]

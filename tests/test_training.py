"""Stage 1: what is trained on, what is kept, and what is said about it."""
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch

import retrieval
import training
from common import UserError
from conftest import DOCUMENTS, ROWS, stage, write_jsonl
from reading import Triplet

s1 = stage(1)
FLAGS = ("--epochs", "2", "--bsz", "4", "--lr", "1e-3", "--evals", "3", "--precision", "fp32", "--mine_negatives", "0")


def train(data, model, out, *flags):
    s1.main(["--data", str(data), "--base_model", str(model), "--out", str(out), *FLAGS, *map(str, flags)])
    return json.loads((out / "run.json").read_text())


def weights(folder):
    return (folder / "final" / "model.safetensors").read_bytes()


def triplets(rows=ROWS):
    return [Triplet(q, p, (n,), f"f:{i}") for i, (q, p, n) in enumerate(rows)]


def test_the_columns_are_query_positive_and_negatives_in_this_order():
    rows = [Triplet("q1", "p1", ("n1", "n2"), ""), Triplet("q2", "p2", ("n3",), ""), Triplet("q3", "p3", (), "")]
    columns = training.train_columns(rows, seed=0)
    assert list(columns) == ["query", "positive", "negative_1", "negative_2"]
    assert columns["negative_1"][:2] == ["n1", "n3"] and columns["negative_2"][:2] == ["n2", "n3"]
    assert columns["negative_1"][2] in ("p1", "p2")
    assert list(training.train_columns([r._replace(negatives=()) for r in rows], 0)) == ["query", "positive"]


def test_one_row_or_one_positive_cannot_be_trained_on():
    for rows in (triplets()[:1], [r._replace(positive="same") for r in triplets()]):
        with pytest.raises(UserError, match="at least two rows with different positives"):
            training.train_columns(rows, 0)


def test_a_row_without_negatives_borrows_different_positives_none_of_its_own_query():
    rows = [Triplet("q1", "a", (), ""), Triplet("q1 ", "b", (), ""), Triplet("q2", "c", (), ""), Triplet("q3", "d", ("n1", "n2"), "")]
    for seed in range(6):
        columns = training.train_columns(rows, seed)
        for i, r in enumerate(rows[:3]):
            assert {columns["negative_1"][i], columns["negative_2"][i]} <= {"a", "b", "c", "d"} - ({"c"} if i == 2 else {"a", "b"})
        assert all(a != b for a, b in zip(columns["negative_1"], columns["negative_2"]))
    with pytest.raises(UserError, match="f:7: no other query has a positive"):
        training.train_columns([Triplet("q", "a", ("n",), ""), Triplet("q", "b", (), "f:7")], 0)


@pytest.mark.parametrize("distinct, bsz", [(20, 16), (20, 8), (3, 8), (200, 16)])
def test_the_sampler_reaches_every_row_in_every_epoch_and_repeats_a_positive_only_where_there_are_too_few(distinct, bsz):
    import datasets
    rows = datasets.Dataset.from_dict({"query": [f"q{i}" for i in range(200)], "positive": [f"p{i % distinct}" for i in range(200)],
                                       "negative": [f"p{i * 7 % 5}" if i % 5 else "common" for i in range(200)]})
    sampler = training.make_sampler(3)(rows, batch_size=bsz, drop_last=False, seed=1, generator=torch.Generator())
    orders = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)[:len(sampler)]
        orders.add(str(batches))
        assert {i for b in batches for i in b} == set(range(200))
        for b in batches:
            assert len(b) == len(set(b)) <= bsz
        assert len(batches) == math.ceil(200 / bsz)
        repeats = sum(len(b) - len({rows[i]["positive"] for i in b}) for b in batches)
        assert repeats <= (4 if distinct == 20 else 0) if distinct > 3 else repeats == 200 - distinct * len(batches)  # 20: a few by ill luck
    assert len(orders) == 3


def test_batches_are_dealt_evenly_and_a_common_negative_forces_no_extra_batch():
    rows = [[f"q{i}", f"p{i}", "common"] for i in range(100)]
    batches = training.deal_rows(rows, range(100), 32)
    assert sorted(map(len, batches)) == [25, 25, 25, 25]


def test_a_very_common_positive_leaves_no_batch_short():
    rows = [[f"q{i}", "p" if i < 300 else f"p{i}", f"n{i}"] for i in range(1000)]
    batches = training.deal_rows(rows, range(1000), 32)
    assert {len(b) for b in batches} == {31, 32} and {i for b in batches for i in b} == set(range(1000))
    common = [sum(rows[i][1] == "p" for i in b) for b in batches]
    assert max(common) - min(common) <= 3


def test_rows_that_share_their_positive_are_still_pulled_to_it_and_pushed_from_the_rest():
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    d = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    q = torch.nn.functional.normalize(d + 0.5, dim=1).requires_grad_()
    MultipleNegativesRankingLoss(None).compute_loss_from_embeddings([q, d[[0, 0, 2]]], None).backward()
    own, rest = (20 * (q[0] @ d[[0, 2]].T)).exp().detach()
    weight = rest / (2 * own + rest)  # rest / (own + rest) if the positive stood there once
    wanted = weight * (d[2] - d[0])
    along = q[0].detach()  # the cosine does not change along the query itself
    assert weight > 0.1 and torch.allclose(q.grad[0] * 3 / 20, wanted - (wanted @ along) * along, atol=1e-5)


def test_a_row_never_meets_another_positive_of_its_query():
    rows = [["q0", "a", "x"], ["q0", "b", "y"], ["q1", "b", "z"], ["q2", "c", "a"]]  # b answers q0, c's negative is a
    for seed in range(8):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()
        for batch in training.deal_rows(rows, order, 4):
            for i in batch:
                answers = {p for q, p, _ in rows if q == rows[i][0]}
                assert not answers & {t for j in batch if j != i for t in rows[j]} - {rows[i][1]}


def test_a_positive_never_meets_itself_as_the_negative_of_another_row():
    rows = [["q0", "a", "b"], ["q1", "b", "c"], ["q2", "c", "d"], ["q3", "e", "f"]]
    batches = training.deal_rows(rows, range(4), 2)
    side = {i: n for n, b in enumerate(batches) for i in b}
    assert side[0] != side[1] != side[2] and sorted(side) == [0, 1, 2, 3]


def test_validation_holds_every_validation_text_once_and_no_test_positive():
    rows = triplets()
    queries, corpus, qrels = s1.validation_set(rows[12:18] + rows[12:13], [], rows[:12] + rows[18:20], rows[18:], size=22, seed=0)
    assert len(queries) == 6 and len(corpus) == 22
    assert {t for r in rows[12:18] for t in r[1:2] + r.negatives} <= set(corpus.values())
    assert not {r.positive for r in rows[18:]} & set(corpus.values())
    assert [corpus[d] for d in qrels[next(iter(queries))]] == [rows[12].positive]


def test_training_improves_a_random_model_and_says_so(data, tiny_model, tmp_path, capsys):
    run = train(data, tiny_model, tmp_path, "--epochs", "20", "--lr", "1e-4", "--patience", "20")
    out = capsys.readouterr().out
    before, after = run["result"]["baseline"], run["result"]["finetuned"]
    assert after["nDCG@10"] > before["nDCG@10"]
    assert out.strip().splitlines()[-1].startswith("Verdict: better on validation")
    assert out.index("base model  Hit@1") < out.index("step ")
    assert (tmp_path / "training_curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_kept_model_is_the_best_checkpoint_scored_after_reading_it_back(data, tiny_model, tmp_path):
    run = train(data, tiny_model, tmp_path, "--epochs", "6", "--lr", "3e-3", "--evals", "1", "--patience", "6")
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    scores = {e["step"]: e["eval_val_cosine_ndcg@10"] for e in log if "eval_val_cosine_ndcg@10" in e}
    assert len(scores) == 6
    assert scores[run["result"]["best_step"]] == max(scores.values())
    assert run["result"]["mixes"][-1]["nDCG@10"] == pytest.approx(max(scores.values()), abs=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(data, tiny_model, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(data, tiny_model, tmp_path / name, "--seed", seed)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def interrupt_after(monkeypatch, step):
    """Let training die right after the checkpoint of this step."""
    from transformers import TrainerCallback
    make = training.make_trainer

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    def stopping(*args):
        trainer = make(*args)
        trainer.add_callback(Stop())
        return trainer

    monkeypatch.setattr(training, "make_trainer", stopping)


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_never_interrupted(data, tiny_model, tmp_path, monkeypatch):
    train(data, tiny_model, tmp_path / "whole", "--dropout", "0.1")
    with monkeypatch.context() as m:
        interrupt_after(m, 2)
        with pytest.raises(UserError, match="--resume"):
            train(data, tiny_model, tmp_path / "cut", "--dropout", "0.1")
    with pytest.raises(UserError, match="cannot resume: lr changed"):
        train(data, tiny_model, tmp_path / "cut", "--dropout", "0.1", "--lr", "2e-3", "--resume")
    run = train(data, tiny_model, tmp_path / "cut", "--dropout", "0.1", "--resume")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "training_log.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (tmp_path / "whole" / "training_log.jsonl").read_text().splitlines()]
    assert run["arguments"]["resume"] is True


def test_processes_that_tokenize_ahead_change_nothing_also_where_a_run_is_resumed(data, tiny_model, tmp_path, monkeypatch):
    train(data, tiny_model, tmp_path / "alone")
    monkeypatch.setattr(training, "workers", lambda device: 2)
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
    used, collate = tmp_path / "used", SentenceTransformerDataCollator.__call__

    def seen(self, features):
        with used.open("a") as f:
            f.write(f"{os.getpid()}\n")
        return collate(self, features)

    monkeypatch.setattr(SentenceTransformerDataCollator, "__call__", seen)
    with monkeypatch.context() as m:
        interrupt_after(m, 2)
        with pytest.raises(UserError, match="--resume"):
            train(data, tiny_model, tmp_path / "cut")
    train(data, tiny_model, tmp_path / "cut", "--resume")
    assert str(os.getpid()) not in (pids := set(used.read_text().split())) and len(pids) > 1
    assert weights(tmp_path / "cut") == weights(tmp_path / "alone")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are none")
def test_only_a_gpu_gets_processes_that_tokenize_ahead_and_several_gpus_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert training.workers("cpu") == training.workers("mps") == 0 and training.workers("cuda") == 4
    for gpus, each in ((8, 2), (32, 1)):
        monkeypatch.setenv("WORLD_SIZE", str(gpus))
        assert training.workers("cuda") == each


def test_resume_without_a_checkpoint_is_an_error(data, tiny_model, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        train(data, tiny_model, tmp_path, "--resume")


def test_an_earlier_model_survives_a_run_that_fails(data, tiny_model, tmp_path, monkeypatch):
    train(data, tiny_model, tmp_path)
    before = weights(tmp_path)
    interrupt_after(monkeypatch, 2)
    with pytest.raises(UserError, match="--resume"):
        train(data, tiny_model, tmp_path, "--seed", "7")
    assert weights(tmp_path) == before and (tmp_path / "run.json").exists()


def test_nothing_that_is_published_holds_training_text(data, tiny_model, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 2)
    with pytest.raises(UserError, match="--resume"):
        train(data, tiny_model, tmp_path)
    monkeypatch.undo()
    checkpoints = list(tmp_path.glob("checkpoints/checkpoint-*"))
    assert checkpoints
    train(data, tiny_model, tmp_path / "done")
    for folder in checkpoints + [tmp_path / "done" / "final"]:
        for path in folder.rglob("*"):
            if path.suffix in (".md", ".json"):
                assert not [t for r in ROWS for t in r[:2] if t in path.read_text(encoding="utf-8")], path
    assert not (tmp_path / "done" / "checkpoints").exists()


def test_the_saved_model_gives_the_same_vectors_in_plain_sentence_transformers(data, tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer
    train(data, tiny_model, tmp_path)
    model = SentenceTransformer(str(tmp_path / "final"), device="cpu", local_files_only=True)
    ours = retrieval.encode(retrieval.load_model(str(tmp_path / "final"), "cpu", "fp32", True), [r[1] for r in ROWS], "document")
    assert np.allclose(model.encode([r[1] for r in ROWS], normalize_embeddings=True), ours, atol=1e-6)
    assert model.max_seq_length == 64


def test_training_in_bf16_keeps_fp32_weights_and_scores_what_was_saved(data, tiny_model, tmp_path):
    import safetensors.torch
    import torch
    run = train(data, tiny_model, tmp_path, "--precision", "bf16")
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "final" / "model.safetensors").values()} == {torch.float32}
    model = retrieval.load_model(str(tmp_path / "final"), "cpu", "bf16", True)
    splits = [triplets()[12:18], triplets()[:12], triplets()[18:]]
    from reading import Document
    queries, corpus, qrels = s1.validation_set(splits[0], [Document("", d, "") for d in DOCUMENTS], splits[1], splits[2], 500, 42)
    again = s1.score(s1.make_evaluator(queries, corpus, qrels), model, retrieval.encode(model, list(corpus.values()), "document"))
    assert run["result"]["finetuned"] == again and run["precision"] == "bf16"


def test_the_train_length_clips_while_training_but_not_the_saved_model(data, tiny_model, tmp_path):
    columns = training.train_columns(triplets(), 0)
    args = s1.parse_args(["--data", str(data), *FLAGS, "--train_length", "8"])
    model = retrieval.load_model(str(tiny_model), "cpu", "fp32", True)
    trainer = training.make_trainer(model, columns, None or s1.make_evaluator({"q": "a"}, {"d": "b"}, {"q": {"d"}}), args, "fp32", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["positive_input_ids"].shape[1] == 8 and model.max_seq_length == 64


def test_the_train_length_never_exceeds_what_the_model_reads(data, tiny_model, tmp_path):
    rows = [r._replace(positive=r.positive + " saw" * 200) for r in triplets()]
    for flags, width in (((), 64), (("--max_seq_length", "32"), 32)):
        args = s1.parse_args(["--data", str(data), "--base_model", str(tiny_model), "--offline", *flags])
        model = training.load_trainee(args, "cpu")[0]
        trainer = training.make_trainer(model, training.train_columns(rows, 0), s1.make_evaluator({"q": "a"}, {"d": "b"}, {"q": {"d"}}), args, "fp32", tmp_path)
        assert next(iter(trainer.get_train_dataloader()))["positive_input_ids"].shape[1] == width


def test_all_documents_of_a_batch_are_embedded_together(data, tiny_model, tmp_path, monkeypatch):
    args = s1.parse_args(["--data", str(data), "--base_model", str(tiny_model), "--offline", "--bsz", "4"])
    columns = training.train_columns([r._replace(negatives=(*r.negatives, *DOCUMENTS[:2])) for r in triplets()], 0)
    trainer = training.make_trainer(training.load_trainee(args, "cpu")[0], columns, s1.make_evaluator({"q": "a"}, {"d": "b"}, {"q": {"d"}}), args, "fp32", tmp_path)
    sizes = []
    trainer.model[0].register_forward_pre_hook(lambda module, features: sizes.append(len(features[0]["input_ids"])))
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert sizes == [4, 16]  # the queries, and four documents of each


def test_limit_takes_the_first_training_rows(data, tiny_model, tmp_path):
    assert train(data, tiny_model, tmp_path, "--limit", "5")["counts"]["rows"] == 5


def test_a_run_record_says_what_was_run_on_what(data, tiny_model, tmp_path):
    import hashlib
    run = train(data, tiny_model, tmp_path, "--seed", "3")
    assert run["arguments"]["base_model"] == str(tiny_model) and run["arguments"]["seed"] == 3
    assert run["inputs"][str(data / "train.jsonl")] == hashlib.sha256((data / "train.jsonl").read_bytes()).hexdigest()
    assert {"torch", "sentence-transformers", "python"} <= set(run["versions"]) and run["seconds"]["train"] > 0
    assert run["counts"] == {"rows": 12, "queries": 6, "documents": 32}


def test_the_verdict_says_by_how_much_everything_moved():
    text = s1.verdict({"nDCG@10": 0.6}, {"nDCG@10": 0.7}, {"weights": 0.012, "cosine": 0.75})
    assert text == ("Verdict: better on validation, nDCG@10 0.600 -> 0.700 (+0.100); weights moved by 1.2%, documents to a cosine of 0.750 "
                    "with their old vectors")


def test_rows_without_negatives_are_trained_on(tmp_path, data, tiny_model, capsys):
    shutil.copytree(data, tmp_path / "d")
    write_jsonl(tmp_path / "d" / "train.jsonl", [{"query": q, "positive": p} | ({"negative": n} if i % 2 else {}) for i, (q, p, n) in enumerate(ROWS[:12])])
    train(tmp_path / "d", tiny_model, tmp_path / "out")
    assert "6 of 12 training rows have no negative" in capsys.readouterr().err

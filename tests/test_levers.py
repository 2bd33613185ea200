"""What stage 1 offers beside plain training: mining, losses, prompts, LoRA, mixing, refusals, several processes."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, ROOT, ROWS, run_cli, stage, write_jsonl
from safetensors.torch import load_file
from test_training import interrupt_after, train, triplets, weights

import levers
import retrieval
import training
from common import UserError, normalise
from reading import Document

s1 = stage(1)


@pytest.fixture
def model(tiny_model):
    return retrieval.load_model(str(tiny_model), "cpu", "fp32", True)


def state(folder):
    return load_file(folder / "model.safetensors")


def furthest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# ---------------------------------------------------------------- mining

def test_mined_negatives_keep_their_distance_from_every_positive(model):
    rows = triplets() + [triplets()[0]._replace(positive="  " + ROWS[5][1], where="f:99")]  # a second positive of query 0
    texts = [t for r in ROWS for t in r[1:]] + DOCUMENTS
    out, found = s1.mine_negatives(rows, rows, texts, model, 2)
    q, d = ({t: v for t, v in zip(ts, model.encode(ts, normalize_embeddings=True))} for ts in ([r.query for r in rows], texts))
    mined = [(old, new) for old, new in zip(rows, out) if new.negatives != old.negatives]
    assert mined and 0 < found["share"] == sum(bool(set(n.negatives) - set(o.negatives)) for o, n in zip(rows, out)) / len(rows) <= 1
    for old, new in mined:
        own = {normalise(r.positive) for r in rows if r.query == old.query}
        lowest = min(float(q[old.query] @ d[t]) for t in texts if normalise(t) in own)
        assert len(new.negatives) <= 2 and not own & set(map(normalise, new.negatives))
        for n in new.negatives:
            assert float(q[old.query] @ d[n]) <= lowest - abs(lowest) * 0.05 + 1e-5
        # and nothing that would have been allowed is harder
        allowed = sorted((float(q[old.query] @ d[t]) for t in texts if normalise(t) not in own and float(q[old.query] @ d[t]) <= lowest * 0.95 - 1e-5), reverse=True)
        assert float(q[old.query] @ d[new.negatives[0]]) == pytest.approx(allowed[0], abs=1e-4)
    scores = [float(q[old.query] @ d[n]) for old, new in mined for n in new.negatives]
    assert found["score_quantiles"] == pytest.approx(list(np.quantile(scores, (0, 0.25, 0.5, 0.75, 1))), abs=1e-3)
    assert found["a_row"] == len(scores) / len(mined) and found["merged"] == 0


def test_a_row_for_which_nothing_is_mined_keeps_its_negative(model):
    rows = triplets()[:3]
    rows = [r._replace(negatives=(*r.negatives, "a second", "a third")) for r in rows]
    out, found = s1.mine_negatives(rows, rows, [r.positive for r in rows], model, 2)
    best = [r for r, n in zip(rows, out) if n.negatives == r.negatives[:2]]  # no more than is mined for the others
    assert len(best) == round((1 - found["share"]) * 3) > 0


def test_a_positive_of_a_row_that_the_audit_left_out_is_not_mined_for_its_query(model):
    rows, texts = triplets()[:8], [t for r in ROWS for t in r[1:]] + DOCUMENTS
    blind, _ = s1.mine_negatives(rows, rows, texts, model, 2)
    first = {r.query: r.negatives[0] for r in blind if len(r.negatives) == 2}
    assert first
    left_out = [r._replace(positive=" " + first[r.query], where="out") for r in rows if r.query in first]
    out, _ = s1.mine_negatives(rows, rows + left_out, texts, model, 2)
    assert [r.negatives for r in out] == [r.negatives[1:] if r.query in first else r.negatives for r in blind]


def test_several_triplets_of_one_pair_are_one_row_once_they_have_mined_negatives(model):
    rows = [r._replace(negatives=(n,), where=f"f:{i}{n[:3]}") for i, r in enumerate(triplets()[:8]) for n in DOCUMENTS[:3]]
    out, found = s1.mine_negatives(rows, rows, [t for r in ROWS for t in r[1:]] + DOCUMENTS, model, 2)
    unmined = 3 * (8 - found["rows"] // 3)
    assert found["merged"] == len(rows) - len(out) == 2 * (8 - unmined // 3) > 0 and 1 <= found["a_row"] <= 2
    assert len({(r.query, r.negatives) for r in out}) == len(out)


def test_no_validation_or_test_positive_is_mined(data, tiny_model, tmp_path, monkeypatch):
    seen = []
    mine = s1.mine_negatives
    monkeypatch.setattr(s1, "mine_negatives", lambda rows, audited, texts, *a: seen.append(texts) or mine(rows, audited, texts, *a))
    write_jsonl(tmp_path / "extra.jsonl", [{"text": t} for t in (ROWS[20][1], " " + ROWS[14][1], "A new document about saws.")])
    run = train(data, tiny_model, tmp_path / "out", "--mine_negatives", "2", "--extra", tmp_path / "extra.jsonl")
    assert {*DOCUMENTS, "A new document about saws."} <= set(seen[0]) and not {r[1] for r in ROWS[12:]} & set(map(normalise, seen[0]))
    assert run["mined"]["documents"] == len(seen[0]) and 0 < run["mined"]["share"] <= 1


def test_mining_is_the_default_and_can_be_left_out(data, tiny_model, tmp_path):
    for name, flags in (("default", ()), ("off", ("--mine_negatives", "0"))):
        s1.main(["--data", str(data), "--base_model", str(tiny_model), "--out", str(tmp_path / name), "--epochs", "1", "--bsz", "4", "--lr", "1e-3", *flags])
    default, off = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("default", "off"))
    assert default["mined"]["share"] > 0 and 1 < default["mined"]["a_row"] <= 3 and "mined" not in off
    assert weights(tmp_path / "default") != weights(tmp_path / "off")


def test_what_is_mined_from_is_bounded_and_has_the_training_texts_first():
    rows = triplets()[:4]
    own = {normalise(t) for r in rows for t in (r.positive, *r.negatives)}
    documents = [Document("", t, "") for t in (*DOCUMENTS, rows[0].positive.upper(), "  " + rows[1].positive)]
    pool = s1.mining_pool(rows, documents, {}, 3, seed=1)
    assert set(map(normalise, pool[:-3])) == own and set(pool[-3:]) < {d.text for d in documents} - own
    assert pool == s1.mining_pool(rows, documents, {}, 3, seed=1) != s1.mining_pool(rows, documents, {}, 3, seed=2)
    everything = s1.mining_pool(rows, documents, {"test": [rows[0]]}, 10 ** 6, seed=1)
    assert sorted(map(normalise, everything)) == sorted(own | {normalise(d.text) for d in documents})  # a training row's positive, too
    asked = rows[0]._replace(positive=DOCUMENTS[0])
    assert sorted(map(normalise, s1.mining_pool(rows, documents, {"test": [asked]}, 10 ** 6, seed=1))) == sorted(
        (own | {normalise(d.text) for d in documents}) - {normalise(DOCUMENTS[0])})


# ---------------------------------------------------------------- losses

def test_the_cached_loss_trains_the_same_model(data, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MINI_BATCH", 2)
    for loss in ("mnrl", "cached"):
        train(data, tiny_model, tmp_path / loss, "--loss", loss)
    name = "fully_tuned" if (tmp_path / "mnrl" / "fully_tuned").exists() else "final"
    assert furthest(state(tmp_path / "mnrl" / name), state(tmp_path / "cached" / name)) < 1e-5


def test_the_guided_loss_masks_what_the_base_model_scores_above_the_positive(tiny_model, model, data):
    args = s1.parse_args(["--data", str(data), "--base_model", str(tiny_model), "--loss", "gist", "--offline"])
    loss = training.make_loss(model, args, "cpu")
    with torch.no_grad():
        for p in model.parameters():  # the trainee moves, the guide must not
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    columns = [list(c) for c in zip(*ROWS[:8])] + [[r[2] for r in ROWS[8:16]]]  # two negatives a row, as mining gives
    features = [model.preprocess(c) for c in columns]
    got = float(loss(features, None).detach())
    base = retrieval.load_model(str(tiny_model), "cpu", "fp32", True)
    (q, *d), (gq, *g) = ([m.encode(c, normalize_embeddings=True) for c in columns] for m in (model, base))
    scores, guide = np.hstack([q @ x.T for x in d]), np.hstack([gq @ x.T for x in g])
    own = np.diag(guide[:, :8])[:, None]
    masked = guide > own
    masked[np.arange(8), np.arange(8)] = False
    logits = np.where(masked, -np.inf, scores / 0.05)
    wanted = np.mean([np.log(np.exp(row - row.max()).sum()) + row.max() - row[i] for i, row in enumerate(logits)])
    assert masked.any() and got == pytest.approx(wanted, abs=1e-3)
    assert not any(p.requires_grad for p in loss.guide.parameters())


def test_the_guided_loss_trains_on_mined_negatives_alone_and_with_matryoshka(data, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(s1, "refuse", lambda *a: None)
    for flags in ((), ("--matryoshka", "16")):
        run = train(data, tiny_model, tmp_path / str(len(flags)), "--loss", "gist", "--mine_negatives", "2", "--evals", "1", *flags)
        assert run["mined"]["a_row"] > 1 and run["result"]["drift"]["weights"] > 0
    assert weights(tmp_path / "0") != weights(tmp_path / "2")


def test_matryoshka_trains_the_first_dimensions_too(data, tiny_model, tmp_path, capsys):
    train(data, tiny_model, tmp_path / "plain")
    train(data, tiny_model, tmp_path / "m", "--matryoshka", "8", "16")
    assert "python 2_eval_retrieval.py --also finetuned@16 finetuned@8" in capsys.readouterr().out
    assert weights(tmp_path / "m") != weights(tmp_path / "plain")
    with pytest.raises(UserError, match="--matryoshka 64: the model's vectors have 32"):
        train(data, tiny_model, tmp_path / "m", "--matryoshka", "64")


# ---------------------------------------------------------------- prompts

@pytest.mark.parametrize("name, query, document", [
    ("intfloat/e5-small-v2", "query: ", "passage: "), ("/models/multilingual-e5-base", "query: ", "passage: "),
    ("BAAI/bge-base-en-v1.5", "Represent this sentence for searching relevant passages: ", ""),
    ("nomic-ai/nomic-embed-text-v1.5", "search_query: ", "search_document: "),
    ("Alibaba-NLP/gte-Qwen2-1.5B-instruct", retrieval.INSTRUCTION, ""), ("intfloat/multilingual-e5-large-instruct", retrieval.INSTRUCTION, "")])
def test_families_have_the_prompts_that_their_cards_give(name, query, document):
    assert retrieval.family_prompts(name) == {"query": query, "document": document}


@pytest.mark.parametrize("name", ["BAAI/bge-m3", "thenlper/gte-base", "Alibaba-NLP/gte-modernbert-base", "sentence-transformers/all-MiniLM-L6-v2",
                                  "runs/e5/final", "my-model5"])
def test_other_models_have_none(name):
    assert retrieval.family_prompts(name) == {}


@pytest.fixture(scope="module")
def e5(tiny_model, tmp_path_factory):
    """The tiny model under a name of a family with prompts; the prompts' words are unknown to it, but are tokens."""
    import shutil
    folder = tmp_path_factory.mktemp("models") / "e5-tiny"
    shutil.copytree(tiny_model, folder)
    return folder


def test_a_family_prompt_is_used_in_training_saved_and_given_to_the_baseline(e5, data, tmp_path, capsys):
    run = train(data, e5, tmp_path, "--evals", "1")
    assert run["prompts"] == {"query": "query: ", "document": "passage: "} and "prompts: query 'query: '" in capsys.readouterr().out
    from sentence_transformers import SentenceTransformer
    final = SentenceTransformer(str(tmp_path / "final"), device="cpu", local_files_only=True)
    assert final.prompts == {"query": "query: ", "document": "passage: "}
    base = retrieval.load_model(str(e5), "cpu", "fp32", True)
    assert np.allclose(base.encode_query(["saw"]), base.encode(["query: saw"]))


def test_training_batches_begin_with_the_prompts(e5, data, tmp_path):
    args = s1.parse_args(["--data", str(data), "--base_model", str(e5), "--offline"])
    model = training.load_trainee(args, "cpu")[0]
    trainer = training.make_trainer(model, training.train_columns(triplets(), 0), s1.make_evaluator({"q": "a"}, {"d": "b"}, {"q": {"d"}}),
                                    args, "fp32", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    for column, prompt in (("query", "query: "), ("positive", "passage: "), ("negative_1", "passage: ")):
        start = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert (batch[f"{column}_input_ids"][:, 1:1 + len(start)] == torch.tensor(start)).all()


def test_prompts_given_by_flag_hold_for_the_baseline_of_stages_1_and_2(data, tiny_model, walk, tmp_path, monkeypatch):
    monkeypatch.setattr(s1, "refuse", lambda *a: None)
    flags = ("--evals", "1", "--query_prompt", "saw: ", "--document_prompt", "oil ")
    given, plain = train(data, tiny_model, tmp_path / "given", *flags), train(data, tiny_model, tmp_path / "plain", "--evals", "1")
    assert given["prompts"] == {"query": "saw: ", "document": "oil "} and given["result"]["baseline"] != plain["result"]["baseline"]
    loaded = {}
    load = retrieval.load_model
    s2 = stage(2)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(s2, "load_model", lambda name, *a, **k: loaded.setdefault(name, load(name, *a, **k)))
        s2.main(["--data", str(data), "--corpus", str(walk / "corpus.jsonl"), "--finetuned", str(tmp_path / "given" / "final"), "--out", str(tmp_path / "e")])
    assert len(loaded) == 2 and {str(m.prompts) for m in loaded.values()} == {str(given["prompts"])}


# ---------------------------------------------------------------- LoRA

def test_lora_moves_only_what_it_adapts_and_is_merged_into_plain_weights(data, tiny_model, tmp_path):
    pytest.importorskip("peft")
    train(data, tiny_model, tmp_path, "--lora_rank", "4", "--lr", "1e-2", "--evals", "1")
    before, after = state(tiny_model), state(tmp_path / "final")
    assert before.keys() == after.keys()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(before[k].dim() == 2 for k in moved) and not any("embeddings" in k for k in moved)
    for k in moved:
        assert np.linalg.matrix_rank((after[k] - before[k]).numpy(), tol=1e-5) <= 4


def test_a_resumed_lora_run_ends_with_the_same_weights(data, tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    flags = ("--lora_rank", "4", "--lr", "1e-2", "--evals", "1")
    train(data, tiny_model, tmp_path / "whole", *flags)
    with monkeypatch.context() as m:
        interrupt_after(m, 3)
        with pytest.raises(UserError, match="--resume"):
            train(data, tiny_model, tmp_path / "cut", *flags)
    train(data, tiny_model, tmp_path / "cut", *flags, "--resume")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_without_peft_lora_says_what_to_install(data, tiny_model, tmp_path, monkeypatch):
    import importlib.util
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    with pytest.raises(UserError, match="pip install peft"):
        train(data, tiny_model, tmp_path, "--lora_rank", "4")


# ---------------------------------------------------------------- what is kept

def test_the_kept_model_is_the_chosen_mix_of_base_and_fully_tuned(data, tiny_model, tmp_path, monkeypatch):
    choose = s1.choose_mix

    def half_way(*a):
        return [m | {"kept": m["share"] == 0.5} for m in choose(*a)]
    monkeypatch.setattr(s1, "choose_mix", half_way)
    monkeypatch.setattr(s1, "refuse", lambda *a: None)
    run = train(data, tiny_model, tmp_path, "--evals", "1")
    mixes = {m["share"]: m["nDCG@10"] for m in run["result"]["mixes"]}
    assert list(mixes) == [0, 0.25, 0.5, 0.75, 1] and mixes[0] == run["result"]["baseline"]["nDCG@10"]
    assert run["result"]["finetuned"]["nDCG@10"] == pytest.approx(mixes[0.5], abs=1e-6)
    base, tuned, final = (state(f) for f in (tiny_model, tmp_path / "fully_tuned", tmp_path / "final"))
    middle = {k: (base[k] + tuned[k]) / 2 for k in base}
    assert furthest(middle, final) < 1e-6 < furthest(tuned, final)
    monkeypatch.setattr(s1, "choose_mix", lambda *a: [m | {"kept": m["share"] == 1} for m in choose(*a)])
    train(data, tiny_model, tmp_path, "--evals", "1")  # final is the tuned end itself: no old copy of it may stay
    assert furthest(state(tmp_path / "final"), tuned) == 0 and not (tmp_path / "fully_tuned").exists()


def test_the_best_mix_is_kept(model, monkeypatch):
    scores = iter([0.5, 0.697, 0.7, 0.6])
    monkeypatch.setattr(s1, "score", lambda *a: {name: next(scores) if name == "nDCG@10" else 0.0 for name in s1.METRICS})
    mixes = s1.choose_mix(None, model, s1.state_of(model), s1.state_of(model), {name: 0.9 for name in s1.METRICS}, [])
    assert [m["share"] for m in mixes if m["kept"]] == [0.75]


def test_of_mixes_as_good_as_equal_the_one_nearest_to_the_base_model_is_kept(model, monkeypatch):
    scores = iter([0.5, 0.6990, 0.7, 0.6])
    monkeypatch.setattr(s1, "score", lambda *a: {name: next(scores) if name == "nDCG@10" else 0.0 for name in s1.METRICS})
    start = s1.state_of(model)
    mixes = s1.choose_mix(None, model, start, start, {name: 0.4 for name in s1.METRICS}, [])
    assert [m["share"] for m in mixes if m["kept"]] == [0.5]


def test_a_mix_below_the_base_model_is_not_preferred_to_one_above_it(model, monkeypatch):
    scores = iter([0.8495, 0.8497, 0.85, 0.851])
    monkeypatch.setattr(s1, "score", lambda *a: {name: next(scores) if name == "nDCG@10" else 0.0 for name in s1.METRICS})
    start, before = s1.state_of(model), {name: 0.85 for name in s1.METRICS}
    kept = next(m for m in s1.choose_mix(None, model, start, start, before, []) if m["kept"])
    assert kept["share"] == 0.75 and s1.refuse({"weights": 0.1, "spread": [0.1, 0.1]}, before, kept) is None


def test_the_numbers_of_drift_and_spread():
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    assert s1.spread(vectors) == pytest.approx((0 + 0.6 + 0.8) / 3)
    base, final = {"w": torch.tensor([3.0, 4.0]), "i": torch.tensor([1])}, {"w": torch.tensor([3.0, 3.0]), "i": torch.tensor([1])}
    drift = s1.drift_of(base, final, vectors, vectors[[0, 1, 1]])
    assert drift["weights"] == pytest.approx(1 / 5) and drift["cosine"] == pytest.approx((1 + 1 + 0.8) / 3)


@pytest.mark.parametrize("drift, after, error", [
    ({"weights": 0.0, "spread": [0.1, 0.1]}, 0.5, "changed nothing"), ({"weights": 0.1, "spread": [0.1, 0.95]}, 0.9, "collapsed"),
    ({"weights": 0.1, "spread": [0.8, 0.985]}, 0.9, "collapsed"), ({"weights": 0.1, "spread": [0.1, 0.1]}, 0.499, "got worse: nDCG@10 0.5000 -> 0.4990")])
def test_what_is_refused(drift, after, error):
    with pytest.raises(UserError, match=error):
        s1.refuse(drift, {"nDCG@10": 0.5}, {"nDCG@10": after})


@pytest.mark.parametrize("drift, after", [({"weights": 1e-4, "spread": [0.1, 0.1]}, 0.5), ({"weights": 0.1, "spread": [0.8, 0.95]}, 0.6)])
def test_what_is_not_refused(drift, after):
    assert s1.refuse(drift, {"nDCG@10": 0.5}, {"nDCG@10": after}) is None


def test_a_refused_model_leaves_the_earlier_one_and_fails_loudly(data, tiny_model, tmp_path):
    train(data, tiny_model, tmp_path)
    files = {p: p.read_bytes() for n in ("final/model.safetensors", "run.json", "training_log.jsonl") for p in [tmp_path / n]}
    done = run_cli("1_train_embedding.py", "--data", data, "--base_model", tiny_model, "--lr", "1e-30", "--bsz", "4", "--out", tmp_path)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: training changed nothing")
    assert "Verdict" not in done.stdout and all(p.read_bytes() == b for p, b in files.items())
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith((".new", ".old"))]


def test_embeddings_that_collapse_in_training_are_refused(data, tiny_model, tmp_path, monkeypatch):
    load = training.load_trained

    def collapsed(*a):
        model = load(*a)
        with torch.no_grad():  # every text gets nearly the same vector
            model[0].auto_model.encoder.layer[0].output.LayerNorm.weight.mul_(1e-3)
            model[0].auto_model.encoder.layer[0].output.LayerNorm.bias.add_(1)
        return model
    monkeypatch.setattr(s1, "load_trained", collapsed)
    monkeypatch.setattr(s1, "SHARES", ())
    with pytest.raises(UserError, match="collapsed"):
        train(data, tiny_model, tmp_path)
    assert not (tmp_path / "final").exists()


# ---------------------------------------------------------------- stopping, and too few queries

def test_training_stops_early_when_validation_does_not_improve(data, tiny_model, tmp_path):
    run = train(data, tiny_model, tmp_path, "--epochs", "40", "--patience", "2", "--evals", "1")
    steps = [json.loads(line)["step"] for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert max(steps) < 40 * 3 and max(steps) == run["result"]["best_step"] + 2 * 3


def test_a_resumed_run_stops_where_one_that_was_never_interrupted_stops(data, tiny_model, tmp_path, monkeypatch):
    flags = ("--epochs", "40", "--patience", "2", "--evals", "1")
    whole = train(data, tiny_model, tmp_path / "whole", *flags)
    with monkeypatch.context() as m:
        interrupt_after(m, whole["result"]["best_step"] + 3)  # one of the two validations that patience allows is over
        with pytest.raises(UserError, match="--resume"):
            train(data, tiny_model, tmp_path / "cut", *flags)
    cut = train(data, tiny_model, tmp_path / "cut", *flags, "--resume")
    logs = [(tmp_path / name / "training_log.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]
    assert cut["result"]["best_step"] == whole["result"]["best_step"] and weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_few_validation_queries_are_warned_of(data, tiny_model, tmp_path, capsys):
    train(data, tiny_model, tmp_path)
    assert "6 validation queries are too few" in capsys.readouterr().err


# ---------------------------------------------------------------- several processes

def torchrun(*words, script=ROOT / "1_train_embedding.py"):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           *map(str, (script, *words))], capture_output=True, text=True, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)


@pytest.mark.parametrize("lever", [(), ("--lora_rank", "4")], ids=["whole", "lora"])
def test_two_processes_train_the_model_of_one(data, tiny_model, tmp_path, lever):
    if lever:
        pytest.importorskip("peft")
    flags = ("--data", data, "--base_model", tiny_model, "--epochs", "3", "--bsz", "4", "--lr", "1e-3", "--precision", "fp32", "--offline",
             "--mine_negatives", "0", *lever)  # so few mined texts would leave short batches, which processes fill up
    done = torchrun(*flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    s1.main([*map(str, flags), "--out", str(tmp_path / "one")])
    for name in ("final", "fully_tuned"):
        assert (tmp_path / "one" / name).exists() == (tmp_path / "two" / name).exists()
        if (tmp_path / "one" / name).exists():
            assert furthest(state(tmp_path / "one" / name), state(tmp_path / "two" / name)) < 1e-5
    one, two = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("one", "two"))
    assert two["processes"] == 2 and one["result"]["finetuned"] == two["result"]["finetuned"]
    assert done.stdout.count("Verdict:") == 1 and done.stdout.count("base model  Hit@1") == 1
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())


def test_two_processes_mine_once_and_what_one_would_mine(data, tiny_model, tmp_path):
    flags = ("--data", data, "--base_model", tiny_model, "--epochs", "3", "--bsz", "4", "--lr", "1e-3", "--precision", "fp32", "--offline")
    done = torchrun(*flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mined: ") == 1
    s1.main([*map(str, flags), "--out", str(tmp_path / "one")])
    mined, alone = ((tmp_path / n / "trained_on.jsonl").read_text() for n in ("two", "one"))
    assert mined == alone and any(t in mined for t in DOCUMENTS)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="names of threads are read from /proc")
def test_no_thread_of_the_process_group_outlives_the_run(data, tiny_model, tmp_path):
    # one that does may still let go of a tensor while the interpreter ends: that aborted one finished run in 25 on a busy machine
    script = tmp_path / "threads.py"
    script.write_text(f"""
import glob, importlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
stage = importlib.import_module("1_train_embedding")
names = lambda: [open(p).read() for p in glob.glob("/proc/self/task/*/comm")]
during, finish = [], stage.finish
stage.finish = lambda *args: (during.extend(names()), finish(*args))[1]
stage.main(sys.argv[1:])
left = [n for n in names() if "gloo" in n]
open(sys.argv[-1] + "-left" + os.environ["RANK"], "w").write(f"{{len(left)}} {{any('gloo' in n for n in during)}}")
""", encoding="utf-8")
    done = torchrun("--data", data, "--base_model", tiny_model, "--epochs", "1", "--bsz", "4", "--lr", "1e-3", "--precision", "fp32", "--offline",
                    "--mine_negatives", "0", "--out", tmp_path / "out", script=script)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"out-left{rank}").read_text() for rank in (0, 1)] == ["0 True", "0 False"]  # only the lead finishes


def test_an_error_of_one_process_ends_both_with_one_line(data, tiny_model, tmp_path):
    done = torchrun("--data", tmp_path / "nothing.jsonl", "--base_model", tiny_model, "--out", tmp_path / "out")
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "does not exist" in done.stderr


def test_a_batch_that_cannot_be_shared_out_is_wrong_usage(data, tiny_model, tmp_path):
    done = run_cli("1_train_embedding.py", "--data", data, "--bsz", "5", "--out", tmp_path, env={"WORLD_SIZE": "2"})
    assert done.returncode == 2 and "cannot be shared out to 2 processes" in done.stderr


@pytest.mark.parametrize("rows, bsz, share", [(101, 8, 2), (50, 12, 3), (7, 4, 4)])
def test_batches_for_several_processes_have_equal_parts_and_leave_no_row_out(rows, bsz, share):
    texts = [[f"q{i}", f"p{i % 40}", f"n{i % 7}"] for i in range(rows)]
    batches = training.deal_rows(texts, range(rows), bsz, share)
    assert {i for b in batches for i in b} == set(range(rows))
    assert all(len(b) % share == 0 and len(b) <= bsz and len(set(b)) == len(b) and len({texts[i][0] for i in b}) == len(b) for b in batches)


# ---------------------------------------------------------------- the table of levers

def test_the_table_of_levers_holds_what_is_measured(tmp_path):
    from pathlib import Path
    home, other = (Path("home"), 30), (Path("other"), 20)

    def measured(recipe, seed, seconds, where, **ndcg):
        folder = tmp_path / "home-8" / levers.folder_name(recipe, seed)
        result = folder / f"on_{where[0].name}-{where[1]}"
        result.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"seconds": {"train": seconds - 5, "mine": 5} if recipe == "default" else {"train": seconds}}))
        (result / "metrics.json").write_text(json.dumps(
            {"systems": {label: {m: {"mean": v} for m in levers.METRICS} for label, v in ndcg.items()}}))

    measured("original walk, no dropout", 1, 900, home, baseline=0.5, finetuned=0.7, bm25=0.1)
    measured("default", 1, 90, home, baseline=0.5, finetuned=0.8, **{"home-8-default-1-fully_tuned": 0.79})
    measured("default", 2, 110, home, baseline=0.5, finetuned=0.9)
    measured("default", 1, 90, other, baseline=0.4, finetuned=0.35, **{"home-8-default-1-fully_tuned": 0.3})
    measured("gist", 1, 90, other, baseline=0.4, finetuned=0.3)  # not at home yet: no row
    lines = levers.table(tmp_path, home[0], 8, dict([home, other]))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][5:] == ["nDCG@10 above the walk's, by seed", "fully tuned nDCG@10", "mining and training s",
                           "nDCG@10 on other: final", "nDCG@10 on other: fully tuned"]
    assert rows[2:] == [
        ["base", "", "0.500", "0.500", "0.500", "", "", "", "0.400", ""],
        ["original walk, no dropout", "1", "0.700", "0.700", "0.700", "", "0.700", "900", "", ""],
        ["default", "2", *["0.850 ± 0.071"] * 3, "+0.100", "0.845 ± 0.078", "100 ± 14", "0.350", "0.300"]]


def test_a_recipe_that_stage_1_refuses_leaves_the_others_to_be_measured_once(tmp_path, monkeypatch):
    calls = []

    def run(script, *words):
        calls.append((script[0], *(words[words.index("--loss") + 1:words.index("--loss") + 2] if "--loss" in words else ())))
        if calls[-1] == ("1", "gist"):
            raise subprocess.CalledProcessError(1, script)
        made = words[words.index("--out") + 1]
        if script[0] == "0":
            made.write_text("")
            return
        made.mkdir(parents=True, exist_ok=True)
        record = {"seconds": {"train": 9}} if script[0] == "1" else {
            "systems": {label: {m: {"mean": v} for m in levers.METRICS} for label, v in (("baseline", 0.5), ("finetuned", 0.7))}}
        (made / ("run.json" if script[0] == "1" else "metrics.json")).write_text(json.dumps(record))

    monkeypatch.setattr(levers, "run", run)
    words = ["levers.py", "--data", str(tmp_path / "home"), "--seeds", "1", "2", "--out", str(tmp_path / "out"), "--recipes"]
    monkeypatch.setattr(sys, "argv", [*words, "gist", "default"])
    levers.main()
    assert calls == [("1", "gist"), ("1",), ("0",), ("2",), ("1", "gist"), ("1",), ("2",)]
    table = (tmp_path / "out" / "levers-home.md").read_text()
    assert "| default | 2 | 0.700 ± 0.000 |" in table and "gist" not in table
    levers.main()
    assert calls[7:] == [("1", "gist")] * 2  # what is finished is not made again, what was refused is tried again

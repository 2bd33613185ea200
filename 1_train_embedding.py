"""Stage 1: fine-tune an embedding model on the triplets, and say what that changed.

The rows are audited first, then each gets hard negatives, mined with the base model. Contrastive
training follows: each query is drawn to its positive and pushed from its negatives and from all other
documents of the batch. The base model is scored before, on the validation queries; the best checkpoint
by nDCG@10 is mixed with the base model in several shares, and the share that validates best is kept,
read back from disk and scored the same way. The last line is the verdict. A model that did not change,
collapsed or got worse is not kept, and the run fails.

Reads:  the train, validation and test splits of --data, its documents file, --extra
Writes: runs/finetuned/final (the model), fully_tuned (the unmixed end, where final is a mix),
        audit.csv, trained_on.jsonl (the rows, with mined negatives), run.json, training_log.jsonl,
        training_curve.png
Next:   python 2_eval_retrieval.py

Example:
  python 1_train_embedding.py
  python 1_train_embedding.py --audit_only
  python 1_train_embedding.py --mine_negatives 0 --matryoshka 384 256 128 64
  python 1_train_embedding.py --extra handbook/ --mine_from 100000
  python 1_train_embedding.py --base_model intfloat/e5-large-v2 --lora_rank 16 --loss cached --bsz 256
  torchrun --nproc_per_node 2 1_train_embedding.py
"""
import json
import shutil
from pathlib import Path

import audit
from common import (FINETUNED, Timer, UserError, add_run_flags, normalise, note, number, parser, print_table, replacing,
                    run_record, run_script, shuffled, text_id, write_json)
from reading import add_data_flags, add_document_flags, all_documents, need_split, read_triplets
from retrieval import (DEFAULT_MODEL, KINDS, add_model_flags, encode, find_model, fingerprint, load_model, pick_device,
                       pick_precision, prompt_of)
from training import (LEARNING_RATES, METRICS, check_model, joined_processes, learning_rate, load_trained, mine_negatives, mining_pool,
                      on_lead, processes, prompts_asked, start_checkpoints, train, train_columns)

SHARES = (0.25, 0.5, 0.75)  # of the way from the base model to the fully tuned one, tried beside the whole way
TIE = 0.002                 # nDCG@10 that says nothing: of mixes so close to the best, the one nearest to the base forgets least
FEW = 50                    # validation queries below which no choice between models is to be trusted


def parse_args(argv=None):
    p = parser(__doc__)
    g = add_data_flags(p)
    add_document_flags(g)
    g.add_argument("--limit", type=number(least=2), default=None, metavar="N", help="use the first N training rows")
    g.add_argument("--audit_only", action="store_true", help="stop after the audit of the training rows")
    g.add_argument("--mine_negatives", type=number(least=0), default=3, metavar="N",
                   help="replace each row's negatives by up to N hard ones, mined with the base model; 0 keeps the data's own")
    g.add_argument("--mine_from", type=number(least=0), default=20_000, metavar="N",
                   help="mine from the training rows' own texts and at most N other documents, random ones of all; each is encoded")
    g = p.add_argument_group("model")
    g.add_argument("--base_model", default=DEFAULT_MODEL, help="a folder, else a Hugging Face model id; any encoder, also a static one")
    for kind in KINDS:
        g.add_argument(f"--{kind}_prompt", default=None, metavar="TEXT",
                       help=f"put before each {kind} (default: what the model or its family documents)")
    g.add_argument("--lora_rank", type=number(least=1), default=None, metavar="R",
                   help="train LoRA adapters of this rank instead of all weights; merged at the end (pip install peft)")
    g = p.add_argument_group("training")
    g.add_argument("--loss", choices=("mnrl", "cached", "gist"), default="mnrl",
                   help="mnrl: multiple negatives ranking; cached: the same in little memory, for a large --bsz; "
                        "gist: likely false negatives masked by the base model")
    g.add_argument("--matryoshka", type=number(least=1), nargs="+", default=None, metavar="DIM",
                   help="train these first dimensions to work by themselves, too")
    g.add_argument("--epochs", type=number(float, above=0), default=2, help="passes over the training rows")
    g.add_argument("--bsz", type=number(least=2), default=32,
                   help="queries a batch, of all processes together; the batch's other documents are negatives")
    g.add_argument("--lr", type=number(float, above=0), default=None,
                   help="peak learning rate, after 10%% warm-up, then linear to 0 (default: "
                        + ", ".join(f"{lr:g} for {kind}" for kind, lr in LEARNING_RATES.items()) + ")")
    g.add_argument("--train_length", type=number(least=8), default=128, metavar="TOKENS",
                   help="clip texts to this many tokens while training; encoding always uses the model's own limit")
    g.add_argument("--dropout", type=number(float, least=0, most=0.9), default=0.0,
                   help="share of activations dropped while training")
    g.add_argument("--evals", type=number(least=1), default=2, help="validations an epoch, evenly spaced")
    g.add_argument("--patience", type=number(float, above=0), default=3, metavar="EPOCHS",
                   help="stop after so many epochs without a better validation")
    g.add_argument("--val_size", type=number(least=1), default=500,
                   help="documents to validate on; more if the validation rows themselves hold more")
    g.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an interrupted run")
    g.add_argument("--out", default=str(FINETUNED), help="folder to write")
    g = add_run_flags(p, "orders the rows, draws the documents to mine from and to validate on, and all that training draws")
    add_model_flags(g)
    args = p.parse_args(argv)
    if args.bsz % processes():
        p.error(f"--bsz {args.bsz} cannot be shared out to {processes()} processes evenly")
    return args


# ---------------------------------------------------------------- data

def validation_set(rows, documents, train, test, size, seed):
    """Queries, corpus and qrels to validate on, as the library's evaluator takes them.

    The corpus is every validation text, filled up to `size` with documents and then with training
    positives, none of them a test positive. Equal texts are one document, equal queries one query.
    """
    held_out = {normalise(r.positive) for r in test}
    corpus = {text_id(t): t for r in rows for t in (r.positive, *r.negatives)}
    for pool in ([d.text for d in documents], [r.positive for r in train]):
        for text in shuffled(pool, seed):
            if len(corpus) < size and normalise(text) not in held_out:
                corpus.setdefault(text_id(text), text)
    queries, qrels = {}, {}
    for r in rows:
        queries.setdefault(text_id(r.query), r.query)
        qrels.setdefault(text_id(r.query), set()).add(text_id(r.positive))
    return queries, dict(shuffled(corpus.items(), seed)), qrels


def make_evaluator(queries, corpus, qrels, batch_size=32):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim
    return InformationRetrievalEvaluator(
        queries, corpus, qrels, name="val", accuracy_at_k=[1, 10], mrr_at_k=[10], ndcg_at_k=[10], map_at_k=[10],
        precision_recall_at_k=[10], batch_size=batch_size, write_csv=False, score_functions={"cosine": cos_sim})


def score(evaluator, model, vectors) -> dict[str, float]:
    """METRICS of a model on the validation set; `vectors`: those of its documents."""
    import torch
    found = evaluator(model, corpus_embeddings=torch.from_numpy(vectors).to(model.device))
    return {name: round(float(found[f"val_cosine_{key}"]), 6) for name, key in METRICS.items()}


# ---------------------------------------------------------------- what is kept

def mix(base, tuned, share) -> dict:
    """State of the model at `share` of the way from `base` to `tuned` (state dicts, fp32): (1 - share) base + share tuned."""
    import torch
    return {k: torch.lerp(base[k], t, share) if t.is_floating_point() else t for k, t in tuned.items()}


def state_of(model) -> dict:
    return {k: t.detach().float().cpu() if t.is_floating_point() else t.cpu() for k, t in model.state_dict().items()}


def spread(vectors) -> float:
    """Mean cosine of two different rows of `vectors`, which have unit length; 0 without two."""
    n = len(vectors)
    if n < 2:
        return 0.0
    total = vectors.astype("float64").sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def drift_of(base, final, before, after) -> dict:
    """How far the model moved. `base`, `final`: states; `before`, `after`: vectors of the same documents, unit length.

    "weights": norm of the change over the norm of the base; "cosine": mean cosine of a document's
    two vectors; "spread": mean cosine of two different documents, before and after.
    """
    floats = [k for k, t in base.items() if t.is_floating_point()]
    change = sum(float((final[k] - base[k]).double().square().sum()) for k in floats)
    norm = sum(float(base[k].double().square().sum()) for k in floats)
    return {"weights": (change / norm) ** 0.5, "cosine": float((before * after).sum(axis=1).mean()),
            "spread": [spread(before), spread(after)]}


def refuse(drift, before, after) -> None:
    """Raise UserError for a model that is not worth keeping: unchanged, collapsed or worse.

    Collapsed: less than a tenth of the base model's room between documents is left, room being 1
    less the mean cosine of two of them. A fixed bound would not do: some good models keep all texts above 0.7.
    """
    kept = "; what an earlier run wrote is unchanged"
    if drift["weights"] < 1e-6:  # about what rounding does
        raise UserError(f"training changed nothing: the best checkpoint has the base model's weights (try another --lr, or more --epochs){kept}")
    if 1 - drift["spread"][1] < 0.1 * (1 - drift["spread"][0]):
        raise UserError(f"the embeddings collapsed: two different documents have a mean cosine of {drift['spread'][1]:.3f}, "
                        f"{drift['spread'][0]:.3f} before (lower --lr){kept}")
    if after["nDCG@10"] < before["nDCG@10"]:
        raise UserError(f"validation got worse: nDCG@10 {before['nDCG@10']:.4f} -> {after['nDCG@10']:.4f} "
                        f"(lower --lr, more rows, or look at audit.csv){kept}")


def save_model(model, folder, base_model, rows) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), create_model_card=False)
    (folder / "README.md").write_text(
        f"---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n---\n\n# Fine-tuned {base_model}\n\n"
        f"Fine-tuned for retrieval on {rows} (query, positive, negative) rows. Use `encode_query` "
        "for queries and `encode_document` for documents. run.json in the folder above says how it was made.\n", encoding="utf-8")


def swap_in(out, names) -> None:
    """Give the folders .NAME.new their names, the old ones away; of a name without such a folder only the old one goes."""
    for name in names:
        new, old = out / f".{name}.new", out / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if (out / name).exists():
            (out / name).rename(old)
        if new.exists():
            new.rename(out / name)
        shutil.rmtree(old, ignore_errors=True)


def draw_curves(path, log, baseline, mixes) -> None:
    """Training loss; validation over steps, with the baseline's level; validation over the share of tuning."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    left.plot(*zip(*((e["step"], e["loss"]) for e in log if "loss" in e)), color="tab:gray")
    left.set(title="Training loss", xlabel="step", ylabel="loss")
    for name, color in (("nDCG@10", "tab:blue"), ("Hit@1", "tab:orange")):
        points = [(e["step"], e[f"eval_val_cosine_{METRICS[name]}"]) for e in log if f"eval_val_cosine_{METRICS[name]}" in e]
        middle.plot(*zip((0, baseline[name]), *points), marker="o", color=color, label=name)
        middle.axhline(baseline[name], color=color, linestyle=":", linewidth=1, label=f"{name}, base model")
        right.plot([m["share"] for m in mixes], [m[name] for m in mixes], marker="o", color=color, label=name)
    kept = next(m["share"] for m in mixes if m["kept"])
    right.axvline(kept, color="tab:gray", linestyle=":", label=f"kept: {kept:g}")
    middle.set(title="Validation while training", xlabel="step")
    right.set(title="Validation between base (0) and tuned (1)", xlabel="share of the tuned weights")
    for axes in (middle, right):
        axes.legend(fontsize=8)
    with replacing(path, "wb") as f:
        fig.savefig(f, dpi=130, format="png")
    plt.close(fig)


def verdict(before, after, drift) -> str:
    change = after["nDCG@10"] - before["nDCG@10"]
    return (f"Verdict: {'better' if change > 0 else 'unchanged'} on validation, nDCG@10 {before['nDCG@10']:.3f} -> {after['nDCG@10']:.3f} "
            f"({change:+.3f}); weights moved by {drift['weights']:.1%}, documents to a cosine of {drift['cosine']:.3f} with their old vectors")


# ---------------------------------------------------------------- the run

def prepare(args, timer) -> dict | None:
    """Read, audit, mine and score the base model: what train() and finish() need; None if only the audit was asked for."""
    out = Path(args.out)
    with timer("read"):
        find_model(args.base_model, args.offline)
        if args.lora_rank:
            need_peft()
        splits, inputs = read_triplets(args)
        rows = need_split(splits, "train", args)[:args.limit]
        held_out = {name: splits.get(name, []) for name in ("validation", "test")}
        need_split(splits, "validation", args)
        documents, files = all_documents(args)
    with timer("load"):
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        base = load_model(args.base_model, device, precision, args.offline, args.max_seq_length, prompts_asked(args))
        check_model(args, base)
        prompts = {kind: prompt_of(base, kind) for kind in KINDS}
    with timer("audit"):
        offences, figures = audit.find_offences(rows, held_out, base)
        kept = audit.without_harm(rows, offences)
        found = {"learning_rate": learning_rate(args, base),
                 "audit": audit.report(rows, kept, offences, figures, args.train_length, out / "audit.csv")}
    if args.audit_only:
        return None
    if args.mine_negatives:
        with timer("mine"):
            pool = mining_pool(kept, documents, held_out, args.mine_from, args.seed)
            kept, found["mined"] = mine_negatives(kept, rows, pool, base, args.mine_negatives)
            print("mined: {share:.1%} of rows, {a_row:.1f} negatives each, from {documents} documents; their cosines, quartiles: "
                  "{score_quantiles}".format(**found["mined"]), flush=True)
            if found["mined"]["merged"]:
                print("{merged} rows of the same query and positive became equal and are trained on once".format(**found["mined"]), flush=True)
    columns = train_columns(kept, args.seed)
    queries, corpus, qrels = validation_set(held_out["validation"], documents, kept, held_out["test"], args.val_size, args.seed)
    if len(queries) < FEW:
        note(f"{len(queries)} validation queries are too few to tell a better model from luck (have {FEW} at least)")
    start_checkpoints(Path(args.out) / "checkpoints", {k: v for k, v in vars(args).items() if k not in ("resume", "out", "offline", "data")} | {
        "precision": precision, "device": device, "processes": processes(), "weights of the base model": fingerprint(base, "document"),
        "data": text_id(json.dumps([columns, queries, corpus], ensure_ascii=False))}, args.resume)
    print(f"{len(kept)} training rows, {len(columns) - 2} negatives each; {len(queries)} validation queries over "
          f"{len(corpus)} documents; {device}, {precision}" + f", {processes()} processes" * (processes() > 1), flush=True)
    if any(prompts.values()):
        print("prompts: " + ", ".join(f"{kind} {p!r}" for kind, p in prompts.items()), flush=True)
    with timer("baseline"):
        evaluator = make_evaluator(queries, corpus, qrels)
        before = score(evaluator, base, encode(base, list(corpus.values()), "document"))
        print("  base model  " + "  ".join(f"{k} {v:.3f}" for k, v in before.items()), flush=True)
    return {"columns": columns, "validation": (queries, corpus, qrels), "before": before, "device": device, "precision": precision,
            "prompts": prompts, "found": found, "inputs": inputs + files}


def need_peft() -> None:
    from importlib.util import find_spec
    if find_spec("peft") is None:
        raise UserError("--lora_rank needs the package peft (pip install peft)")


def choose_mix(evaluator, base, start, tuned, before, texts) -> list[dict]:
    """Validation scores between the base model and the tuned one; "kept" of those within TIE of the best is the one nearest to the base.

    `base`: the model in the precision of evaluation, whose weights are overwritten; `start`, `tuned`: states; `texts`: the
    validation documents. Their vectors go through the cache: the kept model is read back from disk and needs them again.
    """
    mixes = [{"share": 0.0, "kept": False} | before]
    for share in (*SHARES, 1.0):
        base.load_state_dict(mix(start, tuned, share))
        mixes.append({"share": share, "kept": False} | score(evaluator, base, encode(base, texts, "document")))
        print(f"  {share:.0%} tuned  " + "  ".join(f"{name} {mixes[-1][name]:.3f}" for name in METRICS), flush=True)
    best = max(m["nDCG@10"] for m in mixes[1:])
    least = max(best - TIE, min(best, before["nDCG@10"]))  # a tie with the best must not be worse than the base model
    next(m for m in mixes[1:] if m["nDCG@10"] >= least)["kept"] = True
    return mixes


def finish(args, timer, plan, best, log) -> None:
    """From the best checkpoint to final/: mix, save, read back, score, refuse or keep, and report."""
    out, before, device, precision = Path(args.out), plan["before"], plan["device"], plan["precision"]
    queries, corpus, qrels = plan["validation"]
    rows, texts = len(plan["columns"]["query"]), list(corpus.values())
    evaluator = make_evaluator(queries, corpus, qrels)
    with timer("mix"):
        tuned = load_trained(best, args, device)
        base = load_model(args.base_model, device, precision, args.offline, args.max_seq_length, plan["prompts"])
        old_vectors = encode(base, texts, "document")
        start, end = state_of(load_model(args.base_model, device, "fp32", args.offline)), state_of(tuned)
        mixes = choose_mix(evaluator, base, start, end, before, texts)
        share = next(m["share"] for m in mixes if m["kept"])
    with timer("score"):
        shutil.rmtree(out / ".fully_tuned.new", ignore_errors=True)
        if share < 1:
            save_model(tuned, out / ".fully_tuned.new", args.base_model, rows)
        tuned.load_state_dict(mix(start, end, share))
        save_model(tuned, out / ".final.new", args.base_model, rows)
        final = load_model(str(out / ".final.new"), device, precision, offline=True)
        vectors = encode(final, texts, "document")
        after = score(evaluator, final, vectors)
        drift = drift_of(start, state_of(load_model(str(out / ".final.new"), device, "fp32", offline=True)), old_vectors, vectors)
        try:
            refuse(drift, before, after)
        except UserError:
            for name in (".final.new", ".fully_tuned.new"):
                shutil.rmtree(out / name, ignore_errors=True)
            raise
        swap_in(out, ("final", "fully_tuned"))
    step = int(best.name.rsplit("-", 1)[1])
    audit.write_trained_on(out, plan["columns"])
    with replacing(out / "training_log.jsonl") as f:
        f.writelines(json.dumps(entry) + "\n" for entry in log)
    draw_curves(out / "training_curve.png", log, before, mixes)
    write_json(out / "run.json", run_record(
        "1_train_embedding.py", args, plan["inputs"], timer.seconds, device=device, precision=precision, processes=processes(),
        prompts=plan["prompts"], counts={"rows": rows, "queries": len(queries), "documents": len(corpus)}, **plan["found"],
        result={"baseline": before, "finetuned": after, "best_step": step, "mixes": mixes, "drift": drift}))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)

    print()
    print_table([(n, f"{before[n]:.3f}", f"{after[n]:.3f}", f"{after[n] - before[n]:+.3f}") for n in METRICS],
                (f"validation ({len(queries)} queries)", "baseline", "fine-tuned", "change"))
    print(f"mean cosine of two different documents: {drift['spread'][0]:.3f} -> {drift['spread'][1]:.3f}")
    mixed, whole = (f" ({share:.0%} tuned, {1 - share:.0%} base)", f"; the unmixed one is in {out / 'fully_tuned'}") if share < 1 else ("", "")
    also = " --also " + " ".join(f"finetuned@{d}" for d in sorted(args.matryoshka, reverse=True)) if args.matryoshka else ""
    print(f"\nSaved the model of step {step}{mixed} to {out / 'final'} after "
          f"{timer.seconds['train']:.0f} s of training{whole}\nNext: python 2_eval_retrieval.py{also}\n{verdict(before, after, drift)}")


def main(argv=None):
    args = parse_args(argv)
    timer = Timer()
    with joined_processes(args.device):
        plan = on_lead(lambda: prepare(args, timer))
        if plan is None:
            return
        with timer("train"):
            best, log = train(args, plan["columns"], make_evaluator(*plan["validation"]), plan["device"], plan["precision"],
                              Path(args.out) / "checkpoints")
        on_lead(lambda: finish(args, timer, plan, best, log))


if __name__ == "__main__":
    run_script(main)

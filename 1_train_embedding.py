"""Stage 1: fine-tune an embedding model on the triplets, and say what that changed.

Contrastive training: each query is drawn to its positive and pushed from its negatives and from all
other documents of the batch (MultipleNegativesRankingLoss, no text twice in a batch). The base
model is scored first, on the validation queries; the best checkpoint by nDCG@10 is kept, read back
from disk and scored the same way; the last line is the verdict.

Reads:  the train and validation splits of --data, its documents file (as validation distractors)
Writes: runs/finetuned/final (the model), run.json, training_log.jsonl, training_curve.png
Next:   python 2_eval_retrieval.py

Example:
  python 1_train_embedding.py
  python 1_train_embedding.py --base_model sentence-transformers/all-MiniLM-L6-v2 --epochs 5 --bsz 8
  python 1_train_embedding.py --data my_triplets/ --resume
"""
import json
import math
import shutil
from collections import Counter
from pathlib import Path

from common import (FINETUNED, Timer, UserError, add_run_flags, normalise, note, number, parser, print_table, replacing,
                    run_record, run_script, shuffled, text_id, write_json)
from reading import add_data_flags, documents_file, need_split, read_documents, read_triplets
from retrieval import (DEFAULT_MODEL, add_model_flags, encode, find_model, fingerprint, load_model, pick_device,
                       pick_precision)

METRICS = {"Hit@1": "accuracy@1", "Hit@10": "accuracy@10", "MRR@10": "mrr@10", "nDCG@10": "ndcg@10"}
SELECT = "ndcg@10"


def parse_args(argv=None):
    p = parser(__doc__)
    add_data_flags(p)
    g = p.add_argument_group("training")
    g.add_argument("--base_model", default=DEFAULT_MODEL, help="a folder, else a Hugging Face model id")
    g.add_argument("--epochs", type=number(float, above=0), default=2, help="passes over the training rows")
    g.add_argument("--bsz", type=number(least=2), default=32, help="queries a batch; the batch's other documents are negatives")
    g.add_argument("--lr", type=number(float, above=0), default=1e-4, help="peak learning rate (10%% warm-up, then linear to 0)")
    g.add_argument("--train_length", type=number(least=8), default=128, metavar="TOKENS",
                   help="clip texts to this many tokens while training; encoding always uses the model's own limit")
    g.add_argument("--dropout", type=number(float, least=0, most=0.9), default=0.0,
                   help="share of activations dropped while training")
    g.add_argument("--evals", type=number(least=1), default=4, help="validations while training, evenly spaced")
    g.add_argument("--val_size", type=number(least=1), default=500,
                   help="documents to validate on; more if the validation rows themselves hold more")
    g.add_argument("--limit", type=number(least=2), default=None, metavar="N", help="use the first N training rows")
    g.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an interrupted run")
    g.add_argument("--out", default=str(FINETUNED), help="folder to write")
    g = add_run_flags(p, "orders the rows and chooses validation distractors")
    add_model_flags(g)
    return p.parse_args(argv)


# ---------------------------------------------------------------- data

def train_columns(rows, seed) -> dict[str, list[str]]:
    """Rows as columns query, positive, negative, negative_2 …: as many as the richest row has.

    The loss wants every row to have the same number, so a shorter row repeats its own negatives; a
    row without any borrows another row's positive, which the batch would hold against it anyway.
    """
    if len({normalise(r.positive) for r in rows}) < 2:
        raise UserError(f"{rows[0].where}: training needs at least two rows with different positives, got {len(rows)}")
    most = max(len(r.negatives) for r in rows)
    bare = sum(not r.negatives for r in rows) if most else 0
    if bare:
        note(f"{bare} of {len(rows)} training rows have no negative: each borrows another row's positive")
    borrowed = shuffled([r.positive for r in rows], seed)
    columns = {"query": [r.query for r in rows], "positive": [r.positive for r in rows]}
    for n in range(most):
        columns["negative" if n == 0 else f"negative_{n + 1}"] = [
            r.negatives[n % len(r.negatives)] if r.negatives
            else next(p for p in borrowed[i:] + borrowed if normalise(p) != normalise(r.positive))
            for i, r in enumerate(rows)]
    return columns


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


# ---------------------------------------------------------------- training

def make_evaluator(queries, corpus, qrels, batch_size=32):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim
    return InformationRetrievalEvaluator(
        queries, corpus, qrels, name="val", accuracy_at_k=[1, 10], mrr_at_k=[10], ndcg_at_k=[10], map_at_k=[10],
        precision_recall_at_k=[10], batch_size=batch_size, write_csv=False, score_functions={"cosine": cos_sim})


def score(evaluator, model, corpus) -> dict[str, float]:
    """METRICS of a model read from disk, on the validation set; its documents come from the cache if they can."""
    import torch
    found = evaluator(model, corpus_embeddings=torch.from_numpy(encode(model, list(corpus.values()), "document")).to(model.device))
    return {name: round(float(found[f"val_cosine_{key}"]), 6) for name, key in METRICS.items()}


def deal_rows(rows, order, size) -> list[list[int]]:
    """Deal row numbers into batches of at most `size`, evenly, so that no row's query or positive
    stands anywhere else in its batch (there it would count as a negative of the row).

    `rows`: a list a row of query, positive, negatives. Rows of the most common positives are
    dealt first, while every batch is open to them; rows that fit nowhere go into later batches. A negative
    may repeat: that costs nothing, and a text that many rows share as their negative would otherwise
    force a batch for each.
    """
    count = Counter(text for row in rows for text in row[:2])
    batches, left = [], list(order)
    while left:
        window, left = left[:64 * size], left[64 * size:]  # bounds the search on large data
        window.sort(key=lambda i: -max(count[text] for text in rows[i][:2]))
        opened = [([], set(), set()) for _ in range(math.ceil(len(window) / size))]
        rest = []
        for i in window:
            own, all_texts = set(rows[i][:2]), set(rows[i])
            fitting = [b for b in opened if len(b[0]) < size and b[1].isdisjoint(all_texts) and b[2].isdisjoint(own)]
            if not fitting:
                rest.append(i)
                continue
            batch = min(fitting, key=lambda b: len(b[0]))
            batch[0].append(i)
            batch[1].update(own)
            batch[2].update(all_texts)
        batches += [b[0] for b in opened if b[0]]
        left = rest + left
    return batches


def make_sampler(epochs):
    """The library's no-duplicates sampler with other batches, dealt by deal_rows().

    The library's own defers rows that repeat a text to ever shorter batches, more of them than
    rows / batch size, and the trainer stops at len(): on data whose texts repeat, it silently left
    out up to a third of the rows. Here len() is the true number of batches.
    """
    import torch
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    class EveryRowSampler(NoDuplicatesBatchSampler):
        batches = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.rows = [list(row.values()) for row in self.dataset]
            passes = []
            for epoch in range(math.ceil(epochs)):
                self.set_epoch(epoch)
                passes.append(sum(1 for _ in self))
            self.set_epoch(0)
            self.batches = max(passes)

        def _iter_one_pass(self, *unused):
            order = torch.randperm(len(self.rows), generator=self.generator).tolist()
            batches = deal_rows(self.rows, order, self.batch_size)
            yield from (batches[i] for i in torch.randperm(len(batches), generator=self.generator))

        def __len__(self):
            return self.batches

    return EveryRowSampler


def make_trainer(model, columns, evaluator, args, precision, folder):
    import datasets
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class QuietTrainer(SentenceTransformerTrainer):
        """Without the automatic model card, which would publish training texts in every checkpoint."""

        def add_model_card_callback(self, default_args_dict):
            pass

        def _save(self, output_dir=None, state_dict=None):
            self.model.save_pretrained(output_dir or self.args.output_dir, create_model_card=False)

    class Report(TrainerCallback):
        """One line on stdout for each validation."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            if state.is_world_process_zero:
                shown = "  ".join(f"{name} {metrics[f'eval_val_cosine_{key}']:.3f}" for name, key in METRICS.items())
                print(f"  step {state.global_step}/{state.max_steps}  {shown}", flush=True)

    class Bar(ProgressCallback):
        """The progress bar without its dump of every log line."""

        def on_log(self, *args, **kwargs):
            pass

    sampler = make_sampler(args.epochs)
    rows = datasets.Dataset.from_dict(columns)
    steps = len(sampler(rows, batch_size=args.bsz, drop_last=False, seed=args.seed, generator=_generator()))
    every = max(1, math.ceil(steps * args.epochs / args.evals))
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(folder), num_train_epochs=args.epochs, per_device_train_batch_size=args.bsz, learning_rate=args.lr,
        warmup_steps=0.1, batch_sampler=sampler, seed=args.seed, eval_strategy="steps", save_strategy="steps", eval_steps=every,
        save_steps=every, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model=f"eval_val_cosine_{SELECT}",
        greater_is_better=True, logging_steps=max(1, every // 5), disable_tqdm=True, report_to="none",
        use_cpu=model.device.type == "cpu", bf16=precision == "bf16")
    settings._n_gpu = min(settings.n_gpu, 1)  # else plain `python` on several GPUs means the slow DataParallel
    trainer = QuietTrainer(model=model, args=settings, train_dataset=rows, loss=MultipleNegativesRankingLoss(model),
                           evaluator=evaluator, callbacks=[Report()])
    trainer.data_collator.max_length = args.train_length
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Bar())
    return trainer


def _generator():
    import torch
    return torch.Generator()


def train(args, columns, evaluator, device, precision, folder) -> tuple[Path, list[dict]]:
    """Train into checkpoints under `folder`; the best checkpoint's path and the log."""
    import torch
    import transformers
    transformers.set_seed(args.seed)
    # fp32 weights under bf16 autocast: weights in bf16 would round small updates away
    model = load_model(args.base_model, device, "fp32", args.offline, args.max_seq_length)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = args.dropout
    trainer = make_trainer(model, columns, evaluator, args, precision, folder)
    last = transformers.trainer_utils.get_last_checkpoint(str(folder)) if args.resume else None
    try:
        trainer.train(resume_from_checkpoint=last)
    except KeyboardInterrupt:
        if transformers.trainer_utils.get_last_checkpoint(str(folder)) is None:
            raise
        raise UserError("interrupted (the same command with --resume goes on from the last checkpoint)")
    best = trainer.state.best_model_checkpoint
    if best is None or not Path(best).is_dir():  # the library only logs when it cannot load the best one
        raise UserError(f"no checkpoint was written to {folder} (is the disk full?)")
    return Path(best), trainer.state.log_history


def start_checkpoints(folder, config, resume) -> None:
    """Make the checkpoint folder, or check that what is in it can be resumed with these arguments."""
    written = folder / "config.json"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(written, config)
        return
    if not any(folder.glob("checkpoint-*/trainer_state.json")):
        raise UserError(f"nothing to resume: {folder} holds no checkpoint (run without --resume)")
    old = json.loads(written.read_text(encoding="utf-8"))
    changed = sorted(k for k in config.keys() | old.keys() if config.get(k) != old.get(k))
    if changed:
        raise UserError(f"cannot resume: {', '.join(changed)} changed since the interrupted run "
                        "(give the same arguments, or run without --resume)")


# ---------------------------------------------------------------- results

def save_final(best, base_model, device, precision, args, columns):
    """Read the best checkpoint back, write it to final/ whole or not at all, and load it from there.

    Not the model in memory: bf16 training leaves it wrapped in autocast, with other outputs.
    """
    final, new, old = (Path(args.out) / n for n in ("final", ".final.new", ".final.old"))
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    model = load_model(str(best), device, "fp32", offline=True)
    model.save_pretrained(str(new), create_model_card=False)
    (new / "README.md").write_text(
        f"---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n---\n\n# Fine-tuned {base_model}\n\n"
        f"Fine-tuned for retrieval on {len(columns['query'])} (query, positive, negative) rows. Use `encode_query` "
        "for queries and `encode_document` for documents. run.json in the folder above says how it was made.\n", encoding="utf-8")
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return load_model(str(final), device, precision, offline=True)


def draw_curve(path, log, baseline) -> None:
    """Training loss, and validation nDCG@10 and Hit@1 with the baseline's level, over steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(*zip(*((e["step"], e["loss"]) for e in log if "loss" in e)), color="tab:gray")
    left.set(title="Training loss", xlabel="step", ylabel="loss")
    for name, color in (("nDCG@10", "tab:blue"), ("Hit@1", "tab:orange")):
        points = [(e["step"], e[f"eval_val_cosine_{METRICS[name]}"]) for e in log if f"eval_val_cosine_{METRICS[name]}" in e]
        right.plot(*zip((0, baseline[name]), *points), marker="o", color=color, label=name)
        right.axhline(baseline[name], color=color, linestyle=":", linewidth=1, label=f"{name}, base model")
    right.set(title="Validation", xlabel="step")
    right.legend(fontsize=8)
    with replacing(path, "wb") as f:
        fig.savefig(f, dpi=130, format="png")
    plt.close(fig)


def verdict(before, after) -> str:
    change = after["nDCG@10"] - before["nDCG@10"]
    word = "better" if change > 0 else "WORSE" if change < 0 else "unchanged"
    return f"Verdict: {word} on validation, nDCG@10 {before['nDCG@10']:.3f} -> {after['nDCG@10']:.3f} ({change:+.3f})"


def main(argv=None):
    args = parse_args(argv)
    timer, out = Timer(), Path(args.out)
    checkpoints = out / "checkpoints"
    with timer("read"):
        find_model(args.base_model, args.offline)
        splits, inputs = read_triplets(args)
        rows = need_split(splits, "train", args)[:args.limit]
        columns = train_columns(rows, args.seed)
        documents = documents_file(args.data)
        queries, corpus, qrels = validation_set(
            need_split(splits, "validation", args), read_documents(str(documents), "text", True) if documents else [],
            rows, splits.get("test", []), args.val_size, args.seed)
    with timer("load"):
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        base = load_model(args.base_model, device, precision, args.offline, args.max_seq_length)
        config = {k: v for k, v in vars(args).items() if k not in ("resume", "out", "offline", "data")} | {
            "precision": precision, "device": device, "weights of the base model": fingerprint(base, "document"),
            "data": text_id(json.dumps([columns, queries, corpus], ensure_ascii=False))}
        start_checkpoints(checkpoints, config, args.resume)
    print(f"{len(rows)} training rows, {len(columns) - 2} negatives each; {len(queries)} validation queries over "
          f"{len(corpus)} documents; {device}, {precision}", flush=True)
    with timer("baseline"):
        evaluator = make_evaluator(queries, corpus, qrels)
        before = score(evaluator, base, corpus)
        print("  base model  " + "  ".join(f"{k} {v:.3f}" for k, v in before.items()), flush=True)
    with timer("train"):
        best, log = train(args, columns, evaluator, device, precision, checkpoints)
    with timer("score"):
        after = score(evaluator, save_final(best, args.base_model, device, precision, args, columns), corpus)
    with replacing(out / "training_log.jsonl") as f:
        f.writelines(json.dumps(entry) + "\n" for entry in log)
    draw_curve(out / "training_curve.png", log, before)
    write_json(out / "run.json", run_record(
        "1_train_embedding.py", args, inputs + ([documents] if documents else []), timer.seconds, device=device, precision=precision,
        counts={"rows": len(rows), "queries": len(queries), "documents": len(corpus)},
        result={"baseline": before, "finetuned": after, "best_step": int(best.name.rsplit("-", 1)[1])}))
    shutil.rmtree(checkpoints, ignore_errors=True)

    print()
    print_table([(n, f"{before[n]:.3f}", f"{after[n]:.3f}", f"{after[n] - before[n]:+.3f}") for n in METRICS],
                (f"validation ({len(queries)} queries)", "baseline", "fine-tuned", "change"))
    print(f"\nSaved the model of step {best.name.rsplit('-', 1)[1]} to {out / 'final'} after {timer.seconds['train']:.0f} s of training"
          f"\nNext: python 2_eval_retrieval.py\n{verdict(before, after)}")


if __name__ == "__main__":
    run_script(main)

"""Stage 2: does the fine-tuned model find more than the model it came from?

Both models search the same corpus for the same test queries, in the same precision and with the
same length limit, by exact cosine search in FAISS. Equal texts are one document; equal cosines are
ordered by a hash of the text, which favours neither model.

Reads:  runs/corpus.jsonl, the test split of --data, runs/finetuned/final and its run.json
Writes: runs/eval/: metrics.json, per_query.csv, run.baseline.trec, run.finetuned.trec, qrels.trec,
        hit_at_k.png, run.json
Next:   python 3_rag_batch_eval.py

Example:
  python 2_eval_retrieval.py
  python 2_eval_retrieval.py --finetuned runs/other/final --limit 100 --out runs/eval_other
"""
import math
from pathlib import Path

from common import (RUNS, Timer, add_run_flags, parser, print_table, replacing, run_record, run_script, write_csv,
                    write_json)
from reading import add_data_flags
from retrieval import (add_model_flags, add_search_flags, gold_cosines, load_model, pick_device, pick_precision,
                       read_evaluation, rows_of, search)

SYSTEMS = ("baseline", "finetuned")
METRICS = ("Hit@1", "Hit@3", "Hit@5", "Hit@10", "MRR@10", "nDCG@10", "Recall@10")
CURVE = 20  # the picture's largest K


def parse_args(argv=None):
    p = parser(__doc__)
    add_data_flags(p)
    g = add_search_flags(p, None, "documents a query in the run files (default: 100, or all of a smaller corpus)")
    g.add_argument("--out", default=str(RUNS / "eval"), help="folder to write")
    g = add_run_flags(p, "recorded; nothing here is random")
    add_model_flags(g)
    return p.parse_args(argv)


def metrics_of(ranked, gold) -> dict[str, float]:
    """METRICS of one query. `ranked`: document ids, best first; `gold`: {document id: grade > 0}.

    Hit@K is 1 if a gold document is among the first K. MRR@10 is 1/rank of the first gold one, 0
    past rank 10. nDCG@10 is as in trec_eval (Järvelin & Kekäläinen 2002): grade / log2(rank + 1),
    over the same sum for the ideal order. Recall@10 is the share of gold found.
    """
    grades = [gold.get(d, 0) for d in ranked[:10]]
    first = next((i for i, g in enumerate(grades, 1) if g), math.inf)
    dcg, ideal = (sum(g / math.log2(i + 1) for i, g in enumerate(gs, 1))
                  for gs in (grades, sorted(gold.values(), reverse=True)[:10]))
    return {f"Hit@{k}": float(first <= k) for k in (1, 3, 5, 10)} | {
        "MRR@10": 1 / first, "nDCG@10": dcg / ideal, "Recall@10": sum(g > 0 for g in grades) / len(gold)}


def gold_ranks(ids, found, gold_rows) -> list[int]:
    """Rank of each query's first gold document, at any depth, 1 is best.

    `ids` of the corpus, `found` from search(), `gold_rows` from rows_of(). Past the depth of the
    search the rank is counted: the documents that score above, or equal with a larger id.
    """
    import numpy as np
    ids = np.array(ids)
    ranks = []
    for q, gold, top in zip(found["queries"], gold_rows, found["rows"]):
        rank = next((i for i, row in enumerate(top, 1) if row in gold), None)
        if rank is None:
            cosines = np.round((found["documents"] @ q).astype(np.float64), 6)
            best = max(gold, key=lambda row: (cosines[row], ids[row]))
            ahead = (cosines > cosines[best]) | (cosines == cosines[best]) & (ids > ids[best])
            rank = max(int(ahead.sum()) + 1, len(top) + 1)
        ranks.append(rank)
    return ranks


def evaluate(name, model, corpus, queries, golds, k) -> dict:
    """One system's run and its per-query figures: ids and cosines of the first k, rank and cosine of gold, METRICS."""
    found, gold_rows = search(model, corpus, queries, k), rows_of(golds, corpus)
    ids = [d["_id"] for d in corpus]
    ranked = [[ids[r] for r in top] for top in found["rows"]]
    per_query = [metrics_of(r, g) for r, g in zip(ranked, golds)]
    return {"name": name, "ranked": ranked, "cosines": found["cosines"], "per_query": per_query,
            "rank": gold_ranks(ids, found, gold_rows), "gold_cosine": gold_cosines(found, gold_rows),
            "mean": {m: sum(q[m] for q in per_query) / len(per_query) for m in METRICS}}


def compare(before, after) -> dict[str, dict]:
    """For each metric: both means, the change, and on how many queries the second won, tied and lost."""
    out = {}
    for m in METRICS:
        changes = [b[m] - a[m] for a, b in zip(before["per_query"], after["per_query"])]
        out[m] = {"baseline": before["mean"][m], "finetuned": after["mean"][m],
                  "change": after["mean"][m] - before["mean"][m], "win": sum(c > 0 for c in changes),
                  "tie": sum(c == 0 for c in changes), "loss": sum(c < 0 for c in changes)}
    return out


def misses_fixed(before, after) -> tuple[int, int]:
    """How many of the first system's Hit@1 misses the second gets right, and how many misses there were."""
    missed = [a["Hit@1"] for a, b in zip(after["per_query"], before["per_query"]) if not b["Hit@1"]]
    return int(sum(missed)), len(missed)


def write_run(path, system, queries) -> None:
    """A TREC run file: query id, Q0, document id, rank, score, system."""
    with replacing(path) as f:
        for (qid, _), ids, cosines in zip(queries, system["ranked"], system["cosines"]):
            f.writelines(f"{qid} Q0 {d} {rank} {c:.6f} {system['name']}\n" for rank, (d, c) in enumerate(zip(ids, cosines), 1))


def draw_hits(path, systems, n_documents) -> None:
    """Hit@K over K for each system."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator
    ks = range(1, min(CURVE, n_documents) + 1)
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for system, color in zip(systems, ("tab:gray", "tab:blue")):
        ax.plot(ks, [sum(r <= k for r in system["rank"]) / len(system["rank"]) for k in ks], marker=".", color=color, label=system["name"])
    ax.set(xlabel="K", ylabel="Hit@K", ylim=(0, 1.02), title=f"{len(systems[0]['rank'])} queries, {n_documents} documents")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    with replacing(path, "wb") as f:
        fig.savefig(f, dpi=130, format="png")
    plt.close(fig)


def write_outputs(out, systems, queries, golds) -> None:
    for system in systems:
        write_run(out / f"run.{system['name']}.trec", system, queries)
    with replacing(out / "qrels.trec") as f:
        f.writelines(f"{qid} 0 {d} {grade}\n" for (qid, _), gold in zip(queries, golds) for d, grade in gold.items())
    header = ["query_id", "query", "gold_id"] + [f"{s['name']}_{c}" for s in systems for c in ("rank", "cosine")]
    write_csv(out / "per_query.csv", header, (
        [qid, text, " ".join(gold)] + [v for s in systems for v in (s["rank"][i], f"{s['gold_cosine'][i]:.6f}")]
        for i, ((qid, text), gold) in enumerate(zip(queries, golds))))


def main(argv=None):
    args = parse_args(argv)
    timer, out = Timer(), Path(args.out)
    with timer("read"):
        names, corpus, queries, golds, inputs = read_evaluation(args, args.top_k or 1)
        k = max(args.top_k or min(100, len(corpus)), min(10, len(corpus)))  # the metrics look at ten
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    print(f"{len(queries)} queries over {len(corpus)} documents; {device}, {precision}", flush=True)
    systems, limit = {}, args.max_seq_length
    for role in reversed(SYSTEMS):  # the fine-tuned model first: its length limit holds for both
        with timer(role):
            model = load_model(names[role], device, precision, args.offline, limit)
            limit = limit or model.max_seq_length
            systems[role] = evaluate(role, model, corpus, queries, golds, k)
    before, after = systems["baseline"], systems["finetuned"]
    table, fixed = compare(before, after), misses_fixed(before, after)
    with timer("write"):
        write_outputs(out, (before, after), queries, golds)
        draw_hits(out / "hit_at_k.png", (before, after), len(corpus))
    write_json(out / "metrics.json", {"queries": len(queries), "documents": len(corpus), "models": names, "max_seq_length": limit,
                                      "metrics": table, "hit1_misses": {"baseline": fixed[1], "fixed": fixed[0]}})
    write_json(out / "run.json", run_record("2_eval_retrieval.py", args, inputs, timer.seconds, device=device,
                                            precision=precision, counts={"queries": len(queries), "documents": len(corpus)}, result=table))

    print_table([(m, f"{t['baseline']:.3f}", f"{t['finetuned']:.3f}", f"{t['change']:+.3f}", f"{t['win']}/{t['tie']}/{t['loss']}")
                 for m, t in table.items()], ("metric", "baseline", "fine-tuned", "change", "win/tie/loss"))
    if fixed[1]:
        print(f"\nOf the baseline's {fixed[1]} misses at rank 1 the fine-tuned model gets {fixed[0]} right ({fixed[0] / fixed[1]:.0%}).")
    print(f"\nSaved metrics, runs and plot to {out}\nNext: python 3_rag_batch_eval.py")


if __name__ == "__main__":
    run_script(main)

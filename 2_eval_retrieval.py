"""Stage 2: does the fine-tuned model find more than the model it came from, and how sure is that?

Both models search the same corpus for the same queries, in the same precision and with the same
length limit, by exact cosine search in FAISS; bm25 and its fusion with the fine-tuned model (rrf)
stand beside them. Equal texts are one document; equal scores are ordered by document id, in a corpus
from stage 0 a hash of the text, which favours no system. The verdict rests on nDCG@10 alone, chosen
in advance; the other comparisons are corrected for their number. Queries, gold documents and others
that training has seen, mined negatives included, are looked for, and everything is computed again without them.

Reads:  runs/corpus.jsonl, the splits of --data (or --queries and --qrels), runs/finetuned/final, its
        run.json and trained_on.jsonl; for openai:NAME the environment or .env (OPENAI_API_KEY, OPENAI_BASE_URL; or
        AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_KEY, OPENAI_API_VERSION)
Writes: runs/eval/: metrics.json, per_query.csv, table.md, run.SYSTEM.trec, qrels.trec, queries.jsonl
        and qrels.tsv (with the corpus: a BEIR data set), hit_at_k.png, ranks.png, similarity.png,
        context_tokens.png, run.json
Next:   python 3_rag_batch_eval.py

Example:
  python 2_eval_retrieval.py
  python 2_eval_retrieval.py --also bm25 rrf finetuned@128 openai:text-embedding-3-small
  python 2_eval_retrieval.py --queries log.jsonl --qrels judged.tsv --corpus handbook.jsonl --out runs/eval_log
"""
import contextlib
import json
import textwrap
from collections import Counter
from pathlib import Path

from audit import leakage, training_rows
from common import (RUNS, Timer, add_run_flags, parser, print_table, replacing, run_record, run_script,
                    write_csv, write_json)
from reading import add_data_flags
from retrieval import (add_model_flags, add_search_flags, load_model, pick_device, pick_precision, prompts_given, read_evaluation,
                       run_record_of)
from significance import compare, compare_systems, context_saved, detectable, mean_intervals, queries_needed, verdict
from systems import DEPTH, METRICS, Searcher, evaluate, metrics_of, parse_systems, slices

SYSTEMS = ("baseline", "finetuned")
PRIMARY = "nDCG@10"  # the one metric of the verdict, fixed before any result is seen
FIRST = METRICS.index(PRIMARY)
CURVE = 20  # the pictures' largest K
EXAMPLES = 3  # biggest gains and losses printed
ALSO = ("bm25", "rrf")
WIDTH = 116  # of printed lines
METHOD = ("(*) decides the verdict, chosen in advance; the other p values are corrected for their number (Holm). "
          "Intervals: bootstrap over queries (Wilson's for Hit@K of one system). "
          "p: exact McNemar test for Hit@K, else random changes of sign. Both pair the queries.")


def parse_args(argv=None):
    p = parser(__doc__)
    add_data_flags(p)
    g = add_search_flags(p, None, f"documents a query in the run files, {DEPTH} or more (default: {DEPTH}, or all of a smaller corpus)")
    g.add_argument("--also", nargs="*", action="extend", metavar="SYSTEM", help="more systems for the table: model names or folders, "
                   "NAME@128 (truncated dimensions), bm25, rrf (fine-tuned model and bm25 fused), rrf:NAME, openai:NAME "
                   f"(an OpenAI-compatible server or Azure); the flag alone means none (default: {' '.join(ALSO)})")
    g.add_argument("--out", default=str(RUNS / "eval"), help="folder to write")
    g = add_run_flags(p, "draws the samples behind intervals and p values")
    add_model_flags(g)
    return p.parse_args(argv)


# ---------------------------------------------------------------- the tables

def interval(value, bounds, sign="") -> str:
    return f"{value:{sign}.3f} [{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]"


def p_text(p) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def change_cells(c) -> list[str]:
    return [interval(c["change"], c["interval"], "+"), p_text(c["p_holm"]), f"{c['win']}/{c['tie']}/{c['loss']}"]


def table_of_metrics(levels, comparisons, whole=None):
    """(rows, header): baseline, fine-tuned model and their difference, a line a metric.

    With the comparisons of the `whole`, the table is that of the clean part, with the change on all queries beside it.
    """
    rows = [[m + " (*)" * (m == PRIMARY), *(interval(*levels[s][m]) for s in SYSTEMS), *change_cells(c)]
            + ([f"{w['change']:+.3f}"] if whole else [])
            for m, c, w in zip(METRICS, comparisons["finetuned"], (whole or comparisons)["finetuned"])]
    return rows, ["clean part" if whole else "metric", "baseline [95%]", "fine-tuned [95%]", "change [95%]", "p",
                  "win/tie/loss"] + ["change on all"] * bool(whole)


def table_of_systems(levels, comparisons):
    """(rows, header): every system, compared with the fine-tuned model on the primary metric."""
    rows = [[s, interval(*levels[s][PRIMARY]), *(f"{levels[s][m][0]:.3f}" for m in ("Hit@1", "Hit@10", "MRR@10", "Recall@10")),
             *(change_cells(comparisons[s][0]) if s not in SYSTEMS else [""] * 3)] for s in levels]
    return rows, ["system", f"{PRIMARY} [95%]", "Hit@1", "Hit@10", "MRR@10", "Recall@10", "against fine-tuned [95%]", "p", "win/tie/loss"]


def statistics(values, seed):
    """Levels {system: {metric: (mean, interval)}}, and comparisons as from compare_systems(), of {system: (queries, METRICS)}."""
    levels = {s: {m: (float(v), bounds.tolist()) for m, v, bounds in zip(METRICS, x.mean(0), mean_intervals(x, seed).T)}
              for s, x in values.items()}
    return levels, compare_systems(values, FIRST, seed)


def table_of_slices(parts):
    rows = [[p["slice"], p["queries"], f"{p['baseline']:.3f}", f"{p['finetuned']:.3f}", interval(p["change"], p["interval"], "+"),
             f"{p['win']}/{p['tie']}/{p['loss']}"] for p in parts]
    return rows, [f"{PRIMARY} by kind of query (to explore)", "queries", "baseline", "fine-tuned", "change [95%]", "win/tie/loss"]


def verdict_of(comparisons) -> str:
    return verdict(comparisons["finetuned"][FIRST])


def verdict_lines(systems, levels, comparisons, record) -> list[str]:
    """The verdict in words and what so many queries can show; unless it is "better", also what could help."""
    c, (before, after) = comparisons["finetuned"][FIRST], (systems[s]["values"][:, FIRST] for s in SYSTEMS)
    n, word, more = len(before), verdict_of(comparisons), queries_needed(after - before)
    lines = [f"Verdict: {'' if word == 'not distinguishable' else 'the fine-tuned model is '}{word} with {n} queries ({PRIMARY} "
             f"{before.mean():.3f} -> {after.mean():.3f}, change {interval(c['change'], c['interval'], '+')}, p {p_text(c['p'])})."]
    if (after == before).all():
        lines.append(f"No query's {PRIMARY} changed.")
    else:
        lines.append(f"So many queries show a change of {detectable(after - before):.3f} four times in five; a change of "
                     f"{c['change']:+.3f} would take about {more:,}." if more and word == "not distinguishable" else
                     f"So many queries show a change of {detectable(after - before):.3f} four times in five.")
    if n < 50:
        lines.append("Under 50 queries even the intervals are rough.")
    return lines + (help_lines(systems["finetuned"]["rank"], levels, comparisons, record) if word != "better" else [])


def help_lines(ranks, levels, comparisons, record) -> list[str]:
    """What the figures say about other ways to a better search. `ranks` of gold by the fine-tuned model."""
    lines = ["What could help instead:"]
    for s, (c, *_) in comparisons.items():
        if s != "finetuned":
            word = verdict(c | {"p": c["p_holm"]})
            lines.append(f"- {s} is {word} {'from' if word == 'not distinguishable' else 'than'} the fine-tuned model "
                         f"({PRIMARY} {levels[s][PRIMARY][0]:.3f}, {interval(c['change'], c['interval'], '+')}).")
    near, far = (sum(r <= k for r in ranks) / len(ranks) for k in (10, DEPTH))
    lines.append(f"- Gold is among the first 10 for {near:.0%} of the queries and among the first {DEPTH} for {far:.0%}: reranking those "
                 f"could add {far - near:.0%} to Hit@10 at most; the rest needs a better first search.")
    if record.get("counts", {}).get("rows"):
        lines.append(f"- It was trained on {record['counts']['rows']:,} rows: more of them, or harder negatives.")
    return lines


def context_line(systems, seed) -> tuple[dict, str]:
    """What the fine-tuned model's hits cost in tokens for an LLM, against the baseline's first 10 documents."""
    saved = context_saved(*((systems[s]["rank"], systems[s]["context"]) for s in SYSTEMS), 10, seed) | {"curve": {
        name: {"tokens": s["context"].mean(0).tolist(), "hit": [sum(r <= k for r in s["rank"]) / len(s["rank"]) for k in
               range(1, s["context"].shape[1] + 1)]} for name, s in systems.items()}}
    if not saved["hit"]:
        return saved, "For an LLM: the baseline's first 10 documents hold gold for no query."
    text = (f"For an LLM: the baseline's first 10 documents hold gold for {saved['hit']:.0%} of the queries; its first {saved['k_before']} "
            f"are enough for that, {saved['tokens_before']:,.0f} tokens on average (by the fine-tuned model's tokenizer). ")
    if saved["k"] is None:
        return saved, text + f"The fine-tuned model does not reach that with {systems['finetuned']['context'].shape[1]}."
    share = f"{abs(saved['saved']):.0%} {'more' if saved['saved'] < 0 else 'fewer'} tokens"
    return saved, text + (f"The same Hit needs the fine-tuned model's first {saved['k']}, {share} "
                          f"[95%: {saved['interval'][0]:+.0%} to {saved['interval'][1]:+.0%} saved].")


def slices_of(searcher, systems, golds, seed) -> list[dict]:
    """The primary metric on each of the slices(). To explore, not to test: no p."""
    out = []
    for name, part in slices(searcher, golds).items():
        before, after = (systems[s]["values"][part][:, [FIRST]] for s in SYSTEMS)
        changed = {k: v for k, v in compare(before, after, seed)[0].items() if k != "p"}
        out.append({"slice": name, "queries": int(part.sum()), "baseline": float(before.mean()), "finetuned": float(after.mean())} | changed)
    return out


def examples(systems, queries, golds, corpus) -> list[str]:
    """The queries whose gold moved most by 1 / rank: query, gold, and what the worse system put first."""
    def short(text):
        return textwrap.shorten(text, 100, placeholder=" …") if " " in text[:80] else text[:100]

    text, (before, after) = {d["_id"]: d["text"] for d in corpus}, (systems[s] for s in SYSTEMS)
    moved = sorted(range(len(queries)), key=lambda i: 1 / before["rank"][i] - 1 / after["rank"][i])
    lines = []
    for title, order, better, worse in (("gains", moved, after, before), ("losses", moved[::-1], before, after)):
        order = [i for i in order[:EXAMPLES] if better["rank"][i] < worse["rank"][i]]
        lines += [f"Biggest {title} (rank of gold, baseline -> fine-tuned):"] if order else [f"No {title}."]
        for i in order:
            lines += [f"  {before['rank'][i]} -> {after['rank'][i]}  {short(queries[i][1])}",
                      f"      gold: {short(text[max(golds[i], key=golds[i].get)])}",
                      f"      {worse['name']} put first: {short(text[worse['ranked'][i][0]])}"]
    return lines


# ---------------------------------------------------------------- files

def write_runs(out, systems, queries, golds) -> None:
    """TREC run and qrels files, and the queries and judgements in BEIR's layout; runs of other systems, from before, go."""
    for name, system in systems.items():
        with replacing(out / f"run.{name}.trec") as f:
            for (qid, _), ids, scores in zip(queries, system["ranked"], system["scores"]):
                f.writelines(f"{qid} Q0 {d} {rank} {s:.6f} {name}\n" for rank, (d, s) in enumerate(zip(ids, scores), 1))
    for old in set(out.glob("run.*.trec")) - {out / f"run.{name}.trec" for name in systems}:
        old.unlink()
    judged = [(qid, d, grade) for (qid, _), gold in zip(queries, golds) for d, grade in gold.items()]
    with replacing(out / "qrels.trec") as f:
        f.writelines(f"{qid} 0 {d} {grade}\n" for qid, d, grade in judged)
    with replacing(out / "qrels.tsv") as f:
        f.writelines("\t".join(map(str, row)) + "\n" for row in [("query-id", "corpus-id", "score"), *judged])
    with replacing(out / "queries.jsonl") as f:
        f.writelines(json.dumps({"_id": qid, "text": text}, ensure_ascii=False) + "\n" for qid, text in queries)


def write_per_query(path, systems, queries, golds, leaked) -> None:
    """One row a query: of each system the gold's rank, score, lead on the best wrong document, tokens until gold, nDCG@10."""
    columns = ("rank", "score", "gap", "tokens_to_gold", PRIMARY)

    def cells(s, i):
        rank, gap, read = s["rank"][i], s["gap"][i], s["context"][i]
        return [rank, round(s["score"][i], 6), "" if gap is None else round(gap, 6), int(read[rank - 1]) if rank <= len(read) else "",
                round(float(s["values"][i][FIRST]), 6)]

    write_csv(path, ["query_id", "query", "gold_id", "seen_in_training"] + [f"{s}_{c}" for s in systems for c in columns], (
        [qid, text, " ".join(gold), int(leaked[i]) if leaked else ""] + [v for s in systems.values() for v in cells(s, i)]
        for i, ((qid, text), gold) in enumerate(zip(queries, golds))))


def write_markdown(path, title, tables, lines) -> None:
    """The tables and the verdict, to paste into a pull request."""
    with replacing(path) as f:
        f.write(f"### {title}\n\n")
        for rows, header in tables:
            marks = ["---"] + ["---:"] * (len(header) - 1)
            f.writelines("| " + " | ".join(map(str, row)) + " |\n" for row in [header, marks, *rows])
            f.write("\n")
        f.writelines(f"{line}\n" for line in lines)


@contextlib.contextmanager
def plot(path, xlabel, ylabel, title, **kwargs):
    """A matplotlib axis; what the block draws on it becomes a picture at `path`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, **kwargs)
    ax.grid(alpha=0.3)
    yield ax
    ax.legend(fontsize="small")
    with replacing(path, "wb") as f:
        fig.savefig(f, dpi=130, format="png")
    plt.close(fig)


def draw(out, systems, size, seed) -> None:
    """Hit@K with bands; Hit against tokens; rank before against rank after; cosines of gold and wrong documents."""
    import numpy as np
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
    ks = np.arange(1, min(CURVE, systems["baseline"]["context"].shape[1]) + 1)
    colors = dict(zip(systems, ("tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive")))
    hits = {name: (np.array(s["rank"])[:, None] <= ks).astype(float) for name, s in systems.items()}
    with plot(out / "hit_at_k.png", "K", "Hit@K (bands: 95%)", size, ylim=(0, 1.02)) as ax:
        for name, h in hits.items():
            ax.plot(ks, h.mean(0), marker=".", label=name, color=colors.get(name))
            if name in SYSTEMS:
                ax.fill_between(ks, *mean_intervals(h, seed), alpha=0.15, color=colors[name])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    with plot(out / "context_tokens.png", f"tokens of the first K documents, on average (K = 1 to {ks[-1]})", "Hit@K", size) as ax:
        for name, h in hits.items():
            ax.plot(systems[name]["context"][:, :len(ks)].mean(0), h.mean(0), marker=".", label=name, color=colors.get(name))
    pairs = Counter(zip(*(systems[s]["rank"] for s in SYSTEMS)))
    limit = 1.3 * max(max(pair) for pair in pairs)
    with plot(out / "ranks.png", "rank of gold, baseline", "rank of gold, fine-tuned", size, xscale="log", yscale="log",
              xlim=(0.8, limit), ylim=(0.8, limit)) as ax:
        ax.scatter(*zip(*pairs), s=[12 * c ** 0.7 for c in pairs.values()], alpha=0.5, label="queries (area: how many); below the line: better")
        ax.plot([0.8, limit], [0.8, limit], color="tab:gray", lw=1)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    with plot(out / "similarity.png", "cosine", "share of the queries at or below", size) as ax:
        for name in SYSTEMS:
            score, gap = np.array(systems[name]["score"]), np.array([np.nan if g is None else g for g in systems[name]["gap"]])
            for values, style, what in ((score, "-", "gold"), (score - gap, "--", "best wrong document")):
                ax.ecdf(values[np.isfinite(values)], ls=style, color=colors[name], label=f"{name}: {what}")


# ---------------------------------------------------------------- the run

def judge(systems, rankings, searcher, golds, splits, seed):
    """Levels, comparisons and the audit with those of the clean part; without training rows the audit is None."""
    import numpy as np
    full = statistics({name: s["values"] for name, s in systems.items()}, seed)
    seen = leakage(searcher.queries, golds, searcher.corpus, splits) if splits else None
    if not seen or not (seen["seen"] or any(seen["leaked"])):
        return full, seen, None
    keep = [i for i, leaked in enumerate(seen["leaked"]) if not leaked]
    seen["clean"] = {"queries": len(keep), "documents": len(searcher.corpus) - len(seen["seen"])}
    values = {}
    for name, ranking in rankings.items():
        rows = searcher.without(ranking, seen["seen"]).rows
        values[name] = np.array([metrics_of([searcher.ids[r] for r in rows[i]], golds[i]) for i in keep])
    return full, seen, statistics(values, seed) if keep else None


def remark_lines(found, seen, full, clean, systems, servers, n_queries) -> list[str]:
    """What to know beside the tables: training text, merged documents, ties, misses fixed, servers asked."""
    lines = []
    if seen:
        q, g, d = seen["queries"], seen["gold"], seen["distractors"]
        lines.append(f"In training or validation rows: {q['equal']} queries ({q['near']} more nearly), {g['equal']} gold documents "
                     f"({g['near']} more nearly); {sum(seen['leaked'])} of {n_queries} queries are touched. Other documents that training "
                     f"saw: {d['negative']} as negatives, {d['positive']} as positives.")
    if seen and "clean" in seen:
        lines.append(f"The clean part, {seen['clean']['queries']} queries over the {seen['clean']['documents']} documents that training "
                     f"has not seen: {verdict_of(clean[1]) if clean else 'nothing left'}.")
    if found["merged"]:
        lines.append(f"{found['merged']} documents equal another: counted as one. Apart, they would have held Hit@1 to "
                     f"{found['hit1_ceiling']:.3f} at most.")
    ties = {s: sum(gap == 0 for gap in systems[s]["gap"]) for s in SYSTEMS}
    if any(ties.values()):
        lines.append(f"Gold has the same score as the best wrong document for {ties['baseline']} queries (baseline) and {ties['finetuned']} "
                     "(fine-tuned): the larger document id goes first.")
    first, missed = full[1]["finetuned"][0], round(n_queries * (1 - full[0]["baseline"]["Hit@1"][0]))
    if missed:
        lines.append(f"Of the baseline's {missed} misses at rank 1 the fine-tuned model gets {first['win']} right ({first['win'] / missed:.0%}).")
    return lines + [f"{name}: {usage}." for name, usage in servers.items()]


def as_json(levels, comparisons) -> dict:
    """Levels and comparisons as metrics.json holds them."""
    return {"metrics": {m: {s: levels[s][m][0] for s in SYSTEMS} | {f"{s}_interval": levels[s][m][1] for s in SYSTEMS} | c
                        for m, c in zip(METRICS, comparisons["finetuned"])},
            "systems": {s: {m: {"mean": mean, "interval": bounds} for m, (mean, bounds) in x.items()} for s, x in levels.items()},
            "against_finetuned": {s: c[0] for s, c in comparisons.items() if s != "finetuned"}}


def show(tables, lines) -> None:
    """Tables, then lines, folded to the width of the tables."""
    for rows, header in tables:
        print()
        print_table(rows, header)
    print("\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  " * line.startswith("-")) for line in lines))


def main(argv=None):
    args = parse_args(argv)
    timer, out, found = Timer(), Path(args.out), {}
    with timer("read"):
        names, corpus, queries, golds, inputs = read_evaluation(args, args.top_k or 1, found)
        wanted = parse_systems(ALSO if args.also is None else args.also, names, args.offline)
        record = run_record_of(args.finetuned)
        splits = training_rows(args, found, record)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    size = f"{len(queries)} queries, {len(corpus)} documents"
    print(f"{size}; {device}, {precision}", flush=True)

    def load(name, limit):
        return load_model(name, device, precision, args.offline, args.max_seq_length or limit, prompts_given(args.finetuned, name))

    searcher = Searcher(names, corpus, queries, min(max(args.top_k or 0, DEPTH), len(corpus)), load)
    rankings, systems = dict.fromkeys(wanted), dict.fromkeys(wanted)
    for label in sorted(wanted, key=lambda s: s != "finetuned"):  # first, because its limit holds for the baseline
        with timer(label):
            rankings[label] = searcher.ranking(wanted[label])
            systems[label] = evaluate(label, rankings[label], searcher, golds)
    with timer("statistics"):
        full, seen, clean = judge(systems, rankings, searcher, golds, splits, args.seed)
        saved, saved_line = context_line(systems, args.seed)
        parts = slices_of(searcher, systems, golds, args.seed)
    with timer("write"):
        write_runs(out, systems, queries, golds)
        write_per_query(out / "per_query.csv", systems, queries, golds, seen and seen["leaked"])
        draw(out, systems, size, args.seed)
    tables = [table_of_metrics(*full)] + [table_of_systems(*full)] * (len(systems) > 2)
    lines = verdict_lines(systems, *full, record)
    tables_clean = [table_of_metrics(*clean, full[1])] if clean else []
    remarks = remark_lines(found, seen, full, clean, systems, searcher.remarks, len(queries)) + [saved_line]
    write_markdown(out / "table.md", size, tables + tables_clean + [table_of_slices(parts)], [*lines, "", METHOD, "", *(f"- {x}" for x in remarks)])
    facts = {"queries": len(queries), "documents": len(corpus), "models": names, "max_seq_length": searcher.limits[names["finetuned"]],
             "limits": searcher.limits, "servers": searcher.remarks, "merged": found["merged"], "hit1_ceiling": found["hit1_ceiling"],
             "left_out": found.get("left_out", []), "primary": PRIMARY, "verdict": verdict_of(full[1]), "verdict_lines": lines}
    write_json(out / "metrics.json", facts | as_json(*full) | {
        "training_has_seen": seen and {k: seen[k] for k in seen if k not in ("leaked", "seen")},
        "clean": as_json(*clean) if clean else None, "context": saved, "slices": parts})
    write_json(out / "run.json", run_record("2_eval_retrieval.py", args, inputs, timer.seconds, device=device, precision=precision,
                                            counts={"queries": len(queries), "documents": len(corpus)}, result=as_json(*full)["metrics"]))

    show(tables, [METHOD, "", *lines])
    show(tables_clean, ["", *remarks])
    print("\n" + "\n".join(examples(systems, queries, golds, corpus)))
    print(f"\nSaved metrics, table.md, per_query.csv, runs and plots to {out}\nNext: python 3_rag_batch_eval.py")


if __name__ == "__main__":
    run_script(main)

"""Stage 3: what would the LLM read, and what would it answer, with each model?

For every test query: where both models rank the gold document and the first documents of both, side
by side. With --llm also the answers that a language model gives from each model's documents, with
--judge which of the two is better. `--llm extractive` needs no server and no key: its answer is the
sentences of the context that share the rarest words with the query. A finished call is kept and
never made twice: after a crash, Ctrl-C or --max_calls the same command goes on where it stopped.

Reads:  runs/corpus.jsonl, the test split of --data, runs/finetuned/final and its run.json; for --llm
        the environment (or .env): OPENAI_API_KEY, OPENAI_BASE_URL for another OpenAI-compatible
        server; or AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_KEY, and OPENAI_API_VERSION unless v1
Writes: runs/rag_compare_report.csv (one row a query), .html (the same to look at), .json (summary);
        runs/llm_cache/ (the finished calls)
Next:   open the HTML report

Example:
  python 3_rag_batch_eval.py
  python 3_rag_batch_eval.py --llm extractive
  python 3_rag_batch_eval.py --llm gpt-4o-mini --judge gpt-4o --limit 20 --dry_run
"""
import re
from collections import Counter
from pathlib import Path

import judge
from common import (RUNS, Timer, add_run_flags, number, parser, print_table, replacing, run_record, run_script,
                    write_csv, write_json)
from llm import (EXTRACTIVE, NOT_CALLED, OK, STORE, TEMPLATES, Call, Reply, Server, Store, about_tokens, connect, cost, cut, extract,
                 load_template)
from reading import add_data_flags
from retrieval import (add_model_flags, add_search_flags, gold_cosines, length_limit, load_model, pick_device, pick_precision, prompts_given,
                       read_evaluation, rows_of, search)

SYSTEMS = judge.ROLES
SNIPPETS = 3
SNIPPET_LENGTH = 240
PAGE_TEXT = 1200       # characters of a document in the HTML report
CELL = 32_000          # characters; a spreadsheet's cell holds 32,767
CHANGES, OUTCOMES = ("fixed", "broken", "same"), ("better", "worse", "same", "unknown")


def parse_args(argv=None):
    p = parser(__doc__)
    add_data_flags(p)
    add_search_flags(p, 10, "how deep the gold document is looked for")
    g = p.add_argument_group("answers")
    g.add_argument("--llm", default=None, metavar="MODEL", help="model (on Azure: deployment) that answers, or the word extractive; none by default")
    g.add_argument("--context_k", type=number(least=1), default=3, metavar="K", help="documents that are read for each answer")
    g.add_argument("--doc_tokens", type=number(least=16), default=800, metavar="N", help="longest document in a prompt, in tokens (a quarter of its UTF-8 bytes)")
    g.add_argument("--prompt", default=str(TEMPLATES / "answer.txt.j2"), metavar="FILE", help="template of the prompt, with query and documents")
    g.add_argument("--max_tokens", type=number(least=1), default=300, help="longest answer, in tokens")
    g.add_argument("--judge", default=None, metavar="MODEL", help="model that says which of two answers is better")
    g.add_argument("--judge_repeats", type=number(least=1), default=1, metavar="N", help="judge each pair N times, to see the judge's own noise")
    g = p.add_argument_group("calls")
    g.add_argument("--dry_run", action="store_true", help="say how many calls and about how many tokens, make none and write no report")
    g.add_argument("--max_calls", type=number(least=0), default=None, metavar="N", help="stop after N calls; run again to go on")
    g.add_argument("--workers", type=number(least=1), default=4, metavar="N", help="calls under way at once")
    g.add_argument("--timeout", type=number(float, above=0), default=60, help="seconds to wait for one answer")
    for kind, text in (("in", "prompts"), ("out", "answers")):
        g.add_argument(f"--price_{kind}", type=number(float, least=0), default=None, metavar="X", help=f"price of a million tokens of {text}")
    g.add_argument("--llm_cache", default=str(STORE), metavar="FOLDER", help="finished calls, by model, messages and parameters; another server's model of the same name needs another folder")
    g.add_argument("--out", default=str(RUNS / "rag_compare_report.csv"), help="the report to write; .html and .json stand beside it")
    g = add_run_flags(p, "recorded; nothing here is random")
    add_model_flags(g)
    args = p.parse_args(argv)
    if not args.llm and (args.judge or args.dry_run):
        p.error(f"--{'judge' if args.judge else 'dry_run'} needs --llm")
    if (args.price_in is None) != (args.price_out is None):
        p.error("--price_in and --price_out go together")
    if Path(args.out).suffix in (".html", ".json"):
        p.error("--out names the CSV; the .html and .json stand beside it")
    return args


def snippet(text, length=SNIPPET_LENGTH) -> str:
    """The start of a text on one line, cut at a word."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …"


# ---------------------------------------------------------------- retrieval

def retrieve(model, corpus, queries, golds, k) -> list[dict]:
    """For each query: rows and cosines of the first k documents, rank of the first gold one among them (None past k), its cosine."""
    found, gold_rows = search(model, corpus, queries, k), rows_of(golds, corpus)
    return [{"top": top.tolist(), "cosines": near.tolist(), "cosine": cosine,
             "rank": next((i for i, r in enumerate(top, 1) if r in gold), None)}
            for top, near, gold, cosine in zip(found["rows"], found["cosines"], gold_rows, gold_cosines(found, gold_rows))]


def make_records(queries, golds, corpus, found, args) -> list[dict]:
    """One record a query: "query", "gold" {id: grade}, "gold_documents", "retrieval", "same_context", and for
    each role what retrieve() found, the "documents" that are read for an answer, and about how many tokens.

    A document is {"id", "title", "text" cut to --doc_tokens}. "retrieval" is "fixed" if only the fine-tuned model has a gold
    document there, "broken" if only the baseline has, else "same".
    """
    def readable(row):
        d = corpus[row]
        return {"id": d["_id"], "title": d.get("title") or "", "text": cut(d["text"], args.doc_tokens)}
    records, row_of = [], {d["_id"]: i for i, d in enumerate(corpus)}
    for i, ((_, query), gold) in enumerate(zip(queries, golds)):
        r = {"query": query, "gold": gold, "gold_documents": [readable(row_of[d]) for d in sorted(gold, key=lambda d: -gold[d])]}
        for role in SYSTEMS:
            documents = [readable(row) for row in found[role][i]["top"][:args.context_k]]
            r[role] = found[role][i] | {"documents": documents, "context_tokens": sum(about_tokens(d["text"]) for d in documents),
                                        "snippets": [snippet(corpus[row]["text"]) for row in found[role][i]["top"][:SNIPPETS]]}
        before, after = (bool(r[role]["rank"] and r[role]["rank"] <= args.context_k) for role in SYSTEMS)
        r["retrieval"] = "same" if before == after else "fixed" if after else "broken"
        r["same_context"] = r["baseline"]["documents"] == r["finetuned"]["documents"]
        records.append(r)
    return records


# ---------------------------------------------------------------- answers

def answer_calls(records, args) -> list[Call]:
    """The call for each answer, two a record; equal contexts give equal calls, which are made once."""
    render = load_template(args.prompt, ("query", "documents"))
    return [Call(args.llm, ({"role": "user", "content": render(query=r["query"], documents=r[role]["documents"])},),
                 {"temperature": 0, "max_tokens": args.max_tokens}) for r in records for role in SYSTEMS]


def add_answers(records, replies) -> None:
    """Put each reply into its record, with the documents of the context that it names in square brackets."""
    for r, pair in zip(records, zip(replies[::2], replies[1::2])):
        for role, reply in zip(SYSTEMS, pair):
            named = {n for part in re.findall(r"\[([^\[\]]*)\]", reply.text) for n in re.split(r"[,;\s]+", part)}
            r[role] |= {"reply": reply, "cites": [d["id"] for d in r[role]["documents"] if d["id"] in named]}


def settle(records, judged) -> None:
    """Each record's "answer" (better, worse, same: the fine-tuned model's against the baseline's; unknown) and "status".

    By the judge's verdict, or without a judge by which of the two answers names a gold document.
    """
    for r in records:
        wrong = [f"{role}: {r[role]['reply'].status}" for role in SYSTEMS if r[role]["reply"].status != OK]
        verdict = r.get("judgement", {"verdict": "tie"})
        if verdict["verdict"] is None:
            wrong.append(f"judge: {verdict['status']}")
        r["status"] = "; ".join(wrong) or OK
        if not judged:
            before, after = (any(d in r["gold"] for d in r[role]["cites"]) for role in SYSTEMS)
            verdict = {"verdict": "tie" if before == after else "finetuned" if after else "baseline"}
        r["answer"] = "unknown" if wrong else {"finetuned": "better", "baseline": "worse", "tie": "same"}[verdict["verdict"]]


def print_plan(server, records, corpus, args) -> None:
    """What a run would cost: calls that are not in the store, and about how many tokens."""
    calls = answer_calls(records, args) if args.llm != EXTRACTIVE else []
    # an answer that is not known yet is taken for one of full length, and for two that differ
    known = [server.store.replies.get(c.key, Reply("word" * (args.max_tokens - i % 2))) for i, c in enumerate(calls)]
    add_answers(records, known if calls else extract(records, corpus))
    judging = [c for r in records if args.judge and judge.differs(r) for c in judge.calls_of(r, args)]
    rows, total = [], [0, 0, 0, 0]
    for label, many in (("answers", calls), ("judge, at most", judging)):
        open_calls = server.unfinished(many)
        row = [len(open_calls), len({c.key for c in many}) - len(open_calls),
               sum(about_tokens(m["content"]) for c in open_calls for m in c.messages), sum(c.params["max_tokens"] for c in open_calls)]
        rows.append((label, *(f"{n:,}" for n in row)))
        total = [a + b for a, b in zip(total, row)]
    print_table(rows + [("all", *(f"{n:,}" for n in total))], ("", "calls to make", "already kept", "prompt tokens, about", "answer tokens, at most"))
    print("\nA token is counted as four UTF-8 bytes." + (
        f" At most about {cost(*total[2:], args):.4f} at the given prices." if args.price_in is not None else "")
          + "\nNothing was called and no report was written.")


# ---------------------------------------------------------------- report

def sign_test(wins, losses) -> float | None:
    """Two-sided exact sign test; None if nothing differs."""
    from scipy.stats import binomtest
    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else None


def summarise(records, args, depth) -> dict:
    """Counts over all queries; see the keys. "attribution" is {retrieval: {answer: queries}}."""
    ranks = [tuple(r[role]["rank"] or depth + 1 for role in SYSTEMS) for r in records]
    changes = Counter(r["retrieval"] for r in records)
    within = {k: {role: sum(r[i] <= k for r in ranks) for i, role in enumerate(SYSTEMS)} for k in range(1, depth + 1)}
    out = {"queries": len(ranks), "context_k": args.context_k, "depth": depth,
           "gold_first": within[1], "gold_in_context": within[args.context_k], "gold_in_top": within[depth],
           "ranked_better": sum(b > f for b, f in ranks), "ranked_same": sum(b == f for b, f in ranks),
           "ranked_worse": sum(b < f for b, f in ranks),
           "retrieval": {c: changes[c] for c in CHANGES} | {"p": sign_test(changes["fixed"], changes["broken"])},
           "same_context": sum(r["same_context"] for r in records),
           "context_tokens": {role: sum(r[role]["context_tokens"] for r in records) / len(records) for role in SYSTEMS},
           "gold_within": {role: [within[k][role] for k in within] for role in SYSTEMS}}
    if args.llm:
        table = Counter((r["retrieval"], r["answer"]) for r in records)
        count = Counter(r["answer"] for r in records)
        out |= {"answered": sum(r[role]["reply"].status == OK for r in records for role in SYSTEMS),
                "complete": sum(r["status"] == OK for r in records), "statuses": dict(Counter(r["status"] for r in records).most_common()),
                "cut_short": sum(r[role]["reply"].finish == "length" for r in records for role in SYSTEMS),
                "cites_gold": {role: sum(any(d in r["gold"] for d in r[role]["cites"]) for r in records) for role in SYSTEMS},
                "answers": {o: count[o] for o in OUTCOMES} | {"p": sign_test(count["better"], count["worse"])},
                "attribution": {c: {o: table[c, o] for o in OUTCOMES} for c in CHANGES}}
    return out | ({"judge": judge.summarise(records, args)} if args.judge else {})


def headline(s, args) -> list[tuple[str, str]]:
    """The verdict in words: (title, explanation) for retrieval, then for the answers if there are any."""
    def p_of(test):
        return "" if test["p"] is None else " (exact sign test: p < 0.001)" if test["p"] < 0.001 else f" (exact sign test: p = {test['p']:.3f})"

    def pick(test, more, less, none, chance, up, down):
        return none if test["p"] is None else chance if test["p"] >= 0.05 else up if test[more] > test[less] else down
    n, k, change, gold = s["queries"], s["context_k"], s["retrieval"], s["gold_in_context"]
    text = (f"A gold document is {'at rank 1' if k == 1 else f'among the first {k}'} for {gold['baseline']} of {n} queries with the baseline "
            f"and for {gold['finetuned']} with the fine-tuned model: {change['fixed']} fixed, {change['broken']} broken{p_of(change)}.")
    out = [(pick(change, "fixed", "broken", "Both models find the right document for the same queries", "No clear difference in retrieval",
                 "The fine-tuned model finds the right document more often", "The fine-tuned model finds the right document less often"), text)]
    if args.llm:
        a, table = s["answers"], s["attribution"]
        by = f"judged by {args.judge}" if args.judge else "compared by whether they name a gold document"
        text = (f"Answers ({args.llm}), {by}: better with the fine-tuned model for {a['better']} of {n} queries, worse for {a['worse']}, "
                f"the same for {a['same']}" + (f", not known for {a['unknown']}" if a["unknown"] else "") + f"{p_of(a)}.")
        for where, what in (("fixed", "better"), ("broken", "worse")):
            if change[where]:
                text += f" Of the {change[where]} quer{'y' if change[where] == 1 else 'ies'} whose retrieval was {where}, {table[where][what]} ha{'s' if table[where][what] == 1 else 've'} a {what} answer."
        out.append((pick(a, "better", "worse", "No answer is known to be better or worse", "No clear difference in the answers",
                         "The answers are better", "The answers are worse"), text))
    return out


def report_rows(records, args):
    """The CSV as (header, rows), one row a query; a rank cell is empty where gold is not in the top."""
    header = ["query", "gold_id"] + [f"{role}_{c}" for role in SYSTEMS for c in ("rank", "cosine")]
    header += [f"{role}_snip{n}" for role in SYSTEMS for n in range(1, SNIPPETS + 1)]
    header += ["baseline_answer", "finetuned_answer", "status", "answer_change"] if args.llm else []
    header += ["retrieval_change"] + [f"{role}_context_tokens" for role in SYSTEMS]
    header += [f"{role}_cites" for role in SYSTEMS] if args.llm else []
    graded = [f"{role}_{c}" for c in ("correct", "supported") for role in SYSTEMS] + ["flipped", "agreement", "reason"] if args.judge else []
    rows = []
    for r in records:
        both = [r[role] for role in SYSTEMS]
        row = [r["query"], " ".join(r["gold"])] + [v for b in both for v in (b["rank"] or "", round(b["cosine"], 6))]
        row += [text for b in both for text in b["snippets"]]
        row += [b["reply"].text for b in both] + [r["status"], r["answer"]] if args.llm else []
        row += [r["retrieval"]] + [b["context_tokens"] for b in both] + ([" ".join(b["cites"]) for b in both] if args.llm else [])
        grades = [r.get("judgement", {}).get(c) for c in graded]
        row += ["" if g is None else round(g, 4) if isinstance(g, float) else g for g in grades]
        rows.append([c[:CELL] if isinstance(c, str) else c for c in row])
    return header + graded, rows


def page_data(records, corpus, args) -> dict:
    """What the HTML report draws: every query with both lists as [document id, cosine], every document once."""
    texts, queries = {d["_id"]: d for d in corpus}, []
    ids = list(texts)
    for r in records:
        q = {"query": r["query"], "gold": list(r["gold"]), "retrieval": r["retrieval"]}
        for role in SYSTEMS:
            q[role] = {"rank": r[role]["rank"], "top": [[ids[row], c] for row, c in zip(r[role]["top"][:args.top_k], r[role]["cosines"])],
                       "tokens": r[role]["context_tokens"]}
            if args.llm:
                q[role] |= {"answer": r[role]["reply"].text, "cites": r[role]["cites"]}
        if args.llm:
            q |= {"answer": r["answer"], "status": r["status"], "shared": r["same_context"], "judgement": r.get("judgement")}
        queries.append(q)
    shown = dict.fromkeys(d for q in queries for d in q["gold"] + [d for role in SYSTEMS for d, _ in q[role]["top"]])
    return {"context_k": args.context_k, "queries": queries,
            "documents": {d: [texts[d].get("title") or "", snippet(texts[d]["text"], PAGE_TEXT)] for d in shown}}


def write_page(path, records, corpus, summary, names, args) -> None:
    """The HTML report: one file without outside links, whose own script is the only one that may run."""
    import base64
    import hashlib
    import json
    import jinja2
    style, script = ((TEMPLATES / f"rag_report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    hashes = ["'sha256-" + base64.b64encode(hashlib.sha256(t.encode("utf-8")).digest()).decode() + "'" for t in (style, script)]
    data = json.dumps(page_data(records, corpus, args), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
                             trim_blocks=True, lstrip_blocks=True)
    page = env.get_template("rag_report.html.j2").render(
        style=style, script=script, style_hash=hashes[0], script_hash=hashes[1], data=data, s=summary, names=names, args=args,
        headline=headline(summary, args))
    with replacing(path) as f:
        f.write(page)


def print_result(summary, args) -> None:
    n, k, depth = (summary[x] for x in ("queries", "context_k", "depth"))
    print_table([(f"gold among the first {depth}", *summary["gold_in_top"].values()),
                 (f"gold among the first {k} (read)", *summary["gold_in_context"].values()),
                 ("gold first", *summary["gold_first"].values())], (f"{n} queries", "baseline", "fine-tuned"))
    for title, text in headline(summary, args):
        print(f"\n{title}.\n{text}")
    if args.llm:
        print(f"\nAnswered for both models: {summary['complete']} of {n} queries; same documents for both, so one answer: {summary['same_context']}")
        for status, count in summary["statuses"].items():
            if status != OK:
                print(f"  {count} x {status}")
        calls = summary["calls"]
        if calls["wanted"]:
            print(f"Calls: {calls['made']} made now, {calls['kept']} answered by the store, {calls['shared']} saved by equal contexts ({calls['shared'] / calls['wanted']:.0%})")
            for label, part in (("this run", calls["run"]), ("the whole report", calls["report"])):
                print(f"Tokens of {label}: {part['prompt_tokens']:,} in prompts, {part['completion_tokens']:,} in answers"
                      + (f"; cost {part['cost']:.4f}" if "cost" in part else "") + (f"; {part['uncounted']} replies came without a count" if part["uncounted"] else ""))
        if NOT_CALLED in " ".join(summary["statuses"]):
            print("Not all calls were made. The same command goes on from here.")


def answer_all(server, records, corpus, args) -> dict:
    """Answers, verdicts and their meaning into the records; the totals of the calls that it took."""
    calls = answer_calls(records, args) if args.llm != EXTRACTIVE else []
    add_answers(records, server.run(calls, "answers") if calls else extract(records, corpus))
    if args.judge:
        calls += judge.judge(server, records, args)
    settle(records, args.judge)
    return server.totals(calls, args)


def main(argv=None):
    args = parse_args(argv)
    timer = Timer()
    with timer("read"):
        depth = max(args.top_k, args.context_k, SNIPPETS)
        names, corpus, queries, golds, inputs = read_evaluation(args, depth)
        load_template(args.prompt, ("query", "documents"))
        paid = args.judge or args.llm not in (None, EXTRACTIVE)
        server = Server(Store(args.llm_cache), connect(args.timeout) if paid and not args.dry_run else None, args.workers, args.max_calls)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    print(f"{len(queries)} queries over {len(corpus)} documents; {device}, {precision}; "
          + (f"answers by {args.llm}" if args.llm else "retrieval only, no LLM (--llm extractive needs none; or give a model)"), flush=True)
    found, limit = {}, args.max_seq_length
    for role in reversed(SYSTEMS):  # the fine-tuned model first: its length limit holds for both
        with timer(role):
            model = load_model(names[role], device, precision, args.offline, limit, prompts_given(args.finetuned, names[role]))
            limit = limit or length_limit(model)
            found[role] = retrieve(model, corpus, queries, golds, depth)
    records = make_records(queries, golds, corpus, found, args)
    if args.dry_run:
        return print_plan(server, records, corpus, args)
    with timer("answers"):
        totals = answer_all(server, records, corpus, args) if args.llm else {}
    out, summary = Path(args.out), summarise(records, args, depth) | ({"calls": totals} if totals else {})
    write_csv(out, *report_rows(records, args))
    write_page(out.with_suffix(".html"), records, corpus, summary, names, args)
    write_json(out.with_suffix(".json"), summary | {"models": names, "run": run_record(
        "3_rag_batch_eval.py", args, inputs, timer.seconds, device=device, precision=precision)})
    print_result(summary, args)
    print(f"\nSaved {len(records)} rows to {out}, the same to look at to {out.with_suffix('.html')}\nNext: open {out.with_suffix('.html')} in a browser")


if __name__ == "__main__":
    run_script(main)

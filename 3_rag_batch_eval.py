"""Stage 3: what would the LLM read, and what would it answer, with each model?

For every test query: where both models rank the gold document, its cosine, and the first documents
of both, side by side. With --llm also the answers that a language model gives from each model's
documents. Without it the report is retrieval only.

Reads:  runs/corpus.jsonl, the test split of --data, runs/finetuned/final and its run.json; for --llm
        the environment (or .env): OPENAI_API_KEY, OPENAI_BASE_URL for another OpenAI-compatible
        server; or AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_KEY, OPENAI_API_VERSION
Writes: runs/rag_compare_report.csv (one row a query) and runs/rag_compare_report.json (summary)
Next:   open the CSV

Example:
  python 3_rag_batch_eval.py
  python 3_rag_batch_eval.py --llm gpt-4o-mini --limit 20
"""
from pathlib import Path

from common import (ROOT, RUNS, Timer, UserError, add_run_flags, first_line, number, parser, print_table, run_record,
                    run_script, write_csv, write_json)
from reading import add_data_flags
from retrieval import (add_model_flags, add_search_flags, gold_cosines, load_model, pick_device, pick_precision,
                       read_evaluation, rows_of, search)

SYSTEMS = ("baseline", "finetuned")
SNIPPETS = 3
SNIPPET_LENGTH = 240
INSTRUCTION = ("Answer the question from the documents below, and from nothing else. If they do not hold the answer, say so. "
               "Name the ids of the documents you used in square brackets.")


def parse_args(argv=None):
    p = parser(__doc__)
    add_data_flags(p)
    add_search_flags(p, 10, "how deep the gold document is looked for")
    g = p.add_argument_group("answers")
    g.add_argument("--llm", default=None, metavar="MODEL", help="model (on Azure: deployment) that answers; none by default")
    g.add_argument("--context_k", type=number(least=1), default=3, metavar="K", help="documents that the LLM reads for each answer")
    g.add_argument("--max_tokens", type=number(least=1), default=300, help="longest answer, in tokens")
    g.add_argument("--timeout", type=number(float, above=0), default=60, help="seconds to wait for one answer")
    g.add_argument("--out", default=str(RUNS / "rag_compare_report.csv"), help="the report to write; the summary stands beside it")
    g = add_run_flags(p, "recorded; nothing here is random")
    add_model_flags(g)
    return p.parse_args(argv)


def snippet(text, length=SNIPPET_LENGTH) -> str:
    """The start of a text on one line, cut at a word."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …"


def retrieve(model, corpus, queries, golds, k) -> list[dict]:
    """For each query: rows of the first k documents, rank of the first gold one among them (None past k), its cosine."""
    found, gold_rows = search(model, corpus, queries, k), rows_of(golds, corpus)
    return [{"top": top.tolist(), "rank": next((i for i, r in enumerate(top, 1) if r in gold), None), "cosine": cosine}
            for top, gold, cosine in zip(found["rows"], gold_rows, gold_cosines(found, gold_rows))]


# ---------------------------------------------------------------- answers

def llm_client(timeout):
    """An OpenAI client from the environment: Azure if AZURE_OPENAI_ENDPOINT is set. Retries twice by itself."""
    import os
    import dotenv
    for folder in (Path.cwd(), ROOT):
        dotenv.load_dotenv(folder / ".env")
    needed = ("AZURE_OPENAI_API_KEY", "OPENAI_API_VERSION") if os.environ.get("AZURE_OPENAI_ENDPOINT") else ("OPENAI_API_KEY",)
    for name in needed:
        if not os.environ.get(name):
            raise UserError(f"--llm needs {name} in the environment or in .env (for a local server without keys any word will do)")
    import openai
    try:
        return openai.AzureOpenAI(timeout=timeout) if len(needed) == 2 else openai.OpenAI(timeout=timeout)
    except openai.OpenAIError as e:
        raise UserError(f"--llm: {first_line(e)}")


def messages(query, documents) -> list[dict]:
    context = "\n\n".join(f"[{d['_id']}] {d['text']}" for d in documents)
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": f"Documents:\n\n{context}\n\nQuestion: {query}"}]


def answer(client, args, query, documents) -> tuple[str, str]:
    """The answer and its status, "ok" or what went wrong with this one call.

    Raises UserError for what would go wrong with every call: a wrong key, model or address.
    """
    import openai
    try:
        reply = client.chat.completions.create(model=args.llm, messages=messages(query, documents), temperature=0, max_tokens=args.max_tokens)
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as e:
        raise UserError(f"--llm {args.llm}: the server refused with {e.status_code} (check the key, the model's name and the base URL)")
    except openai.APITimeoutError:
        return "", f"no answer in {args.timeout:g} s"
    except openai.APIConnectionError as e:
        raise UserError(f"--llm {args.llm}: no connection to {client.base_url.host}: {first_line(e)}")
    except openai.APIStatusError as e:
        return "", f"error {e.status_code}"
    except (openai.OpenAIError, ValueError) as e:
        return "", f"error {type(e).__name__}"
    text = (reply.choices[0].message.content or "").strip() if reply.choices else ""
    return text, "ok" if text else "empty answer"


def answer_all(client, args, queries, corpus, found) -> list[dict]:
    """Both answers to each query; one call serves both where both models give the same documents in the same order."""
    from tqdm import tqdm
    out = []
    for i, (_, query) in enumerate(tqdm(queries, desc="answers", unit="query")):
        tops = {role: found[role][i]["top"][:args.context_k] for role in SYSTEMS}
        got = {}
        for role in SYSTEMS:
            same = next((r for r in got if tops[r] == tops[role]), None)
            got[role] = got[same] if same else answer(client, args, query, [corpus[r] for r in tops[role]])
        out.append({f"{role}_answer": got[role][0] for role in SYSTEMS} | {
            "status": "; ".join(dict.fromkeys(f"{role}: {got[role][1]}" for role in SYSTEMS if got[role][1] != "ok")) or "ok"})
    return out


# ---------------------------------------------------------------- report

def report_rows(queries, golds, corpus, found, answers):
    """The report as (header, rows), one row a query; a rank cell is empty where gold is not in the top."""
    header = ["query", "gold_id"] + [f"{role}_{c}" for role in SYSTEMS for c in ("rank", "cosine")]
    header += [f"{role}_snip{n}" for role in SYSTEMS for n in range(1, SNIPPETS + 1)] + list(answers[0] if answers else ())
    rows = []
    for i, ((_, query), gold) in enumerate(zip(queries, golds)):
        row = [query, " ".join(gold)]
        for role in SYSTEMS:
            row += [found[role][i]["rank"] or "", f"{found[role][i]['cosine']:.6f}"]
        for role in SYSTEMS:
            row += [snippet(corpus[r]["text"]) for r in found[role][i]["top"][:SNIPPETS]]
        rows.append(row + (list(answers[i].values()) if answers else []))
    return header, rows


def summarise(found, answers, k) -> dict:
    """Counts over all queries: gold in the top, better and worse placed, same documents, answers by status."""
    ranks = [tuple(found[role][i]["rank"] or k + 1 for role in SYSTEMS) for i in range(len(found["baseline"]))]
    out = {"queries": len(ranks),
           "gold_in_top": {role: sum(r[i] <= k for r in ranks) for i, role in enumerate(SYSTEMS)},
           "gold_first": {role: sum(r[i] == 1 for r in ranks) for i, role in enumerate(SYSTEMS)},
           "ranked_better": sum(b > f for b, f in ranks), "ranked_same": sum(b == f for b, f in ranks),
           "ranked_worse": sum(b < f for b, f in ranks)}
    if answers:
        out["answered"] = sum(a["status"] == "ok" for a in answers)
    return out


def main(argv=None):
    args = parse_args(argv)
    timer = Timer()
    with timer("read"):
        depth = max(args.top_k, args.context_k, SNIPPETS)
        names, corpus, queries, golds, inputs = read_evaluation(args, depth)
        client = llm_client(args.timeout) if args.llm else None
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    print(f"{len(queries)} queries over {len(corpus)} documents; {device}, {precision}; "
          + (f"answers by {args.llm}" if client else "retrieval only, no LLM (give one by --llm)"), flush=True)
    found, limit = {}, args.max_seq_length
    for role in reversed(SYSTEMS):  # the fine-tuned model first: its length limit holds for both
        with timer(role):
            model = load_model(names[role], device, precision, args.offline, limit)
            limit = limit or model.max_seq_length
            found[role] = retrieve(model, corpus, queries, golds, depth)
    with timer("answers"):
        answers = answer_all(client, args, queries, corpus, found) if client else []
    header, rows = report_rows(queries, golds, corpus, found, answers)
    summary = summarise(found, answers, depth)
    write_csv(args.out, header, rows)
    write_json(Path(args.out).with_suffix(".json"), summary | {"models": names, "run": run_record(
        "3_rag_batch_eval.py", args, inputs, timer.seconds, device=device, precision=precision)})

    print_table([(f"gold among the first {depth}", *summary["gold_in_top"].values()), ("gold first", *summary["gold_first"].values())],
                (f"{len(queries)} queries", "baseline", "fine-tuned"))
    print(f"\nGold ranked better by the fine-tuned model for {summary['ranked_better']} queries, the same for "
          f"{summary['ranked_same']}, worse for {summary['ranked_worse']}.")
    if answers:
        print(f"Answered: {summary['answered']} of {len(queries)} queries for both models; the column status says what went wrong with the rest.")
    print(f"\nSaved {len(rows)} rows to {args.out}\nNext: open it in a spreadsheet or with pandas")


if __name__ == "__main__":
    run_script(main)

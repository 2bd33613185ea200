"""What is wrong with training rows, before training; and what training has seen of an evaluation's texts, after it.

Rows are audited for contradictions, repeats, texts of the other splits, likely false negatives, and
texts that do not fit. What harms is left out and counted, the rest is reported.
"""
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from common import UserError, file_sha256, normalise, note, print_table, replacing, write_csv
from reading import DATA, Triplet, read_rows, read_triplets, text_field
from retrieval import encode, length_limit
from systems import count_tokens, words

HEADER = ("row", "problem", "left_out", "query", "text", "cosine_positive", "cosine_negative", "detail")

TRAINED_ON = "trained_on.jsonl"
SHOWN = 300  # characters of a text in the CSV; the row says where the whole one is
NEGATIVE_IS_POSITIVE = "negative is a positive of the same query"
REPEATED_ROW = "same as an earlier row"
NO_TOKENS = "text without a single token"
FALSE_NEGATIVE = "base model scores the negative above the positive"
REPEATED_QUERY = "query of several rows"
REPEATED_POSITIVE = "positive of several rows"
CLIPPED = "text past the model's limit"
HARMFUL = {NEGATIVE_IS_POSITIVE: "negative", REPEATED_ROW: "row", NO_TOKENS: "row"}


class Offence(NamedTuple):
    """One problem of one row; `text` is the text that has it. Cosines are the base model's."""
    where: str
    problem: str
    query: str
    text: str
    positive: float | str = ""
    negative: float | str = ""
    detail: str = ""


def find_offences(rows, others, model) -> tuple[list[Offence], dict]:
    """Every problem of the training rows, and figures about their lengths in tokens of the model.

    `rows`: Triplets. `others`: {"validation": Triplets, "test": Triplets}. Texts are compared
    normalised. Figures: "tokens", of each row a list a text (query, positive, negatives); "room", how
    many are read; "limit", the same with the tokens that the model adds.
    """
    found = []
    positives, of_query, of_positive, first = defaultdict(dict), Counter(), Counter(), {}
    for r in rows:
        positives[normalise(r.query)].setdefault(normalise(r.positive), r.where)
        of_query[normalise(r.query)] += 1
        of_positive[normalise(r.positive)] += 1
    elsewhere = {f"{part} of a {name} row": {normalise(t) for t in texts} for name, split in others.items() for part, texts in (
        ("query", [r.query for r in split]), ("positive", [r.positive for r in split]))}

    texts = list(dict.fromkeys(t for r in rows for t in (r.query, r.positive, *r.negatives)))
    counts, room = count_tokens(model, texts)
    tokens = dict(zip(texts, map(int, counts)))
    documents = list(dict.fromkeys(t for r in rows for t in (r.positive, *r.negatives)))
    queries = list(dict.fromkeys(r.query for r in rows))
    d, q = (dict(zip(ts, encode(model, ts, kind))) for ts, kind in ((documents, "document"), (queries, "query")))

    for r in rows:
        query, positive = normalise(r.query), normalise(r.positive)
        own = round(float(q[r.query] @ d[r.positive]), 4)
        key = query, positive, tuple(sorted(map(normalise, r.negatives)))
        if first.setdefault(key, r.where) != r.where:
            found.append(Offence(r.where, REPEATED_ROW, r.query, r.positive, detail=f"as {first[key]}"))
        elif of_query[query] > 1:
            found.append(Offence(r.where, REPEATED_QUERY, r.query, r.query, detail=f"{of_query[query]} rows"))
        if of_positive[positive] > 1:
            found.append(Offence(r.where, REPEATED_POSITIVE, r.query, r.positive, detail=f"{of_positive[positive]} rows"))
        for n in r.negatives:
            cosine = round(float(q[r.query] @ d[n]), 4)
            if normalise(n) in positives[query]:
                found.append(Offence(r.where, NEGATIVE_IS_POSITIVE, r.query, n, own, cosine, f"positive in {positives[query][normalise(n)]}"))
            elif cosine > own:
                found.append(Offence(r.where, FALSE_NEGATIVE, r.query, n, own, cosine))
        for t in (r.query, r.positive, *r.negatives):
            if tokens[t] == 0:
                found.append(Offence(r.where, NO_TOKENS, r.query, t))
            elif tokens[t] > room:
                found.append(Offence(r.where, CLIPPED, r.query, t, detail=f"{tokens[t]} tokens, {room} are read"))
        for part, seen in elsewhere.items():
            mine = (("query", r.query),) if part.startswith("query") else (("positive", r.positive), *(("negative", n) for n in r.negatives))
            found += [Offence(r.where, f"{kind} is the {part}", r.query, t) for kind, t in mine if normalise(t) in seen]
    lengths = [[tokens[t] for t in (r.query, r.positive, *r.negatives)] for r in rows]
    return found, {"tokens": lengths, "room": room, "limit": length_limit(model) or math.inf}


def harm(problem) -> str:
    """What a problem costs: "row" or "negative" is left out, or "" nothing.

    A query of another split is left out, because evaluation asks it. A document of another split
    is not: in a fixed collection the same document may well answer training and test queries.
    """
    return "row" if problem.startswith("query is the query") else HARMFUL.get(problem, "")


def without_harm(rows, found) -> list:
    """The rows without what harm() leaves out; a row whose every negative goes is left out too."""
    whole = {o.where for o in found if harm(o.problem) == "row"}
    bad = {(o.where, o.text) for o in found if harm(o.problem) == "negative"}
    kept = []
    for r in rows:
        negatives = tuple(n for n in r.negatives if (r.where, n) not in bad)
        if r.where not in whole and (negatives or not r.negatives):
            kept.append(r._replace(negatives=negatives))
    return kept


def report(rows, kept, found, figures, train_length, path) -> dict:
    """Print the audit, write the offenders to `path` as CSV; what the run record keeps of it."""
    left = {r.where for r in rows} - {r.where for r in kept}
    write_csv(path, HEADER, [(o.where, o.problem, harm(o.problem), o.query, o.text[:SHOWN], *o[4:]) for o in found])
    affected = Counter(problem for _, problem in {(o.where, o.problem) for o in found})
    lines = [(problem, n, {"row": "left out", "negative": "negative left out"}.get(harm(problem), "")) for problem, n in affected.items()]
    lines.sort(key=lambda line: (not line[2], -line[1]))
    print_table(lines or [("nothing found", 0, "")], (f"audit of {len(rows)} training rows", "rows", ""))
    clipped = {}
    added = figures["limit"] - figures["room"] if math.isfinite(figures["room"]) else 0  # a static model reads everything
    for name, limit in (("while training", min(train_length - added, figures["room"])), ("when encoding", figures["room"])):
        past = [sum(t > limit for t in row) for row in figures["tokens"]]
        total = sum(map(sum, figures["tokens"]))
        cut = sum(max(0, t - limit) for row in figures["tokens"] for t in row)
        clipped[name] = {"tokens_read": limit if math.isfinite(limit) else None, "rows": sum(map(bool, past)) / len(rows), "tokens": cut / max(1, total)}
        print(f"clipped {name}, past {limit} tokens: {clipped[name]['rows']:.1%} of rows, {clipped[name]['tokens']:.1%} of tokens")
    print(f"{len(left)} of {len(rows)} rows are left out; every offender: {path}", flush=True)
    if not kept:
        raise UserError(f"the audit leaves no training row (see {path})")
    return {"rows": len(rows), "left_out": len(left), "problems": dict(affected), "clipped": clipped}


# ---------------------------------------------------------------- what an evaluation asks and training has seen

def near_copies(texts, known, least=0.8) -> list[int | None]:
    """For each text the index of one in `known` that shares at least `least` of their word pairs; None without one.

    Jaccard similarity of the sets of neighbouring words (the ends count as words), exact: two sets
    that are similar enough share one of their rarest pairs (prefix filter; Chaudhuri, Ganti &
    Kaushik, ICDE 2006), so only those are looked up. Equal words in another case or with other
    punctuation are similarity 1.
    """
    def pairs(text):
        w = ["", *words(text), ""]
        return frozenset(zip(w, w[1:]))

    sets, others = [pairs(t) for t in known], [pairs(t) for t in texts]
    count = Counter(p for s in sets + others for p in s)

    def rarest(s):
        return sorted(s, key=lambda p: (count[p], p))[:len(s) - math.ceil(least * len(s) - 1e-9) + 1]

    index = {}
    for i, s in enumerate(sets):
        for p in rarest(s):
            index.setdefault(p, []).append(i)
    out = []
    for s in others:
        likely = dict.fromkeys(i for p in rarest(s) for i in index.get(p, ()))
        out.append(next((i for i in likely if len(s & sets[i]) >= least * len(s | sets[i]) - 1e-9), None))
    return out


def leakage(queries, golds, corpus, splits) -> dict:
    """Test queries and gold documents that stand in training or validation rows, and distractors that training saw.

    Counts, and "leaked" (a bool a query: it or a gold document of it is equal or near, see
    near_copies()) and "seen" (rows of the corpus whose text is in a training row).
    """
    rows = splits["train"] + splits.get("validation", [])
    gold_ids = {d for gold in golds for d in gold}
    gold_rows = [i for i, d in enumerate(corpus) if d["_id"] in gold_ids]

    def kinds(texts, known):
        equal, near = {normalise(t) for t in known}, near_copies(texts, known)
        return ["equal" if normalise(t) in equal else "near" if n is not None else "" for t, n in zip(texts, near)]

    by_query = kinds([text for _, text in queries], list(dict.fromkeys(r.query for r in rows)))
    by_gold = kinds([corpus[i]["text"] for i in gold_rows], list(dict.fromkeys(t for r in rows for t in (r.positive, *r.negatives))))
    tainted = {corpus[i]["_id"] for i, kind in zip(gold_rows, by_gold) if kind}
    trained = {kind: {normalise(t) for t in texts} for kind, texts in (
        ("negative", [t for r in splits["train"] for t in r.negatives]), ("positive", [r.positive for r in splits["train"]]))}
    seen = {kind: [i for i, d in enumerate(corpus) if normalise(d["text"]) in texts] for kind, texts in trained.items()}
    distractors = {kind: sum(corpus[i]["_id"] not in gold_ids for i in found) for kind, found in seen.items()}
    return {"queries": Counter(k for k in by_query if k), "gold": Counter(k for k in by_gold if k), "distractors": distractors,
            "leaked": [bool(kind) or bool(tainted & set(gold)) for kind, gold in zip(by_query, golds)],
            "seen": sorted({*seen["negative"], *seen["positive"]})}


def training_rows(args, found, record) -> dict | None:
    """The splits to audit: what the fine-tuned model was trained on, mined negatives included, and the validation rows of --data.

    Without the file that stage 1 wrote of it, the training rows of --data stand for it, and a note says if
    `record`, the model's run record, names another file; None, with a note, if there are none either.
    """
    if "splits" not in found and (args.data != str(DATA) or DATA.exists()):
        found["splits"], found["files"] = read_triplets(args)
    splits, files = found.get("splits", {}), found.get("files", ())
    path = Path(args.finetuned).parent / TRAINED_ON
    if path.exists():
        return splits | {"train": [Triplet(*(text_field(row, field, where) for field in ("query", "positive")), tuple(row.get("negative") or ()), where)
                                   for where, row in read_rows(path)]}
    if "train" not in splits:
        return note("no training rows in --data: what training has seen is not looked for")
    if files and record.get("inputs") and file_sha256(files[0]) not in record["inputs"].values():
        note(f"{args.finetuned} was trained on other rows than {files[0]} now holds: what training has seen is looked for in the latter")
    return splits


def write_trained_on(folder, columns) -> None:
    """Write the rows as they were trained on, in the format of the data; `columns`: query, positive, negatives, a list each."""
    with replacing(folder / TRAINED_ON) as f:
        for query, positive, *negatives in zip(*columns.values()):
            f.write(json.dumps({"query": query, "positive": positive, "negative": list(dict.fromkeys(negatives))}, ensure_ascii=False) + "\n")

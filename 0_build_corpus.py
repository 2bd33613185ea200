"""Stage 0: build the corpus that both models will search.

Takes every test positive (gold), then distractors up to --size documents: first documents that no
training row contains, then validation texts, then training texts. Equal texts are one document.
The order is shuffled, so that gold never comes first.

Reads:  the test split of --data; its validation and train splits, its documents file, and --extra
Writes: runs/corpus.jsonl (one document a line: _id, title, text, source, seen_in_training)
        and runs/corpus.run.json (what was run, on which files)
Next:   python 1_train_embedding.py, or 2_eval_retrieval.py if the model is trained

Example:
  python 0_build_corpus.py --size 800
  python 0_build_corpus.py --data my_triplets/ --extra handbook/ --extra faq.csv --text_col body
"""
import json
from pathlib import Path

from common import (CORPUS, Timer, UserError, add_run_flags, normalise, number, parser, print_table, replacing,
                    run_record, run_script, shuffled, text_id, write_json)
from reading import add_data_flags, add_document_flags, all_documents, need_split, read_triplets
from retrieval import DEFAULT_MODEL, find_model

# In this order distractors are taken: the least touched by training first.
SOURCES = ("document", "test negative", "validation", "train")


def parse_args(argv=None):
    p = parser(__doc__)
    g = add_data_flags(p)
    add_document_flags(g)
    g = p.add_argument_group("corpus")
    g.add_argument("--size", type=number(least=1), default=800, help="documents in all, gold included")
    g.add_argument("--out", default=str(CORPUS), help="the file to write")
    add_run_flags(p, "orders the documents and chooses the distractors")
    return p.parse_args(argv)


def candidates(splits, documents):
    """Every (title, text, source) that may enter the corpus: gold first, then by SOURCES."""
    def texts(split, *kinds):
        for row in splits.get(split, []):
            yield from [row.positive] * ("positive" in kinds)
            yield from row.negatives if "negative" in kinds else ()

    out = {"gold": [("", t) for t in texts("test", "positive")],
           "document": [(d.title, d.text) for d in documents],
           "test negative": [("", t) for t in texts("test", "negative")],
           "validation": [("", t) for t in texts("validation", "positive", "negative")],
           "train": [("", t) for t in texts("train", "positive", "negative")]}
    return [(title, text, source) for source, items in out.items() for title, text in items]


def build(items, size, seed) -> tuple[list[dict], dict]:
    """The corpus, and counts for the closing table.

    `items` as from candidates(). Equal texts (normalised) become one document under the first
    source that has it, with a title if any copy has one. A document that a training row contains
    is a training document, wherever else it stands. Raises UserError if --size cannot be met.
    """
    in_training = {normalise(text) for _, text, source in items if source == "train"}
    unique = {}
    for title, text, source in items:
        key = normalise(text)
        if source != "gold" and key in in_training:
            source = "train"
        known = unique.setdefault(key, {"_id": text_id(text), "title": title, "text": text, "source": source,
                                        "seen_in_training": key in in_training})
        known["title"] = known["title"] or title
    pools = {s: [d for d in unique.values() if d["source"] == s] for s in ("gold",) + SOURCES}
    gold = pools.pop("gold")
    if size < len(gold):
        raise UserError(f"--size {size} is below the {len(gold)} gold documents of the test split (give --size {len(gold)} or more)")
    if size > len(unique):
        raise UserError(f"--size {size}, but there are {len(unique)} different documents (add some by --extra, "
                        f"or a documents file in the data folder, or give --size {len(unique)})")
    chosen = list(gold)
    for pool in pools.values():
        chosen += shuffled(pool, seed)[:size - len(chosen)]
    counts = {"documents": len(chosen), "gold": len(gold), "equal_texts_merged": len(items) - len(unique),
              "distractors": {s: sum(d["source"] == s for d in chosen) for s in SOURCES},
              "available": len(unique)}
    return shuffled(chosen, seed), counts


def share_clipped(texts) -> tuple[float, int]:
    """Share of texts longer than the default model's limit, counted in its tokens, and that limit."""
    from tokenizers import Tokenizer  # loads in a tenth of a second; the whole model takes ten
    folder = Path(find_model(DEFAULT_MODEL, offline=True))
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return sum(len(e.ids) > limit for e in tokenizer.encode_batch(texts)) / len(texts), limit


def main(argv=None):
    args = parse_args(argv)
    timer = Timer()
    with timer("read"):
        splits, inputs = read_triplets(args)
        need_split(splits, "test", args)
        documents, more = all_documents(args)
        inputs += more
    with timer("build"):
        corpus, counts = build(candidates(splits, documents), args.size, args.seed)
        clipped, limit = share_clipped([d["text"] for d in corpus])
    with replacing(args.out) as f:
        f.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in corpus)
    result = counts | {"share_clipped": round(clipped, 4), "token_limit": limit}
    write_json(Path(args.out).with_suffix(".run.json"), run_record("0_build_corpus.py", args, inputs, timer.seconds, result=result))

    print_table([("gold (test positives)", counts["gold"]),
                 *((f"distractors: {s}", n) for s, n in counts["distractors"].items()),
                 ("all", counts["documents"]),
                 ("equal texts merged, all sources", counts["equal_texts_merged"]),
                 (f"longer than {limit} tokens", f"{clipped:.1%}")], ("documents", "count"))
    print(f"\nSaved {counts['documents']} documents to {args.out}\nNext: python 1_train_embedding.py")


if __name__ == "__main__":
    run_script(main)

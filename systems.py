"""The systems that an evaluation compares, and their figures.

A system is named by one word on the command line:

  NAME             a model folder or hub id; `baseline` and `finetuned` are those of the run
  NAME@128         the first 128 dimensions of its vectors, made unit length again
  bm25             BM25 over the words of the texts (bm25s, Lucene's formula, no stemming, no stop words)
  rrf, rrf:NAME    the fine-tuned model, or another, and bm25, fused by reciprocal rank
  openai:NAME      an embedding model behind OpenAI, a server that speaks its language, or Azure
"""
import functools
import math
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

from common import UserError
from llm import connect
from retrieval import ServerModel, find_model, length_limit, prompt_of, rows_of, search, top_k, unit_length

METRICS = ("Hit@1", "Hit@3", "Hit@5", "Hit@10", "MRR@10", "nDCG@10", "Recall@10", "MAP@100")
DEPTH = 100  # documents that the metrics look at
RRF_K = 60  # Cormack, Clarke & Büttcher, SIGIR 2009
CJK = "\u3040-\u30ff\u3400-\u9fff"  # scripts written without blanks: each character is a word


class System(NamedTuple):
    """What a word on the command line means. `label` names it in tables and files."""
    label: str
    kind: str
    name: str = ""
    dim: int | None = None


class Ranking(NamedTuple):
    """One system's answer to every query: corpus rows and scores of the first k, (queries, k) each, and
    `all_scores(i)`, the scores of every document for query i, rounded like the others."""
    rows: object
    scores: object
    all_scores: Callable


# ---------------------------------------------------------------- names

def parse_system(spec, names, offline) -> System:
    """The System that `spec` means; `names` are the models of the run, {role: name}. Raises UserError."""
    if spec == "bm25":
        return System(spec, spec)
    if spec == "rrf" or spec.startswith("rrf:"):
        inner = parse_system(spec[4:] or "finetuned", names, offline)
        if inner.kind in ("bm25", "rrf"):
            raise UserError(f"--also {spec}: bm25 can be fused with an embedding model only")
        return inner._replace(label="rrf" if inner.label == "finetuned" else f"rrf-{inner.label}", kind=f"rrf {inner.kind}")
    name, dim = spec, None
    if not Path(spec).is_dir() and (at := re.fullmatch(r"(.+)@(\d+)", spec)):
        name, dim = at[1], int(at[2])
        if dim < 1:
            raise UserError(f"--also {spec}: a vector has at least 1 dimension")
    suffix = f"@{dim}" if dim else ""
    if name.startswith("openai:"):
        if not name[7:]:
            raise UserError(f"--also {spec}: no model is named (openai:text-embedding-3-small, for example)")
        connect(60, f"--also {spec}")  # a missing key is said before anything is computed
        return System(_slug(name) + suffix, "server", name[7:], dim)
    where = _folder(names.get(name, name), offline)
    for role, own in names.items():
        if where == _folder(own, offline):
            return System(role + suffix, "model", own, dim)
    return System(_slug("/".join(Path(name).parts[-2:])) + suffix, "model", name, dim)


def parse_systems(specs, names, offline) -> dict[str, System]:
    """{label: System}: baseline and fine-tuned model first, then those of `specs`, each once."""
    out = {role: System(role, "model", name) for role, name in names.items()}
    for system in (parse_system(spec, names, offline) for spec in specs):
        label, n = system.label, 2
        while out.get(label, system)[1:] != system[1:]:
            label, n = f"{system.label}-{n}", n + 1
        out[label] = system._replace(label=label)
    return out


@functools.lru_cache
def _folder(name, offline) -> Path:
    """Where a model is; remembered, because the packaged one is checked by the hash of its weights."""
    return Path(find_model(name, offline)).resolve()


def _slug(text) -> str:
    return re.sub(r"[^\w.@-]+", "-", text).strip("-")


# ---------------------------------------------------------------- ranking

class Searcher:
    """Ranks one corpus for one set of queries by any system; each model is run once."""

    def __init__(self, names, corpus, queries, k, load):
        """`names`, `corpus` and `queries` as from read_evaluation(), `k` documents a query, and
        `load(name, limit)`, a SentenceTransformer that reads `limit` tokens (None: its own number).

        The fine-tuned model is to be ranked first: its limit then holds for the baseline too, and
        its tokenizer counts `tokens` (an array, one a document); it reads `room` of them.
        """
        import numpy as np
        self.names, self.corpus, self.queries, self.k, self.load = names, corpus, queries, k, load
        self.ids = [d["_id"] for d in corpus]
        # position by descending id: of two equal scores the larger id comes first, as in top_k() and trec_eval
        self.place = np.empty(len(corpus), np.int64)
        self.place[sorted(range(len(corpus)), key=self.ids.__getitem__, reverse=True)] = np.arange(len(corpus))
        self.found, self.remarks, self.limits = {}, {}, {}

    def ranking(self, system) -> Ranking:
        if system.kind == "bm25":
            return self.rank(self._lexical)
        if system.kind.startswith("rrf "):
            return self.rank(self._fused(self._dense(system._replace(kind=system.kind[4:]))))
        return self._dense(system)

    def rank(self, all_scores) -> Ranking:
        """The first k documents of every query by `all_scores(i)`, ties by descending id."""
        import numpy as np
        rows, scores = [], []
        for i in range(len(self.queries)):
            s = all_scores(i)
            top = np.flatnonzero(s >= np.partition(s, -self.k)[-self.k])
            top = top[np.lexsort((self.place[top], -s[top]))][:self.k]
            rows.append(top)
            scores.append(s[top])
        return Ranking(np.array(rows), np.array(scores), all_scores)

    def without(self, ranking, rows) -> Ranking:
        """The ranking of the same system over a corpus that lacks the documents of `rows`."""
        import numpy as np

        def all_scores(i):
            s = np.array(ranking.all_scores(i))
            s[rows] = -np.inf
            return s
        return self.rank(all_scores)

    def place_of_gold(self, ranking, i, gold_rows):
        """Of query i: exact rank of its first gold document, 1 is best; its score; its lead on the best wrong document.

        Past the depth of the ranking the rank is counted: the documents that score above, or equal
        with a larger id. The lead is None if the ranking holds no wrong document.
        """
        top, scores = ranking.rows[i].tolist(), ranking.scores[i]
        at = next((n for n, row in enumerate(top) if row in gold_rows), None)
        wrong = next((s for row, s in zip(top, scores) if row not in gold_rows), None)
        if at is not None:
            rank, score = at + 1, scores[at]
        else:
            s = ranking.all_scores(i)
            best = max(gold_rows, key=lambda row: (s[row], -self.place[row]))
            ahead = (s > s[best]) | (s == s[best]) & (self.place < self.place[best])
            rank, score = max(int(ahead.sum()) + 1, len(top) + 1), s[best]
        return rank, float(score), None if wrong is None else float(score - wrong)

    def _dense(self, system) -> Ranking:
        import numpy as np
        key = (system.kind, system.name)
        if key not in self.found:
            model = ServerModel(system.name) if system.kind == "server" else self._model(system.name)
            self.found[key] = search(model, self.corpus, self.queries, self.k)
            if system.kind == "server":
                self.remarks[system.label] = model.usage()
        found = self.found[key]
        documents, queries, rows, cosines = (found[x] for x in ("documents", "queries", "rows", "cosines"))
        if system.dim:
            if system.dim > documents.shape[1]:
                raise UserError(f"--also {system.label}: its vectors have {documents.shape[1]} dimensions")
            documents, queries = (unit_length(v[:, :system.dim]) for v in (documents, queries))
            rows, cosines = top_k(self.ids, documents, queries, self.k)

        def all_scores(i):
            s = np.round((documents @ queries[i]).astype(np.float64), 6)
            s[rows[i]] = cosines[i]  # FAISS may round the sixth decimal the other way, and what builds on a ranking must not see another one
            return s
        return Ranking(rows, cosines, all_scores)

    def _model(self, name):
        tuned = self.names["finetuned"]
        model = self.load(name, self.limits.get(tuned) if name in self.names.values() else None)
        self.limits[name] = length_limit(model)
        if name == tuned:
            self.tokens, self.room = count_tokens(model, [d["text"] for d in self.corpus])
        return model

    @functools.cached_property
    def _lexical(self) -> Callable:
        """BM25 scores of all documents for query i."""
        import bm25s
        import numpy as np
        index = bm25s.BM25(auto_compile=False)
        index.index([words(d["text"]) or [""] for d in self.corpus], show_progress=False)
        queries = [index.get_tokens_ids(words(text)) for _, text in self.queries]
        # bm25s adds up in float32: past the fourth decimal there is only rounding noise
        return lambda i: np.round(index.get_scores_from_ids(queries[i]).astype(np.float64), 4)

    def _fused(self, dense) -> Callable:
        """Sum of 1 / (60 + rank) over both rankings; a document without any word of the query has no rank in bm25."""
        import numpy as np

        def all_scores(i):
            total, lexical = np.zeros(len(self.corpus)), self._lexical(i)
            for s, matched in ((dense.all_scores(i), True), (lexical, lexical > 0)):
                rank = np.empty(len(s))
                rank[np.lexsort((self.place, -s))] = np.arange(1, len(s) + 1)
                total += np.where(matched, 1 / (RRF_K + rank), 0)
            return np.round(total, 6)
        return all_scores


def count_tokens(model, texts):
    """Tokens of each text by the model's own tokenizer, uncut, and how many of them the model reads (infinite if all)."""
    import numpy as np
    from tokenizers import Tokenizer
    backend = getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)
    if hasattr(backend, "to_str"):
        own = Tokenizer.from_str(backend.to_str())  # a copy: the model's keeps its limit
        own.no_truncation()
        own.no_padding()
        added = own.num_special_tokens_to_add(False)

        def lengths(texts):
            return [len(e.ids) for e in own.encode_batch(texts, add_special_tokens=False)]
    else:  # one that is written in Python
        added = model.tokenizer.num_special_tokens_to_add()

        def lengths(texts):
            return [len(ids) for ids in model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    return np.array(lengths(texts)), (length_limit(model) or np.inf) - added - lengths([prompt_of(model, "document")])[0]


# ---------------------------------------------------------------- figures of a query

def metrics_of(ranked, gold) -> list[float]:
    """METRICS of one query. `ranked`: document ids, best first; `gold`: {document id: grade > 0}.

    Hit@K is 1 if a gold document is among the first K. MRR@10 is 1/rank of the first gold one, 0
    past rank 10. nDCG@10 is as in trec_eval (Järvelin & Kekäläinen 2002): grade / log2(rank + 1),
    over the same sum for the ideal order. Recall@10 is the share of gold found. MAP@100 is the mean
    precision at the ranks of all gold documents, 0 for those past rank 100.
    """
    grades = [gold.get(d, 0) for d in ranked[:DEPTH]]
    places = [i for i, g in enumerate(grades, 1) if g]
    first = places[0] if places else math.inf
    dcg, ideal = (sum(g / math.log2(i + 1) for i, g in enumerate(gs[:10], 1))
                  for gs in (grades, sorted(gold.values(), reverse=True)))
    return [float(first <= k) for k in (1, 3, 5, 10)] + [
        1 / first if first <= 10 else 0.0, dcg / ideal, sum(p <= 10 for p in places) / len(gold),
        sum(n / p for n, p in enumerate(places, 1)) / len(gold)]


def evaluate(label, ranking, searcher, golds) -> dict:
    """One system's run and its figures for each query.

    "ranked" and "scores": ids and scores of the first k; "values": METRICS, (queries, metrics); "rank",
    "score" and "gap" as from place_of_gold(); "context": tokens of the first 1, 2, ... k documents.
    """
    import numpy as np
    ranked = [[searcher.ids[r] for r in top] for top in ranking.rows]
    rank, score, gap = zip(*(searcher.place_of_gold(ranking, i, rows) for i, rows in enumerate(rows_of(golds, searcher.corpus))))
    return {"name": label, "ranked": ranked, "scores": ranking.scores, "values": np.array([metrics_of(*x) for x in zip(ranked, golds)]),
            "rank": rank, "score": score, "gap": gap, "context": np.cumsum(searcher.tokens[ranking.rows], axis=1)}


# ---------------------------------------------------------------- words and slices

def words(text) -> list[str]:
    """Words of a text: runs of letters and digits without case; single characters of Chinese and Japanese."""
    return re.findall(rf"[{CJK}]|[^\W{CJK}]+", unicodedata.normalize("NFKC", text).casefold())


def slices(searcher, golds) -> dict:
    """Parts of the queries by their length, by the length of gold, by the rarity of their words: {name: (queries,) bool}, none empty."""
    import numpy as np
    df = Counter(w for d in searcher.corpus for w in set(words(d["text"])))
    length = np.array([len(words(text)) for _, text in searcher.queries])
    rarest = np.array([min((df[w] for w in words(text)), default=0) for _, text in searcher.queries])
    gold = np.array([min(searcher.tokens[row] for row in rows) for rows in rows_of(golds, searcher.corpus)])
    middle, common = int(np.median(length)), int(np.median(rarest[rarest > 0])) if rarest.any() else 0
    parts = {f"query of up to {middle} words": length <= middle, f"query of more than {middle} words": length > middle,
             f"gold within the limit of {searcher.room} tokens": gold <= searcher.room,
             f"gold clipped at {searcher.room} tokens": gold > searcher.room,
             "a query word that no document has": rarest == 0,
             f"rarest query word in 1 to {common} documents": (rarest > 0) & (rarest <= common),
             f"rarest query word in more than {common}": rarest > common}
    return {name: part for name, part in parts.items() if part.any()}

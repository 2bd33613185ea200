"""Mining: hard negatives for training rows, found with the base model among the documents."""
from common import normalise, shuffled
from retrieval import encode

MARGIN = 0.05  # mined negatives stay this share below their positive's score (Moreira et al., arXiv 2407.15831)


class CachedModel:
    """The model, its vectors from the cache: the library's miner would encode everything again."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode_query(self, texts, **_):
        return encode(self.model, texts, "query")

    def encode_document(self, texts, **_):
        return encode(self.model, texts, "document")


def mining_pool(rows, documents, held_out, most, seed) -> list[str]:
    """Different texts to mine from: those of `rows`, and `most` of the other `documents`; none that validation or test asks for."""
    asked = {normalise(r.positive) for split in held_out.values() for r in split}
    own = {normalise(t): t for r in rows for t in (r.positive, *r.negatives)}
    other = {normalise(d.text): d.text for d in documents}
    return ([t for key, t in own.items() if key not in asked]
            + shuffled((t for key, t in other.items() if key not in own and key not in asked), seed)[:most])


def mine_negatives(rows, texts, model, count) -> tuple[list, dict]:
    """Rows with up to `count` hard negatives from `texts` instead of their own; a row without any keeps its own.

    The library's miner takes the documents that the model ranks highest for the query, none of the
    query's positives, and none that scores above its lowest positive less MARGIN. Texts are compared
    normalised. Returns the rows, and what was found: share of rows, negatives a row, score quantiles.
    """
    import datasets
    import numpy as np
    from sentence_transformers.util import mine_hard_negatives
    one = {}
    for text in [t for r in rows for t in (r.query, r.positive)] + texts:
        one.setdefault(normalise(text), text)
    pairs = datasets.Dataset.from_dict({"query": [one[normalise(r.query)] for r in rows], "positive": [one[normalise(r.positive)] for r in rows]})
    mined = mine_hard_negatives(pairs, CachedModel(model), anchor_column_name="query", positive_column_name="positive",
                                corpus=list(dict.fromkeys(one[normalise(t)] for t in texts)), num_negatives=count, relative_margin=MARGIN,
                                output_format="triplet", output_scores=True, verbose=False)
    negatives = {}
    for query, negative in zip(mined["query"], mined["negative"]):
        negatives.setdefault(query, {})[negative] = None
    out = [r._replace(negatives=tuple(negatives.get(one[normalise(r.query)], r.negatives))) for r in rows]
    scores = np.array([s[1] for s in mined["scores"]] or [0.0])
    got = sum(one[normalise(r.query)] in negatives for r in rows)
    return out, {"documents": len(texts), "rows": got, "share": got / len(rows), "a_row": len(mined) / max(1, got),
                 "score_quantiles": [round(float(q), 4) for q in np.quantile(scores, (0, 0.25, 0.5, 0.75, 1))]}

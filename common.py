"""What the four scripts share: command-line manners, safe writing, the hub probe, the run record.

How input files are read is in reading.py; models, encoding and search are in retrieval.py.

Only the standard library is imported at the top, so that `--help`, a typo and a missing file are
answered at once.
"""
import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RUNS = ROOT / "runs"
CORPUS = RUNS / "corpus.jsonl"
FINETUNED = RUNS / "finetuned"


class UserError(Exception):
    """A problem the user can fix: printed as one line `error: cause (cure)`, exit status 1."""


# ---------------------------------------------------------------- command line

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, if there is one to show, and keeps the line breaks of the docstring's example."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose `--help` is the script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)


def number(kind=int, least=None, above=None, most=None):
    """An argparse type: an int or float within bounds, with an error that says which bound."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {'a whole number' if kind is int else 'a number'}, got {text!r}")
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        for broken, bound in ((least is not None and value < least, f">= {least}"),
                              (above is not None and value <= above, f"> {above}"),
                              (most is not None and value > most, f"<= {most}")):
            if broken:
                raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value
    return convert


def add_run_flags(p, seed_effect):
    """Flags about the run itself; the same in every script."""
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=number(least=0), default=42, help=seed_effect)
    g.add_argument("--offline", action="store_true", help="never try the network for models and datasets")
    return g


def run_script(main) -> None:
    """Run `main()`, turning a UserError into one line on stderr and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted (what earlier runs wrote is unchanged)")
    except BrokenPipeError:  # `| head` closed the pipe: not an error, but nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """A remark the user should see but that stops nothing."""
    print(f"note: {text}", file=sys.stderr)


def print_table(rows, header) -> None:
    """Print rows (lists of str) under a header: first column left, the others right aligned."""
    rows = [list(map(str, r)) for r in [header, *rows]]
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    for i, r in enumerate(rows):
        print("  ".join(c.ljust(w) if j == 0 else c.rjust(w) for j, (c, w) in enumerate(zip(r, widths))).rstrip())
        if i == 0:
            print("  ".join("-" * w for w in widths))


# ---------------------------------------------------------------- text and files

def normalise(text: str) -> str:
    """Unicode NFKC, white space folded to single blanks, case kept: equal results are one document."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def text_id(text: str) -> str:
    """Stable id of a text: the first 16 hex digits of the SHA-256 of its normalised form."""
    return hashlib.sha256(normalise(text).encode("utf-8")).hexdigest()[:16]


def file_sha256(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path, mode="w", **kwargs):
    """Open a temporary file beside `path`; it takes that name only if the block ends without error.

    So what an earlier run wrote stays until the new output is whole.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror} (choose another --out)")
    try:
        if "b" not in mode:
            kwargs = {"encoding": "utf-8", "newline": "\n"} | kwargs
        with os.fdopen(fd, mode, **kwargs) as f:
            yield f
        os.chmod(tmp, 0o666 & ~_umask())  # mkstemp makes files private; outputs are not
        os.replace(tmp, path)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def first_line(e) -> str:
    """The first line of an exception's message, for a one-line error."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def write_json(path, value) -> None:
    with replacing(path) as f:
        json.dump(value, f, ensure_ascii=False, indent=1, allow_nan=False)
        f.write("\n")


def spreadsheet_safe(cell):
    """Defuse a text that a spreadsheet would run as a formula (a leading = + - @ or control character)."""
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\n"):
        return "'" + cell
    return cell


def write_csv(path, header, rows) -> None:
    """A CSV that Excel and pandas open as it is: utf-8-sig, one header line, formulas defused."""
    with replacing(path, encoding="utf-8-sig", newline="") as f:
        w = csv.writer(f)
        w.writerow(header)
        w.writerows([spreadsheet_safe(c) for c in row] for row in rows)


# ---------------------------------------------------------------- the Hugging Face hub

def looks_like_path(name: str) -> bool:
    """True for what can only be meant as a local path, so that a typo is not looked up on the hub.

    `owner/name` is taken for a hub id unless `owner` is a folder here.
    """
    parent = Path(name).parent
    return (name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
            or Path(name).suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
            or parent != Path(".") and (parent.is_dir() or parent.name in ("data", "models", "runs")))


def prepare_hub(offline: bool) -> bool:
    """Before the first import of a Hugging Face library: switch it offline if the hub is not to be
    tried or cannot be reached. Returns whether it can be.

    Left alone, the hub client retries a lost network for more than a minute, even for a model that
    is in its cache; one probe of at most 6 s decides it here.
    """
    import threading
    import urllib.error
    import urllib.request
    reachable = []

    def probe():
        try:
            url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
            reachable.append(True)
        except urllib.error.HTTPError:
            reachable.append(True)  # it answered
        except (OSError, ValueError):
            pass

    if not offline and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        # a thread, because a name look-up has no time-out of its own
        thread = threading.Thread(target=probe, daemon=True)
        thread.start()
        thread.join(6)
    if not reachable:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return bool(reachable)


def why_no_hub(offline: bool) -> str:
    return "the Hugging Face hub was not tried" if offline else "the Hugging Face hub cannot be reached"


# ---------------------------------------------------------------- run record

class Timer:
    """Seconds of each named step: `with timer("encode"): ...`."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def __call__(self, step):
        start = time.perf_counter()
        yield
        self.seconds[step] = round(self.seconds.get(step, 0) + time.perf_counter() - start, 3)


def run_record(script, args, inputs, seconds, **facts) -> dict:
    """What a run was: arguments, versions, git revision, hash of each input file, seconds, results."""
    from importlib.metadata import PackageNotFoundError, version
    versions = {"python": sys.version.split()[0]}
    for name in ("sentence-transformers", "transformers", "torch", "datasets", "faiss-cpu", "numpy", "openai"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"script": script, "arguments": vars(args), "versions": versions, "git": git_revision(),
            "inputs": {str(p): file_sha256(p) for p in inputs}, "seconds": seconds} | facts


def git_revision() -> str | None:
    """The commit of this code, `+changes` appended if the tree differs; None outside a repository."""
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=30)
    try:
        head, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "") if head.returncode == 0 else None


def shuffled(items, seed) -> list:
    """A shuffled copy; the same seed gives the same order on every machine."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items

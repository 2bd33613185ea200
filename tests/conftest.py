"""A tiny random model and a small hand-written data set, built once a session; every test is offline, on a CPU."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent

# (query, positive, negative): small talk about a workshop, every text different
ROWS = [
    ("drill sharpening angle", "Sharpen a twist drill at 118 degrees for soft steel and at 135 for hard alloys.", "A countersink cuts a cone for the head of a screw."),
    ("stop a saw from binding", "Drive a wedge into the kerf behind the saw so the log cannot close on the blade.", "A frame saw has its blade under tension between two arms."),
    ("glue for oily wood", "Teak sheds glue: wipe it with acetone just before you spread the epoxy.", "Hide glue is made warm and lets go again under steam."),
    ("remove rust from pliers", "Leave rusty pliers overnight in citric acid, brush, rinse and oil them.", "Chrome plated pliers rarely rust."),
    ("quiet a workshop fan", "Hang the extractor fan on rubber and its hum leaves the wall.", "A larger fan moves more air at the same speed."),
    ("sand before varnish", "Go over the table with 240 grit along the grain, dust it, then varnish.", "Varnish dries slowly in a damp cellar."),
    ("keep chisel flat", "Flatten the back of a chisel on a coarse stone before you hone the bevel.", "Mortise chisels have thick blades to lever out waste."),
    ("measure round bar", "Read the diameter of a round bar with a vernier caliper at two places.", "A spring caliper transfers a size to a rule."),
    ("thread too tight", "Run the tap through again with cutting oil when a bolt binds in its thread.", "Coarse threads go together faster than fine ones."),
    ("bench height", "Your bench should reach the height of your wrist when you stand straight.", "Beech makes a heavy bench that does not walk."),
    ("plane tears grain", "Close the mouth of the plane and set a fine cut where the grain rises.", "A scrub plane takes off much wood quickly."),
    ("solder will not flow", "Solder balls up on dirty copper: clean it bright and flux it first.", "Lead free solder melts at a higher heat."),
    ("lathe chatter", "Chatter on the lathe goes when the tool overhangs less and turns slower.", "A lathe bed must stand level on the floor."),
    ("dull bandsaw", "A bandsaw that burns pine is dull or runs too slow: change the band.", "Narrow bands turn tight curves."),
    ("hold small parts", "Stick small parts to scrap with double sided tape and rout them.", "A vise holds large parts at the bench."),
    ("paint peels off zinc", "Etch zinc sheet with mordant before you paint it or the coat will peel.", "Zinc protects the steel under it."),
    ("crooked hole", "Start the hole with a centre punch and drill square with a guide block.", "A spade bit leaves rough holes in pine."),
    ("squeaky hinge", "A drop of oil on the pin of the hinge ends the squeak.", "Rising hinges lift a door over a carpet."),
    ("dust in lungs", "Wear a mask rated FFP3 when you sand oak, its dust harms the lungs.", "Oak darkens when ammonia touches it."),
    ("bend plywood", "Kerf the back of plywood every five millimetres and it bends round a post.", "Birch plywood has many thin layers."),
    ("cast plaster", "Pour plaster in a thin stream into water, never water on plaster.", "Plaster of Paris sets in ten minutes."),
    ("mark leather", "Dampen leather and press the pattern in with a bone folder.", "Vegetable tanned leather takes a dye well."),
    ("weld thin sheet", "Weld thin sheet in short stitches so that it does not warp.", "Thick plate wants a bevel before welding."),
    ("stuck jar lid", "Warm the lid of the jar under the tap and it will turn.", "Jars of nails stand on the shelf."),
]
DOCUMENTS = [f"{a} of the {b} is kept in {c}." for a, b, c in zip(
    ["The handle", "A spare belt", "The manual", "One wheel", "The key", "A sample", "The spring", "A drawing"],
    ["grinder", "pillar drill", "compressor", "barrow", "cabinet", "gasket", "clutch", "shed roof"],
    ["a green box", "drawer four", "the office", "the yard", "a tin", "wax paper", "oil", "the loft"])]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder: 12 training, 6 validation and 6 test rows, 8 more documents. Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("data")
    rows = [dict(zip(("query", "positive", "negative"), r)) for r in ROWS]
    for name, part in (("train", rows[:12]), ("validation", rows[12:18]), ("test", rows[18:])):
        write_jsonl(folder / f"{name}.jsonl", part)
    write_jsonl(folder / "documents.jsonl", [{"text": d} for d in DOCUMENTS])
    return folder


def build_tiny_model(folder, seed=0):
    """A one-layer BERT of random weights whose vocabulary is the words of ROWS and DOCUMENTS."""
    import re
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({w for t in [" ".join(r) for r in ROWS] + DOCUMENTS for w in re.findall(r"[a-z]+|[^a-z\s]", t.lower())})
    letters = [chr(c) for c in range(97, 123)] + [f"##{chr(c)}" for c in range(97, 123)]
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words + letters)]), encoding="utf-8")
    torch.manual_seed(seed)
    bert = BertModel(BertConfig(vocab_size=len(vocab.read_text().split("\n")), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=64, max_position_embeddings=64))
    bert.save_pretrained(folder / "bert")
    BertTokenizerFast(vocab=str(vocab), model_max_length=64).save_pretrained(folder / "bert")
    body = Transformer(str(folder / "bert"), max_seq_length=64)
    model = SentenceTransformer(modules=[body, Pooling(32, pooling_mode="mean"), Normalize()], device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny model; read it, do not write to it."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """Another tiny model with other weights."""
    return build_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def walk(data, tiny_model, tmp_path_factory):
    """A folder in which stages 0 and 1 have run on `data` with the tiny model: corpus.jsonl, finetuned/."""
    out = tmp_path_factory.mktemp("walk")
    stage(0).main(["--data", str(data), "--size", "30", "--out", str(out / "corpus.jsonl")])
    stage(1).main(["--data", str(data), "--base_model", str(tiny_model), "--epochs", "2", "--bsz", "4", "--lr", "1e-3",
                   "--precision", "fp32", "--out", str(out / "finetuned")])
    return out


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """All tests and fixtures share one cache, never the one under runs/."""
    import retrieval
    retrieval.CACHE = tmp_path_factory.mktemp("cache")


STAGES = ("0_build_corpus", "1_train_embedding", "2_eval_retrieval", "3_rag_batch_eval")


def stage(n):
    """The module of stage n, 0 to 3."""
    return importlib.import_module(STAGES[n])


def run_cli(*words, cwd=None, env=None):
    """Run a script as a shell would; the completed process with text output."""
    return subprocess.run([sys.executable, str(ROOT / words[0]), *map(str, words[1:])], capture_output=True, text=True,
                          encoding="utf-8", cwd=cwd, env={**os.environ, **(env or {})}, timeout=300)

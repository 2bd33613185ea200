"""Stage 3 against a real OpenAI-compatible server: `transformers serve` with a tiny random language model."""
import csv
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from conftest import DOCUMENTS, ROWS, stage

CLI = shutil.which("transformers", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(CLI is None or importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None,
                                reason="`transformers serve` is not installed (pip install -r requirements-dev.txt)")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A two-layer Llama of random weights, its vocabulary the words of the small data set, with a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("llm")
    words = sorted({w for t in [" ".join(r) for r in ROWS] + DOCUMENTS for w in re.findall(r"\w+|[^\w\s]", t)})
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", "<pad>", "<s>", "</s>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    # untied, or random weights would repeat the last token of the prompt for ever
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=2, eos_token_id=3, pad_token_id=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(language_model, tmp_path_factory):
    """Base URL of a server on a free loopback port, ended with the test module."""
    home = tmp_path_factory.mktemp("hf")
    (home / "hub").mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(home / "log", "w") as log:
        process = subprocess.Popen([CLI, "serve", str(language_model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"], stdout=log,
                                   stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (home / "log").read_text()
                time.sleep(0.5)
        else:
            pytest.fail((home / "log").read_text())
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_real_server_answers_every_query_once(server, language_model, walk, data, tmp_path, monkeypatch, capsys):
    import llm
    for name in [n for n in os.environ if n.startswith(("OPENAI_", "AZURE_OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(llm, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none-needed")
    monkeypatch.setenv("OPENAI_BASE_URL", server)
    flags = ["--data", str(data), "--corpus", str(walk / "corpus.jsonl"), "--finetuned", str(walk / "finetuned" / "final"), "--limit", "3",
             "--llm", str(language_model), "--max_tokens", "12", "--workers", "2", "--llm_cache", str(tmp_path / "calls"), "--out", str(tmp_path / "r.csv")]
    stage(3).main(flags)
    with open(tmp_path / "r.csv", encoding="utf-8-sig", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 3 and [r["status"] for r in rows] == ["ok"] * 3
    assert all(r["baseline_answer"] and r["finetuned_answer"] for r in rows)
    calls = json.loads((tmp_path / "r.json").read_text())["calls"]
    assert calls["made"] == calls["wanted"] - calls["shared"] > 0
    assert calls["run"]["uncounted"] == 0 and 0 < calls["run"]["completion_tokens"] <= 12 * calls["made"] < calls["run"]["prompt_tokens"]
    stage(3).main(flags)
    again = json.loads((tmp_path / "r.json").read_text())["calls"]
    assert again["made"] == 0 and again["report"] == calls["report"]

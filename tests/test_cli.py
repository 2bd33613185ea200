"""The command line as a shell sees it: help, typos, exit codes, and no look at the network."""
import re
import socket
import time

import pytest

from conftest import ROOT, STAGES, run_cli, stage, write_jsonl

SCRIPTS = [f"{s}.py" for s in STAGES]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_at_once_and_shows_an_example(script):
    start = time.perf_counter()
    done = run_cli(script, "--help")
    assert done.returncode == 0 and "Example:" in done.stdout and f"python {script}" in done.stdout
    assert all(word in done.stdout for word in ("Reads:", "Writes:", "Next:"))
    assert time.perf_counter() - start < 5  # importing torch alone takes longer on a busy machine


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_are_checked_before_anything_heavy_is_imported(script):
    code = (f"import sys, importlib; m = importlib.import_module({script[:-3]!r})\n"
            "try: m.main(sys.argv[1:])\nexcept BaseException as e: print(type(e).__name__)\n"
            "print([n for n in ('torch', 'transformers', 'sentence_transformers', 'datasets', 'pandas', 'faiss') if n in sys.modules])")
    import subprocess
    import sys
    for flags, error in ((["--dta", "x"], "SystemExit"), (["--data", "/no/such/folder"], "UserError")):
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.split("\n")[:2] == [error, "[]"], done.stderr


@pytest.mark.parametrize("words, says", [
    (["0_build_corpus.py", "--size", "0"], "argument --size: must be >= 1, got 0"),
    (["1_train_embedding.py", "--lr", "nan"], "argument --lr: must be finite"),
    (["1_train_embedding.py", "--epochs", "-1"], "argument --epochs: must be > 0"),
    (["2_eval_retrieval.py", "--top", "5"], "unrecognized arguments: --top 5"),
    (["3_rag_batch_eval.py", "--precision", "fp16"], "invalid choice"),
])
def test_wrong_usage_exits_with_2(words, says):
    done = run_cli(*words)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_what_the_user_can_fix_exits_with_1_and_one_line(tmp_path, data, walk):
    (tmp_path / "empty").mkdir()
    search = ["--data", data, "--corpus", walk / "corpus.jsonl", "--finetuned", walk / "finetuned" / "final"]
    for words, says in (
            (["0_build_corpus.py", "--data", "data/trian"], "data/trian does not exist"),
            (["1_train_embedding.py", "--data", data, "--base_model", "models/nope"], "model folder models/nope does not exist"),
            (["1_train_embedding.py", "--data", data, "--base_model", tmp_path / "empty"], "is not a model folder"),
            (["2_eval_retrieval.py", "--data", data, "--corpus", tmp_path / "none.jsonl", *search[4:]], "make it: python 0_build_corpus.py"),
            (["2_eval_retrieval.py", "--data", data, "--finetuned", tmp_path / "none"], "make it: python 1_train_embedding.py"),
            (["2_eval_retrieval.py", *search, "--top_k", "31"], "31 documents are asked for, but"),
            (["3_rag_batch_eval.py", *search, "--top_k", "31"], "31 documents are asked for, but")):
        done = run_cli(*words, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr


def test_a_script_runs_from_any_folder_and_in_any_locale(tmp_path, data):
    write_jsonl(tmp_path / "extra.jsonl", [{"text": "Łódź, naïve café, 東京, 🔧"}])
    done = run_cli("0_build_corpus.py", "--data", data, "--extra", "extra.jsonl", "--size", "57", "--out", "here/corpus.jsonl",
                   cwd=tmp_path, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr
    assert "東京" in (tmp_path / "here" / "corpus.jsonl").read_text(encoding="utf-8")
    assert done.stdout.strip().endswith("Next: python 1_train_embedding.py")


def test_a_result_can_be_piped_into_head(data, tmp_path):
    import subprocess
    import sys
    done = subprocess.run(f"{sys.executable} {ROOT}/0_build_corpus.py --data {data} --size 20 --out {tmp_path}/c.jsonl | head -1",
                          shell=True, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("documents")


# Fails every attempt to reach a host, and writes down that there was one.
NO_NETWORK = '''
import os, socket
def refuse(*args, **kwargs):
    with open(os.environ["NETWORK_LOG"], "a") as f: f.write(repr(args) + "\\n")
    raise OSError("no network in this test")
for name in ("connect", "connect_ex"): setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse
'''


def test_a_local_model_is_trained_and_compared_without_one_look_at_the_network(tmp_path, data, tiny_model):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    env = {"PYTHONPATH": str(tmp_path), "NETWORK_LOG": str(tmp_path / "log"), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    for words in (["0_build_corpus.py", "--data", data, "--size", "20", "--out", tmp_path / "c.jsonl"],
                  ["1_train_embedding.py", "--data", data, "--base_model", tiny_model, "--epochs", "1", "--bsz", "4", "--out", tmp_path / "ft"],
                  ["2_eval_retrieval.py", "--data", data, "--corpus", tmp_path / "c.jsonl", "--finetuned", tmp_path / "ft" / "final", "--out", tmp_path / "e"]):
        done = run_cli(*words, env=env)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "log").exists(), (tmp_path / "log").read_text()


def test_the_default_model_loads_without_one_look_at_the_network(tmp_path):
    import os
    import subprocess
    import sys
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    code = "import retrieval as r; m = r.load_model(r.DEFAULT_MODEL, 'cpu', 'fp32', False); print(m.encode_query('x').shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={
        **os.environ, "PYTHONPATH": str(tmp_path), "NETWORK_LOG": str(tmp_path / "log"), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")})
    assert done.stdout.strip() == "(384,)", done.stderr
    assert not (tmp_path / "log").exists()


def test_a_hub_name_without_a_network_fails_within_twenty_seconds_in_one_line(tmp_path, data):
    with socket.socket() as hole:  # takes connections and never answers
        hole.bind(("127.0.0.1", 0))
        hole.listen()
        start = time.perf_counter()
        done = run_cli("1_train_embedding.py", "--data", data, "--base_model", "somebody/some-model", "--out", tmp_path / "out", env={
            "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hole.getsockname()[1]}", "HF_HOME": str(tmp_path / "hf")})
    assert time.perf_counter() - start < 20
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: cannot load model somebody/some-model") and "hub cannot be reached" in done.stderr


def test_offline_never_tries_the_hub(tmp_path, data):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    env = {"PYTHONPATH": str(tmp_path), "NETWORK_LOG": str(tmp_path / "log"), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    for words in (["1_train_embedding.py", "--data", data, "--base_model", "somebody/some-model"], ["0_build_corpus.py", "--data", "somebody/some-data"]):
        done = run_cli(*words, "--offline", "--out", tmp_path / "out", env=env)
        assert done.returncode == 1 and "the Hugging Face hub was not tried" in done.stderr, done.stderr
        assert not (tmp_path / "log").exists()


def test_every_command_in_the_readme_is_one_that_the_scripts_accept():
    commands = re.findall(r"^(?:\S+/)?python (\d_\w+\.py)(.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert {c[0] for c in commands} == set(SCRIPTS)
    import shlex
    for script, flags in commands:
        stage(int(script[0])).parse_args(shlex.split(flags, comments=True))


def test_every_command_in_a_docstring_is_one_that_the_script_accepts():
    import shlex
    for n, script in enumerate(SCRIPTS):
        examples = re.findall(rf"^  python {script}(.*)$", stage(n).__doc__, re.M)
        assert examples
        for flags in examples:
            stage(n).parse_args(shlex.split(flags))


def test_every_flag_is_read(monkeypatch):
    """A flag that no line of code reads would be a promise without an effect."""
    source = "".join((ROOT / f).read_text(encoding="utf-8") for f in [*SCRIPTS, *(p.name for p in ROOT.glob("[a-z]*.py"))])
    for n in range(4):
        for flag in vars(stage(n).parse_args([])):
            assert re.search(rf"args\.{flag}\b", source), f"{SCRIPTS[n]} --{flag}"

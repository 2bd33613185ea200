"""Stage 3 from retrieval to report: answers, the judge, attribution, and that nothing is paid for twice."""
import csv
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import types
from pathlib import Path

import pytest
from conftest import ROWS, run_cli, stage, write_jsonl
from scripted_server import FAULTS, ScriptedServer

import judge
import llm
from common import text_id

KEY = "sk-very-secret-42"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch, tmp_path):
    """No key, address or .env from outside; the client's pauses cut short."""
    import openai._base_client
    for name in [n for n in os.environ if n.startswith(("OPENAI_", "AZURE_OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr(llm, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def many(tmp_path_factory, tiny_model, other_model):
    """200 queries over 400 documents and the flags to search them with two models that find different ones."""
    folder, rng = tmp_path_factory.mktemp("many"), random.Random(7)
    words = sorted({w for row in ROWS for w in re.findall(r"[a-z]+", " ".join(row).lower())})
    texts = list(dict.fromkeys(" ".join(rng.sample(words, 14)) + "." for _ in range(400)))
    rows = [{"query": " ".join(t.split()[:5]) + f" {i}", "positive": t} for i, t in enumerate(texts[:200])]
    write_jsonl(folder / "data" / "test.jsonl", rows)
    write_jsonl(folder / "corpus.jsonl", [{"_id": text_id(t), "title": "", "text": t} for t in texts])
    flags = ["--data", folder / "data", "--corpus", folder / "corpus.jsonl", "--baseline", tiny_model, "--finetuned", other_model, "--device", "cpu", "--precision", "fp32"]
    return types.SimpleNamespace(flags=list(map(str, flags)), gold={r["query"]: text_id(r["positive"]) for r in rows})


def asked(body):
    """The query and the document ids of an answer's prompt."""
    text = body["messages"][0]["content"]
    return text.rsplit("Question: ", 1)[1], re.findall(r"^\[([0-9a-f]{16})\]", text, re.M)


def answering(gold):
    """A model that knows its business: it answers from the gold document if it is there."""
    def answer(body):
        query, ids = asked(body)
        return f"Found it [{gold[query]}]" if gold[query] in ids else f"The documents do not say, see [{ids[0]}]."
    return answer


def judging(prefer):
    """A judge: `prefer(answer A, answer B)` says which is better; answers itself pass through `answering`."""
    def answer(body):
        text = body["messages"][0]["content"]
        a, b = (re.search(rf"=== Answer {x}\n(.*?)\n\n", text, re.S).group(1) for x in "AB")
        better = prefer(a, b)
        return json.dumps({"reason": f"{better} it is", "a_correct": 2 if better == "A" else 0, "a_supported": 1, "b_correct": 2 if better == "B" else 0,
                           "b_supported": 2, "better": better})
    return answer


def run(many, tmp_path, monkeypatch, server, *words):
    """Stage 3 against `server`; (CSV rows, summary)."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    out = tmp_path / "rag.csv"
    stage(3).main([*many.flags, "--llm", "m", "--llm_cache", str(tmp_path / "store"), "--out", str(out), "--workers", "8", *map(str, words)])
    return read_report(out)


def read_report(out):
    with open(out, encoding="utf-8-sig", newline="") as f:
        return list(csv.DictReader(f)), json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- answers

def test_the_report_has_its_fixed_columns_and_each_row_its_answers(many, tmp_path, monkeypatch):
    with ScriptedServer(answering(many.gold)) as server:
        rows, summary = run(many, tmp_path, monkeypatch, server, "--limit", 30)
    assert list(rows[0])[:15] == ["query", "gold_id", "baseline_rank", "baseline_cosine", "finetuned_rank", "finetuned_cosine",
                                  *(f"{r}_snip{n}" for r in ("baseline", "finetuned") for n in (1, 2, 3)), "baseline_answer", "finetuned_answer", "status"]
    import pandas
    frame = pandas.read_csv(tmp_path / "rag.csv")
    assert len(frame) == 30 and frame["baseline_cosine"].dtype == float and (frame["status"] == "ok").all()
    for row in rows:
        for role in ("baseline", "finetuned"):
            found = row[f"{role}_rank"] and int(row[f"{role}_rank"]) <= 3
            assert row[f"{role}_answer"].startswith("Found it") == bool(found)
            assert (row["gold_id"] in row[f"{role}_cites"]) == bool(found)
    assert summary["complete"] == 30


def test_the_change_in_the_answers_is_laid_to_retrieval(many, tmp_path, monkeypatch):
    """A model that is right when it has read the gold document gets better where retrieval was fixed, and nowhere else."""
    with ScriptedServer(answering(many.gold)) as server:
        rows, summary = run(many, tmp_path, monkeypatch, server)
    table, change = summary["attribution"], summary["retrieval"]
    assert change["fixed"] > 5 and change["broken"] > 5
    assert table == {"fixed": {"better": change["fixed"], "worse": 0, "same": 0, "unknown": 0},
                     "broken": {"better": 0, "worse": change["broken"], "same": 0, "unknown": 0},
                     "same": {"better": 0, "worse": 0, "same": change["same"], "unknown": 0}}
    ranks = [[int(r[f"{role}_rank"] or 99) for role in ("baseline", "finetuned")] for r in rows]
    assert change["fixed"] == sum(b > 3 >= f for b, f in ranks) and change["broken"] == sum(f > 3 >= b for b, f in ranks)


def test_equal_contexts_are_answered_by_one_call(many, tmp_path, monkeypatch, tiny_model):
    with ScriptedServer(answering(many.gold)) as server:
        many_same = types.SimpleNamespace(flags=[*many.flags, "--finetuned", str(tiny_model)], gold=many.gold)
        rows, summary = run(many_same, tmp_path, monkeypatch, server, "--limit", 20)
    assert len(server.requests) == 20 == summary["same_context"] == summary["calls"]["shared"]
    assert all(r["baseline_answer"] == r["finetuned_answer"] and r["answer_change"] == "same" for r in rows)
    assert summary["retrieval"]["p"] is None


def test_documents_in_a_prompt_are_cut_to_their_budget_and_the_template_can_be_replaced(many, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("Q={{ query }}{% for d in documents %}|{{ d.text }}{% endfor %}", encoding="utf-8")
    with ScriptedServer(lambda body: "so") as server:
        run(many, tmp_path, monkeypatch, server, "--limit", 3, "--prompt", tmp_path / "mine.txt", "--doc_tokens", 16, "--context_k", 2)
    for request in server.requests:
        query, *texts = request["body"]["messages"][0]["content"].split("|")
        assert query.removeprefix("Q=") in many.gold and len(texts) == 2
        assert all(len(t.encode()) <= 64 and t.endswith("…") for t in texts)


def test_a_dry_run_foretells_the_calls_and_makes_none(many, tmp_path, monkeypatch, capsys):
    words = ["--limit", 25, "--judge", "j", "--price_in", 2, "--price_out", 10]
    monkeypatch.setenv("OPENAI_API_KEY", "")
    stage(3).main([*many.flags, "--llm", "m", "--llm_cache", str(tmp_path / "store"), "--out", str(tmp_path / "rag.csv"), "--dry_run", *map(str, words)])
    out = capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == []
    plan = {m[1]: [int(n.replace(",", "")) for n in m[2].split()] for m in re.finditer(r"^(answers|judge, at most|all) +([\d, ]+)$", out, re.M)}
    answer, judge_ = answering(many.gold), judging(lambda a, b: "tie")
    with ScriptedServer(lambda body: answer(body) if body["model"] == "m" else judge_(body)) as server:
        run(many, tmp_path, monkeypatch, server, *words)
    by_model = {m: [r["body"] for r in server.requests if r["body"]["model"] == m] for m in "mj"}
    assert plan["answers"][:2] == [len(by_model["m"]), 0] and plan["judge, at most"][0] >= len(by_model["j"]) > 0
    sizes = sum(-(-len(b["messages"][0]["content"].encode()) // 4) for b in by_model["m"])
    assert plan["answers"][2:] == [sizes, 300 * len(by_model["m"])]
    price = (plan["all"][2] * 2 + plan["all"][3] * 10) / 1e6
    assert f"about {price:.4f} at the given prices" in out


def test_tokens_and_cost_are_the_servers_count_times_the_price(many, tmp_path, monkeypatch, capsys):
    with ScriptedServer(answering(many.gold)) as server:  # 100 tokens in, 10 out, each
        _, summary = run(many, tmp_path, monkeypatch, server, "--limit", 8, "--price_in", 3, "--price_out", 20)
        n = len(server.requests)
        assert summary["calls"]["run"] == {"prompt_tokens": 100 * n, "completion_tokens": 10 * n, "uncounted": 0, "cost": n * (100 * 3 + 10 * 20) / 1e6}
        _, again = run(many, tmp_path, monkeypatch, server, "--limit", 8, "--price_in", 3, "--price_out", 20)
    assert again["calls"]["run"]["cost"] == 0 and again["calls"]["report"] == summary["calls"]["report"] and again["calls"]["kept"] == n


def test_max_calls_leaves_rows_not_called_and_the_same_command_goes_on(many, tmp_path, monkeypatch, capsys):
    with ScriptedServer(answering(many.gold)) as server:
        rows, summary = run(many, tmp_path, monkeypatch, server, "--limit", 10, "--max_calls", 4)
        assert len(server.requests) == 4 and any("not called" in r["status"] for r in rows) and "goes on from here" in capsys.readouterr().out
        assert summary["answers"]["unknown"] == sum(r["status"] != "ok" for r in rows)
        rows, _ = run(many, tmp_path, monkeypatch, server, "--limit", 10)
        assert all(r["status"] == "ok" for r in rows) and max(server.asked.values()) == 1


def test_an_answer_that_a_spreadsheet_would_run_is_defused(many, tmp_path, monkeypatch):
    with ScriptedServer(lambda body: "=HYPERLINK(1)") as server:
        rows, _ = run(many, tmp_path, monkeypatch, server, "--limit", 2)
    assert rows[0]["baseline_answer"] == "'=HYPERLINK(1)"


def test_a_wrong_key_ends_with_one_line_and_the_key_is_nowhere(many, tmp_path):
    with ScriptedServer(lambda body: (401, {"error": {"message": f"Incorrect API key {KEY}", "code": "invalid_api_key"}})) as server:
        got = run_cli("3_rag_batch_eval.py", *many.flags, "--llm", "m", "--limit", 5, "--out", tmp_path / "r.csv", "--llm_cache", tmp_path / "store",
                      cwd=tmp_path, env={"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url})
    assert got.returncode == 1 and "\nerror: --llm m: the server refused with 401" in "\n" + got.stderr.split("call/s]")[-1].lstrip("\r\n")
    assert "Traceback" not in got.stderr and not (tmp_path / "r.csv").exists()
    assert KEY not in got.stdout + got.stderr


def test_the_key_is_in_no_file_of_a_run(many, tmp_path, monkeypatch, capsys):
    with ScriptedServer(answering(many.gold)) as server:
        run(many, tmp_path, monkeypatch, server, "--limit", 4)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 4 and not any(KEY in p.read_text(encoding="utf-8") for p in files)
    assert KEY not in "".join(capsys.readouterr())


@pytest.mark.parametrize("words, message", [(["--judge", "j"], "--judge needs --llm"), (["--dry_run"], "--dry_run needs --llm"), (["--llm", "m", "--price_in", "1"], "go together"),
                                            (["--out", "x.html"], "names the CSV"), (["--workers", "0"], ">= 1")])
def test_flags_that_contradict_each_other_are_wrong_usage(words, message):
    got = run_cli("3_rag_batch_eval.py", *words)
    assert got.returncode == 2 and message in got.stderr


def test_a_query_from_a_log_keeps_all_its_gold_documents(many, tmp_path, monkeypatch):
    ids = list(dict.fromkeys(many.gold.values()))
    query = next(iter(many.gold))
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "7", "text": query}])
    (tmp_path / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n7\t{ids[5]}\t1\n7\t{ids[0]}\t2\n7\t{ids[9]}\t0\n")
    flags = ["--queries", tmp_path / "queries.jsonl", "--qrels", tmp_path / "qrels.tsv", "--top_k", 400]
    _, alone = run(many, tmp_path, monkeypatch, types.SimpleNamespace(url="http://127.0.0.1:9/v1"), *flags, "--llm", "extractive")
    rows, _ = read_report(tmp_path / "rag.csv")
    assert sorted(rows[0]["gold_id"].split()) == sorted([ids[0], ids[5]]) and alone["queries"] == 1
    import retrieval
    for role, name in zip(("baseline", "finetuned"), (many.flags[5], many.flags[7])):
        model = retrieval.load_model(name, "cpu", "fp32", True)
        texts = [json.loads(line) for line in Path(many.flags[3]).read_text(encoding="utf-8").splitlines()]
        scores = dict(zip((t["_id"] for t in texts), model.encode([t["text"] for t in texts], normalize_embeddings=True) @ model.encode(query, normalize_embeddings=True)))
        assert int(rows[0][f"{role}_rank"]) == 1 + sum(s > max(scores[ids[0]], scores[ids[5]]) for s in scores.values())


# ---------------------------------------------------------------- the extractive answer

def tiny_record(query, documents):
    side = {"top": list(range(len(documents))), "documents": [{"id": f"d{i}", "text": d} for i, d in enumerate(documents)]}
    return {"query": query, "baseline": side, "finetuned": side}


def test_the_extractive_answer_is_the_sentences_with_the_querys_words():
    documents = ["Teak is oily. Wipe teak with acetone before glue. Sand it.", "A saw binds. Drive a wedge behind the saw."]
    corpus = [{"_id": f"d{i}", "text": d} for i, d in enumerate(documents)] + [{"_id": "x", "text": "The floor is level."}]
    got = llm.extract([tiny_record("glue for oily teak", documents), tiny_record("wedge behind a saw", documents), tiny_record("Zeppelin", documents)], corpus)
    assert got[0].text == "Teak is oily. [d0] Wipe teak with acetone before glue. [d0]" == got[1].text
    assert "Drive a wedge behind the saw. [d1]" in got[2].text and "teak" not in got[2].text.lower()
    assert got[4].text == "" and got[4].status.startswith(llm.EMPTY)


def test_the_extractive_answer_reads_no_further_than_the_context():
    whole = "One fact here. " * 3 + "The hidden wedge."
    record = tiny_record("hidden wedge", ["One fact here. One fact"])
    assert llm.extract([record], [{"_id": "d0", "text": whole}])[0].text == ""


def test_sentences_are_cut_after_their_marks_and_at_line_ends():
    assert llm.sentences_of("One 3.5 mm bit. Two!\nThree\n\n四です。五？六") == ["One 3.5 mm bit.", "Two!", "Three", "四です。", "五？", "六"]


def test_the_whole_flow_runs_with_no_key_and_no_server(walk, data, tmp_path):
    out = tmp_path / "r.csv"
    got = run_cli("3_rag_batch_eval.py", "--data", data, "--corpus", walk / "corpus.jsonl", "--finetuned", walk / "finetuned" / "final", "--llm", "extractive",
                  "--out", out, "--llm_cache", tmp_path / "store", cwd=tmp_path, env={"OPENAI_API_KEY": ""})
    assert got.returncode == 0, got.stderr
    rows, summary = read_report(out)
    assert {r["status"].replace("baseline: ", "").split(":")[0] for r in rows} <= {"ok", llm.EMPTY} and any(r["baseline_answer"] for r in rows)
    assert summary["calls"]["wanted"] == 0 and out.with_suffix(".html").exists() and not (tmp_path / "store").exists()


# ---------------------------------------------------------------- the judge

def judged(many, tmp_path, monkeypatch, prefer, *words):
    answer, verdict = answering(many.gold), prefer if prefer.__name__ == "raw" else judging(prefer)
    with ScriptedServer(lambda body: answer(body) if body["model"] == "m" else verdict(body)) as server:
        rows, summary = run(many, tmp_path, monkeypatch, server, "--judge", "j", *words)
    return rows, summary, [r["body"] for r in server.requests if r["body"]["model"] == "j"]


def better_answer(a, b):
    return "tie" if ("Found" in a) == ("Found" in b) else "A" if "Found" in a else "B"


def test_a_judge_that_looks_at_the_answers_gives_the_verdict(many, tmp_path, monkeypatch):
    rows, summary, sent = judged(many, tmp_path, monkeypatch, better_answer, "--limit", 60)
    for r in rows:
        found = ["Found" in r["baseline_answer"], "Found" in r["finetuned_answer"]]
        assert r["answer_change"] == {(0, 1): "better", (1, 0): "worse"}.get(tuple(map(int, found)), "same")
        if r["answer_change"] == "better":
            assert (float(r["finetuned_correct"]), float(r["baseline_correct"])) == (2, 0)
    from scipy.stats import binomtest
    a = summary["answers"]
    assert a["p"] == pytest.approx(binomtest(a["better"], a["better"] + a["worse"]).pvalue) and summary["judge"]["flipped"] == 0


def test_the_judge_is_blind_and_sees_both_orders(many, tmp_path, monkeypatch, tiny_model, other_model):
    _, summary, sent = judged(many, tmp_path, monkeypatch, better_answer, "--limit", 20)
    texts = [b["messages"][0]["content"] for b in sent]
    assert not any(w in t.lower() for t in texts for w in ("baseline", "finetuned", "fine-tuned", str(tiny_model), str(other_model)))

    def parts(text):
        return [re.search(rf"=== Answer {x}\n(.*?)\n\n", text, re.S).group(1) for x in "AB"]
    by_query = {}
    for t in texts:
        by_query.setdefault(re.search(r"^Question: (.*)", t, re.M)[1], []).append(parts(t))
    assert all(len(pair) == 2 and pair[0] == pair[1][::-1] for pair in by_query.values())
    assert summary["judge"]["judged"] == len(by_query) > 0


def test_a_judge_that_always_prefers_the_first_gives_ties_only(many, tmp_path, monkeypatch):
    _, summary, _ = judged(many, tmp_path, monkeypatch, lambda a, b: "A", "--limit", 20)
    assert summary["answers"]["better"] == summary["answers"]["worse"] == 0 and summary["judge"]["flipped"] == 1
    assert summary["answers"]["p"] is None


def test_equal_contexts_and_equal_answers_are_not_judged(many, tmp_path, monkeypatch):
    rows, _, sent = judged(many, tmp_path, monkeypatch, better_answer, "--limit", 60)
    same = [r for r in rows if r["baseline_answer"] == r["finetuned_answer"]]
    texts = " ".join(b["messages"][0]["content"] for b in sent)
    assert same and all(r["answer_change"] == "same" and r["query"] + "\n" not in texts for r in same)


def test_an_invalid_verdict_is_asked_for_once_more_then_recorded(many, tmp_path, monkeypatch):
    good = judging(better_answer)

    def raw(body):
        query = re.search(r"^Question: (.*)", body["messages"][0]["content"], re.M)[1]
        if int(query.split()[-1]) % 2 == 0:
            return '{"better": "both"}'
        return "```json\n" + good(body) + "\n``` done" if len(body["messages"]) == 3 else "A is better."
    rows, summary, sent = judged(many, tmp_path, monkeypatch, raw, "--limit", 30)
    bad = [r for r in rows if r["status"] == f"judge: {judge.INVALID}"]
    assert bad and all(r["answer_change"] == "unknown" and int(r["query"].split()[-1]) % 2 == 0 for r in bad)
    assert summary["judge"]["judged"] > 0 and len([b for b in sent if len(b["messages"]) == 3]) == len(sent) / 2
    complaints = {b["messages"][2]["content"].split(": ")[1].split(". ")[0] for b in sent if len(b["messages"]) == 3}
    assert complaints == {"there is no JSON object", 'the field "reason" is missing'}


def test_repeats_show_the_judges_own_noise(many, tmp_path, monkeypatch):
    verdict = {"A": judging(lambda a, b: "A" if a < b else "B"), "tie": judging(lambda a, b: "tie")}
    turn = {}

    def raw(body):  # every third reply to a prompt differs, in both orders alike
        text = body["messages"][0]["content"]
        turn[text] = turn.get(text, 0) + 1
        return verdict["tie" if turn[text] == 3 else "A"](body)
    _, summary, sent = judged(many, tmp_path, monkeypatch, raw, "--limit", 12, "--judge_repeats", 3, "--workers", 1)
    assert len(sent) == 6 * summary["judge"]["judged"]
    assert summary["judge"]["agreement"] == pytest.approx(1 / 3)  # of three repeats, one pair of three agrees
    assert summary["answers"]["better"] + summary["answers"]["worse"] == summary["judge"]["judged"]  # two to one is a majority


@pytest.mark.parametrize("text", ["", "no", "{", '{"a_correct": 2}', '{"reason": "r", "a_correct": 3, "a_supported": 0, "b_correct": 0, "b_supported": 0, "better": "A"}',
                                  '{"reason": "r", "a_correct": true, "a_supported": 0, "b_correct": 0, "b_supported": 0, "better": "A"}',
                                  '{"reason": 5, "a_correct": 1, "a_supported": 0, "b_correct": 0, "b_supported": 0, "better": "A"}',
                                  '{"reason": "r", "a_correct": 1, "a_supported": 0, "b_correct": 0, "b_supported": 0, "better": "a"}', '{"a":' + "[" * 100_000])
def test_what_is_no_verdict_is_refused(text):
    with pytest.raises(ValueError):
        judge.parse(text)


def test_verdicts_combine_by_hand():
    def v(better, **grades):
        return {"reason": "r", "a_correct": 0, "a_supported": 0, "b_correct": 0, "b_supported": 0, "better": better} | grades, "ok"
    # first order: A is the baseline; second: A is the fine-tuned model
    assert judge.combine([v("B", b_correct=2), v("A", a_correct=1)]) | {"reason": 0} == {
        "verdict": "finetuned", "status": "ok", "reason": 0, "flipped": 0, "agreement": None,
        "baseline_correct": 0, "finetuned_correct": 1.5, "baseline_supported": 0, "finetuned_supported": 0}
    assert judge.combine([v("A"), v("A")])["verdict"] == "tie"
    assert judge.combine([v("A"), v("tie")])["flipped"] == 1
    assert judge.combine([v("A"), v("B"), v("B"), v("A"), v("tie"), v("tie")])["verdict"] == "tie"  # no majority
    assert judge.combine([v("A"), (None, "error 500"), v("A"), v("B")])["verdict"] == "baseline"
    assert judge.combine([v("A"), (None, "error 500")]) == {"verdict": None, "status": "error 500"}


def test_the_sign_test_is_exact():
    assert stage(3).sign_test(5, 0) == pytest.approx(2 / 2**5) and stage(3).sign_test(0, 0) is None and stage(3).sign_test(3, 3) == 1


@pytest.mark.parametrize("fixed, broken, words", [(30, 5, "more often"), (5, 30, "less often"), (3, 2, "No clear difference"), (0, 0, "same queries")])
def test_the_headline_says_no_more_than_the_test(fixed, broken, words):
    s = {"queries": 100, "context_k": 3, "gold_in_context": {"baseline": 50, "finetuned": 50 + fixed - broken},
         "retrieval": {"fixed": fixed, "broken": broken, "same": 100 - fixed - broken, "p": stage(3).sign_test(fixed, broken)}}
    assert words in stage(3).headline(s, types.SimpleNamespace(llm=None))[0][0]


# ---------------------------------------------------------------- faults and crashes

def faulty(seed, share=0.3, longest=4):
    """30% of all requests fail, each in one of the ways of FAULTS; no request more than `longest` times in a row."""
    def fault(token, attempt, body):
        rng = random.Random(f"{seed} {token} {attempt}")
        return rng.choice(FAULTS) if rng.random() < share and (attempt - 1) % (longest + 1) < longest else None
    return fault


def test_200_queries_through_a_server_that_fails_30_percent_end_complete_with_no_call_twice(many, tmp_path, monkeypatch):
    answer, refused = answering(many.gold), set(list(many.gold)[::40])

    def reply(body):
        return (400, {"error": {"message": "no", "code": "content_filter"}}) if asked(body)[0] in refused else answer(body)
    monkeypatch.setattr(llm, "ASK_AGAIN", 4)  # the script may give five useless replies in a row
    with ScriptedServer(reply, faulty(1), sleep=0.8) as server:
        rows, summary = run(many, tmp_path, monkeypatch, server, "--timeout", 0.4, "--workers", 16)
        assert set(server.faults) == set(FAULTS)
        assert 0.25 < sum(server.faults.values()) / sum(server.asked.values()) < 0.35
        assert set(server.given.values()) == {1} and server.given.keys() == server.asked.keys()
        for row in rows:
            assert row["status"] == (f"baseline: {llm.FILTERED}; finetuned: {llm.FILTERED}" if row["query"] in refused else "ok")
        before, files = sum(server.asked.values()), [(tmp_path / f"rag.{kind}").read_bytes() for kind in ("csv", "html")]
        run(many, tmp_path, monkeypatch, server)
        assert sum(server.asked.values()) == before
    assert [(tmp_path / f"rag.{kind}").read_bytes() for kind in ("csv", "html")] == files


def run_and_be_killed(flags, cache, url, root):
    """In another process: stage 3, with the embeddings already in `cache`."""
    import retrieval
    retrieval.CACHE = Path(cache)
    os.environ |= {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
    os.chdir(root)
    stage(3).main(flags)


def test_killed_at_ten_random_moments_it_makes_no_call_again_that_had_finished(many, tmp_path, monkeypatch):
    import retrieval
    store, rng, workers = tmp_path / "store" / "calls.jsonl", random.Random(3), 4
    counter = itertools.count()
    flags = [*many.flags, "--llm", "m", "--llm_cache", str(store.parent), "--out", str(tmp_path / "rag.csv"), "--workers", str(workers)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sentence_transformers", "openai", "scipy.stats", "faiss", "jinja2.sandbox"])

    def kept():  # the server puts a number of its own into every answer
        return re.findall(r"<#(\d+) (\w+)>", store.read_text(encoding="utf-8")) if store.exists() else []
    answer = answering(many.gold)
    with ScriptedServer(lambda body: f"{answer(body)} <#{next(counter)} {text_id(body['messages'][0]['content'])}>") as server:
        def start():
            child = context.Process(target=run_and_be_killed, args=(flags, retrieval.CACHE, server.url, tmp_path))
            child.start()
            return child
        for _ in range(10):
            left, dead = rng.randint(1, 30), []
            child = start()

            def strike(child=child, at=sum(server.asked.values()) + left, dead=dead):
                if sum(server.asked.values()) >= at and not dead:
                    dead.append(os.kill(child.pid, signal.SIGKILL))
            server.on_request = strike
            child.join(60)
            assert child.exitcode == -signal.SIGKILL
            finished, asked_then = {prompt for _, prompt in kept()}, len(server.requests)
            server.on_request = lambda: None
            again = [r for r in server.requests[asked_then:] if text_id(r["body"]["messages"][0]["content"]) in finished]
            assert not again
        child = start()
        child.join(120)
        assert child.exitcode == 0
        last = {text_id(r["body"]["messages"][0]["content"]) for r in server.requests[asked_then:]}
        assert not last & finished
    answers = kept()
    assert len(answers) == len({prompt for _, prompt in answers})  # each call is kept once
    assert len(server.requests) - len(answers) <= 10 * workers     # what was under way when the kill came, and no more
    rows, _ = read_report(tmp_path / "rag.csv")
    assert len(rows) == 200 and all(r["status"] == "ok" for r in rows)

"""Calls to a model: what is retried, what stops a run, what is kept, what is sent."""
import json
import os
import random
import signal
import threading
import time
import unicodedata

import pytest
from scripted_server import FAULTS, ScriptedServer, completion

import llm
from common import UserError
from llm import Call, Reply, Server, Store


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No key, address or .env from outside; the client's pauses cut short."""
    import openai._base_client
    for name in [n for n in os.environ if n.startswith(("OPENAI_", "AZURE_OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr(llm, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """serve(answer, fault, ...) -> (the scripted server, llm.Server that speaks to it)."""
    started = []

    def start(answer=lambda body: "yes", fault=lambda *_: None, timeout=5, **limits):
        scripted = ScriptedServer(answer, fault).__enter__()
        started.append(scripted)
        monkeypatch.setenv("OPENAI_BASE_URL", scripted.url)
        return scripted, Server(Store(tmp_path / "store"), llm.connect(timeout), **limits)
    yield start
    for scripted in started:
        scripted.__exit__()


def call(text, **params):
    return Call("m", ({"role": "user", "content": text},), {"temperature": 0, "max_tokens": 20} | params)


# ---------------------------------------------------------------- what is sent

def test_a_server_gets_model_messages_and_parameters(serve):
    scripted, server = serve()
    assert server.run([call("hi")], "t")[0] == Reply("yes", "ok", "stop", 100, 10)
    sent = scripted.requests[0]
    assert sent["path"] == "/v1/chat/completions" and sent["headers"]["authorization"] == "Bearer sk-secret-123"
    assert sent["body"] == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 20}


@pytest.mark.parametrize("version, path, header", [
    ("2024-10-21", "/openai/deployments/m/chat/completions?api-version=2024-10-21", ("api-key", "az-key")),
    (None, "/openai/v1/chat/completions", ("authorization", "Bearer az-key"))])
def test_azure_is_reached_in_its_classic_and_its_v1_way(serve, monkeypatch, tmp_path, version, path, header):
    scripted, _ = serve()
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", scripted.url.removesuffix("/v1") + "/")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "az-key")
    if version:
        monkeypatch.setenv("OPENAI_API_VERSION", version)
    assert Server(Store(tmp_path / "az"), llm.connect(5)).run([call("hi")], "t")[0].text == "yes"
    assert scripted.requests[0]["path"] == path and scripted.requests[0]["headers"][header[0]] == header[1]


def test_a_key_in_dotenv_is_found_and_a_missing_one_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        llm.connect(5)
    (tmp_path / ".env").write_text("OPENAI_API_KEY=sk-from-file\n")
    try:
        assert llm.connect(5).api_key == "sk-from-file"
    finally:
        os.environ.pop("OPENAI_API_KEY", None)  # dotenv put it there


def test_parameters_that_a_newer_model_does_not_take_are_replaced(serve):
    def answer(body):
        for name in ("max_tokens", "temperature"):
            if name in body:
                return 400, {"error": {"message": f"Unsupported parameter: '{name}' is not supported with this model.", "param": name, "code": "unsupported_parameter"}}
        return "fine"
    scripted, server = serve(answer, workers=1)
    assert [r.text for r in server.run([call("a"), call("b")], "t")] == ["fine", "fine"]
    assert "max_completion_tokens" in scripted.requests[-1]["body"] and len(scripted.requests) == 4  # learned once


# ---------------------------------------------------------------- faults

@pytest.mark.parametrize("fault", FAULTS)
def test_each_passing_fault_is_got_over(serve, fault):
    scripted, server = serve(fault=lambda token, attempt, body: fault if attempt == 1 else None, timeout=0.3)
    server.reached = True  # a connection that fails at the very first call says that the address is wrong
    assert server.run([call("q")], "t")[0].text == "yes"
    assert list(scripted.asked.values()) == [2] and list(scripted.given.values()) == [1]


@pytest.mark.parametrize("fault, status", [("500", "error 500"), ("429", "error 429"), ("empty", llm.EMPTY), ("cut json", llm.MALFORMED),
                                           ("timeout", "no answer in 0.2 s"), ("drop", "the connection failed")])
def test_a_fault_that_lasts_is_the_status_of_its_own_call_only(serve, fault, status, monkeypatch):
    monkeypatch.setattr(llm, "RETRIES", 1)
    bad = lambda token, attempt, body: fault if body["messages"][0]["content"] == "bad" else None  # noqa: E731
    _, server = serve(fault=bad, timeout=0.2, workers=1)
    assert [r.status for r in server.run([call("good"), call("bad"), call("other")], "t")] == ["ok", status, "ok"]


def test_retry_after_is_waited_for(serve):
    import time
    times = []

    def answer(body):
        times.append(time.monotonic())
        return "yes"
    scripted, server = serve(answer)
    scripted.RequestHandlerClass.fail, before = (lambda self, fault: self.reply(429, {"error": {"message": "slow"}}, {"Retry-After": "1"})), scripted.RequestHandlerClass.fail
    try:
        scripted.fault = lambda token, attempt, body: times.append(time.monotonic()) or "429" if attempt == 1 else None
        server.run([call("q")], "t")
    finally:
        scripted.RequestHandlerClass.fail = before
    assert times[1] - times[0] >= 0.95


@pytest.mark.parametrize("value", [(200, completion("", "content_filter")), (400, {"error": {"message": "filtered", "code": "content_filter"}})])
def test_a_content_filter_refusal_is_recorded_and_never_asked_again(serve, tmp_path, value):
    scripted, server = serve(lambda body: value)
    assert server.run([call("q")], "t")[0].status == llm.FILTERED
    server.store = Store(tmp_path / "store")
    assert server.run([call("q")], "t")[0].status == llm.FILTERED
    assert len(scripted.requests) == 1


@pytest.mark.parametrize("status, code, words", [(401, "invalid_api_key", "401"), (403, None, "403"), (404, "model_not_found", "404"),
                                                 (400, "model_not_found", "400"), (429, "insufficient_quota", "quota")])
def test_a_wrong_key_or_model_stops_the_run_in_one_line_without_the_key(serve, monkeypatch, status, code, words):
    monkeypatch.setattr(llm, "RETRIES", 0)
    scripted, server = serve(lambda body: (status, {"error": {"message": "no: sk-secret-123", "code": code}}), workers=2)
    with pytest.raises(UserError) as e:
        server.run([call(str(i)) for i in range(50)], "t")
    assert words in str(e.value) and "sk-secret" not in str(e.value) and "\n" not in str(e.value)
    assert len(scripted.requests) < 10


def test_no_server_at_the_address_stops_the_run(serve, monkeypatch, tmp_path):
    scripted, _ = serve()
    scripted.shutdown()
    scripted.server_close()
    monkeypatch.setattr(llm, "RETRIES", 0)
    with pytest.raises(UserError, match="no connection to 127.0.0.1"):
        Server(Store(tmp_path / "s"), llm.connect(2)).run([call("q")], "t")


def test_a_server_that_goes_away_leaves_the_rest_for_another_run(serve, monkeypatch):
    monkeypatch.setattr(llm, "RETRIES", 0)
    gone = lambda token, attempt, body: "drop" if int(body["messages"][0]["content"]) >= 5 else None  # noqa: E731
    scripted, server = serve(fault=gone, workers=1)
    statuses = [r.status for r in server.run([call(str(i)) for i in range(100)], "t")]
    assert statuses[:5] == ["ok"] * 5 and statuses[5:15] == ["the connection failed"] * 10 and set(statuses[15:]) == {llm.NOT_CALLED}
    assert len(scripted.requests) == 15


def test_a_servers_complaint_is_recorded_without_the_key(serve):
    _, server = serve(lambda body: (400, {"error": {"message": "too long\nfor sk-secret-123", "code": "context_length_exceeded"}}))
    status = server.run([call("q")], "t")[0].status
    assert status.startswith("error 400") and "too long for" in status and "sk-secret" not in status


@pytest.mark.parametrize("answer", ["a string", [], {"choices": []}, {"choices": [{"message": None}]}, {"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]},
                                    {"choices": [{"message": {"content": ["a"]}, "finish_reason": 3}]}])
def test_a_reply_of_the_wrong_shape_is_malformed(serve, answer):
    _, server = serve(lambda body: (200, answer))
    assert server.run([call("q")], "t")[0].status == llm.MALFORMED


def test_an_answer_that_is_no_clean_text_can_still_be_written(serve):
    _, server = serve(lambda body: "half \ud83d of a pair\x00")
    server.run([call("q")], "t")[0].text.encode("utf-8")


# ---------------------------------------------------------------- never twice

def test_equal_calls_are_made_once_and_kept_for_the_next_run(serve, tmp_path):
    scripted, server = serve(workers=8)
    calls = [call(str(i % 7)) for i in range(70)]
    first = server.run(calls, "t")
    assert len(scripted.requests) == 7 and server.made == 7
    again = Server(Store(tmp_path / "store"), None)
    assert again.run(calls, "t") == first and again.unfinished(calls) == []


def test_model_messages_parameters_and_repeats_make_a_call_another_one():
    one = call("q")
    others = [one._replace(model="n"), call("r"), call("q", max_tokens=21), one._replace(repeat=1)]
    assert len({c.key for c in [one, *others]}) == 5 and call("q").key == one.key


def test_a_torn_last_line_is_dropped_and_does_not_spoil_the_next(tmp_path, capsys):
    Store(tmp_path).add("a", Reply("one"))
    with open(tmp_path / "calls.jsonl", "ab") as f:
        f.write(b'{"key": "b", "text": "tw')
    store = Store(tmp_path)
    assert "torn" in capsys.readouterr().err and list(store.replies) == ["a"]
    store.add("c", Reply("three"))
    assert {k: r.text for k, r in Store(tmp_path).replies.items()} == {"a": "one", "c": "three"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", [b"[]", b"7", b'{"text": "no key"}', b'{"key": "k", "other": 1}', b"\xff\xfe"])
def test_lines_that_are_not_ours_are_passed_over(tmp_path, line):
    (tmp_path / "calls.jsonl").write_bytes(line + b"\n")
    store = Store(tmp_path)
    store.add("a", Reply("one"))
    assert list(Store(tmp_path).replies) == ["a"]


def test_max_calls_stops_and_the_next_run_goes_on(serve, tmp_path):
    scripted, server = serve(max_calls=3)
    calls = [call(str(i)) for i in range(5)]
    assert [r.status for r in server.run(calls, "t")] == ["ok"] * 3 + [llm.NOT_CALLED] * 2
    assert [r.status for r in server.run(calls, "more")].count("ok") == 3 and len(scripted.requests) == 3
    rest = Server(Store(tmp_path / "store"), server.client, max_calls=3)
    assert [r.status for r in rest.run(calls, "t")] == ["ok"] * 5 and len(scripted.requests) == 5


def test_empty_answers_count_against_max_calls(serve):
    scripted, server = serve(fault=lambda *_: "empty", max_calls=2, workers=1)
    server.run([call("a"), call("b")], "t")
    assert len(scripted.requests) == 2


def test_ctrl_c_keeps_the_calls_under_way(serve, tmp_path, monkeypatch):
    scripted, server = serve(workers=2)
    held = threading.Event()
    scripted.answer = lambda body: held.wait(30) and "late"
    monkeypatch.setattr(llm, "note", lambda text: held.set())  # said when the other calls are cancelled

    def interrupt():
        while len(scripted.requests) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(UserError, match="2 calls of this run are kept .* goes on"):
            server.run([call(str(i)) for i in range(20)], "t")
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(Store(tmp_path / "store").replies) == 2 == len(scripted.requests)


# ---------------------------------------------------------------- prompts

def test_cut_keeps_within_the_budget_and_never_splits_a_character():
    rng = random.Random(0)
    family, accented = "👩‍👩‍👧", unicodedata.normalize("NFD", "é")
    for _ in range(400):
        text = "".join(rng.choice(["word ", "x", "日本", accented, family, "👍🏽", "ß"]) for _ in range(rng.randint(1, 80)))
        short = llm.cut(text, rng.randint(4, 60))
        assert short == text or short.endswith("…")
        kept = short.removesuffix(" …") if short != text else text
        assert text.startswith(kept)
        rest = text[len(kept):].lstrip()
        assert short == text or unicodedata.category(rest[0]) not in ("Mn", "Sk") and "\u200d" not in (rest[0], kept[-1:])
    for tokens in (8, 30, 100):
        assert llm.about_tokens(llm.cut("The quick brown fox. " * 99, tokens)) <= tokens


def test_a_prompt_file_is_filled_without_running_what_documents_hold(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("{% for d in documents %}<{{ d.id }}: {{ d.text }}>{% endfor %} {{ query }}", encoding="utf-8")
    fill = llm.load_template(path, ("query", "documents"))
    assert fill(query="{{ 7 * 7 }}", documents=[{"id": "a", "text": "{% raw %}"}]) == "<a: {% raw %}> {{ 7 * 7 }}"


@pytest.mark.parametrize("source, message", [("{{ query }}", "does not use documents"), ("{{ query }} {{ documents }} {{ gold }}", "unknown gold"),
                                             ("{{ query }}\n{% for %}", ":2:"), (None, "cannot read")])
def test_a_prompt_file_that_cannot_work_is_refused(tmp_path, source, message):
    path = tmp_path / "p.txt"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError, match=message):
        llm.load_template(path, ("query", "documents"))


def test_a_prompt_file_cannot_reach_into_python(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("{{ query.__class__.__mro__ }}{{ documents }}")
    with pytest.raises(UserError):
        llm.load_template(path, ("query", "documents"))(query="q", documents=[])


def test_the_store_holds_no_key(serve, tmp_path):
    _, server = serve()
    server.run([call("q")], "t")
    text = (tmp_path / "store" / "calls.jsonl").read_text()
    assert "sk-secret" not in text and json.loads(text)["text"] == "yes"

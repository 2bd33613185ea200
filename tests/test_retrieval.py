"""Models, the embedding cache and exact search."""
import shutil

import numpy as np
import pytest

import retrieval
from common import UserError
from conftest import DOCUMENTS, ROWS
from retrieval import DEFAULT_MODEL, encode, find_model, fingerprint, load_model, pick_precision, top_k

TEXTS = [r[1] for r in ROWS]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def model(tiny_model):
    return load_model(str(tiny_model), "cpu", "fp32", offline=True)


def count_encoded(model):
    """Let `model` note how many texts it really encodes; the list of counts."""
    counts, real = [], model.encode
    model.encode = lambda inputs, **kwargs: counts.append(len(inputs)) or real(inputs, **kwargs)
    return counts


def test_vectors_from_the_cache_equal_fresh_ones(model, cache):
    fresh = model.encode(TEXTS, normalize_embeddings=True)
    counts = count_encoded(model)
    first, second = encode(model, TEXTS, "document"), encode(model, TEXTS, "document")
    assert counts == [len(TEXTS)]
    assert np.array_equal(first, second) and np.allclose(first, fresh, atol=1e-6)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)


def test_a_grown_corpus_encodes_only_its_new_texts(model, cache):
    counts = count_encoded(model)
    encode(model, TEXTS, "document")
    grown = encode(model, DOCUMENTS + TEXTS + DOCUMENTS, "document")
    assert counts == [len(TEXTS), len(DOCUMENTS)]
    assert np.allclose(grown, model.encode(DOCUMENTS + TEXTS + DOCUMENTS, normalize_embeddings=True), atol=1e-6)


def test_whatever_decides_a_vector_changes_the_cache_key(model, tiny_model, other_model):
    keys = [fingerprint(model, "document")]
    assert fingerprint(load_model(str(tiny_model), "cpu", "fp32", True), "document") == keys[0]
    model.encode(TEXTS[:2])  # leaves truncation and padding set in the tokenizer
    assert fingerprint(model, "document") == keys[0]
    keys.append(fingerprint(load_model(str(other_model), "cpu", "fp32", True), "document"))
    keys.append(fingerprint(load_model(str(tiny_model), "cpu", "bf16", True), "document"))
    keys.append(fingerprint(load_model(str(tiny_model), "cpu", "fp32", True, max_seq_length=12), "document"))
    model.prompts = {"query": "ask: ", "document": ""}
    assert fingerprint(model, "document") == keys[0]
    keys.append(fingerprint(model, "query"))
    import torch
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] += 1e-3
    keys.append(fingerprint(model, "document"))
    assert len(set(keys)) == len(keys)


def test_prompts_reach_the_vectors(model, cache):
    plain = encode(model, TEXTS[:2], "query")
    model.prompts = {"query": "ask the workshop ", "document": ""}
    assert np.allclose(encode(model, TEXTS[:2], "query"), model.encode([f"ask the workshop {t}" for t in TEXTS[:2]]), atol=1e-6)
    assert not np.allclose(encode(model, TEXTS[:2], "query"), plain, atol=1e-3)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-200]),
    lambda path: path.write_bytes(b"something else"),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(bytes(b ^ 1 if i == path.stat().st_size // 2 else b for i, b in enumerate(path.read_bytes()))),
    lambda path: np.savez(path, keys=np.array(["x"], dtype="S32"), vectors=np.zeros((1, 3), np.float32)),
    lambda path: np.savez(path, keys=np.array([{"a": 1}], dtype=object), vectors=np.zeros((1, 32), np.float32)),
], ids=["torn", "foreign", "empty", "flipped bit", "other width", "pickled"])
def test_a_damaged_cache_file_is_noticed_and_made_again(model, cache, damage, capsys):
    before = encode(model, TEXTS, "document")
    (path,) = cache.glob("*/*.npz")
    damage(path)
    assert np.array_equal(encode(model, TEXTS, "document"), before)
    assert "made again" in capsys.readouterr().err
    counts = count_encoded(model)
    encode(model, TEXTS, "document")
    assert counts == []


def test_a_long_run_that_is_stopped_keeps_what_it_has(model, cache):
    texts, real, calls = [f"{w} {n}" for n in range(2100) for w in ("saw", "vise")], model.encode, []

    def stop_at_the_second(inputs, **kwargs):
        calls.append(len(inputs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(inputs, **kwargs)

    model.encode = stop_at_the_second
    with pytest.raises(KeyboardInterrupt):
        encode(model, texts, "document")
    model.encode = real
    counts = count_encoded(model)
    encode(model, texts, "document")
    assert counts == [len(texts) - calls[0]]
    assert not list(cache.glob("*/.*"))


def test_vectors_that_are_not_finite_are_an_error(model, cache):
    import torch
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        encode(model, TEXTS[:2], "document")


def test_top_k_is_the_exact_ranking():
    rng = np.random.default_rng(0)
    documents, queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in
                          (rng.standard_normal((n, 16)).astype(np.float32) for n in (200, 9)))
    rows, cosines = top_k([f"{i:03}" for i in range(200)], documents, queries, 200)
    full = queries.astype(np.float64) @ documents.T.astype(np.float64)
    assert np.allclose(cosines, np.take_along_axis(full, rows, 1), atol=1e-6)
    assert all(sorted(r) == list(range(200)) for r in rows.tolist())
    assert (np.diff(cosines, axis=1) <= 0).all()


def test_equal_cosines_are_ordered_by_descending_id_wherever_they_stand():
    ids = ["b", "d", "a", "c"]
    vectors = np.ones((4, 2), np.float32) / np.sqrt(2, dtype=np.float32)
    for k in (1, 3, 4):
        rows, _ = top_k(ids, vectors, vectors[:1], k)
        assert [ids[r] for r in rows[0]] == ["d", "c", "b", "a"][:k]


def test_cosines_that_differ_by_less_than_arithmetic_noise_are_equal():
    ids, low, high = ["z", "a"], np.float32(0.5), np.float32(0.5) + np.float32(1e-7)
    vectors = np.array([[low, 0.8660254], [high, 0.8660254]], np.float32)
    rows, _ = top_k(ids, vectors, np.array([[1, 0]], np.float32), 2)
    assert [ids[r] for r in rows[0]] == ["z", "a"]


def test_the_default_model_comes_from_its_package_and_is_checked(monkeypatch):
    assert find_model(DEFAULT_MODEL, True).endswith("model")
    monkeypatch.setattr(retrieval, "DEFAULT_MODEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not the published"):
        find_model(DEFAULT_MODEL, True)


def test_what_is_not_a_model_is_said_without_loading(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, says in ((tmp_path / "empty", "no modules.json or config.json"), (tmp_path / "file", "is a file"),
                       (tmp_path / "nope", "does not exist"), ("models/nope", "does not exist")):
        with pytest.raises(UserError, match=says):
            find_model(str(name), False)


def test_a_model_folder_with_broken_weights_is_one_clear_error(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot load model"):
        load_model(str(tmp_path / "m"), "cpu", "fp32", True)


def test_weights_in_a_pickle_are_refused(tiny_model, tmp_path):
    import safetensors.torch
    import torch
    shutil.copytree(tiny_model, tmp_path / "m")
    torch.save(safetensors.torch.load_file(tmp_path / "m" / "model.safetensors"), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load model"):
        load_model(str(tmp_path / "m"), "cpu", "fp32", True)


def test_a_hub_name_while_offline_is_one_clear_error():
    with pytest.raises(UserError, match="nobody/nothing: it is not in the cache and the Hugging Face hub was not tried"):
        load_model("nobody/nothing", "cpu", "fp32", offline=True)


@pytest.mark.parametrize("cpu, chosen", [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")])
def test_bf16_is_chosen_only_where_a_cpu_is_fast_at_it(monkeypatch, cpu, chosen):
    import torch
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert pick_precision("auto", "cpu") == chosen
    assert pick_precision("fp32", "cpu") == "fp32"


def test_bf16_and_fp32_vectors_point_the_same_way(tiny_model, cache):
    a, b = (encode(load_model(str(tiny_model), "cpu", p, True), TEXTS, "document") for p in ("fp32", "bf16"))
    assert np.allclose(np.linalg.norm(b, axis=1), 1, atol=1e-6)
    assert (a * b).sum(axis=1).min() > 0.999 and not np.array_equal(a, b)

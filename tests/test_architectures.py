"""Any encoder can be trained: small random ones of several architectures go through stages 1 and 2."""
import json

import pytest
from conftest import DOCUMENTS, ROWS, run_cli, stage, write_jsonl

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>",
           "cls_token": "<s>", "sep_token": "</s>"}
SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 80}
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {
    "Roberta": {}, "XLMRoberta": {}, "MPNet": {}, "DistilBert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64},
    "ModernBert": {"global_attn_every_n_layers": 1, "cls_token_id": 0, "sep_token_id": 2},
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 16}}


def byte_pair_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.train_from_iterator([" ".join(r) for r in ROWS] + DOCUMENTS, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return t


def build(name, folder):
    """A plain Hugging Face folder (config, weights, tokenizer) of a small random model, or a static embedding model."""
    import torch
    import transformers
    torch.manual_seed(0)
    tokenizer = byte_pair_tokenizer()
    if name == "static":
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu").save_pretrained(str(folder), create_model_card=False)
        return
    config = getattr(transformers, f"{name}Config")(vocab_size=tokenizer.get_vocab_size(), **SIZE | IDS | ARCHITECTURES[name])
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **SPECIAL).save_pretrained(folder)


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Data whose one validation query has one document to find, so that no model can get worse on it."""
    folder = tmp_path_factory.mktemp("easy")
    rows = [dict(zip(("query", "positive", "negative"), r)) for r in ROWS]
    write_jsonl(folder / "train.jsonl", rows[:12])
    write_jsonl(folder / "validation.jsonl", [{k: rows[12][k] for k in ("query", "positive")}])
    write_jsonl(folder / "test.jsonl", rows[18:])
    stage(0).main(["--data", str(folder), "--size", "18", "--out", str(folder / "corpus.jsonl")])
    return folder


@pytest.mark.parametrize("name", [*ARCHITECTURES, "static"])
def test_an_encoder_of_this_architecture_is_trained_saved_and_compared(name, easy, tmp_path):
    from safetensors.torch import load_file
    build(name, tmp_path / "base")
    stage(1).main(["--data", str(easy), "--base_model", str(tmp_path / "base"), "--epochs", "2", "--bsz", "4", "--val_size", "1",
                   "--out", str(tmp_path / "out")])
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["result"]["drift"]["weights"] > 0 and run["result"]["drift"]["cosine"] < 1
    assert load_file(tmp_path / "out" / "final" / "model.safetensors")
    stage(2).main(["--data", str(easy), "--corpus", str(easy / "corpus.jsonl"), "--finetuned", str(tmp_path / "out" / "final"),
                   "--out", str(tmp_path / "eval")])
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["models"]["baseline"] == str(tmp_path / "base") and metrics["queries"] == 6


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_weights_that_the_files_lack_are_the_same_at_every_load(name, easy, tmp_path):
    """A masked language model has no pooler; one drawn anew at each load would look like training, and defeat cache and --resume."""
    import torch
    import transformers
    import retrieval
    from common import UserError
    build("Roberta", tmp_path / "base")
    config = getattr(transformers, f"{name}Config")(vocab_size=600, **SIZE | IDS)
    getattr(transformers, f"{name}ForMaskedLM")(config).save_pretrained(tmp_path / "base")
    drawn = torch.get_rng_state()
    one, two = (retrieval.fingerprint(retrieval.load_model(str(tmp_path / "base"), "cpu", "fp32", True), "document") for _ in range(2))
    assert one == two and torch.equal(torch.get_rng_state(), drawn)
    with pytest.raises(UserError, match="training changed nothing"):
        stage(1).main(["--data", str(easy), "--base_model", str(tmp_path / "base"), "--lr", "1e-30", "--val_size", "1", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("name, most", [("Roberta", 78), ("DistilBert", 80), ("ModernBert", None)])
def test_a_length_past_the_models_positions_is_an_error(name, most, tmp_path):
    import retrieval
    from common import UserError
    build(name, tmp_path / "base")
    model = retrieval.load_model(str(tmp_path / "base"), "cpu", "fp32", True, max_seq_length=most or 500)
    assert model.encode(["saw " * 600]).shape == (1, 32)
    if most:
        with pytest.raises(UserError, match=f"has positions for {most} tokens"):
            retrieval.load_model(str(tmp_path / "base"), "cpu", "fp32", True, max_seq_length=most + 1)


def test_a_tokenizer_written_in_python_is_counted_too(tmp_path):
    import transformers
    import retrieval
    import systems
    letters = "abcdefghijklmnopqrstuvwxyz"
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]), encoding="utf-8")
    transformers.BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="character",
                                       model_max_length=64).save_pretrained(tmp_path)
    transformers.BertModel(transformers.BertConfig(vocab_size=31, **SIZE)).save_pretrained(tmp_path)
    counts, room = systems.count_tokens(retrieval.load_model(str(tmp_path), "cpu", "fp32", True), ["saw", "a drill " * 30])
    assert counts.tolist() == [3, 180] and room == 62


def test_a_model_without_a_limit_reads_everything_until_one_is_given(tmp_path):
    import math
    import transformers
    import retrieval
    import systems
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_pair_tokenizer(), **SPECIAL).save_pretrained(tmp_path)
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=600, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    model = retrieval.load_model(str(tmp_path), "cpu", "fp32", True)
    assert retrieval.length_limit(model) is None and systems.count_tokens(model, ["saw"])[1] == math.inf
    assert retrieval.length_limit(retrieval.load_model(str(tmp_path), "cpu", "fp32", True, max_seq_length=32)) == 32


@pytest.mark.parametrize("flags, error", [(("--loss", "gist"), "--loss mnrl"), (("--loss", "cached"), "--loss mnrl"), (("--lora_rank", "4"), "train it whole")])
def test_what_a_static_model_cannot_do_is_said(flags, error, easy, tmp_path):
    from common import UserError
    build("static", tmp_path / "base")
    with pytest.raises(UserError, match=error):
        stage(1).main(["--data", str(easy), "--base_model", str(tmp_path / "base"), "--val_size", "1", "--out", str(tmp_path / "out"), *flags])

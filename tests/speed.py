"""Measure how fast stage 1 trains: rows a second by its recipe, and what share of the device's peak that is.

Not a test, and not part of the suite. Trained is an encoder of BERT-base's shape, 110M parameters, with
random weights, since speed does not depend on their values; each row has a query, a positive and three
negatives, positives of other rows. Validations and checkpoints are left out. The first steps are timed apart:
on a GPU they are slow, since it prepares for each shape of batch that it meets. Flags not listed below go to stage 1.

Counted are the operations of what is not padding: for each text of n tokens, and L layers of width d with P
weights, 2 n P + 4 n^2 d L forward and twice that backward (Chowdhery et al., arXiv 2204.02311, appendix B).
The peak is that of one large matrix product in the same precision on the same device.

Example:
  python tests/speed.py --data medquad/
  python tests/speed.py --layers 2 --width 128 --first 2 --steps 4 --device cpu
"""
import argparse
import math
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def random_encoder(folder, layers, width) -> str:
    """A sentence-embedding model of this shape in `folder`, with the default model's tokenizer, seeded."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel
    from retrieval import DEFAULT_MODEL, find_model
    tokenizer = AutoTokenizer.from_pretrained(find_model(DEFAULT_MODEL, True), model_max_length=512)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width,
                        num_attention_heads=width // 64)
    for part in (BertModel(config), tokenizer):
        part.save_pretrained(folder / "bert")
    SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(width, pooling_mode="mean"), Normalize()],
                        device="cpu").save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")


def finish(device) -> None:
    import torch
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device, precision) -> float:
    """Operations a second of a large matrix product."""
    import torch
    size, dtype = 8192 if device == "cuda" else 2048, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    rates = []
    for _ in range(8):
        finish(device)
        start = time.perf_counter()
        for _ in range(10 if device == "cuda" else 1):
            a @ b
        finish(device)
        rates.append((10 if device == "cuda" else 1) * 2 * size ** 3 / (time.perf_counter() - start))
    return max(rates)


def operations(model, texts, limit) -> tuple[float, int]:
    """Of training once on each text, clipped at `limit` tokens: operations, and tokens."""
    config = model[0].auto_model.config
    weights = sum(p.numel() for p in model[0].auto_model.encoder.parameters())
    lengths = [min(len(ids), limit) for ids in model.tokenizer(texts)["input_ids"]]
    return 3 * sum(2 * n * weights + 4 * n * n * config.hidden_size * config.num_hidden_layers for n in lengths), sum(lengths)


def timed_training(trainer, first, steps, device) -> tuple[float, float]:
    """Seconds that the first `first` steps take, and the `steps` after them; training stops there."""
    from transformers import EarlyStoppingCallback, TrainerCallback
    moments = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            moments.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (first, first + steps):
                finish(device)
                moments.append(time.perf_counter())
            control.should_training_stop = control.should_training_stop or len(moments) == 3

    trainer.remove_callback(EarlyStoppingCallback)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.add_callback(Clock())
    trainer.train()
    return moments[1] - moments[0], moments[2] - moments[1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--width", type=int, default=768)
    p.add_argument("--first", type=int, default=60, help="steps to time apart")
    p.add_argument("--steps", type=int, default=60, help="steps to time after them")
    own, rest = p.parse_known_args()
    stage = import_module("1_train_embedding")
    args = stage.parse_args(rest)
    import transformers
    import training
    from common import shuffled
    from reading import need_split, read_triplets
    from retrieval import length_limit, pick_device, pick_precision
    rows = need_split(read_triplets(args)[0], "train", args)[:args.limit]
    positives = shuffled([r.positive for r in rows], args.seed)
    rows = [r._replace(negatives=tuple(positives[(i + n) % len(rows)] for n in range(3))) for i, r in enumerate(rows)]
    args.epochs = math.ceil((own.first + own.steps) * args.bsz / len(rows)) + 1
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    with tempfile.TemporaryDirectory() as folder:
        args.base_model = random_encoder(Path(folder), own.layers, own.width)
        transformers.set_seed(args.seed)
        model, columns = training.load_trainee(args, device)[0], training.train_columns(rows, args.seed)
        done = [operations(model, texts, min(args.train_length, length_limit(model))) for texts in columns.values()]
        unused = stage.make_evaluator({"q": rows[0].query}, {"d": rows[0].positive}, {"q": {"d"}})
        trainer = training.make_trainer(model, columns, unused, args, precision, Path(folder) / "checkpoints")
        times = timed_training(trainer, own.first, own.steps, device)
    a_row, tokens = (sum(x) / len(rows) for x in zip(*done))
    top = peak(device, precision)
    print(f"{sum(q.numel() for q in model.parameters()) / 1e6:.0f}M parameters, {device}, {precision}, {args.bsz} rows a step, "
          f"{tokens:.0f} tokens a row; peak {top / 1e12:.2f} TFLOP/s")
    for name, steps, seconds in zip(("first", "then"), (own.first, own.steps), times):
        rate = steps * args.bsz / seconds
        print(f"{name} {steps} steps: {1000 * seconds / steps:.1f} ms a step, {rate:.1f} rows a second, {a_row * rate / 1e12:.2f} TFLOP/s, "
              f"{a_row * rate / top:.1%} of the peak")


if __name__ == "__main__":
    main()

"""Training: hard negatives, rows as batches that leave none out, losses, LoRA, several processes, checkpoints to resume from.

Started by `torchrun`, every process runs the same script: the first one, the lead, reads, measures
and writes; on_lead() hands what it found to the others, and all of them train. `--bsz` is the batch of
all processes together and every document in it is a negative for every query, so that two processes
train the model that one would have trained.
"""
import json
import math
import os
import shutil
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

from common import UserError, normalise, note, shuffled, write_json
from retrieval import encode, length_limit, load_model, pick_device

METRICS = {"Hit@1": "accuracy@1", "Hit@10": "accuracy@10", "MRR@10": "mrr@10", "nDCG@10": "ndcg@10"}
SELECT = "ndcg@10"
ADAPTER = "lora.safetensors"
LEARNING_RATES = {"all weights": 1e-4, "LoRA": 1e-3, "a static model": 0.05}
MARGIN = 0.05    # mined negatives stay this share below their positive's score (Moreira et al., arXiv 2407.15831)
MINI_BATCH = 32  # texts that the cached and the gist loss hold activations of at once
WORKERS = 4      # processes that tokenize ahead of a GPU, by fork: in the training process alone it took longer than the GPU


# ---------------------------------------------------------------- several processes

def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_lead() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined_processes(device):
    """Within it the processes that torchrun started are joined, and only the lead prints; a plain run is left as it is."""
    if processes() == 1:
        yield
        return
    import warnings
    from datetime import timedelta
    import torch.distributed.nn  # imported later, its functions would hold the group for good, as their default
    warnings.filterwarnings("ignore", category=FutureWarning)  # the library gathers by a function that torch has renamed
    device = pick_device(device)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # the others wait while the lead reads, mines and measures, which may take hours
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=2))
    if not is_lead():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    yield  # after an error the group is left: to take it apart could wait for a process that is gone
    # gloo's threads end with the last reference to the group, the trainer's among them; one that still
    # lets go of a tensor while the interpreter ends would abort the process, with all its work done
    torch.distributed.destroy_process_group()


def on_lead(work):
    """The result of `work()`, done by the lead alone; a UserError there ends every process."""
    if processes() == 1:
        return work()
    import torch
    box = [None, False]
    try:
        if is_lead():
            box[0] = work()
    except UserError:
        box[1] = True
        raise
    finally:
        if is_lead() and (box[1] or sys.exc_info()[0] is None):
            torch.distributed.broadcast_object_list(box)
    if not is_lead():
        torch.distributed.broadcast_object_list(box)
        if box[1]:
            raise SystemExit(1)  # the lead says why
    return box[0]


# ---------------------------------------------------------------- hard negatives

class CachedModel:
    """The model, its vectors from the cache: the library's miner would encode everything again."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode_query(self, texts, **_):
        return encode(self.model, texts, "query")

    def encode_document(self, texts, **_):
        return encode(self.model, texts, "document")


def mining_pool(rows, documents, held_out, most, seed) -> list[str]:
    """Different texts to mine from: those of `rows`, and `most` of the other `documents`; none that only validation or test asks for."""
    asked = {normalise(r.positive) for split in held_out.values() for r in split} - {normalise(r.positive) for r in rows}
    own = {normalise(t): t for r in rows for t in (r.positive, *r.negatives)}
    other = {normalise(d.text): d.text for d in documents}
    return ([t for key, t in own.items() if key not in asked]
            + shuffled((t for key, t in other.items() if key not in own and key not in asked), seed)[:most])


def mine_negatives(rows, audited, texts, model, count) -> tuple[list, dict]:
    """Rows with up to `count` hard negatives from `texts` instead of their own; a row without any keeps the first of its own.

    The library's miner takes the documents that the model ranks highest for the query, none of the
    query's positives in any of the `audited` rows (which hold `rows`, and what the audit left out), and none
    that scores above its lowest positive less MARGIN. Texts are compared normalised. Rows that are equal
    after this, as several triplets of one pair are, become one. Returns the rows, and what was found:
    share of rows with mined negatives, how many a row, quantiles of their scores, and how many rows were merged.
    """
    import datasets
    import numpy as np
    from sentence_transformers.util import mine_hard_negatives
    one = {}
    for text in [t for r in rows for t in (r.query, r.positive)] + texts:
        one.setdefault(normalise(text), text)
    known = positives_of(audited)
    pairs = datasets.Dataset.from_dict({"query": [one[normalise(r.query)] for r in rows], "positive": [one[normalise(r.positive)] for r in rows]})
    mined = mine_hard_negatives(
        pairs, CachedModel(model), anchor_column_name="query", positive_column_name="positive",
        corpus=list(dict.fromkeys(one[normalise(t)] for t in texts)), relative_margin=MARGIN, output_format="triplet", output_scores=True,
        num_negatives=count, verbose=False, faiss_batch_size=1024)  # queries that are scored against all texts at once
    found = {}  # {query: {negative: score}}, hardest first
    for query, negative, (_, score) in zip(mined["query"], mined["negative"], mined["scores"]):
        if normalise(negative) not in known[normalise(query)]:
            found.setdefault(normalise(query), {}).setdefault(negative, score)
    out, scores, got = {}, [], 0
    for r in rows:
        new = found.get(normalise(r.query), {})
        row = r._replace(negatives=tuple(new) or r.negatives[:count])
        out.setdefault((normalise(r.query), normalise(r.positive), row.negatives), row)
        scores += new.values()
        got += bool(new)
    return list(out.values()), {
        "documents": len(texts), "rows": got, "share": got / len(rows), "a_row": len(scores) / max(1, got), "merged": len(rows) - len(out),
        "score_quantiles": [round(float(q), 4) for q in np.quantile(scores or [0.0], (0, 0.25, 0.5, 0.75, 1))]}


# ---------------------------------------------------------------- batches

def positives_of(rows) -> dict[str, set[str]]:
    """{query: all positives of it}, normalised."""
    found = defaultdict(set)
    for r in rows:
        found[normalise(r.query)].add(normalise(r.positive))
    return found


def train_columns(rows, seed) -> dict[str, list[str]]:
    """Rows as columns query, positive, negative_1, negative_2 …: as many as the richest row has.

    The loss wants every row to have the same number, so a shorter row repeats its own negatives; a
    row without any borrows positives of other queries, as the batch does.
    """
    if len({normalise(r.positive) for r in rows}) < 2:
        raise UserError(f"{rows[0].where}: training needs at least two rows with different positives, got {len(rows)}")
    most = max(len(r.negatives) for r in rows)
    bare = sum(not r.negatives for r in rows) if most else 0
    if bare:
        note(f"{bare} of {len(rows)} training rows have no negative: each borrows other rows' positives")
    positives, ring = positives_of(rows), shuffled([r.positive for r in rows], seed)
    columns = {"query": [r.query for r in rows], "positive": [r.positive for r in rows]}
    negatives = [r.negatives or tuple(_borrow(ring, i, positives[normalise(r.query)], most)) for i, r in enumerate(rows)] if most else []
    if not all(negatives):
        raise UserError(f"{rows[negatives.index(())].where}: no other query has a positive that could be this row's negative (add rows of other queries)")
    for n in range(most):  # never "negative" beside "negative_2": the library takes the one for a prefix of the other, and embeds each apart
        columns[f"negative_{n + 1}"] = [own[n % len(own)] for own in negatives]
    return columns


def _borrow(ring, start, own, count) -> list[str]:
    """The first `count` different texts of `ring` from `start` on, none of them in `own` (normalised)."""
    found = {}
    for n in range(len(ring)):
        text = ring[(start + n) % len(ring)]
        if normalise(text) not in own:
            found[text] = None
        if len(found) == count:
            break
    return list(found)


def deal_rows(rows, order, size, share=1) -> list[list[int]]:
    """Deal row numbers into batches of at most `size`, evenly, so that no row meets what it must not be pushed from.

    That is its query, and every positive that its query has in any row. Rows of the most common positives
    are dealt first, while every batch is open to them. Its own positive should not stand in another row either;
    but where one is so common that there are not batches enough, rows of it share a batch: the loss counts it
    k times in the sum below, exp(s) / (k exp(s) + rest), which weighs its negatives less, but still pulls query and
    positive together. What fits nowhere goes into later batches. A negative may repeat: that costs nothing,
    and a text that many rows share as their negative would otherwise force a batch for each.

    `rows`: a list a row of query, positive, negatives. Batch lengths are multiples of `share`, the number
    of processes: a batch that is short takes rows of others a second time, or if none fits is left out.
    """
    count = Counter(text for row in rows for text in row[:2])
    positives = defaultdict(set)
    for query, positive, *_ in rows:
        positives[query].add(positive)
    barred = [{row[0], *positives[row[0]]} - {row[1]} for row in rows]

    def fits(i, batch, strict=True):
        _, others, own, texts = batch
        return (others.isdisjoint(rows[i]) and texts.isdisjoint(barred[i])
                and not (strict and (rows[i][1] in texts or not own.keys().isdisjoint(rows[i]))))

    def put(i, batch):
        members, others, own, texts = batch
        members.append(i)
        others.update(barred[i])
        own[rows[i][1]] += 1
        texts.update(rows[i])

    batches, left = [], list(order)
    while left:
        window, left = left[:64 * size], left[64 * size:]  # bounds the search on large data
        window.sort(key=lambda i: -max(count[text] for text in rows[i][:2]))
        opened = [([], set(), Counter(), set()) for _ in range(math.ceil(len(window) / size))]
        for strict in (True, False):
            rest = []
            for i in window:
                fitting = [b for b in opened if len(b[0]) < size and fits(i, b, strict)]
                if fitting:
                    put(i, min(fitting, key=lambda b: (b[2][rows[i][1]], len(b[0]))))
                else:
                    rest.append(i)
            window = rest
        for batch in opened:
            for i in order if len(batch[0]) % share else ():
                if len(batch[0]) % share and i not in batch[0] and fits(i, batch, strict=False):
                    put(i, batch)
        batches += [b[0] for b in opened if b[0] and len(b[0]) % share == 0]
        left = rest + left
    return batches


def make_sampler(epochs):
    """The library's no-duplicates sampler with other batches, dealt by deal_rows().

    The library's own defers rows that repeat a text to ever shorter batches, more of them than
    rows / batch size, and the trainer stops at len(): on data whose texts repeat, it silently left
    out up to a third of the rows. Here len() is the true number of batches.

    With several processes each batch is given out in equal parts, one after the other: accelerate
    hands them to the processes in turn.
    """
    import torch
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    class EveryRowSampler(NoDuplicatesBatchSampler):
        batches = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.rows = [list(row.values()) for row in self.dataset]
            self.total, self.parts = self.batch_size * processes(), processes()
            if self.parts > 1:
                self.batch_size = None  # accelerate's sign for batches of any length
                self.sampler = self     # where it looks for set_epoch()
            passes = []
            for epoch in range(math.ceil(epochs)):
                self.set_epoch(epoch)
                passes.append(sum(1 for _ in self))
            self.set_epoch(0)
            self.batches = max(passes)

        def _iter_one_pass(self, *unused):
            order = torch.randperm(len(self.rows), generator=self.generator).tolist()
            batches = deal_rows(self.rows, order, self.total, self.parts)
            for b in torch.randperm(len(batches), generator=self.generator):
                part = len(batches[b]) // self.parts
                yield from (batches[b][n * part:(n + 1) * part] for n in range(self.parts))

        def __len__(self):
            return self.batches

    return EveryRowSampler


# ---------------------------------------------------------------- the loss, and LoRA

def make_loss(model, args, device):
    """The loss of --loss and --matryoshka. Its temperature is 0.05 (a scale of 20), as in the library's MNRL.

    gist masks every in-batch document that a frozen copy of the base model, the guide, scores above
    the row's own positive (Solatorio, arXiv 2402.16829): likely a positive that nobody marked.
    """
    from sentence_transformers.sentence_transformer import losses
    gather = {"gather_across_devices": processes() > 1}
    if args.loss == "gist":
        guide = load_model(args.base_model, device, "fp32", args.offline, args.max_seq_length, prompts_asked(args))
        # the cached one, because the plain one takes a single negative a row
        loss = losses.CachedGISTEmbedLoss(model, guide.requires_grad_(False), temperature=0.05, mini_batch_size=MINI_BATCH,
                                          contrast_anchors=False, contrast_positives=False, **gather)
    elif args.loss == "cached":
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH, **gather)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, **gather)
    if args.matryoshka:
        loss = losses.MatryoshkaLoss(model, loss, sorted({model.get_embedding_dimension(), *args.matryoshka}, reverse=True))
    return loss


def check_model(args, model) -> None:
    """Raise UserError for what was asked of this model and it cannot do."""
    if is_static(model):
        if args.loss != "mnrl":
            raise UserError(f"--loss {args.loss} is for transformers, and this model is static (use --loss mnrl)")
        if args.lora_rank:
            raise UserError("--lora_rank is for transformers, and this model is static (train it whole)")
    dim = model.get_embedding_dimension()
    if args.matryoshka and max(args.matryoshka) > dim:
        raise UserError(f"--matryoshka {max(args.matryoshka)}: the model's vectors have {dim} dimensions")


def is_static(model) -> bool:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    return isinstance(model[0], StaticEmbedding)


def prompts_asked(args) -> dict:
    """--query_prompt and --document_prompt; None where the model's own holds."""
    return {"query": args.query_prompt, "document": args.document_prompt}


def load_trainee(args, device):
    """The model to train, from --base_model, and the LoRA adapters in it if --lora_rank asks for them, else None.

    Weights are fp32, also where bf16 computes: kept in bf16 they would round small updates away.
    """
    import torch
    model = load_model(args.base_model, device, "fp32", args.offline, args.max_seq_length, prompts_asked(args))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = args.dropout
    if not args.lora_rank:
        return model, None
    from peft import LoraConfig, LoraModel
    torch.manual_seed(args.seed)  # of the adapters' first values
    config = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, lora_dropout=args.dropout, target_modules="all-linear")
    return model, LoraModel(model[0].auto_model, {"default": config}, "default")


def load_trained(checkpoint, args, device):
    """The model of a checkpoint in fp32, LoRA adapters merged into plain weights."""
    if not args.lora_rank:
        return load_model(str(checkpoint), device, "fp32", offline=True)
    from safetensors.torch import load_file
    model, adapters = load_trainee(args, device)
    model.load_state_dict(load_file(checkpoint / ADAPTER), strict=False)
    adapters.merge_and_unload()
    return model.eval()


def learning_rate(args, model) -> float:
    """--lr, else the rate that suits what is trained."""
    kind = "LoRA" if args.lora_rank else "a static model" if is_static(model) else "all weights"
    return args.lr or LEARNING_RATES[kind]


# ---------------------------------------------------------------- the trainer

def trainer_class(lora):
    """The library's trainer without what does not belong here; `lora`: checkpoints hold the adapters alone."""
    from safetensors.torch import load_file, save_file
    from sentence_transformers import SentenceTransformerTrainer

    class QuietTrainer(SentenceTransformerTrainer):
        """Without the automatic model card, which would publish training texts in every checkpoint."""

        def add_model_card_callback(self, default_args_dict):
            pass

        def _save(self, output_dir=None, state_dict=None):
            folder = Path(output_dir or self.args.output_dir)
            if lora:
                folder.mkdir(parents=True, exist_ok=True)
                save_file({n: p.detach().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}, folder / ADAPTER)
            else:
                self.model.save_pretrained(str(folder), create_model_card=False)

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            if lora:
                self.model.load_state_dict(load_file(Path(resume_from_checkpoint) / ADAPTER), strict=False)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint)

        def _load_best_model(self):
            pass  # it is read back from disk by load_trained()

    return QuietTrainer


def callbacks():
    """What is shown while training: a line on stdout for each validation, a bar on stderr."""
    from transformers import ProgressCallback, TrainerCallback

    class Report(TrainerCallback):
        """One line on stdout for each validation."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            if state.is_world_process_zero:
                shown = "  ".join(f"{name} {metrics[f'eval_val_cosine_{key}']:.3f}" for name, key in METRICS.items())
                print(f"  step {state.global_step}/{state.max_steps}  {shown}", flush=True)

    class Bar(ProgressCallback):
        """The progress bar without its dump of every log line."""

        def on_log(self, *args, **kwargs):
            pass

    return Report(), Bar()


def make_trainer(model, columns, evaluator, args, precision, folder):
    """The trainer of these rows, with the validations, the early stop and the settings of `args`."""
    import datasets
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers import EarlyStoppingCallback, PrinterCallback
    sampler, share = make_sampler(args.epochs), args.bsz // processes()
    rows = datasets.Dataset.from_dict(columns)
    steps = len(sampler(rows, batch_size=share, drop_last=False, seed=args.seed, generator=_generator())) // processes()
    every = max(1, math.ceil(steps / args.evals))
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(folder), num_train_epochs=args.epochs, per_device_train_batch_size=share, learning_rate=learning_rate(args, model),
        warmup_steps=0.1, batch_sampler=sampler, seed=args.seed, eval_strategy="steps", save_strategy="steps", eval_steps=every,
        save_steps=every, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model=f"eval_val_cosine_{SELECT}",
        greater_is_better=True, restore_callback_states_from_checkpoint=True, logging_steps=max(1, every // 5), disable_tqdm=True,
        report_to="none", use_cpu=model.device.type == "cpu", bf16=precision == "bf16", dataloader_num_workers=workers(model.device.type),
        prompts={c: model.prompts.get("query" if c == "query" else "document") or "" for c in columns})
    settings._n_gpu = min(settings.n_gpu, 1)  # else plain `python` on several GPUs means the slow DataParallel
    report, bar = callbacks()
    trainer = trainer_class(args.lora_rank)(
        model=model, args=settings, train_dataset=rows, loss=make_loss(model, args, model.device), evaluator=evaluator,
        callbacks=[report, EarlyStoppingCallback(math.ceil(args.patience * steps / every))])
    trainer.data_collator.max_length = min(args.train_length, length_limit(model) or args.train_length)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(bar)
    return trainer


def workers(device) -> int:
    """Processes that prepare batches; the batches do not depend on them. None on a CPU, which they would share with training."""
    own_cores = max(1, (os.cpu_count() or 1) // processes())
    return min(WORKERS, own_cores) if device == "cuda" and sys.platform == "linux" else 0


def _generator():
    import torch
    return torch.Generator()


def train(args, columns, evaluator, device, precision, folder) -> tuple[Path, list[dict]]:
    """Train into checkpoints under `folder`; the best checkpoint's path and the log."""
    import transformers
    transformers.set_seed(args.seed)
    trainer = make_trainer(load_trainee(args, device)[0], columns, evaluator, args, precision, folder)
    last = transformers.trainer_utils.get_last_checkpoint(str(folder)) if args.resume else None
    try:
        trainer.train(resume_from_checkpoint=last)
    except KeyboardInterrupt:
        if transformers.trainer_utils.get_last_checkpoint(str(folder)) is None:
            raise
        raise UserError("interrupted (the same command with --resume goes on from the last checkpoint)")
    best = trainer.state.best_model_checkpoint
    if best is None or not Path(best).is_dir():  # the library only logs when it cannot write one
        raise UserError(f"no checkpoint was written to {folder} (is the disk full?)")
    return Path(best), trainer.state.log_history


def start_checkpoints(folder, config, resume) -> None:
    """Make the checkpoint folder, or check that what is in it can be resumed with these arguments."""
    written = folder / "config.json"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(written, config)
        return
    if not any(folder.glob("checkpoint-*/trainer_state.json")):
        raise UserError(f"nothing to resume: {folder} holds no checkpoint (run without --resume)")
    old = json.loads(written.read_text(encoding="utf-8"))
    changed = sorted(k for k in config.keys() | old.keys() if config.get(k) != old.get(k))
    if changed:
        raise UserError(f"cannot resume: {', '.join(changed)} changed since the interrupted run "
                        "(give the same arguments, or run without --resume)")

"""Measure what each lever of stage 1 does: a table of recipes, over seeds, on the test split.

Not a test, and not part of the suite: on two CPU cores it takes hours. It runs stages 0, 1 and 2 as a
user would, keeps what is finished (stop it and run it again to go on), and writes OUT/levers.md.
With --other, each model is also evaluated on that data, which it was not trained for: what did it forget?

Example:
  python tests/levers.py --data medquad/ --size 3000 --rows 800 2000 --other data/
  python tests/levers.py --data data/ --size 800 --other medquad/ --recipes default mined
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The walk that set the mark: small steps, small batches, many epochs, all 256 tokens, dropout as the base model has it.
WALK = ["--epochs", "5", "--bsz", "8", "--lr", "2e-5", "--train_length", "256", "--evals", "1"]
RECIPES = {
    "original walk": [*WALK, "--dropout", "0.1"],
    "original walk, no dropout": WALK,
    "default": [],
    "one epoch": ["--epochs", "1", "--evals", "4"],
    "dropout": ["--dropout", "0.1"],
    "256 tokens": ["--train_length", "256"],
    "mined": ["--mine_negatives", "1"],
    "mined 3": ["--mine_negatives", "3"],
    "gist": ["--loss", "gist"],
    "batch 256, cached": ["--loss", "cached", "--bsz", "256", "--lr", "3e-4"],
    "matryoshka": ["--matryoshka", "384", "256", "128", "64"],
    "LoRA 16": ["--lora_rank", "16"]}
METRICS = ("Hit@1", "MRR@10", "nDCG@10")


def run(*words) -> None:
    print("+", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def measure(data, size, rows, recipe, seed, out, others) -> Path:
    """Train one model unless it is there, evaluate it where it was not yet; its folder."""
    folder = out / f"{data.name}-{rows}" / f"{recipe.replace(' ', '_').replace(',', '')}-{seed}"
    if not (folder / "run.json").exists():
        run("1_train_embedding.py", "--data", data, "--limit", rows, "--seed", seed, "--out", folder, *RECIPES[recipe])
    tuned = folder / "fully_tuned"
    for where, documents in {data: size, **others}.items():
        name = where.name
        corpus, result = out / f"{name}.corpus.jsonl", folder / f"on_{name}"
        if not corpus.exists():
            run("0_build_corpus.py", "--data", where, "--size", documents, "--out", corpus)
        if not (result / "metrics.json").exists():
            run("2_eval_retrieval.py", "--data", where, "--corpus", corpus, "--finetuned", folder / "final", "--out", result,
                "--also", tuned if tuned.exists() else "baseline")  # naming the baseline again adds no system
    return folder


def levels(folder, name) -> dict[str, dict[str, float]]:
    """Of one model on one data: METRICS of base, mixed (final) and fully tuned."""
    systems = json.loads((folder / f"on_{name}" / "metrics.json").read_text(encoding="utf-8"))["systems"]
    means = {label: {m: x[m]["mean"] for m in METRICS} for label, x in systems.items()}
    tuned = next((v for label, v in means.items() if label not in ("baseline", "finetuned")), means["finetuned"])
    return {"base": means["baseline"], "final": means["finetuned"], "fully tuned": tuned}


def cell(values, digits=3) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(runs, data, rows, others) -> list[str]:
    """Markdown: mean and standard deviation over seeds. `runs`: {recipe: [folder]}."""
    name = data.name
    elsewhere = [o.name for o in others]
    head = ["recipe", "seeds", *METRICS, "fully tuned nDCG@10", "training s",
            *(f"nDCG@10 on {o}: {which}" for o in elsewhere for which in ("final", "fully tuned"))]
    lines = [f"{name}, {rows} training rows", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    first = next(iter(runs.values()))[0]
    lines.append("| base | | " + " | ".join([*(f"{levels(first, name)['base'][m]:.3f}" for m in METRICS), "", "",
                                             *(x for o in elsewhere for x in (f"{levels(first, o)['base']['nDCG@10']:.3f}", ""))]) + " |")
    for recipe, folders in runs.items():
        found = [levels(f, name) for f in folders]
        seconds = [json.loads((f / "run.json").read_text(encoding="utf-8"))["seconds"]["train"] for f in folders]
        away = [[levels(f, o)[which]["nDCG@10"] for f in folders] for o in elsewhere for which in ("final", "fully tuned")]
        lines.append("| " + " | ".join([recipe, str(len(folders)), *(cell([x["final"][m] for x in found]) for m in METRICS),
                                        cell([x["fully tuned"]["nDCG@10"] for x in found]), cell(seconds, 0), *map(cell, away)]) + " |")
    return lines + [""]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder of triplets to train on")
    p.add_argument("--size", type=int, default=800, help="documents to search")
    p.add_argument("--rows", type=int, nargs="+", default=[800])
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    p.add_argument("--other", default=None, help="folder of another domain's triplets")
    p.add_argument("--other_size", type=int, default=800)
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "levers")
    args = p.parse_args()
    args.data, args.out = Path(args.data).resolve(), args.out.resolve()  # the stages run in the project's folder
    others = {Path(args.other).resolve(): args.other_size} if args.other else {}
    lines = []
    for rows in args.rows:
        runs = {}
        for seed in args.seeds:  # seed by seed, so that what is stopped early compares all recipes
            for recipe in args.recipes:
                runs.setdefault(recipe, []).append(measure(args.data, args.size, rows, recipe, seed, args.out, others))
        lines += table(runs, args.data, rows, others)
    (args.out / "levers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Measure what each lever of stage 1 does: a table of recipes, over seeds, on the test split.

Not a test, and not part of the suite: on two CPU cores it takes hours. It runs stages 0, 1 and 2 as a
user would, keeps what is finished (stop it and run it again to go on), and after each model writes all that
is measured to OUT/levers-DATA.md. With --other, each model is also evaluated on that data, which it was not
trained for: what did it forget?

Example:
  python tests/levers.py --data medquad/ --size 3000 --rows 800 2000 --other data/
  python tests/levers.py --data data/ --size 800 --other medquad/ --recipes default "own negatives"
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The walk that set the mark: the data's negatives, small steps, small batches, many epochs, all 256 tokens, dropout as
# the base model has it.
WALK = ["--mine_negatives", "0", "--epochs", "5", "--bsz", "8", "--lr", "2e-5", "--train_length", "256", "--evals", "1"]
RECIPES = {
    "original walk": [*WALK, "--dropout", "0.1"],
    "original walk, no dropout": WALK,
    "default": [],
    "one epoch": ["--epochs", "1", "--evals", "4"],
    "dropout": ["--dropout", "0.1"],
    "256 tokens": ["--train_length", "256"],
    "own negatives": ["--mine_negatives", "0"],
    "mined 1": ["--mine_negatives", "1"],
    "mined from 2500": ["--mine_from", "2500"],
    "gist": ["--loss", "gist"],
    "batch 256, cached": ["--loss", "cached", "--bsz", "256", "--lr", "3e-4"],
    "matryoshka": ["--matryoshka", "384", "256", "128", "64"],
    "LoRA 16": ["--lora_rank", "16"]}
METRICS = ("Hit@1", "MRR@10", "nDCG@10")


def run(*words) -> None:
    print("+", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def measure(folder, data, searched, rows, recipe, seed) -> None:
    """Train one model into `folder` unless it is there, evaluate it where it was not yet. `searched`: {data: documents}."""
    if not (folder / "run.json").exists():
        run("1_train_embedding.py", "--data", data, "--limit", rows, "--seed", seed, "--out", folder, *RECIPES[recipe])
    tuned = folder / "fully_tuned"
    for where, documents in searched.items():
        corpus, result = folder.parent.parent / f"{where.name}-{documents}.jsonl", folder / f"on_{where.name}-{documents}"
        if not corpus.exists():
            run("0_build_corpus.py", "--data", where, "--size", documents, "--out", corpus)
        if not (result / "metrics.json").exists():
            run("2_eval_retrieval.py", "--data", where, "--corpus", corpus, "--finetuned", folder / "final", "--out", result,
                "--also", tuned if tuned.exists() else "baseline")  # naming the baseline again adds no system


def levels(folder, searched) -> dict[str, dict[str, float]] | None:
    """Of one model on one (data, documents): METRICS of base, mixed (final) and fully tuned; None where it was not evaluated."""
    path = folder / f"on_{searched[0].name}-{searched[1]}" / "metrics.json"
    if not path.exists():
        return None
    systems = json.loads(path.read_text(encoding="utf-8"))["systems"]
    means = {label: {m: x[m]["mean"] for m in METRICS} for label, x in systems.items()}
    tuned = next((v for label, v in means.items() if label.endswith("fully_tuned")), means["finetuned"])
    return {"base": means["baseline"], "final": means["finetuned"], "fully tuned": tuned}


def cell(values, digits=3) -> str:
    """Mean and standard deviation of what was measured."""
    values = [v for v in values if v is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(out, data, rows, searched) -> list[str]:
    """Markdown of all that is measured in `out`: mean and standard deviation over seeds."""
    home, *others = searched.items()
    found = {}  # {recipe: {seed: (folder, levels)}}
    for recipe in RECIPES:
        for path in sorted((out / f"{data.name}-{rows}").glob(f"{folder_name(recipe, '*')}/run.json")):
            if measured := levels(path.parent, home):
                found.setdefault(recipe, {})[path.parent.name.rsplit("-", 1)[1]] = path.parent, measured
    walk = found.get("original walk, no dropout", {}) | found.get("original walk", {})
    head = ["recipe", "seeds", *METRICS, "nDCG@10 above the walk's, by seed", "fully tuned nDCG@10", "mining and training s",
            *(f"nDCG@10 on {o.name}: {which}" for o, _ in others for which in ("final", "fully tuned"))]
    lines = [f"{data.name}, {rows} training rows, {home[1]} documents", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    if found:  # any run has the base model's values
        runs = [folder for seeds in found.values() for folder, _ in seeds.values()]
        base = [next((x["base"] for f in runs if (x := levels(f, where))), None) for where in searched.items()]
        lines.append("| " + " | ".join(["base", "", *(f"{base[0][m]:.3f}" for m in METRICS), "", "", "", *(
            x for b in base[1:] for x in (cell([b and b["nDCG@10"]]), ""))]) + " |")
    for recipe, seeds in found.items():
        folders, here = zip(*seeds.values())
        away = [[levels(f, o) for f in folders] for o in others]
        above = [f"{seeds[s][1]['final']['nDCG@10'] - walk[s][1]['final']['nDCG@10']:+.3f}" for s in seeds if s in walk and recipe[:8] != "original"]
        seconds = [sum(json.loads((f / "run.json").read_text(encoding="utf-8"))["seconds"].get(k, 0) for k in ("mine", "train")) for f in folders]
        lines.append("| " + " | ".join([
            recipe, str(len(seeds)), *(cell([x["final"][m] for x in here]) for m in METRICS), ", ".join(above),
            cell([x["fully tuned"]["nDCG@10"] for x in here]), cell(seconds, 0),
            *(cell([r and r[which]["nDCG@10"] for r in runs]) for runs in away for which in ("final", "fully tuned"))]) + " |")
    return lines + [""]


def folder_name(recipe, seed) -> str:
    return f"{recipe.replace(' ', '_').replace(',', '')}-{seed}"


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
    if args.other and Path(args.other).resolve().name == args.data.name:
        p.error("--data and --other need folders of different names")
    searched = {args.data: args.size} | ({Path(args.other).resolve(): args.other_size} if args.other else {})
    args.out.mkdir(parents=True, exist_ok=True)
    for rows in args.rows:
        for seed in args.seeds:  # seed by seed, so that what is stopped early compares all recipes
            for recipe in args.recipes:
                try:
                    measure(args.out / f"{args.data.name}-{rows}" / folder_name(recipe, seed), args.data, searched, rows, recipe, seed)
                except subprocess.CalledProcessError:  # it has said why; stage 1 refuses a model that got worse
                    print(f"! {recipe}, seed {seed}: no result", flush=True)
                lines = [line for r in args.rows for line in table(args.out, args.data, r, searched)]
                (args.out / f"levers-{args.data.name}.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Fit the engine's learnt tables: the word lexicon and the confidence model.

    python benchmarks/fit.py            # collect (minutes), fit, write automatch/engine/data/{lexicon,confidence}.json
    python benchmarks/fit.py --fresh    # collect again although benchmarks/.cache holds an earlier collection

Rows for the confidence model are out of fold: the pairs of a case are matched with a lexicon that has not
seen the case's family group. Unrelated pairs (the checkpoint of one group, the model of another) are added,
so that there is something to abstain from. `fit(cases)` leaves out every group that ``cases`` lacks.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import corpus_cases
import numpy as np
from families import group_of
from lexicon import LARGE, Pair, fit_lexicon, word_pairs

from automatch.engine.features import NAMES, pair_features
from automatch.engine.pipeline import run_stages
from automatch.engine.solve import Weights
from automatch.engine.tables import Tables, read_lexicon, read_trees
from automatch.specs import StateSpec, TensorSpec

HERE = Path(__file__).parent
EXTRA = HERE / "corpus_extra" / "cases"
DATA = HERE.parent / "automatch" / "engine" / "data"
CACHE = HERE / ".cache" / "fit.pickle"
UNRELATED = 240
ROWS_PER_CASE = 120
# Families of corpus_extra that share conventions with a group of the corpus (see corpus_extra/README.md).
RELATED = {
    "vit": ("vit_jax", "dino", "vit_msn", "ijepa", "vivit", "clip_vision", "clipseg", "byobnet-clip", "siglip", "depth_anything"),
    "swin": ("swin_transformer_v2",),
    "resnet": ("resnetv2_bit_tf", "resnext", "wide_resnet", "legacy_senet"),
    "llama": ("llava", "moe_stacked", "qwen2", "qwen3", "olmo2", "phi3", "glm"),
    "bert": ("blenderbot", "m2m_100"),
}
_GROUP_OF = {family: group for group, families in RELATED.items() for family in families}
KINDS = {"param": "parameter", "buffer": "buffer", "tensor": None}


@dataclass(frozen=True, slots=True)
class Collected:
    """What one run of the engine gave: features of its pairs, and how many of the keys each decides are right."""

    group: str
    rows: np.ndarray
    right: np.ndarray
    keys: np.ndarray


def group_of_case(case: Mapping[str, Any]) -> str:
    """The family group of a case of either corpus."""
    return _GROUP_OF.get(case["family"], group_of(case["family"]))


def spec_of(side: Mapping[str, Any], entries: Iterable[Any], origin: str) -> StateSpec:
    """A spec from a case's entries."""
    classes = side.get("modules") or {}
    return StateSpec(
        tuple(
            TensorSpec(k, tuple(s), d, KINDS[kind] if origin == "model" else None, None, classes.get(k.rpartition(".")[0]))
            for k, s, d, kind in entries
        ),  # type: ignore[arg-type]
        origin,
    )


def collect(job: tuple[str, str, str, dict[str, Any]]) -> Collected | None:
    """Run the engine on a case (or on the checkpoint of one and the model of another) and label what it decided."""
    path, order, other, table = job
    case = corpus_cases.load_case(Path(path))
    target, truth, group = case, case["truth"], group_of_case(case)
    if other:
        target, truth, group = corpus_cases.load_case(Path(other)), {}, f"unrelated {sum(map(ord, path + other)) % 5}"
    if len(target["target"]["entries"]) > LARGE:
        return None
    source_spec = spec_of(case["source"], corpus_cases.ordered_entries(case, order), "checkpoint")
    target_spec = spec_of(target["target"], target["target"]["entries"], "model")
    outcome = run_stages(source_spec, target_spec, read_lexicon(table), Weights())
    kept, rows = pair_features(outcome)
    right, keys = np.zeros(len(kept)), np.zeros(len(kept))
    position = {j: n for n, j in enumerate(kept)}
    alias = {key: same[0] for same in case["source"].get("aliases", []) for key in same}
    for fed in outcome.fed:
        true = truth.get(fed.target)
        if (
            fed.target in outcome.tied
            or fed.target.endswith("num_batches_tracked")
            or (true is None and target_spec[fed.target].kind == "buffer")
        ):
            continue
        wanted = [[alias.get(k, k) for k in keys_] for keys_ in (true["sources"], *true.get("alt", []))] if true else []
        ok = [alias.get(k, k) for k in fed.sources] in wanted
        for decider in {outcome.decided_by[j][1] for j in fed.items}:
            right[position[decider]] += ok
            keys[position[decider]] += 1
    counted = keys > 0
    return Collected(group, rows[counted], right[counted], keys[counted])


def _convolutional(case: Mapping[str, Any]) -> bool:
    shapes = [entry[1] for entry in case["target"]["entries"]]
    return sum(len(shape) == 4 for shape in shapes) > 0.12 * len(shapes)


def _unrelated(paths: list[Path], chance: random.Random) -> Iterable[tuple[Path, str, Path]]:
    """Pairs of a checkpoint and a model that share no architecture: one convolutional and one not, or, less often, of other groups."""
    light = [path for path in paths if path.stat().st_size < 14_000]
    known = {path: corpus_cases.load_case(path) for path in light}
    left = UNRELATED
    while left:
        a, b = chance.sample(light, 2)
        groups = {group_of_case(known[a]), group_of_case(known[b])}
        apart = _convolutional(known[a]) != _convolutional(known[b])
        if (
            len(groups) == 2
            and "negative" not in groups
            and (apart or chance.random() < 0.4)
            and not (_convolutional(known[a]) and _convolutional(known[b]))
        ):
            left -= 1
            yield a, chance.choice(corpus_cases.ORDERS), b


def dataset(*, fresh: bool = False) -> tuple[dict[str, set[Pair]], list[Collected]]:
    """Word pairs by group and collected runs over both corpora; kept in benchmarks/.cache."""
    if CACHE.exists() and not fresh:
        return pickle.loads(CACHE.read_bytes())
    paths = [*corpus_cases.case_paths(), *corpus_cases.case_paths(directory=EXTRA)]
    words: dict[str, set[Pair]] = defaultdict(set)
    group_at: dict[Path, str] = {}
    for path in paths:
        case = corpus_cases.load_case(path)
        group_at[path] = group_of_case(case)
        words[group_at[path]] |= word_pairs(case)
    without = {group: fit_lexicon({g: pairs for g, pairs in words.items() if g != group}) for group in sorted(words)}
    jobs = [(str(path), order, "", without[group_at[path]]) for path in paths for order in corpus_cases.ORDERS]
    jobs += [(str(a), order, str(b), without[group_at[a]]) for a, order, b in _unrelated(paths, random.Random(1))]
    jobs.sort(key=lambda job: -Path(job[0]).stat().st_size)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = [run for run in pool.map(collect, jobs, chunksize=4) if run is not None and len(run.rows)]
    CACHE.parent.mkdir(exist_ok=True)
    CACHE.write_bytes(pickle.dumps((dict(words), runs)))
    return dict(words), runs


def training_rows(runs: Iterable[Collected]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, whether all keys of the row are right, and weights (keys, at most 300 a case); at most 120 rows a case."""
    rows, right, weight = [], [], []
    for number, run in enumerate(runs):
        chosen = np.random.default_rng(number).permutation(len(run.rows))[:ROWS_PER_CASE]
        rows.append(run.rows[chosen])
        right.append(run.right[chosen] / run.keys[chosen] > 0.99)
        weight.append(run.keys[chosen] * min(1.0, 300 / run.keys.sum()))
    return np.concatenate(rows), np.concatenate(right).astype(float), np.concatenate(weight)


def fit_confidence(runs: Iterable[Collected]) -> dict[str, Any]:
    """The confidence model in the form that `automatch.engine.tables.read_trees` reads."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    rows, right, weight = training_rows(runs)
    model = HistGradientBoostingClassifier(
        max_iter=120, learning_rate=0.06, max_leaf_nodes=8, min_samples_leaf=60, l2_regularization=5, early_stopping=False, random_state=0
    ).fit(rows, right, sample_weight=weight)
    trees = []
    for (tree,) in model._predictors:
        nodes = tree.nodes
        trees.append(
            {
                "feature": [-1 if leaf else int(f) for f, leaf in zip(nodes["feature_idx"], nodes["is_leaf"], strict=True)],
                "threshold": [float(x) if np.isfinite(x) else 1e9 for x in nodes["num_threshold"]],
                "left": nodes["left"].tolist(),
                "right": nodes["right"].tolist(),
                "value": [round(float(x), 6) for x in nodes["value"]],
            }
        )
    note = (
        f"{len(trees)} trees of at most 8 leaves, fitted by benchmarks/fit.py on {len(rows)} out-of-fold pairs of benchmarks/corpus and "
        "benchmarks/corpus_extra in three orders, and of unrelated checkpoints and models"
    )
    return {"note": note, "features": list(NAMES), "base": float(np.ravel(model._baseline_prediction)[0]), "trees": trees}


def fit(cases: Iterable[Mapping[str, Any]]) -> Tables:
    """The tables fitted without the corpus groups that ``cases`` lacks, and without what is related to them."""
    present = {group_of_case(case) for case in cases}
    absent = {group_of_case(case) for case in corpus_cases.load_cases()} - present
    words, runs = dataset()
    lexicon = fit_lexicon({group: pairs for group, pairs in words.items() if group not in absent})
    return Tables(read_lexicon(lexicon), read_trees(fit_confidence(run for run in runs if run.group not in absent)))


def main() -> None:
    """Fit on everything and write the shipped tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="collect again")
    words, runs = dataset(fresh=parser.parse_args().fresh)
    lexicon = fit_lexicon(words)
    head, rows = json.dumps(lexicon["note"]), ",\n".join(json.dumps(pair) for pair in lexicon["pairs"])
    (DATA / "lexicon.json").write_text(f'{{"note": {head}, "pairs": [\n{rows}\n]}}\n')
    (DATA / "confidence.json").write_text(json.dumps(fit_confidence(runs), separators=(",", ":")) + "\n")
    print(f"{len(lexicon['pairs'])} word pairs, {sum(len(run.rows) for run in runs)} rows of {len(runs)} runs")


if __name__ == "__main__":
    import fit as this  # what is pickled must belong to the module, not to __main__

    this.main()

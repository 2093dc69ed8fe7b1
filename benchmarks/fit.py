"""Fit the engine's learnt tables: the word lexicon, the order of registration and the confidence model.

    python benchmarks/fit.py            # collect (minutes), fit, write automatch/engine/data/{lexicon,order,confidence}.json
    python benchmarks/fit.py --fresh    # collect again although benchmarks/.cache holds an earlier collection

Rows for the confidence model are out of fold: the pairs of a case are matched with a lexicon and an order that
have not seen the case's family group. Unrelated pairs (the checkpoint of one group, the model of another) are added,
so that there is something to abstain from. `fit(cases)` leaves out every group that ``cases`` lacks.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
from collections import Counter, defaultdict
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
from registration import Observed, fit_order, order_facts

from automatch.engine.features import NAMES, pair_features
from automatch.engine.items import canonical
from automatch.engine.pipeline import run_stages
from automatch.engine.registration import read_precedence
from automatch.engine.solve import Weights
from automatch.engine.tables import NO_TREES, Tables, read_lexicon, read_trees
from automatch.specs import StateSpec, TensorSpec

HERE = Path(__file__).parent
EXTRA = HERE / "corpus_extra" / "cases"
DATA = HERE.parent / "automatch" / "engine" / "data"
CACHE = HERE / ".cache" / "fit.pickle"
UNRELATED = 240
ROWS_PER_CASE = 120
RARITY = 0.3  # weight of unrelated pairs: few people load the checkpoint of another architecture
# Families of corpus_extra that share conventions with a group of the corpus (see corpus_extra/README.md).
RELATED = {
    "vit": (
        *("vit_jax", "dino", "vit_msn", "ijepa", "vivit", "clip_vision", "clipseg", "byobnet-clip", "siglip", "depth_anything"),
        *("keras_hub_vit", "mvit_v1", "owlv2", "blip_2", "zoedepth", "vitmatte", "seggpt"),
        *("eva02_clip", "deepseek_vit", "sapiens2", "vjepa2", "gemma4_vision", "qwen3_vl", "radio", "vit_hybrid"),
    ),
    "swin": ("swin_transformer_v2", "maskformer", "mask2former", "grounding_dino", "omdet_turbo", "swin_unetr", "swin3d"),
    "resnet": (
        "resnetv2_bit_tf",
        "resnext",
        "wide_resnet",
        "legacy_senet",
        "flax_resnet",
        "haiku_resnet",
        "keras_resnet",
        "senet",
        "slowonly",
    ),
    "convnext": ("keras_convnext",),
    "densenet": ("keras_densenet",),
    "mobile": ("ghostnet", "rexnet", "user_module", "lraspp"),
    "vgg": ("craft", "lpips", "ssd"),
    "llama": (
        *("llava", "moe_stacked", "qwen2", "qwen3", "olmo2", "phi3", "glm"),
        *("baichuan", "keras_hub_llama", "megatron_core", "qwen2_tl", "recurrent_gemma"),
        *("olmo", "chameleon", "mllama", "nemotron", "idefics2", "moshi"),
        *("dots1", "hunyuan_v1_moe", "qwen2_vl", "pixtral", "litgpt"),
    ),
    "gpt": ("codegen", "gpt2_tl", "gpt_neo", "mingpt", "gpt_sw3", "openai_gpt"),
    "bert": (
        *("blenderbot", "m2m_100", "big_bird", "ct2_bart", "esm", "fsmt", "keras_hub_bart", "markuplm"),
        *("onnx_distilbert", "onnx_electra", "pegasus", "xglm"),
        *("dpr", "tapas", "mra", "visual_bert", "flava", "lxmert", "canine", "layoutlmv3", "plbart", "biogpt", "prophetnet", "xmod", "xlm"),
        *("yoso", "xlm_roberta_xl", "ernie", "roc_bert"),
    ),
    "t5": ("longt5", "switch_transformers", "pix2struct", "pop2piano"),
    "diffusion": (
        *("dit", "monai_unet", "taesd", "animatediff", "kohya_lora", "t2i_adapter", "autoencoder_dc", "wan_vae", "ltx_vae"),
        "stable_cascade",
    ),
    "flux": ("chroma", "flux2"),
    "metaformer": ("jax_mixer",),
    "detr": ("table_transformer",),
    "conditional_detr": ("dab_detr",),
    "deformable_detr": ("deta",),
    "lightglue": ("superglue",),
    "inception_resnet_v2": ("inception_resnet_v1",),
    "perceiver": ("perceiver_io",),
    "shufflenet_v2": ("user_keypoint",),
    "wav2vec2": ("sew", "wav2vec2_conformer", "wav2vec2_bert", "data2vec_audio", "seamless_m4t", "unispeech_sat"),
    "mobilevit": ("mobilevitv2",),
    "efficientnet": ("align", "monai_flexible_unet"),
    "detection": ("ssd300", "yhenon_retinanet", "mmdet_faster_rcnn"),
    "nnunet": ("dynunet",),
    "conformer": ("fastspeech2_conformer",),
    "rl_mlp_policy": ("rl_cnn_policy", "rl_sac"),
    "pyg_gat": ("pyg_attentivefp", "pyg_gcn"),
}
_GROUP_OF = {family: group for group, families in RELATED.items() for family in families}
# Kinds of architecture that have no part in common, for pairs that look alike and are not; groups that are not listed take no part.
ARCHITECTURES = {
    "bert": ("bert", "mpnet", "luke", "rembert", "convbert", "mobilebert", "roformer", "deberta", "funnel", "xlnet"),
    "decoder": ("gpt", "gptj", "bloom", "falcon", "mpt", "opt", "phi", "stablelm", "persimmon", "llama", "granitemoe", "rwkv", "mamba"),
    "t5": ("t5",),
    "vit": ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit", "aimv2", "xcit", "tnt", "crossvit", "pit"),
    "audio": ("hubert", "wav2vec2", "wav2vec2_torchaudio", "wavlm", "wavlm_torchaudio"),
    "diffusion": ("diffusion", "flux", "sd3", "ltx", "sana", "wan", "lumina2"),
    "convnext": ("convnext", "dinov3_convnext"),
    "swin": ("swin", "swin2sr"),
    "resnet": ("resnet", "resnest", "tresnet"),
    "mobile": ("mobile", "efficientnet", "efficientnetv2", "fbnet", "mixnet", "semnasnet", "spnasnet"),
    **{
        name: (name,)
        for name in ("metaformer", "densenet", "dpn", "regnet", "vgg", "hifigan", "segformer", "pvt_v2", "hrnet", "dla", "focalnet")
    },
}
COMPOSED = frozenset(  # families that hold another architecture
    [
        "blip",
        "llava",
        "upernet",
        "clipseg",
        "dpt",
        "depth_anything",
        "sam",
        "siglip",
        "clip",
        "clip_vision",
        "byobnet-clip",
        "bart",
        "m2m_100",
        "blenderbot",
    ]
)
TESTED = (("bert", "decoder"), ("bert", "t5"), ("convnext", "swin"), ("resnet", "vit"))  # kinds that the corpus's negative cases pair
LEAST_OVERLAP, PER_KINDS = 0.3, 2
KINDS = {"param": "parameter", "buffer": "buffer", "tensor": None}


@dataclass(frozen=True, slots=True)
class Collected:
    """What one run of the engine gave: features of its pairs, and how many of the keys each decides are right."""

    group: str
    rows: np.ndarray
    right: np.ndarray
    keys: np.ndarray


def kind_of(group: str) -> str | None:
    """The kind of architecture of a family group; None where it is not listed."""
    return next((kind for kind, groups in ARCHITECTURES.items() if group in groups), None)


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


def collect(job: tuple[str, str, str, dict[str, Any], dict[str, Any]]) -> Collected | None:
    """Run the engine on a case (or on the checkpoint of one and the model of another) and label what it decided."""
    path, order, other, words, registration = job
    case = corpus_cases.load_case(Path(path))
    target, truth, group = case, case["truth"], group_of_case(case)
    if other:
        target, truth = corpus_cases.load_case(Path(other)), {}
        group = f"unrelated {group} {group_of_case(target)}"
    if len(target["target"]["entries"]) > LARGE:
        return None
    source_spec = spec_of(case["source"], corpus_cases.ordered_entries(case, order), "checkpoint")
    target_spec = spec_of(target["target"], target["target"]["entries"], "model")
    tables = Tables(read_lexicon(words), NO_TREES, read_precedence(registration))
    outcome = run_stages(source_spec, target_spec, tables, Weights())
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
    """Pairs of a checkpoint and a model that share no architecture: some at random, and those whose shapes agree most."""
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
    for a, b in _alike(known):
        yield a, chance.choice(corpus_cases.ORDERS), b


def _alike(known: Mapping[Path, Mapping[str, Any]]) -> list[tuple[Path, Path]]:
    """Checkpoint and model of different kinds of architecture: of each two kinds those whose shapes agree most."""
    shapes = {
        path: [Counter(canonical(tuple(e[1])) for e in case[side]["entries"]) for side in ("source", "target")]
        for path, case in known.items()
    }
    kinds = {path: kind_of(group_of_case(case)) for path, case in known.items() if case["family"] not in COMPOSED}
    overlap = {
        (a, b): (shapes[a][0] & shapes[b][1]).total() / shapes[b][1].total()
        for a, one in kinds.items()
        for b, two in kinds.items()
        if one and two and one != two
    }
    taken: Counter[tuple[str, str]] = Counter()
    found = []
    for a, b in sorted(overlap, key=lambda pair: (-overlap[pair], pair)):
        both = kinds[a], kinds[b]
        if overlap[a, b] > LEAST_OVERLAP and taken[both] < PER_KINDS:
            taken[both] += 1
            found.append((a, b))
    return found


def dataset(*, fresh: bool = False) -> tuple[dict[str, set[Pair]], dict[str, set[Observed]], list[Collected]]:
    """Word pairs and orders of siblings by group, and collected runs over both corpora; kept in benchmarks/.cache."""
    if CACHE.exists() and not fresh:
        return pickle.loads(CACHE.read_bytes())
    paths = [*corpus_cases.case_paths(), *corpus_cases.case_paths(directory=EXTRA)]
    words: dict[str, set[Pair]] = defaultdict(set)
    orders: dict[str, set[Observed]] = defaultdict(set)
    group_at: dict[Path, str] = {}
    for path in paths:
        case = corpus_cases.load_case(path)
        group_at[path] = group_of_case(case)
        words[group_at[path]] |= word_pairs(case)
        orders[group_at[path]] |= order_facts(case)
    without = {group: (fit_lexicon(_except(words, {group})), fit_order(_except(orders, {group}))) for group in sorted(words)}
    jobs: list[Any] = [(str(path), order, "", *without[group_at[path]]) for path in paths for order in corpus_cases.ORDERS]
    jobs += [(str(a), order, str(b), *without[group_at[a]]) for a, order, b in _unrelated(paths, random.Random(1))]
    jobs.sort(key=lambda job: -Path(job[0]).stat().st_size)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = [run for run in pool.map(collect, jobs, chunksize=4) if run is not None and len(run.rows)]
    CACHE.parent.mkdir(exist_ok=True)
    CACHE.write_bytes(pickle.dumps((dict(words), dict(orders), runs)))
    return dict(words), dict(orders), runs


def _except(by_group: Mapping[str, set[Any]], absent: set[str]) -> dict[str, set[Any]]:
    return {group: found for group, found in by_group.items() if group not in absent}


def training_rows(runs: Iterable[Collected]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, whether all keys of the row are right, and weights (keys, at most 300 a case); at most 120 rows a case."""
    rows, right, weight = [], [], []
    for number, run in enumerate(runs):
        chosen = np.random.default_rng(number).permutation(len(run.rows))[:ROWS_PER_CASE]
        rows.append(run.rows[chosen])
        right.append(run.right[chosen] / run.keys[chosen] > 0.99)
        share = RARITY if run.group.startswith("unrelated") else 1.0
        weight.append(share * run.keys[chosen] * min(1.0, 300 / run.keys.sum()))
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


def _left_out(group: str, absent: set[str]) -> bool:
    """Whether rows of a group, or of two unrelated groups, must not be seen; without the negative cases, nor what they pair."""
    first, *both = group.split(" ")
    if first != "unrelated":
        return group in absent
    kinds = tuple(sorted(kind_of(group) or "" for group in both))
    return bool(absent & set(both)) or ("negative" in absent and kinds in TESTED)


def fit(cases: Iterable[Mapping[str, Any]]) -> Tables:
    """The tables fitted without the corpus groups that ``cases`` lacks, and without what is related to them."""
    present = {group_of_case(case) for case in cases}
    absent = {group_of_case(case) for case in corpus_cases.load_cases()} - present
    words, orders, runs = dataset()
    lexicon, order = fit_lexicon(_except(words, absent)), fit_order(_except(orders, absent))
    confidence = fit_confidence(run for run in runs if not _left_out(run.group, absent))
    return Tables(read_lexicon(lexicon), read_trees(confidence), read_precedence(order))


def _by_rows(table: Mapping[str, Any]) -> str:
    """JSON with a line for each row of a table, for people and for diffs."""
    parts = []
    for name, value in table.items():
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value) if isinstance(value, list) else None
        parts.append(f"{json.dumps(name)}: " + (json.dumps(value) if rows is None else f"[\n{rows}\n]"))
    return "{" + ",\n".join(parts) + "}\n"


def main() -> None:
    """Fit on everything and write the shipped tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="collect again")
    words, orders, runs = dataset(fresh=parser.parse_args().fresh)
    lexicon, order = fit_lexicon(words), fit_order(orders)
    for name, table in (("lexicon", lexicon), ("order", order)):
        (DATA / f"{name}.json").write_text(_by_rows(table))
    (DATA / "confidence.json").write_text(json.dumps(fit_confidence(runs), separators=(",", ":")) + "\n")
    print(f"{len(lexicon['pairs'])} word pairs, {sum(len(run.rows) for run in runs)} rows of {len(runs)} runs")


if __name__ == "__main__":
    import fit as this  # what is pickled must belong to the module, not to __main__

    this.main()

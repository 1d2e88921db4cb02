"""Runs golden cases: outputs of the authors' own code against whole merges of ours.

    python -m tests.golden FOLDER

FOLDER holds `manifest.json` with `cases`, each `id, method, params, inputs, output, tolerance, notes`, and the tensors
they name. Prints a line per case and last `N passed, N failed, N skipped`; exits with 1 if a case failed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.alignment.matching import match, match_many
from merge_core.alignment.permutations import Permuted
from merge_core.alignment.spec import Indexed, PermutationSpec
from merge_core.checkpoint import Checkpoint
from merge_core.coefficients.greedy_soup import greedy_soup
from merge_core.merge import merge
from merge_core.method import Randomness
from merge_core.methods import METHODS
from merge_core.patching import Patch, patch
from merge_core.recipe import Recipe
from merge_core.weights import Weights

Case = Mapping[str, Any]


class Skip(Exception):
    """The case is about something that is not here; the message says what."""


@dataclass(frozen=True)
class Run:
    """One case in our own terms."""

    recipe: dict[str, Any]
    keep_masks: Sequence[str] = ()
    outcome: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda merged: merged


class RecordedMasks(Randomness):
    """Instead of random numbers: the authors' masks (1 = kept), as numbers that any drop rate sorts the same way."""

    def __init__(self, masks: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__(0)
        self.masks = masks

    def key(self, tensor: str, model: int) -> None:
        return None

    def uniform(self, tensor: str, model: int, start: int, count: int, device: torch.device) -> Tensor:
        if tensor not in self.masks[model]:
            return torch.ones(count)
        return self.masks[model][tensor].flatten()[start : start + count].to(torch.float32)


def _models(case: Case, **parameters: Sequence[float]) -> list[dict[str, Any]]:
    paths = case["inputs"]["models"]
    return [
        {"model": path, "parameters": {name: values[i] for name, values in parameters.items()}}
        for i, path in enumerate(paths)
    ]


def _each(values: Mapping[str, float] | float, count: int) -> list[float]:
    return list(values.values()) if isinstance(values, Mapping) else [values] * count


def _mergekit(case: Case) -> Run:
    """`mergekit/NAME`: our default meaning of the name is mergekit's, so its parameters are ours."""
    name, params = case["method"].removeprefix("mergekit/"), dict(case["params"])
    count = len(case["inputs"]["models"])
    per_model = {key: _each(params.pop(key), count) for key in ("weight", "density", "scale") if key in params}
    recipe = {
        "merge_method": name,
        "models": _models(case, **per_model),
        "parameters": {key: value for key, value in params.items() if not key.startswith("_")},
    }
    if case["inputs"].get("base"):
        recipe["base_model"] = case["inputs"]["base"]
    return Run(recipe, case["inputs"].get("keep_masks", ()))


def _uniform_soup(case: Case) -> Run:
    count = len(case["inputs"]["models"])
    return Run({"merge_method": "linear", "models": _models(case, weight=[1.0] * count)} | _out_dtype(case))


def _slerp(case: Case) -> Run:
    first, second = case["inputs"]["models"]
    return Run(
        {
            "merge_method": "slerp",
            "base_model": first,
            "models": [{"model": second}],
            "parameters": {"t": case["params"]["t"]},
        }
    )


def _task_arithmetic(case: Case) -> Run:
    params = case["params"]
    scale = -params["scaling"] if params.get("negate") else params["scaling"]
    models = _models(case, weight=[1.0] * len(case["inputs"]["models"]))
    parameters = {"lambda": scale}
    return Run(
        {
            "merge_method": "task_arithmetic",
            "base_model": case["inputs"]["base"],
            "models": models,
            "parameters": parameters,
        }
        | _out_dtype(case)
    )


def _wise_ft(case: Case) -> Run:
    recipe = {"merge_method": "wise_ft", "base_model": case["inputs"]["base"], "models": _models(case)}
    parameters = {"alpha": case["params"]["alpha"]}
    if fisher := case["inputs"].get("fisher"):
        recipe |= {"statistics": dict(zip(("base_fisher", "fisher"), fisher, strict=True))}
        parameters |= {"by_fisher": True, "fisher_floor": case["params"]["fisher_floor"]}
    return Run(recipe | {"parameters": parameters})


def _model_stock(case: Case) -> Run:
    return Run({"merge_method": "model_stock", "base_model": case["inputs"]["base"], "models": _models(case)})


def _ties(case: Case) -> Run:
    params = case["params"]
    rate = params.get("param_value_mask_rate")
    parameters = {
        "lambda": params.get("scaling", 1.0),
        "density": params["density"] if rate is None else _density_of_mask_rate(case, rate),
        "aggregate": params.get("merge_func", "mean").removeprefix("dis-"),
        "election": params.get("sign", "mass").split(",")[0],
    }
    recipe = {
        "merge_method": "ties",
        "semantics": "paper",
        "scope": "model" if params.get("scope", "global").startswith("global") else "tensor",
        "base_model": case["inputs"]["base"],
        "models": _models(case),
        "parameters": parameters,
    }
    return Run(recipe | _out_dtype(case))


def _dare(case: Case) -> Run:
    params = case["params"]
    count = len(case["inputs"]["models"])
    if params["rescale_factor"] != "1/(1-p)":
        raise Skip(f"no method rescales by {params['rescale_factor']}")
    parameters: dict[str, Any] = {"drop_rate": params["p"], "rescale": params["rescale"]}
    recipe: dict[str, Any] = {"semantics": "paper", "base_model": case["inputs"]["base"], "models": _models(case)}
    if params["combine"] == "average_merging":
        recipe |= {"merge_method": "dare_linear"}
        parameters |= {"weight": 1 / count, "lambda": 1.0}
    elif params["combine"] == "task_arithmetic":
        recipe |= {"merge_method": "dare_linear"}
        parameters |= {"lambda": params["scaling"]}
    elif params["combine"] == "ties_merging":
        recipe |= {"merge_method": "dare_ties"}
        parameters |= {
            "ties_density": _density_of_mask_rate(case, params["ties_param_value_mask_rate"]),
            "lambda": params["scaling"],
        }
    else:
        raise Skip(f"DARE before {params['combine']} is not a method here")
    if params.get("exclude"):
        recipe["exclude"] = [pattern.replace(".*", "") for pattern in params["exclude"]]
    return Run(recipe | {"parameters": parameters}, case["inputs"]["keep_masks"])


def _widen(case: Case) -> Run:
    return Run(
        {
            "merge_method": "widen",
            "base_model": case["inputs"]["base"],
            "models": _models(case),
            "parameters": {
                key: case["params"][key] for key in ("above_average_value_ratio", "score_calibration_value")
            },
        }
    )


def _pcb(case: Case) -> Run:
    params = case["params"]
    variant = {"vision": "B", "vision-ES (pairwise)": "C"}.get(params["variant"], "A")
    parameters = {"variant": variant, "mask_ratio": params["mask_ratio"], "clamp": params["clamp"]}
    models = _models(case, **({"weight": params["lams"]} if "lams" in params else {}))
    return Run(
        {
            "merge_method": "pcb",
            "base_model": case["inputs"]["base"],
            "models": models,
            "parameters": parameters | {"lambda": params.get("scaling", 1.0)},
        }
    )


def _graft(case: Case) -> Run:
    return Run(
        {
            "merge_method": "graft",
            "base_model": case["inputs"]["base"],
            "models": _models(case),
            "parameters": {"sparsity": case["params"]["sparsity"]},
        }
    )


def _transfer(case: Case) -> Run:
    inputs = case["inputs"]
    tuned = {"model": inputs["source_finetuned"], "base_model": inputs["source_base"]}
    parameters = {"lambda": case["params"]["scaling"], "vocabulary": "pad_zero"}
    return Run(
        {
            "merge_method": "transfer",
            "base_model": inputs["target_base"],
            "models": [tuned],
            "parameters": parameters,
        }
    )


def _ssd(case: Case) -> Run:
    inputs, params = case["inputs"], case["params"]
    # The official code cannot do with 0-d tensors, so the case has no importance and no result of theirs.
    theirs = load_file(_folder(case) / inputs["importance_full"])
    recipe = {
        "merge_method": "ssd",
        "models": [{"model": inputs["base"]}],
        "statistics": {"importance": inputs["importance_full"], "forget_importance": inputs["importance_forget"]},
        "parameters": {"alpha": params["alpha"], "lambda": params["lam"]},
        "exclude": [name for name in load_file(_folder(case) / inputs["base"]) if name not in theirs],
    }
    return Run(recipe, outcome=lambda merged: {name: merged[name] for name in theirs})


def _darex_q(case: Case) -> Run:
    params, inputs = case["params"], case["inputs"]
    whole = {"filter": "classifier", "value": 0}
    if per_tensor := params.get("q_per_tensor"):
        q = [{"filter": name.removesuffix("weight"), "value": value} for name, value in per_tensor.items()]
        q.append({"value": sum(per_tensor.values()) / len(per_tensor)})
    else:
        q = [{"value": params["q"]}]
    recipe = {
        "merge_method": "darex",
        "base_model": inputs["base"],
        "models": _models(case),
        "parameters": {
            "drop_rate": [whole, {"value": params["p"]}],
            "q": [whole | {"value": 1}, *q],
        },
    }
    return Run(recipe, (inputs["keep_mask"],))


def _analytic_q(case: Case) -> Run:
    """The case gives c = δ ⊙ a and wants a q for each row: one matrix per row, a = 1, and q = c / merged."""
    params, scratch = case["params"], Path(case["scratch"])
    rows = load_file(_folder(case) / case["inputs"]["c"])["c"].double()
    tuned = {f"row.{i}.weight": row[None].clone() for i, row in enumerate(rows)}
    save_file({name: torch.zeros_like(row) for name, row in tuned.items()}, scratch / "base.safetensors")
    save_file({name: torch.ones_like(row) for name, row in tuned.items()}, scratch / "mask.safetensors")
    save_file(tuned, scratch / "tuned.safetensors")
    save_file({name: torch.ones(rows.shape[1]) for name in tuned}, scratch / "ones.safetensors")
    recipe = {
        "merge_method": "darex",
        "base_model": str(scratch / "base.safetensors"),
        "models": [{"model": str(scratch / "tuned.safetensors")}],
        "statistics": {"activations": str(scratch / "ones.safetensors")},
        "parameters": {"drop_rate": params["p"], "q": "analytic", "eta": params["eta"], "gamma": params["gamma"]},
    }

    def outcome(merged: dict[str, Tensor]) -> dict[str, Tensor]:
        largest = [(name, int(row.abs().argmax())) for name, row in tuned.items()]
        return {"q": torch.stack([tuned[name][:, at] / merged[name][:, at] for name, at in largest])}

    return Run(recipe, (str(scratch / "mask.safetensors"),), outcome)


def _expert_merging(case: Case) -> Run:
    """The case multiplies tensors by chunks: task vectors on a base of zeros, `NAME_kK` with K coefficients."""
    scratch, inputs = Path(case["scratch"]), case["inputs"]
    tensors = load_file(_folder(case) / inputs["tensors"])
    coefficients = load_file(_folder(case) / inputs["coefs"])
    tuned = {name: tensors[name.partition("_")[0]] for name in coefficients}
    save_file({name: tensor.clone() for name, tensor in tuned.items()}, scratch / "tuned.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tuned.items()}, scratch / "base.safetensors")
    return Run(
        {
            "merge_method": "expert_merging",
            "base_model": str(scratch / "base.safetensors"),
            "models": [
                {
                    "model": str(scratch / "tuned.safetensors"),
                    "statistics": {"coefficients": inputs["coefs"]},
                }
            ],
        }
    )


def _breadcrumbs(case: Case) -> Run:
    params = case["params"]
    recipe: dict[str, Any] = {
        "merge_method": "breadcrumbs",
        "base_model": case["inputs"]["base"],
        "models": _models(case),
        "parameters": {"lambda": params["scaling"]},
    }
    if "top_k_keep" in params:
        recipe["semantics"] = "paper"
        recipe["parameters"] |= {key: params[key] for key in ("top_k_keep", "top_k_remove")}
        recipe["parameters"]["remove_first"] = params.get("remove_first", True)
    else:
        density, gamma = _shares_of_a_band(case)
        recipe["parameters"] |= {"weight": 1.0, "density": density, "gamma": gamma}
    return Run(recipe)


def _shares_of_a_band(case: Case) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """MergeLLM leaves out the int(N · bottom) smallest, keeps int(N · density) and one more on each side: per tensor
    the shares that mean the same.
    """
    shares: dict[str, tuple[float, float]] = {}
    for name, tensor in load_file(_folder(case) / case["inputs"]["base"]).items():
        entries = tensor.numel()
        below, kept = int(entries * case["params"]["bottom"]) - 1, int(entries * case["params"]["param_density"]) + 2
        shares[name] = ((kept + 0.5) / entries, (entries - below - kept + 0.5) / entries)
    by_length = sorted(shares, key=len, reverse=True)  # a filter is part of a name, the first that fits counts
    return tuple([{"filter": name, "value": shares[name][i]} for name in by_length] for i in (0, 1))  # type: ignore[return-value]


def _magnitude_prune(case: Case) -> Run:
    params, count = case["params"], len(case["inputs"]["models"])
    if params["combine"] != "average":
        raise Skip(f"magnitude pruning before {params['combine']} is not a method here")
    return Run(
        {
            "merge_method": "magnitude_prune",
            "base_model": case["inputs"]["base"],
            "models": _models(case),
            "parameters": {"drop_rate": params["p"], "weight": 1 / count},
            "exclude": [pattern.replace(".*", "") for pattern in params.get("exclude", ())],
        }
    )


def _eora(case: Case) -> Run:
    scratch, data = Path(case["scratch"]), load_file(_folder(case) / case["inputs"]["data"])
    for name in ("weight", "compressed", "activation_cov"):
        save_file({"approx": data[name]}, scratch / f"{name}.safetensors")
    return Run(
        {
            "merge_method": "eora",
            "base_model": str(scratch / "compressed.safetensors"),
            "models": [{"model": str(scratch / "weight.safetensors")}],
            "parameters": {"rank": case["params"]["rank"]},
            "statistics": {"covariance": str(scratch / "activation_cov.safetensors")},
        },
        outcome=lambda merged: {"approx": merged["approx"] - data["compressed"]},
    )


def _density_of_mask_rate(case: Case, rate: float) -> float:
    """MergeLM keeps |δ| ≥ its int(N · rate)-th smallest, TIES int(N · density) + 1 entries: the density that means the
    same.
    """
    entries = sum(
        tensor.numel()
        for tensor in load_file(_folder(case) / case["inputs"]["base"]).values()
        if tensor.is_floating_point()
    )
    return (entries - int(entries * rate) + 0.5) / entries


def _out_dtype(case: Case) -> dict[str, Any]:
    return {"out_dtype": case["params"]["out_dtype"]} if "out_dtype" in case["params"] else {}


def _folder(case: Case) -> Path:
    return Path(case["folder"])


ADAPTERS: dict[str, Callable[[Case], Run]] = {
    "uniform_soup": _uniform_soup,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "wise_ft": _wise_ft,
    "model_stock": _model_stock,
    "ties": _ties,
    "dare": _dare,
    "widen": _widen,
    "eora": _eora,
    "pcb": _pcb,
    "graft": _graft,
    "diff_transfer": _transfer,
    "ssd": _ssd,
    "darex_q": _darex_q,
    "darex_analytical_q": _analytic_q,
    "expert_merging_chunk": _expert_merging,
    "breadcrumbs": _breadcrumbs,
    "magnitude_prune": _magnitude_prune,
    **{f"mergekit/{name}": _mergekit for name in METHODS},
}
WHOLE_RECIPES = {f"mergekit-yaml/{name}" for name in METHODS}


def run_case(folder: Path, case: Case, scratch: Path) -> str:
    """What is wrong with our result: empty if nothing is. Raises `Skip`."""
    case = {**case, "folder": str(folder), "scratch": str(scratch)}
    if "informative" in str(case.get("notes", "")).lower():
        raise Skip("informative only, says its note")
    if case["method"] in WHOLE_RECIPES:
        return _run_whole_recipe(folder, case, scratch)
    if case["method"] == "greedy_soup":
        return _greedy_soup(folder, case, scratch)
    if case["method"] in ALIGNMENTS:
        return ALIGNMENTS[case["method"]](folder, case)
    if case["method"] == "rws":
        return _signatures(folder, case, scratch)
    if case["method"] not in ADAPTERS:
        raise Skip(f"no method {case['method']} here yet")
    run = ADAPTERS[case["method"]](case)
    recipe = json.loads(json.dumps(run.recipe))
    for entry in [recipe, *recipe["models"]]:
        entry |= {key: str(folder / entry[key]) for key in ("model", "base_model") if key in entry}
        entry |= {"statistics": {name: str(folder / file) for name, file in entry.get("statistics", {}).items()}}
    randomness = RecordedMasks([load_file(folder / path) for path in run.keep_masks]) if run.keep_masks else None
    merge(Recipe.from_data(recipe), scratch / "out", randomness=randomness)
    integers = load_file(recipe.get("base_model") or recipe["models"][0]["model"])
    return _compare(
        run.outcome(load_file(scratch / "out" / "model.safetensors")),
        load_file(folder / case["output"]),
        case["tolerance"],
        integers,
    )


def _greedy_soup(folder: Path, case: Case, scratch: Path) -> str:
    """A soup of models chosen by a score, which here is the nearness to a target: every candidate is merged."""
    paths = [str(folder / path) for path in case["inputs"]["models"]]
    target = load_file(folder / case["inputs"]["target"])

    def soup(chosen: Sequence[int]) -> dict[str, Tensor]:
        out = scratch / "-".join(map(str, chosen))
        if not out.exists():
            models = [{"model": paths[number]} for number in chosen]
            merge(Recipe.from_data({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}), out)
        return load_file(out / "model.safetensors")

    def score(chosen: Sequence[int]) -> float:
        merged = soup(chosen)
        far = torch.cat([(merged[name] - target[name]).flatten() for name in sorted(target)])
        return -float((far * far).mean())

    found = greedy_soup(len(paths), score)
    for what in ("order", "ingredients"):
        if [f"model_{number}" for number in getattr(found, what)] != case["expected"][what]:
            return f"{what}: {getattr(found, what)}, expected {case['expected'][what]}"
    return _compare(soup(found.ingredients), load_file(folder / case["output"]), case["tolerance"], {})


def _weight_matching(folder: Path, case: Case) -> str:
    """The authors' visits in their order: the same permutations, and the same midpoint of the models."""
    stored, expected = load_file(folder / case["output"]), case["expected"]
    with (
        Checkpoint.open(folder / case["inputs"]["models"][0]) as a,
        Checkpoint.open(folder / case["inputs"]["models"][1]) as b,
    ):
        spec = PermutationSpec.from_data(case["params"]["axes_to_perm"], _shapes(a))
        found = match(spec, a, b, visit_orders=expected["visit_orders"])
        one, other = _all_rows(a), _all_rows(Permuted(b, spec, found.indexed))
    if len(found.visit_orders) != expected["iterations"]:
        return f"{len(found.visit_orders)} sweeps, expected {expected['iterations']}"
    for what in ("l2_before", "l2_after"):
        if abs(getattr(found, what) - expected[what]) > 1e-6 * expected[what]:
            return f"{what} is {getattr(found, what)}, expected {expected[what]}"
    ours = {f"perm.{name}": torch.from_numpy(index) for name, index in found.indexed.items()}
    ours |= {f"permuted_b.{name}": tensor for name, tensor in other.items()}
    ours |= {f"midpoint.{name}": (one[name] + other[name]) / 2 for name in one}
    return _compare(ours, stored, case["tolerance"], {})


def _merge_many(folder: Path, case: Case) -> str:
    """The order of visits is random, so only how far the models are from their mean can be compared."""
    models = [Checkpoint.open(folder / path) for path in case["inputs"]["models"]]
    spec = PermutationSpec.from_data(case["params"]["axes_to_perm"], _shapes(models[0]))

    def dispersion(indexed: Sequence[Indexed]) -> float:
        tensors = [_all_rows(Permuted(model, spec, each)) for model, each in zip(models, indexed, strict=True)]
        far = [torch.stack([each[name].double() for each in tensors]) for name in tensors[0]]
        return sum(float((each - each.mean(0)).square().sum()) for each in far) / len(models)

    before = dispersion([spec.identity()] * len(models))
    after = dispersion(match_many(spec, models).indexed)
    for model in models:
        model.close()
    expected = case["expected"]
    if abs(before - expected["dispersion_before"]) > 1e-6 * before:
        return f"dispersion_before is {before}, expected {expected['dispersion_before']}"
    if after > 1.02 * expected["dispersion_after"]:
        return f"dispersion_after is {after}, expected at most 1.02 * {expected['dispersion_after']}"
    return ""


def _shapes(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in model.tensors.items()}


def _all_rows(model: Weights) -> dict[str, Tensor]:
    return {name: model.rows(info, 0, info.rows) for name, info in model.tensors.items()}


ALIGNMENTS = {"weight_matching": _weight_matching, "merge_many": _merge_many}


def _signatures(folder: Path, case: Case, scratch: Path) -> str:
    """A signature for each corruption, put on the clean model or another. The official weights are those of which ours
    are the squares.
    """
    params, inputs = case["params"], case["inputs"]
    stored: dict[str, Any] = {"encoding": "dense"}
    if "quantization" in params:
        stored = {"levels": params["quantization"], "scale": params["quantization_type"]}
    patches = []
    for i, weight in enumerate(params["weight"]):
        document = {
            "operation": "extract",
            "base_model": str(folder / inputs["pretrained"]),
            "clean": str(folder / inputs["clean"]),
            "corrupted": [str(folder / inputs["corrupted"][i])],
            "layers": params["keep_num"],
            **stored,
        }
        patch(Patch.from_data(document), scratch / f"signature-{i}")
        patches.append({"patch": str(scratch / f"signature-{i}"), "strength": weight**2})
    target = inputs["clean" if params["target"] == "clean" else "patched_target"]
    apply = {"operation": "apply", "model": str(folder / target), "patches": patches}
    patch(Patch.from_data(apply), scratch / "out")
    ours = load_file(scratch / "out" / "model.safetensors")
    return _compare(ours, load_file(folder / case["output"]), case["tolerance"], {})


def _run_whole_recipe(folder: Path, case: Case, scratch: Path) -> str:
    """A `mergekit_config.yml` on checkpoints with a config: weights and config must come out alike."""
    recipe, inputs = json.loads(json.dumps(case["params"]["config"])), case["inputs"]
    for name, path in [("base", inputs.get("base")), *((f"m{i}", path) for i, path in enumerate(inputs["models"]))]:
        if path:
            (scratch / name).mkdir()
            (scratch / name / "config.json").write_text(json.dumps(inputs["config"]))
            save_file(load_file(folder / path), scratch / name / "model.safetensors")
    merge(Recipe.from_data(recipe), scratch / "out", roots=[scratch])
    config, expected = json.loads((scratch / "out" / "config.json").read_text()), case.get("expected") or {}
    wrong = [
        f"config.json says {key} = {config.get(key)}, expected {value}"
        for key, value in expected.items()
        if key in config and config[key] != value
    ]
    if "dtype" in expected and expected["dtype"] not in (config.get("dtype"), config.get("torch_dtype")):
        wrong.append(f"config.json does not say dtype {expected['dtype']}")
    ours = load_file(scratch / "out" / "model.safetensors")
    return "; ".join(filter(None, [*wrong, _compare(ours, load_file(folder / case["output"]), case["tolerance"], {})]))


def _compare(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    tolerance: Mapping[str, float],
    originals: Mapping[str, Tensor],
) -> str:
    if ours.keys() != theirs.keys():
        return f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:5]}"
    for name, expected in theirs.items():
        got = ours[name]
        if got.shape != expected.shape:
            return f"{name} is {list(got.shape)}, expected {list(expected.shape)}"
        if not got.is_floating_point():
            # Buffers that official code averages into floats stay as they are here, by contract.
            if not torch.equal(got, originals.get(name, expected)):
                return f"{name} holds integers, and they were changed"
            continue
        if "max_ulp_bf16" in tolerance:
            if got.dtype != torch.bfloat16:
                return f"{name} is {got.dtype}, expected bfloat16"
            if (distance := int(_ulps(got, expected).max()) if got.numel() else 0) > tolerance["max_ulp_bf16"]:
                return f"{name} is {distance} ulp away"
        elif not torch.allclose(got.double(), expected.double(), rtol=tolerance["rtol"], atol=tolerance["atol"]):
            return f"{name} is {float((got.double() - expected.double()).abs().max()):.3g} away"
    return ""


def _ulps(one: Tensor, other: Tensor) -> Tensor:
    """Distance in bf16 numbers that lie between."""

    def ordered(values: Tensor) -> Tensor:
        bits = values.to(torch.bfloat16).view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(one) - ordered(other)).abs()


def main(folder: Path) -> int:
    """Run every case of a folder, print a line each and the count; 1 if any failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in json.loads((folder / "manifest.json").read_text())["cases"]:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                wrong = run_case(folder, case, Path(scratch))
                outcome, why = ("failed", wrong) if wrong else ("passed", "")
            except Skip as reason:
                outcome, why = "skipped", str(reason)
            except Exception as error:
                outcome, why = "failed", f"{type(error).__name__}: {error}"
        counts[outcome] += 1
        print(f"{outcome}  {case['id']}{f'  ({why})' if why else ''}")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

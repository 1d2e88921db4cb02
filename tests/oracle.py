"""Runs recipes end to end on tiny models, by mergekit and by us, and compares what comes out.

    python -m tests.oracle [FOLDER]

mergekit 0.1.5 is an oracle in an environment of its own, never a dependency: `make bench-peer` makes it, or `MERGEKIT`
names its executable `mergekit-yaml`. The recipes are those of `tests/data/oracle.yml`, which says how they are
compared; models and outputs are left in FOLDER where it is given. Prints a line per recipe and last `N passed, N
failed, N skipped`; exits with 1 if one failed.

mergekit computes in the dtype of its inputs unless the recipe says `dtype: float32`. So the recipes say it, with
bfloat16 written: what is compared is what a recipe means, not how bfloat16 rounds in between. Every number must be
within one bf16 unit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.errors import WeightsmithError
from merge_core.merge import merge
from merge_core.recipe import Recipe

HERE = Path(__file__).parent
RECIPES = HERE / "data" / "oracle.yml"
MERGEKIT = HERE.parent / ".venv-peer" / "bin" / "mergekit-yaml"
DTYPES = {"dtype": "float32", "out_dtype": "bfloat16"}
HIDDEN, INNER, LAYERS, VOCABULARY = 64, 96, 4, 128
ACCUMULATED = 2.0**-20
"""Where numbers cancel, float32 leaves noise: so much of a tensor's largest number counts as one unit at least."""

Comparison = Literal["numbers", "counts", "chances"]


@dataclass(frozen=True)
class Trial:
    """One recipe, and how its outputs are compared.

    `numbers`: every number within one bf16 unit. Of tensors whose names contain a key of `differ`, so large a share may
    be further away, for the reason `because`: words of the method's docstring, or of docs/recipes.md.
    `counts`: as many numbers of each tensor differ from the base's. `chances`: what is random agrees on average.
    """

    title: str
    documents: Sequence[dict[str, Any]]
    compare: Comparison = "numbers"
    differ: Mapping[str, float] = field(default_factory=dict)
    because: str = ""

    @property
    def recipe(self) -> str:
        """The text that both read."""
        return yaml.safe_dump_all([{**DTYPES, **each} for each in self.documents], sort_keys=False)


def trials() -> list[Trial]:
    """Those of `tests/data/oracle.yml`."""
    found = yaml.safe_load(RECIPES.read_text())["trials"]
    return [Trial(**{"documents": [each.pop("recipe")] if "recipe" in each else [], **each}) for each in found]


# Tiny models


def shapes(rows: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """A Llama's tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for layer in range(LAYERS):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
                "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "mlp.gate_proj": (INNER, HIDDEN),
                "mlp.up_proj": (INNER, HIDDEN),
                "mlp.down_proj": (HIDDEN, INNER),
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
            }.items()
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (rows, HIDDEN)}


def write_models(folder: Path) -> None:
    """What the recipes name: `base`, `one`, `two`, `three` in bfloat16; the same with `32` in float32, where no two
    changes in a tensor are of equal magnitude; those with `-tied` without head; `same32` and `again32`, copies
    of `base32` and `one32`; `latin`, `chat` and `other` with
    tokenizers; `adapter`, a LoRA.
    """
    for place, name in enumerate(("base", "one", "two", "three")):
        random = torch.Generator().manual_seed(place)
        changed = 1 - 0.25 * max(place - 1, 0)
        rough, fine = {}, {}
        for number, (tensor, shape) in enumerate(shapes().items()):
            start = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(100 + number))
            is_changed = (torch.rand(shape, generator=random) < changed) & (place > 0)
            rough[tensor] = torch.where(
                is_changed, start + 0.05 * torch.randn(shape, generator=random), start
            ).bfloat16()
            # On grids so coarse and so fine that every difference is exact in float32.
            grid = (start.clamp(-1.8, 1.8) * 256).round() / 256
            fine[tensor] = torch.where(is_changed, grid + _distinct(shape, random), grid)
        write_model(folder / name, rough)
        write_model(folder / f"{name}32", fine)
        write_model(folder / f"{name}-tied", {key: value for key, value in rough.items() if key != "lm_head.weight"})
    shutil.copytree(folder / "base32", folder / "same32")
    shutil.copytree(folder / "one32", folder / "again32")
    for seed, (name, tokens, added) in enumerate(VOCABULARIES):
        random = torch.Generator().manual_seed(20 + seed)
        size = len(tokens) + len(added)
        weights = {
            tensor: (0.3 * torch.randn(shape, generator=random)).bfloat16() for tensor, shape in shapes(size).items()
        }
        write_model(folder / name, weights, tokenizer=tokenizer(tokens, added))
    write_adapter(folder / "adapter")


def _distinct(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Normal changes, no two of which have the same magnitude, each a multiple of 2⁻²³."""
    count = math.prod(shape)
    ranks = (torch.randperm(count, generator=random).double() + 0.5) / count
    sizes = (torch.erfinv(ranks) * math.sqrt(2) * 2**17).round() * 2.0**-23
    signs = torch.randint(0, 2, (count,), generator=random) * 2 - 1
    return (sizes * signs).float().reshape(shape)


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, tokenizer: Mapping[str, Any] | None = None) -> None:
    """A checkpoint as transformers reads it."""
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": str(tensors["model.norm.weight"].dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text(json.dumps(about))


VOCABULARIES: Sequence[tuple[str, Sequence[str], Sequence[str]]] = (
    ("latin", ("<s>", "</s>", *"abcdehotĠ", "at", "th", "the", "cat", "Ġthe", "Ġcat"), ()),
    ("chat", ("<s>", "</s>", *"abcdehotĠ", "at", "th", "the", "cat", "Ġthe", "Ġcat"), ("<|im_start|>", "<|im_end|>")),
    ("other", ("<s>", "</s>", *"adegnoĠ", "do", "dog", "Ġdog", "an"), ("<|im_end|>", "<|own|>")),
)


def tokenizer(tokens: Sequence[str], added: Sequence[str]) -> dict[str, Any]:
    """A byte-level BPE `tokenizer.json` whose merges are all that the tokens allow."""
    ids = {token: i for i, token in enumerate(tokens)}
    plain = [token for token in tokens if not token.startswith("<")]
    cuts = [(token[:cut], token[cut:]) for token in plain for cut in range(1, len(token))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [*(token for token in tokens if token.startswith("<")), *added]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids.get(token, len(tokens) + place - 2), "content": token, **flags}
            for place, token in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "vocab": ids,
            "merges": [[left, right] for left, right in cuts if left in ids and right in ids],
        },
    }


def write_adapter(folder: Path) -> None:
    """A LoRA on two kinds of matrices, in PEFT's layout."""
    random, tensors, rank = torch.Generator().manual_seed(9), {}, 4
    for name, shape in shapes().items():
        if "q_proj" in name or "down_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(rank, shape[1], generator=random)
            tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(shape[0], rank, generator=random)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 6, "bias": "none"}
    config |= {"base_model_name_or_path": "base", "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# Comparing


@dataclass
class Difference:
    """What is wrong, if anything, and what there is to say else."""

    wrong: list[str] = field(default_factory=list)
    said: str = ""


def units(ours: Tensor, theirs: Tensor) -> Tensor:
    """Differences, in bf16 units of the larger number."""
    one, other = ours.double(), theirs.double()
    larger = torch.maximum(one.abs(), other.abs())
    unit = torch.exp2(torch.frexp(larger).exponent.double() - 8)
    least = ACCUMULATED * (larger.max() if larger.numel() else 0.0)
    return (one - other).abs() / unit.clamp(min=least).clamp(min=torch.finfo(torch.float64).tiny)


def compare(trial: Trial, ours: Path, theirs: Path, models: Path) -> Difference:
    """Files against files."""
    one, other = load_model(ours), load_model(theirs)
    words = [_vocabulary(folder) for folder in (ours, theirs)]
    if words[0].keys() == words[1].keys():
        other = _renumbered(other, *words)
    if wrong := _layout(one, other, ours, theirs):
        return Difference(wrong)
    if trial.compare == "numbers":
        return _numbers(trial, one, other)
    base, *others = (load_model(models / each) for each in _models(trial))
    if trial.compare == "counts":
        return _counts(one, other, base)
    return _chances(one, other, base, others)


def _models(trial: Trial) -> list[str]:
    recipe = trial.documents[0]
    return [recipe["base_model"], *(each["model"] for each in recipe["models"])]


def load_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _layout(one: Mapping[str, Tensor], other: Mapping[str, Tensor], ours: Path, theirs: Path) -> list[str]:
    wrong = [f"{name} is only in one" for name in sorted(one.keys() ^ other.keys())]
    for name in sorted(one.keys() & other.keys()):
        ways = [(tuple(each[name].shape), str(each[name].dtype)) for each in (one, other)]
        if ways[0] != ways[1]:
            wrong.append(f"{name} is {ways[0]}, theirs {ways[1]}")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    wrong += [
        f"config.json says {key} {configs[0].get(key)}, theirs {configs[1].get(key)}"
        for key in ("num_hidden_layers", "vocab_size", "tie_word_embeddings")
        if configs[0].get(key) != configs[1].get(key)
    ]
    kinds = [config.get("dtype") or config.get("torch_dtype") for config in configs]
    if kinds[0] != kinds[1]:
        wrong.append(f"config.json says dtype {kinds[0]}, theirs {kinds[1]}")
    words = [_vocabulary(folder) for folder in (ours, theirs)]
    if words[0].keys() != words[1].keys():
        wrong.append(f"only one tokenizer has {sorted(words[0].keys() ^ words[1].keys())[:5]}")
    talks = [_chat(folder) for folder in (ours, theirs)]
    if talks[0] != talks[1]:
        wrong.append(f"the chat template writes {talks[0]!r}, theirs {talks[1]!r}")
    return wrong


def _vocabulary(folder: Path) -> dict[str, int]:
    if not (folder / "tokenizer.json").exists():
        return {}
    definition = json.loads((folder / "tokenizer.json").read_text())
    added = {entry["content"]: entry["id"] for entry in definition["added_tokens"]}
    return {**definition["model"]["vocab"], **added}


def _renumbered(tensors: Mapping[str, Tensor], ours: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, Tensor]:
    """Embeddings with our ids: mergekit numbers new tokens in the order of a set, which differs from run to run."""
    found = dict(tensors)
    if ours != theirs:
        for name in found.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            found[name] = tensors[name].clone()
            for token, place in ours.items():
                found[name][place] = tensors[name][theirs[token]]
    return found


def _chat(folder: Path) -> str:
    """A talk as the chat template writes it, which may be said in many ways."""
    about, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    text = json.loads(about.read_text()).get("chat_template", "") if about.exists() else ""
    text = template.read_text() if template.exists() else text
    talk = [{"role": role, "content": f"the {role}"} for role in ("system", "user", "assistant", "user")]
    written = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    return written.render(messages=talk, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")


def _numbers(trial: Trial, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Difference:
    wrong, entries, unequal, far, worst = [], 0, 0, 0, 0.0
    for name, tensor in ours.items():
        found = units(tensor, theirs[name])
        here = int((~(found <= 1)).sum())  # also counts NaN
        allowed = max((share for part, share in trial.differ.items() if part in name), default=0.0)
        if here > allowed * tensor.numel():
            wrong.append(f"{name}: {here} of {tensor.numel()} further than a unit away, by {float(found.max()):.3g}")
        entries, far = entries + tensor.numel(), far + here
        unequal, worst = unequal + int((found != 0).sum()), max(worst, float(found.max()) if found.numel() else 0.0)
    if far:
        return Difference(wrong[:4], f"{far} of {entries} are further than a unit away: {trial.because}")
    return Difference(said=f"{unequal} of {entries} differ, by {worst:.2g} bf16 units at most" if unequal else "equal")


def _counts(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Difference:
    moved = {
        name: tuple(int((each[name] != base[name].to(each[name])).sum()) for each in (ours, theirs)) for name in ours
    }
    wrong = [f"{name}: {ours} moved, theirs {theirs}" for name, (ours, theirs) in moved.items() if ours != theirs]
    total = sum(count for count, _ in moved.values())
    return Difference(
        wrong[:4], f"as many differ from the base in every tensor, {total} in all: ties are cut otherwise"
    )


def _chances(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
) -> Difference:
    """Of what is random: the share that moved by tenth of magnitude, the mean, and the size of what did."""
    one, other = (_moves(output, base) for output in (ours, theirs))
    deltas = [_moves(model, base) for model in models]
    whole = torch.stack(deltas).sum(0)
    places = deltas[0].abs().argsort().argsort() * 10 // len(whole)
    figures = {
        f"tenth {place + 1}": [float((each[places == place] != 0).double().mean()) for each in (one, other)]
        for place in range(10)
    }
    for title, measure in {
        "moved": lambda each: (each != 0).double().mean(),
        "along": lambda each: (each * whole).sum() / (whole * whole).sum(),
        "L1": lambda each: each.abs().sum() / whole.abs().sum(),
        "L2": lambda each: (each * each).sum().sqrt() / (whole * whole).sum().sqrt(),
    }.items():
        figures[title] = [float(measure(each)) for each in (one, other)]
    wrong = [
        f"{title}: {one:.4f}, theirs {other:.4f}" for title, (one, other) in figures.items() if abs(one - other) > 0.025
    ]
    shown = ", ".join(
        f"{title} {figures[title][0]:.3f} and {figures[title][1]:.3f}" for title in ("moved", "along", "L1")
    )
    return Difference(wrong, f"random; on average alike, ours and theirs: {shown}")


def _moves(model: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([(model[name].double() - base[name].double()).flatten() for name in base])


# Running


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        if given.exists() and any(given.iterdir()):
            sys.exit(f"{given} is not empty; name a new folder")
        given.mkdir(parents=True, exist_ok=True)
        yield given.absolute()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def their_failures(mergekit: Path, folder: Path, chosen: Sequence[Trial]) -> Iterator[str | None]:
    """Run the trials by mergekit, one after the other, and say what each failed with."""
    jobs = [
        {
            "recipe": f"{folder}/{number}.yml",
            "out": f"{folder}/theirs/{number}",
            "several": len(trial.documents) > 1,
            "work": f"{folder}/work/{number}",
        }
        for number, trial in enumerate(chosen)
    ]
    for job, trial in zip(jobs, chosen, strict=True):
        Path(job["recipe"]).write_text(trial.recipe)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(mergekit.parent / "python"), str(HERE / "mergekit_runs.py"), str(folder / "jobs.json")]
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (
        (folder / "mergekit.log").open("w") as log,
        subprocess.Popen(
            command, cwd=folder / "models", env={**os.environ, **offline}, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for _, line in zip(chosen, process.stdout, strict=True):
            yield json.loads(line)


def judge(trial: Trial, number: int, folder: Path, failure: str | None) -> tuple[str, str]:
    """How a trial ended, and why."""
    if failure:
        return "skipped", f"mergekit fails: {failure}"
    try:
        merge(Recipe.from_text(trial.recipe), folder / "ours" / str(number), roots=[folder / "models"])
    except WeightsmithError as error:
        return "failed", f"refused here: {error}"
    found = compare(trial, folder / "ours" / str(number), folder / "theirs" / str(number), folder / "models")
    return ("failed", "; ".join(found.wrong)) if found.wrong else ("passed", found.said)


def run(chosen: Sequence[Trial], mergekit: Path, folder: Path) -> Iterable[tuple[Trial, str, str]]:
    """Every trial with how it ended and why."""
    if not mergekit.exists():
        why = f"there is no mergekit at {mergekit}: `make bench-peer` installs one, MERGEKIT=…/mergekit-yaml names one"
        yield from ((trial, "skipped", why) for trial in chosen)
        return
    write_models(folder / "models")
    for number, failure in enumerate(their_failures(mergekit, folder, chosen)):
        yield chosen[number], *judge(chosen[number], number, folder, failure)


def main(given: Path | None) -> int:
    """Run every trial, print a line each and the count; 1 if any failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    with _folder(given) as folder:
        for trial, outcome, why in run(trials(), Path(os.environ.get("MERGEKIT", MERGEKIT)), folder):
            counts[outcome] += 1
            print(f"{outcome}  {trial.title}  ({why})", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else None))

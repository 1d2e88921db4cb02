"""Evaluators of ours, on transformers: perplexity, multiple choice, classification of texts and images.

A candidate is loaded whole, from its folder alone: nothing is fetched, and no code of a model is run. All numbers are
made in float32 on a CPU. After each quarter of the data it is told how good the candidate is so far.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_core.errors import Canceled, EvaluationFailed
from merge_core.imports import whole_torch
from workers.evaluators import Around, digest_of
from workers.evaluators.data import Shelves, field_of, image_of, rows_of, sha256_of, text_of

if TYPE_CHECKING:
    from merge_core.search.keys import ClassificationKeys, DataKeys, MultipleChoiceKeys, PerplexityKeys
    from merge_core.search.trials import Candidate

_PARTS = 4
_LARGEST = 700.0
"""Above this the exponential of a loss is no finite number."""


class _OfData:
    """What evaluators with a file of data share (`merge_core.search.trials.Evaluator`)."""

    needs_folder = True
    kind = ""

    def __init__(self, around: Around, keys: DataKeys) -> None:
        settings = around.settings
        self.data, self._roots = Shelves(around.store, around.lease.owner, around.roots).open(keys.file)
        self._told = keys.model_dump(exclude={"file", "batch"}) | {"data": sha256_of(self.data, self._roots)}
        self._device = settings.device
        self._threads = around.document.limits.threads or settings.threads or len(os.sched_getaffinity(0))

    @property
    def digest(self) -> str:
        return digest_of(self.kind, transformers=version("transformers"), **self._told)

    def evaluate(self, candidate: Candidate) -> Mapping[str, Any]:
        assert candidate.folder is not None
        with quietly(self._threads):
            return self._measure(candidate, candidate.folder)

    def _measure(self, candidate: Candidate, folder: Path) -> Mapping[str, float]:
        raise NotImplementedError

    def _loaded(self, folder: Path, kind: str) -> Any:
        """The candidate, by one of transformers' classes."""
        import transformers

        device = "cuda" if self._device == "auto" and torch.cuda.is_available() else self._device.replace("auto", "cpu")
        dtype = torch.float32 if device == "cpu" else "auto"
        return load(getattr(transformers, kind), folder, dtype=dtype, use_safetensors=True).to(device).eval()

    @staticmethod
    def _tokenizer(folder: Path) -> Any:
        import transformers

        return load(transformers.AutoTokenizer, folder)


class Perplexity(_OfData):
    """Of a text in windows that do not overlap, of each all tokens but the first: `perplexity`, and `loss` in nats."""

    kind = "perplexity"

    def __init__(self, around: Around, keys: PerplexityKeys) -> None:
        super().__init__(around, keys)
        self._keys = keys

    def _measure(self, candidate: Candidate, folder: Path) -> Mapping[str, float]:
        model, tokenizer = self._loaded(folder, "AutoModelForCausalLM"), self._tokenizer(folder)
        tokens = tokenizer(text_of(self.data, self._roots), verbose=False)["input_ids"]
        size = min(self._keys.context, positions(model))
        windows = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        windows = [window for window in windows if len(window) > 1][: self._keys.limit]
        if not windows:
            raise EvaluationFailed(f"{self.data.name} has {len(tokens)} tokens; perplexity needs two")
        total, count = 0.0, 0

        def so_far() -> dict[str, float]:
            loss = total / count
            return {"perplexity": math.exp(min(loss, _LARGEST)), "loss": loss}

        for some in _in_parts(windows, self._keys.batch, candidate, so_far):
            scored, mask = _log_likelihoods(model, some)
            total -= float(scored.sum())
            count += int(mask.sum())
        return so_far()


class MultipleChoice(_OfData):
    """How often the right choice is the most likely to follow its question: `accuracy`."""

    kind = "multiple_choice"

    def __init__(self, around: Around, keys: MultipleChoiceKeys) -> None:
        super().__init__(around, keys)
        self._keys = keys

    def _measure(self, candidate: Candidate, folder: Path) -> Mapping[str, float]:
        model, tokenizer = self._loaded(folder, "AutoModelForCausalLM"), self._tokenizer(folder)
        rows = _first(rows_of(self.data, self._roots), self._keys.limit, self.data)
        right = count = 0
        size = positions(model)

        def so_far() -> dict[str, float]:
            return {"accuracy": right / count}

        for some in _in_parts(rows, max(1, self._keys.batch // 4), candidate, so_far):
            asked = [self._choices(row, place, tokenizer, size) for place, row in some]
            whole = [tokens for choices, _ in asked for tokens, _, _ in choices]
            scores: list[float] = []
            for start in range(0, len(whole), self._keys.batch):
                scored, _ = _log_likelihoods(model, whole[start : start + self._keys.batch])
                begins = [begin for choices, _ in asked for _, begin, _ in choices][start : start + self._keys.batch]
                scores += [float(row[begin - 1 :].sum()) for row, begin in zip(scored, begins, strict=True)]
            for choices, answer in asked:
                mine, scores = scores[: len(choices)], scores[len(choices) :]
                sizes = [length if self._keys.normalize else 1 for _, _, length in choices]
                likely = [score / size for score, size in zip(mine, sizes, strict=True)]
                right += likely.index(max(likely)) == answer
                count += 1
        return so_far()

    def _choices(
        self, row: Mapping[str, Any], place: str, tokenizer: Any, size: int
    ) -> tuple[list[tuple[list[int], int, int]], int]:
        """Of each choice the tokens of question and choice, where the choice begins, and its bytes; the right one."""
        keys = self._keys
        question = str(field_of(row, keys.question, place))
        choices, answer = field_of(row, keys.choices, place), field_of(row, keys.answer, place)
        if isinstance(choices, Mapping):  # as many data sets on the Hub have it
            choices = choices.get("text")
        if not isinstance(choices, list) or len(choices) < 2:
            raise EvaluationFailed(f"{place}: {keys.choices!r} is a list of two texts or more")
        texts = [str(choice) for choice in choices]
        if isinstance(answer, str):
            answer = texts.index(answer) if answer in texts else int(answer) if answer.isdecimal() else -1
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
            raise EvaluationFailed(f"{place}: {keys.answer!r} is neither the number of a choice, from 0, nor its text")
        before = tokenizer(question, verbose=False)["input_ids"]
        found = []
        for text in texts:
            space = "" if not question or question[-1].isspace() or text[:1].isspace() else " "
            tokens = tokenizer(f"{question}{space}{text}", verbose=False)["input_ids"]
            same = next((i for i, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b), len(before))
            begin = max(1, min(same, len(tokens) - 1))
            if len(tokens) < 2:
                raise EvaluationFailed(f"{place}: question and choice have {len(tokens)} tokens; two are needed")
            cut = max(0, len(tokens) - size)
            found.append((tokens[cut:], max(1, begin - cut), max(1, len(text.encode()))))
        return found, answer


class Classification(_OfData):
    """How often a classifier of texts or images names the right class: `accuracy`."""

    kind = "classification"

    def __init__(self, around: Around, keys: ClassificationKeys) -> None:
        super().__init__(around, keys)
        self._keys = keys

    def _measure(self, candidate: Candidate, folder: Path) -> Mapping[str, float]:
        keys = self._keys
        is_image = keys.image is not None
        model = self._loaded(folder, f"AutoModelFor{'Image' if is_image else 'Sequence'}Classification")
        prepare = self._images(folder) if is_image else self._texts(folder, model)
        rows = _first(rows_of(self.data, self._roots), keys.limit, self.data)
        right = count = 0

        def so_far() -> dict[str, float]:
            return {"accuracy": right / count}

        for some in _in_parts(rows, keys.batch, candidate, so_far):
            labels = [label_of(field_of(row, keys.label, place), model.config, place) for place, row in some]
            given = {name: value.to(model.device) for name, value in prepare(some).items()}
            guessed = model(**given).logits.argmax(-1).tolist()
            right += sum(a == b for a, b in zip(labels, guessed, strict=True))
            count += len(labels)
        return so_far()

    def _texts(self, folder: Path, model: Any) -> Callable[[Any], Any]:
        keys, tokenizer = self._keys, self._tokenizer(folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = (
            tokenizer.pad_token_id if model.config.pad_token_id is None else model.config.pad_token_id
        )
        size = positions(model)

        def prepare(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
            texts = [str(field_of(row, keys.text, place)) for place, row in rows]
            pairs = None if keys.pair is None else [str(field_of(row, keys.pair, place)) for place, row in rows]
            return tokenizer(texts, pairs, padding=True, truncation=True, max_length=size, return_tensors="pt")

        return prepare

    def _images(self, folder: Path) -> Callable[[Any], Any]:
        import transformers

        keys, processor = self._keys, load(transformers.AutoImageProcessor, folder, backend="pil")
        assert keys.image is not None
        name = keys.image

        def prepare(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
            images = [image_of(field_of(row, name, place), self.data, self._roots, place) for place, row in rows]
            return processor(images=images, return_tensors="pt")

        return prepare


class Harness:
    """Tasks of lm-evaluation-harness (`merge_core.search.trials.Evaluator`).

    Each metric is `task/metric`, or `task/metric,filter` where the task has filters, as the harness calls them.
    """

    needs_folder = True

    def __init__(self, around: Around, keys: Any) -> None:
        self._keys, self._device = keys, around.settings.device

    @property
    def digest(self) -> str:
        told = self._keys.model_dump(exclude={"batch"})
        return digest_of("lm_eval", version=version("lm_eval"), **told)

    def evaluate(self, candidate: Candidate) -> Mapping[str, Any]:
        from lm_eval import simple_evaluate

        keys = self._keys
        is_cpu = self._device == "cpu" or (self._device == "auto" and not torch.cuda.is_available())
        model = {"pretrained": str(candidate.folder), "trust_remote_code": False}
        with quietly(len(os.sched_getaffinity(0))), Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            try:
                found = simple_evaluate(
                    model="hf",
                    model_args=model | {"dtype": "float32" if is_cpu else "auto"},
                    tasks=list(keys.tasks),
                    num_fewshot=keys.shots,
                    batch_size=keys.batch,
                    limit=keys.limit,
                    device="cpu" if is_cpu else self._device.replace("auto", "cuda"),
                    log_samples=False,
                )
            except Exception as error:  # whatever a task of others stumbles over is about it, not about us
                raise EvaluationFailed(f"lm-evaluation-harness: {type(error).__name__}: {str(error)[:300]}") from error
        results = found["results"] if found else {}
        return {
            f"{task}/{name.removesuffix(',none')}": value
            for task, metrics in results.items()
            for name, value in metrics.items()
            if "," in name
        }


def load(kind: Any, folder: Path, **how: Any) -> Any:
    """Whatever of transformers a folder has. Raises `EvaluationFailed`."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **how)
    except Exception as error:  # transformers raises whatever it stumbles over; it is about the candidate's files
        what = f"{kind.__name__} of transformers cannot load the candidate"
        raise EvaluationFailed(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error


@contextmanager
def quietly(threads: int, *, gradients: bool = False) -> Iterator[None]:
    """So many threads of torch, no `gradients`, and nothing on the standard error output that nobody asked for."""
    whole_torch()
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings(), nullcontext() if gradients else torch.inference_mode():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)


def _first(rows: Iterator[tuple[str, Any]], limit: int | None, data: Path) -> list[tuple[str, Any]]:
    from itertools import islice

    if not (found := list(islice(rows, limit))):
        raise EvaluationFailed(f"{data.name} has no examples")
    return found


def _in_parts(
    every: Sequence[Any], batch: int, candidate: Candidate, so_far: Callable[[], Mapping[str, float]]
) -> Iterator[Sequence[Any]]:
    """Batches; after each quarter but the last the candidate is told how good it is."""
    told = 0
    for start in range(0, len(every), batch):
        part = start * _PARTS // len(every)
        if part > told:
            told = part
            if candidate.metric in (metrics := so_far()):
                candidate.tell(part, metrics[candidate.metric])
        if candidate.stop():
            raise Canceled("the search was canceled")
        yield every[start : start + batch]


def positions(model: Any) -> int:
    """How many tokens a model takes."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2**20)


def _log_likelihoods(model: Any, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The log-likelihood of each token given those before, `[rows, longest - 1]`, 0 where a row has ended; and where it
    has not.
    """
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return found.masked_fill(mask[:, 1:] == 0, 0.0), mask[:, 1:]


def label_of(written: Any, config: Any, place: str) -> int:
    """A class by its number, or by its name in a model's config. Raises `EvaluationFailed`."""
    names = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    if isinstance(written, str):
        number = names.get(written, int(written) if written.isdecimal() else -1)
    else:
        number = int(written) if isinstance(written, int | bool) else -1
    if not 0 <= number < config.num_labels:
        detail = f"{str(written)[:60]!r} is no class of the model, which has {', '.join(list(names)[:20])}"
        raise EvaluationFailed(f"{place}: {detail}")
    return number

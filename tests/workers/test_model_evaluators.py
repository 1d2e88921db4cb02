"""Evaluators of ours: what transformers computes is what is told, and what cannot be scored is told in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from merge_core.errors import CheckpointNotFound, EvaluationFailed, PathNotAllowed, RecipeError
from merge_core.search.document import Search
from merge_core.search.run import search
from merge_core.search.trials import Candidate, Pruned, Trial
from workers import evaluators
from workers.evaluators import Around, check_evaluator, evaluator_of
from workers.evaluators.data import Shelves
from workers.jobs import JobKind, Lease
from workers.settings import Settings

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "away"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def write_world(folder: Path) -> Path:
    """Models with all that belongs to them, and data; nothing is trained."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = {"vocab_size": len(vocabulary), "max_position_embeddings": 32}
    for name in ("lm", "other"):
        LlamaForCausalLM(LlamaConfig(**sizes, **size, num_key_value_heads=2)).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    classes = {"id2label": {0: "cats", 1: "dogs", 2: "none"}, "label2id": {"cats": 0, "dogs": 1, "none": 2}}
    BertForSequenceClassification(BertConfig(**sizes, **size, **classes)).save_pretrained(folder / "texts")
    fast.save_pretrained(folder / "texts")
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, **classes)).save_pretrained(
        folder / "images"
    )
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "images")
    (folder / "text.txt").write_text(" ".join(WORDS * 5))
    return folder


@pytest.fixture
def scores(world: Path, tmp_path: Path) -> Callable[..., Mapping[str, Any]]:
    """What an evaluator says of a model."""

    def score(model: str, *, told: Any = None, bars: Any = {}, **evaluator: Any) -> Mapping[str, Any]:  # noqa: B006
        around = around_of(world, tmp_path, **evaluator)
        candidate = Candidate(
            Trial(0, {}, "d"), around.document, "plan", world / model, lambda: False, bars, "perplexity", "minimize"
        )
        found = evaluator_of(around).evaluate(candidate)
        if told is not None:
            told.update(candidate.steps)
        return found

    return score


def around_of(world: Path, tmp_path: Path, **evaluator: Any) -> Around:
    settings = Settings(data=tmp_path, model_roots=[world], threads=1, evaluator_data_bytes=50_000)
    keys = {"method": "grid", "space": {"lambda": {"low": 0, "high": 1, "points": 3}}, "evaluator": evaluator}
    keys |= {"metrics": {"perplexity": "minimize"}}
    models = [{"model": "other", "parameters": {"weight": 1}}]
    document = Search.from_data(
        {"merge_method": "task_arithmetic", "base_model": "lm", "models": models, "search": keys}
    )
    lease = Lease("sch_1", "w/1", 1, JobKind.SEARCH, "ann", {})
    return Around(settings, SimpleNamespace(settings=settings), lease, document, settings.roots)  # type: ignore[arg-type]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def test_perplexity_is_that_of_transformers(world: Path, scores: Any) -> None:
    found = scores("lm", perplexity={"file": "text.txt", "context": 10, "batch": 2})
    model = LlamaForCausalLM.from_pretrained(world / "lm").eval()
    tokens = torch.tensor([WORDS.index(word) + 2 for word in WORDS * 5])
    with torch.no_grad():
        losses = [
            (float(model(input_ids=w[None], labels=w[None]).loss), len(w) - 1) for w in tokens.split(10) if len(w) > 1
        ]
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-5)
    assert scores("lm", perplexity={"file": "text.txt", "context": 10, "limit": 1})["loss"] == pytest.approx(
        losses[0][0]
    )


def test_after_each_quarter_a_candidate_is_told_how_good_it_is(scores: Any) -> None:
    told: dict[int, float] = {}
    keys = {"file": "text.txt", "context": 7, "batch": 2}
    found = scores("lm", told=told, perplexity=keys)
    assert sorted(told) == [1, 2, 3] and all(5 < value < 50 for value in told.values()) and found["perplexity"] > 0
    with pytest.raises(Pruned):
        scores("lm", bars={2: told[2] - 1e-6}, perplexity=keys)


def test_the_most_likely_choice_is_the_answer(world: Path, scores: Any) -> None:
    questions = ["the cat sat on", "a dog ran", "away and far"]
    choices = [["a mat", "the dog far away"], ["far", "mat"], ["cat", "the dog"]]
    model = LlamaForCausalLM.from_pretrained(world / "lm").eval()

    def likelihood(question: str, choice: str, each: bool) -> float:
        words = [*question.split(), *choice.split()]
        tokens = torch.tensor([[WORDS.index(word) + 2 for word in words]])
        with torch.no_grad():
            logs = model(input_ids=tokens).logits[0].log_softmax(-1)
        found = sum(float(logs[i - 1, tokens[0, i]]) for i in range(len(question.split()), len(words)))
        return found / len(choice) if each else found

    for normalize in (True, False):
        best = [
            max((0, 1), key=lambda i, q=q, c=c, n=normalize: likelihood(q, c[i], n))
            for q, c in zip(questions, choices, strict=True)
        ]
        rows = [
            {"q": question, "choices": given, "answer": answer}
            for question, given, answer in zip(questions, choices, best, strict=True)
        ]
        rows[1]["answer"] = choices[1][best[1]]  # by its text
        rows[2]["answer"] = 1 - best[2]
        file = lines(world / "choices.jsonl", rows)
        found = scores("lm", multiple_choice={"file": file, "question": "q", "normalize": normalize, "batch": 3})
        assert found == {"accuracy": pytest.approx(2 / 3)}


def test_a_classifier_of_texts_is_right_so_often(world: Path, scores: Any) -> None:
    model = BertForSequenceClassification.from_pretrained(world / "texts").eval()
    texts = ["the cat", "a dog ran far away", "mat"]
    guesses = []
    for text in texts:
        tokens = torch.tensor([[WORDS.index(word) + 2 for word in text.split()]])
        with torch.no_grad():
            guesses.append(int(model(input_ids=tokens).logits.argmax()))
    names = ["cats", "dogs", "none"]
    rows = [{"text": text, "label": guess} for text, guess in zip(texts, guesses, strict=True)]
    rows[1]["label"] = names[guesses[1]]
    rows[2]["label"] = (guesses[2] + 1) % 3
    assert scores("texts", classification={"file": lines(world / "t.jsonl", rows), "batch": 2}) == {"accuracy": 2 / 3}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**row, "label": str(row["label"])} for row in rows]), world / "t.parquet"
    )
    assert scores("texts", classification={"file": "t.parquet"}) == {"accuracy": 2 / 3}


def test_a_classifier_of_images_is_right_so_often(world: Path, scores: Any) -> None:
    model = ViTForImageClassification.from_pretrained(world / "images").eval()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    rows: list[Any] = []
    for i, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        image = Image.new("RGB", (12, 12), color)
        image.save(world / f"{i}.png")
        with torch.no_grad():
            guess = int(model(**processor(images=[image], return_tensors="pt")).logits.argmax())
        rows.append({"image": f"{i}.png", "label": guess})
    rows[2]["label"] = (rows[2]["label"] + 1) % 3
    keys = {"file": lines(world / "i.jsonl", rows), "image": "image"}
    assert scores("images", classification=keys) == {"accuracy": 2 / 3}
    packed = [
        {"image": {"bytes": (world / row["image"]).read_bytes(), "path": None}, "label": row["label"]} for row in rows
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(packed), world / "i.parquet")
    assert scores("images", classification=keys | {"file": "i.parquet"}) == {"accuracy": 2 / 3}


PAIR = {"question": "a", "choices": ["cat", "mat"]}
NO_FIELD = "bad.jsonl, line 1: there is no field 'choices'; it has 'question'"
NO_CLASS = "is no class of the model, which has cats, dogs"


@pytest.mark.parametrize(
    ("model", "kind", "rows", "said"),
    [
        ("lm", "multiple_choice", ["no object"], "bad.jsonl, line 1: a JSON object was expected"),
        (
            "lm",
            "multiple_choice",
            [{"question": "a"}],
            "bad.jsonl, line 1: there is no field 'choices'; it has 'question'",
        ),
        ("lm", "multiple_choice", [{"question": "a", "choices": ["cat"], "answer": 0}], "a list of two texts or more"),
        (
            "lm",
            "multiple_choice",
            [{"question": "a", "choices": ["cat", "mat"], "answer": 2}],
            "neither the number of a choice",
        ),
        (
            "lm",
            "multiple_choice",
            [{"question": "a", "choices": ["cat", "mat"], "answer": "dog"}],
            "neither the number",
        ),
        ("lm", "multiple_choice", [], "bad.jsonl has no examples"),
        (
            "texts",
            "classification",
            [{"text": "a", "label": "birds"}],
            "'birds' is no class of the model, which has cats, dogs",
        ),
        ("texts", "classification", [{"text": "a", "label": 3}], "'3' is no class"),
        ("nothing", "multiple_choice", [{}], "cannot load the candidate"),
        ("images", "multiple_choice", [{}], "cannot load the candidate"),
    ],
)
def test_what_cannot_be_scored_is_told(world: Path, scores: Any, model: str, kind: str, rows: Any, said: str) -> None:
    (world / "nothing").mkdir(exist_ok=True)
    with pytest.raises(EvaluationFailed) as failed:
        scores(model, **{kind: {"file": lines(world / "bad.jsonl", rows)}})
    assert said in str(failed.value) and len(str(failed.value)) < 500


def test_only_data_below_the_model_folders_is_read(world: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("secret")
    (world / "link.txt").unlink(missing_ok=True)
    (world / "link.txt").symlink_to(tmp_path / "outside.txt")
    (world / "large.txt").write_bytes(b"a " * 30_000)
    (world / "broken.parquet").write_text("no parquet")

    def check(**evaluator: Any) -> None:
        around = around_of(world, tmp_path / "data", **evaluator)
        check_evaluator(around.document, Shelves(around.store, "ann", around.roots))

    for file in ("../outside.txt", str(tmp_path / "outside.txt"), "link.txt"):
        with pytest.raises(PathNotAllowed) as refused:
            check(perplexity={"file": file})
        assert refused.value.problems[0].pointer == "#/search/evaluator/perplexity/file"
    with pytest.raises(CheckpointNotFound, match="is in none of this service's model folders"):
        check(perplexity={"file": "nowhere.txt"})
    with pytest.raises(Exception, match="has at most 50,000"):
        check(perplexity={"file": "large.txt"})
    with pytest.raises(RecipeError, match=r"none of .jsonl, .ndjson, .parquet"):
        check(multiple_choice={"file": "text.txt"})
    with pytest.raises(RecipeError, match=r"pip install 'lm_eval\[hf\]'"):
        check(lm_eval={"tasks": ["arc_easy"]})
    with pytest.raises(RecipeError, match="pattern"):
        check(lm_eval={"tasks": ["../task.yaml"]})


def test_a_search_by_perplexity(world: Path, tmp_path: Path) -> None:
    """All of it together: candidates are merged, scored, and the best is an ordinary recipe."""
    around = around_of(world, tmp_path / "data", perplexity={"file": "text.txt"})
    evaluator = evaluator_of(around)
    search(around.document, tmp_path / "out", evaluator=evaluator, roots=[world], threads=1)
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    known = [trial["metrics"]["perplexity"] for trial in found["trials"]]
    assert len(set(known)) == 3 and known[found["best"]] == min(known)
    assert evaluator.digest == evaluator_of(around).digest
    (world / "text.txt").write_text(" ".join(WORDS * 4))
    assert evaluator.digest != evaluator_of(around).digest
    (world / "text.txt").write_text(" ".join(WORDS * 5))


def test_tasks_of_the_harness(world: Path, scores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lm-evaluation-harness is asked, and what is made of its answer; it is another's here, for its tasks are on
    the network.
    """
    asked: dict[str, Any] = {}

    def simple_evaluate(**how: Any) -> Any:
        asked.update(how)
        sums = {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.75}
        easy = {"alias": "arc", "name": "arc_easy", "sample_len": 5, "acc,none": 0.5, "acc_stderr,none": "N/A"}
        return {"results": {"arc_easy": easy, "gsm8k": sums}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setattr(evaluators, "find_spec", lambda name: name)
    found = scores("lm", lm_eval={"tasks": ["arc_easy"], "limit": 5, "shots": 2})
    assert found == {
        "arc_easy/acc": 0.5,
        "arc_easy/acc_stderr": "N/A",
        "gsm8k/exact_match,strict-match": 0.25,
        "gsm8k/exact_match,flexible-extract": 0.75,
    }
    assert asked["model_args"]["dtype"] == "float32"
    assert asked["model"] == "hf" and asked["model_args"]["pretrained"] == str(world / "lm") and asked["limit"] == 5
    assert asked["tasks"] == ["arc_easy"] and asked["num_fewshot"] == 2

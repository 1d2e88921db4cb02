"""Vocabularies: the output's tokens, whose rows they have, and files that transformers reads the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from merge_core import vocabularies
from merge_core.chat_templates import CHAT_TEMPLATES
from merge_core.errors import CheckpointError, IncompatibleModels, RecipeError, WeightsmithError
from merge_core.merge import merge, plan_only
from merge_core.recipe import Recipe
from merge_core.tokenizers import Tokenizer
from tests.conftest import FORMS, kernels_in, write_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WIDTH = 4
LATIN = ["<s>", "</s>", *"abcdehotĠ", "at", "th", "the", "cat", "Ġthe", "Ġcat"]
OTHER = ["<s>", "</s>", *"adegnoĠ", "do", "dog", "Ġdog", "an"]
SPECIAL = ("<s>", "</s>")


def bpe(vocabulary: Sequence[str], added: Sequence[str] = ()) -> dict[str, Any]:
    """A byte-level BPE tokenizer that joins its first halves with its second ones; the last tokens are added ones."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    merges = [
        [token[:cut], token[cut:]]
        for token in vocabulary
        for cut in range(1, len(token))
        if token not in SPECIAL and token[:cut] in ids and token[cut:] in ids
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *(_added(token, ids[token]) for token in SPECIAL if token in ids),
            *(_added(token, len(ids) + i) for i, token in enumerate(added)),
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": ids, "merges": merges},
    }


def _added(token: str, place: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": place, "content": token, **flags, "special": token.startswith("<")}


def write_model(
    folder: Path,
    definition: Mapping[str, Any] | None,
    *,
    seed: int,
    rows: int | None = None,
    ties: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_config: Mapping[str, Any] | None = None,
    order: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """A tiny model with a tokenizer; `order`: which row of the random embedding stands where."""
    size = rows or len(vocabulary_of(definition or bpe(LATIN)))
    random = torch.Generator().manual_seed(seed)
    tensors = {EMBEDDING: torch.randn(size, WIDTH, generator=random).to(dtype)}
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(6, WIDTH, generator=random).to(dtype)
    tensors["model.norm.weight"] = torch.randn(WIDTH, generator=random).to(dtype)
    if not ties:
        tensors[HEAD] = torch.randn(size, WIDTH, generator=random).to(dtype)
    if order is not None:
        tensors |= {name: tensors[name][list(order)] for name in (EMBEDDING, HEAD)}
    config = {
        "model_type": "llama",
        "vocab_size": size,
        "num_hidden_layers": 1,
        "tie_word_embeddings": ties,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    write_checkpoint(folder, tensors, config=config)
    if definition is not None:
        (folder / "tokenizer.json").write_text(json.dumps(definition))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**about, **(tokenizer_config or {})}))
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1, "top_p": 0.5}))
    return tensors


def vocabulary_of(definition: Mapping[str, Any]) -> dict[str, int]:
    vocab = definition["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    return ids | {entry["content"]: entry["id"] for entry in definition["added_tokens"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`base` with a Latin vocabulary, `chat` with two tokens more, `other` with another vocabulary, `padded`."""
    write_model(tmp_path / "base", bpe(LATIN), seed=1)
    write_model(tmp_path / "chat", bpe(LATIN, ["<|im_start|>", "<|im_end|>"]), seed=2)
    write_model(tmp_path / "other", bpe(OTHER, ["<|im_end|>", "<|own|>"]), seed=3)
    write_model(tmp_path / "padded", bpe(LATIN), seed=4, rows=32)
    return tmp_path


def recipe(*models: str, weights: Sequence[float] | None = None, **keys: Any) -> dict[str, Any]:
    """A weighted sum; with one weight 1 and the others 0 the output is that model's own gathered rows."""
    given = weights or [1.0] * len(models)
    entries = [{"model": name, "parameters": {"weight": weight}} for name, weight in zip(models, given, strict=True)]
    return {"merge_method": "linear", "models": entries, "parameters": {"normalize": False}, **keys}


def merged(folder: Path, written: Mapping[str, Any], **keys: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The output's tensors, and its ids as transformers reads them, which are those of the config's rows."""
    out = folder / f"out{len(list(folder.glob('out*')))}"
    artifact = merge(Recipe.from_data(written), out, roots=[folder], **keys)
    tensors = load_file(out / "model.safetensors")
    size = json.loads((out / "config.json").read_text())["vocab_size"]
    assert tensors[EMBEDDING].shape == (size, WIDTH)
    ids = AutoTokenizer.from_pretrained(out).get_vocab()
    files = {path.name: path for path in out.iterdir()}
    assert ids == Tokenizer.read("out", files).ids
    assert max(ids.values()) < size
    assert artifact.folder == out
    return tensors, ids


def refusal(folder: Path, written: Mapping[str, Any]) -> WeightsmithError:
    with pytest.raises(WeightsmithError) as caught:
        plan_only(Recipe.from_data(written), roots=[folder])
    return caught.value


# Which tokens, and whose rows.


def test_a_union_has_every_token_and_the_base_s_keep_their_ids(folder: Path) -> None:
    written = recipe("base", "chat", "other", weights=[0, 0, 1], base_model="base", tokenizer={"source": "union"})
    tensors, ids = merged(folder, written)
    base, chat, other = (
        vocabulary_of(json.loads((folder / n / "tokenizer.json").read_text())) for n in ("base", "chat", "other")
    )
    assert set(ids) == {*base, *chat, *other}
    assert {token: ids[token] for token in base} == base
    assert sorted(ids.values()) == list(range(len(ids)))
    assert [token for token, _ in sorted(ids.items(), key=lambda item: item[1])][-3:] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|own|>",
    ]
    stored = {name: load_file(folder / name / "model.safetensors") for name in ("base", "chat", "other")}
    for name in (EMBEDDING, HEAD):
        for token, place in ids.items():
            source, row = (
                ("other", other[token])
                if token in other
                else ("base", base[token])
                if token in base
                else ("chat", chat[token])
            )
            assert torch.equal(tensors[name][place], stored[source][name][row]), token


def test_new_tokens_of_a_vocabulary_are_found_in_text(folder: Path) -> None:
    merged(folder, recipe("base", "other", base_model="base", tokenizer={"source": "union"}))
    tokenizer = AutoTokenizer.from_pretrained(folder / "out0")
    assert tokenizer.tokenize("the cat") == ["the", "Ġcat"]
    assert tokenizer.tokenize("the dog<|own|>") == ["the", "Ġdog", "<|own|>"]
    assert tokenizer.decode(tokenizer("the dog").input_ids) == "the dog"


@pytest.mark.parametrize("order", ["reversed", "turned"])
def test_ids_mean_nothing_but_their_tokens(folder: Path, order: str) -> None:
    numbers = list(range(len(LATIN)))
    permuted = numbers[::-1] if order == "reversed" else numbers[5:] + numbers[:5]
    write_model(folder / "same", bpe(LATIN), seed=9)
    write_model(folder / "permuted", bpe([LATIN[i] for i in permuted]), seed=9, order=permuted)
    keys = {"base_model": "base", "tokenizer": {"source": "union"}}
    plain, _ = merged(folder, recipe("base", "same", "other", **keys))
    other, _ = merged(folder, recipe("base", "permuted", "other", **keys))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_row_that_some_models_lack(folder: Path) -> None:
    write_model(folder / "third", bpe(OTHER, ["<|im_end|>"]), seed=5)
    written = recipe("chat", "other", "third", weights=[1, 0, 0], dtype="float32", tokenizer={"source": "union"})
    tensors, ids = merged(folder, written)
    rows = {name: load_file(folder / name / "model.safetensors")[HEAD].float() for name in ("other", "third")}
    place = bpe(OTHER)["model"]["vocab"]["dog"]
    mean = (rows["other"][place] + rows["third"][place]) / 2
    assert torch.equal(tensors[HEAD][ids["dog"]], mean)
    assert torch.equal(tensors[HEAD][ids["<|own|>"]], rows["other"][len(OTHER) + 1])


def test_a_base_lends_its_rows_before_others_do(folder: Path) -> None:
    written = recipe("base", "other", "chat", weights=[0, 1, 0], base_model="base", tokenizer={"source": "base"})
    tensors, ids = merged(folder, written)
    assert ids == vocabulary_of(bpe(LATIN))
    assert torch.equal(tensors[HEAD][ids["cat"]], load_file(folder / "base" / "model.safetensors")[HEAD][ids["cat"]])


def test_tokens_from_where_the_recipe_says(folder: Path) -> None:
    tokens = {
        "cat": {"source": "other"} | {"source": {"kind": "model_token", "model": "other", "token": "dog"}},
        "the": {"source": {"kind": "model_token", "model": "other", "token_id": 3}, "force": True},
        "dog": {"source": {"kind": "zero"}},
        "at": {"source": {"kind": "zero"}, "force": True},
        "<|new|>": {"source": {"kind": "model_token", "model": "chat", "token": "<|im_start|>"}},
        "<|im_end|>": {"source": "other", "force": True},
    }
    stored = {name: load_file(folder / name / "model.safetensors")[EMBEDDING] for name in ("base", "chat", "other")}
    for weights, of in (([1, 0, 0], "base"), ([0, 1, 0], "chat")):
        written = recipe("base", "chat", "other", weights=weights, base_model="base", tokenizer={"tokens": tokens})
        tensors, ids = merged(folder, written)
        rows = tensors[EMBEDDING]
        assert torch.equal(rows[ids["cat"]], stored[of][ids["cat"]])  # it has one, and nobody forces another
        assert torch.equal(rows[ids["the"]], stored["other"][3])
        assert not rows[ids["dog"]].any()
        assert not rows[ids["at"]].any()
        assert torch.equal(rows[ids["<|new|>"]], stored["chat"][len(LATIN)])
        assert torch.equal(rows[ids["<|im_end|>"]], stored["other"][len(OTHER)])


def test_a_token_that_no_model_has_is_zero_and_said(folder: Path) -> None:
    (folder / "words").mkdir()  # a tokenizer alone, without weights
    (folder / "words" / "tokenizer.json").write_text(json.dumps(bpe([*LATIN, "x", "y"])))
    written = recipe("base", "chat", tokenizer_source="model:words")
    tensors, ids = merged(folder, written)
    assert not tensors[HEAD][[ids["x"], ids["y"]]].any()
    warnings = json.loads((folder / "out0" / "merge.lock.json").read_text())["warnings"]
    assert any("their rows are zero: 2 tokens ('x', 'y')" in warning for warning in warnings)


# How many rows.


def test_a_padded_vocabulary_shrinks_as_mergekit_shrinks_it(folder: Path) -> None:
    written = recipe("padded", "base", weights=[1, 0], base_model="padded", tokenizer={"source": "base"})
    tensors, _ = merged(folder, written)
    assert torch.equal(tensors[EMBEDDING], load_file(folder / "padded" / "model.safetensors")[EMBEDDING][: len(LATIN)])


def test_padding_can_be_kept(folder: Path) -> None:
    keys = {"base_model": "padded", "tokenizer": {"source": "base", "keep_padding": True}}
    tensors, _ = merged(folder, recipe("padded", "base", weights=[1, 0], **keys))
    assert torch.equal(tensors[HEAD], load_file(folder / "padded" / "model.safetensors")[HEAD])
    tensors, _ = merged(folder, recipe("padded", "base", weights=[0, 1], dtype="float32", **keys))
    own = load_file(folder / "base" / "model.safetensors")[HEAD]
    assert torch.equal(tensors[HEAD][: len(LATIN)], own.float())
    assert torch.equal(tensors[HEAD][-1], own.double().mean(0).float())


def test_padding_to_a_multiple_is_the_mean_row(folder: Path) -> None:
    written = recipe("base", "chat", weights=[0, 1], tokenizer={"source": "union", "pad_to_multiple_of": 16})
    tensors, ids = merged(folder, written)
    own = load_file(folder / "chat" / "model.safetensors")[EMBEDDING]
    assert len(ids) == len(own)
    assert len(tensors[EMBEDDING]) == 32
    assert torch.equal(tensors[EMBEDDING][len(own) :], own.double().mean(0).bfloat16().expand(32 - len(own), -1))


def test_tokens_beyond_the_vocab_size_are_left_out(folder: Path) -> None:
    write_model(
        folder / "short",
        bpe(LATIN, ["<|a|>", "<|b|>"]),
        seed=6,
        rows=len(LATIN) + 1,
        tokenizer_config={"pad_token": "<|b|>"},
    )
    _, ids = merged(folder, recipe("short", "base", tokenizer={"source": "union"}))
    assert "<|a|>" in ids
    assert "<|b|>" not in ids


def test_models_with_one_vocabulary_are_read_where_they_lie(folder: Path) -> None:
    write_model(folder / "second", bpe(LATIN), seed=8)
    plain = plan_only(Recipe.from_data(recipe("base", "second")), roots=[folder])
    mapped = plan_only(Recipe.from_data(recipe("base", "second", tokenizer={"source": "union"})), roots=[folder])
    assert mapped.memory.peak - plain.memory.peak < 2**20
    assert mapped.digest != plain.digest


def test_reading_the_tokenizers_counts_as_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = recipe("base", "other", tokenizer={"source": "union"})
    planned = plan_only(Recipe.from_data(written), roots=[folder]).memory.peak
    sizes = [(folder / name / "tokenizer.json").stat().st_size for name in ("base", "other")]
    monkeypatch.setattr(vocabularies, "_PARSED", 2**29 // sum(sizes))
    assert plan_only(Recipe.from_data(written), roots=[folder]).memory.peak > planned
    error = refusal(folder, written | {"limits": {"memory": "800MiB"}})
    assert error.problems[0].pointer == "#/limits/memory"


# The same bytes, whatever the machine does.


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_bytes_depend_on_no_block_and_no_kernel(folder: Path, method: str) -> None:
    wide = torch.Generator().manual_seed(0)
    for name in ("base", "chat", "other"):
        path = folder / name / "model.safetensors"
        tensors = load_file(path)
        tensors |= {key: torch.randn(len(tensors[key]), 30_000, generator=wide) for key in (EMBEDDING, HEAD)}
        write_checkpoint(folder / name, tensors)
    written = recipe("chat", "other", base_model="base", tokenizer={"pad_to_multiple_of": 64}) | {
        "merge_method": method
    }
    written["parameters"] = {"density": 0.5} if method == "ties" else {}
    if method == "linear":
        written["models"] = [*written["models"], {"model": "base", "parameters": {"weight": 0.5}}]
    digests = []
    for form in FORMS:
        for blocks, threads in ((1, 1), (2**20, 3)):
            out = folder / f"out-{form}-{blocks}"
            with kernels_in(form):
                artifact = merge(Recipe.from_data(written), out, roots=[folder], block_elements=blocks, threads=threads)
            digests.append(artifact.tensors)
    assert all(found == digests[0] for found in digests)


def test_a_tied_head_is_its_embedding_in_the_new_order(folder: Path) -> None:
    write_model(folder / "tied", bpe(LATIN[::-1]), seed=7, ties=True)
    keys = {"tokenizer": {"source": "union"}}
    tensors, _ = merged(folder, recipe("base", "tied", weights=[0, 1], **keys))
    embedding = load_file(folder / "tied" / "model.safetensors")[EMBEDDING].flip(0)
    assert torch.equal(tensors[HEAD], embedding)
    assert torch.equal(tensors[EMBEDDING], embedding)


def test_models_stored_in_different_formats(folder: Path) -> None:
    own = write_model(folder / "wide", bpe(OTHER), seed=7, dtype=torch.float32)
    tensors, ids = merged(folder, recipe("base", "wide", weights=[1, 0], tokenizer={"source": "union"}))
    assert torch.equal(tensors[HEAD][ids["dog"]], own[HEAD][OTHER.index("dog")].bfloat16())


# Other kinds of tokenizer.


def _unigram(tokens: Sequence[str], added: Sequence[str] = ()) -> dict[str, Any]:
    made = bpe(["<s>", "</s>"], [])
    vocab = [[token, -float(i)] for i, token in enumerate(["<s>", "</s>", *tokens])]
    made["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    made["added_tokens"] += [_added(token, len(vocab) + i) for i, token in enumerate(added)]
    return made | {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None}


def _wordpiece(tokens: Sequence[str], added: Sequence[str] = ()) -> dict[str, Any]:
    made = _unigram(tokens, added)
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *tokens])}
    made["model"] = {
        "type": "WordPiece",
        "unk_token": "<s>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocab,
    }
    return made


@pytest.mark.parametrize("kind", [_unigram, _wordpiece])
def test_unigram_and_wordpiece(folder: Path, kind: Any) -> None:
    write_model(folder / "one", kind(["cat", "the"], ["<|a|>"]), seed=1)
    write_model(folder / "two", kind(["dog", "the"], ["<|b|>"]), seed=2)
    _, ids = merged(folder, recipe("one", "two", tokenizer={"source": "union"}))
    assert sorted(ids, key=ids.__getitem__) == ["<s>", "</s>", "cat", "the", "<|a|>", "dog", "<|b|>"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "out0")
    assert tokenizer.tokenize("the dog<|b|><|a|>") == ["the", "dog", "<|b|>", "<|a|>"]


def test_ids_are_those_that_transformers_gives(folder: Path) -> None:
    definition = bpe(LATIN, ["<|a|>"])
    definition["added_tokens"].append(_added("<|far|>", 40))  # gets the next free id, whatever the file says
    config = {"pad_token": "<|pad|>", "additional_special_tokens": ["<|more|>"]}
    write_model(folder / "odd", definition, seed=1, rows=41, tokenizer_config=config)
    files = {path.name: path for path in (folder / "odd").iterdir()}
    assert Tokenizer.read("odd", files).ids == AutoTokenizer.from_pretrained(folder / "odd").get_vocab()
    merged(folder, recipe("odd", "other", tokenizer={"source": "union"}))


def test_tokenizers_that_are_not_read_are_copied_where_all_are_the_same(folder: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_model(folder / name, None, seed=seed)
        (folder / name / "tokenizer.model").write_bytes(b"sentencepiece")
    merge(Recipe.from_data(recipe("one", "two", tokenizer_source="base")), folder / "out", roots=[folder])
    assert (folder / "out" / "tokenizer.model").read_bytes() == b"sentencepiece"
    (folder / "two" / "tokenizer.model").write_bytes(b"another")
    error = refusal(folder, recipe("one", "two", tokenizer_source="base"))
    assert isinstance(error, CheckpointError)
    assert "save it as tokenizer.json" in str(error)


# What the files say.


def test_special_tokens_keep_their_meaning_under_another_tokenizer(folder: Path) -> None:
    write_model(folder / "moved", bpe(LATIN[::-1]), seed=4, tokenizer_config={"eos_token": "</s>"})
    (folder / "moved" / "config.json").write_text(json.dumps({"vocab_size": len(LATIN), "model_type": "llama"}))
    (folder / "moved" / "generation_config.json").unlink()
    merged(folder, recipe("base", "moved", base_model="base", tokenizer={"source": "moved"}))
    config = json.loads((folder / "out0" / "config.json").read_text())
    generation = json.loads((folder / "out0" / "generation_config.json").read_text())
    end = len(LATIN) - 2
    assert (config["bos_token_id"], config["eos_token_id"]) == (end + 1, end)
    assert generation == {"bos_token_id": end + 1, "eos_token_id": end, "top_p": 0.5}
    assert AutoTokenizer.from_pretrained(folder / "out0").eos_token_id == end


def test_ids_that_are_no_numbers_mean_no_token(folder: Path) -> None:
    config = json.loads((folder / "base" / "config.json").read_text())
    odd = {"pad_token_id": {"id": 1}, "sep_token_id": [[1], "x"]}
    (folder / "base" / "config.json").write_text(json.dumps(config | odd))
    write_model(folder / "moved", bpe(LATIN[::-1]), seed=4)
    merged(folder, recipe("base", "moved", base_model="base", tokenizer={"source": "moved"}))
    written = json.loads((folder / "out0" / "config.json").read_text())
    assert written["pad_token_id"] is None and written["sep_token_id"] is None


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi.</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi."
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi.[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHello [/INST] Hi.</s>[INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_chat_templates_write_their_formats(folder: Path, name: str) -> None:
    merged(
        folder,
        recipe("base", "base2") | {"models": [{"model": "base", "parameters": {"weight": 1}}], "chat_template": name},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "out0")
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == RENDERED[name]
    warnings = json.loads((folder / "out0" / "merge.lock.json").read_text())["warnings"]
    assert bool(warnings) == bool(CHAT_TEMPLATES[name].tokens)


def test_the_end_of_a_turn_ends_generation(folder: Path) -> None:
    written = recipe("base", "chat", base_model="base", tokenizer={"source": "union"}, chat_template="chatml")
    _, ids = merged(folder, written)
    generation = json.loads((folder / "out0" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, ids["<|im_end|>"]]
    assert json.loads((folder / "out0" / "merge.lock.json").read_text())["warnings"] == []


def test_the_commonest_chat_template(folder: Path) -> None:
    often, seldom = "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[0].content }} or not"
    for seed, text in enumerate([seldom, often, often]):
        write_model(folder / f"m{seed}", bpe(LATIN), seed=seed)
        (folder / f"m{seed}" / "chat_template.jinja").write_text(text)
    merged(folder, recipe("m0", "m1", "m2", chat_template="auto"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "out0")
    assert tokenizer.chat_template == often
    assert not (folder / "out0" / "chat_template.jinja").exists()
    merged(folder, recipe("m0", "m1", chat_template=seldom + "{# no one else has it #}"))
    assert "no one else" in AutoTokenizer.from_pretrained(folder / "out1").chat_template


def test_the_lock_names_the_tokenizer_files_that_were_read(folder: Path) -> None:
    merged(folder, recipe("base", "other", tokenizer={"source": "union"}))
    lock = json.loads((folder / "out0" / "merge.lock.json").read_text())
    for source in lock["sources"]:
        assert "tokenizer.json" in [file["path"] for file in source["files"]]


# What is refused, and when: planning.


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"tokenizer": {"tokens": {"cat": {"source": "elsewhere"}}}}, "not one of the models that are merged"),
        ({"tokenizer": {"tokens": {"no": {"source": "other"}}}}, "other has no token 'no'"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "other", "token_id": 99}}}}},
            "other has no row 99: its vocabulary has 15 rows",
        ),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "one"}}}}}, "kind is model_token or zero"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "other"}}}}},
            "exactly one of token and token_id",
        ),
        ({"tokenizer": {"sorce": "base"}}, "did you mean source?"),
        ({"tokenizer": {"source": "union"}, "tokenizer_source": "base"}, "not both"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "greater than or equal to 1"),
        ({"chat_template": "chatlm"}, "did you mean chatml?"),
    ],
)
def test_wrong_keys_are_refused(folder: Path, keys: dict[str, Any], says: str) -> None:
    error = refusal(folder, recipe("base", "other", **keys))
    assert isinstance(error, RecipeError)
    assert says in str(error)
    assert error.problems[0].pointer.startswith(("#/tokenizer", "#/chat_template"))


def test_different_vocabularies_without_a_tokenizer_say_what_to_write(folder: Path) -> None:
    error = refusal(folder, recipe("base", "chat"))
    assert isinstance(error, IncompatibleModels)
    assert "`tokenizer: {source: union}`" in str(error)


def test_models_whose_vocabulary_is_not_known_are_refused(folder: Path) -> None:
    write_model(folder / "bare", None, seed=1)
    assert "has no tokenizer files" in str(refusal(folder, recipe("base", "bare", tokenizer={"source": "union"})))
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(config | {"vocab_size": 16}))
    error = refusal(folder, recipe("base", "other", tokenizer={"source": "union"}))
    assert "no tensor has the 16 rows that its config's vocab_size says" in str(error)


@pytest.mark.parametrize(
    "broken", ['{"model": {}}', '{"model": {"vocab": [1]}}', '{"model": {"vocab": {"a": "b"}}}', "["]
)
def test_broken_tokenizers_are_refused(folder: Path, broken: str) -> None:
    (folder / "other" / "tokenizer.json").write_text(broken)
    assert isinstance(refusal(folder, recipe("base", "other", tokenizer={"source": "union"})), CheckpointError)

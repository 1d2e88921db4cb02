"""A real small language model: a base that has read C++, and two fine-tunes that have read Python and English, in about
a minute on one core.

Everything is a character: a transformer in the shape of a Llama predicts the next one. The texts are here already, so
that nothing is fetched: headers of torch, Python's standard library, and the topics of Python's `help()`. Every tenth
page of each text is held out. Fine-tuning leaves embeddings, the last norm and the head as they are. Everything is
seeded.
"""

from __future__ import annotations

import json
import math
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
WINDOW = 128
"""Characters that the model sees."""
CHECKED = 16
"""Windows of each expert's text to look at meanwhile."""
BASE, EXPERTS = "cpp", ("python", "english")
_PAGE = 4096
_HELD_OUT = 10
"""One page of so many."""
_MODULES = (
    "argparse ast calendar codecs copy csv dataclasses datetime difflib doctest enum fileinput fractions ftplib "
    "functools gettext glob gzip heapq inspect ipaddress locale mailbox mimetypes netrc optparse os pickle platform "
    "plistlib posixpath pprint profile pstats queue random shelve shlex shutil smtplib socket ssl statistics string "
    "subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback typing uuid warnings"
    " weakref zipfile"
)


@dataclass(frozen=True)
class Text:
    """One kind of text, as the numbers of its characters: to learn from, to look at meanwhile, and to judge by."""

    learned: Tensor
    check: Tensor
    test: Tensor

    @classmethod
    def of(cls, text: str) -> Text:
        clean = "".join(each for each in text if each in _NUMBERS)
        pages = [clean[start : start + _PAGE] for start in range(0, len(clean), _PAGE)]
        held_out = pages[_HELD_OUT - 1 :: _HELD_OUT]
        learned = [page for number, page in enumerate(pages, 1) if number % _HELD_OUT]
        return cls(*map(_encoded, (learned, held_out[::2], held_out[1::2])))


_NUMBERS = {each: number for number, each in enumerate(CHARACTERS)}


def _encoded(pages: Sequence[str]) -> Tensor:
    return torch.tensor([_NUMBERS[each] for page in pages for each in page])


def texts() -> dict[str, Text]:
    """Those of the base and of the experts."""
    from pydoc_data.topics import topics

    library, headers = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent / "include" / "c10"
    sources = (library / f"{name}.py" for name in _MODULES.split())
    return {
        "cpp": Text.of("\n".join(path.read_text(errors="ignore") for path in sorted(headers.rglob("*.h")))),
        "python": Text.of("\n".join(path.read_text() for path in sources if path.exists())),
        "english": Text.of("\n\n".join(topics[name] for name in sorted(topics))),
    }


def train_models(folder: Path, known: Mapping[str, Text], seed: int = 0) -> None:
    """Train the base and its fine-tunes, and save each with its tokenizer as `folder/<name>`: the base is `base`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _quiet()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 1,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    net = LlamaForCausalLM(config)
    _train(net, known[BASE].learned, steps=250, rate=4e-3, seed=seed, frozen=())
    _save(net, folder / "base")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for number, name in enumerate(EXPERTS, 1):
        net.load_state_dict(before)
        frozen = ("embed_tokens", "model.norm", "lm_head")
        _train(net, known[name].learned, steps=100, rate=1.5e-3, seed=seed + number, frozen=frozen)
        _save(net, folder / name)


def write_samples(folder: Path, known: Mapping[str, Text], count: int, seed: int = 0) -> None:
    """For each expert JSON lines: `<name>.jsonl` with so many texts, each a window of what it has learned from, and
    `<name>-check.jsonl` with some that nobody has learned from.
    """
    chance = torch.Generator().manual_seed(seed)
    for name in EXPERTS:
        starts = torch.randint(len(known[name].learned) - WINDOW, (count,), generator=chance)
        _write(folder / f"{name}.jsonl", [known[name].learned[start : start + WINDOW] for start in starts])
        _write(folder / f"{name}-check.jsonl", _windows(known[name].check, CHECKED))


@torch.no_grad()
def losses(folder: Path, known: Mapping[str, Text]) -> dict[str, float]:
    """What a saved model loses on the texts of the experts that are kept to judge by, in nats for each character; and
    the `mean` of both.
    """
    from transformers import LlamaForCausalLM

    _quiet()
    net = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {name: float(_loss(net, torch.stack(_windows(known[name].test, 64)))) for name in EXPERTS}
    return found | {"mean": sum(found.values()) / len(found)}


def _quiet() -> None:
    """No bars for files that are read in a moment."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _train(net: Any, text: Tensor, *, steps: int, rate: float, seed: int, frozen: Sequence[str]) -> None:
    chance = torch.Generator().manual_seed(seed)
    named = net.named_parameters()
    learned = [parameter for name, parameter in named if not any(each in name for each in frozen)]
    optimizer = torch.optim.AdamW(learned, betas=(0.9, 0.95), weight_decay=0.05)
    places = torch.arange(WINDOW)
    for step in range(steps):
        warm, cool = min(1.0, (step + 1) / 20), 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = rate * warm * cool
        starts = torch.randint(len(text) - WINDOW, (24, 1), generator=chance)
        optimizer.zero_grad()
        _loss(net, text[starts + places]).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()


def _loss(net: Any, rows: Tensor) -> Tensor:
    """The mean of −log p of each character given those before it in its row."""
    logits = net(input_ids=rows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _windows(text: Tensor, count: int) -> list[Tensor]:
    """So many windows from all over a text."""
    starts = torch.linspace(0, len(text) - WINDOW, count).long()
    return [text[start : start + WINDOW] for start in starts]


def _write(path: Path, windows: Sequence[Tensor]) -> None:
    told = ("".join(CHARACTERS[each] for each in window) for window in windows)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in told))


def _save(net: Any, folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    net.save_pretrained(folder)
    characters = Tokenizer(models.WordLevel(_NUMBERS | {UNKNOWN: len(_NUMBERS)}, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token=UNKNOWN, model_max_length=WINDOW, clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    read = texts()
    train_models(where, read)
    for model in ("base", *EXPERTS):
        print(model, {name: round(loss, 3) for name, loss in losses(where / model, read).items()})

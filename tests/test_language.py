"""The small language model of the demo, and what is claimed of merging it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import demo, language
from tests.services import running_service


def test_texts_are_held_out_and_read_by_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    page = "".join(f"{number:04d}" for number in range(1024))
    text = language.Text.of("".join(page.replace("0", chr(97 + number)) for number in range(20)) + "é")
    assert [len(each) for each in (text.learned, text.check, text.test)] == [18 * 4096, 4096, 4096]
    letters = [{language.CHARACTERS[each] for each in part.tolist()} for part in (text.learned, text.check, text.test)]
    assert letters[1] - letters[0] == {"j"} and letters[2] - letters[0] == {"t"}, "whole pages are held out"

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=len(language.CHARACTERS) + 1, **size))
    language._save(net, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    written = "def f( x):\n    return 'a  b'\n"
    tokens = tokenizer(written)["input_ids"]
    assert tokens == language._encoded([written]).tolist() and tokenizer.decode(tokens) == written
    assert tokenizer("é")["input_ids"] == [len(language.CHARACTERS)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_expert_merging_on_twenty_texts_is_ahead_of_task_arithmetic(tmp_path: Path, seed: int) -> None:
    """On text that neither was learned from nor chose anything: by far, and also of each model alone."""
    torch.set_num_threads(1)
    (tmp_path / "models").mkdir()
    with running_service(tmp_path / "data", tmp_path / "models") as service:
        measured = demo.learn(service.url, tmp_path / "models", tmp_path / "downloads", seed)
        (job,) = service.get("/v1/calibrations")["data"]
        drawn = service.http.get(f"/jobs/{job['id']}/calibrated").text
    assert demo.report_losses(measured) == 0
    mean = {name: found["mean"] for name, found in measured.items()}
    assert mean[demo.LEARNED] < mean[demo.BY_HAND] - 0.03
    assert mean[demo.LEARNED] < min(mean[name] for name in ("base", *language.EXPERTS))
    for name in language.EXPERTS:
        other = next(each for each in language.EXPERTS if each != name)
        assert measured[name][name] < min(measured["base"][name], measured[other][name]) - 0.1, "experts differ"
    assert "held out from" in drawn and f"{demo.BY_HAND} " in drawn

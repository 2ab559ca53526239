"""The tokenizer of SigLIP models needs exactly the files that `alignprop rewards fetch siglip_score` fetches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import alignprop_clip
from alignprop_clip.pretrained import SIGLIP_TOKENIZER
from alignprop_clip.tokenizer import Tokenizer
from alignprop_core.errors import WeightsError

REVISION = "0123456789abcdef0123456789abcdef01234567"
HUB = "timm/ViT-B-16-SigLIP"
MODEL = {"context_length": 16, "hf_tokenizer_name": HUB, "tokenizer_kwargs": {"clean": "canonicalize"}}


def files_of_t5() -> dict[str, str]:
    """Files like those of the repository `HUB`, with about thirty tokens instead of 32,000."""
    words = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -2.0], ["▁cat", -1.0], ["▁a", -1.0]]
    pieces = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "decoder": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": False,
                  "vocab": [*words, *([letter, -3.0] for letter in "abcdefghijklmnopqrstuvwxyz")]},
    }  # fmt: skip
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 64, "extra_ids": 0, **special}
    return {
        "tokenizer.json": json.dumps(pieces),
        "tokenizer_config.json": json.dumps({**config, "additional_special_tokens": []}),
        "special_tokens_map.json": json.dumps(special),
    }


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as after `alignprop rewards fetch siglip_score`; returns the folder of the files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--timm--ViT-B-16-SigLIP"
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    content = files_of_t5()
    spec = next(s for s in alignprop_clip.alignprop_register_rewards() if s.name == "siglip_score")
    for file in spec.weights:
        assert file.repository == HUB
        (folder / file.file).write_text(content.get(file.file, ""))
    return folder


def test_the_fetched_files_are_sufficient(snapshot: Path) -> None:
    tokens = Tokenizer(MODEL, "SigLIP")("A cat!")
    assert tokens.tolist() == [[5, 4] + [1] * 14]


@pytest.mark.parametrize("file", [file.file for file in SIGLIP_TOKENIZER])
def test_a_missing_tokenizer_file_is_reported_with_the_command(snapshot: Path, file: str) -> None:
    """Without tokenizer.json transformers would silently build an empty tokenizer, and every score would be wrong."""
    (snapshot / file).unlink()
    message = rf"not on this machine: {re.escape(file)} of that.* `alignprop rewards fetch siglip_score`\.$"
    with pytest.raises(WeightsError, match=message):
        Tokenizer(MODEL, "SigLIP")


def test_each_file_of_another_tokenizer_is_reported_with_its_command(snapshot: Path) -> None:
    with pytest.raises(WeightsError, match=r"fetch hub:some/other/tokenizer\.json`, .*other/tokenizer_config"):
        Tokenizer({**MODEL, "hf_tokenizer_name": "some/other"}, "other")


@pytest.mark.parametrize("text", ["{", "[]", "<html>"])
@pytest.mark.parametrize("file", [file.file for file in SIGLIP_TOKENIZER])
def test_a_damaged_tokenizer_is_reported_with_its_cause(snapshot: Path, file: str, text: str) -> None:
    (snapshot / file).write_text(text)
    message = rf"cannot be loaded from {snapshot}: \w+Error: .*fetch siglip_score"
    with pytest.raises(WeightsError, match=message):
        Tokenizer(MODEL, "SigLIP")

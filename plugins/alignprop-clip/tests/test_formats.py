"""Every file format gives the embeddings of the saved model; any other file gives one clear error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alignprop_clip.architecture import Architecture
from alignprop_clip.checkpoint import compact_embedding, to_open_clip
from alignprop_clip.config import ClipScoreConfig
from alignprop_clip.encoder import ClipEncoder, load_clip
from alignprop_clip.preprocess import Preprocess
from alignprop_clip.reward import ClipScore
from alignprop_clip.testing import CLIP, IMAGE_SIZE, PREPROCESS, tiny_network, write_tiny_clip
from alignprop_core.errors import ConfigError, WeightsError

PROMPTS = ["three foxes on a blue background", "a cat", ""]
PREPARE = Preprocess(IMAGE_SIZE, tuple(PREPROCESS["mean"]), tuple(PREPROCESS["std"]))


def tiny(config: dict[str, Any] | None = None) -> Architecture:
    return Architecture("tiny", config or {**CLIP, "init_logit_bias": 0.0}, PREPARE)


def images(size: int = IMAGE_SIZE) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def features(encoder: ClipEncoder) -> Tensor:
    return torch.stack([encoder.images(images()), encoder.prompts(PROMPTS)])


def own_forward(network: nn.Module) -> Tensor:
    """Embeddings from open_clip's forward pass and tokenizer."""
    import open_clip

    x = (images() - torch.tensor(PREPARE.mean).view(3, 1, 1)) / torch.tensor(PREPARE.std).view(3, 1, 1)
    with torch.no_grad():
        output = network(x, open_clip.tokenize(PROMPTS))
    return torch.stack(output[:2])


@pytest.mark.parametrize(
    ("suffix", "wrapping"),
    [
        *((".pt", wrapping) for wrapping in ("plain", "state_dict", "module.", "_orig_mod.", "model")),
        *((".safetensors", wrapping) for wrapping in ("plain", "module.", "_orig_mod.")),  # these files are flat
    ],
)
def test_an_open_clip_checkpoint_gives_open_clip_embeddings(tmp_path: Path, wrapping: str, suffix: str) -> None:
    network = tiny_network()
    state: dict[str, Any] = dict(network.state_dict())
    if wrapping.endswith("."):
        state = {wrapping + key: value for key, value in state.items()}
    path = tmp_path / f"clip{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapping: state, "epoch": 3} if wrapping in ("state_dict", "model") else state, path)
    torch.testing.assert_close(features(load_clip(path, tiny())), own_forward(network), rtol=1e-5, atol=1e-6)


def test_the_architecture_in_a_files_header_takes_precedence(tmp_path: Path) -> None:
    path = write_tiny_clip(tmp_path / "starter.safetensors")
    encoder = load_clip(path, Architecture.from_name("ViT-L-14"))
    network = tiny_network()
    stored = {key: value.half().float() for key, value in network.state_dict().items()}
    # 256 tokens keep their row; all others share one.
    table = stored["token_embedding.weight"]
    table[:49152] = network.state_dict()["token_embedding.weight"].half()[:49152].float().mean(0).half().float()
    network.load_state_dict(stored)
    torch.testing.assert_close(features(encoder), own_forward(network), rtol=1e-5, atol=1e-6)
    assert encoder.logit_bias is not None
    assert encoder.logit_bias.item() == -2.0
    assert encoder.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-3)
    assert all(
        p.dtype == torch.float32 and p.device.type == "cpu" and not p.requires_grad for p in encoder.parameters()
    )


def test_the_compact_embedding_keeps_the_rows_of_the_tokens_in_use() -> None:
    state = {"token_embedding.weight": torch.randn(20, 4), "ln_final.weight": torch.ones(4)}
    compact = compact_embedding(state, [7, 3, 3])
    assert {k: tuple(v.shape) for k, v in compact.items()} == {
        "ln_final.weight": (4,),
        "token_embedding.rows": (2, 4), "token_embedding.ids": (2,), "token_embedding.rest": (4,),
    }  # fmt: skip
    assert compact["token_embedding.ids"].dtype == torch.int32
    table = to_open_clip(compact, "x", vocabulary=20)["token_embedding.weight"]
    assert torch.equal(table[[3, 7]], state["token_embedding.weight"][[3, 7]])
    others = [i for i in range(20) if i not in (3, 7)]
    torch.testing.assert_close(table[others], state["token_embedding.weight"][others].mean(0).expand(18, 4))


@pytest.mark.parametrize("change", ["lacks", "shape", "range"])
def test_a_compact_embedding_that_does_not_fit_is_refused(change: str) -> None:
    compact = compact_embedding({"token_embedding.weight": torch.randn(20, 4)}, [3, 7])
    if change == "lacks":
        del compact["token_embedding.rest"]
    elif change == "shape":
        compact["token_embedding.rest"] = torch.zeros(5)
    with pytest.raises(WeightsError, match=r"file: .*compact token embedding"):
        to_open_clip(compact, "file", vocabulary=5 if change == "range" else 20)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_transformers_checkpoint_gives_transformers_logits(tmp_path: Path, activation: str) -> None:
    from transformers import CLIPConfig, CLIPModel

    sides = {"hidden_act": activation, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            vision_config={**sides, "image_size": IMAGE_SIZE, "patch_size": 8, "intermediate_size": 128},
            text_config={**sides, "intermediate_size": 128, "eos_token_id": 49407, "bos_token_id": 49406},
            projection_dim=16,
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    model.save_pretrained(tmp_path)
    encoder = load_clip(tmp_path / "model.safetensors", tiny({**CLIP, "quick_gelu": activation == "quick_gelu"}))
    other = load_clip(tmp_path / "model.safetensors", tiny({**CLIP, "quick_gelu": activation != "quick_gelu"}))

    import open_clip

    pixels = PREPARE(images())
    with torch.no_grad():
        theirs = model(pixel_values=pixels, input_ids=open_clip.tokenize(PROMPTS)).logits_per_image
    ours = encoder.logit_scale * encoder.images(images()) @ encoder.prompts(PROMPTS).T
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # The file does not store the activation, and the other one gives other logits.
    assert (other.logit_scale * other.images(images()) @ other.prompts(PROMPTS).T - theirs).abs().max() > 0.01


def test_tokens_are_those_of_transformers_tokenizer() -> None:
    import gzip

    import open_clip.tokenizer
    from transformers import CLIPTokenizer

    from alignprop_clip.tokenizer import Tokenizer

    own = open_clip.tokenizer.SimpleTokenizer()
    with gzip.open(open_clip.tokenizer.default_bpe()) as file:
        text = file.read().decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
    vocab = {k.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): v
             for k, v in own.encoder.items()}  # fmt: skip
    theirs = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer = Tokenizer(CLIP["text_cfg"], "tiny")
    prompts = [*PROMPTS, "A photo of Zoë's  café, 12 dogs!", "UPPER   lower 3.5"]
    for prompt in prompts:
        wanted = theirs(prompt, truncation=True, max_length=77).input_ids
        found = tokenizer(prompt)[0].tolist()
        assert found[: len(wanted)] == wanted
        assert not any(found[len(wanted) :])
    long = "a very long prompt about foxes " * 90
    with pytest.warns(UserWarning, match="542 tokens"):
        cut = tokenizer(long)[0].tolist()
    assert cut == theirs(long, truncation=True, max_length=77).input_ids
    assert tokenizer("another one " * 200).shape == (1, 77)  # and no second warning


def siglip_config(tokenizer: str) -> dict[str, Any]:
    return {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "test_vit", "image_size": IMAGE_SIZE, "timm_pool": "avg", "timm_proj": ""},
        "text_cfg": {
            "context_length": 16, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2,
            "hf_tokenizer_name": tokenizer,
            "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "proj_bias": True,
            "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
        },
    }  # fmt: skip


def small_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "fox", "three", "two", "on", "blue", "background"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def test_a_siglip_model_with_its_towers_and_tokenizer(tmp_path: Path) -> None:
    from open_clip.tokenizer import HFTokenizer

    small_tokenizer(tmp_path / "tokenizer")
    config = siglip_config(str(tmp_path / "tokenizer"))
    network = tiny_network(config)
    torch.save(network.state_dict(), tmp_path / "siglip.bin")
    encoder = load_clip(tmp_path / "siglip.bin", tiny(config))
    prompts = ["Three foxes, on a BLUE background!", "a cat", ""]
    tokens = HFTokenizer(str(tmp_path / "tokenizer"), context_length=16, clean="canonicalize")(prompts)
    with torch.no_grad():
        theirs = network.get_logits(PREPARE(images()), tokens)[0]  # type: ignore[operator]
    ours = encoder.logit_scale * encoder.images(images()) @ encoder.prompts(prompts).T + encoder.logit_bias
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="41 tokens"):
        encoder.prompts(["a cat " * 20])
    with pytest.raises(
        WeightsError, match=r"tokenizer nobody/nothing is not on this machine.*fetch hub:nobody/nothing/"
    ):
        load_clip(tmp_path / "siglip.bin", tiny(siglip_config("nobody/nothing")))


def test_images_only_needs_no_text_weights(tmp_path: Path) -> None:
    network = tiny_network(bias=None)
    torch.save({k: v for k, v in network.state_dict().items() if k.startswith("visual.")}, tmp_path / "visual.pt")
    encoder = load_clip(tmp_path / "visual.pt", tiny({**CLIP}), images_only=True)
    torch.testing.assert_close(encoder.images(images()), own_forward(network)[0], rtol=1e-5, atol=1e-6)
    assert not any("token_embedding" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-H-14", "ViT-B-16-SigLIP", "RN50", "convnext_base_w", "EVA02-B-16"])
def test_a_model_is_built_by_name_without_memory_and_without_a_checkpoint(name: str) -> None:
    import open_clip

    architecture = Architecture.from_name(name)
    network = architecture.build_empty()
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert {b.device.type for b in network.buffers()} <= {"cpu"}
    theirs = open_clip.get_pretrained_cfg(name, open_clip.list_pretrained_tags_by_model(name)[0])
    assert architecture.preprocess.mean == tuple(theirs["mean"])
    assert architecture.preprocess.resize == theirs["resize_mode"]


def test_a_hybrid_model_which_timm_runs_while_building_it_is_built() -> None:
    network = Architecture.from_name("ViTamin-S").build_empty()
    assert sum(parameter.numel() for parameter in network.parameters()) == 62_469_185


def test_model_names_are_open_clips_and_wrong_names_get_a_suggestion() -> None:
    assert Architecture.from_name("ViT-L/14").config == Architecture.from_name("ViT-L-14").config
    assert Architecture.from_name("ViT-L-14", quick_gelu=True).config == {
        **Architecture.from_name("ViT-L-14-quickgelu").config, "quick_gelu": True
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r'no model "ViT-L14"\. Did you mean "ViT-L-14"'):
        Architecture.from_name("ViT-L14")
    for name, meant in (("vit-l-14", "ViT-L-14"), ("resnet50", "RN50"), ("VIT-B-16-SIGLIP", "ViT-B-16-SigLIP")):
        with pytest.raises(ConfigError, match=rf'no model "{name}"\. Did you mean "{meant}"'):
            Architecture.from_name(name)
    with pytest.raises(ConfigError, match="open_clip has no model"):
        Architecture.from_name("hf-hub:owner/name")
    with pytest.raises(ConfigError, match="captioning model"):
        Architecture.from_name("coca_ViT-B-32")
    with pytest.raises(ConfigError, match="text tower from transformers"):
        Architecture.from_name("roberta-ViT-B-32")


def refused(path: Path, architecture: Architecture | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        load_clip(path, architecture or tiny())
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_weights_of_another_model_are_reported_with_the_likely_model(tmp_path: Path) -> None:
    path = tmp_path / "l14.safetensors"
    state = {
        "visual.conv1.weight": torch.zeros(1024, 3, 14, 14), "visual.positional_embedding": torch.zeros(257, 1024),
        "ln_final.weight": torch.zeros(768), "logit_scale": torch.tensor(4.6),
    }  # fmt: skip
    save_file(state, path)
    message = refused(path, Architecture.from_name("ViT-H-14"))
    assert re.search(r"contains another model than ViT-H-14: \S+ is missing; ", message)
    assert re.search(r"; and \d{3} more\.", message)  # hundreds of keys, three shown
    assert "It looks like ViT-L-14" in message

    wrong = dict(tiny_network().state_dict()) | {"visual.proj": torch.zeros(32, 24), "extra.weight": torch.zeros(1)}
    save_file(wrong, path)
    message = refused(path)
    assert "visual.proj has shape (32, 24), expected (32, 16)" in message
    assert "extra.weight is not in the model" in message


def test_a_file_that_is_not_a_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    pickled, cut, empty = tmp_path / "pickled.pt", tmp_path / "cut.safetensors", tmp_path / "empty.pt"
    torch.save(tiny_network(), pickled)
    assert "would need unpickling" in refused(pickled)
    cut.write_bytes(write_tiny_clip(tmp_path / "whole.safetensors").read_bytes()[:5000])
    assert "cut off or damaged" in refused(cut)
    torch.save({"epoch": 3, "state_dict": {}}, empty)
    assert "contains no named tensors" in refused(empty)
    torch.save({"vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, empty)
    assert "but not vision_model.encoder.layers.0.self_attn.k_proj.weight" in refused(empty)


def write_header(path: Path, header: dict[str, Any]) -> Path:
    save_file({"a": torch.zeros(1)}, path, metadata={"config": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"ultralytics": {}}, "does not describe a valid CLIP model: open_clip: Field required"),
        ({"open_clip": CLIP, "image_size": 32, "mean": [0.5] * 3}, "std: Field required"),
        ({"open_clip": {"embed_dim": 3}, **PREPROCESS}, "open_clip.vision_cfg: Field required; open_clip.text_cfg"),
    ],
)
def test_a_header_of_another_kind_of_file_is_refused(tmp_path: Path, header: dict[str, Any], message: str) -> None:
    assert message in refused(write_header(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("open_clip", "x"),
        ("open_clip.embed_dim", "16"),
        *((f"open_clip.{part}", value) for part in ("vision_cfg", "text_cfg") for value in ("x", None, [])),
        *((f"open_clip.text_cfg.{count}", value) for count in ("vocab_size", "heads", "layers") for value in ("x", 0)),
        *((f"open_clip.vision_cfg.{count}", value) for count in ("width", "head_width") for value in (-1, None)),
        ("open_clip.vision_cfg.timm_model_name", "hf-hub:some/model"),
        ("open_clip.text_cfg.tokenizer_kwargs.trust_remote_code", True),
        ("open_clip.text_cfg.tokenizer_kwargs.bpe_path", "x"),
        *(("image_size", value) for value in (0, -32, "32", 32.5, 64)),
        *(("mean", value) for value in ([1], 0.5, [0.5, 0.5, "x"], [0.5, 0.5, float("nan")])),
        *(("std", value) for value in ([0.5, 0.5, 0], [0.5, -1, 0.5])),
        ("resize", "foo"),
        ("interpolation", "nearest"),
    ],
)
def test_an_invalid_value_in_the_header_is_reported_with_its_key(tmp_path: Path, key: str, value: object) -> None:
    header = json.loads(json.dumps({"open_clip": CLIP, **PREPROCESS}))
    *parents, last = key.split(".")
    part = header
    for parent in parents:
        part = part.setdefault(parent, {})
    part[last] = value
    message = refused(write_header(tmp_path / "x.safetensors", header))
    assert "does not describe a valid CLIP model: " in message
    assert key in message
    assert "\n" not in message


@pytest.mark.parametrize(("key", "value"), [("act_kwargs", 3), ("pool_type", "x"), ("no_such_key", 1)])
def test_a_config_that_open_clip_rejects_is_reported_with_the_file(tmp_path: Path, key: str, value: object) -> None:
    header = {"open_clip": {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], key: value}}, **PREPROCESS}
    path = write_header(tmp_path / "x.safetensors", header)
    with pytest.raises(ConfigError, match=rf"{path}: open_clip cannot build a model from this config: \w+Error[:.] "):
        load_clip(path, tiny())


def test_a_file_whose_tensors_do_not_match_its_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"config": json.dumps({"open_clip": CLIP, **PREPROCESS})}
    state = {k: v.contiguous() for k, v in tiny_network(bias=None).state_dict().items()}
    save_file(state | {"visual.proj": torch.zeros(32, 16, dtype=torch.int8)}, path, metadata=header)
    message = refused(path)
    assert "contains another model than the one in its header: visual.proj has dtype int8, expected a fl" in message
    assert message.count(str(path)) == 1


def test_the_activation_stored_in_a_file_cannot_be_overridden(tmp_path: Path) -> None:
    for has in (False, True):
        path = write_tiny_clip(tmp_path / f"{has}.safetensors", {**CLIP, "quick_gelu": has})
        load_clip(path, tiny(), quick_gelu=has)
        with pytest.raises(
            WeightsError, match=rf"sets quick_gelu: {str(has).lower()}, .* Remove the option quick_gelu"
        ):
            load_clip(path, tiny(), quick_gelu=not has)
    plain = write_tiny_clip(tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match="quick_gelu: false"):
        ClipScore(ClipScoreConfig(weights=str(plain), quick_gelu=True))

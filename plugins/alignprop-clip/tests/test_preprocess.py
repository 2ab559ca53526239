"""Preprocessing is compared with open_clip on PIL images and with torchvision on tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from alignprop_clip.config import PickScoreConfig
from alignprop_clip.preprocess import Preprocess
from alignprop_clip.reward import PickScore
from alignprop_clip.testing import CLIP, PREPROCESS
from alignprop_core.reward import ImageBatch

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(32, 32), (48, 48), (224, 224), (33, 97), (200, 57), (640, 480), (32, 400)]


def pil_image(size: tuple[int, int], *, hard: bool = True) -> Image.Image:
    generator = torch.Generator().manual_seed(size[0])
    pixels = torch.rand(-(-size[1] // 5), -(-size[0] // 5), 3, generator=generator)
    pixels = (pixels > 0.5).float() if hard else pixels
    pixels = pixels.repeat_interleave(5, 0).repeat_interleave(5, 1)[: size[1], : size[0]]
    return Image.fromarray((pixels * 255).to(torch.uint8).contiguous().numpy())


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hard", [True, False])
def test_a_pil_image_is_preprocessed_like_open_clip(
    resize: Any, interpolation: Any, size: tuple[int, int], hard: bool
) -> None:
    from open_clip.transform import image_transform

    image = pil_image(size, hard=hard)
    theirs = image_transform(64, False, MEAN, STD, resize_mode=resize, interpolation=interpolation)(image)
    ours = Preprocess(64, MEAN, STD, resize, interpolation)(to_tensor(image)[None])[0]
    assert ours.shape == (3, 64, 64)
    # In grey levels; Pillow rounds to integers after each direction.
    difference = (ours - theirs).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    # Where the aspect ratio changes, newer versions of Pillow process the two directions in another order.
    if resize == "shortest" or size[0] == size[1] or interpolation == "bilinear":
        assert difference.max() <= 1.3
        assert difference.mean() <= 0.5
    assert difference.mean() <= 1.5


@pytest.mark.parametrize("size", SIZES)
def test_a_tensor_is_preprocessed_like_torchvision(size: tuple[int, int]) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

    theirs = Compose([Resize(64, InterpolationMode.BICUBIC, antialias=True), CenterCrop(64), Normalize(MEAN, STD)])
    images = to_tensor(pil_image(size))[None]
    torch.testing.assert_close(Preprocess(64, MEAN, STD, clip=False)(images), theirs(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_the_gradient_is_the_derivative(resize: Any) -> None:
    prepare = Preprocess(9, MEAN, STD, resize)
    images = (
        torch.rand(2, 3, 13, 21, generator=torch.Generator().manual_seed(0)).double() * 0.3 + 0.3
    ).requires_grad_()
    assert torch.autograd.gradcheck(prepare, (images,))


def test_saturated_pixels_keep_their_gradient() -> None:
    images = (torch.rand(1, 3, 50, 50) > 0.5).double().requires_grad_()
    prepared = Preprocess(32, MEAN, STD)(images)
    (gradient,) = torch.autograd.grad((prepared * torch.rand_like(prepared)).sum(), images)
    assert (gradient != 0).double().mean() > 0.99
    pixels = prepared * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6


def test_dtypes_and_inputs_are_not_modified() -> None:
    prepare = Preprocess(32, MEAN, STD)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        images: Tensor = torch.rand(1, 3, 40, 64).to(dtype)
        kept = images.clone()
        assert prepare(images).dtype == expected
        assert torch.equal(images, kept)


@pytest.mark.parametrize("size", [(35, 32), (32, 35), (32, 39), (64, 65), (73, 75), (33, 32), (32, 32)])
def test_pickscore_equals_its_authors_computation_in_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    """The authors' model class, processor and formula; crop margins of 1, 3 and 7 pixels after resizing."""
    import open_clip
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sides = {"hidden_act": "gelu", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            vision_config={**sides, "image_size": 32, "patch_size": 8, "intermediate_size": 128},
            text_config={**sides, "intermediate_size": 128, "eos_token_id": 49407, "bos_token_id": 49406},
            projection_dim=16,
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    header = {"open_clip": {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "layers": 1},
                            "text_cfg": {**CLIP["text_cfg"], "layers": 1}}, **PREPROCESS}  # fmt: skip
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    save_file(state, tmp_path / "pick.safetensors", metadata={"config": json.dumps(header)})

    # Floating-point pixels, which the processor does not round, in a range where bicubic does not overshoot [0, 1].
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_rescale=False)
    prompts = ["a fox", "three dogs"]
    with torch.no_grad():
        # As on the model card: unit embeddings, exp(logit_scale) times their product.
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=open_clip.tokenize(prompts)).pooler_output
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        theirs = model.logit_scale.exp() * (text * image).sum(-1)
    ours = PickScore(PickScoreConfig(weights=str(tmp_path / "pick.safetensors"))).score(
        ImageBatch(images=images, prompts=prompts)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

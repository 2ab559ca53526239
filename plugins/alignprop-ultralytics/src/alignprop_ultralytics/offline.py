"""Imports ultralytics without network access and without settings files in the home folder.

Ultralytics reads these environment variables when it is first imported, so every module of this plugin imports it from
here. Variables that the user has set are kept.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

_threads = os.environ.get("OMP_NUM_THREADS")
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_VERBOSE", "false")
if "YOLO_CONFIG_DIR" not in os.environ:
    _folder = tempfile.mkdtemp(prefix="alignprop-ultralytics-")
    os.environ["YOLO_CONFIG_DIR"] = _folder
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)

from PIL import Image  # noqa: E402

_open = Image.open
import ultralytics  # noqa: E402
from ultralytics.nn import tasks  # noqa: E402
from ultralytics.nn.modules.head import Detect, v10Detect  # noqa: E402
from ultralytics.nn.tasks import DetectionModel, yaml_model_load  # noqa: E402

# Ultralytics sets this to 1 for its data loaders, which would also limit processes that the user starts.
if _threads is None:
    os.environ.pop("OMP_NUM_THREADS", None)

# Ultralytics replaces Image.open. For files that are not images, its version can raise a different error.
Image.open = _open

__all__ = ["Detect", "DetectionModel", "tasks", "ultralytics", "v10Detect", "yaml_model_load"]

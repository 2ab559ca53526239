"""Imports ultralytics so that it neither phones home nor writes settings into the home folder.

Every module here that needs ultralytics takes it from this one: the variables are read when ultralytics is first
imported. Values the user has set are kept.
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

# It sets this to 1 for its own data loaders; whoever starts a process from here did not ask for that.
if _threads is None:
    os.environ.pop("OMP_NUM_THREADS", None)

# It lets Pillow try a format whose package may be missing, and a file that is no picture then raises another error.
Image.open = _open

__all__ = ["Detect", "DetectionModel", "tasks", "ultralytics", "v10Detect", "yaml_model_load"]

# The types of the public API; tests/test_alignprop.py compares it with alignprop_core.
from alignprop_core import Callback as Callback
from alignprop_core import ImageBatch as ImageBatch
from alignprop_core import Registry as Registry
from alignprop_core import Reward as Reward
from alignprop_core import RewardConfig as RewardConfig
from alignprop_core import RewardSpec as RewardSpec
from alignprop_core import Run as Run
from alignprop_core import RunConfig as RunConfig
from alignprop_core import Sampler as Sampler
from alignprop_core import StepStats as StepStats
from alignprop_core import Trainer as Trainer
from alignprop_core import __version__ as __version__
from alignprop_core import default_registry as default_registry
from alignprop_core import hookimpl as hookimpl
from alignprop_core import load_config as load_config
from alignprop_core import load_prompts as load_prompts
from alignprop_core import train as train

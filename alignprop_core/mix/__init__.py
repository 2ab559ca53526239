"""The mix: several rewards, weighted, to one direction at the image.

The mix sees images and scores and returns a gradient at the images; it knows nothing of diffusion. Whoever made the
images sends that gradient on, once, whatever the number of terms.
"""

from alignprop_core.mix.figures import Figures, StepFigures
from alignprop_core.mix.mix import Direction, Mix, Scores
from alignprop_core.mix.running import Running
from alignprop_core.mix.term import Term

__all__ = ["Direction", "Figures", "Mix", "Running", "Scores", "StepFigures", "Term"]

"""The tiny pipelines of alignprop_core.testing, under the name the core's own tests use."""

from alignprop_core.testing.pipelines import BOS, EOS, tiny_sd, tiny_tokenizer

__all__ = ["BOS", "EOS", "tiny_sd", "tiny_tokenizer"]

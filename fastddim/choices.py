"""The words that options choose among, and other names that the field has for them.

Options keep the word that they are given. Code reads a word by `check_choice` with the table here:
plans, manifests and keys of caches then hold only the package's own words.

The words are in a module of their own for the command line, whose help waits for neither PyTorch
nor NumPy.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Spacing: TypeAlias = Literal["uniform", "quadratic", "leading", "trailing", "linspace"]
"""The ways of choosing S timesteps out of T; see `fastddim.select_timesteps`."""
Variance: TypeAlias = Literal["small", "large"]
"""DDPM's two variances of the noise."""
Prediction: TypeAlias = Literal["epsilon", "sample", "v_prediction", "score"]
"""The quantities that a model may predict."""
Impl: TypeAlias = Literal["auto", "reference", "cpu", "triton", "cuda"]
"""The backends by name, and the choice of the fastest that works."""
Graph: TypeAlias = Literal["auto", "loop"] | bool
"""The parts of a loop that are captured as a CUDA graph; see `graph` of `fastddim.sample`."""
EffortName: TypeAlias = Literal["quick", "thorough"]
"""The lengths of the tuner's search."""
Format: TypeAlias = Literal["npz", "safetensors", "png-folder"]
"""The kinds of files that a run of many samples writes."""

SpacingSynonym: TypeAlias = Literal["quad"]
"""Another name of a spacing, which ermongroup/ddim has."""
VarianceSynonym: TypeAlias = Literal["fixed_small", "fixed_large", "fixedsmall", "fixedlarge"]
"""Other names of the variances, which diffusers and ermongroup/ddim have."""
PredictionSynonym: TypeAlias = Literal[
    "eps",
    "noise",
    "pred_noise",
    "x0",
    "x_0",
    "pred_x0",
    "x_start",
    "start_x",
    "v",
    "velocity",
    "pred_v",
]
"""Other names of the predictions, which other libraries and papers have."""

VARIANCES = get_args(Variance)
"""The names of the variances."""
PREDICTIONS = get_args(Prediction)
"""The names of the predictions."""

SPACING_SYNONYMS: dict[SpacingSynonym, Spacing] = {"quad": "quadratic"}
"""The name in ermongroup/ddim. Its "uniform" is ⌊T/S⌋·i, which is "leading" here, and "linear" is
the paper's τ to some and a linspace to others: neither is a synonym.
"""

VARIANCE_SYNONYMS: dict[VarianceSynonym, Variance] = {
    "fixed_small": "small",
    "fixed_large": "large",
    "fixedsmall": "small",
    "fixedlarge": "large",
}
"""Names in diffusers and in ermongroup/ddim."""

PREDICTION_SYNONYMS: dict[PredictionSynonym, Prediction] = {
    "eps": "epsilon",
    "noise": "epsilon",
    "pred_noise": "epsilon",
    "x0": "sample",
    "x_0": "sample",
    "pred_x0": "sample",
    "x_start": "sample",
    "start_x": "sample",
    "v": "v_prediction",
    "velocity": "v_prediction",
    "pred_v": "v_prediction",
}
"""Names in latent-diffusion, guided-diffusion, lucidrains/denoising-diffusion-pytorch, papers."""

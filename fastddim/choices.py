"""The words that options choose among, and other names that the field has for them.

Options keep the word that they are given. Code reads a word by `check_choice` with the table here:
plans, manifests and keys of caches then hold only the package's own words.

The words are in a module of their own for the command line, whose help waits for neither PyTorch
nor NumPy.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Spacing: TypeAlias = Literal["uniform", "quadratic", "leading", "trailing", "linspace"]
Variance: TypeAlias = Literal["small", "large"]
Prediction: TypeAlias = Literal["epsilon", "sample", "v_prediction", "score"]
Impl: TypeAlias = Literal["auto", "reference", "cpu", "triton", "cuda"]
Graph: TypeAlias = Literal["auto", "loop"] | bool
EffortName: TypeAlias = Literal["quick", "thorough"]
Format: TypeAlias = Literal["npz", "safetensors", "png-folder"]

SpacingSynonym: TypeAlias = Literal["quad"]
VarianceSynonym: TypeAlias = Literal["fixed_small", "fixed_large", "fixedsmall", "fixedlarge"]
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

VARIANCES = get_args(Variance)
PREDICTIONS = get_args(Prediction)

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

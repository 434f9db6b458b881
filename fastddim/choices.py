"""The names that options choose from.

They are in a module of their own for the command line, whose help waits for neither PyTorch nor
NumPy.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Spacing: TypeAlias = Literal["uniform", "quadratic", "leading", "trailing", "linspace"]
Variance: TypeAlias = Literal["small", "large"]
Prediction: TypeAlias = Literal["epsilon", "sample", "v_prediction", "score"]
EffortName: TypeAlias = Literal["quick", "thorough"]
Format: TypeAlias = Literal["npz", "safetensors", "png-folder"]

VARIANCES = get_args(Variance)
PREDICTIONS = get_args(Prediction)

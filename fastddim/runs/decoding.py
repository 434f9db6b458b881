"""The way from samples to images: the function or the autoencoder that the user gives."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastddim import adapter
from fastddim.runs.fingerprints import any_on_meta, fingerprint
from fastddim.wrappers import reachable

# The numbers in the config of an autoencoder of diffusers that its latents are scaled with.
_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


class Decoder:
    """The function that makes images of the samples of a batch before they are written."""

    def __init__(self, decode: Any) -> None:
        """Find out what `decode` is.

        Raises:
            TypeError, ValueError: it is neither a function of samples nor an autoencoder that tells
                the scale of its latents, or a network in training mode.
        """
        self._given = decode
        self._scaling = _scaling(decode)
        if not self._scaling:
            _check_function(decode)
        self._networks = [value for value in reachable(decode) if isinstance(value, nn.Module)]
        for network in self._networks:
            if network.training:
                raise ValueError(
                    "decode: expected networks in eval mode (.eval()), got "
                    f"{type(network).__qualname__} in training mode"
                )

    @property
    def readable(self) -> bool:
        """False where hooks offload the weights, which then have no bytes to read."""
        return not any(map(any_on_meta, self._networks))

    def describe(self, shape: Sequence[int]) -> dict[str, Any]:
        """The entry in the manifest.

        Args:
            shape: the shape of one sample before it is decoded.
        """
        given: Any = self._given
        weights = sorted(map(fingerprint, self._networks)) if self.readable else []
        name = None if isinstance(given, nn.Module) else getattr(given, "__qualname__", None)
        return {
            "name": name or type(given).__qualname__,
            "weights": weights,
            **self._scaling,
            "shape": list(shape),
        }

    def shape_of_one(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        """The shape of a decoded sample, found by decoding zeros."""
        return tuple(self(torch.zeros(1, *shape, dtype=dtype, device=device)).shape[1:])

    def __call__(self, samples: Tensor) -> Tensor:
        """The decoded samples `[b, …]`.

        Raises:
            TypeError, ValueError: the result is no floating-point tensor of that many samples.
        """
        with torch.no_grad():
            decoded = self._decode_latents(samples) if self._scaling else self._given(samples)
        if not isinstance(decoded, Tensor) or not decoded.is_floating_point():
            got = decoded.dtype if isinstance(decoded, Tensor) else type(decoded).__name__
            raise TypeError(f"decode: expected it to return a floating-point tensor, got {got}")
        if decoded.ndim < 2 or len(decoded) != len(samples):
            raise ValueError(
                f"decode: expected it to return {len(samples)} samples, "
                f"got shape {tuple(decoded.shape)}"
            )
        return decoded

    def _decode_latents(self, samples: Tensor) -> Any:
        autoencoder, scaling = self._given, self._scaling
        dtype = adapter.own_dtype(autoencoder) or samples.dtype
        device = torch.device(adapter.own_device(autoencoder) or samples.device)
        # The operations of diffusers' pipelines in their order, for the same bits.
        latents = samples
        if "latents_std" in scaling:
            latents = latents * _per_channel(scaling["latents_std"], latents)
        latents = latents / scaling["scaling_factor"]
        for shift in ("shift_factor", "latents_mean"):
            if shift in scaling:
                latents = latents + _per_channel(scaling[shift], latents)
        return adapter.output_tensor(autoencoder.decode(latents.to(device, dtype)))


def _scaling(decode: Any) -> dict[str, Any]:
    """The scale of the latents of an autoencoder; empty for anything else."""
    config = getattr(decode, "config", None)
    if not callable(getattr(decode, "decode", None)):
        return {}
    found = {name: getattr(config, name, None) for name in _SCALING}
    if found["scaling_factor"] is None:
        return {}
    return {
        name: [float(v) for v in value] if isinstance(value, Sequence) else float(value)
        for name, value in found.items()
        if value is not None
    }


def _check_function(decode: Any) -> None:
    """Refuse a function that would decode without the scale of the latents, or encode first."""
    if not callable(decode):
        raise TypeError(
            "decode: expected a function of samples or an autoencoder of diffusers, got "
            f"{type(decode).__name__}"
        )
    owner = decode.__self__ if inspect.ismethod(decode) else None
    if _scaling(owner):
        raise ValueError(
            "decode: expected the autoencoder itself (decode=vae), whose config has the scale of "
            "its latents, or a function that scales them, got its method "
            f"{decode.__name__}"
        )
    if isinstance(decode, nn.Module) and callable(getattr(decode, "decode", None)):
        raise ValueError(
            "decode: expected an autoencoder with config.scaling_factor, or a function of samples "
            f"such as {type(decode).__qualname__}.decode, got a {type(decode).__qualname__}"
        )


def _per_channel(values: float | Sequence[float], latents: Tensor) -> float | Tensor:
    """`values` in the shape that latents `[b, C, …]` can be scaled with."""
    if isinstance(values, float):
        return values
    column = torch.tensor(values, dtype=latents.dtype, device=latents.device)
    return column.reshape(-1, *[1] * (latents.ndim - 2))

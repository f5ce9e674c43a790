"""Keys and values of the tokens so far, for decoding."""

from __future__ import annotations

import torch


class KeyValueCache:
    """Room for `capacity` tokens of this rank's key/value heads, in every layer.

    A layer's tensors [B, K, capacity, D] are made when the layer first writes. `length` counts tokens
    that all layers have written.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(self, layer: int, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens after those there; views of all keys and values of `layer`.

        Raises ValueError when they do not fit.
        """
        stop = self.length + key_BKSD.shape[2]
        if stop > self.capacity:
            raise ValueError(f"{stop} tokens in a key/value cache of {self.capacity}")
        if layer not in self._layers:
            shape = (*key_BKSD.shape[:2], self.capacity, key_BKSD.shape[3])
            self._layers[layer] = key_BKSD.new_empty(shape), value_BKSD.new_empty(shape)
        for held, new in zip(self._layers[layer], (key_BKSD, value_BKSD), strict=True):
            held[:, :, self.length : stop] = new
        key, value = self._layers[layer]
        return key[:, :, :stop], value[:, :, :stop]

    def advance(self, tokens: int) -> None:
        """Count `tokens` that every layer has appended."""
        self.length += tokens

    def keep(self, rows: list[int], length: int) -> None:
        """Go on with some rows of the batch and the last `length` tokens of each."""
        capacity = self.capacity - (self.length - length)
        for layer, held in self._layers.items():
            self._layers[layer] = tuple(tensor[rows, :, self.capacity - capacity :] for tensor in held)
        self.capacity, self.length = capacity, length

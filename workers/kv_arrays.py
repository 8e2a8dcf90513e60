"""The KV arrays of an attention shard: each layer's arrays stay on the layer's device.

Every device that has layers knows which positions are visible. Whole blocks may be read and
written: these are copies of keys and values, for and from another process.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from milliways.model.decoder import Decoder
from milliways.model.kv_cache import LayerCache, StepBatch, make_kv_cache
from milliways.model.runner import CacheSize, jitted_parts
from milliways.wire.calls import Refusal, StoreBlocks
from milliways.wire.errors import RefusalReason
from milliways.workers.devices import Device, settle
from milliways.workers.programs import block_programs


class KvArrays:
    """Owns keys and values by layer, and the visible positions by device.

    `layer_devices` has the device of each layer from `first_layer` on. The layers of one device
    are consecutive. The shard replaces entries of `layers` with what a program returns.

    Invariant: `layers` has every layer of the shard, `visible_NP` every device of `layer_devices`.
    """

    def __init__(
        self,
        decoder: Decoder,
        first_layer: int,
        layer_devices: Sequence[Device],
        cache_size: CacheSize,
    ) -> None:
        self.first_layer = first_layer
        self.num_layers = len(layer_devices)
        self.cache_size = cache_size
        self.layers: dict[int, LayerCache] = {}
        self.visible_NP: dict[Device, jax.Array] = {}
        self._decoder = decoder
        self._devices = dict(enumerate(layer_devices, first_layer))
        self._mark_visible = jitted_parts(decoder).mark_visible
        for layer, device in self._devices.items():
            with jax.default_device(device):
                cache = make_kv_cache(
                    decoder.config,
                    1,
                    cache_size.num_blocks,
                    cache_size.block_size,
                    decoder.dtype,
                )
            cache = settle(cache, device)
            self.layers[layer] = cache.layers_L[0]
            self.visible_NP.setdefault(device, cache.visible_NP)

    def mark_visible(self, steps: Mapping[Device, StepBatch]) -> None:
        """Records on every device which positions of a step later queries may see."""
        for device, visible_NP in self.visible_NP.items():
            self.visible_NP[device] = self._mark_visible(visible_NP, steps[device])

    @property
    def block_bytes(self) -> int:
        """The size of one block's keys and values, in all layers of the shard."""
        values = np.prod(self._block_shape, dtype=np.int64) * self._decoder.dtype.itemsize
        return 2 * int(values)

    def read_blocks(self, block_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [C, L, P, R, K] of blocks, copied."""
        # One at a time: otherwise each number of blocks would need a program of its own.
        blocks = [self._read_block(block_id) for block_id in block_ids]
        keys_CLPRK, values_CLPRK = zip(*blocks, strict=True)
        return np.stack(keys_CLPRK), np.stack(values_CLPRK)

    def write_block(
        self,
        block_id: int,
        token_ids_P: np.ndarray,
        keys_LPRK: np.ndarray,
        values_LPRK: np.ndarray,
    ) -> None:
        """Puts keys and values into a block, as if its tokens had been computed there."""
        _, write = block_programs()
        for device, layers, layers_L in self._cache_runs():
            here = slice(layers.start - self.first_layer, layers.stop - self.first_layer)
            layers_L, self.visible_NP[device] = write(
                layers_L,
                self.visible_NP[device],
                np.int32(block_id),
                token_ids_P != self._decoder.config.pad_token,
                # Copied: a device may still read them when the sender writes there again.
                keys_LPRK[here].copy(),
                values_LPRK[here].copy(),
            )
            self.layers.update(zip(layers, layers_L, strict=True))

    def visible(self, block_id: int) -> np.ndarray:
        """Which positions [P] of a block later queries may see, for inspection."""
        visible_NP = next(iter(self.visible_NP.values()))
        return np.asarray(visible_NP)[block_id].copy()

    def blocks_fault(self, call: StoreBlocks) -> Refusal | None:
        """Why blocks of another process do not fit in here, if they do not."""
        wanted, dtype = self._block_shape, self._decoder.dtype
        num_blocks = len(call.token_ids_CP)
        layers = (call.first_layer, call.keys_CLPRK.shape[1])
        if layers != (self.first_layer, self.num_layers):
            message = f"blocks of {layers[1]} layers from {layers[0]} on: other layers are here"
            return Refusal(RefusalReason.NOT_HELD, message)
        is_sound = (
            num_blocks > 0
            and call.token_ids_CP.shape == (num_blocks, wanted[1])
            and call.keys_CLPRK.shape == call.values_CLPRK.shape == (num_blocks, *wanted)
            and call.keys_CLPRK.dtype == call.values_CLPRK.dtype == dtype
        )
        if is_sound:
            return None
        message = f"blocks {call.keys_CLPRK.shape} of {call.keys_CLPRK.dtype}, wanted {wanted}"
        return Refusal(RefusalReason.MALFORMED, message)

    def _read_block(self, block_id: int) -> tuple[np.ndarray, np.ndarray]:
        read, _ = block_programs()
        # Start all devices before waiting for the first one.
        runs = [read(layers_L, np.int32(block_id)) for _, _, layers_L in self._cache_runs()]
        keys, values = zip(*jax.device_get(runs), strict=True)
        return np.concatenate(keys), np.concatenate(values)

    def _cache_runs(self) -> list[tuple[Device, range, tuple[LayerCache, ...]]]:
        """Each device with its layers and their KV arrays."""
        runs: list[tuple[Device, range, tuple[LayerCache, ...]]] = []
        for device in self.visible_NP:
            here = [layer for layer, on in self._devices.items() if on == device]
            layers = range(here[0], here[-1] + 1)
            runs.append((device, layers, tuple(self.layers[layer] for layer in layers)))
        return runs

    @property
    def _block_shape(self) -> tuple[int, int, int, int]:
        """L, P, R, K of a block."""
        config = self._decoder.config
        size = self.cache_size.block_size
        return (self.num_layers, size, config.num_kv_heads, config.key_size)

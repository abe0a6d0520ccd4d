"""``onnxlathe plan``: how a decoder can be spread over devices, and how fast it can be at best, from sizes alone."""

from __future__ import annotations

import dataclasses
import itertools

from onnxlathe.runtime.errors import PlanError


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder by its sizes.

    Attributes:
        params: weights, all of them.
        layers: layers.
        hidden: width of the residual stream.
        kv_heads: key/value heads, which tensor parallelism divides.
        head_size: elements of a head.
        weight_bits: bits of a weight, scales included: 16, 8.25, 4.5.
        cache_bits: bits of an element of the key/value cache; activations have as many.
    """

    params: float
    layers: int
    hidden: int
    kv_heads: int
    head_size: int = 128
    weight_bits: float = 16
    cache_bits: float = 16

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights."""
        return self.params * self.weight_bits / 8

    def cache_bytes(self, tokens: int) -> float:
        """Bytes of the cache of ``tokens`` tokens, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * tokens * self.cache_bits / 8


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices that are all alike.

    Attributes:
        devices: how many.
        memory: bytes of each.
        bandwidth: bytes a second of each device's memory.
        link: bytes a second between two devices.
        flops: operations a second of each, in the type of the weights.
        latency: seconds that an exchange takes at least.
    """

    devices: int
    memory: float
    bandwidth: float
    link: float
    flops: float
    latency: float = 10e-6


@dataclasses.dataclass(frozen=True)
class Split:
    """One way to spread a decoder: ``stages`` x ``ranks`` devices a copy, ``copies`` of it.

    Attributes:
        stages, ranks, copies: as said.
        device_bytes: weights and caches of the fullest device.
        step_seconds: one token for every text of a copy, at best.
        tokens_per_second: of all copies, all stages busy with micro-batches.
        exchange_share: the part of a step in exchanges.
    """

    stages: int
    ranks: int
    copies: int
    device_bytes: float
    step_seconds: float
    tokens_per_second: float
    exchange_share: float


def plan(model: Decoder, hardware: Hardware, batch: int = 1, context: int = 4096) -> list[Split]:
    """All ways that fit into the memory, the most tokens a second first.

    A step reads the weights and caches of a device once, and multiplies; the slower of the two counts. Ranks exchange
    twice a layer (a ring: 2 (r - 1) / r of the activations), stages hand them on once. Nothing overlaps.

    Args:
        model: the decoder.
        hardware: the devices.
        batch: texts at once on a copy.
        context: tokens of each.

    Raises:
        PlanError: no way fits; the memory that would is said.
    """
    found: list[Split] = []
    least = float("inf")
    for stages, ranks in itertools.product(range(1, hardware.devices + 1), repeat=2):
        if stages * ranks > hardware.devices or model.kv_heads % ranks or stages > model.layers:
            continue
        split = _split(model, hardware, batch, context, stages, ranks)
        least = min(least, split.device_bytes)
        if split.device_bytes <= hardware.memory:
            found.append(split)
    if not found:
        raise PlanError(
            f"{hardware.devices} devices of {hardware.memory / 1e9:.0f} GB do not hold the model.",
            f"The best way needs {least / 1e9:.1f} GB a device: more devices, fewer weight bits or a smaller batch.",
        )
    return sorted(found, key=lambda split: (-split.tokens_per_second, split.stages * split.ranks))


def _split(model: Decoder, hardware: Hardware, batch: int, context: int, stages: int, ranks: int) -> Split:
    layers = -(-model.layers // stages)  # of the fullest stage
    share = layers / model.layers / ranks
    read = share * (model.weight_bytes + batch * model.cache_bytes(context))
    held = share * (model.weight_bytes + stages * batch * model.cache_bytes(context))  # every stage's batch has a cache
    compute = max(read / hardware.bandwidth, 2 * share * model.params * batch / hardware.flops)
    activations = batch * model.hidden * model.cache_bits / 8
    ring = 2 * (ranks - 1) / ranks * activations / hardware.link + hardware.latency
    exchanges = 2 * layers * ring if ranks > 1 else 0.0
    hand_on = activations / hardware.link + hardware.latency if stages > 1 else 0.0
    stage = compute + exchanges + hand_on
    copies = hardware.devices // (stages * ranks)
    # Each stage works on a batch of its own: a copy gives `batch` tokens for each time of a stage.
    return Split(stages, ranks, copies, held, stages * stage, copies * batch / stage, (exchanges + hand_on) / stage)

"""Estimate what it costs that the tensor axis of a mesh leaves a host, so that its collectives cross the network."""

from __future__ import annotations

import re
from collections import Counter

import jax.numpy as jnp
import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.parallel.collectives import CollectiveOp, StepShape, planned_decode_step_sites
from jaxmoe.parallel.mesh import AXES
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.planner.hardware import hardware_names, read_hardware
from jaxmoe.planner.links import LinkModel, RankGroup

_CPU, _GENERIC = "cpu-8", "h100"


def tensor_span_line(
    config: ModelConfig, placement: MeshPlacement, hosts: np.ndarray, *, device_kind: str, dispatch: str,
    max_num_seqs: int,
) -> str | None:  # fmt: skip
    """Return a line with the estimated cost if tensor groups span several hosts, otherwise None.

    hosts: index of the host of every device, in the shape of the mesh (mesh.hosts_of). device_kind: as JAX names it.
    dispatch: the backend. max_num_seqs: decoding requests over all ranks, for which the last layer is estimated.
    """
    ranks, spanned = hosts.shape[-1], max(len(set(group)) for group in hosts.reshape(-1, hosts.shape[-1]).tolist())
    collectives = _of_last_layer(config, placement, dispatch=dispatch, max_num_seqs=max_num_seqs)
    if spanned == 1 or not collectives:
        return None
    preset, exact = preset_of(device_kind)
    links = LinkModel(read_hardware(preset), devices=hosts.size)
    over = sum(links.seconds(one, _group_over(one.axes, hosts)) for one in collectives)
    inside = sum(links.seconds(one, _group_over(one.axes, np.zeros_like(hosts))) for one in collectives)
    shown = " x ".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items())
    kinds = "all-reduces" if {one.op for one in collectives} == {"all-reduce"} else "collectives"
    source = f"hardware preset {preset}" if exact else f"no hardware preset is known for {device_kind}: as for {preset}"
    return (
        f"mesh {shown}: tensor groups of {ranks} devices span {spanned} hosts or processes, so their {kinds} cross "
        f"between them in every layer: planned {over * 1e6:,.0f} us a layer over the network against "
        f"{inside * 1e6:,.0f} us inside a host, for {max_num_seqs} requests ({source})"
    )


def preset_of(device_kind: str) -> tuple[str, bool]:
    """Return the hardware preset of a kind of GPU or CPU, and whether it describes this kind.

    A kind without a preset gives that of a common GPU.
    """
    words = re.split(r"[^a-z0-9]+", device_kind.lower())
    if "cpu" in words:
        return _CPU, True
    name = next((preset for preset in hardware_names() if preset in words), None)
    return (_GENERIC, False) if name is None else (name, True)


def _of_last_layer(
    config: ModelConfig, placement: MeshPlacement, *, dispatch: str, max_num_seqs: int
) -> list[CollectiveOp]:
    """Return the collectives of the last layer over the tensor axis, or over it and other axes, in a decode step."""
    aligned = placement.strip_tokens * placement.num_shards("page_token")
    tokens = -(-max_num_seqs // (placement.num_shards("batch") * placement.num_stages * aligned)) * aligned
    shape = StepShape(num_tokens=tokens, num_sampled=tokens, itemsize=jnp.dtype(config.dtype).itemsize, picked=True)
    sites = [
        site
        for site in planned_decode_step_sites(config, placement, shape, dispatch=dispatch)
        if site.segment is not None
    ]
    last = max(((site.segment, site.block) for site in sites), default=None)
    return [
        site.collective
        for site in sites
        if (site.segment, site.block) == last and "tensor" in site.collective.axes and site.collective.result_bytes
    ]


def _group_over(axes: tuple[str, ...], hosts: np.ndarray) -> RankGroup:
    """Return the group of devices along mesh axes that has the fewest devices on one of its hosts."""
    last = tuple(range(-len(axes), 0))
    grouped = np.moveaxis(hosts, [AXES.index(axis) for axis in axes], last)
    ranks = int(np.prod(grouped.shape[-len(axes) :]))
    inside = min(min(Counter(group).values()) for group in grouped.reshape(-1, ranks).tolist())
    return RankGroup(ranks, inside)

"""EngineConfig: the one list of options of LLM, AsyncEngine, the command line and requests without weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, TypedDict

from jaxmoe.checks import is_finite
from jaxmoe.config.model import canonical_dtype
from jaxmoe.errors import ConfigError

PAGE_SIZE = 16  # tokens of a KV cache page
CHUNK_TOKENS = 512  # prompt tokens of a step and rank
MAX_DECODE_STEPS = 4  # tokens that a request decodes in one step where no prompt waits
DEFAULT_LAYOUT_NAME = "ep-tp"

# Old keyword arguments and command-line options, with their present names.
_RENAMED = """
max_batch=max_num_seqs max_requests=max_num_seqs batch=max_num_seqs concurrency=max_num_seqs memory_gib=kv_cache_gib
host_gib=host_cache_gib turns=decode_steps stage_chunks=virtual_stages most_mib=max_mib
"""
RENAMED = dict(pair.split("=") for pair in _RENAMED.split())


def _check_positive(config: object, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")


def _set_canonical(config: object, names: Iterable[str]) -> None:
    """Replace aliases of dtypes by their full names, as in bfloat16 for bf16."""
    for name in names:
        if isinstance(value := getattr(config, name), str):
            object.__setattr__(config, name, canonical_dtype(value))


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Place a model on a device mesh.

    Attributes:
        mesh: Mesh axes ("data=2,tensor=2,expert=2"), a preset, a mapping of axis sizes, or a jax Mesh over some of
            these axes; its devices keep their coordinates. Axes that need fewer devices than are present use the
            nearest ones and log a warning. By default all devices are on the expert axis (MoE) or the tensor axis.
        layout: How mesh axes shard tokens, layers and experts: a name ("ep-tp", "tp-ep-sp", ...), its parts, or a
            ShardingLayout (parallel/layouts.py).
        virtual_stages: Virtual stages of each pipeline stage. More of them shorten pipeline bubbles and increase
            communication.
        redundant_experts: Physical experts of each MoE layer beyond its logical experts, at least 0, so that
            LLM.place_experts can move and replicate experts. Rounded up so that all ranks have equally many. By default
            (None) the experts keep their order and cannot be moved.
    """

    mesh: Any = _option(
        None, "Mesh axes and their sizes, as in data=2,tensor=2,expert=2, or a mesh preset such as cpu-8."
    )
    layout: Any = _option(
        DEFAULT_LAYOUT_NAME,
        "Parallelism layout: how mesh axes shard attention and experts. One of ep-tp, tp-ep, dp-ep, tp, ep-tp-sp, "
        "tp-ep-sp, tp-sp and cp-ep-tp, or its parts, as in batch=data+expert,split=tensor.",
    )
    virtual_stages: int = _option(1, "Virtual stages per pipeline stage (interleaved schedule).")
    redundant_experts: int | None = _option(None, "Physical experts of each MoE layer beyond its logical experts.")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Size the KV cache.

    Attributes:
        kv_dtype: Dtype of cached keys and values: float32, bfloat16, fp8 or int8. By default that of activations.
        kv_cache_gib: GiB of pages on each device. By default 1 on a CPU and 90% of the free memory of an accelerator.
            LLM.generate sizes its cache by its requests instead.
        host_cache_gib: GiB of host memory for pages that are offloaded from the devices. They are swapped in again
            where that is measured to be faster than computing them.
        page_size: Tokens of a page; with context parallelism, of each rank.

    Raises: ConfigError if a value is out of range.
    """

    kv_dtype: str | None = _option(None, "Dtype of the KV cache: float32, bfloat16, fp8 or int8. Defaults to --dtype.")
    kv_cache_gib: float | None = _option(None, "GiB of KV cache pages on each device.")
    host_cache_gib: float = _option(0.0, "GiB of host memory for offloaded pages.")
    page_size: int = _option(PAGE_SIZE, "Tokens of a KV cache page.")

    def __post_init__(self) -> None:
        _set_canonical(self, ("kv_dtype",))
        _check_positive(self, ("page_size",))
        for name in ("kv_cache_gib", "host_cache_gib"):
            gib = getattr(self, name)
            if gib is None and name == "kv_cache_gib":
                continue
            if not is_finite(gib, below=2**40) or gib < 0:
                raise ConfigError(f"{name}={gib!r} must be a number of at least 0")


_PARTS: dict[str, Any] = {"parallel": ParallelConfig, "cache": CacheConfig}


def _check_part(name: str, value: object) -> None:
    if not isinstance(value, _PARTS[name]):
        raise ConfigError(f"{name}={value!r:.60} must be a {_PARTS[name].__name__}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Configure how a model is loaded, placed on devices and served.

    LLM, LLM.load and AsyncEngine take these options, also the options of the parts, as keyword arguments:
    `LLM("demo", mesh="tensor=2", kv_dtype="int8")`. The command line has an option of the same name for each. Requests
    to inspect, compile, map or plan a model hold these options, too. Dtypes are kept by their full names.

    Attributes:
        parallel: Mesh, layout, virtual stages and redundant experts.
        cache: Dtype and size of the KV cache.
        kernels: A KernelConfig, or a mapping from op to backend, as in {"grouped": "blocks"}. Ops that a mapping omits
            use the fastest backend of the platform: on a CPU with a C++ compiler, the native kernels.
        dtype: Dtype of activations and unquantized weights: float32, bfloat16 or float16. By default that of the
            checkpoint.
        weights_dtype: Format of the matrices of attention, MLPs and experts. The default, or the name of the
            checkpoint's own quantization, keeps the format of the checkpoint. int8 and fp8 (one scale per output) and
            int8-block and fp8-block (one scale per 128x128 block) quantize unquantized matrices. float32, bfloat16 or
            float16 dequantizes; it is also the dtype of activations, and dtype may not name another.
        revision: Branch, tag or commit of a Hugging Face Hub id.
        ignore_config_keys: Keys of config.json to ignore although jaxmoe does not support them.
        verify: Whether to check a converted checkpoint against its checksums first, which reads it once more.
        max_num_seqs: Maximum number of sequences that run at once, over all ranks of the batch. Rounded up on each
            rank, normally to a power of two.
        context: Maximum number of tokens of a request in an AsyncEngine. By default that of the model.
        chunk_tokens: Prompt tokens of a step and rank in an AsyncEngine.
        decode_steps: Tokens that a request of an AsyncEngine decodes in one step where no prompt waits.

    Raises: ConfigError if a value is out of range, or an option has another name.
    """

    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    kernels: Any = _option(None, "Backend of each op.")
    dtype: str | None = _option(
        None, "Dtype of weights and activations: float32, bfloat16 or float16. Defaults to the checkpoint's dtype."
    )
    weights_dtype: str | None = _option(
        None,
        "Dtype of the weight matrices: int8, fp8, int8-block or fp8-block quantizes them on load; float32, "
        "bfloat16 or float16 dequantizes them. Defaults to the checkpoint's format.",
    )
    revision: str | None = _option(None, "Branch, tag or commit of a Hugging Face Hub model.")
    ignore_config_keys: Iterable[str] = _option((), "Ignore this key of config.json. Can be given several times.")
    verify: bool = _option(False, "Verify a converted checkpoint by its checksums before loading it.")
    max_num_seqs: int = _option(64, "Maximum number of requests that run at once, over all devices.")
    context: int | None = _option(None, "Context length of each request, in tokens.")
    chunk_tokens: int = _option(CHUNK_TOKENS, "Prompt tokens that each rank computes in one step.")
    decode_steps: int = _option(MAX_DECODE_STEPS, "Tokens that a request decodes in one step where no prompt waits.")

    def __post_init__(self) -> None:
        for name in _PARTS:
            _check_part(name, getattr(self, name))
        _set_canonical(self, ("dtype", "weights_dtype"))
        object.__setattr__(self, "ignore_config_keys", tuple(self.ignore_config_keys))
        _check_positive(self, ("max_num_seqs", "chunk_tokens", "decode_steps"))
        if self.context is not None:
            _check_positive(self, ("context",))

    def with_options(self, options: Mapping[str, Any]) -> EngineConfig:
        """Return the configuration with these options replaced, each by its own name.

        Raises: ConfigError for an unknown name, naming the closest one, or for one that was renamed.
        """
        parts = {name: options.get(name, getattr(self, name)) for name in _PARTS}  # before options of their own
        own: dict[str, Any] = {}
        for name in _PARTS:
            _check_part(name, parts[name])
        for name, value in options.items():
            part = _PART_OF.get(name)
            if part is not None:
                parts[part] = replace(parts[part], **{name: value})
            elif name in OPTION_FIELDS:
                own[name] = value
            elif name not in _PARTS:
                raise ConfigError(unknown_option(name))
        return replace(self, **parts, **own)

    def options(self) -> dict[str, Any]:
        """Return the value of every option by its own name."""
        return {
            name: getattr(getattr(self, _PART_OF[name]) if name in _PART_OF else self, name) for name in OPTION_FIELDS
        }


class EngineOptions(TypedDict, total=False):
    """Keyword arguments of LLM and AsyncEngine: the options of EngineConfig and of its parts."""

    parallel: ParallelConfig
    cache: CacheConfig
    mesh: Any
    layout: Any
    virtual_stages: int
    redundant_experts: int | None
    kv_dtype: str | None
    kv_cache_gib: float | None
    host_cache_gib: float
    page_size: int
    kernels: Any
    dtype: str | None
    weights_dtype: str | None
    revision: str | None
    ignore_config_keys: Iterable[str]
    verify: bool
    max_num_seqs: int
    context: int | None
    chunk_tokens: int
    decode_steps: int


_PART_OF = {one.name: part for part, kind in _PARTS.items() for one in fields(kind)}
# Every option by name, with the options of the parts.
OPTION_FIELDS: dict[str, Field[Any]] = {
    one.name: one for kind in (*_PARTS.values(), EngineConfig) for one in fields(kind) if one.name not in _PARTS
}
# Options that only an AsyncEngine reads; all others take effect when the model is loaded.
SERVING_OPTIONS = frozenset(
    {"kv_cache_gib", "host_cache_gib", "page_size", "max_num_seqs", "context", "chunk_tokens", "decode_steps"}
)


def split_options(request_type: type[Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into fields of a request, and the rest: options of EngineConfig, not checked yet."""
    own = {one.name for one in fields(request_type)}
    return (
        {name: value for name, value in options.items() if name in own},
        {name: value for name, value in options.items() if name not in own},
    )


def checked_config(config: EngineConfig | None) -> EngineConfig:
    """Return a configuration, the default one for None. Raises: ConfigError for anything else."""
    if config is None:
        return EngineConfig()
    if not isinstance(config, EngineConfig):
        raise ConfigError(f"config={config!r:.60} must be an EngineConfig; options have names, as in mesh='tensor=2'")
    return config


def unknown_option(name: str) -> str:
    """Return the message for an option that does not exist: its present name, or the closest one."""
    if RENAMED.get(name) in OPTION_FIELDS:
        return f"{name} is now called {RENAMED[name]}: use {RENAMED[name]}"
    close = get_close_matches(name, OPTION_FIELDS, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"the options are {', '.join(sorted(OPTION_FIELDS))}"
    return f"there is no option {name}: {remedy}"

"""A whole layout on one line, as `--layout` takes it: `tp=2,pp=2,dp=2,zero=1,schedule=1F1B`. No torch."""

from __future__ import annotations

import dataclasses

from megatron_lite import log
from megatron_lite.config import sources
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.mesh_shape import MeshShape

_EXCHANGES = ("p2p", "a2a")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the axes, and what else a layout says; None is left to the configuration."""

    shape: MeshShape
    zero: int = 1
    virtual_stages: int = 1
    schedule: str | None = None
    sequence_parallel: bool | None = None
    context_exchange: str | None = None

    def put_on(self, config: RunConfig) -> RunConfig:
        """`config` in this layout; what that changes of its own is said in the log."""
        parallel = {
            "tensor_model_parallel_size": self.shape.tensor,
            "pipeline_model_parallel_size": self.shape.pipe,
            "num_virtual_stages_per_pipeline_rank": self.virtual_stages if self.virtual_stages > 1 else None,
            "pipeline_schedule": self.schedule,
            "context_parallel_size": self.shape.context,
            "zero_stage": self.zero,
        }
        if self.sequence_parallel is not None:
            parallel["sequence_parallel"] = self.sequence_parallel
        if self.context_exchange is not None:
            parallel["cp_comm_type"] = self.context_exchange
        for name, value in parallel.items():
            if (asked := getattr(config.parallel, name)) not in (value, getattr(ParallelConfig(), name)):
                log.note(f"--layout takes {name}={value}, not the {asked} of the configuration")
        return sources.override(config, {"parallel": parallel})


def parse_layout(text: str) -> Layout:
    """The layout that `--layout` names; missing axes are 1. Raises ConfigError."""
    sizes = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1, "ep": 1, "zero": 1, "sp": 0}
    words: dict[str, str | None] = {"schedule": None, "cp-comm": None}
    named: set[str] = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key in named:
            raise ConfigError(f"--layout {text} gives {key} twice; give it once")
        named.add(key)
        if key in words and value:
            words[key] = value
        elif key in sizes and value.isdecimal() and (int(value) >= 1 or key in ("zero", "sp")):
            sizes[key] = int(value)
        else:
            raise ConfigError(
                f"--layout has {item!r}; write it as tp=2,pp=1,vpp=1,cp=1,dp=2,ep=1,zero=1,schedule=1F1B,sp=1,"
                f"cp-comm=a2a (axes left out are 1)"
            )
    if sizes["zero"] > 3:
        raise ConfigError(f"--layout has zero={sizes['zero']}; ZeRO stages are 0, 1, 2 and 3")
    if sizes["ep"] > 1:
        raise ConfigError(f"--layout has ep={sizes['ep']}, which is not in this version; leave it out.")
    if sizes["sp"] > 1:
        raise ConfigError(f"--layout has sp={sizes['sp']}; sequence parallelism is 1, on, or 0, off")
    if words["cp-comm"] not in (None, *_EXCHANGES):
        raise ConfigError(f"--layout has cp-comm={words['cp-comm']}; choose {' or '.join(_EXCHANGES)}")
    return Layout(
        MeshShape(sizes["pp"], sizes["dp"], sizes["cp"], sizes["ep"], sizes["tp"]),
        sizes["zero"],
        sizes["vpp"],
        words["schedule"],
        bool(sizes["sp"]) if "sp" in named else None,
        words["cp-comm"],
    )

"""The mesh as DeepSpeed asks for it."""

from __future__ import annotations

import torch.distributed as dist

from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.process_mesh import ProcessMesh


class MeshForDeepSpeed:
    """The mesh under the names DeepSpeed asks for. "Model parallel" is tensor and pipe together:
    the group over which it sums gradient norms. "Data parallel" is data and context together: it shards over them."""

    def __init__(self, mesh: ProcessMesh):
        self._mesh = mesh
        self._data_ranks = mesh.shape.group_of(mesh.global_rank, *REPLICAS)
        self._groups = {axes: self._group(*axes) for axes in (REPLICAS, ("tensor",), ("pipe",), ("pipe", "tensor"))}

    def _group(self, *axes: str) -> dist.ProcessGroup:
        """A group even where it is this rank alone, which DeepSpeed needs."""
        return self._mesh.group(*axes) or self._mesh.make_group(self._mesh.shape.groups(*axes), "+".join(axes))

    def get_model_parallel_rank(self) -> int:
        return self._mesh.rank("pipe") * self._mesh.size("tensor") + self._mesh.rank("tensor")

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.size("pipe", "tensor")

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["pipe", "tensor"]

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.rank("tensor")

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.size("tensor")

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["tensor",]

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._mesh.rank("pipe")

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.size("pipe")

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["pipe",]

    def get_data_parallel_rank(self) -> int:
        return self._mesh.rank(*REPLICAS)

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.size(*REPLICAS)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups[REPLICAS]

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._data_ranks

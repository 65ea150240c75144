"""Several processes of one run: process group, rendezvous, collectives, data parallelism, synchronised BatchNorm.

Imports ``sslfast.device``. Everything works in a single process too, where it exchanges nothing.
"""

from sslfast.distributed.collectives import (
    background_gather,
    barrier,
    broadcast_object,
    gather_objects,
    gather_rows,
    gather_rows_with_gradient,
    gather_to_rank0,
    gather_uneven,
    is_main,
    max_over_ranks,
    mean_over_ranks,
    own_rows,
    raise_together,
    reduce_scatter_rows,
    shard_bounds,
    sum_over_ranks,
    together,
)
from sslfast.distributed.data_parallel import broadcast_statistics, check_replicas, ignore_in_ddp, no_sync, replicate
from sslfast.distributed.process_group import (
    LostRankError,
    destroy_process_group,
    distributed_device,
    init_process_group,
    is_restart,
    local_world_size,
    lost_ranks_named,
    process_group,
    rank,
    world_size,
)
from sslfast.distributed.shards import Shard, row_shard, split_evenly
from sslfast.distributed.sync_batchnorm import convert_sync_batchnorm

__all__ = [
    "LostRankError",
    "Shard",
    "background_gather",
    "barrier",
    "broadcast_object",
    "broadcast_statistics",
    "check_replicas",
    "convert_sync_batchnorm",
    "destroy_process_group",
    "distributed_device",
    "gather_objects",
    "gather_rows",
    "gather_rows_with_gradient",
    "gather_to_rank0",
    "gather_uneven",
    "ignore_in_ddp",
    "init_process_group",
    "is_main",
    "is_restart",
    "local_world_size",
    "lost_ranks_named",
    "max_over_ranks",
    "mean_over_ranks",
    "no_sync",
    "own_rows",
    "process_group",
    "raise_together",
    "rank",
    "reduce_scatter_rows",
    "replicate",
    "row_shard",
    "shard_bounds",
    "split_evenly",
    "sum_over_ranks",
    "together",
    "world_size",
]

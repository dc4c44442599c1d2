"""`ScenarioBatch`: one minibatch of one rank, in the form that TorchRec's pipelines move and distribute.

Shapes: `B` rows of this rank, `N` numeric features, `T` labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class ScenarioBatch(Pipelineable):
    """The rows of one rank in one step."""

    ids: KeyedJaggedTensor
    """Every feature's ids, by feature name."""
    numeric: Tensor
    """`[B, N]` fp32."""
    scenario: Tensor
    """`[B]` int64."""
    labels: Tensor
    """`[B, T]` fp32."""
    weights: Tensor
    """`[B, T]` fp32: weight of the row in each label, 0 where its mask says that the label is unknown."""
    row: Tensor
    """`[B]` int64: distinct for every row of the run (epoch and place in the epoch), the same at any world size; -1 for
    rows that only make all ranks' batches equally large, whose weights are 0."""
    rows_per_rank: float
    """Rows of all ranks in this step divided by the world size: a sum over this rank's rows divided by it is, averaged
    over ranks, the mean over the global batch."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "ScenarioBatch":
        """The batch on another device."""
        return ScenarioBatch(
            # KeyedJaggedTensor.to takes it by keyword alone.
            ids=self.ids.to(device=device, non_blocking=non_blocking),
            numeric=self.numeric.to(device, non_blocking=non_blocking),
            scenario=self.scenario.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            weights=self.weights.to(device, non_blocking=non_blocking),
            row=self.row.to(device, non_blocking=non_blocking),
            rows_per_rank=self.rows_per_rank,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors."""
        self.ids.record_stream(stream)
        for tensor in (self.numeric, self.scenario, self.labels, self.weights, self.row):
            tensor.record_stream(stream)

    def pin_memory(self) -> "ScenarioBatch":
        """The batch in page-locked memory, from where copies to a GPU run beside computation."""
        return ScenarioBatch(
            ids=self.ids.pin_memory(),
            numeric=self.numeric.pin_memory(),
            scenario=self.scenario.pin_memory(),
            labels=self.labels.pin_memory(),
            weights=self.weights.pin_memory(),
            row=self.row.pin_memory(),
            rows_per_rank=self.rows_per_rank,
        )

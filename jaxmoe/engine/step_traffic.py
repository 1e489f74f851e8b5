"""The planned collectives of an engine's programs."""

from __future__ import annotations

from collections import Counter

from jaxmoe.config import ModelConfig
from jaxmoe.engine.batch import StepBucket
from jaxmoe.engine.step_programs import output_size
from jaxmoe.parallel.collectives import (
    CollectiveOp,
    CollectiveSite,
    StepShape,
    planned_collectives,
    planned_decode_step,
    planned_decode_step_sites,
    planned_sites,
)
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.parallel.stages import PipelineSchedule


class StepTraffic:
    """Plan the collectives of the steps of one model on one mesh. itemsize: bytes of an activation value."""

    def __init__(self, config: ModelConfig, placement: MeshPlacement, *, dispatch: str, itemsize: int) -> None:
        self._config, self._placement, self._dispatch, self._itemsize = config, placement, dispatch, itemsize

    def planned(self, bucket: StepBucket) -> Counter[CollectiveOp]:
        """Return the planned collectives of a step with max_decode_steps=1, with their counts."""
        shape = self._shape(bucket, outputs=1)
        return planned_collectives(self._config, self._placement, shape, dispatch=self._dispatch)

    def planned_decode_step(self, bucket: StepBucket, *, outputs: int = 0) -> Counter[CollectiveOp]:
        """Return the planned collectives of one iteration of a decode loop, which runs `iterations` of them.

        outputs: the most decode steps of the loop, to count what returns its output to every process, once after it.
        """
        shape = self._shape(bucket, outputs=outputs)
        return planned_decode_step(self._config, self._placement, shape, dispatch=self._dispatch)

    def planned_program(self, bucket: StepBucket, *, max_decode_steps: int) -> Counter[CollectiveOp]:
        """Return the planned collectives of a compiled program, in which those of a decode loop occur once."""
        if max_decode_steps == 1:
            return self.planned(bucket)
        return self.planned_decode_step(bucket, outputs=max_decode_steps)

    def planned_run(self, bucket: StepBucket, *, decode_steps: int, max_decode_steps: int) -> Counter[CollectiveOp]:
        """Return the planned collectives that a step runs."""
        if max_decode_steps == 1:
            return self.planned(bucket)
        each, iterations = self.planned_decode_step(bucket), self.iterations(bucket, decode_steps)
        output = self.planned_decode_step(bucket, outputs=max_decode_steps) - each
        return Counter({one: count * iterations for one, count in each.items()}) + output

    def sites(self, bucket: StepBucket) -> list[CollectiveSite]:
        """Return the planned collectives by call site: as `planned` with prompts, else as `planned_decode_step`."""
        planned = planned_sites if bucket.blocks else planned_decode_step_sites
        return planned(self._config, self._placement, self._shape(bucket, outputs=1), dispatch=self._dispatch)

    def iterations(self, bucket: StepBucket, decode_steps: int) -> int:
        """Return the iterations of a decode loop: one per decode step, or the ticks of the pipeline schedule."""
        placement = self._placement
        if placement.num_stages == 1:
            return decode_steps
        schedule = PipelineSchedule(
            stages=placement.num_stages, virtual_stages=placement.virtual_stages, micro_batches=bucket.micro_batches
        )
        return schedule.ticks(decode_steps)

    def _shape(self, bucket: StepBucket, *, outputs: int) -> StepShape:
        rows = self._placement.num_shards("batch") * bucket.num_logits if self._placement.spans_processes else 0
        return StepShape(
            num_tokens=bucket.num_tokens, num_sampled=bucket.num_logits, itemsize=self._itemsize,
            micro_batches=bucket.micro_batches, picked=bucket.blocks > 0,
            output_bytes=output_size(outputs, rows, vocab_size=self._config.vocab_size),
        )  # fmt: skip

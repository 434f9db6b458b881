"""One step of a batch: the model, the update, the counters.

A step evaluates the model at (state, t), writes the next state over the old one by the fused
update, and advances the counters. It has no Python number that a captured graph would freeze, does
not wait for the device and moves no data between devices. So the same step runs eagerly, in a CUDA
graph of one step, or in one graph of all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddim import adapter
from fastddim.adapter import Model
from fastddim.backends import Backend, Blending, LoopStep
from fastddim.loop.buffers import Buffers, Inpainting
from fastddim.loop.counters import Counting, Position
from fastddim.options import DenoisedFn, Rescaling
from fastddim.plan import StepKind
from fastddim.validation import check_like, check_model_output, check_same_output

NO_ARGUMENTS: tuple[dict[str, Any], ...] = ({},)

# Errors of networks that are given a wrong shape; errors of derived classes are left alone.
_EXPLAINED = (RuntimeError, ValueError, IndexError, TypeError)


class Step:
    """Takes the steps of one batch, in the memory of its buffers.

        m = model(x_t, t)                          ε_θ, or whatever the model predicts
        x_0 = cx·x_t + cm·m, clipped               eq. 9 of arXiv 2010.02502
        x_t = k0·x_0 + kx·x_t + km·m + pn·z        eq. 12, all in one kernel
        t = timesteps[next]

    Attributes:
        model: evaluated at every step.
        uncond_model: evaluated for the unconditional half; None for no second model.
        denoised_fn: called where steps are split.
        shape: (B, …) as the caller knows it; a stream's steps may be of fewer samples.
        check: called with every model output; None for no check.
        inpainting: the known data of masked steps; once allocated, it stays.
    """

    model: Model
    uncond_model: Model | None = None
    denoised_fn: DenoisedFn | None = None
    check: Callable[[Tensor], None] | None = None
    inpainting: Inpainting | None = None

    def __init__(
        self,
        kind: StepKind,
        backend: Backend,
        buffers: Buffers,
        counting: Counting,
        *,
        captured: bool,
    ) -> None:
        """
        Args:
            kind: what the steps have in common.
            backend: computes the updates.
            buffers: the tensors that steps read and write.
            counting: the position that moves on.
            captured: whether steps are captured in a graph.
        """
        self._kind = kind
        self._backend = backend
        self._buffers = buffers
        self.shape = tuple(buffers.state.shape)
        self._counting = counting
        self._model_input = buffers.model_input
        minimal = not (kind.rescaling or kind.split or kind.refine)
        # Captured graphs and fake tensors are made for operators.
        minimal &= not captured and type(buffers.state) is Tensor
        # Keyed by whether steps are masked. Without such a call, a step takes the backend's
        # `update_out` and `advance`.
        self._makers = {
            masked: getattr(backend, name, None) if minimal else None
            for masked, name in ((False, "loop_step"), (True, "masked_loop_step"))
        }
        self._held: dict[bool, LoopStep] = {}
        seen = [self._model_input, *([buffers.x_0] if kind.split else [])]
        # Fake tensors have no addresses.
        self._seen = [_extent(t) for t in seen if type(t) is Tensor]
        self._captured = captured
        self._halves: Tensor | None = None

    def take(
        self,
        at: Position,
        noise: Tensor | None,
        *,
        arguments: Sequence[dict[str, Any]] = NO_ARGUMENTS,
        with_x_0: bool = False,
        masked: bool = False,
    ) -> None:
        """Take one step, and move on where `at` is the position that moves.

        Args:
            at: the position of the step.
            noise: z like the state; None for the noise of the seed.
            arguments: keyword arguments of each model that is evaluated, the unconditional one's
                first.
            with_x_0: whether the predicted x_0 is written too.
            masked: whether the state is blended with known data.
        """
        x = self._refined(at, arguments) if self._kind.refine else self._buffers.state
        output = self._evaluate(at, arguments)
        minimal = noise is None and not (with_x_0 or self.check)
        if minimal and self._makers[masked] and self._take_in_one_call(output, masked):
            return
        self._update(at, x, self._checked(output), noise, with_x_0=with_x_0, masked=masked)
        if at is self._counting.now:
            self._counting.advance(self._backend)

    def take_several(
        self, count: int, arguments: Sequence[dict[str, Any]], *, masked: bool
    ) -> None:
        """Take `count` steps from the position that moves, without the other options of `take`."""
        at, evaluate = self._counting.now, self._evaluate
        if self._makers[masked] is None or self.check is not None:
            for _ in range(count):
                self.take(at, None, arguments=arguments, masked=masked)
            return
        for _ in range(count):
            output = evaluate(at, arguments)
            if not self._take_in_one_call(output, masked):
                self._update(at, self._buffers.state, self._checked(output), None, masked=masked)
                self._counting.advance(self._backend)
            del output  # The next output may have its memory.

    def _evaluate(self, at: Position, arguments: Sequence[dict[str, Any]]) -> Any:
        """ε_θ(x_t, t), or whatever the model predicts."""
        try:
            if self.uncond_model is not None:
                return self._evaluate_both(self.uncond_model, at, *arguments)
            result = self.model(self._model_input, at.t, **arguments[0])
        except _EXPLAINED as error:
            if type(error) in _EXPLAINED and adapter.may_lack_batch(self.model, self.shape):
                raise self._explained(error) from error
            raise
        return adapter.output_tensor(result)

    def _explained(self, error: Exception) -> Exception:
        """The error, with the shape that a batch of one sample would have."""
        return type(error)(
            f"{error}\nshape: got {self.shape}, where the convolutions of the model take "
            f"{1 + len(self.shape)} dimensions; a batch of one sample is {(1, *self.shape)}"
        )

    def _evaluate_both(
        self, uncond_model: Model, at: Position, others: dict[str, Any], kwargs: dict[str, Any]
    ) -> Tensor:
        """The outputs of two models for the same input, as the halves of one."""
        x, state = self._model_input, self._buffers.state
        output = uncond_model(x, at.t, **others)
        unconditional = check_model_output(
            "uncond_model output",
            adapter.output_tensor(output, "uncond_model"),
            state,
            guided=False,
        )
        # Copied before the other is evaluated: both may be one network that reuses its output.
        halves = self._halves_like(unconditional)
        halves[: len(state)].copy_(unconditional)
        output = adapter.output_tensor(self.model(x, at.t, **kwargs))
        conditional = check_model_output("model output", output, state, guided=False)
        check_same_output(unconditional, conditional)
        halves[len(state) :].copy_(conditional)
        return halves

    def _halves_like(self, output: Tensor) -> Tensor:
        """Memory for two such outputs: the graph's own where steps are captured, else kept."""
        kept, shape = self._halves, (2 * len(output), *output.shape[1:])
        if kept is not None and kept.shape == shape and kept.dtype == output.dtype:
            return kept
        halves = output.new_empty(shape)
        self._halves = None if self._captured else halves
        return halves

    def _checked(self, output: Any) -> Tensor:
        try:
            checked: Tensor = check_model_output(
                "model output", output, self._buffers.state, guided=self._kind.guided
            )
        except ValueError as error:
            if adapter.may_lack_batch(self.model, self.shape):
                raise self._explained(error) from error
            raise
        if self.check is not None:
            self.check(checked)
        return self._apart(checked)

    def _apart(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy where it shares memory with a tensor that the user's functions are
        given and that a step writes over while it reads.

        Memory of the state itself may be shared: each element is read before it is written.
        """
        try:
            address = tensor.data_ptr()
        except (NotImplementedError, RuntimeError):  # of a subclass without memory of its own
            return tensor
        if not address:  # without memory
            return tensor
        for first, end in self._seen:
            if first <= address < end:
                itself = self._buffers.next_input is None and tensor.is_set_to(self._buffers.state)
                return tensor if itself else tensor.clone()
        return tensor

    def tensors(self) -> Iterator[Tensor]:
        """Memory of the step's own."""
        yield from self.inpainting or ()
        if self._halves is not None:
            yield self._halves

    def _refined(self, at: Position, arguments: Sequence[dict[str, Any]]) -> Tensor:
        """The state from which the step is taken; the model's input is then the result of `refine`
        trial steps from there.
        """
        start = self._buffers.start
        assert start is not None
        start.copy_(self._buffers.state)
        for _ in range(self._kind.refine):
            self._update(at, start, self._checked(self._evaluate(at, arguments)), None)
        return start

    def _take_in_one_call(self, output: Any, masked: bool) -> bool:
        """Mix known data, update and advance in one call of the backend; False where the call
        cannot take `output`.
        """
        held = self._held.get(masked)
        if held is None:
            held = self._held[masked] = self._hold_step(self._checked(output), masked)
        return held(output)

    def _hold_step(self, output: Tensor, masked: bool) -> LoopStep:
        """The backend's `masked_loop_step` or `loop_step` for outputs like this one."""
        if not output.data_ptr() or output.is_neg():
            output = torch.empty(output.shape, dtype=output.dtype, device=output.device)
        buffers, counting = self._buffers, self._counting
        make = self._makers[masked]
        assert make is not None
        besides = {"blending": self._blending()} if masked else {}
        held: LoopStep = make(
            buffers.state,
            output,
            *counting.now.rows_in(buffers.table),
            keys=counting.now.keys if self._kind.noisy else None,
            history=buffers.history,
            model_input=buffers.next_input,
            counters=counting.counting,
            timesteps=counting.timesteps,
            t=counting.now.t,
            **besides,
        )
        return held

    def _blending(self) -> Blending:
        """The tensors that only masked steps read."""
        own = self.inpainting
        assert own is not None
        table, row = self._counting.now.shared_row_in(own.table)
        assert row is not None
        return Blending(own.mask, own.known, own.data, own.x_T, table, row)

    def _update(
        self,
        at: Position,
        x: Tensor,
        output: Tensor,
        noise: Tensor | None,
        *,
        with_x_0: bool = False,
        masked: bool = False,
    ) -> None:
        """Update `x` into the state by one kernel, after the work of some kinds of steps."""
        buffers, kind, rescaling = self._buffers, self._kind, self._kind.rescaling
        if buffers.first_half is not None:
            x, output = self._take_first_half(at, x, output, buffers.first_half)
            rescaling = None if rescaling is None else rescaling._replace(rescale=0.0)
        table, row = self._rows(at, x, output, buffers.table, rescaling)
        inpainting = self._mix_known(at) if masked else None
        self._backend.update_out(
            x,
            output,
            table,
            row,
            noise=noise,
            keys=at.keys if kind.noisy and noise is None else None,
            history=buffers.history,
            mask=None if inpainting is None else inpainting.mask,
            known=None if inpainting is None else inpainting.known,
            out=buffers.state,
            x_0=buffers.x_0 if with_x_0 else None,
            model_input=buffers.next_input,
            epsilon=buffers.history,
        )

    def _take_first_half(
        self, at: Position, x: Tensor, output: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take the first half of a split step, up to x_0, and call the user's function of x_0.

        Returns the state and the model output that the second half reads.
        """
        x_0, epsilon, rescaling = self._buffers.x_0, self._buffers.epsilon, self._kind.rescaling
        assert x_0 is not None
        assert self.denoised_fn is not None
        table, row = self._rows(at, x, output, table, rescaling and rescaling._replace(ratio=0.0))
        self._write(x, output, table, row, x_0, epsilon=epsilon)
        changed = self.denoised_fn(x_0, at.t[: len(x_0)])
        check_like("denoised_fn's result", changed, "the state", x_0)
        # x_0 itself is read where it is written, element by element.
        read = changed if changed is x_0 else self._apart(changed)
        return (x if epsilon is None else epsilon), read

    def _rows(
        self, at: Position, x: Tensor, output: Tensor, table: Tensor, rescaling: Rescaling | None
    ) -> tuple[Tensor, Tensor | None]:
        """The table of this step and the rows in it, which may be made for the data at hand."""
        table, row = at.rows_in(table)
        own_rows = self._buffers.own_rows
        if (
            own_rows is None
            or rescaling is None
            or (rescaling.rescale == 0 and rescaling.ratio == 0)
        ):
            return table, row
        self._backend.rescale_rows(x, output, table, row, rescaling, own_rows)
        return own_rows, self._buffers.own_row

    def _mix_known(self, at: Position) -> Inpainting:
        """Mix the known data to their noise level after this step."""
        own = self.inpainting
        assert own is not None
        self._write(own.data, own.x_T, *at.shared_row_in(own.table), own.known)
        return own

    def _write(
        self,
        x: Tensor,
        output: Tensor,
        table: Tensor,
        row: Tensor | None,
        out: Tensor,
        epsilon: Tensor | None = None,
    ) -> None:
        """Write an update without noise or anything else that only a whole step has."""
        self._backend.update_out(
            x,
            output,
            table,
            row,
            noise=None,
            keys=None,
            out=out,
            x_0=None,
            model_input=None,
            epsilon=epsilon,
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and past the last of a contiguous tensor."""
    first = tensor.data_ptr()
    return first, first + tensor.nbytes

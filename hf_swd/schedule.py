"""Scheduled weight decay on an optimizer: what the schedule reads from it, writes into it and keeps in its checkpoints.

Nothing here knows of Hugging Face or DeepSpeed. The arithmetic stands in `recurrence.py`.
"""

from __future__ import annotations

import math
import operator
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import group_keys
from .clipping import Clipping
from .grad_norm import ShardedSum, accumulation_dtype, local_part, squared_norms, without_pending_sums
from .moments import maximum_sums, moment_sums
from .recurrence import SecondMomentMean
from .validation import check_flag, check_number, check_process_group, check_reference_steps


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


__all__ = ["DecaySchedule", "Engine", "schedule_of"]

# Largest lr * decay: one rounding below 1, so that 1 - lr * decay is never negative.
_LARGEST_DECAY = 1.0 - 2.0**-52


def schedule_of(optimizer: Any) -> DecaySchedule | None:
    """The schedule that drives `optimizer`, looked for through wrappers that keep the optimizer in `.optimizer`
    (accelerate, DeepSpeed); `None` if there is none."""
    while optimizer is not None:
        attributes = getattr(optimizer, "__dict__", {})
        if attributes.get("_decay_schedule") is not None:
            return attributes["_decay_schedule"]
        optimizer = attributes.get("optimizer")
    return None


class Engine(Protocol):
    """An engine that steps the optimizer on anonymous parts of a model, and knows the norm of the whole gradient itself."""

    num_elements: int
    """Trainable scalars of the whole model."""

    def begins_step(self) -> bool:
        """Whether this `step()` of the optimizer is the first one of a new optimizer step of the engine."""

    def squared_norm(self, *, clipped: bool) -> Tensor:
        """0-d: squared norm of the gradient that Adam sees (averaged, unscaled, clipped), of all ranks; or what it was before clipping."""

    def second_moment(self) -> tuple[Tensor, float]:
        """Sum of the second moment over all ranks (0-d), and the number of steps in it: (0, 0) before the first step."""


class DecaySchedule:
    """
    Drives the weight decay of one optimizer: `decay = lambda * factor`, with the factor of [`SecondMomentMean`].

    Args:
        optimizer (`torch.optim.Optimizer`): its parameter groups receive the effective decay; held weakly.
        beta2 (`float`, *optional*): decay rate of the second moment; by default `betas[1]` of each parameter group.
        reference_steps (`int`, defaults to 0): with K > 0 the decay is lambda itself before step K, and from then on relative to
            the gradient rms of step K.
        unclipped_norm (`bool`, defaults to `False`): follow the norm that the gradients had before clipping.
        process_group (`ProcessGroup`, *optional*): ranks whose optimizers hold disjoint parts of the model.

    A checkpoint that is loaded brings its own `reference_steps` and `unclipped_norm`.

    References: Xie et al., NeurIPS 2023 (arXiv 2011.11152), algorithm "AdamS"; docs/algorithm.md.
    """

    # Whether the optimizer takes the decay as a number, for which the host must wait for an accelerator; None: if the weights are on
    # the CPU.
    host_decay: bool | None = None

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta2: float | None = None,
        reference_steps: int = 0,
        unclipped_norm: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_reference_steps(reference_steps)
        check_flag("unclipped_norm", unclipped_norm)
        check_process_group(process_group)
        self._optimizer = weakref.ref(optimizer)
        self._fixed_beta2 = beta2
        self.process_group = process_group
        self.engine: Engine | None = None
        self._shards: dict[Tensor, tuple[tuple[ProcessGroup, ...], int]] = {}
        self._shards_known = False
        self._model_params = [weakref.ref(p) for group in optimizer.param_groups for p in group["params"]]
        self._loaded: tuple[int, Tensor, Tensor] | None = None
        self.deferred_clip: Tensor | None = None
        """0-d: what the optimizer must multiply the gradients of this step by, after a deferred clipping."""
        self._clipping = Clipping()
        self._warned_cap = False
        for group in optimizer.param_groups:
            group_keys.prepare(group, {"reference_steps": reference_steps, "unclipped_norm": unclipped_norm})
        optimizer._decay_schedule = self
        self._handles = [
            optimizer.register_state_dict_pre_hook(lambda _: self.publish()),
            optimizer.register_load_state_dict_pre_hook(
                lambda optimizer, state_dict: group_keys.complete_state_dict(optimizer.param_groups, state_dict)
            ),
            optimizer.register_load_state_dict_post_hook(lambda _: self._read_shared()),
        ]
        self._read_shared()

    # Reading

    @property
    def optimizer(self) -> Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this weight decay schedule no longer exists")
        return optimizer

    @property
    def grad_rms(self) -> float:
        """sqrt of the mean second moment over the whole model at the last step; 0.0 before the first. Reading it makes the
        host wait for an accelerator."""
        return math.sqrt(self._mean.mean.detach())

    @property
    def step_count(self) -> int:
        """Optimizer steps that the schedule has seen; skipped steps (overflow) do not count."""
        return int(self._mean.step)

    @property
    def reference_steps(self) -> int:
        return group_keys.read(self._groups, "reference_steps")

    @property
    def unclipped_norm(self) -> bool:
        return bool(group_keys.read(self._groups, "unclipped_norm"))

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups as they are now: engines replace them."""
        return self.optimizer.param_groups

    def clip_statistics(self) -> tuple[int, int]:
        """How many steps [`clip_grad_norm_`] has clipped, and how many it has seen. Makes the host wait."""
        return self._clipping.statistics()

    # One step

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """
        Clip the gradients in place to a total 2-norm, and keep the norm for the coming step, which then need not read them.

        Args:
            max_norm (`float`): largest norm of all gradients of the optimizer together, positive; `inf` only measures.

        Returns:
            `Tensor`: 0-d float32, the norm before clipping, of all shards.

        Raises:
            TypeError, ValueError: `max_norm` is not a positive number.
            RuntimeError: under DeepSpeed ZeRO, which clips by itself.
        """
        return self.clip(max_norm, defer=False)

    @torch._disable_dynamo
    @torch.no_grad()
    def clip(self, max_norm: float, *, defer: bool) -> Tensor:
        """[`clip_grad_norm_`], or with `defer` only its measuring: the optimizer must then scale by `deferred_clip` in the step."""
        check_number(
            "max_norm", max_norm, "a positive norm (for no clipping, leave this call out)", lambda norm: norm > 0
        )
        if self.engine is not None:
            raise RuntimeError(
                "DeepSpeed ZeRO clips by itself, before the optimizer sees a gradient: set gradient_clipping in its config (max_grad_norm of a "
                "Trainer does) instead of calling clip_grad_norm_"
            )
        self.settle_clipping()
        params, grads, active = self._gradients()
        self._follow(params)
        squares = squared_norms(grads)
        addends = torch.zeros_like(self._mean.sums).index_copy(
            0, self._activity(active)[0], squares.to(self._mean.sums)
        )
        norm = self._reduce(addends.unsqueeze(1)).squeeze(0).sqrt()
        self._clipping.clip(grads, squares, norm, max_norm, defer=defer, unclipped=self.unclipped_norm)
        return norm.float()

    def settle_clipping(self) -> None:
        """Do what a deferred clipping has left to do, while its gradients are still known."""
        self._clipping.settle()

    @torch._disable_dynamo
    def update(self) -> list[float | Tensor]:
        """
        Take in the gradients of one optimizer step, before the step changes any weight.

        Returns:
            `list[float | Tensor]`: the effective decay of each parameter group, at most 1/lr. A number where the weights are
            on the CPU (a 0-d tensor with a graph in a differentiable optimizer), else a 0-d tensor. It is also written to
            `group["weight_decay"]`.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        self.deferred_clip = None
        groups = self._groups
        begins = self.engine is None or self.engine.begins_step()
        if begins and group_keys.read(groups, "schedule_step") != self._published_step:
            self._read_shared()  # an engine has loaded a checkpoint into the groups
        options = {key: group_keys.read(groups, key) for key in group_keys.OPTIONS}
        for group in groups:
            group_keys.prepare(group, options)
            group_keys.adopt_assignment(group)
        if self.engine is not None:
            if begins:
                self._advance_engine(groups)
            return self._write(groups)
        params, grads, active = self._gradients()
        if not (self._shards_known and self._follows(params)):
            self._refuse_unknown_shards(params, grads)
        self._follow(params)
        if not grads and self._reduce.is_local:
            return [group["weight_decay"] for group in groups]
        self._advance(groups, grads, active)
        return self._write(groups)

    def bind(self, engine: Engine) -> None:
        """Take the norm of the whole gradient from `engine` from now on."""
        if self.engine is None and self._mean.mean == 0:
            # Steps so far were the zero gradients by which an engine makes the optimizer allocate its state.
            self._mean = SecondMomentMean()
        self.engine = engine
        self._stale = True

    def set_process_group(self, process_group: ProcessGroup | None) -> None:
        """Name the ranks whose optimizers hold disjoint parts of the model."""
        self.process_group, self._stale = process_group, True

    def set_shards(self, shards: dict[Tensor, tuple[tuple[ProcessGroup, ...], int]]) -> None:
        """Name the parameters that are divided among ranks without being DTensors: among which, and how many scalars are here."""
        if shards:
            self._shards, self._stale = shards, True

    def _gradients(self) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """All parameters, the gradients that there are, and which of the parameters have one."""
        params, grads, active = [], [], []
        for group in self._groups:
            for p in group["params"]:
                grad = p.grad
                if grad is not None:
                    if grad.is_sparse:
                        raise RuntimeError(
                            f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, and scheduled weight decay needs "
                            "dense gradients: use sparse=False in its nn.Embedding, or give it to torch.optim.SparseAdam"
                        )
                    if type(grad) is not Tensor:
                        grad = p.grad = without_pending_sums(grad)
                    active.append(len(params))
                    grads.append(grad)
                params.append(p)
        return params, grads, active

    def _advance(self, groups: list[dict], grads: list[Tensor], active: list[int]) -> None:
        squares, self.deferred_clip = self._clipping.take(grads)
        unclipped = self.unclipped_norm
        if squares is None:
            squares = squared_norms(grads)
            if unclipped and squares.any():
                raise RuntimeError(
                    "unclipped_norm=True: the schedule does not know the norm that the gradients had before clipping. Clip with "
                    "clip_grad_norm_ of the optimizer (or of its schedule) after the last change to the gradients, as SWDTrainer does; where "
                    "nothing is clipped, leave unclipped_norm out"
                )
        squares = squares.to(self._mean.sums)
        grad_scale, found_inf = (getattr(self.optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if grad_scale is not None:
            squares = squares / grad_scale.to(squares).square()
        amsgrad = not unclipped and any(group.get("amsgrad") for group in groups)
        with_grad = None
        if len(active) < len(self._params):
            index, with_grad = self._activity(active)
            squares = torch.zeros_like(self._mean.sums).index_copy(0, index, squares)
        self._mean.advance(
            squares,
            self._beta2_vector(groups),
            reduce=self._reduce,
            with_grad=with_grad,
            known_sums=maximum_sums(self.optimizer, self._beta2s(groups), grad_scale) if amsgrad else None,
            # The step with lr = 0 and zero gradients by which torch.distributed.checkpoint makes an optimizer allocate its state.
            skip_if_nothing=_all_zero([group["lr"] for group in groups]),
            skipped=None if found_inf is None else found_inf.to(squares) > 0,
            reference_steps=self.reference_steps,
        )

    def _advance_engine(self, groups: list[dict]) -> None:
        squares = self.engine.squared_norm(clipped=not self.unclipped_norm).reshape(1)
        squares = squares.to(accumulation_dtype(squares.device))
        beta2 = torch.as_tensor(self._beta2s(groups)[0], dtype=squares.dtype, device=squares.device).reshape(1)
        if self._stale:
            block_sums, steps = torch.zeros_like(squares), torch.zeros_like(squares)
            if self._mean.step == 0:
                total, step = self.engine.second_moment()
                block_sums, steps = block_sums + total.to(squares), steps + step
            counts = torch.full_like(squares, self.engine.num_elements)
            self._mean.set_blocks(block_sums, steps, counts)
            self._mean.reconcile(beta2, _sum_of_one, always=self.unclipped_norm)
            self._stale = False
        self._mean.advance(squares, beta2, reduce=_sum_of_one, reference_steps=self.reference_steps)

    def _refuse_unknown_shards(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Parts of a model that say nothing of the whole; zeros (by which an engine allocates state) do no harm."""
        originals = [p for reference in self._model_params if (p := reference()) is not None]
        zero = any(hasattr(p, mark) for p in originals for mark in ("_hp_mapping", "ds_id"))
        fsdp = any(getattr(p, "_fsdp_flattened", False) and p not in self._shards for p in params)
        if (zero or fsdp) and squared_norms(grads).any():
            raise RuntimeError(
                f"{'DeepSpeed ZeRO' if zero else 'FSDP'} shards the model, and the weight decay schedule is not attached to it: each rank "
                "would decay by a number of its own. Call hf_swd.attach(optimizer, model) once, with what accelerator.prepare (or "
                "deepspeed.initialize) returned; a Trainer does it by itself after `import hf_swd`."
            )
        self._shards_known = not (zero or fsdp)

    def _write(self, groups: list[dict]) -> list[float | Tensor]:
        factor = self._mean.factor(calibrated=self.reference_steps > 0)
        on_host = factor.device.type == "cpu" if self.host_decay is None else self.host_decay
        if on_host and not factor.requires_grad:
            factor = factor.item()
        decays = [self._effective(group, factor) for group in groups]
        for group, decay in zip(groups, decays, strict=True):
            group_keys.write_decay(group, decay.item() if isinstance(decay, Tensor) and decay.requires_grad else decay)
        if self._mean.mean.device.type == "cpu":
            self.publish()
        return decays

    def _effective(self, group: dict, factor: float | Tensor) -> float | Tensor:
        user_decay, lr = group["initial_weight_decay"], group["lr"]
        if user_decay == 0:
            return 0.0
        decay = user_decay * factor
        if isinstance(decay, Tensor):
            if isinstance(lr, Tensor):
                return torch.minimum(decay, (_LARGEST_DECAY / lr.detach()).to(decay))
            return decay.clamp(max=_LARGEST_DECAY / lr) if lr > 0 else decay
        lr = float(lr)
        if lr * decay > _LARGEST_DECAY:
            if not self._warned_cap:
                self._warned_cap = True
                warnings.warn(
                    f"the effective weight decay {decay:.3g} (weight_decay={user_decay:g}, gradient rms {self.grad_rms:.3g}) times "
                    f"lr={lr:g} exceeds 1: it is held at 1/lr, which sets the weights to zero at every such step. Choose a smaller "
                    f"weight_decay (an effective 0.01 is {0.01 * self.grad_rms:.2g} here), or reference_steps=100, which gives AdamW's "
                    "value its usual meaning.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            decay = _LARGEST_DECAY / lr
        return decay

    # What is tracked

    def _follows(self, params: list[Tensor]) -> bool:
        same = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        return same and not self._stale

    def _follow(self, params: list[Tensor]) -> None:
        """Make the recurrence fit the parameters that the optimizer holds now."""
        if self._follows(params):
            return
        device = params[0].device if params else torch.device("cpu")
        dtype = accumulation_dtype(device)
        known = {} if self._stale else {p: i for i, p in enumerate(self._params)}
        block_sums, steps = (torch.zeros(len(params), dtype=dtype, device=device) for _ in range(2))
        for i, p in enumerate(params):
            if p in known:
                block_sums[i], steps[i] = self._mean.sums[known[p]], self._mean.steps[known[p]]
        fresh = [i for i, p in enumerate(params) if p not in known]
        stepped, totals, step_counts = moment_sums(self.optimizer, [params[i] for i in fresh])
        for index, total, step in zip(stepped, totals.to(block_sums), step_counts, strict=True):
            block_sums[fresh[index]], steps[fresh[index]] = total, step
        sizes = (self._shards[p][1] if p in self._shards else local_part(p.detach()).numel() for p in params)
        counts = [size * (2 if p.is_complex() else 1) for size, p in zip(sizes, params, strict=True)]
        self._mean.set_blocks(block_sums, steps, torch.tensor(counts, dtype=dtype).to(device))
        self._params, self._beta2_source, self._active = params, None, None
        shard_groups = {i: self._shards[p][0] for i, p in enumerate(params) if p in self._shards}
        self._reduce = ShardedSum(params, shard_groups, self.process_group)
        # A rank without a share of the moments must still join the others' reduction; otherwise there may be nothing to do.
        if self._stale and (stepped or self._published_step or not self._reduce.is_local):
            self._reconcile()
        self._stale = False

    def _reconcile(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded[0] == self.step_count and len(loaded[1]) == len(self._params):
            self._mean.sums.copy_(loaded[1])
            self._mean.steps.copy_(loaded[2])
        else:
            self._mean.reconcile(self._beta2_vector(self._groups), self._reduce, always=self.unclipped_norm)

    def _activity(self, active: list[int]) -> tuple[Tensor, Tensor]:
        """Index and mask, on the device, of the parameters that have a gradient."""
        if self._active is None or self._active[0] != active:
            device = self._mean.sums.device
            with_grad = torch.zeros(len(self._params), dtype=torch.bool)
            with_grad[active] = True
            index = torch.tensor(active, dtype=torch.long)
            self._active = active, index.to(device, non_blocking=True), with_grad.to(device, non_blocking=True)
        return self._active[1:]

    def _beta2s(self, groups: list[dict]) -> list[float | Tensor]:
        return [group["betas"][1] if self._fixed_beta2 is None else self._fixed_beta2 for group in groups]

    def _beta2_vector(self, groups: list[dict]) -> Tensor:
        values = self._beta2s(groups)
        if any(isinstance(value, Tensor) for value in values) or values != self._beta2_source:
            like = self._mean.sums
            per_group = [
                torch.as_tensor(value, dtype=like.dtype).to(like.device).expand(len(group["params"]))
                for value, group in zip(values, groups, strict=True)
            ]
            self._beta2_source, self._beta2 = values, torch.cat(per_group)
        return self._beta2

    # State

    @torch.no_grad()
    def publish(self) -> None:
        """Write the schedule's state into the parameter groups as plain numbers, where checkpoints find it."""
        self._published_step = self.step_count
        scalars = (self._mean.mean, self._mean.num_elements, self._mean.reference)
        group_keys.publish(self._groups, (self._published_step, *(float(scalar.detach()) for scalar in scalars)))

    def _read_shared(self) -> None:
        """Begin anew from what the parameter groups say; the sums are rebuilt at the next step."""
        self._mean = SecondMomentMean(*(group_keys.read(self._groups, key) for key in group_keys.SHARED_KEYS))
        self._published_step = self.step_count
        self._params: list[Tensor] = []
        self.settle_clipping()
        self._stale = True


def _all_zero(values: list[float | Tensor]) -> bool | Tensor:
    """Whether all are 0; undecided, on the device, if some lie there."""
    if any(not isinstance(value, Tensor) and value != 0 for value in values):
        return False
    tensors = [value.detach() == 0 for value in values if isinstance(value, Tensor)]
    return torch.stack(tensors).all() if tensors else True


def _sum_of_one(values: Tensor, *, largest: bool = False) -> Tensor:
    """The reduction of a schedule whose only block is the whole model."""
    return values[0]

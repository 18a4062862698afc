"""Plans the two programs of generation, prefill and decode, compiled for a slice."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from neo_jax.batch import RANK
from neo_jax.errors import InputError
from neo_jax.infer import programs, sampling
from neo_jax.model.kv_cache import STACKS
from neo_jax.model_config import PATCH_CHANNELS, ModelConfig
from neo_jax.plan import compile_cache, costs, hlo
from neo_jax.plan.attention_cycles import attention
from neo_jax.plan.network import all_instructions
from neo_jax.plan.program import Compiled, device_bytes, place
from neo_jax.plan.result import GIB, MemoryUse, Plan
from neo_jax.plan.topology import Topology, find_topology
from neo_jax.plan.training import UNREADABLE, tensor_size
from neo_jax.sharding import batch_rows, describe, spec
from neo_jax.train.run_metrics import flops_per_batch
from neo_jax.weights.place import param_target

BLOCK_SIZE = 128  # tokens, on TPUs
_COPIES = ("copy", "transpose", "copy-start", "concatenate")


def plan_serving(
    model: ModelConfig,
    topology: str,
    *,
    mesh: tuple[int, ...] = (1, 1, -1),
    slots: int = 8,
    max_length: int = 4096,
    prefill: int = 2048,
    kv_dtype: str = "bfloat16",
    weights: str | None = None,
    name: str = "",
    options: dict[str, str] | None = None,
    with_flags: bool = True,
    use_cache: bool = True,
) -> list[Plan]:
    """Compiles prefill and decode for a slice, and reads memory and time from the programs.

    Args:
      model: its configuration.
      topology: such as "v5e:2x2".
      mesh: sizes of (data, fsdp, tensor[, context]); -1 takes the remaining devices.
      slots: requests that run at once, on all devices.
      max_length: tokens of a sequence.
      prefill: tokens of a prefill, on each device of the batch axes.
      kv_dtype: of the cache, "bfloat16", "float32" or "int8".
      weights: "int8", or None for bfloat16.
      name: of the config, for the plan's title.
      options: of the compiler.
      with_flags: add the chip's own compiler flags (`chips.py`).
      use_cache: take compiled programs from the cache.

    Returns:
      the plans of prefill and of decode.

    Raises:
      InputError: if the compiler is missing, or the mesh does not divide slots or model.
    """
    slice_ = find_topology(topology)
    placed = slice_.mesh(mesh)
    parts = batch_rows(placed)
    if slots % parts:
        raise InputError(f"--slots {slots}: the mesh splits them over {parts}, use a multiple")
    serving = _Serving(model, slice_, placed, slots, max_length, prefill, kv_dtype, weights)
    options = slice_.chip.options(with_flags) | (options or {})
    return [serving.plan(which, name, options, use_cache) for which in ("prefill", "decode")]


@dataclasses.dataclass(frozen=True)
class _Serving:
    """The arguments of both programs."""

    model: ModelConfig
    slice_: Topology
    mesh: Mesh
    slots: int
    max_length: int
    prefill: int
    kv_dtype: str
    weights: str | None

    def plan(self, program: str, name: str, options: dict[str, str], use_cache: bool) -> Plan:
        settings = {"slots": self.slots, "max_length": self.max_length, "kv_dtype": self.kv_dtype}
        settings |= {"prefill": self.prefill, "weights": self.weights or self.model.dtype}
        request = settings | {"program": program, "options": options, "mesh": dict(self.mesh.shape)}
        request |= {"model": dataclasses.asdict(self.model), "topology": self.slice_.name}
        with jax.set_mesh(self.mesh):
            params = self._params()
            state = self._state(params)
            made, is_cached = compile_cache.compiled_once(
                request,
                lambda: self._lower(program, params, state),
                options,
                use_cache=use_cache,
            )
        plan = Plan(
            name=name,
            program=program,
            topology=self.slice_.name,
            chip=self.slice_.chip.name,
            devices=self.mesh.size,
            mesh=describe(self.mesh),
            settings=settings,
            memory=self._memory(made, params, state),
            compile_seconds=made.seconds,
            is_cached=is_cached,
        )
        if made.problem:
            advice = "fewer slots, a shorter --max-length, --kv-dtype int8, --weights int8"
            return dataclasses.replace(
                plan, problem=made.problem, advice=f"{advice} or a larger tensor size of the mesh"
            )
        if not made.text:
            return dataclasses.replace(plan, warnings=(UNREADABLE,))
        return self._with_costs(plan, made, params, state)

    def _params(self) -> dict:
        return param_target(self.model, self.mesh, "bfloat16", self.weights)

    def _state(self, params: dict) -> dict:
        def new(params):
            return programs.new_state(
                self.model,
                params,
                self.lanes,
                self.lanes * self.max_blocks + 1,
                self.max_blocks,
                self.kv_dtype,
                BLOCK_SIZE,
            )

        return place(jax.eval_shape(new, params), self.mesh)

    def _lower(self, program: str, params: dict, state: dict) -> jax.stages.Lowered:
        if program == "decode":
            block_b = self._rows((self.slots,), jnp.int32)
            return programs.decode.lower(self.model, params, state, block_b)
        return programs.prefill.lower(self.model, params, state, self._prompt_rows())

    def _prompt_rows(self) -> dict:
        parts, integers = batch_rows(self.mesh), jnp.int32
        rows, tokens = self.prefill_rows * parts, self.prefill_rows * BLOCK_SIZE
        wanted = {
            "tokens": ((tokens,), integers),
            "segments": ((tokens,), integers),
            "thw": ((tokens, 3), integers),
            "is_image": ((tokens,), jnp.bool_),
            "patches": ((4 * tokens, PATCH_CHANNELS), jnp.uint8),
            "patch_hw": ((4 * tokens, 2), integers),
        }
        assert wanted.keys() <= RANK.keys()
        settings = sampling.row_settings([])
        names = ("block_r", "start_r", "first_key_r", "lane_r", "index_r")
        return {
            "batch": {
                name: self._rows((parts, *shape), kind) for name, (shape, kind) in wanted.items()
            },
            **{name: self._rows((rows,), integers) for name in names},
            "end_dt": self._rows((parts, tokens), integers),
            "context_blocks_dc": self._rows((parts, 0), integers),
            "is_last_r": self._rows((rows,), jnp.bool_),
            "block_table_rn": self._rows((rows, self.max_blocks), integers),
            "settings": {key: self._rows((rows,), one.dtype) for key, one in settings.items()},
        }

    def _rows(self, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        partition = spec("batch", *[None] * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, partition))

    @property
    def lanes(self) -> int:
        """On each device of the batch axes."""
        return self.slots // batch_rows(self.mesh)

    @property
    def max_blocks(self) -> int:
        return -(-self.max_length // BLOCK_SIZE)

    @property
    def prefill_rows(self) -> int:
        return -(-self.prefill // BLOCK_SIZE)

    def _memory(self, made: Compiled, params: dict, state: dict) -> MemoryUse:
        kept = state["pool"]
        rest = {name: state[name] for name in state if name != "pool"}
        kinds = {
            "parameters": device_bytes(params),
            "keys and values": device_bytes(kept),
            "rest of the state": device_bytes(rest),
        }
        limit = int(self.slice_.chip.usable_gib * GIB)
        if made.memory is None:
            return MemoryUse(kinds, 0, limit)
        known, sizes = sum(kinds.values()), made.memory
        kinds["arguments: padding, unused"] = sizes.arguments - known
        kinds["results"] = sizes.outputs - sizes.alias
        kinds["temporaries"] = sizes.temporaries
        return MemoryUse(kinds, sizes.total, limit)

    def _with_costs(self, plan: Plan, made: Compiled, params: dict, state: dict) -> Plan:
        chip, parts = self.slice_.chip, batch_rows(self.mesh)
        counted = attention(chip, self.model, (), 1, tensor_size(self.mesh))
        totals = costs.read(made.text, self.slice_, self.mesh, counted.work)
        times = costs.times(totals, chip)
        copies = kv_copies(made.text, self.layer_bytes(state))
        notes = {"copies as large as a layer's keys": len(copies), "they are": copies[:5]}
        notes |= {"kernels not counted": sorted(set(totals.unknown_kernels))}
        notes |= {"loops counted once": sorted(set(totals.unknown_loops))}
        flops = 0.0
        if plan.program == "prefill":
            tokens = self.prefill * parts / self.mesh.size
            keys = tokens * self.prefill / 2
            flops = flops_per_batch(self.model, tokens, 0, keys) / 3  # forward only
            flops -= 2 * self.model.vocab_size * self.model.hidden_size * tokens  # last ones only
        else:
            tokens = self.slots / self.mesh.size
            least = plan.memory.kinds["parameters"] + plan.memory.kinds["keys and values"]
            notes["GB that a full cache's step must read"] = least / 1e9
            notes["of HBM's bandwidth, at most"] = least / chip.hbm_bandwidth / times.step
        return dataclasses.replace(
            plan,
            tokens=tokens,
            model_flops=flops,
            executed_flops=totals.flops,
            hbm_bytes=totals.hbm_bytes,
            times=times,
            mfu=flops / chip.flops / times.step,
            mfu_compute=flops / chip.flops / times.compute,
            traffic=costs.traffic(totals),
            all_reduced=sum(costs.all_reduced(totals).values()),
            largest_all_gather=costs.largest_all_gather(totals),
            operations=costs.longest(totals, chip),
            notes=notes,
            warnings=tuple(f"gathered whole: {what}" for what in made.rematerialized),
        )

    def layer_bytes(self, state: dict) -> int:
        """Of one layer's values on a device: the smallest array that is as large as a cache."""
        leaf = min(jax.tree.leaves(state["pool"][STACKS[1]]["v"]), key=lambda leaf: -leaf.ndim)
        return device_bytes(leaf) // leaf.shape[0]


def kv_copies(text: str, least: int) -> list[str]:
    """Instructions that copy at least so many bytes of HBM: a cache should stay where it is."""
    module, found = hlo.parse(text), []
    fused = {
        one.called()
        for computation in module.computations.values()
        for one in computation.instructions
        if one.op == "fusion"
    }
    for computation in module.computations.values():
        if computation.name in fused:
            continue
        for one in computation.instructions:
            is_copy = one.op in _COPIES or (
                one.op == "fusion"
                and {each.op for each in all_instructions(module, module[one.called()])}
                <= {"parameter", "copy", "transpose", "bitcast", "fusion"}
            )
            arrays = [array for array in one.arrays[:1] if not array.is_in_vmem]
            if is_copy and arrays and arrays[0].bytes >= least:
                found.append(f"{one.op} {arrays[0].dtype}{list(arrays[0].shape)} {one.op_name}")
    return found

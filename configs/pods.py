"""How each stage and size runs on each pod: chosen with `python -m neo_jax.plan`, see docs/pods.md.

`python train.py configs/neo_ov_9b_sft.py --pod v5e-256 ...` puts a row's settings in; those on the
line come after them. A pod's name counts as the cloud does: v5p by cores, two to a chip.

Steps and rows stay those of the stage: 128 rows, on a small pod as micro-batches one after the
other. Where a row is too long for a chip, `context` splits it, and parameters with it.
"""

# (config, pod) -> settings, as on the line of train.py
PODS: dict[tuple[str, str], tuple[str, ...]] = {}

_ROWS = 128  # of a step, as configs/stages.py
_HALF = "optim.state_dtype=bfloat16"  # moments, where memory is short
_KEEP = "remat=products"  # where there is room

# Pod -> data, fsdp, tensor, context; then what else it needs.
_2B = {
    "v5e-16": ((1, 8, 1, 2),),
    "v5e-64": ((1, 32, 1, 2),),
    "v5e-256": ((1, 128, 1, 2),),
    "v5p-64": ((1, 32, 1, 1), _KEEP),
    "v5p-128": ((1, 64, 1, 1), _KEEP),
    "v6e-16": ((1, 16, 1, 1),),
    "v6e-64": ((1, 64, 1, 1),),
    "v6e-256": ((1, 128, 1, 2),),
}
_9B = {
    "v5e-16": ((1, 8, 2, 1), "data.length=8192", _HALF),
    "v5e-64": ((1, 32, 1, 2), _HALF),
    "v5e-256": ((1, 128, 1, 2),),
    "v5p-64": ((1, 32, 1, 1), _KEEP),
    "v5p-128": ((1, 64, 1, 1), _KEEP),
    "v6e-16": ((1, 16, 1, 1),),
    "v6e-64": ((1, 64, 1, 1),),
    "v6e-256": ((1, 128, 1, 2),),
}

for _size, _pods in (("2b", _2B), ("9b", _9B)):
    for _stage in ("pt", "mt", "sft"):
        for _pod, (_mesh, *_more) in _pods.items():
            PODS[f"neo_ov_{_size}_{_stage}", _pod] = (
                f"mesh={_mesh}",
                f"data.rows={_ROWS}",
                f"micro_batches={_ROWS // (_mesh[0] * _mesh[1])}",
                "remat=full",
                *_more,
            )

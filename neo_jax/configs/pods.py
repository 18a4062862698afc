"""How each stage and size runs on each pod: chosen with `python -m neo_jax.plan`, see docs/pods.md.

`python train.py configs/neo_ov_9b_sft.py --pod v5e-256 ...` puts a row's settings in; those on the
line come after them. A pod's name counts as the cloud does: v5p by cores, two to a chip.

Steps and rows stay those of the stage, but for a 9B on v5e-16: 128 rows, on a small pod as
micro-batches one after the other. Where a row is too long for a chip, `context` splits it, and
parameters with it.
"""

# (config, pod) -> settings, as on the line of train.py
PODS: dict[tuple[str, str], tuple[str, ...]] = {}

_MESHES = {  # data, fsdp, tensor, context
    "v5e-16": (1, 8, 1, 2),
    "v5e-64": (1, 32, 1, 2),
    "v5e-256": (1, 128, 1, 2),
    "v5p-64": (1, 32, 1, 1),
    "v5p-128": (1, 64, 1, 1),
    "v6e-16": (1, 16, 1, 1),
    "v6e-64": (1, 64, 1, 1),
    "v6e-256": (1, 128, 1, 2),
}
# What memory lets the backward pass keep, by size and stages, in the order of the meshes.
_REMAT = {
    "2b pt": "mlp mlp mlp products products mlp mlp products",
    "2b mt sft": "attention attention attention products products attention attention mlp",
    "9b pt": "full attention attention products products attention attention mlp",
    "9b mt sft": "full full attention products products full attention gate",
}
_ROWS = 128  # of a step, as configs/stages.py

for _name, _policies in _REMAT.items():
    _size, *_stages = _name.split()
    for _stage in _stages:
        for (_pod, _mesh), _remat in zip(_MESHES.items(), _policies.split(), strict=True):
            PODS[f"neo_ov_{_size}_{_stage}", _pod] = (
                f"mesh={_mesh}",
                f"data.rows={_ROWS}",
                f"micro_batches={_ROWS // (_mesh[0] * _mesh[1])}",
                f"remat={_remat}",
            )

# All that 16 chips of v5e can do for all of a 9B: half the rows, and moments in bfloat16.
for _stage in ("mt", "sft"):
    PODS[f"neo_ov_9b_{_stage}", "v5e-16"] = (
        "mesh=(1, 2, 2, 4)",
        "data.rows=64",
        "micro_batches=32",
        "remat=full",
        "optim.state_dtype=bfloat16",
    )

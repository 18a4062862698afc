"""The settings of each stage and size on each pod, chosen with `neo-ov plan`; see docs/pods.md.

`neo-ov train neo_ov_9b_sft --pod v5e-256 ...` applies them; settings on the command line come after
them. A pod has the cloud's name: v5p counts cores, two to a chip.

Steps and rows are those of the stage, except for a 9B on v5e-16. A small pod takes the 128 rows as
micro-batches, one after the other. Where a row is too long for a chip, the mesh axis `context`
splits it, and also shards the parameters.
"""

# (config, pod) -> settings, as on the command line
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
# The rematerialisation that memory allows, by size and stages, in the order of the meshes.
_REMAT = {
    "2b pt": "mlp mlp mlp products products mlp mlp products",
    "2b mt sft": "attention attention attention products products attention attention mlp",
    "9b pt": "full attention attention products products attention attention mlp",
    "9b mt sft": "full full attention products products full attention gate",
}
_ROWS = 128  # of a step, as in configs/stages.py

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

# To train all of a 9B, 16 chips of v5e have memory for half the rows, with moments in bfloat16.
for _stage in ("mt", "sft"):
    PODS[f"neo_ov_9b_{_stage}", "v5e-16"] = (
        "mesh=(1, 2, 2, 4)",
        "data.rows=64",
        "micro_batches=32",
        "remat=full",
        "optim.state_dtype=bfloat16",
    )

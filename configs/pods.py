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
_FEWER = ("data.rows=64", "micro_batches=32")  # a step's batch lies on the devices

# Size and stages: pod -> (data, fsdp, tensor, context), remat, what else it needs.
_CHOSEN = {
    ("2b", "pt"): {
        "v5e-16": ((1, 8, 1, 2), "mlp"),
        "v5e-64": ((1, 32, 1, 2), "mlp"),
        "v5e-256": ((1, 128, 1, 2), "mlp"),
        "v5p-64": ((1, 32, 1, 1), "products"),
        "v5p-128": ((1, 64, 1, 1), "products"),
        "v6e-16": ((1, 16, 1, 1), "mlp"),
        "v6e-64": ((1, 64, 1, 1), "mlp"),
        "v6e-256": ((1, 128, 1, 2), "products"),
    },
    ("2b", "mt sft"): {
        "v5e-16": ((1, 8, 1, 2), "attention"),
        "v5e-64": ((1, 32, 1, 2), "attention"),
        "v5e-256": ((1, 128, 1, 2), "attention"),
        "v5p-64": ((1, 32, 1, 1), "products"),
        "v5p-128": ((1, 64, 1, 1), "products"),
        "v6e-16": ((1, 16, 1, 1), "attention"),
        "v6e-64": ((1, 64, 1, 1), "attention"),
        "v6e-256": ((1, 128, 1, 2), "mlp"),
    },
    ("9b", "pt"): {
        "v5e-16": ((1, 8, 1, 2), "full"),
        "v5e-64": ((1, 32, 1, 2), "attention"),
        "v5e-256": ((1, 128, 1, 2), "attention"),
        "v5p-64": ((1, 32, 1, 1), "products"),
        "v5p-128": ((1, 64, 1, 1), "products"),
        "v6e-16": ((1, 16, 1, 1), "attention"),
        "v6e-64": ((1, 64, 1, 1), "attention"),
        "v6e-256": ((1, 128, 1, 2), "mlp"),
    },
    ("9b", "mt sft"): {
        "v5e-16": ((1, 2, 2, 4), "full", _HALF, *_FEWER),
        "v5e-64": ((1, 32, 1, 2), "full"),
        "v5e-256": ((1, 128, 1, 2), "attention"),
        "v5p-64": ((1, 32, 1, 1), "products"),
        "v5p-128": ((1, 64, 1, 1), "products"),
        "v6e-16": ((1, 16, 1, 1), "full"),
        "v6e-64": ((1, 64, 1, 1), "attention"),
        "v6e-256": ((1, 128, 1, 2), "gate"),
    },
}

for (_size, _stages), _pods in _CHOSEN.items():
    for _stage in _stages.split():
        for _pod, (_mesh, _remat, *_more) in _pods.items():
            PODS[f"neo_ov_{_size}_{_stage}", _pod] = (
                f"mesh={_mesh}",
                f"data.rows={_ROWS}",
                f"micro_batches={_ROWS // (_mesh[0] * _mesh[1])}",
                f"remat={_remat}",
                *_more,
            )

"""How each stage and size runs on each pod: chosen with `python -m neo_jax.plan`, see docs/pods.md.

`python train.py configs/neo_ov_9b_sft.py --pod v5e-256 ...` puts a row's settings in; those on the
line come after them. A pod's name counts as the cloud does: v5p by cores, two to a chip.
"""

# (config, pod) -> settings, as on the line of train.py
PODS: dict[tuple[str, str], tuple[str, ...]] = {}

_STAGES = ("pt", "mt", "sft")
_CHIPS = {
    "v5e-16": 16, "v5e-64": 64, "v5e-256": 256, "v5p-64": 32, "v5p-128": 64,
    "v6e-16": 16, "v6e-64": 64, "v6e-256": 256,
}  # fmt: skip


def _add(config: str, pod: str, *settings: str) -> None:
    PODS[config, pod] = settings


for _size in ("2b", "9b"):
    for _stage in _STAGES:
        for _pod, _count in _CHIPS.items():
            _add(
                f"neo_ov_{_size}_{_stage}",
                _pod,
                f"mesh=(1, {_count}, 1)",
                f"data.rows={_count}",
                "data.length=8192",
                "remat=full",
            )

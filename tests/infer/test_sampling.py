"""Sampling against HF's numbers and plain numpy; who may influence a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.golden import arrays, raises, read_json
from neo_jax.infer import sampling as sm
from neo_jax.infer.sampling import Sampling
from neo_jax.sharding import make_mesh, put

SETTINGS = ("neo_ov", "top_p_0_25", "temperature_only", "top_p_only", "penalty_1_5")
TIED_ROWS = (3, 6)  # which of the equal logits stay is the sort's choice there

sample_step = jax.jit(sm.sample)
process_step = jax.jit(sm.processed_logits)


def seen_by(prefixes, vocab_size):
    penalized = Sampling(penalize_prompt=True)
    return np.stack([sm.first_seen(penalized, prefix, vocab_size) for prefix in prefixes])


def golden_rows():
    golden = arrays("sampling", "sampling.npz")
    pairs = zip(golden["prefix_ids_padded"], golden["prefix_lengths"], strict=True)
    return golden, seen_by([ids[:length] for ids, length in pairs], 600)


def run(step, rows, *by_row, mesh=(1, 1, 1), vocab=None):
    """`step` of logits [B, V], seen [B, V], settings and, if it draws, index [B]."""
    mesh = make_mesh(mesh)
    logits_bv, seen_bv, *index_b = by_row
    placed = {name: put(x, mesh, "batch") for name, x in sm.row_settings(rows).items()}
    logits_bv = put(np.asarray(logits_bv, np.float32), mesh, "batch", vocab)
    index_b = [put(np.asarray(x, np.int32), mesh, "batch") for x in index_b]
    with jax.set_mesh(mesh):
        return np.asarray(step(logits_bv, put(seen_bv, mesh, "batch", None), placed, *index_b))


def draw(rows, logits_bv, index_b, mesh=(1, 1, 1), vocab=None):
    seen_bv = np.asarray(logits_bv) > 2.5  # anything that belongs to the row
    return run(sample_step, rows, logits_bv, seen_bv, index_b, mesh=mesh, vocab=vocab)


def random_case(num_rows, vocab_size, seed=0, step=1e-6):
    """Logits of many shapes, rounded to `step`, and settings drawn from all that there are."""
    rng = np.random.default_rng(seed)
    logits_bv = rng.normal(size=(num_rows, vocab_size)) * rng.uniform(0.3, 6, (num_rows, 1))
    rows = [
        Sampling(
            temperature=rng.choice([0, 0.3, 0.6, 1.0, 1.7]),
            top_k=rng.choice([0, 1, 5, 20, 100, vocab_size, 10 * vocab_size]),
            top_p=rng.choice([0, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0]),
            repetition_penalty=rng.choice([0.8, 1.0, 1.05, 1.5]),
            seed=rng.integers(2**32),
        )
        for _ in range(num_rows)
    ]
    return (np.round(logits_bv / step) * step).astype(np.float32), rows


def plain_processed(x_v, seen_v, s):
    """HF's chain as it is written, and how far each token is from the edge of top_p."""
    x_v = x_v.astype(np.float32)
    factor = np.float32(s.repetition_penalty)
    x_v = np.where(seen_v, np.where(x_v < 0, x_v * factor, x_v / factor), x_v)
    margin_v = np.full(len(x_v), np.inf)
    if s.temperature == 0:
        return x_v, margin_v
    x_v = x_v / np.float32(s.temperature)
    if s.top_k:
        x_v = np.where(x_v < np.sort(x_v)[-min(s.top_k, len(x_v))], -np.inf, x_v)
    if s.top_p < 1:
        order = np.argsort(x_v, kind="stable")
        weight_v = np.exp(x_v[order].astype(np.float64) - x_v.max())
        cumulative_v = np.cumsum(weight_v / weight_v.sum())
        margin_v[order] = np.abs(cumulative_v - (1 - s.top_p))
        out = order[:-1][cumulative_v[:-1] <= 1 - s.top_p]
        x_v[out] = -np.inf
    return x_v, margin_v


@pytest.mark.parametrize("name", SETTINGS)
def test_processed_logits_and_probabilities_are_the_official_ones(name):
    meta, (golden, seen_bv) = read_json("sampling", "meta.json"), golden_rows()
    given = {"temperature": 1.0, **meta["settings"][name]}
    x_bv = run(process_step, [Sampling(**given)] * 20, golden["logits"], seen_bv)
    assert np.isfinite(x_bv).sum(axis=1).tolist() == meta["kept_tokens"][name]
    plain = [row for row in range(20) if row not in TIED_ROWS]
    np.testing.assert_allclose(x_bv[plain], golden[f"{name}_processed"][plain], rtol=1e-6)
    probs_bv = np.asarray(jax.nn.softmax(jnp.asarray(x_bv)))
    np.testing.assert_allclose(probs_bv[plain], golden[f"{name}_probs"][plain], atol=1e-6)


@pytest.mark.parametrize(("name", "penalty"), [("greedy", 1.0), ("greedy_with_penalty_1_05", 1.05)])
def test_greedy_tokens_are_the_official_ones(name, penalty):
    golden, seen_bv = golden_rows()
    rows = [Sampling(repetition_penalty=penalty)] * 20
    tokens = run(sample_step, rows, golden["logits"], seen_bv, np.zeros(20))
    assert tokens.tolist() == golden[name].tolist()


@pytest.mark.parametrize("step", [1e-6, 0.5, 2.0])
def test_any_settings_agree_with_the_plain_chain_and_coarse_logits_tie(step):
    logits_bv, rows = random_case(64, 311, seed=1, step=step)
    seen_bv = np.random.default_rng(2).random((64, 311)) < 0.2
    x_bv = run(process_step, rows, logits_bv, seen_bv)
    for x_v, logits_v, seen_v, row in zip(x_bv, logits_bv, seen_bv, rows, strict=True):
        expected_v, margin_v = plain_processed(logits_v, seen_v, row)
        sure = margin_v > 1e-6
        np.testing.assert_allclose(x_v[sure], expected_v[sure], rtol=1e-6, err_msg=str(row))
        assert (~sure).sum() < 3


def test_one_setting_in_a_row_does_not_leak_into_another():
    logits_bv, rows = random_case(16, 97, seed=3)
    seen_bv = np.zeros((16, 97), bool)
    together = run(process_step, rows, logits_bv, seen_bv)
    for row, (settings, x_v) in enumerate(zip(rows, together, strict=True)):
        alone = run(process_step, [settings], logits_bv[row : row + 1], seen_bv[row : row + 1])
        np.testing.assert_array_equal(x_v, alone[0])


def test_a_request_draws_the_same_token_in_any_row_beside_any_neighbours():
    logits_bv, rows = random_case(16, 97, seed=4)
    index_b = np.arange(16) * 7
    tokens = draw(rows, logits_bv, index_b)
    mixed = np.random.default_rng(5).permutation(16)
    moved = draw([rows[i] for i in mixed], logits_bv[mixed], index_b[mixed])
    assert moved.tolist() == tokens[mixed].tolist()
    alone = [draw([rows[i]], logits_bv[i : i + 1], index_b[i : i + 1])[0] for i in range(16)]
    assert alone == tokens.tolist()
    calm = [row if i % 4 == 0 else Sampling() for i, row in enumerate(rows)]
    assert draw(calm, logits_bv, index_b)[::4].tolist() == tokens[::4].tolist()


def test_a_draw_is_what_its_seed_and_index_say():
    logits_bv = np.random.default_rng(6).normal(size=(5, 50))
    rows = [Sampling(temperature=1.0, seed=seed) for seed in (0, 1, 7, 7, 2**32 - 1)]
    index_b = [0, 0, 3, 4, 10**6]
    tokens = run(sample_step, rows, logits_bv, np.zeros((5, 50), bool), index_b)
    for token, row, index, logits_v in zip(tokens, rows, index_b, logits_bv, strict=True):
        key = jax.random.key(np.uint32(row.seed), impl="threefry2x32")
        logits_v = jnp.asarray(logits_v, jnp.float32)
        assert token == jax.random.categorical(jax.random.fold_in(key, index), logits_v)


def test_draws_follow_the_probabilities():
    count, probs_v = 8192, np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.008, 0.002])
    row = Sampling(temperature=0.5, top_k=7, top_p=0.97, seed=11)
    logits_bv = np.tile(np.log(probs_v) * 0.5, (count, 1))
    tokens = run(sample_step, [row] * count, logits_bv, np.zeros((count, 8), bool), range(count))
    kept_v = np.where(np.arange(8) < 6, probs_v, 0) / probs_v[:6].sum()
    drawn_v = np.bincount(tokens, minlength=8)
    assert drawn_v[6:].sum() == 0
    chi_square = ((drawn_v - count * kept_v)[:6] ** 2 / (count * kept_v[:6])).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: one seed in a thousand is above


def test_seeds_are_independent():
    logits_bv = np.zeros((512, 64))
    rows = [Sampling(temperature=1.0, seed=seed) for seed in range(512)]
    tokens = run(sample_step, rows, logits_bv, np.zeros((512, 64), bool), np.zeros(512))
    assert np.bincount(tokens, minlength=64).max() < 24  # of 8 expected
    assert len(set(tokens.tolist())) == 64


@pytest.mark.parametrize("vocab", [None, "vocab"])
def test_the_mesh_changes_nothing(vocab):
    logits_bv, rows = random_case(16, 96, seed=8)
    tokens = draw(rows, logits_bv, np.arange(16))
    split = draw(rows, logits_bv, np.arange(16), mesh=(2, 2, 2), vocab=vocab)
    assert split.tolist() == tokens.tolist()


@functools.partial(jax.jit, static_argnames="num_steps")
def several_tokens(logits_bv, seen_bv, settings, num_steps):
    def step(seen_bv, index):
        index_b = jnp.zeros_like(settings["top_k_b"]) + index
        tokens_b = sm.sample(logits_bv, seen_bv, settings, index_b)
        return sm.add_seen(seen_bv, tokens_b), tokens_b

    return jax.lax.scan(step, seen_bv, jnp.arange(num_steps))[1].T


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_seen_tokens_are_penalised_from_the_next_token_on(mesh):
    logits_bv = np.tile([4.0, 3.9, 3.0, -1.0], (4, 1))
    rows = [Sampling(repetition_penalty=penalty) for penalty in (1.0, 1.2, 100.0, 1.2)]
    seen_bv = seen_by([[], [], [], [0]], 4)
    four = functools.partial(several_tokens, num_steps=4)
    tokens = run(four, rows, logits_bv, seen_bv, mesh=mesh)
    assert tokens.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0], [1, 0, 0, 0]]


def test_the_prompt_is_penalised_only_if_asked():
    assert sm.first_seen(Sampling(), [1, 2], 4).tolist() == [False] * 4
    asked = sm.first_seen(Sampling(penalize_prompt=True), [1, 2, 1], 4)
    assert asked.tolist() == [False, True, True, False]


def test_one_program_serves_all_settings():
    draw([Sampling()] * 3, np.zeros((3, 31)), np.zeros(3))
    programs = sample_step._cache_size()
    logits_bv, rows = random_case(3, 31, seed=9)
    draw(rows, logits_bv, np.arange(3))
    assert sample_step._cache_size() == programs


def test_extreme_logits_keep_at_least_one_token():
    logits_bv = np.array(
        [[0.0, -0.0, 0.0, -0.0], [-1e30, -1e30, -np.inf, -1e30], [3e4, 3e4, 1e-40, -3e4]]
    )
    rows = [Sampling(temperature=1e-6, top_k=1, top_p=0.0), Sampling(temperature=1.0, top_p=0.0)]
    for row in rows:
        x_bv = run(process_step, [row] * 3, logits_bv, np.zeros((3, 4), bool))
        assert np.isfinite(x_bv).sum(axis=1).tolist() == [1, 1, 1]
        assert np.isfinite(x_bv).argmax(axis=1).tolist() == [3, 3, 1]
    tied = run(
        process_step, [Sampling(temperature=1.0, top_k=1)] * 3, logits_bv, np.zeros((3, 4), bool)
    )
    assert np.isfinite(tied).sum(axis=1).tolist() == [4, 3, 2]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -0.1, "1e-6"),
        ("temperature", float("nan"), "1e-6"),
        ("temperature", 1e-9, "0 or"),
        ("temperature", "warm", "0 or"),
        ("top_k", -1, "0 .off."),
        ("top_k", 1.5, "integer"),
        ("top_p", 1.01, "0 to 1"),
        ("top_p", None, "0 to 1"),
        ("repetition_penalty", 0, "0.01 to 100"),
        ("max_new_tokens", 0, "1 or more"),
        ("max_new_tokens", True, "1 or more"),
        ("stop", ["end", ""], "one or more"),
        ("stop", 5, "texts"),
        ("stop_token_ids", [-1], "0 or more"),
        ("stop_token_ids", ["<|im_end|>"], "token ids"),
        ("seed", -1, "4294967295"),
        ("seed", 2**32, "4294967295"),
    ],
)
def test_bad_settings_name_the_field_and_what_is_allowed(field, value, allowed):
    with raises(f"^{field} is", allowed):
        Sampling(**{field: value})


def test_settings_take_single_values_and_lists():
    s = Sampling(
        stop="\n\n", stop_token_ids=np.array([3, 4]), top_p=np.float32(0.5), top_k=np.int64(2)
    )
    assert s.stop == ("\n\n",)
    assert s.stop_token_ids == (3, 4)
    assert Sampling(stop=["a", "b"], stop_token_ids=7).stop_token_ids == (7,)
    assert hash(s) == hash(s)

"""What a mixture's text means: rates of sources' own records, or weights, and never both."""

import pytest

from helpers.golden import raises
from neo_jax.data.mixture import Mixture


@pytest.fixture
def files(tmp_path):
    for name, count in (("a", 100), ("b", 300), ("c", 200)):
        (tmp_path / f"{name}.jsonl").write_text('{"conversations": []}\n' * count)
    return [str(tmp_path / f"{name}.jsonl") for name in "abc"]


@pytest.mark.parametrize(
    ("marks", "shares"),
    [(("%50", "", ""), (1 / 11, 6 / 11, 4 / 11)), (("@1", "@2", ""), (1 / 4, 2 / 4, 1 / 4))],
)
def test_the_documented_mixtures_are_drawn_as_they_say(files, marks, shares):
    mixture = Mixture.parse(",".join(map("".join, zip(files, marks, strict=True))))
    order = mixture.numbers(seed=1, repeat=True)
    drawn = [mixture.where(int(order[index])).split(":")[0] for index in range(880)]
    for file, share in zip(files, shares, strict=True):
        assert drawn.count(file) / 880 == pytest.approx(share, abs=0.01)


def test_a_rate_beside_a_weight_is_refused(files):
    a, b, c = files
    for text in (f"{a}%50,{b}@2,{c}", f"{b}@2,{c},{a}%50"):
        with raises("a.jsonl has a %", "b.jsonl an @", "use one kind"):
            Mixture.parse(text)

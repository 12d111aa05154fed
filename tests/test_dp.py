"""Privacy of the weights: what one client can change, the noise, and the epsilon of both with the graph's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import ClientCrash, Federation
from scipy.integrate import quad
from scipy.stats import kstest

from sam_ds.config import load_config
from sam_ds.errors import InputError
from sam_ds.federation.accountant import ORDERS, Release, epsilon_of, renyi
from sam_ds.federation.aggregation import AggregationConfig, Aggregator
from sam_ds.federation.messages import blobs_of
from sam_ds.federation.privacy import noised, note_release, secret_normal, spent
from sam_ds.federation.state import checkpoints, load_checkpoint
from sam_ds.graph.privacy import gaussian_epsilon
from sam_ds.wire.payload import decode_units

# ------------------------------------------------------------------ the accountant


@pytest.mark.parametrize(("rate", "noise"), [(0.01, 4.0), (0.02, 1.0), (0.25, 2.0), (0.9, 0.7), (1.0, 3.0)])
@pytest.mark.parametrize("order", [2, 8, 32])
def test_divergence_is_the_integral(rate: float, noise: float, order: int) -> None:
    """Of both directions the larger: E_Q (P / Q)^alpha and E_P (Q / P)^alpha, Q = N(0, s^2) and P the mixture."""

    def log_ratio(x: float) -> float:
        return math.log(1 - rate + rate * math.exp((2 * x - 1) / (2 * noise**2)))

    def log_q(x: float) -> float:
        return -((x / noise) ** 2) / 2 - math.log(noise * math.sqrt(2 * math.pi))

    def log_moment(power: int) -> float:
        # Its bulk lies between the means 0 and `order`, or left of 0.
        low, high = (-12 * noise, order + 12 * noise) if power > 0 else (-order - 12 * noise, 12 * noise)
        peak = max(log_q(x) + power * log_ratio(x) for x in np.linspace(low, high, 2001))
        value = quad(lambda x: math.exp(log_q(x) + power * log_ratio(x) - peak), low, high, limit=500, epsrel=1e-10)
        return peak + math.log(value[0])

    forth, back = (log_moment(power) / (order - 1) for power in (order, 1 - order))
    found = float(renyi(rate, noise)[np.flatnonzero(order == ORDERS)[0]])
    assert found == pytest.approx(max(forth, back), rel=1e-5)


@pytest.mark.parametrize(("releases", "delta", "rdp", "tight"), [
    # dp-accounting 0.6.0, RdpAccountant and PLDAccountant, Poisson-sampled Gaussians. The first is the case of Abadi et
    # al., 1607.00133, section 4: 1.26 by their moments, with an older conversion.
    ([(4.0, 0.01, 10000)], 1e-5, 1.0354900660362436, 0.9469993068930963),
    ([(1.1, 250 / 60000, 3600)], 1e-5, 1.265491289986676, 1.1184980908018554),
    ([(1.0, 0.02, 100)], 1e-5, 1.8434722858863433, 1.4273403430668294),
    ([(2.0, 0.25, 6)], 1e-5, 1.8455747396259286, 1.6143835683371415),
    ([(0.8, 0.02, 200), (2.0, 1.0, 20)], 1e-6, 13.957353428990977, 13.120415418933318),
    ([(30.0, 0.001, 10)], 1e-5, 0.0035071082005818975, 0.00018762271981552996),
])  # fmt: skip
def test_epsilon_of_known_cases(releases, delta: float, rdp: float, tight: float) -> None:
    """Whole orders only cost at most half a per cent of what all orders give."""
    found = epsilon_of([Release(*each) for each in releases], delta)
    assert tight <= found <= 1.005 * rdp


def test_without_sampling_epsilon_is_exact() -> None:
    assert epsilon_of([Release(8.0, 1.0, 6)], 1e-5) == gaussian_epsilon(8.0, 1e-5, releases=6)
    both = epsilon_of([Release(3.0, 1.0, 1), Release(4.0, 1.0, 1)], 1e-5)
    assert both == pytest.approx(gaussian_epsilon(2.4, 1e-5), rel=1e-8)


@settings(deadline=None, max_examples=15)
@given(st.floats(0.3, 20), st.floats(0.001, 1), st.integers(1, 50), st.floats(1e-8, 0.1))
def test_less_noise_more_rounds_more_clients_more_epsilon(noise: float, rate: float, times: int, delta: float) -> None:
    epsilon = epsilon_of([Release(noise, rate, times)], delta)
    slack = 1 + 1e-9
    assert epsilon <= epsilon_of([Release(noise, rate, times + 1)], delta) * slack
    assert epsilon <= epsilon_of([Release(noise, min(1.0, 1.2 * rate), times)], delta) * slack
    assert epsilon_of([Release(1.2 * noise, rate, times)], delta) <= epsilon * slack
    assert epsilon <= gaussian_epsilon(noise, delta, releases=times)
    assert epsilon <= epsilon_of([Release(noise, rate, times), Release(5.0, 1.0, 1)], delta) * slack


@pytest.mark.parametrize("wrong", [(0.0, 0.5, 1), (math.inf, 0.5, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.5, 0)])
def test_releases_that_cannot_be(wrong: tuple[float, float, int]) -> None:
    with pytest.raises(InputError, match="noise must be positive, rate in"):
        Release(*wrong)


def test_the_ledger_promises_only_what_always_had_noise() -> None:
    released: dict[str, list[list[float]]] = {}
    assert spent(released, 1e-5) == {}
    for _ in range(3):
        note_release(released, "weights", 1.5, 0.25)
    note_release(released, "edits", 4.0, 1.0)
    assert released == {"weights": [[1.5, 0.25, 3]], "edits": [[4.0, 1.0, 1]]}
    weights, edits = Release(1.5, 0.25, 3), Release(4.0, 1.0, 1)
    assert spent(released, 1e-5) == {
        "delta": 1e-5, "weights": epsilon_of([weights], 1e-5), "edits": epsilon_of([edits], 1e-5),
        "run": epsilon_of([weights, edits], 1e-5),
    }  # fmt: skip
    # One round without noise, as after a resume with other settings, and the weights have told everything.
    note_release(released, "weights", 0.0, 0.25)
    note_release(released, "weights", 1.5, 0.25)
    assert [entry[2] for entry in released["weights"]] == [3, 1, 1]
    assert spent(released, 1e-5) == {"delta": 1e-5, "edits": epsilon_of([edits], 1e-5)}


# ------------------------------------------------------------------ what one client adds, and the noise


@st.composite
def replies(draw):
    """Of each client: deltas of some units, |D_i|, and p."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for _ in range(draw(st.integers(1, 5))):
        units = draw(st.sets(st.sampled_from("abcd"), min_size=1))
        deltas = {u: rng.normal(size=(2, ord(u) - 96)) * 10 ** rng.uniform(-3, 3) for u in units}
        found.append((deltas, float(rng.integers(1, 100)), {u: rng.uniform(0.01, 1) for u in units}))
    return found


def summed(given, bound, rule):
    fold = Aggregator(AggregationConfig(rule=rule, contribution=bound, clip=5.0), total_weight=500.0)
    for deltas, weight, p in given:
        fold.add(deltas, weight=weight, probability=p.__getitem__)
    return fold.result()


@settings(max_examples=60, deadline=None)
@given(replies(), st.floats(1e-3, 1e3), st.sampled_from(["ht", "clipped"]))
def test_one_client_changes_the_sum_by_at_most_the_bound(given_, bound: float, rule: str) -> None:
    """Its answers against zeros, whatever its weight and p; and what is longer than the bound is of just that length,
    in its own direction."""
    whole, lengths = summed(given_, bound, rule), []
    for left_out, (deltas, weight, p) in enumerate(given_):
        zeros = {u: np.zeros_like(d) for u, d in deltas.items()}
        other = summed([*given_[:left_out], (zeros, weight, p), *given_[left_out + 1 :]], bound, rule)
        change = {u: whole.deltas[u] - other.deltas[u] for u in whole.deltas}
        norm = math.sqrt(sum(float((c**2).sum()) for c in change.values()))
        cap = 5.0 if rule == "clipped" else math.inf
        alone = {u: weight / 500 * min(1 / p[u], cap) * d for u, d in deltas.items()}
        length = math.sqrt(sum(float((d**2).sum()) for d in alone.values()))
        size = sum(float(np.abs(d).max()) for d in whole.deltas.values())
        assert norm == pytest.approx(min(length, bound), rel=1e-9, abs=1e-12 * size)
        lengths.append(length)
        for u, c in change.items():
            want = alone.get(u, np.zeros(1)) * min(1.0, bound / length) if length else 0.0
            np.testing.assert_allclose(c, want + np.zeros_like(c), rtol=1e-9, atol=1e-12 * size)
    assert whole.bounded["contribution"] == pytest.approx(np.median(lengths), rel=1e-12)
    assert whole.bounded["clipped"] == np.mean([length > bound for length in lengths])


def test_the_bound_holds_in_float32_of_what_is_huge() -> None:
    huge = np.full(1000, 3e38, np.float32)
    for first in (huge, np.zeros(1000, np.float32)):
        found = summed([({"a": first}, 250.0, {"a": 0.5}), ({"a": huge}, 250.0, {"a": 0.01})], 0.5, "ht").deltas["a"]
        clients = 1 if first is not huge else 2
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, clients * 0.5 / math.sqrt(1000), rtol=1e-5)


def test_noise_is_normal_on_every_coordinate_of_every_unit() -> None:
    units = {"held": np.zeros((300, 250), np.float32), "nobody's": np.zeros((1 << 16) + 5, np.float32),
             "one": np.zeros((), np.float32)}  # fmt: skip
    sent = np.full((300, 250), 3.0, np.float32)
    result = noised({"held": sent}, units, 0.25)
    assert list(result) == list(units)
    assert all(result[u].shape == value.shape and result[u].dtype == np.float32 for u, value in units.items())
    assert all((result[u] != 0).all() for u in units)
    values = np.concatenate([result["held"].reshape(-1) - 3.0, result["nobody's"]]).astype(np.float64) / 0.25
    # At this level one of a million good generators fails; one of deviation 0.98 always.
    assert kstest(values, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 6 / math.sqrt(values.size)
    assert (noised({}, units, 0.25)["held"] != result["held"]).mean() > 0.99, "no two rounds share their noise"


def test_the_tails_are_there() -> None:
    """Quantiles far out, where too few random bits would show."""
    values = np.abs(secret_normal(1_000_000))
    assert np.isfinite(values).all()
    counts = [int((values > limit).sum()) for limit in (3.0, 4.0)]
    for count, chance in zip(counts, (2.6998e-3, 6.334e-5), strict=True):
        assert abs(count - 1e6 * chance) < 6 * math.sqrt(1e6 * chance)


# ------------------------------------------------------------------ a run

DP = ("federation.dp_noise=0.5", "federation.dp_clip=0.05", "federation.sampling=poisson",
      "federation.edit_noise=2.0", "federation.edit_every=1", "evaluation.every=9")  # fmt: skip


def test_a_run_with_noise_moves_everything_and_accounts_for_it(tiny, new_worker, tmp_path) -> None:
    overrides = (*DP, "tiers.large.share=0", "tiers.small.share=0.625")
    federation = Federation.of(tiny.config(tmp_path / "run", *overrides), tiny.base, new_worker(*overrides))
    before = dict(federation.server.state.units)
    federation.start()
    state, rounds = federation.server.state, federation.records("round")
    deviation = 0.5 * 0.05
    for unit, value in state.units.items():
        moved = (value - before[unit]).astype(np.float64)
        # Twice the noise, and at most as much as the clients add: all of them, at their bound, both times.
        assert (moved != 0).mean() > 0.99, unit
        assert math.sqrt((moved**2).sum()) < 2 * deviation * (math.sqrt(moved.size) + 6) + 2 * 6 * 0.05
    assert state.released == {"weights": [[0.5, 0.5, 2]], "edits": [[2.0, 1.0, 2]]}
    assert load_checkpoint(checkpoints(federation.run / "checkpoints")[-1]).released == state.released
    for count, record in enumerate(rounds[1:], start=1):
        weights, edits = Release(0.5, 0.5, count), Release(2.0, 1.0, count)
        assert record["epsilon"] == {
            "delta": 1e-5, "weights": epsilon_of([weights], 1e-5), "edits": epsilon_of([edits], 1e-5),
            "run": epsilon_of([weights, edits], 1e-5),
        }  # fmt: skip
        if record["answers"]:
            assert 0 < record["contribution"] and 0 <= record["clipped"] <= 1


def test_a_failed_client_counts_as_zeros(tiny, new_worker, tmp_path) -> None:
    """Nothing is scaled up for it, so its failing changes the sum by what it would have added and no more."""
    overrides = ("method=fedavg", "federation.rounds=1", "federation.dp_noise=1e-9", "federation.dp_clip=1.0",
                 "federation.clients_per_round=6")  # fmt: skip

    def crash(reply):
        raise ClientCrash("out of memory")

    config = tiny.config(tmp_path / "run", *overrides)
    federation = Federation.of(config, tiny.base, new_worker(*overrides), tamper={2: crash})
    before = dict(federation.server.state.units)
    record = federation.start().records("round")[-1]
    assert record["p_answer"] == 5 / 6 and record["clipped"] == 0
    examples = federation.server.state.examples
    expected = {unit: value.astype(np.float64) for unit, value in before.items()}
    for client, reply in enumerate(federation.grid.seen):
        for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
            if client != 2:
                expected[unit] = expected[unit] + examples[client] / examples.sum() * delta
    for unit, value in federation.server.state.units.items():
        np.testing.assert_allclose(value, expected[unit], rtol=1e-5, atol=1e-6, err_msg=str(unit))


def test_noise_and_draws_do_not_follow_from_the_seed(tiny, new_worker, tmp_path) -> None:
    overrides = (*DP, "federation.rounds=1", "federation.max_edits=0", "federation.edit_noise=0")
    runs = []
    for name in "ab":
        federation = Federation.of(tiny.config(tmp_path / name, *overrides), tiny.base, new_worker(*overrides)).start()
        runs.append(federation.server)
    one, other = (server.state.units for server in runs)
    assert all((one[unit] != other[unit]).mean() > 0.99 for unit in one)
    assert len({runs[0].draw_seed() for _ in range(20)}) == 20


@pytest.mark.parametrize(("override", "named"), [
    (("method=local",), "method = 'local'"), (("method=central",), "method = 'central'"),
    (("federation.aggregation=hajek",), "federation.aggregation = 'hajek'"),
    (("federation.aggregation=none",), "federation.aggregation = 'none'"),
    (("federation.robust=norm_clip",), "federation.robust = 'norm_clip'"),
    (("federation.robust=median",), "federation.robust = 'median'"),
    (("federation.score=fitness",), "federation.score = 'fitness'"),
    (("federation.score=anchors", "federation.floor=0.1"), "federation.score = 'anchors'"),
    (("federation.max_edits=8",), "federation.max_edits = 8 and federation.edit_noise = 0"),
    (("federation.shift_round=3",), "federation.shift_round = 3"),
])  # fmt: skip
def test_what_would_make_the_promise_void_is_refused(override: tuple[str, ...], named: str) -> None:
    load_config(None, ["federation.max_edits=0", *override])
    with pytest.raises(InputError, match="federation.dp_noise = 1 does not go with") as error:
        load_config(None, ["federation.dp_noise=1.0", "federation.max_edits=0", *override])
    assert named in str(error.value)


@pytest.mark.parametrize("noise", ["dp_noise", "edit_noise"])
def test_delta_must_be_below_one_client_in_all(noise: str) -> None:
    few = ["federation.max_edits=0", f"federation.{noise}=1.0", "federation.clients=8"]
    load_config(None, [*few, "federation.dp_delta=0.1"])
    with pytest.raises(InputError, match="dp_delta = 0.125 must be below 1 / federation.clients = 0.125"):
        load_config(None, [*few, "federation.dp_delta=0.125"])


def test_what_goes_with_noise() -> None:
    for score, rule in itertools.product(("uniform", "usage", "reach", "greedy"), ("ht", "clipped")):
        load_config(None, ["federation.dp_noise=1.0", "federation.edit_noise=1.0", f"federation.score={score}",
                           f"federation.aggregation={rule}"])  # fmt: skip
    for method in ("fedavg", "fedit", "static_mask"):
        load_config(None, ["federation.dp_noise=1.0", f"method={method}", "federation.aggregation=hajek"])

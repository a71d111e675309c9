"""The table, its executor and its laws, against independent propagation in numpy; no Monte Carlo."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import protocol
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoresde import grids, solvers
from scoresde.denoiser import Rows
from scoresde.laws import Gaussian
from scoresde.noise import Noise
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE
from scoresde.tableau import FIELDS, Tableau, check_finite, coefficients, join, not_finite, run
from scoresde.testing.solver_checks import check_point_mass, check_times

SDES: dict[str, LinearSDE] = {
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
    "ve": VESDE(),
    "edm": EDM(),
    "rectified": Rectified(),
    "table": VPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
}


def random_table(rows: int, width: int, seed: int) -> Tableau:
    """A table with nothing special: every coefficient that may be used is."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rows, width)) * (np.arange(width) <= np.arange(rows)[:, None])
    mix[rng.random((rows, width)) < 0.2] = 0
    noise = rng.normal(size=rows) * (rng.random(rows) < 0.7)
    return Tableau(
        torch.linspace(1, 1e-3, rows + 1, dtype=torch.float64),
        *(
            torch.from_numpy(value)
            for value in (rng.normal(size=rows), rng.normal(size=rows), rng.normal(size=rows))
        ),
        torch.from_numpy(mix),
        torch.from_numpy(noise),
        "random",
    )


def forms(table: Tableau) -> np.ndarray:
    """(K + 1, 1 + 2K) states over (x_0, D_0.., eps_0..), from the definition, history kept as a list of all
    outputs.
    """
    K = len(table)
    skip, out, keep, mix, noise = (getattr(table, f).numpy() for f in ("skip", "out", "keep", "mix", "noise"))
    unit = np.eye(1 + 2 * K)
    states, outputs = [unit[0]], []
    for k in range(K):
        outputs.append(skip[k] * states[k] + out[k] * unit[1 + k])
        x = keep[k] * states[k] + noise[k] * unit[1 + K + k]
        for j in range(min(mix.shape[1], k + 1)):
            x = x + mix[k, j] * outputs[k - j]
        states.append(x)
    return np.array(states)


tables = st.builds(random_table, st.integers(1, 9), st.integers(1, 12), st.integers(0, 10**6))


@given(tables)
def test_canonical_is_naive_propagation(table: Tableau) -> None:
    form, expected, K = table.canonical(), forms(table), len(table)
    assert torch.equal(form.times, table.times)
    found = torch.cat([form.a[:, None], form.B, form.C], 1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13 * np.abs(expected).max())
    assert form.a.shape == (K + 1,) and form.B.shape == form.C.shape == (K + 1, K)
    for k in range(K + 1):
        assert not form.B[k, k:].any() and not form.C[k, k:].any()


@given(tables, st.integers(0, 10**6))
def test_run_is_the_canonical_form(table: Tableau, seed: int) -> None:
    """Any batch, any denoiser: the executor on numbers, with a denoiser given as a x + b F."""
    rng, K = np.random.default_rng(seed), len(table)
    x, z, F = rng.normal(size=(3, 2)), rng.normal(size=(K, 3, 2)), rng.normal(size=(K, 3, 2))
    a, b = rng.normal(size=K), rng.normal(size=K)
    seen: list[np.ndarray] = []

    def evaluate(state: torch.Tensor, k: int) -> torch.Tensor:
        seen.append(state.numpy().copy())
        return torch.from_numpy(F[k]) * state.cos()

    asked: list[tuple[int, tuple[int, ...]]] = []

    def noise(k: int, shape) -> torch.Tensor:
        asked.append((k, tuple(shape)))
        return torch.from_numpy(z[k])

    before: list[int] = []
    after: list[torch.Tensor] = []
    result = run(
        table, Rows(evaluate, a.tolist(), b.tolist()), torch.from_numpy(x), noise,
        before=lambda k, state, raw: before.append(k), after=after.append,
    )  # fmt: skip
    D = [a[k] * seen[k] + b[k] * F[k] * np.cos(seen[k]) for k in range(K)]
    form = forms(table)
    for k in range(K + 1):
        parts = [x, *D, *z]
        expected = sum(c * part for c, part in zip(form[k], parts, strict=True))
        scale = 1e-12 * sum(np.abs(c * part).max() for c, part in zip(form[k], parts, strict=True))
        state = seen[k] if k < K else result.numpy()
        np.testing.assert_allclose(state, expected, atol=scale, rtol=0)
    assert before == list(range(K)) and len(after) == K and after[-1] is result
    assert asked == [(k, (3, 2)) for k in range(K) if table.noise[k] != 0]


@given(tables)
def test_a_row_adds_to_the_states_that_read_it_and_to_no_other(table: Tableau) -> None:
    K, H = table.mix.shape
    readers = [[j for j in range(1, min(H, K - k)) if table.mix[k + j, j] != 0] for k in range(K)]
    made = coefficients(table, Rows(lambda x, k: x, [0.0] * K, [1.0] * K), torch.float64)
    used = [[j for j, _, _ in row.ahead] for row in made.rows]
    moot = [table.skip[k] == 0 and table.out[k] == 0 for k in range(K)]
    assert made.reach == H - 1 and used == [[] if moot[k] else readers[k] for k in range(K)]


def test_a_network_may_write_every_output_into_one_tensor() -> None:
    table = solvers.unipc(3).tableau(VPSDE(), grids.log_snr(VPSDE(), 7))
    x, buffer, rows = (
        torch.randn(2, 3, dtype=torch.float64),
        torch.empty(2, 3, dtype=torch.float64),
        len(table),
    )

    def fresh(state: torch.Tensor, k: int) -> torch.Tensor:
        return (state + k).cos()

    def reused(state: torch.Tensor, k: int) -> torch.Tensor:
        return buffer.copy_(fresh(state, k))

    one, other = (run(table, Rows(f, [0.2] * rows, [0.9] * rows), x, None) for f in (fresh, reused))
    assert torch.equal(one, other)


def test_coefficients_of_float32_states_add_up_to_one_rounding() -> None:
    """Equal keeps of 0.9, whose float32 is off by 2.4e-8, are right on average; zeros stay zeros."""
    K, zeros = 999, torch.zeros(999, dtype=torch.float64)
    mix = (zeros + 0.1)[:, None]
    times = torch.linspace(1, 0.5, K + 1, dtype=torch.float64)
    table = Tableau(times, zeros, zeros + 1, zeros + 0.9, mix, zeros)
    rows = Rows(lambda x, k: x, [0.0] * K, [1.0 if k % 3 else 0.0 for k in range(K)])
    exact, rounded = (coefficients(table, rows, dtype).rows for dtype in (torch.float64, torch.float32))
    for key, ulp in (("keep", 2.0**-24), ("gain", 2.0**-27)):
        one, other = ([getattr(row, key) for row in made] for made in (exact, rounded))
        assert other == torch.tensor(other, dtype=torch.float32).tolist()
        assert all(v == 0 for v, w in zip(other, one, strict=True) if w == 0)
        sums = torch.tensor(one, dtype=torch.float64).cumsum(0) - torch.tensor(
            other, dtype=torch.float64
        ).cumsum(0)
        assert float(sums.abs().max()) <= 0.5 * ulp + 1e-12


@pytest.mark.parametrize("name", SDES)
def test_law_is_brute_force(name: str) -> None:
    """Full covariances in three dimensions, a prior that does not commute with the data: matrices, no
    eigenvectors.
    """
    sde, rng = SDES[name], np.random.default_rng(3)
    root, prior_root = rng.normal(size=(3, 3)), rng.normal(size=(3, 3)) * sde.prior_std
    S, P = root @ root.T, prior_root @ prior_root.T + 0.1 * np.eye(3)
    mean, prior_mean = rng.normal(size=3), rng.normal(size=3)
    grid = grids.karras(sde, 9)
    grid = (
        grid if grid.lam[0] > -math.inf else grids.Grid.of(sde, grid.t[1:])
    )  # noise is undefined without signal
    for solver in (
        solvers.dpmpp(3),
        solvers.exponential(2, corrector=3, tau=0.7),
        solvers.heun(),
        solvers.ddpm("large"),
    ):
        table = solver.tableau(sde, grid)
        K, H = len(table), table.mix.shape[1]
        alpha, sigma = (getattr(sde, f)(table.times).numpy() for f in ("alpha", "sigma"))
        # a state is (matrix on the initial state, constant, matrices on the noises)
        state = np.concatenate([np.eye(3), np.zeros((3, 1)), np.zeros((3, 3 * K))], 1)
        outputs: list[np.ndarray] = []
        for k in range(K):
            gain = alpha[k] * S @ np.linalg.inv(alpha[k] ** 2 * S + sigma[k] ** 2 * np.eye(3))
            D = gain @ state
            D[:, 3] += mean - alpha[k] * gain @ mean
            outputs.append(float(table.skip[k]) * state + float(table.out[k]) * D)
            state = float(table.keep[k]) * state
            for j in range(min(H, k + 1)):
                state = state + float(table.mix[k, j]) * outputs[k - j]
            state[:, 4 + 3 * k : 7 + 3 * k] += float(table.noise[k]) * np.eye(3)
        A, c, N = state[:, :3], state[:, 3], state[:, 4:]
        data = Gaussian(torch.from_numpy(mean), torch.from_numpy(S))
        found = table.law(data, sde)
        np.testing.assert_allclose(found.mean.numpy(), c, rtol=1e-9, atol=1e-10)
        expected = sde.prior_std**2 * A @ A.T + N @ N.T
        np.testing.assert_allclose(found.cov.numpy(), expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())
        prior = Gaussian(torch.from_numpy(prior_mean), torch.from_numpy(P))
        found = table.law(data, sde, prior=prior)
        np.testing.assert_allclose(found.mean.numpy(), A @ prior_mean + c, rtol=1e-9, atol=1e-9)
        expected = A @ P @ A.T + N @ N.T
        np.testing.assert_allclose(found.cov.numpy(), expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


def test_law_keeps_the_shape_of_the_event_and_takes_diagonals() -> None:
    sde, grid = VPSDE(), grids.quadratic(VPSDE(), 5)
    mean, variance = torch.randn(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    table = solvers.ddpm().tableau(sde, grid)
    found = table.law(Gaussian(mean, variance), sde)
    assert found.mean.shape == found.variance.shape == (2, 3)
    one = table.law(Gaussian(mean[1, 2], variance[1, 2]), sde)
    assert float(found.mean[1, 2]) == pytest.approx(one.mean.item(), rel=1e-13)
    assert float(found.variance[1, 2]) == pytest.approx(one.variance.item(), rel=1e-13)
    prior = Gaussian(torch.full((2, 3), 0.5, dtype=torch.float64), 2.0)
    shifted = table.law(Gaussian(mean, variance), sde, prior=prior)
    assert shifted.mean.shape == (2, 3)
    slope = (
        found.variance[1, 2] - table.law(Gaussian(mean, variance), sde, Gaussian(mean, 0.0)).variance[1, 2]
    ).sqrt()
    assert float(shifted.mean[1, 2] - found.mean[1, 2]) == pytest.approx(0.5 * slope.item(), rel=1e-9)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("sampler", "at_100", "at_1000"),
    [
        (solvers.euler_maruyama(rule="score_sde"), (0.70308, 0.25421), (0.70041, 0.25035)),
        (solvers.reverse_diffusion(rule="score_sde"), (0.70388, 0.25715), (0.69954, 0.25199)),
        (solvers.ddpm(rule="score_sde"), (0.70765, 0.25083), (0.69991, 0.25136)),
    ],
    ids=["euler_maruyama", "reverse_diffusion", "ancestral"],
)
def test_exact_output_law_of_the_historical_samplers(sampler, at_100, at_1000) -> None:
    sde, data = VPSDE(), Gaussian(0.7, 0.25)
    for n, expected in ((100, at_100), (1000, at_1000)):
        table = sampler.tableau(sde, torch.linspace(1, 1e-3, n, dtype=torch.float64))
        law = table.law(data, sde)
        assert len(table) == n
        assert (law.mean.item(), law.variance.item()) == pytest.approx(expected, abs=2e-5)


EXACT = {n: s for n, s in protocol.table_solvers().items() if "marginal_exact" in s.card.properties}
INEXACT = {n: s for n, s in protocol.table_solvers().items() if n not in EXACT}


@pytest.mark.parametrize("name", EXACT)
def test_marginal_exact_solvers_keep_the_point_mass(name: str) -> None:
    for sde in SDES.values():
        for make in (grids.karras, grids.quadratic):
            grid = make(sde, 10)
            if not bool(
                torch.isfinite(grid.lam[0])
            ):  # noise is undefined without signal: from a node with some
                grid = grids.Grid.of(sde, grid.t[1:])
            check_point_mass(EXACT[name].tableau(sde, grid), sde)


@pytest.mark.parametrize("name", INEXACT)
def test_other_solvers_do_not(name: str) -> None:
    """On ten steps uniform in t."""
    with pytest.raises(AssertionError, match="of a point mass is kept"):
        check_point_mass(INEXACT[name].tableau(VPSDE(), grids.uniform(VPSDE(), 10)), VPSDE(), tolerance=1e-4)


def test_the_ones_that_must_not_are_among_them() -> None:
    expected = [
        solvers.euler_maruyama(),
        solvers.reverse_diffusion(),
        solvers.ddpm("large"),
        solvers.seeds(1),
    ]
    assert {repr(solver) for solver in expected} <= set(INEXACT)


def test_defect_is_the_law_of_a_point_mass() -> None:
    """Column 0 row by row from the definition; column 1 against the law, mean by mean and variance by
    variance.
    """
    sde = VPSDE()
    early = replace(random_table(6, 3, 2), start=1.0, times=torch.linspace(0.7, 0.1, 7, dtype=torch.float64))
    for table in (random_table(7, 3, 1), solvers.euler_maruyama().tableau(sde, grids.uniform(sde, 7)), early):
        defect = table.defect(sde)
        assert defect.shape == (len(table), 2) and defect.dtype == torch.float64
        times = table.times.clone()
        times[0] = 1.0  # of the state, whatever the call is about
        alpha, sigma = sde.alpha(times).numpy(), sde.sigma(times).numpy()
        form = forms(table)
        K = len(table)
        for k in range(K):
            kept = float(table.keep[k]) * alpha[k]
            for j in range(min(k + 1, table.mix.shape[1])):
                kept += float(table.mix[k, j]) * (
                    float(table.skip[k - j]) * alpha[k - j] + float(table.out[k - j])
                )
            assert float(defect[k, 0]) == pytest.approx(kept - alpha[k + 1], rel=1e-10, abs=1e-13)
            variance = (form[k + 1, 0] * sigma[0]) ** 2 + (form[k + 1, 1 + K :] ** 2).sum()
            assert float(defect[k, 1]) == pytest.approx(variance - sigma[k + 1] ** 2, rel=1e-10, abs=1e-13)


INTEGRATED = [
    solvers.dpmpp(1),
    solvers.sde_dpmpp(1),
    solvers.heun(),
    solvers.midpoint(),
    solvers.dpm(3, singlestep=True),
]


@pytest.mark.parametrize("solver", INTEGRATED, ids=repr)
def test_split_runs_are_the_whole_run(solver) -> None:
    """Tables split at any node concatenate to the whole table, and runs with the noise's row offset to the
    run.

    To rounding, because integrals are matrix products, whose rounding depends on the number of steps; where
    coefficients are closed formulas, property 35 has it bit for bit.
    """

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-13, atol=1e-13)

    sde = VPSDE()
    grid = grids.quadratic(sde, 7, 0.0)
    model, noise = (
        Gaussian(torch.tensor([0.3, -0.1, 1.0]), 0.5).denoiser(sde),
        Noise.of(5, batch=4, dtype=torch.float64),
    )
    x = noise.prior((4, 3))
    whole_table, whole = solver.tableau(sde, grid), solver.solve(model, x, grid, noise=noise)
    for cut in (1, 3, 6):
        first, second = (solver.tableau(sde, t) for t in (grid.t[: cut + 1], grid.t[cut:]))
        joined = first + second
        assert len(joined) == len(first) + len(second) == len(whole_table)
        for key in FIELDS:
            assert same(getattr(joined, key), getattr(whole_table, key)), key
        half = solver.solve(model, x, grid.t[: cut + 1], noise=noise)
        rest = solver.solve(model, half.x, grid.t[cut:], noise=noise.shift(len(first)))
        assert same(rest.x, whole.x)


def test_tables_concatenate() -> None:
    sde = VPSDE()
    a = solvers.dpmpp(3).tableau(sde, torch.tensor([1.0, 0.8, 0.6, 0.4], dtype=torch.float64))
    b = solvers.ddpm().tableau(sde, torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64))
    c = solvers.dpmpp(2).tableau(sde, torch.tensor([0.1, 0.05, 0.0], dtype=torch.float64))
    both = a + b + c
    assert len(both) == 7 and both.mix.shape == (7, 3)
    assert both.times.tolist() == [1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.0]
    assert (
        both.name == "dpmpp + ddpm + dpmpp"
        and join([a, b, c]).name == "dpmpp + ddpm"
        and join([a]).name == "dpmpp"
        and (b + b_after(sde)).name == "ddpm"
    )
    model, x = Gaussian(torch.tensor([0.3, -0.1]), 0.5).denoiser(sde), torch.randn(5, 2, dtype=torch.float64)
    noise = Noise.of(1, batch=5, dtype=torch.float64)
    whole = solvers.from_tableau(both).solve(model, x, both.times, noise=noise)
    rows = 0
    for table in (a, b, c):
        x = solvers.from_tableau(table).solve(model, x, table.times, noise=noise.shift(rows)).x
        rows += len(table)
    assert torch.equal(whole.x, x) and whole.network_calls == 7
    with pytest.raises(ValueError, match=r"start where the one before ends, found 0\.4 and 1\.0"):
        a + a


def b_after(sde: LinearSDE) -> Tableau:
    return solvers.ddpm().tableau(sde, torch.tensor([0.1, 0.05], dtype=torch.float64))


@given(tables)
def test_json_round_trip_is_exact(table: Tableau) -> None:
    back = Tableau.from_json(table.to_json())
    assert back.name == table.name
    for key in FIELDS:
        assert (
            torch.equal(getattr(back, key), getattr(table, key)) and getattr(back, key).dtype == torch.float64
        )


def changed(text: str, **values) -> str:
    data = {**json.loads(text), **values}
    return json.dumps({key: value for key, value in data.items() if value is not ...})


def test_json_that_is_no_table() -> None:
    text = random_table(3, 2, 0).to_json()
    assert json.loads(text)["format"] == "scoresde.tableau/1"
    assert Tableau.from_json(changed(text, name=...)).name == "tableau"
    bad = ["{", "[]", "3", '"x"', changed(text, format="scoresde.tableau/2"), changed(text, keep=...)]
    bad += [changed(text, keep=[1.0]), changed(text, noise=[math.nan] * 3), changed(text, mix=[["a"]])]
    bad += [changed(text, times=wrong) for wrong in ("abc", None, {}, [0.0, None], ["a"], [10**400])]
    for content in bad:
        with pytest.raises(ValueError):
            Tableau.from_json(content)


GOOD = {key: getattr(random_table(3, 2, 0), key) for key in FIELDS}


@pytest.mark.parametrize("key", FIELDS)
def test_construction_errors(key: str) -> None:
    assert len(Tableau(**GOOD)) == 3 and Tableau(**GOOD).name == "tableau"
    value = GOOD[key]
    with pytest.raises(ValueError, match="expected shapes"):
        Tableau(**{**GOOD, key: value[:-1]})
    with pytest.raises(ValueError, match="expected shapes"):
        Tableau(**{**GOOD, key: value[..., None]})
    with pytest.raises(ValueError, match="expected shapes"):
        Tableau(**{**GOOD, key: torch.tensor(1.0)})
    for wrong in (math.nan, math.inf):
        broken = value.clone()
        broken.view(-1)[0] = wrong
        with pytest.raises(ValueError, match=f"finite coefficients in tableau, found {key}"):
            Tableau(**{**GOOD, key: broken})


def test_tables_read_only_their_own_outputs_and_are_not_empty() -> None:
    mix = GOOD["mix"].clone()
    mix[0, 1] = 1e-9
    with pytest.raises(ValueError, match="outputs before its first row"):
        Tableau(**{**GOOD, "mix": mix})
    empty = {key: torch.zeros(0) for key in FIELDS}
    with pytest.raises(ValueError, match="expected shapes"):
        Tableau(**{**empty, "times": torch.ones(1), "mix": torch.zeros(0, 1)})
    with pytest.raises(ValueError, match="expected shapes"):
        Tableau(**{**GOOD, "mix": torch.zeros(3, 0)})


def test_a_first_call_about_another_time_than_that_of_the_start(unchecked) -> None:
    """The model is asked about times[0]; ends, JSON, text and `+` know of the start."""
    sde, law = VPSDE(), Gaussian(torch.tensor([0.3, -0.1]), 0.5)
    own = solvers.dpmpp(2).tableau(sde, torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64))
    times = torch.tensor([0.8, 0.6, 0.3], dtype=torch.float64)
    table = replace(own, times=times, start=1.0)
    assert table.nodes.tolist() == [1.0, 0.6, 0.3] and table.ends.tolist() == [1.0, 0.3]
    assert own.start is None and own.nodes is own.times and own.ends.tolist() == [1.0, 0.3]
    asked, model, x = [], law.denoiser(sde), torch.randn(4, 2, dtype=torch.float64)
    solver = solvers.from_tableau(table)
    end = solver.solve(model, x, table.ends, callback=lambda step: asked.append(step.t)).x
    assert asked == [0.8, 0.6]
    outputs = [model(x, times[0])]
    state = table.keep[0] * x + table.mix[0, 0] * outputs[0]
    outputs.append(model(state, times[1]))
    state = table.keep[1] * state + table.mix[1, 0] * outputs[1] + table.mix[1, 1] * outputs[0]
    assert torch.allclose(end, state, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"runs from t = 1\.0 to 0\.3"):
        solver.solve(model, x, times)

    check_point_mass(table, sde)
    early = replace(table, times=torch.tensor([0.5, 0.6, 0.3], dtype=torch.float64))
    check_times(early, sde)  # of the states
    with pytest.raises(AssertionError, match="times that move on"):
        check_times(replace(early, start=None), sde)

    back = Tableau.from_json(table.to_json())
    assert back.start == 1.0 and torch.equal(back.times, times)
    assert "start" not in json.loads(own.to_json()) and Tableau.from_json(own.to_json()).start is None
    assert repr(table).splitlines()[0] == "dpmpp: 2 calls, history 2, from t = 1"

    after = solvers.ddim().tableau(sde, torch.tensor([0.3, 0.1], dtype=torch.float64))
    both = table + after
    assert both.start == 1.0 and both.times.tolist() == [0.8, 0.6, 0.3, 0.1]
    before = solvers.ddim().tableau(sde, torch.tensor([1.0, 0.9], dtype=torch.float64))
    with pytest.raises(ValueError, match="only the first table to ask about another time"):
        before + replace(after, times=torch.tensor([0.3, 0.1]), start=0.9)
    with pytest.raises(ValueError, match=r"found 0\.9 and 1\.0"):
        before + table
    for wrong in (math.nan, math.inf, "1", 1):
        with pytest.raises(ValueError, match="expected None or a finite time as start"):
            replace(own, start=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected None or a finite time as start"):
        Tableau.from_json(changed(own.to_json(), start="1"))


def test_fields_are_float64_on_the_host_without_gradient() -> None:
    table = Tableau(**{key: value.float().requires_grad_() for key, value in GOOD.items()})
    for key in FIELDS:
        value = getattr(table, key)
        assert value.dtype == torch.float64 and value.device.type == "cpu" and not value.requires_grad
    with pytest.raises(AttributeError):
        table.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_repr() -> None:
    table = solvers.dpmpp(2).tableau(VPSDE(), grids.uniform(VPSDE(), 3, 0.0))
    lines = repr(table).splitlines()
    assert lines[0] == "dpmpp: 3 calls, history 2" and len(lines) == 5
    assert lines[1].split() == ["k", "t", "->", "t", "skip", "out", "keep", "noise", "mix"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2"]
    assert [float(w) for w in lines[3].split()[1:] if w != "->"] == pytest.approx(
        [*table.times[1:3].tolist(), 0, 1, float(table.keep[1]), 0, *table.mix[1].tolist()], rel=1e-4
    )
    long = repr(solvers.ddim().tableau(VPSDE(), grids.uniform(VPSDE(), 40))).splitlines()
    assert [line.split()[0] for line in long[2:]] == [str(k) for k in [*range(5), *range(35, 40)]]
    assert len(repr(solvers.ddim().tableau(VPSDE(), grids.uniform(VPSDE(), 12))).splitlines()) == 14


def test_a_stochastic_table_asks_for_noise() -> None:
    sde, grid = VPSDE(), grids.uniform(VPSDE(), 3)
    model, x = Gaussian(torch.zeros(2), 1.0).denoiser(sde), torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="ddpm is stochastic: expected a noise source"):
        solvers.ddpm().solve(model, x, grid)
    solvers.ddim().solve(model, x, grid)


def test_from_tableau_is_for_its_own_times() -> None:
    sde = VPSDE()
    table = solvers.ddpm().tableau(sde, grids.uniform(sde, 4))
    solver = solvers.from_tableau(table)
    assert solver.card.stochastic and solver.tableau(sde, table.times) is table
    assert solver.calls(1) == len(table)
    assert solver.steps_for(4) == 4
    for times in ([1.0, 0.5], [0.9, 1e-3], [0.9, 0.5]):
        with pytest.raises(ValueError, match=r"runs from t = 1\.0 to 0\.001"):
            solver.tableau(sde, torch.tensor(times, dtype=torch.float64))


def test_outputs_that_are_not_finite_are_named() -> None:
    """Where a sum overflows although every number is finite, nothing is wrong."""
    table, x = solvers.ddim().tableau(VPSDE(), grids.uniform(VPSDE(), 5)), torch.zeros(3, 2)
    check_finite(table, 2, x, torch.ones(3, 2))
    check_finite(table, 2, x, torch.full((3, 2), 3e38))
    for wrong in (math.nan, math.inf):
        F = torch.ones(3, 2)
        F[1, 0] = wrong
        with pytest.raises(FloatingPointError, match=r"call 3 of 5, t = 0\.6.*samples 1;"):
            check_finite(table, 2, x, F)


def test_which_samples_are_not_finite() -> None:
    """The first eight of them."""
    table = solvers.ddim().tableau(VPSDE(), grids.uniform(VPSDE(), 5))
    for count, shown in ((1, "0;"), (8, "0, 1, 2, 3, 4, 5, 6, 7;"), (9, "0, 1, 2, 3, 4, 5, 6, 7 ...;")):
        F = torch.ones(10, 2, 2)
        F[:count, 1, 1] = math.nan
        with pytest.raises(FloatingPointError, match=f"at call 1 of 5, t = 1; found in samples {shown}"):
            check_finite(table, 0, F, F)
    assert "at call 5 of 5, t = 0.2008; check the model" in str(not_finite(table, 4))


@pytest.mark.usefixtures("unchecked")
def test_tables_are_compared_by_what_they_are_not_by_equality() -> None:
    table, twin = Tableau(**GOOD), Tableau(**GOOD)
    assert table == table and table != twin and len({table, twin}) == 2
    with pytest.raises(TypeError):
        table + 3  # pyright: ignore[reportOperatorIssue]
    for wrong in ("x", None, [[1.0], [2.0, 3.0]]):
        with pytest.raises(TypeError, match="expected a tensor of numbers as keep, found"):
            Tableau(**{**GOOD, "keep": wrong})
    with pytest.raises(ValueError, match="expected shapes"):
        Tableau(**{**GOOD, "mix": GOOD["mix"][:, 0]})
    with pytest.raises(TypeError, match="whose output law is Gaussian too, found 3"):
        table.law(3, VPSDE())  # pyright: ignore[reportArgumentType]


def test_repr_of_long_tables_leaves_out_the_middle() -> None:
    for rows, shown in ((12, range(12)), (13, [*range(5), *range(8, 13)]), (20, [*range(5), *range(15, 20)])):
        lines = repr(random_table(rows, 2, 0)).splitlines()
        assert lines[0] == f"random: {rows} calls, history 2"
        assert [line.split()[0] for line in lines[2:]] == [str(k) for k in shown]


def test_tables_join_where_times_agree_to_rounding() -> None:
    first = Tableau(**GOOD)
    for gap, fits in ((0.7e-12, True), (1.5e-12, False), (-0.7e-12, True), (-1.5e-12, False)):
        second = Tableau(
            **{**GOOD, "times": GOOD["times"] - GOOD["times"][0] + GOOD["times"][-1] * (1 + gap)}
        )
        if fits:
            assert len(first + second) == 6 and (first + second).times[3] == second.times[0]
        else:
            with pytest.raises(ValueError, match="to start where the one before ends"):
                first + second


def test_what_a_float32_coefficient_hands_on() -> None:
    """Its rounding, if that is at most 2^-23 of the next one; that to the bit; numbers that float32 has
    neither take nor end it."""
    cases = [
        # what the first loses, the second, what the second becomes
        (0.9 * 2**-24, 0.46 + 2**-40, 0.46 + 2**-40 + 0.9 * 2**-24),
        (0.9 * 2**-24, 0.44 + 2**-40, 0.44 + 2**-40),
        (2**-25 + 2**-52, 2**-2 + 2**-29, 2**-2 + 2**-25),  # equal
        (0.9 * 2**-24, 0.5, 0.5),
    ]
    zero = torch.zeros(2, dtype=torch.float64)
    for lost, value, expected in cases:
        keep = torch.tensor([1 + lost, value], dtype=torch.float64)
        for sign in (1, -1):
            table = Tableau(torch.tensor([1.0, 0.5, 0.1]), zero, zero, sign * keep, zero[:, None], zero)
            rows = Rows(lambda x, k: x, [0.0] * 2, [1.0] * 2)
            found = [row.keep for row in coefficients(table, rows, torch.float32).rows]
            assert found == [sign * 1.0, sign * float(np.float32(expected))]
            for dtype in (torch.float64, torch.bfloat16, torch.float16):
                exact = [row.keep for row in coefficients(table, rows, dtype).rows]
                assert exact == (sign * keep).tolist()


def test_single_coefficients_are_the_nearest_of_float32() -> None:
    rng, zero = np.random.default_rng(0), torch.zeros(1, dtype=torch.float64)
    for value in (*rng.normal(size=200), *np.exp(rng.uniform(-60, 60, 100)), 0.0, 1.0, 0.1):
        table = Tableau(torch.tensor([1.0, 0.5]), zero, zero, zero + value, zero[:, None], zero)
        row = coefficients(table, Rows(lambda x, k: x, [0.0], [1.0]), torch.float32).rows[0]
        assert row.keep == float(np.float32(value))


def test_the_executor_refuses_integers_and_takes_a_changed_state() -> None:
    table, rows = Tableau(**GOOD), Rows(lambda x, k: x.cos(), [0.0] * 3, [1.0] * 3)
    with pytest.raises(TypeError, match=r"floating state, found torch.int64; scale"):
        run(table, rows, torch.ones(2, dtype=torch.int64), lambda k, shape: torch.zeros(shape))
    x, seen = torch.ones(2, dtype=torch.float64), []

    def halved(state: torch.Tensor) -> torch.Tensor | None:
        seen.append(state / 2)
        return seen[-1] if len(seen) < 3 else None

    found = run(
        table, rows, x, lambda k, shape: torch.ones(shape, dtype=torch.float64),
        before=lambda k, state, F: None if k == 0 else np.testing.assert_array_equal(state, seen[k - 1]),
        after=halved,
    )  # fmt: skip
    assert torch.equal(found, seen[2] * 2)

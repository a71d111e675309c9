"""The chain: exact against the SDE, posterior by linear algebra, Euler's gap, and Algorithms 1 and 2."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_schedules import EPS, EXAMPLES, f64, name
from test_sde import GaussianModel, close

from scoresde import laws
from scoresde.ddpm import DDPM, discretize
from scoresde.schedules import Learned, Linear, Schedule, Tabulated
from scoresde.sde import EDM, VPSDE, SubVPSDE
from scoresde.testing.strategies import beta_tables, linears, schedules


def nodes(n: int) -> torch.Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) / n


def betas_of(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def chains() -> st.SearchStrategy[DDPM]:
    return beta_tables().map(lambda values: DDPM(betas_of(values)))


def any_chains() -> st.SearchStrategy[DDPM]:
    """Tables of any kind, and exact discretizations of any schedule."""
    of_sdes = st.builds(lambda S, n: discretize(VPSDE(schedule=S), n), schedules(), st.integers(1, 100))
    return st.one_of(chains(), of_sdes)


# The exact table


@pytest.mark.parametrize("schedule", EXAMPLES, ids=name)
@pytest.mark.parametrize("n", [1, 2, 1000, 10000])
def test_exact_table_at_fixed_sizes(schedule: Schedule, n: int) -> None:
    chain, sde = discretize(VPSDE(schedule=schedule), n), VPSDE(schedule=schedule)
    B = sde.B(nodes(n))
    assert ((chain.log_alpha_bars + B).abs() <= 1e-12 * B.clamp(min=1)).all()
    close(chain.alpha_bars, sde.alpha(nodes(n)) ** 2, rtol=1e-11)
    close(chain.snr.log(), sde.log_snr(nodes(n)), rtol=1e-11, atol=1e-11)


def test_betas_are_the_differences_of_B() -> None:
    B = 0.1 * nodes(50) + 9.95 * nodes(50) ** 2
    known = 1 - (-torch.diff(B, prepend=torch.zeros(1))).exp()
    close(VPSDE(0.1, 20.0).betas(50), known, rtol=1e-12)
    close(VPSDE(0.1, 20.0).betas(50, "euler"), (0.1 + 19.9 * nodes(50)) / 50)


@given(beta_tables(longest=60))
def test_table_survives_the_sde(values: list[float]) -> None:  # ORACLES, Schedules
    betas = betas_of(values)
    sde = VPSDE.from_betas(betas)
    back = sde.betas(len(betas))
    B_N = float(sde.B(1.0))
    assert ((back / betas - 1).abs() <= 4e-15 * max(1, B_N) / betas).all()
    assert (sde.B(nodes(len(betas))) - torch.log1p(-betas).neg().cumsum(0)).abs().max() == 0
    again = VPSDE.from_betas(back)
    B = sde.B(nodes(len(betas)))
    assert ((again.B(nodes(len(betas))) - B).abs() <= 1e-12 * B.clamp(min=1)).all()
    close(DDPM(betas).sde().B(nodes(len(betas))), B, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1000, 4000])
def test_long_extreme_tables_survive(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    u = torch.rand(size, generator=generator, dtype=torch.float64)
    betas = torch.where(u < 0.5, 1e-8 * (0.999e8) ** (2 * u), 1 - 1e-3 ** (2 * u - 1)).clamp(1.0001e-8, 0.999)
    sde = VPSDE.from_betas(betas)
    back, B_N = sde.betas(size), float(sde.B(1.0))
    assert ((back / betas - 1).abs() <= 4e-15 * max(1, B_N) / betas).all()


@given(schedules(), st.integers(1, 300))
def test_sde_table_sde_agrees_at_the_nodes(schedule: Schedule, n: int) -> None:
    sde = VPSDE(schedule=schedule)
    table = VPSDE.from_betas(sde.betas(n)) if sde.betas(n).max() < 1 else discretize(sde, n).sde()
    assert isinstance(table.schedule, Tabulated) and table.schedule.steps == n
    B = sde.B(nodes(n))
    # A table of betas near 1 holds log(1 - beta) to EPS/(1 - beta) only.
    lost = (EPS / (1 - sde.betas(n)).clamp(min=EPS)).cumsum(0) if sde.betas(n).max() < 1 else 0
    assert ((table.B(nodes(n)) - B).abs() <= 1e-12 * B.clamp(min=1) + lost).all()


# Euler's table


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("n", "gap_alpha", "gap_lam", "historical_alpha", "historical_lam"),
    [
        (100, 0.428712, 0.428724, 0.375231, 0.37524),
        (1000, 0.0388656, 0.0433486, 0.033857, 0.047405),
        (10000, 0.00385144, 0.00490445, 0.0033536, 0.0049479),
    ],
)
def test_euler_gaps(n, gap_alpha, gap_lam, historical_alpha, historical_lam) -> None:  # ORACLES, Schedules
    sde = VPSDE(0.1, 20.0)
    tables = {
        (gap_alpha, gap_lam): discretize(sde, n, "euler"),
        (historical_alpha, historical_lam): DDPM(torch.linspace(0.1 / n, 20 / n, n, dtype=torch.float64)),
    }
    for known, chain in tables.items():
        d_alpha = (0.5 * chain.log_alpha_bars + 0.5 * sde.B(nodes(n))).abs().max()
        d_lam = (0.5 * chain.snr.log() - 0.5 * sde.log_snr(nodes(n))).abs().max()
        for found, stated in zip((d_alpha, d_lam), known, strict=True):
            assert abs(float(found) - stated) < 0.6 * 10.0 ** (math.floor(math.log10(stated)) - 4)


@pytest.mark.parametrize("n", [1, 10, 19, 20])
def test_euler_refuses_betas_of_one_and_more(n: int) -> None:  # FAULTS A8
    with pytest.raises(ValueError, match=r"expected beta\(t\)/n < 1 .* found .* take more steps"):
        VPSDE(0.1, 20.0).betas(n, "euler")
    assert VPSDE(0.1, 20.0).betas(21, "euler").max() < 1
    assert VPSDE(0.1, 20.0).betas(n).max() < 1


@given(st.integers(1, 2000))
def test_prior_does_not_depend_on_the_number_of_steps(n: int) -> None:  # FAULTS A9
    """alpha_bar_N is the SDE's for every N (0.90 at N = 10 with a table that does not know N)."""
    assert abs(float(discretize(VPSDE(0.1, 20.0), n).alpha_bars[-1]) / 4.3185749e-5 - 1) < 2e-8


# Euler-Maruyama of the forward SDE against the chain's own forward step, beta = beta(t_i)/N in both:
# x + drift/N = (1 - beta/2) x + sqrt(beta) eps against sqrt(1 - beta) x + sqrt(beta) eps.


def forward_errors(n: int) -> tuple[float, float, float]:
    """(weak mean, weak variance, strong) distance of the two forward chains at t = 1, by exact recursions.

    From x_0 with mean 1 and variance 0.25, same noise in both, rates of VPSDE(0.1, 4).
    """
    sde = VPSDE(0.1, 4.0)
    betas = sde.betas(n, "euler")
    one = torch.ones(1, dtype=torch.float64)
    m_em, m_ddpm, second = 1.0, 1.0, {"em": 1.25, "ddpm": 1.25, "cross": 1.25}
    for t, beta, alpha in zip(nodes(n), betas.tolist(), DDPM(betas).alphas.tolist(), strict=True):
        em = 1 + float(sde.drift(one, t)) / n
        ddpm = math.sqrt(alpha)
        m_em, m_ddpm = em * m_em, ddpm * m_ddpm
        second["em"] = em * em * second["em"] + beta
        second["ddpm"] = ddpm * ddpm * second["ddpm"] + beta
        second["cross"] = em * ddpm * second["cross"] + beta
    variances = second["em"] - m_em**2, second["ddpm"] - m_ddpm**2
    strong = math.sqrt(second["em"] - 2 * second["cross"] + second["ddpm"])
    return abs(m_em - m_ddpm), abs(variances[0] - variances[1]), strong


def test_forward_euler_maruyama_meets_the_chain() -> None:  # issue: weak and strong order 1
    errors = [forward_errors(n) for n in (80, 160, 320, 640)]
    for coarse, fine in itertools.pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            assert abs(math.log2(a / b) - 1) < 0.05
    assert max(errors[-1]) < 0.01


def test_forward_chain_meets_the_sde_weakly() -> None:
    """Both forward chains against the SDE's own marginal: order 1 in the mean."""
    sde = VPSDE(0.1, 4.0)
    for make in (lambda b: (1 - b / 2).prod(), lambda b: (1 - b).sqrt().prod()):
        gaps = [abs(float(make(sde.betas(n, "euler")) - sde.alpha(1.0))) for n in (80, 160, 320, 640)]
        assert all(abs(math.log2(a / b) - 1) < 0.1 for a, b in itertools.pairwise(gaps))


# Posterior


@pytest.mark.oracle
@given(any_chains(), st.data())
def test_posterior_is_the_conditional_of_the_joint_gaussian(chain: DDPM, data) -> None:
    """The 3 x 3 covariance of (x_0, x_{i-1}, x_i) with data N(0, 1), conditioned on (x_0, x_i) in 60 digits.

    The reference gets the chain's own float64 log alphas.
    """
    i = data.draw(st.integers(1, len(chain)))
    one, zero = f64(1.0), f64(0.0)
    (on_data, variance), (on_state, _) = chain.posterior(zero, one, i), chain.posterior(one, zero, i)
    with mp.workdps(60):
        before = mp.mpf(float(chain.log_alpha_bars[i - 2])) if i > 1 else mp.mpf(0)
        step = mp.mpf(float(chain.log_alphas[i - 1]))
        a, b = mp.exp(before / 2), mp.exp(step / 2)  # x_{i-1} = a x_0 + .., x_i = b x_{i-1} + ..
        covariance = mp.matrix([[1, a, a * b], [a, 1, b], [a * b, b, 1]])
        known = mp.matrix([[1, a * b], [a * b, 1]])
        shared = mp.matrix([[covariance[1, 0], covariance[1, 2]]])
        gains = shared * known**-1
        exact = covariance[1, 1] - (gains * shared.T)[0]
    # log alpha_bar_i is rounded once more than its two parts.
    slack = 1e-12 + 4 * EPS * abs(float(before + step)) / min(1.0, abs(float(before + step)))
    assert abs(float(on_data) - float(gains[0])) < slack
    assert abs(float(on_state) - float(gains[1])) < slack
    assert abs(float(variance) - float(exact)) < slack


@given(schedules(), st.integers(2, 1000), st.data())
def test_posterior_is_the_sdes_bridge(schedule: Schedule, n: int, data) -> None:
    i = data.draw(st.integers(2, n))
    sde = VPSDE(schedule=schedule)
    x_t, x_0 = f64(-1.3, 2.0), f64(0.4, 0.9)
    mean, variance = discretize(sde, n).posterior(x_t, x_0, i)
    bridge, std = sde.bridge(x_0, x_t, (i - 1) / n, i / n)
    rounding = 1e-12 * (1 + float(sde.B(1.0)) / float(sde.B(i / n) - sde.B((i - 1) / n)) * 1e-2)
    close(mean, bridge, rtol=rounding, atol=rounding)
    close(variance, std**2, rtol=rounding, atol=rounding)


def test_first_posterior_is_the_data() -> None:
    chain = DDPM([0.1, 0.2])
    mean, variance = chain.posterior(f64(5.0), f64(0.3), 1)
    assert mean == 0.3 and variance == 0


@given(chains(), st.data())
def test_means_from_every_prediction_agree(chain: DDPM, data) -> None:
    i = data.draw(st.integers(1, len(chain)))
    bar = chain.alpha_bars[i - 1]
    if bar < 1e-6:
        return
    x_0, eps = f64(0.4, -1.0), f64(1.2, 0.3)
    x = bar.sqrt() * x_0 + (1 - bar).sqrt() * eps
    noise = -torch.expm1(chain.log_alpha_bars[i - 1])
    x = bar.sqrt() * x_0 + noise.sqrt() * eps
    known = chain.posterior(x, x_0, i)[0]
    rounding = 1e-13 / float(bar.sqrt())
    close(chain.mean_from_data(x, x_0, i), known)
    close(chain.mean_from_noise(x, eps, i), known, rtol=rounding, atol=rounding)
    close(chain.mean_from_score(x, -eps / noise.sqrt(), i), known, rtol=rounding, atol=rounding)


def test_small_table_by_hand() -> None:
    """betas 0.1, 0.2: alpha_bar 0.9, 0.72; the numbers of eqs. 4, 7 and 11 written out."""
    chain = DDPM([0.1, 0.2])
    close(chain.betas, f64(0.1, 0.2))
    close(chain.alphas, f64(0.9, 0.8))
    close(chain.alpha_bars, f64(0.9, 0.72))
    close(chain.log_alpha_bars, f64(0.9, 0.72).log(), rtol=1e-13)
    close(chain.posterior_variances, f64(0.0, 0.1 / 0.28 * 0.2))
    close(chain.snr, f64(9.0, 0.72 / 0.28))
    close(chain.elbo_weights, f64(math.inf, 0.5 * (9.0 - 0.72 / 0.28)))
    close(chain.times, f64(0.5, 1.0))
    mean, variance = chain.posterior(f64(2.0), f64(3.0), 2)
    close(mean, f64(0.9**0.5 * 0.2 / 0.28 * 3 + 0.8**0.5 * 0.1 / 0.28 * 2))
    close(variance, f64(0.02 / 0.28)[0])
    close(chain.mean_from_noise(f64(2.0), f64(3.0), 2), f64((2 - 0.2 / 0.28**0.5 * 3) / 0.8**0.5))
    close(chain.mean_from_score(f64(2.0), f64(3.0), 2), f64((2 + 0.2 * 3) / 0.8**0.5))
    mean, variance = chain.marginal(f64(3.0), 2)
    close(mean, f64(0.72**0.5 * 3))
    close(variance, f64(0.28)[0])
    for j, kept in ((0, 0.72), (1, 0.8)):
        mean, variance = chain.transition(f64(3.0), j, 2)
        close(mean, f64(kept**0.5 * 3))
        close(variance, f64(1 - kept)[0])
    assert repr(chain) == "DDPM(<2 betas from 0.1 to 0.2>)" and len(chain) == 2


@given(chains(), st.data())
def test_transitions_compose(chain: DDPM, data) -> None:
    j, i = sorted(data.draw(st.lists(st.integers(0, len(chain)), min_size=2, max_size=2, unique=True)))
    mean, variance = chain.transition(f64(1.0), j, i)
    start, noise = (f64(1.0), f64(0.0)[0]) if j == 0 else chain.marginal(f64(1.0), j)
    end, total = chain.marginal(f64(1.0), i)
    close(mean * start, end, rtol=1e-12, atol=1e-300)
    close(mean[0] ** 2 * noise + variance, total, rtol=1e-12)


def test_elbo_weights_are_the_kl_of_the_posteriors() -> None:
    """KL between posteriors of equal variance whose x_0 differ by d is w_i d^2."""
    chain = discretize(VPSDE(0.1, 20.0), 40)
    x = torch.zeros(1, dtype=torch.float64)
    for i in range(2, 41):
        shift = chain.posterior(x, x + 1, i)[0] - chain.posterior(x, x, i)[0]
        close(shift**2 / (2 * chain.posterior_variances[i - 1]), chain.elbo_weights[i - 1 : i], rtol=1e-11)
    assert chain.elbo_weights[0] == math.inf
    total = chain.elbo_weights[1:].sum()
    close(total, 0.5 * (chain.snr[0] - chain.snr[-1]), rtol=1e-12)


@pytest.mark.parametrize("beta", [1e-6, 1e-12, 1e-18])
def test_elbo_weights_of_short_steps_keep_their_digits(beta: float) -> None:
    """(SNR_1 - SNR_2)/2 in high precision; beta far below 1 changes the SNR by less than its rounding."""
    with mp.workdps(50):
        bars = mp.mpf(0.5), mp.mpf(0.5) * (1 - mp.mpf(beta))
        before, after = (bar / (1 - bar) for bar in bars)
        known = float((before - after) / 2)
    assert float(DDPM(betas_of([0.5, beta])).elbo_weights[1]) == pytest.approx(known, rel=1e-14, abs=0)


# Respacing


@pytest.mark.parametrize("indices", [[], [0, 1], [2, 2], [3, 1], [1, 5], [-1]])
def test_wrong_indices_to_respace(indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected strictly increasing indices in 1\.\.4, found"):
        DDPM([0.1] * 4).respace(indices)


def test_respacing_takes_integers_only(unchecked: None) -> None:
    with pytest.raises(TypeError):
        DDPM([0.1] * 4).respace([1.0, 2.0])  # pyright: ignore[reportArgumentType]


# Indices, shapes, dtypes


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.uint8])
def test_indices_of_any_integer_dtype(integer: torch.dtype, device: torch.device, dtype: torch.dtype) -> None:
    """FAULTS E5b: bytes are indices, not a mask."""
    chain = discretize(VPSDE(), 200)
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    i = torch.tensor([1, 7, 200], dtype=integer, device=device)
    for method in (
        lambda k: chain.marginal(x, k),
        lambda k: chain.posterior(x, -x, k),
        lambda k: (chain.mean_from_noise(x, x, k), chain.mean_from_score(x, x, k)),
        lambda k: chain.transition(x, 0, k),
    ):
        for together, *each in zip(method(i), *(method(int(k)) for k in i), strict=True):
            assert together.dtype == dtype and together.device.type == device.type and together.shape[0] == 3
            for row, single in enumerate(each):
                alone = single[row] if single.ndim else single.expand(together[row].shape)
                torch.testing.assert_close(together[row], alone)
    mean, variance = chain.transition(x, torch.tensor([0, 3, 150]), i.cpu().to(torch.int64))
    torch.testing.assert_close(mean[1], chain.transition(x, 3, 7)[0][1])
    assert variance.shape == (3, 1, 1)
    assert chain.marginal(x[:0], i[:0])[0].shape == (0, 2, 2)


@pytest.mark.parametrize("i", [0, -1, -5, 201, torch.tensor([1, 0]), torch.tensor([3, 201])])
def test_indices_outside_the_chain(i) -> None:  # FAULTS E5
    chain, x = discretize(VPSDE(), 200), torch.zeros(2, 2)
    for method in (
        lambda: chain.marginal(x, i),
        lambda: chain.posterior(x, x, i),
        lambda: chain.transition(x, 0, i),
        lambda: chain.mean_from_noise(x, x, i),
    ):
        with pytest.raises(ValueError, match=r"expected chain indices 1\.\.200, found"):
            method()
    with pytest.raises(ValueError, match=r"expected chain indices 0\.\.200, found -1"):
        chain.transition(x, -1, 2)


@pytest.mark.parametrize("i", [torch.tensor([1.0, 2.0]), torch.tensor([True, False])])
def test_indices_of_other_dtypes(i) -> None:
    with pytest.raises(TypeError, match=r"expected integer indices 1\.\.200, found dtype"):
        discretize(VPSDE(), 200).marginal(torch.zeros(2, 2), i)


def test_transitions_go_forward() -> None:
    for j, i in ((2, 2), (3, 2), (torch.tensor([1, 5]), 5)):
        with pytest.raises(ValueError, match=r"found j = (2\.\.2|3\.\.3|1\.\.5), i = (2\.\.2|5\.\.5)$"):
            discretize(VPSDE(), 9).transition(torch.zeros(2, 1), j, i)


@pytest.mark.parametrize("n", [0, -1, True])
def test_wrong_numbers_of_steps(n) -> None:  # FAULTS E10
    with pytest.raises(ValueError, match="expected a number of steps n >= 1, found"):
        VPSDE().betas(n)


def test_wrong_words_and_tables(unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"expected a number of steps n >= 1, found 2\.5"):
        VPSDE().betas(2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected rule 'exact' or 'euler', found 'ho'"):
        VPSDE().betas(10, "ho")
    for wrong in ([], [0.0], [0.5, 1.0], [-0.1], [math.nan], torch.full((2, 2), 0.1)):
        with pytest.raises(ValueError, match=r"expected a .* table of betas .* found shape"):
            DDPM(wrong)
    for wrong in (f64(), f64(-0.1, 0.0), f64(-math.inf), f64(math.nan), f64(-0.1)[None], [0.1], -0.1):
        with pytest.raises(ValueError, match=r"expected .* finite negative log alphas, found shape"):
            DDPM.from_log_alphas(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="expected a table of numbers as log alphas, found 'cosine'"):
        DDPM.from_log_alphas("cosine")  # pyright: ignore[reportArgumentType]
    for times in ([1.0], [0.2, 0.5, 1.0], 0.5):
        with pytest.raises(ValueError, match=r"expected times of shape \(2,\), found"):
            DDPM.from_log_alphas([-0.1, -0.2], times)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="expected a VP-SDE"):
        SubVPSDE().betas(10)
    with pytest.raises(TypeError, match="expected a VP-SDE to discretize, found EDM"):
        discretize(EDM(), 10)  # pyright: ignore[reportArgumentType]


def test_betas_that_round_to_one() -> None:
    chain = discretize(VPSDE(schedule=Linear(0.1, 200.0)), 1)
    assert chain.betas == 1 and chain.log_alpha_bars.isfinite().all()
    assert chain.posterior(f64(1.0), f64(2.0), 1)[0] == 2
    close(chain.sde().B(1.0), VPSDE(0.1, 200.0).B(1.0), rtol=1e-15)


def test_log_alphas_are_kept_in_float64() -> None:
    chain = DDPM.from_log_alphas(torch.tensor([-0.5, -0.25]))
    assert chain.log_alphas.dtype == chain.betas.dtype == torch.float64
    assert chain.times.tolist() == [0.5, 1.0]
    listed = DDPM.from_log_alphas([-0.5, -0.25], [0.25, 0.75])
    assert torch.equal(listed.log_alphas, chain.log_alphas) and listed.times.tolist() == [0.25, 0.75]
    assert listed.log_alphas.dtype == listed.times.dtype == torch.float64


def test_a_chain_keeps_its_own_copy() -> None:
    log_alphas, times = f64(-0.5, -0.25), f64(0.5, 1.0)
    chain = DDPM.from_log_alphas(log_alphas, times)
    log_alphas.zero_()
    times.zero_()
    assert chain.log_alphas.tolist() == [-0.5, -0.25] and chain.times.tolist() == [0.5, 1.0]


def test_gradients_reach_a_learned_schedule() -> None:
    schedule = Learned(hidden=3)
    discretize(VPSDE(schedule=schedule), 5).betas.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in schedule.parameters())


# Algorithms 1 and 2


@pytest.mark.parametrize("n", [1, 2, 25])
def test_algorithm_2_is_the_plain_loop(n: int, dtype: torch.dtype) -> None:
    """DDPM.sample against the textbook's loop over node arrays, variance beta."""
    sde = VPSDE(0.1, 20.0)
    chain, model = discretize(sde, n), GaussianModel(sde)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    z = torch.randn(n, 4, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    alphas, sigmas = sde.alpha(t).numpy(), sde.sigma(t).numpy()

    def denoise(state, k):
        return model(torch.as_tensor(state), t[k]).numpy()

    known = reference.ddpm(denoise, x.numpy(), alphas, sigmas, z.flip(0).numpy(), variance="large")
    found = chain.sample(model, x.to(dtype), list(z.to(dtype)))
    assert found.dtype == dtype
    close(found.double(), torch.as_tensor(known), rtol=0, atol=4e4 * torch.finfo(dtype).eps)


def test_algorithm_2_calls_a_respaced_chain_at_its_own_times() -> None:
    """At the kept nodes the model must see the full chain's time, not j/M."""
    sde = VPSDE(0.1, 20.0)
    kept, n = [3, 10, 11, 30, 64, 100], 100
    seen = []

    class Watch(GaussianModel):
        def forward(self, x, t, **cond):
            seen.append(float(t))
            return super().forward(x, t, **cond)

    x = f64(0.3, -1.0)
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    short = discretize(sde, n).respace(kept)
    found = short.sample(Watch(sde), x, list(z))
    assert seen == [i / n for i in reversed(kept)]
    t = torch.tensor([i / n for i in reversed(kept)] + [0.0], dtype=torch.float64)
    model = GaussianModel(sde)
    known = reference.ddpm(
        lambda state, k: model(torch.as_tensor(state), t[k]).numpy(),
        x.numpy(),
        sde.alpha(t).numpy(),
        sde.sigma(t).numpy(),
        z.flip(0).numpy(),
        variance="large",
    )
    close(found, torch.as_tensor(known), rtol=1e-11, atol=1e-11)


def test_algorithm_2_needs_no_gradient_and_passes_conditions() -> None:
    sde = VPSDE()
    x = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    chain, z = discretize(sde, 3), [torch.zeros(2, 1)] * 3
    plain = chain.sample(GaussianModel(sde), x, z)
    shifted = chain.sample(GaussianModel(sde), x, z, shift=torch.tensor(1.0))
    assert not plain.requires_grad
    assert (shifted - plain).abs().min() > 0.1


def test_algorithm_2_runs_without_dropout_and_leaves_the_mode_alone() -> None:
    class Dropping(GaussianModel):
        def forward(self, x, t, **cond):
            return super().forward(torch.nn.functional.dropout(x, 0.5, self.training), t, **cond)

    chain, x = discretize(VPSDE(), 5), f64(0.3, -1.0)
    model = Dropping(VPSDE()).train()
    expected = chain.sample(GaussianModel(VPSDE()), x, [x] * 5)
    assert torch.equal(chain.sample(model, x, [x] * 5), expected)
    assert model.training


def test_algorithm_1_is_the_noise_error(device: torch.device, dtype: torch.dtype) -> None:
    sde = VPSDE(0.1, 20.0)
    chain, model = discretize(sde, 50), GaussianModel(sde)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(5, 2, 3, generator=generator).to(device, dtype) for _ in range(2))
    i = torch.tensor([1, 2, 20, 49, 50], device=device)
    loss = chain.loss(model, x_0, i, eps)
    assert loss.shape == (5,) and loss.dtype == dtype
    for row, k in enumerate(i.tolist()):
        t = torch.tensor(k / 50, dtype=torch.float64)
        x = sde.alpha(t).to(x_0) * x_0[row : row + 1] + sde.sigma(t).to(x_0) * eps[row : row + 1]
        known = (eps[row : row + 1] - model.noise(x, t)).square().mean()
        torch.testing.assert_close(loss[row], known, rtol=4e3 * torch.finfo(dtype).eps, atol=0)
    one_for_all = chain.loss(model, x_0, torch.full((5,), 20, device=device), eps)
    torch.testing.assert_close(chain.loss(model, x_0, 20, eps), one_for_all)
    short = chain.respace([2, 20, 50])
    together = short.loss(model, x_0[:3], torch.tensor([1, 2, 3], device=device), eps[:3])
    alone = chain.loss(model, x_0[1:2], torch.tensor([20], device=device), eps[1:2])
    torch.testing.assert_close(together[1:2], alone)
    other = chain.loss(model, x_0, i, eps, shift=torch.tensor(1.0, device=device))
    assert (other != loss).all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_little_noise_is_not_lost_in_half_precision(half: torch.dtype) -> None:  # FAULTS A1
    """A standard deviation has the dtype's digits where its square is below the least float16."""

    class Watch(GaussianModel):
        def noise(self, x, t, **cond):
            seen.append(x)
            return torch.zeros_like(x)

    seen: list[torch.Tensor] = []
    chain, zero, one = DDPM([1e-8, 1e-8]), torch.zeros(1, 1, dtype=half), torch.ones(1, 1, dtype=half)
    model, eps = Watch(chain.sde()), torch.finfo(half).eps
    chain.loss(model, zero, torch.tensor([2]), one)
    close(seen[-1].double(), f64(2e-8).sqrt()[None], rtol=2 * eps)
    close(chain.sample(model, zero, [one, one]).double(), f64(1e-8).sqrt()[None], rtol=2 * eps)


@given(linears())
def test_chain_of_a_table_is_the_table(schedule: Linear) -> None:
    betas = VPSDE(schedule=schedule).betas(30)
    close(DDPM(betas).betas, betas, rtol=1e-14)
    close(DDPM(betas.tolist()).betas, DDPM(betas).betas, rtol=0, atol=0)
    assert DDPM(betas.float()).betas.dtype == torch.float64


def test_a_model_of_another_process_is_refused() -> None:
    """Algorithm 2 would end with mean 1.74 instead of 2, without a word."""
    chain, law = DDPM(torch.linspace(1e-4, 0.2, 50, dtype=torch.float64)), laws.Gaussian([2.0], 0.1)
    x, noises = torch.zeros(2, 1, dtype=torch.float64), [torch.zeros(2, 1, dtype=torch.float64)] * 50
    for sde in (VPSDE(), SubVPSDE(), EDM()):
        with pytest.raises(ValueError, match=r"on the chain's own process, chain\.sde\(\); found one on"):
            chain.sample(law.denoiser(sde), x, noises)
        with pytest.raises(ValueError, match=r"on the chain's own process, chain\.sde\(\); found one on"):
            chain.loss(law.denoiser(sde), x, torch.tensor([3, 50]), x)
    assert abs(float(chain.sample(law.denoiser(chain.sde()), x, noises)[0, 0]) - 2) < 2e-3
    with pytest.raises(ValueError, match=r"on the chain's own process"):  # off by 5e-3 in log(alpha/sigma)
        chain.loss(law.denoiser(DDPM(chain.betas * 0.99).sde()), x, torch.tensor([3, 50]), x)
    exact = DDPM(VPSDE().betas(50))
    assert bool(exact.sample(law.denoiser(VPSDE()), x, noises).isfinite().all())


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (2,), (5, 3, 2), (3, 3)])
def test_noise_is_not_broadcast(shape: tuple[int, ...]) -> None:  # FAULTS E1
    """Samples that shared their noise would not be independent, and larger noise would make more of them."""
    chain, x = DDPM([0.1, 0.2]), torch.zeros(3, 2)
    model, noise = GaussianModel(chain.sde()), torch.ones(shape)
    words = r"expected noise of the state's shape \(3, 2\), found \("
    with pytest.raises(ValueError, match=words):
        chain.sample(model, x, [noise] * 2)
    with pytest.raises(ValueError, match=words):
        chain.loss(model, x, torch.tensor([1, 2, 2]), noise)
    with pytest.raises(ValueError, match="expected noises for 2 steps, found 1"):
        chain.sample(model, x, [torch.zeros_like(x)])


@pytest.mark.parametrize(("last", "n"), [(0.02, 100_000), (1 - 1e-9, 1000)])
def test_chains_whose_signal_underflows_know_their_own_process(last: float, n: int) -> None:
    chain, law = DDPM(torch.linspace(1e-4, last, n, dtype=torch.float64)), laws.Gaussian([2.0], 0.1)
    assert float(chain.alpha_bars[-1]) == 0
    x, i = torch.zeros(3, 1, dtype=torch.float64), torch.tensor([1, n // 2, n])
    assert bool(chain.loss(law.denoiser(chain.sde()), x, i, x).isfinite().all())
    other = DDPM(chain.betas * (1 - 1e-3)).sde()
    with pytest.raises(ValueError, match=r"on the chain's own process"):
        chain.loss(law.denoiser(other), x, i, x)

"""Inverse problems: what is exact on Gaussians is shown to be, by exact law; what is not, by how much."""

from __future__ import annotations

import math

import pytest
import torch
from exact import affine_law, distance
from torch import Tensor

from scoresde import EDM, VESDE, VPSDE, Rectified, grids, guidance, sample, solvers
from scoresde.denoiser import DATA, NOISE, SCORE, VELOCITY, BaseDenoiser
from scoresde.guidance.inverse import conjugate_residuals
from scoresde.laws import Gaussian, Mixture
from scoresde.sde import like

F64 = torch.float64
VP = VPSDE()
SDES = [VP, VESDE(), EDM(), Rectified()]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


LAW = Gaussian(
    f64(0.3, -0.5, 0.1), torch.tensor([[0.5, 0.2, 0.1], [0.2, 0.4, -0.1], [0.1, -0.1, 0.3]], dtype=F64)
)
A, Y, R = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=F64), f64(0.4, -0.2), 0.1
# The example in the docstrings: x_1 of two correlated numbers is seen.
PAIR = Gaussian(f64(0.0, 0.0), torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=F64))
MASK = f64(1.0, 0.0)


def states(sde, n: int = 5, shape: tuple[int, ...] = (3,)) -> tuple[Tensor, Tensor]:
    t = sde.time(torch.linspace(-4, 8, n, dtype=F64))
    x = torch.randn(n, *shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    return x * like(torch.hypot(sde.alpha(t), sde.sigma(t)), x), t


# ---- exact methods


@pytest.mark.parametrize("method", [guidance.linear_inverse, guidance.pigdm, guidance.dps])
def test_without_signal_nothing_is_guided(method, unchecked) -> None:
    """Where a scale that is a function of noise level is 0, alpha may be."""
    plain = LAW.denoiser(Rectified())
    model = method(plain, A, Y, R, scale=guidance.interval(0.1, -5.0, 9.0))
    x, t = states(Rectified())[0], torch.tensor([1.0, 0.99, 0.5, 1.0, 0.2], dtype=F64)
    found, rest = model(x, t), plain(x, t)
    assert torch.equal(found[[0, 1, 3]], rest[[0, 1, 3]])
    assert bool((found[[2, 4]] != rest[[2, 4]]).all()) and bool(found.isfinite().all())
    assert bool(sample(model, (4, 3), solvers.ddim(), steps=5, dtype=F64).x.isfinite().all())


def test_what_y_holds_elsewhere_does_not_matter(unchecked) -> None:
    x, t = states(VP, 5, (2,))
    known = guidance.inpaint(PAIR.denoiser(VP), MASK, f64(0.7, 0.0)[None])
    for mask in (MASK, MASK.bool(), MASK.to(torch.uint8)):
        for nothing in (99.0, math.nan, -math.inf):
            model = guidance.inpaint(PAIR.denoiser(VP), mask, f64(0.7, nothing)[None])
            assert torch.equal(model(x, t), known(x, t))


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_moment_matching_is_exact_on_gaussians(sde) -> None:
    """In every view, for a matrix and for the same as a function, with noise and (almost) without."""
    x, t = states(sde)
    for noise_var in (R, 1e-8):
        exact = LAW.posterior(Y, A, noise_var).denoiser(sde)
        for operator, y in ((A, Y), (lambda x: x @ A.mT, Y[None])):
            model = guidance.linear_inverse(LAW.denoiser(sde), operator, y, noise_var)
            for view in (DATA, NOISE, SCORE, VELOCITY):
                found, expected = model.as_view(view, x, t), exact.as_view(view, x, t)
                tolerance = 1e-7 * (1 + expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=1e-7, atol=float(tolerance))


def test_the_posterior_s_mean_and_covariance(unchecked) -> None:
    """The output law of a sampler of high order, from the guided marginal, to 1e-6; others as they are on the
    posterior itself.
    """
    posterior, grid = LAW.posterior(Y, A, R), grids.log_snr(VP, 120, 1e-4)
    model = guidance.linear_inverse(LAW.denoiser(VP), A, Y, R)
    start, end = posterior.marginal(VP, 1.0), posterior.marginal(VP, 1e-4)
    assert distance(affine_law(solvers.unipc(3), model, grid, start), end) < 1e-6
    for solver in (solvers.ddpm(), solvers.heun()):
        rows = 12 if solver.card.stochastic else 0
        short = grids.log_snr(VP, 12, 1e-3)
        expected = affine_law(solver, posterior.denoiser(VP), short, start, rows)
        assert distance(affine_law(solver, model, short, start, rows), expected) < 1e-9


def test_noiseless_observations_are_met() -> None:
    """A D = y for noise_var = 0, also where the same is measured twice."""
    x, t = states(VP)
    for operator, y in ((A, Y), (torch.cat([A, A[:1]]), torch.cat([Y, Y[:1]]))):
        model = guidance.linear_inverse(LAW.denoiser(VP), operator, y, 0.0)
        torch.testing.assert_close(model(x, t) @ operator.mT, y.expand(5, -1), rtol=1e-6, atol=1e-6)


def test_pigdm_is_exact_on_isotropic_gaussians() -> None:
    law = Gaussian(LAW.mean, 0.5)
    for sde in SDES:
        x, t = states(sde)
        exact = law.posterior(Y, A, R).denoiser(sde)
        model = guidance.pigdm(law.denoiser(sde), A, Y, R, data_var=0.5)
        torch.testing.assert_close(model(x, t), exact(x, t), rtol=1e-9, atol=1e-9)
        wrong = guidance.pigdm(law.denoiser(sde), A, Y, R, data_var=1.0)
        assert (wrong(x, t) - exact(x, t)).abs().max() > 1e-3


def test_replacement_is_exact_where_the_parts_are_independent() -> None:
    """And the law of the known part is that of what is known, whatever the model thinks of it."""
    law = Gaussian(f64(0.3, -0.5), f64(0.5, 0.2))
    for noise_var in (0.0, 0.3):
        known = Gaussian(f64(1.2, -0.5), f64(noise_var, 0.2)).denoiser(VP)
        x, t = states(VP, shape=(2,))
        model = guidance.inpaint(law.denoiser(VP), MASK, f64(1.2, 99.0)[None], noise_var)
        torch.testing.assert_close(model(x, t), known(x, t), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.score(x, t), known.score(x, t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise_var", [0.0, 0.02])
def test_colorize_is_exact_where_grey_is_independent(noise_var) -> None:
    """Channels of one variance are isotropic in the rotated coordinates too: the mean over the channels is as
    given, and what is left has the law it had.
    """
    C, v = 3, 0.25
    law = Gaussian(torch.full((C, 2, 2), 0.2, dtype=F64), v)
    grey = torch.linspace(-1, 1, 4, dtype=F64).view(1, 1, 2, 2)
    ones = torch.ones(C, C, dtype=F64) / C
    # In the channels: variance v across the grey axis, C noise_var along it.
    cov = torch.kron(v * (torch.eye(C, dtype=F64) - ones) + C * noise_var * ones, torch.eye(4, dtype=F64))
    exact = Gaussian(grey[0].expand(C, 2, 2), (cov + cov.mT) / 2).denoiser(VP)
    x, t = states(VP, shape=(C, 2, 2))
    model = guidance.colorize(law.denoiser(VP), grey, noise_var)
    torch.testing.assert_close(model(x, t), exact(x, t), rtol=1e-9, atol=1e-9)
    if not noise_var:
        torch.testing.assert_close(model(x, t).mean(1, keepdim=True), grey.expand(5, 1, 2, 2))


def test_the_known_part_of_the_state_keeps_its_law() -> None:
    """Replacement: alpha y + sigma eps on the way, by every solver that is marginal-exact."""
    start, grid = Gaussian(f64(0.0, 0.0), 1.0), grids.log_snr(VP, 9, 1e-2)
    model = guidance.inpaint(PAIR.denoiser(VP), MASK, f64(0.7, 0.0)[None])
    for solver in (solvers.ddpm(), solvers.dpmpp(2), solvers.unipc(2), solvers.sde_dpmpp(2)):
        rows = 9 if solver.card.stochastic else 0
        law = affine_law(solver, model, grid, start, rows)
        alpha, sigma = float(VP.alpha(1e-2)), float(VP.sigma(1e-2))
        # The start is not alpha y + sigma eps but standard normal, and that gap decays.
        assert abs(float(law.mean[0]) - 0.7 * alpha) < 1e-3
        assert abs(float(law.cov[0, 0]) / sigma**2 - 1) < 1e-3


# ---- biased methods: by how much


def test_the_stated_biases(unchecked) -> None:
    """x_1 + N(0, 0.01) = 1 seen on N(0, [[1, 0.8], [0.8, 1]]): the numbers in the docstrings are these."""
    plain, A, y, R = PAIR.denoiser(VP), f64(1.0, 0.0)[None], f64(1.0), 0.01
    posterior = PAIR.posterior(y, A, R)

    def found(model: BaseDenoiser, solver, noisy: bool = False) -> list[float]:
        grid = grids.log_snr(VP, 100, 1e-4)
        law = affine_law(solver, model, grid, posterior.marginal(VP, 1.0), 100 if noisy else 0)
        return [float(law.mean[1]), float(law.cov[1, 1])]

    replaced = guidance.inpaint(plain, MASK, f64(1.0, 0.0)[None], R)
    for model, numbers in (
        (posterior.denoiser(VP), (0.792, 0.366)),
        (guidance.linear_inverse(plain, A, y, R), (0.792, 0.366)),
        (guidance.pigdm(plain, A, y, R), (0.753, 0.397)),
        (guidance.dps(plain, A, y, R), (1.128, 0.274)),
        (replaced, (0.351, 0.674)),
    ):
        assert found(model, solvers.unipc(2)) == pytest.approx(numbers, abs=2e-3)
    assert found(replaced, solvers.ddpm(), noisy=True) == pytest.approx((0.485, 0.501), abs=2e-3)
    for text, numbers in (
        (guidance.pigdm.__doc__, "0.792 and variance 0.366, the probability flow ends with 0.753 and 0.397"),
        (guidance.dps.__doc__, "mean 1.128 and variance 0.274"),
        (
            guidance.inpaint.__doc__,
            "0.351 and variance 0.674 in place of 0.792 and 0.366, by 100 ancestral steps 0.485 and 0.501",
        ),
    ):
        assert numbers in " ".join(text.split())


def test_moment_matching_is_not_exact_on_mixtures() -> None:
    """It is where one component is left, and not between them."""
    law = Mixture([0.5, 0.5], f64(-2.0, 2.0), 0.05)
    one = torch.ones(1, 1, dtype=F64)
    exact = law.posterior(f64(1.0), one, 1.0).denoiser(VP)
    model = guidance.linear_inverse(law.denoiser(VP), one, f64(1.0), 1.0)
    far, between = f64(2.0)[:, None], f64(0.1)[:, None]
    assert abs(float(model(far, 0.05) - exact(far, 0.05))) < 1e-9
    assert abs(float(model(between, 0.6) - exact(between, 0.6))) > 0.05


def dps_by_hand(x: Tensor, t: float, weight) -> Tensor:
    """D + (sigma^2/alpha) J^T A^T v on LAW, J of the exact denoiser."""
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    J = alpha * LAW.cov @ torch.linalg.inv(alpha**2 * LAW.cov + sigma**2 * torch.eye(3, dtype=F64))
    D = LAW.denoiser(VP)(x, t)
    error = Y - D @ A.mT
    return D + sigma**2 / alpha * (weight(error) @ A) @ J


def test_dps_by_hand() -> None:
    x, _ = states(VP)
    plain, t = LAW.denoiser(VP), 0.4
    found = guidance.dps(plain, A, Y, 0.2, scale=0.7)(x, t)
    torch.testing.assert_close(found, dps_by_hand(x, t, lambda e: 0.7 * e / 0.2), rtol=1e-10, atol=1e-10)
    found = guidance.dps_normed(plain, A, Y, zeta=1.3)(x, t)
    expected = dps_by_hand(x, t, lambda e: 1.3 * e / torch.linalg.vector_norm(e, dim=1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # It is the gradient of the norm.
    score = (found - plain(x, t)) * VP.alpha(t) / VP.sigma(t) ** 2
    slope = torch.func.grad(lambda x: -1.3 * torch.linalg.vector_norm(Y - plain(x, t) @ A.mT, dim=1).sum())(x)
    torch.testing.assert_close(score, slope, rtol=1e-9, atol=1e-9)
    met = plain(x, t) @ A.mT  # an error of 0 has no direction
    assert torch.equal(guidance.dps_normed(plain, A, met)(x, t), plain(x, t))


METHODS = {
    "linear_inverse": lambda m, y: guidance.linear_inverse(m, A, y, R),
    "pigdm": lambda m, y: guidance.pigdm(m, A, y, R),
    "dps": lambda m, y: guidance.dps(m, A, y, R),
    "dps_normed": lambda m, y: guidance.dps_normed(m, A, y),
    "inpaint": lambda m, y: guidance.inpaint(m, f64(1.0, 1.0, 0.0), torch.nn.functional.pad(y, (0, 1)), R),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method, unchecked) -> None:  # FAULTS B2b
    """Norms and observations are those of each sample, also where samples leave the batch."""
    guide, plain = METHODS[method], LAW.denoiser(VP)
    x, y = (
        torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(1)),
        torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(5)),
    )
    far = torch.cat([x[:1], 20 * x[1:]])
    torch.testing.assert_close(
        guide(plain, y)(far, 0.4)[:1], guide(plain, y[:1])(x[:1], 0.4), rtol=1e-12, atol=1e-12
    )
    shared = guide(plain, y[:1])(x, 0.4)
    torch.testing.assert_close(shared, guide(plain, y[:1].expand(4, -1))(x, 0.4), rtol=1e-12, atol=1e-12)
    times = f64(1.0, 0.4)
    solver = solvers.adaptive_ode(rtol=1e-4, atol=1e-4)
    together = solver.solve(guide(plain, y), far, times)
    assert len(set(together.evaluations.tolist())) > 1 or method != "linear_inverse"
    for i in range(4):
        alone = solver.solve(guide(plain, y[i : i + 1]), far[i : i + 1], times).x
        torch.testing.assert_close(alone, together.x[i : i + 1], rtol=1e-9, atol=1e-9)


def test_as_many_rows_as_samples_are_not_taken_for_a_batch(unchecked) -> None:
    """y (m,) of a matrix with m = B."""
    x = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    solver = solvers.adaptive_ode(rtol=1e-2, atol=1e-2)
    model = guidance.linear_inverse(LAW.denoiser(VP), A, Y, R)
    for i in range(2):
        alone = solver.solve(model, x[i : i + 1], f64(1.0, 0.4)).x
        torch.testing.assert_close(
            alone, solver.solve(model, x, f64(1.0, 0.4)).x[i : i + 1], rtol=1e-9, atol=1e-9
        )


# ---- images, modes, pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_images(dtype, device) -> None:
    """A blur as a function, a mask, a grey image; conditions reach the model; no_grad; shapes and dtypes."""
    law = Gaussian(torch.zeros(3, 4, 4, dtype=F64), 0.3)
    plain = law.denoiser(VP).to(device, dtype)

    class Shifted(BaseDenoiser):
        sde = VP

        def forward(self, x, t, shift):
            return plain(x, t) + shift

    truth = law.sample(2, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def blur(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 2)

    mask = torch.zeros(4, 4, dtype=torch.bool, device=device)
    mask[:2] = True
    cases = {
        "linear": (guidance.linear_inverse(Shifted(), blur, blur(truth), 1e-4), blur, blur(truth)),
        "pigdm": (guidance.pigdm(Shifted(), blur, blur(truth), 1e-4, data_var=0.3), blur, blur(truth)),
        "inpaint": (guidance.inpaint(Shifted(), mask, truth), lambda x: x * mask, truth * mask),
        "colorize": (
            guidance.colorize(Shifted(), truth.mean(1, keepdim=True)),
            lambda x: x.mean(1, keepdim=True),
            truth.mean(1, keepdim=True),
        ),
    }
    for name, (model, seen, y) in cases.items():
        drawn = sample(
            model,
            (2, 3, 4, 4),
            solvers.dpmpp(2),
            steps=15,
            end=0,
            condition={"shift": 0.0},
            device=device,
            dtype=dtype,
        )
        assert drawn.x.dtype == dtype and drawn.x.shape == truth.shape and not drawn.x.requires_grad, name
        assert (seen(drawn.x) - y).abs().max() < 0.05, name
        x = truth + 1
        assert not torch.equal(model(x, 0.4, shift=0.0), model(x, 0.4, shift=1.0)), name


def test_modes_are_left_as_found() -> None:
    x, t = states(VP)
    model = guidance.linear_inverse(LAW.denoiser(VP), A, Y, R)
    expected = model(x, t)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(x.clone(), t.clone()), expected)
    jacobian = torch.func.jacrev(lambda x: model(x[None], 0.4)[0])(x[0])
    exact = LAW.posterior(Y, A, R).denoiser(VP)
    torch.testing.assert_close(
        jacobian, torch.func.jacrev(lambda x: exact(x[None], 0.4)[0])(x[0]), rtol=1e-7, atol=1e-7
    )


def test_conjugate_residuals_solve() -> None:
    g = torch.Generator().manual_seed(0)
    M = torch.randn(4, 5, 5, dtype=F64, generator=g)
    symmetric = M @ M.mT + 0.1 * torch.eye(5, dtype=F64)
    b = torch.randn(4, 5, dtype=F64, generator=g)
    b[3] = 0
    for matrix in (symmetric, symmetric + (M - M.mT)):
        for iterations in (5, 50):
            z = conjugate_residuals(lambda v, m=matrix: (m @ v[:, :, None])[:, :, 0], b, iterations)
            torch.testing.assert_close(z, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)
        short = conjugate_residuals(lambda v, m=matrix: (m @ v[:, :, None])[:, :, 0], b, 2)
        assert (short - z).abs().max() > 1e-3 and not short[3].any()
    assert conjugate_residuals(lambda v: v, b[:0], 3).shape == (0, 5)
    applied: list[Tensor] = []
    conjugate_residuals(lambda v: applied.append(v) or v, b, 50)
    assert len(applied) == 5  # no backward pass beyond the dimension


def test_the_residual_never_grows() -> None:
    """Also for matrices with eigenvalues of both signs, as networks make them."""
    g = torch.Generator().manual_seed(0)
    M = torch.randn(8, 6, 6, dtype=F64, generator=g)
    b = torch.randn(8, 6, dtype=F64, generator=g)
    before = b.norm(dim=1)
    for iterations in range(1, 7):
        z = conjugate_residuals(lambda v: (M @ v[:, :, None])[:, :, 0], b, iterations)
        residual = (b - (M @ z[:, :, None])[:, :, 0]).norm(dim=1)
        assert (residual <= before * (1 + 1e-9)).all()
        before = residual


def test_scales_and_intervals() -> None:
    x, _ = states(VP)
    plain = LAW.denoiser(VP)
    t = VP.time(f64(-1.0, 0.0, 1.0, 2.0, 3.0))
    model = guidance.linear_inverse(plain, A, Y, R, scale=guidance.interval(2.0, 0.5, 2.5))
    full = guidance.linear_inverse(plain, A, Y, R)
    expected = plain(x, t) + f64(0, 0, 2, 2, 0)[:, None] * (full(x, t) - plain(x, t))
    torch.testing.assert_close(model(x, t), expected, rtol=1e-10, atol=1e-10)
    assert "interval" not in repr(full) and "scale=1.0" in repr(full)


def test_an_empty_batch() -> None:
    for guide in METHODS.values():
        assert guide(LAW.denoiser(VP), f64(0.1, 0.2)[None])(torch.zeros(0, 3, dtype=F64), 0.3).shape == (0, 3)


def test_errors(unchecked) -> None:
    plain, (x, t) = LAW.denoiser(VP), states(VP)
    for wrong in (A[0], torch.zeros(3, 3), A.mT):
        with pytest.raises(ValueError, match=r"A of shape \(m, D\)"):
            guidance.linear_inverse(plain, wrong, Y, R)
    with pytest.raises(ValueError, match="a column for each of the 3 numbers of a sample"):
        guidance.linear_inverse(plain, A[:, :2], Y, R)(x, t)
    calls = []
    handle = plain.register_forward_pre_hook(lambda *call: calls.append(call))
    for guide in (guidance.linear_inverse, guidance.pigdm, guidance.dps):
        with pytest.raises(ValueError, match="a column for each of the 3 numbers of a sample"):
            guide(plain, A[:, :2], Y, R)(x, t)
    handle.remove()
    assert not calls  # what the shape of x tells is told before the network is called
    with pytest.raises(ValueError, match=r"y of shape \(5, \.\.\.\) or \(1, \.\.\.\)"):
        guidance.linear_inverse(plain, A, Y.expand(4, 2), R)(x, t)
    with pytest.raises(ValueError, match="like A x"):
        guidance.linear_inverse(plain, lambda x: x, Y[None], R)(x, t)
    for bad in (-1.0, math.nan, math.inf):
        for make in (guidance.linear_inverse, guidance.pigdm, guidance.dps):
            with pytest.raises(ValueError, match="noise_var: expected a variance"):
                make(plain, A, Y, bad)
        with pytest.raises(ValueError, match="noise_var: expected a variance"):
            guidance.inpaint(plain, MASK, f64(0.0, 0.0)[None], bad)
        with pytest.raises(ValueError, match="data_var: expected a variance"):
            guidance.pigdm(plain, A, Y, R, data_var=bad)
    with pytest.raises(ValueError, match="to divide by"):
        guidance.dps(plain, A, Y, 0.0)
    with pytest.raises(ValueError, match="noise_var: expected one variance for all of y"):
        guidance.linear_inverse(plain, A, Y, torch.ones(2))
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="iterations: expected a whole number"):
            guidance.linear_inverse(plain, A, Y, R, iterations=bad)
    with pytest.raises(ValueError, match=r"grey: expected images \(B, 1, H, W\)"):
        guidance.colorize(plain, torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="with a batch axis of 1 or 5"):
        guidance.inpaint(plain, f64(1.0, 1.0, 0.0), f64(0.0, 0.0, 0.0))(x, t)
    with pytest.raises(ValueError, match=r"mask: .* y, \(1, 3\), found \(2,\)"):
        guidance.inpaint(plain, MASK, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"determined, found t=1\.0"):
        guidance.linear_inverse(LAW.denoiser(Rectified()), A, Y, R)(x, 1.0)
    for mask in (torch.tensor([255, 0, 255], dtype=torch.uint8), f64(0.5, 0.0, 1.0), f64(math.nan, 0.0, 1.0)):
        with pytest.raises(ValueError, match="mask: expected zeros and ones only, found"):
            guidance.inpaint(plain, mask, torch.zeros(1, 3))
    with pytest.raises(TypeError, match="expected a denoiser to guide"):
        guidance.dps(lambda x, t: x, A, Y, R)


@pytest.mark.parametrize("made", [
    lambda model: guidance.inpaint(model, torch.ones(4, 4), torch.zeros(1, 3, 4, 4)),
    lambda model: guidance.inpaint(model, torch.ones(4, 4), torch.zeros(2, 1, 4, 4)),  # not for all channels
    lambda model: guidance.inpaint(model, torch.ones(8, 4), torch.zeros(2, 2, 8, 4)),
    lambda model: guidance.inpaint(model, torch.ones(4, 4), torch.zeros(3, 2, 4, 4)),
    lambda model: guidance.colorize(model, torch.zeros(2, 1, 2, 4)),
    lambda model: guidance.colorize(model, torch.zeros(3, 1, 4, 4)),
    lambda model: guidance.linear_inverse(model, torch.ones(1, 32), torch.zeros(3, 1), 0.1),
    lambda model: guidance.linear_inverse(model, lambda x: x.flatten(1).sum(1), torch.tensor(0.1), 0.1),
])  # fmt: skip
def test_what_is_known_has_the_shape_of_the_state(made, unchecked) -> None:
    """Before the network is called, which may take long, and without a broadcast of torch."""
    calls = []

    class Counting(BaseDenoiser):
        sde = VP

        def forward(self, x, t):
            calls.append(t)
            return x

    right = guidance.inpaint(Counting(), torch.ones(4, 4), torch.zeros(1, 2, 4, 4))
    assert sample(right, (2, 2, 4, 4), solvers.ddim(), steps=2).x.shape == (2, 2, 4, 4) and calls
    calls.clear()
    with pytest.raises(ValueError, match=r"expected (what is known|y of shape)"):
        sample(made(Counting()), (2, 2, 4, 4), solvers.ddim(), steps=2)
    assert not calls


def test_arrays_lists_and_single_numbers_are_measurements_too(unchecked) -> None:
    x, plain = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3), LAW.denoiser(VP)
    wanted = guidance.linear_inverse(plain, A, Y, R)(x, 0.5)
    torch.testing.assert_close(guidance.linear_inverse(plain, A.numpy(), Y.numpy(), R)(x, 0.5), wanted)
    listed = guidance.linear_inverse(plain, A, Y.tolist(), R)(x, 0.5)  # numbers in float32
    torch.testing.assert_close(listed, wanted, rtol=1e-6, atol=1e-7)
    one, matrix = torch.full((1,), 0.3, dtype=torch.float64), torch.full((1, 3), 1 / 3, dtype=torch.float64)
    found = guidance.linear_inverse(plain, lambda x: x.mean(1), one, R)(x, 0.5)
    torch.testing.assert_close(found, guidance.linear_inverse(plain, matrix, one, R)(x, 0.5))
    mask, y = f64(1.0, 0.0, 1.0), f64(0.1, 0.2, 0.3)[None]
    known = guidance.inpaint(plain, mask, y)(x, 0.5)
    assert torch.equal(guidance.inpaint(plain, mask.numpy(), y.numpy())(x, 0.5), known)

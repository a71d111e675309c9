"""Textbook samplers as plain loops, and schedules in high precision: oracles written from the papers.

Nothing here imports the library. All samplers are called alike,

    sampler(denoise, x, alphas, sigmas, noises=None, **options) -> x at the last node,

with the nodes' signal and noise scales `alphas, sigmas` (K + 1,), noisiest first; `denoise(x, k)` gives E[x_0
| x_k] at node k; `noises` (K, ...) has the shape of `x` behind its first axis, one entry per step from node k
to k + 1 (deterministic samplers ignore it). Singlestep methods take their inner points as nodes: with `order`
r every r-th node ends a step. A last sigma of 0 is allowed where the paper's formula has a limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import mpmath as mp
import numpy as np

Denoise = Callable[[np.ndarray, int], np.ndarray]


def noise_of(x, data, alpha, sigma):
    """eps = (x - alpha D)/sigma."""
    return (x - alpha * data) / sigma


def half_log_snr(alphas, sigmas):
    """lam = log(alpha/sigma), infinite where sigma = 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(alphas, float)) - np.log(np.asarray(sigmas, float))


# Stochastic samplers of first order


def ddpm(denoise: Denoise, x, alphas, sigmas, noises, variance="small"):
    """Ho et al. 2020, Algorithm 2, between any nodes (alpha_bar = alphas^2); no noise into sigma = 0."""
    alpha_bars = np.asarray(alphas, float) ** 2
    for k in range(len(alphas) - 1):
        alpha = alpha_bars[k] / alpha_bars[k + 1]
        beta = 1 - alpha
        eps = noise_of(x, denoise(x, k), alphas[k], sigmas[k])
        mean = (x - beta / np.sqrt(1 - alpha_bars[k]) * eps) / np.sqrt(alpha)
        small = (1 - alpha_bars[k + 1]) / (1 - alpha_bars[k]) * beta
        spread = np.sqrt(small if variance == "small" else beta)
        x = mean + spread * noises[k] if sigmas[k + 1] > 0 else mean
    return x


def ddim(denoise: Denoise, x, alphas, sigmas, noises=None, eta=0.0):
    """Song, Meng and Ermon 2021, eq. 12 with the variance of eq. 16."""
    for k in range(len(alphas) - 1):
        a, b = alphas[k] ** 2, alphas[k + 1] ** 2
        data = denoise(x, k)
        eps = noise_of(x, data, alphas[k], sigmas[k])
        c = eta * np.sqrt(sigmas[k + 1] ** 2 / sigmas[k] ** 2 * (1 - a / b)) if eta else 0.0
        x = alphas[k + 1] * data + np.sqrt(sigmas[k + 1] ** 2 - c**2) * eps
        if eta:
            x = x + c * noises[k]
    return x


def euler_maruyama(denoise: Denoise, x, alphas, sigmas, noises, *, times, f, g):
    """x - dt (f x - g^2 score) + g sqrt(dt) z from times[k] to times[k + 1]; f(t) and g(t) are floats."""
    for k in range(len(times) - 1):
        dt = times[k] - times[k + 1]
        score = (alphas[k] * denoise(x, k) - x) / sigmas[k] ** 2
        x = x - dt * (f(times[k]) * x - g(times[k]) ** 2 * score) + g(times[k]) * np.sqrt(dt) * noises[k]
    return x


# The three historical samplers step K times on the K nodes linspace(1, 1e-3, K), with a step length of 1/K
# (Song et al. 2021, code of the paper): `alphas, sigmas, noises` have length K here, nothing is denoised at
# the end.


def score_sde_euler(denoise: Denoise, x, alphas, sigmas, noises, *, betas_at):
    """Euler-Maruyama with dt = 1/K; betas_at (K,) is beta(t_k)."""
    steps = len(alphas)
    for k, beta in enumerate(betas_at):
        score = (alphas[k] * denoise(x, k) - x) / sigmas[k] ** 2
        x = x + (0.5 * beta * x + beta * score) / steps + np.sqrt(beta / steps) * noises[k]
    return x


def score_sde_betas(times, beta_min=0.1, beta_max=20.0):
    """The table beta_i = linspace(beta_min, beta_max)/K read at floor(t (K - 1)); (K,) for K times."""
    steps = len(times)
    table = np.linspace(beta_min / steps, beta_max / steps, steps)
    return table[np.floor(np.asarray(times) * (steps - 1)).astype(int)]


def score_sde_reverse_diffusion(denoise: Denoise, x, alphas, sigmas, noises, *, betas):
    """Song et al. 2021, eq. 46: x (2 - sqrt(1 - beta)) + beta score + sqrt(beta) z."""
    for k, beta in enumerate(betas):
        score = (alphas[k] * denoise(x, k) - x) / sigmas[k] ** 2
        x = (2 - np.sqrt(1 - beta)) * x + beta * score + np.sqrt(beta) * noises[k]
    return x


def score_sde_ancestral(denoise: Denoise, x, alphas, sigmas, noises, *, betas):
    """Song et al. 2021, eq. 4: (x + beta score)/sqrt(1 - beta) + sqrt(beta) z."""
    for k, beta in enumerate(betas):
        score = (alphas[k] * denoise(x, k) - x) / sigmas[k] ** 2
        x = (x + beta * score) / np.sqrt(1 - beta) + np.sqrt(beta) * noises[k]
    return x


# Karras et al. 2022


def heun(denoise: Denoise, x, alphas, sigmas, noises=None):
    """Algorithm 1 in y = x/alpha, kappa = sigma/alpha: dy/dkappa = (y - D)/kappa; Euler into kappa = 0."""
    y, kappa = x / alphas[0], np.asarray(sigmas) / np.asarray(alphas)
    for k in range(len(alphas) - 1):
        d = (y - denoise(alphas[k] * y, k)) / kappa[k]
        ahead = y + (kappa[k + 1] - kappa[k]) * d
        if kappa[k + 1] > 0:
            d = (d + (ahead - denoise(alphas[k + 1] * ahead, k + 1)) / kappa[k + 1]) / 2
            ahead = y + (kappa[k + 1] - kappa[k]) * d
        y = ahead
    return alphas[-1] * y


def midpoint(denoise: Denoise, x, alphas, sigmas, noises=None):
    """DPM2: Euler in kappa to the inner node, whose slope takes the whole step; steps of two nodes."""
    y, kappa = x / alphas[0], np.asarray(sigmas) / np.asarray(alphas)
    for k in range(0, len(alphas) - 1, 2):
        d = (y - denoise(alphas[k] * y, k)) / kappa[k]
        inner = y + (kappa[k + 1] - kappa[k]) * d
        d = (inner - denoise(alphas[k + 1] * inner, k + 1)) / kappa[k + 1]
        y = y + (kappa[k + 2] - kappa[k]) * d
    return alphas[-1] * y


def edm(denoise: Denoise, x, alphas, sigmas, noises, s_noise=1.0):
    """Algorithm 2 (churn), alphas = 1: the nodes go t_0, t-hat_0, t_1, t-hat_1, ..., t_n with t-hat_i >= t_i.

    noises[2 i] raises the noise from t_i to t-hat_i; the odd ones are not used.
    """
    for k in range(0, len(sigmas) - 1, 2):
        now, hat, end = sigmas[k : k + 3]
        x = x + np.sqrt(hat**2 - now**2) * s_noise * noises[k]
        d = (x - denoise(x, k + 1)) / hat
        ahead = x + (end - hat) * d
        if end > 0:
            ahead = x + (end - hat) * (d + (ahead - denoise(ahead, k + 2)) / end) / 2
        x = ahead
    return x


# DPM-Solver and DPM-Solver++


def dpm_2s(denoise: Denoise, x, alphas, sigmas, noises=None):
    """DPM-Solver-2 (Lu et al. 2022, Algorithm 1), r_1 from the inner node; steps of two nodes."""
    lam = half_log_snr(alphas, sigmas)
    for s in range(0, len(alphas) - 1, 2):
        m, t = s + 1, s + 2
        h, r = lam[t] - lam[s], (lam[m] - lam[s]) / (lam[t] - lam[s])
        eps = noise_of(x, denoise(x, s), alphas[s], sigmas[s])
        u = alphas[m] / alphas[s] * x - sigmas[m] * np.expm1(r * h) * eps
        slope = noise_of(u, denoise(u, m), alphas[m], sigmas[m]) - eps
        x = alphas[t] / alphas[s] * x - sigmas[t] * np.expm1(h) * (eps + slope / (2 * r))
    return x


def dpm_3s(denoise: Denoise, x, alphas, sigmas, noises=None):
    """DPM-Solver-3 (Lu et al. 2022, Algorithm 2), r_1 and r_2 from the inner nodes; steps of three nodes."""
    lam = half_log_snr(alphas, sigmas)
    for s in range(0, len(alphas) - 1, 3):
        a, b, t = s + 1, s + 2, s + 3
        h = lam[t] - lam[s]
        r1, r2 = (lam[a] - lam[s]) / h, (lam[b] - lam[s]) / h
        eps = noise_of(x, denoise(x, s), alphas[s], sigmas[s])
        u = alphas[a] / alphas[s] * x - sigmas[a] * np.expm1(r1 * h) * eps
        d1 = noise_of(u, denoise(u, a), alphas[a], sigmas[a]) - eps
        u = alphas[b] / alphas[s] * x - sigmas[b] * np.expm1(r2 * h) * eps
        u = u - sigmas[b] * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = noise_of(u, denoise(u, b), alphas[b], sigmas[b]) - eps
        x = alphas[t] / alphas[s] * x - sigmas[t] * np.expm1(h) * eps
        x = x - sigmas[t] / r2 * (np.expm1(h) / h - 1) * d2
    return x


def dpmpp_2s(denoise: Denoise, x, alphas, sigmas, noises=None):
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, Algorithm 1); steps of two nodes."""
    lam = half_log_snr(alphas, sigmas)
    for s in range(0, len(alphas) - 1, 2):
        m, t = s + 1, s + 2
        h, r = lam[t] - lam[s], (lam[m] - lam[s]) / (lam[t] - lam[s])
        first = denoise(x, s)
        u = sigmas[m] / sigmas[s] * x - alphas[m] * np.expm1(-r * h) * first
        data = (1 - 1 / (2 * r)) * first + denoise(u, m) / (2 * r)
        x = sigmas[t] / sigmas[s] * x - alphas[t] * np.expm1(-h) * data
    return x


def dpmpp_3s(denoise: Denoise, x, alphas, sigmas, noises=None):
    """DPM-Solver++(3S): DPM-Solver-3 with the data instead of the noise; steps of three nodes."""
    lam = half_log_snr(alphas, sigmas)
    for s in range(0, len(alphas) - 1, 3):
        a, b, t = s + 1, s + 2, s + 3
        h = lam[t] - lam[s]
        r1, r2 = (lam[a] - lam[s]) / h, (lam[b] - lam[s]) / h
        first = denoise(x, s)
        u = sigmas[a] / sigmas[s] * x - alphas[a] * np.expm1(-r1 * h) * first
        d1 = denoise(u, a) - first
        u = sigmas[b] / sigmas[s] * x - alphas[b] * np.expm1(-r2 * h) * first
        u = u + alphas[b] * r2 / r1 * (np.expm1(-r2 * h) / (r2 * h) + 1) * d1
        d2 = denoise(u, b) - first
        x = sigmas[t] / sigmas[s] * x - alphas[t] * np.expm1(-h) * first
        x = x + alphas[t] / r2 * (np.expm1(-h) / h + 1) * d2
    return x


def dpmpp_2m(denoise: Denoise, x, alphas, sigmas, noises=None):
    """DPM-Solver++(2M) (arXiv:2211.01095, Algorithm 2); order 1 in the first step and in one to sigma = 0."""
    lam, last = half_log_snr(alphas, sigmas), None
    for k in range(len(alphas) - 1):
        h, data = lam[k + 1] - lam[k], denoise(x, k)
        r = np.inf if last is None or np.isinf(h) else (lam[k] - lam[k - 1]) / h
        extrapolated = data if last is None else (1 + 1 / (2 * r)) * data - 1 / (2 * r) * last
        x = sigmas[k + 1] / sigmas[k] * x - alphas[k + 1] * np.expm1(-h) * extrapolated
        last = data
    return x


def dpm_2m(denoise: Denoise, x, alphas, sigmas, noises=None):
    """The same with the noise (DPM-Solver 2M), extrapolated to the middle of the step."""
    lam, last = half_log_snr(alphas, sigmas), None
    for k in range(len(alphas) - 1):
        h, eps = lam[k + 1] - lam[k], noise_of(x, denoise(x, k), alphas[k], sigmas[k])
        r = np.inf if last is None else (lam[k] - lam[k - 1]) / h
        extrapolated = eps if last is None else eps + (eps - last) / (2 * r)
        x = alphas[k + 1] / alphas[k] * x - sigmas[k + 1] * np.expm1(h) * extrapolated
        last = eps
    return x


def dpmpp_3m_published(denoise: Denoise, x, alphas, sigmas, noises=None):
    """The multistep third-order update as published: order 2, its second difference lacks a factor 2."""
    lam, history = half_log_snr(alphas, sigmas), []
    for k in range(len(alphas) - 1):
        h, data = lam[k + 1] - lam[k], denoise(x, k)
        phi1, phi2 = np.expm1(-h), np.expm1(-h) / h + 1
        x = sigmas[k + 1] / sigmas[k] * x - alphas[k + 1] * phi1 * data
        if len(history) == 1:
            slope = (data - history[-1]) / ((lam[k] - lam[k - 1]) / h)
            x = x - 0.5 * alphas[k + 1] * phi1 * slope
        elif len(history) > 1:
            r0, r1 = (lam[k] - lam[k - 1]) / h, (lam[k - 1] - lam[k - 2]) / h
            d0, d1 = (data - history[-1]) / r0, (history[-1] - history[-2]) / r1
            slope, bend = d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)
            x = x + alphas[k + 1] * phi2 * slope - alphas[k + 1] * (phi2 / h - 0.5) * bend
        history.append(data)
    return x


def sde_dpmpp_2m(denoise: Denoise, x, alphas, sigmas, noises, eta=1.0):
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, eq. 18 family): noise level tau^2 = eta, midpoint rule."""
    lam, last = half_log_snr(alphas, sigmas), None
    for k in range(len(alphas) - 1):
        h, data = lam[k + 1] - lam[k], denoise(x, k)
        gain = -alphas[k + 1] * np.expm1(-(1 + eta) * h)
        x = sigmas[k + 1] / sigmas[k] * np.exp(-eta * h) * x + gain * data
        if last is not None and np.isfinite(h):
            x = x + 0.5 * gain * h / (lam[k] - lam[k - 1]) * (data - last)
        x = x + sigmas[k + 1] * np.sqrt(-np.expm1(-2 * eta * h)) * noises[k]
        last = data
    return x


# UniPC (Zhao et al. 2023), data prediction


def unipc(denoise: Denoise, x, alphas, sigmas, noises=None, order=2, variant="bh2"):
    """UniPC-p: predictor UniP-p, corrector UniC-p re-using its call; warm-up; the last step uncorrected."""
    lam, outputs = half_log_snr(alphas, sigmas), [denoise(x, 0)]
    last = len(alphas) - 1
    for k in range(last):
        h, p = lam[k + 1] - lam[k], min(order, k + 1)
        unit = np.expm1(-h)
        b_h = -h if variant == "bh1" else unit
        ratios = [(lam[k - j] - lam[k]) / h for j in range(1, p)]
        slopes = [(outputs[k - j] - outputs[k]) / r for j, r in zip(range(1, p), ratios, strict=True)]
        linear = sigmas[k + 1] / sigmas[k] * x - alphas[k + 1] * unit * outputs[k]
        weights = [0.5] if p == 2 else unipc_weights(ratios, h, b_h)
        x = linear - alphas[k + 1] * b_h * sum(w * d for w, d in zip(weights, slopes, strict=True))
        if k + 1 == last:
            break
        outputs.append(denoise(x, k + 1))
        slopes.append(outputs[k + 1] - outputs[k])
        weights = [0.5] if p == 1 else unipc_weights([*ratios, 1.0], h, b_h)
        x = linear - alphas[k + 1] * b_h * sum(w * d for w, d in zip(weights, slopes, strict=True))
    return x


def unipc_weights(ratios, h, b_h):
    """rho of R(h) rho B(h) = phi(h), rows r^(m-1) and right sides m! h phi_{m+1}(-h) (UniPC, eq. 8 and 9)."""
    matrix, right, phi = [], [], np.expm1(-h)
    factorial = 1
    for m in range(1, len(ratios) + 1):
        phi = phi / -h - 1 / factorial
        factorial *= m + 1
        matrix.append([r ** (m - 1) for r in ratios])
        right.append(phi * (factorial / (m + 1)) / b_h)
    return list(np.linalg.solve(np.array(matrix), np.array(right))) if ratios else []


# Adams methods


def adams_weights(start, end, nodes: Sequence[float], *, predicts="data", tau=0.0, clock=None) -> list[float]:
    """Exact exponential weights: int W(lam) L_j(u(lam)) dlam over [start, end] by 30-digit quadrature.

    W = (1 + tau^2) exp(-(1 + tau^2)(end - lam)) for data (times alpha_end in the step), and W = (1 + tau^2)
    exp(end - lam) for noise (times -sigma_end). L_j are Lagrange's polynomials on `nodes` (values of lam) in
    the variable u = clock(lam), lam itself unless given.
    """
    u = clock or (lambda lam: lam)
    with mp.workdps(30):
        start, end, a = mp.mpf(float(start)), mp.mpf(float(end)), 1 + mp.mpf(tau) ** 2
        points = [u(mp.mpf(float(node))) for node in nodes]
        rate = -a if predicts == "data" else mp.mpf(1)

        def weight(j):
            def integrand(lam):
                value = a * mp.exp(rate * (end - lam))
                for i, point in enumerate(points):
                    if i != j:
                        value *= (u(lam) - point) / (points[j] - point)
                return value

            return float(mp.quad(integrand, mp.linspace(start, end, 3)))

        return [weight(j) for j in range(len(points))]


def adams(
    denoise: Denoise,
    x,
    alphas,
    sigmas,
    noises=None,
    order=2,
    corrector=0,
    predicts="data",
    tau=0.0,
    clock=None,
):
    """Exponential Adams-Bashforth of an order, warming up; `corrector` = c adds Adams-Moulton, PEC.

    The corrector re-uses the predictor's evaluation and is left out in the last step. predicts "data"
    (DPM-Solver++, UniPC, SA-Solver with its tau) or "noise" (DPM-Solver, DEIS; SEEDS with tau = 1); clock:
    kappa = exp(-lam) with the noise gives DEIS's rho-AB (LMS), lam gives the multistep family.
    """
    lam = half_log_snr(alphas, sigmas)

    def remembered(state, k):
        data = denoise(state, k)
        return data if predicts == "data" else noise_of(state, data, alphas[k], sigmas[k])

    def step(base, k, nodes, outputs):
        at = [lam[n] for n in nodes]
        weights = adams_weights(lam[k], lam[k + 1], at, predicts=predicts, tau=tau, clock=clock)
        total = sum(w * outputs[n] for w, n in zip(weights, nodes, strict=True))
        return base + (alphas[k + 1] if predicts == "data" else -sigmas[k + 1]) * total

    outputs, last = {0: remembered(x, 0)}, len(alphas) - 1
    for k in range(last):
        h = lam[k + 1] - lam[k]
        if predicts == "data":
            base = sigmas[k + 1] / sigmas[k] * np.exp(-(tau**2) * h) * x
            spread = sigmas[k + 1] * np.sqrt(-np.expm1(-2 * tau**2 * h))
        else:
            base = alphas[k + 1] / alphas[k] * x
            spread = sigmas[k + 1] * np.sqrt(tau**2 * np.expm1(2 * h))
        if tau:
            base = base + spread * noises[k]
        x = step(base, k, range(k, max(k - order, -1), -1), outputs)
        if k + 1 == last:
            break
        outputs[k + 1] = remembered(x, k + 1)
        if corrector:
            x = step(base, k, range(k + 1, max(k + 1 - corrector, -1), -1), outputs)
    return x


def ipndm(denoise: Denoise, x, alphas, sigmas, noises=None, order=4):
    """Zhang and Chen 2023 after Liu et al. 2022: constant Adams weights on the noise, DDIM's transfer."""
    weights = {
        1: [1],
        2: [3 / 2, -1 / 2],
        3: [23 / 12, -16 / 12, 5 / 12],
        4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    }
    history = []
    for k in range(len(alphas) - 1):
        history.insert(0, noise_of(x, denoise(x, k), alphas[k], sigmas[k]))
        eps = sum(w * e for w, e in zip(weights[min(order, k + 1)], history, strict=False))
        x = alphas[k + 1] / alphas[k] * (x - sigmas[k] * eps) + sigmas[k + 1] * eps
    return x


# Integrated rates in high precision


def linear_B(t, beta_min, beta_max):
    """int_0^t beta_min + s (beta_max - beta_min) ds."""
    t, low, high = mp.mpf(t), mp.mpf(beta_min), mp.mpf(beta_max)
    return low * t + (high - low) * t**2 / 2


def cosine_B(t, s, log_snr_min):
    """-log of cos^2(u(t))/cos^2(u(0)), u from s/(1 + s) pi/2 to where the log-SNR is log_snr_min."""
    start = mp.mpf(s) / (1 + mp.mpf(s)) * mp.pi / 2
    alpha_bar = 1 / (1 + mp.exp(-mp.mpf(log_snr_min)))
    end = mp.acos(mp.cos(start) * mp.sqrt(alpha_bar))
    return -2 * mp.log(mp.cos(start + mp.mpf(t) * (end - start)) / mp.cos(start))


def sigmoid_B(t, start, end, tau, log_snr_min):
    """-log alpha_bar, 1 - alpha_bar proportional to the sigmoid's rise, scaled to log_snr_min at t = 1."""

    def rise(time):
        low, high = mp.mpf(start) / mp.mpf(tau), mp.mpf(end) / mp.mpf(tau)
        return 1 / (1 + mp.exp(-(low + mp.mpf(time) * (high - low)))) - 1 / (1 + mp.exp(-low))

    noise = 1 / (1 + mp.exp(mp.mpf(log_snr_min)))
    return -mp.log(1 - noise * rise(t) / rise(1))


def tabulated_B(t, nodes):
    """Hermite cubic through the nodes (at the floats i/N), slopes harmonic inside, three-point at ends."""
    n = len(nodes) - 1
    values, t = [mp.mpf(v) for v in nodes], mp.mpf(t)
    rises = [b - a for a, b in itertools.pairwise(values)]

    def end_slope(near, far):
        return max((3 * near - far) / 2, near / 10)

    slopes = [2 / (1 / a + 1 / b) for a, b in itertools.pairwise(rises)]
    first = end_slope(rises[0], rises[1]) if n > 1 else rises[0]
    final = end_slope(rises[-1], rises[-2]) if n > 1 else rises[0]
    slopes = [first, *slopes, final]
    i = max(j for j in range(n) if t >= j / n)
    s = (t - mp.mpf(i / n)) * n
    return (
        (1 + 2 * s) * (1 - s) ** 2 * values[i]
        + s * (1 - s) ** 2 * slopes[i]
        + s**2 * (3 - 2 * s) * values[i + 1]
        + s**2 * (s - 1) * slopes[i + 1]
    )


def learned_B(t, log_snr_max, log_snr_min, linear, weight, slope, center):
    """log(1 + exp(-log_snr)), log_snr along e^linear t + sum e^weight sigmoid(e^slope (t - center))."""

    def curve(time):
        bumps = zip(weight, slope, center, strict=True)
        return mp.exp(mp.mpf(linear)) * time + sum(
            mp.exp(mp.mpf(w)) / (1 + mp.exp(-mp.exp(mp.mpf(s)) * (time - mp.mpf(c)))) for w, s, c in bumps
        )

    share = (curve(mp.mpf(t)) - curve(mp.mpf(0))) / (curve(mp.mpf(1)) - curve(mp.mpf(0)))
    log_snr = mp.mpf(log_snr_max) + (mp.mpf(log_snr_min) - mp.mpf(log_snr_max)) * share
    return mp.log(1 + mp.exp(-log_snr))

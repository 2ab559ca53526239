"""The mix: the gradient of each mode, against plain autograd and the paper's algorithm."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignprop_core.config.rewards import MixConfig
from alignprop_core.errors import RewardError
from alignprop_core.mix import stats as stats_module
from alignprop_core.mix.conflicts import project_conflicts
from alignprop_core.mix.mix import Mix
from alignprop_core.mix.running import Running
from alignprop_core.mix.stats import StepStats
from alignprop_core.mix.term import Term
from alignprop_core.reward import ImageBatch, Reward
from tests.support.toy_rewards import BatchMean, NoGradient, Redness, RednessConfig


class Contrast(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images.flatten(1).std(1)


class Darkness(Reward):
    """Conflicts with redness where red makes an image bright."""

    def score(self, batch: ImageBatch) -> Tensor:
        return -(batch.images**2).flatten(1).mean(1)


def batch(size: int = 4, seed: int = 0) -> ImageBatch:
    images = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ImageBatch(images=images, prompts=["x"] * size, metadata=[{}] * size)


def equal(size: int = 4) -> Tensor:
    return torch.full((size,), 1 / size, dtype=torch.float64)


def terms(gain: float = 1000.0) -> list[Term]:
    return [
        Term("redness", Redness(RednessConfig(gain=gain)), weight=0.7),
        Term("contrast", Contrast(), weight=-2.0),
        Term("darkness", Darkness(), weight=1.5),
    ]


def learned(mix: Mix, size: int = 4, seed: int = 0) -> Mix:
    """Update a mix with the statistics of one step."""
    mix.update(mix.gradient(batch(size, seed), equal(size), pullback=lambda gradient: gradient)[1])
    return mix


def of_each_sample(mix: Mix, whole: ImageBatch, shares: Tensor) -> list[StepStats]:
    """Return the statistics of every sample on its own."""
    return [
        mix.gradient(whole[i : i + 1], shares[i : i + 1], pullback=lambda gradient: gradient)[1]
        for i in range(len(whole))
    ]


MODES: list[dict[str, Any]] = [
    {"combine": "sum"},
    {"combine": "normalized"},
    {"combine": "balanced"},
    {"combine": "pcgrad"},
]
ALL = [*MODES, {"combine": "balanced", "balance_at": "latent"}, {"combine": "pcgrad", "balance_at": "latent"}]
ALL += [{"combine": "balanced", "per_sample": True}]


def name_of(mode: dict[str, Any]) -> str:
    return "-".join(str(value) for value in mode.values())


# -- the gradient is that of the logged total ----------------------------------------------------------------


def test_gradient_is_the_gradient_of_the_logged_weighted_total() -> None:
    limited = [
        Term("redness", Redness(RednessConfig(gain=1000.0)), weight=0.7, ceiling=20.0),
        Term("contrast", Contrast(), weight=-2.0),
    ]
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mix = Mix(limited)
    gradient, _ = mix.gradient(batch(), shares)
    images = batch().images.requires_grad_()
    leaf = ImageBatch(images=images, prompts=["x"] * 4, metadata=[{}] * 4)
    redness, contrast = (term.reward(leaf) for term in limited)
    total = 0.7 * redness.clamp(max=20.0) - 2.0 * contrast
    (shares * total).sum().backward()
    torch.testing.assert_close(gradient, images.grad)
    for stats, expected in zip(of_each_sample(mix, batch(), shares), total.tolist(), strict=True):
        assert stats.total == pytest.approx(expected, rel=1e-12)
        weighted = [term["weighted"] for term in stats.terms.values()]
        assert sum(value or 0.0 for value in weighted) == pytest.approx(stats.total, rel=1e-12)
    assert (redness > 20).any(), "the ceiling is tried"
    assert (redness < 20).any(), "and so is what lies below it"


@pytest.mark.parametrize("mode", [mode for mode in ALL if mode["combine"] != "pcgrad"], ids=name_of)
def test_the_gradient_is_that_of_the_logged_total_in_every_mode_that_has_one(mode: dict[str, Any]) -> None:
    mix = learned(Mix(terms(), MixConfig(**mode)), seed=1)
    gradient, logged = mix.gradient(batch(), equal(), pullback=lambda gradient: gradient)
    images = batch().images.requires_grad_()
    leaf = ImageBatch(images=images, prompts=["x"] * 4, metadata=[{}] * 4)
    scores = {term.label: term.reward(leaf) for term in mix.terms}
    each = of_each_sample(mix, batch(), equal())
    factors = {
        label: torch.tensor([stats.terms[label]["weighted"] for stats in each], dtype=torch.float64)
        / scores[label].detach()
        for label in mix.labels
    }
    total = sum(factors[label] * scores[label] for label in mix.labels)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total.detach(), torch.tensor([stats.total for stats in each], dtype=torch.float64))
    (equal() * total).sum().backward()
    torch.testing.assert_close(gradient, images.grad)
    assert logged.total == pytest.approx(float(total.detach().mean()))
    for label in mix.labels:
        assert logged.terms[label]["factor"] == pytest.approx(float(factors[label].mean()))
        assert logged.terms[label]["weighted"] == pytest.approx(float((factors[label] * scores[label]).detach().mean()))


def test_normalized_divides_by_the_std_and_balanced_by_the_gradient_norm() -> None:
    once = batch(8)
    scores = {term.label: term.reward(once) for term in terms()}
    normalized = learned(Mix(terms(), MixConfig(combine="normalized")), 8).factors()
    balanced = learned(Mix(terms(), MixConfig(combine="balanced")), 8).factors()
    for i, term in enumerate(terms()):
        images = once.images.clone().requires_grad_()
        term.reward(ImageBatch(images=images)).mean().backward()
        assert images.grad is not None
        weight = term.weight_at(0)
        assert normalized[i] == pytest.approx(weight / float(scores[term.label].std(correction=0)))
        assert balanced[i] == pytest.approx(weight / float(images.grad.norm()))


# -- what the modes promise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=name_of)
def test_with_one_term_every_mode_gives_the_gradient_of_sum(mode: dict[str, Any]) -> None:
    plain = Mix(terms()[:1]).gradient(batch(), equal())[0]
    found = learned(Mix(terms()[:1], MixConfig(**mode)), seed=1).gradient(batch(), equal())[0]
    ratio = found.norm() / plain.norm()
    torch.testing.assert_close(found, plain * ratio)


def test_per_sample_scales_every_image_to_the_same_gradient_norm() -> None:
    mix = learned(Mix(terms()[2:], MixConfig(combine="balanced", per_sample=True)))
    norms = mix.gradient(batch(), equal())[0].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1.5 / 2))  # weight / sqrt(4 images)
    assert Mix(terms()[2:]).gradient(batch(), equal())[0].flatten(1).norm(dim=1).std() > 1e-4


@pytest.mark.parametrize("combine", ["normalized", "balanced", "pcgrad"])
def test_gradient_does_not_depend_on_the_units_of_scores(combine: str) -> None:
    config = MixConfig.model_validate({"combine": combine})
    large, small = (learned(Mix(terms(gain), config)).gradient(batch(), equal())[0] for gain in (1000.0, 1.0))
    torch.testing.assert_close(large, small)
    plain = [Mix(terms(gain)).gradient(batch(), equal())[0] for gain in (1000.0, 1.0)]
    assert torch.cosine_similarity(plain[0].flatten(), plain[1].flatten(), dim=0) < 0.9, "under sum they do"


def test_balanced_gradient_shares_are_the_weights() -> None:
    two = [Term("redness", Redness(RednessConfig(gain=1000.0))), Term("contrast", Contrast(), weight=3.0)]
    mix = learned(Mix(two, MixConfig(combine="balanced")))
    norms = [Mix([term]).gradient(batch(), equal())[0].norm() for term in two]
    assert mix.factors()[0] * norms[0] == pytest.approx(1.0)
    assert mix.factors()[1] * norms[1] / 3 == pytest.approx(3.0)


@pytest.mark.parametrize("mode", [mode for mode in ALL if mode["combine"] != "sum"], ids=name_of)
def test_chunks_and_micro_batches_change_nothing(mode: dict[str, Any]) -> None:
    mix = learned(Mix(terms(), MixConfig(**mode)), seed=1)
    micro = learned(Mix(terms(), MixConfig(**mode, reward_batch_size=3)), seed=1)

    def direct(chosen: Mix, part: slice) -> tuple[Tensor, StepStats]:
        return chosen.gradient(batch()[part], equal()[part], pullback=lambda gradient: gradient)

    whole = direct(mix, slice(0, 4))
    parts = [direct(mix, slice(0, 1)), direct(mix, slice(1, 4))]
    torch.testing.assert_close(torch.cat([gradient for gradient, _ in parts]), whole[0])
    torch.testing.assert_close((parts[0][1] + parts[1][1]).sums, whole[1].sums)
    torch.testing.assert_close(direct(micro, slice(0, 4))[0], whole[0])


# -- conflicts --------------------------------------------------------------------------------------------------------


def surgery(gradients: list[Tensor]) -> Tensor:
    """Yu et al. 2020, algorithm 1, for vectors; the other terms in list order, starting after the term itself."""
    total = torch.zeros_like(gradients[0])
    for i, own in enumerate(gradients):
        projected = own.clone()
        for j in [*range(i + 1, len(gradients)), *range(i)]:
            product = projected @ gradients[j]
            if product < 0:
                projected = projected - product / (gradients[j] @ gradients[j]) * gradients[j]
        total = total + projected
    return total


def test_pcgrad_is_the_papers_algorithm_on_the_balanced_gradients() -> None:
    mix = learned(Mix(terms(), MixConfig(combine="pcgrad")), seed=1)
    found = mix.gradient(batch(), equal())[0]
    factors = mix.factors()
    each = [
        factor * Mix([Term(term.label, term.reward)]).gradient(batch(), equal())[0]
        for factor, term in zip(factors, mix.terms, strict=True)
    ]
    for i in range(4):
        expected = surgery([gradient[i].flatten() for gradient in each])
        torch.testing.assert_close(found[i].flatten(), expected)
    cosines = mix.gradient(batch(), equal())[1].cosines
    assert min(value for value in cosines.values() if value is not None) < 0, "there is a conflict to take out"


def test_pcgrad_of_two_terms_opposes_neither_and_equals_balanced_without_conflict() -> None:
    opposed = [Term("redness", Redness()), Term("pale", Redness(), weight=-0.5), Term("darkness", Darkness())]
    for chosen in (opposed[::2], [Term("a", Redness()), Term("b", Redness(RednessConfig(gain=3.0)))]):
        pcgrad = learned(Mix(chosen, MixConfig(combine="pcgrad"))).gradient(batch(), equal())[0]
        balanced = learned(Mix(chosen, MixConfig(combine="balanced"))).gradient(batch(), equal())[0]
        for term in chosen:
            own = Mix([term]).gradient(batch(), equal())[0]
            assert ((pcgrad * own).flatten(1).sum(1) >= -1e-12).all()
    torch.testing.assert_close(pcgrad, balanced)
    both, stats = learned(Mix(opposed[:2], MixConfig(combine="pcgrad"))).gradient(batch(), equal())
    torch.testing.assert_close(both, torch.zeros_like(both))  # exact opposites leave nothing
    shares = [term["share"] for term in stats.terms.values()]
    assert all(share is None or abs(share) <= 1.5 for share in shares)


def test_projection_of_a_zero_gradient_is_finite() -> None:
    products = torch.zeros(1, 2, 2)
    products[0, 0, 0] = 4.0
    torch.testing.assert_close(project_conflicts(products), torch.eye(2).expand(1, 2, 2))


# -- weights and limits -----------------------------------------------------------------------------------------------


def test_weights_follow_their_schedule() -> None:
    term = Term("x", Redness(), weight={5: 1.0, 25: -1.0, 30: 3.0})
    assert [term.weight_at(step) for step in (0, 5, 10, 15, 25, 29, 30, 1000)] == [1, 1, 0.5, 0, -1, 2.2, 3, 3]
    direction = [Mix([term]).gradient(batch(), equal(), step=step)[0] for step in (5, 15, 25)]
    torch.testing.assert_close(direction[0], -direction[2])
    assert not direction[1].any()


@pytest.mark.parametrize(
    "limits",
    [{}, {"ceiling": 0.1}, {"floor": 0.0}, {"floor": -0.1, "ceiling": 0.1}, {"target": 0.05}],
    ids=lambda limits: "-".join(limits) or "none",
)
def test_clipped_scores_and_their_derivative(limits: dict[str, float]) -> None:
    scores = torch.linspace(-0.3, 0.3, 14, dtype=torch.float64, requires_grad=True)
    clipped, slope = Term("x", Redness(), **limits).clipped(scores)  # type: ignore[arg-type]
    if "target" in limits:
        expected = -(scores - limits["target"]).abs()
    else:
        expected = scores.clamp(limits.get("floor"), limits.get("ceiling")) if limits else scores
    torch.testing.assert_close(clipped, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), scores)[0])


def test_a_target_excludes_a_ceiling() -> None:
    with pytest.raises(ValueError, match="a target excludes"):
        Term("x", Redness(), target=1.0, ceiling=2.0)


def test_a_ceiling_does_not_increase_the_factor_of_a_term() -> None:
    """The running norm is the raw score's: saturated samples do not change the factor of the others."""
    free = [Term("redness", Redness()), Term("contrast", Contrast())]
    held = [Term("redness", Redness(), ceiling=0.0), free[1]]
    factors = [learned(Mix(chosen, MixConfig(combine="balanced"))).factors() for chosen in (free, held)]
    assert factors[0] == pytest.approx(factors[1])


# -- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=name_of)
def test_statistics_equal_their_definitions(mode: dict[str, Any]) -> None:
    chosen = [*terms()[:2], Term("darkness", Darkness(), weight=1.5, ceiling=-0.33)]
    mix = learned(Mix(chosen, MixConfig(**mode)))
    found, logged = mix.gradient(batch(), equal())
    alone = [Mix([Term(t.label, t.reward, ceiling=t.ceiling)]).gradient(batch(), equal())[0] for t in chosen]
    for term, gradient in zip(chosen, alone, strict=True):
        assert logged.terms[term.label]["grad_norm"] == pytest.approx(float(gradient.norm()))
    assert logged.cosines["redness | contrast"] == pytest.approx(
        float(torch.cosine_similarity(alone[0].flatten(), alone[1].flatten(), dim=0))
    )
    shares = [term["share"] or 0.0 for term in logged.terms.values()]
    assert sum(shares) == pytest.approx(1.0)
    if mode["combine"] != "pcgrad":
        whole = found.flatten()
        for share, factor, gradient in zip(shares, mix.factors(), alone, strict=True):
            assert share == pytest.approx(float(factor * gradient.flatten() @ whole / (whole @ whole)))
    assert 0 < (logged.terms["darkness"]["saturated"] or 0) < 1
    assert logged.images == 4
    assert json.loads(json.dumps(logged.terms)) == logged.terms


def test_a_step_without_a_gradient_reports_why() -> None:
    low = Mix([Term("redness", Redness(), ceiling=-9.0), Term("contrast", Contrast(), weight=-1.0, floor=9.0)])
    found, logged = low.gradient(batch(), equal())
    assert not found.any()
    assert not logged.moving
    assert logged.terms["redness"]["share"] is None
    assert logged.cosines["redness | contrast"] is None
    assert "at the ceiling, floor or target" in low.why_idle(0, logged)
    later = Mix([Term("redness", Redness(), weight={0: 0.0, 5: 1.0})])
    assert "weight is 0" in later.why_idle(0, logged)
    normalized = Mix(terms(), MixConfig(combine="normalized"))
    assert "no term has a nonzero standard deviation" in normalized.why_idle(0, logged)


# -- running statistics ---------------------------------------------------------------------------------------------


def test_running_statistics_decay_and_are_unbiased_from_the_first_step() -> None:
    running = Running()
    assert (running.std, running.gradient) == (0.0, 0.0)
    running.add(2.0, 5.0, 9.0, 0.9)
    assert running.std == pytest.approx(1.0)
    assert running.gradient == pytest.approx(3.0)
    running.add(2.0, 5.0, 25.0, 0.9)
    assert running.gradient == pytest.approx(((0.9 * 9 + 25) / 1.9) ** 0.5)
    before = running.as_json()
    running.add(float("nan"), 5.0, 9.0, 0.9)
    assert running.as_json() == before
    assert Running.from_json(json.loads(json.dumps(before))) == running


def test_one_outlier_gradient_does_not_suppress_a_term() -> None:
    mix = Mix(terms()[:1], MixConfig(combine="balanced"))
    running = mix.running["redness"]
    for size in (1.0, 1.0, 300.0, *[1.0] * 30):
        running.add(0.0, 1.0, size**2, 0.9)
    assert mix.factors() == pytest.approx([0.7], rel=0.35)  # 1/300 of it before outliers were limited


def test_a_gradient_that_stays_large_enters_the_running_statistics() -> None:
    mix = Mix(terms()[:1], MixConfig(combine="balanced"))
    running = mix.running["redness"]
    for size in (1.0, 1.0, 300.0, 300.0):
        running.add(0.0, 1.0, size**2, 0.9)
    assert mix.factors()[0] < 0.7 / 100
    assert Running.from_json(json.loads(json.dumps(running.as_json()))) == running


def test_a_vanishing_gradient_is_scaled_up_only_to_the_scale_floor() -> None:
    mix = Mix(terms()[:1], MixConfig(combine="balanced", decay=0.0, scale_floor=0.25))
    running = mix.running["redness"]
    running.add(0.0, 1.0, 16.0, 0.0)
    assert mix.factors() == pytest.approx([0.7 / 4])
    running.add(0.0, 1.0, 1e-8, 0.0)
    assert mix.factors() == pytest.approx([0.7 / (0.25 * 4)])


def test_state_survives_json_exactly() -> None:
    mix = learned(Mix(terms(), MixConfig(combine="balanced")))
    other = Mix(terms(), MixConfig(combine="balanced"))
    assert other.needs_calibration
    other.load_state(json.loads(json.dumps(mix.state())))
    assert not other.needs_calibration
    assert other.factors() == mix.factors()


def test_sums_do_not_overlap() -> None:
    stats = StepStats.zeros(("a", "b"), torch.device("cpu"))
    views = [stats[name] for name in stats_module._SCALARS]
    views += [stats[name] for name in stats_module._PER_TERM]
    for number, view in enumerate([*views, stats["gram"]], start=1):
        view.add_(number)
    assert (stats.sums != 0).all()
    for number, view in enumerate([*views, stats["gram"]], start=1):
        assert (view == number).all(), "no two overlap"


def test_regularization_is_logged_per_sample_and_not_per_lv_image() -> None:
    stats = StepStats.zeros(("a",), torch.device("cpu"))
    stats["images"] = 6
    stats["samples"] = 2
    stats["regularization"] = 8.0
    assert stats.regularization == 4.0


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_gradient_of_a_sample_does_not_depend_on_its_neighbours() -> None:
    for mode in MODES:
        mix = learned(Mix(terms(), MixConfig(**mode)))
        whole = mix.gradient(batch(), equal())[0]
        alone = mix.gradient(batch()[1:2], equal()[1:2])[0]
        torch.testing.assert_close(whole[1:2], alone)


def test_errors_name_the_broken_reward() -> None:
    with pytest.raises(RewardError, match='"mine" returned shape'):
        Mix([Term("mine", BatchMean())]).gradient(batch(), torch.ones(4))
    with pytest.raises(RewardError, match='"mine" returned scores without a gradient'):
        Mix([Term("mine", NoGradient())]).gradient(batch(), torch.ones(4))


class _Halts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise FloatingPointError("no way back")


class HaltsOnTheWayBack(Redness):
    def score(self, batch: ImageBatch) -> Tensor:
        halted: Tensor = _Halts.apply(super().score(batch))
        return halted


class OutOfMemory(Redness):
    def score(self, batch: ImageBatch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_errors_in_the_backward_pass_and_out_of_memory_name_the_reward() -> None:
    with pytest.raises(RewardError, match='"mine" raised in its backward pass FloatingPointError: no way back'):
        Mix([Term("mine", HaltsOnTheWayBack())]).gradient(batch(), equal())
    with pytest.raises(RewardError, match=r'"mine" ran out of memory.*mix\.reward_batch_size'):
        Mix([Term("mine", OutOfMemory())]).gradient(batch(), equal())


class Linear(Redness):
    def __init__(self, config: RednessConfig | None = None) -> None:
        super().__init__(config)
        self.layer = torch.nn.Linear(64, 1)
        self.register_buffer("shift", torch.ones(1))

    def score(self, batch: ImageBatch) -> Tensor:
        scores: Tensor = self.layer(batch.images.mean(1).flatten(1))[:, 0] + self.shift
        return scores


@pytest.mark.gpu
def test_offloaded_rewards_give_the_same_result_and_leave_the_gpu() -> None:
    reward = Linear().freeze()
    images = batch().images.float().cuda()
    on_gpu = ImageBatch(images=images)
    shares = equal().cuda()
    plain = Mix([Term("x", Linear().freeze())])
    plain.terms[0].reward.load_state_dict(reward.state_dict())
    expected, logged = plain.to("cuda").gradient(on_gpu, shares)
    mix = Mix([Term("x", reward)], MixConfig(offload=True)).to("cuda")
    for _ in range(2):
        assert all(tensor.device.type == "cpu" for tensor in reward.state_dict().values())
        found, stats = mix.gradient(on_gpu, shares)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(stats["raw"], logged["raw"])


def test_balancing_at_the_image_runs_the_same_operations_as_sum() -> None:
    """It costs no more than `sum`: the same operations with other factors."""
    found = {}
    for mode in ("sum", "normalized", "balanced"):
        mix = learned(Mix(terms(), MixConfig(combine=mode)))
        with Operations() as operations:
            mix.gradient(batch(), equal())
        found[mode] = operations.names
    assert found["balanced"] == found["sum"]
    assert found["normalized"] == found["sum"]
    assert len(found["sum"]) > 50


class Operations(TorchDispatchMode):
    """Records the tensor operations that reach a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_offload_on_a_cpu_changes_nothing() -> None:
    mix = Mix([Term("x", Linear().freeze())], MixConfig(offload=True)).to("cpu")
    assert mix.terms[0].offload is None


def test_rewards_stay_frozen_and_in_eval_mode() -> None:
    class WithWeights(Redness):
        def __init__(self, config: RednessConfig | None = None) -> None:
            super().__init__(config)
            self.layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())

    reward = WithWeights().freeze()
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.train().layer.training


def test_image_batch_is_sliceable_and_validates_its_input() -> None:
    whole = batch()
    assert len(whole[1:3]) == 2
    assert whole[1:3].prompts == ["x", "x"]
    assert ImageBatch(images=whole.images).prompts == ("",) * 4
    for bad in (torch.rand(3, 8, 8), torch.rand(2, 4, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images must be"):
            ImageBatch(images=bad)
    with pytest.raises(ValueError, match="4 images but 1 prompts"):
        ImageBatch(images=whole.images, prompts=["x"])
    with pytest.raises(TypeError, match="slices"):
        whole[0]  # type: ignore[index]

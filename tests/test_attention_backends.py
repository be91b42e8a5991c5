"""Class scores beside attention of any make, and which backend runs when."""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xray import ops
from xray_kernels import _library, testing
from xray_kernels.attention import backends, reference
from xray_kernels.attention import ops as kernels
from xray_kernels.attention.samples import samples
from xray_kernels.attention.spec import SPECS

PLAIN, SCORES = SPECS[:2]
SHORT_TYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLEMENTATIONS = testing.implementations("cpu")


@pytest.mark.parametrize("dtype", SHORT_TYPES, ids=str)
@pytest.mark.parametrize("case", list(SCORES.cases), ids=lambda case: case.name)
def test_scores_over_sdpa_within_rule(case: testing.Case, dtype: torch.dtype) -> None:
    """Output, scores and all gradients, by every implementation of the class-row kernels."""
    inputs = case.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    oracle = testing.results(SCORES.composition, testing.convert(inputs, torch.float64))
    yardstick = testing.results(SCORES.composition, inputs)
    for name in IMPLEMENTATIONS:
        with testing.use_implementation(name):
            actual = testing.results(SCORES.function, {**inputs, "backend": "sdpa"})
        testing.assert_within_rule(actual, yardstick, oracle, what=f"sdpa [{name}] {case.name} {dtype}")


@pytest.mark.parametrize("case", list(PLAIN.cases), ids=lambda case: case.name)
def test_sdpa_means_the_same(case: testing.Case) -> None:
    inputs = case.make(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    oracle = testing.results(PLAIN.composition, testing.convert(inputs, torch.float64))
    actual = testing.results(PLAIN.function, {**inputs, "backend": "sdpa"})
    testing.assert_within_rule(actual, testing.results(PLAIN.composition, inputs), oracle, what=f"sdpa {case.name}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bounds", [None, [0, 0, 5, 6, 6, 20, 20]], ids=["dense", "packed"])
def test_class_scores_and_their_gradient(implementation: str, bounds: list[int] | None) -> None:
    """The class-row ops against the reference in float64; what they add to stays untouched elsewhere."""
    batch = 1 if bounds else 3
    query, key = (torch.randn(batch, 2, 20, 72) for _ in range(2))
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    arguments = (0.3, 2, None, cu_seqlens, 20)
    with testing.use_implementation(implementation):
        scores, row = kernels.class_scores(query, key, *arguments)
        wanted_scores, wanted_row = reference.class_scores(query.double(), key.double(), *arguments)
        torch.testing.assert_close(scores.double(), wanted_scores, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(row.double(), wanted_row, rtol=1e-5, atol=1e-6)
        grad = torch.randn(scores.shape)
        grads = [torch.randn(query.shape), torch.randn(20, 2, batch, 72).permute(2, 1, 0, 3)]
        before = [x.clone() for x in grads]
        wanted = [x.double() for x in grads]
        kernels.class_scores_backward(grad, query, key, row, 0.3, 2, cu_seqlens, 20, *grads)
        reference.class_scores_backward(
            grad.double(), query.double(), key.double(), wanted_row, 0.3, 2, cu_seqlens, 20, *wanted
        )
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    classes = [0] if bounds is None else [0, 5, 6]
    others = [i for i in range(20) if i not in classes]
    assert torch.equal(grads[0][:, :, others], before[0][:, :, others])
    assert not torch.equal(grads[0][:, :, classes], before[0][:, :, classes])


def test_masked_keys_may_hold_anything() -> None:
    """NaN past a row's length reaches neither the scores nor the gradients, alone and over SDPA's backward."""
    query, key = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    key[1, :, 4:] = float("nan")
    scores, row = kernels.class_scores(query, key, 0.25, 1, torch.tensor([9, 4]), None, 9)
    assert scores.isfinite().all()
    assert torch.equal(scores[1, 3:], torch.zeros(5))
    if _library.implementation("class_scores_backward", "cpu") == "cpu":
        grads = torch.zeros_like(query), torch.zeros_like(key)
        kernels.class_scores_backward(torch.randn(2, 8), query, key, row, 0.25, 1, None, 9, *grads)
        assert all(grad.isfinite().all() for grad in grads)


def test_gradient_of_one_output_only() -> None:
    """The other's gradient arrives as nothing, or broadcast; both ways equal the kernels of this project."""
    inputs = SCORES.cases[1].make(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    for number in (0, 1):
        grads = []
        for backend in ("xray", "sdpa"):
            leaves = [inputs[name].clone().requires_grad_() for name in ("query", "key", "value")]
            out = ops.attention_with_scores(*leaves, backend=backend)[number]
            weight = torch.linspace(0, 1, out.shape[-1])
            grads.append(torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True))
        for first, second in zip(*grads, strict=True):
            zero = torch.zeros_like(inputs["query"])
            torch.testing.assert_close(
                zero if first is None else first, zero if second is None else second, rtol=1e-4, atol=1e-5
            )


def test_second_derivative_over_a_backend_is_refused() -> None:
    query, key, value = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    _, scores = ops.attention_with_scores(query, key, value, backend="sdpa")
    (grad,) = torch.autograd.grad((scores**2).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_scores_over_sdpa_compile() -> None:
    inputs = [torch.randn(2, 2, 12, 16, requires_grad=True) for _ in range(3)]

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, scores = ops.attention_with_scores(query, key, value, backend="sdpa")
        return out.sin().sum() + (scores * torch.arange(11)).sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(step(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


def fake_package(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    if "." not in name:
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setattr(backends, "_missing", lambda backend: None)


def test_xformers_gets_what_its_documentation_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """(B, N, H, D), its own causal bias, our scale; its result comes back as (B, H, N, D), with scores."""

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, *, attn_bias: object, scale: float
    ) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        is_causal = isinstance(attn_bias, LowerTriangularMask)
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale).transpose(1, 2)

    fake_package(
        monkeypatch,
        "xformers.ops",
        memory_efficient_attention=memory_efficient_attention,
        LowerTriangularMask=LowerTriangularMask,
    )
    query, key, value = (torch.randn(2, 3, 12, 16) for _ in range(3))
    choices: list[dict[str, Any]] = [{}, {"is_causal": True}, {"scale": 0.7}]
    for arguments in choices:
        torch.testing.assert_close(
            ops.attention(query, key, value, backend="xformers", **arguments),
            ops.attention(query, key, value, **arguments),
        )
    out, scores = ops.attention_with_scores(query, key, value, backend="xformers")
    for got, want in zip((out, scores), ops.attention_with_scores(query, key, value), strict=True):
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="'xformers' does not take key_lengths; 'xray' and 'sdpa' do"):
        ops.attention(query, key, value, backend="xformers", key_lengths=torch.tensor([3, 12]))
    with pytest.raises(ValueError, match="counts causal positions from the last key"):
        ops.attention(query[:, :, :5], key, value, backend="xformers", is_causal=True)


def test_flash_attn_gets_what_its_documentation_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def flash_attn_func(query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float, causal: bool) -> Tensor:
        calls.append((tuple(query.shape), softmax_scale, causal))
        return query

    fake_package(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    query = torch.randn(2, 3, 12, 16).half()
    out = backends.attention("flash_attn", query, query, query, 0.5, True, None)
    assert torch.equal(out, query)
    assert calls == [((2, 12, 3, 16), 0.5, True)]
    with pytest.raises(ValueError, match="'flash_attn' takes float16 and bfloat16, got torch"):
        backends.attention("flash_attn", query.float(), query.float(), query.float(), 0.5, False, None)
    with pytest.raises(RuntimeError, match="'flash_attn' runs on CUDA devices, but query is on cpu"):
        ops.attention(query, query, query, backend="flash_attn")


def test_absent_packages_and_unknown_backends_are_named() -> None:
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="backend must be auto, xray, sdpa, flash_attn, xformers, got 'flash'"):
        ops.attention(query, query, query, backend="flash")
    for backend, package in (("flash_attn", "flash-attn"), ("xformers", "xformers")):
        if backends._missing(backend):
            with pytest.raises(RuntimeError, match=f"{backend!r} needs {package}, which is not installed"):
                ops.attention(query, query, query, backend=backend)


def test_auto_follows_the_kernels_and_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.float16
    has = _library.implementation("attention", "cpu") != "reference"
    assert backends._fastest("attention", "cpu", None, torch.float32) == ("xray" if has else "sdpa")
    monkeypatch.setattr(_library, "_is_registered", lambda name, key: False)
    assert backends._fastest("attention", "cpu", None, torch.float32) == "sdpa"
    assert backends._fastest("attention", "cpu", None, torch.float64) == "xray"
    assert backends._fastest("attention", "meta", None, half) == "xray"
    with testing.use_implementation("reference"):
        assert backends._fastest("attention", "cpu", None, torch.float32) == "xray"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "fast GPU")
    table = {"fast GPU": {"attention": {"float16": "sdpa", "bfloat16": "flash_attn", "float32": "triton"}}}
    monkeypatch.setattr(_library, "measured_table", lambda: table)
    monkeypatch.setattr(_library, "_is_registered", lambda name, key: True)
    monkeypatch.setattr(backends, "_missing", lambda backend: "flash-attn" if backend == "flash_attn" else None)
    assert backends._fastest("attention", "cuda", 0, half) == "sdpa"
    assert backends._fastest("attention", "cuda", 0, torch.float32) == "xray"
    assert backends._fastest("attention", "cuda", 0, torch.bfloat16) == "xray", "measured, but not installed here"
    monkeypatch.setitem(_library._DECIDED, ("attention", torch.float32, 0), ("reference", lambda: None))
    assert backends._fastest("attention", "cuda", 0, torch.float32) == "sdpa", "the kernel failed its check here"


@pytest.mark.skipif("_cpu" not in _library.LOADED, reason="_cpu is not built")
@pytest.mark.parametrize("is_right", [True, False])
def test_tiles_are_compared_before_they_are_used(is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with AMX: whatever stands for it here is right, or is off by a hundredth."""
    monkeypatch.setattr(_library, "cpu_capabilities", lambda: list(_library.CAPABILITIES))
    levels: list[int] = []
    monkeypatch.setattr(torch.ops.xray_kernels, "cpu_capability_set", levels.append)
    if is_right:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _library.check_tiles(samples, "attention_with_scores", "attention_backward")
        assert levels == []
        return
    wrong = lambda *args: tuple(x * 1.05 for x in reference.attention_backward(*args))  # noqa: E731
    monkeypatch.setitem(_library.REFERENCES, "attention_backward", wrong)
    with pytest.warns(RuntimeWarning, match="the AMX kernel of attention_backward disagrees .* so AVX-512 is used"):
        _library.check_tiles(samples, "attention_with_scores", "attention_backward")
    assert levels == [2]

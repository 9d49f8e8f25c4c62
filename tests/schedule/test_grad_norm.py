"""Squared norms are right for every size, dtype and layout, where torch's own float32 norm is not."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_adams import as_real64
from torch.nn import Parameter

from hf_swd import AdamS
from hf_swd.core.grad_norm import squared_norms


LARGE = 25_000_000  # BERT's word embeddings have 23 million elements


@pytest.fixture(autouse=True)
def as_in_a_step() -> Iterator[None]:
    """Without gradients of gradients."""
    with torch.no_grad():
        yield


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True)


def exact(tensor: torch.Tensor) -> float:
    """Squared norm by float64 arithmetic, in pieces short enough for any rounding to vanish."""
    if tensor.numel() < 1 << 20:
        return as_real64(tensor).square().sum().item()
    return math.fsum(as_real64(piece).square().sum().item() for piece in tensor.flatten().split(1 << 16))


def relative_error(tensor: torch.Tensor) -> float:
    (actual,) = squared_norms([tensor]).tolist()
    expected = exact(tensor)
    return abs(actual / expected - 1) if expected else abs(actual)


SIZES = [(), (0,), (1,), ((1 << 14) - 1,), (1 << 14,), ((1 << 14) + 1,), ((1 << 15) + 1,), (1_000_007,), (3, 0, 2)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float32, 1e-6),
        (torch.float64, 1e-14),
        (torch.bfloat16, 1e-6),
        (torch.float16, 1e-6),
        (torch.complex64, 1e-6),
        (torch.complex128, 1e-14),
    ],
    ids=["fp32", "fp64", "bf16", "fp16", "complex64", "complex128"],
)
def test_sizes_and_dtypes(shape, dtype, bound):
    assert relative_error(torch.randn(shape, dtype=dtype)) < bound


# Rounding errors of random numbers cancel; those of few-bit numbers, which autocast leaves in float32 gradients, all
# have one sign; those of equal numbers are equal.
CONTENTS = {
    "random": lambda: torch.randn(LARGE),
    "matrix": lambda: torch.randn(LARGE // 1000, 1000),
    "bf16_precision": lambda: torch.randn(LARGE).bfloat16().float(),
    "equal": lambda: torch.full((LARGE,), 1.1e-4),
}


@pytest.mark.parametrize("make", CONTENTS.values(), ids=CONTENTS)
def test_large_float32_is_right_where_torch_is_not(make):
    tensor = make()
    expected = exact(tensor)

    assert relative_error(tensor) < 1e-6
    torchs = [
        torch.linalg.vector_norm(tensor),
        torch._foreach_norm([tensor])[0],
        torch.nn.utils.get_total_norm([tensor]),
    ]
    assert all(abs(norm.double().square().item() / expected - 1) > 1e-4 for norm in torchs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_large_low_precision(dtype):
    assert relative_error(torch.randn(LARGE).to(dtype)) < 1e-6


def test_grad_rms_of_25_million_elements():
    p = Parameter(torch.zeros(LARGE))
    optimizer = AdamS([p], fused=True)
    p.grad = torch.randn(LARGE) * 1e-3
    total = exact(p.grad)

    optimizer.step()

    # At the first step v_hat is the squared gradient.
    assert optimizer.grad_rms == pytest.approx(math.sqrt(total / LARGE), rel=1e-5)
    assert torch.linalg.vector_norm(p.grad).item() != pytest.approx(math.sqrt(total), rel=1e-4)


def test_clip_grad_norm_of_25_million_elements():
    p = Parameter(torch.zeros(LARGE))
    optimizer = AdamS([p])
    p.grad = torch.randn(LARGE)
    total = math.sqrt(exact(p.grad))

    norm = optimizer.clip_grad_norm_(1.0)

    assert norm.item() == pytest.approx(total, rel=1e-6)
    assert math.sqrt(exact(p.grad)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("numel", [3, 1 << 14, 200_001])
def test_float16_neither_overflows_nor_underflows(numel):
    random = torch.rand(numel) + 1
    assert relative_error((random * 3e4).half()) < 1e-6
    assert relative_error((random * 3e-6).half()) < 1e-6
    assert relative_error(torch.full((numel,), 6e4, dtype=torch.float16)) < 1e-6


@examples(50)
@given(value=st.floats(1.0, 2.0), numel=st.sampled_from([255, 4096, 4097, 1 << 14, 100_001]))
def test_equal_values_are_the_worst_case(value, numel):
    assert relative_error(torch.full((numel,), value)) < 1e-6


LAYOUTS = {
    "transposed": lambda t: t.t(),
    "every_other_column": lambda t: t[:, ::2],
    "every_other_row": lambda t: t[1::2],
    "column": lambda t: t[:, 3],
    "inner_block": lambda t: t[2:-2, 3:-5],
    "permuted_3d": lambda t: t.view(-1, 2, t.shape[1]).permute(2, 0, 1),
    "expanded": lambda t: t[:1].expand(50, -1),
    "expanded_column": lambda t: t[:, :1].expand(-1, 100),
    "windows": lambda t: t.flatten().unfold(0, 7, 3),
    "diagonal": lambda t: t.diagonal(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=["fp32", "bf16", "complex64"])
@pytest.mark.parametrize("rows", [20, 2000])
def test_layouts(rows, dtype, layout):
    assert (
        relative_error(layout(torch.randn(rows, 100, dtype=dtype))) < 1e-6
    )  # "expanded" ones are full of equal values


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (8, 64, 30, 30)], ids=str)
def test_channels_last(shape):
    assert relative_error(torch.randn(shape).to(memory_format=torch.channels_last)) < 1e-6


@pytest.mark.parametrize(
    "lazy", [torch.conj, lambda t: t.conj().imag, lambda t: t.imag._neg_view()], ids=["conj", "imag", "neg"]
)
def test_lazily_conjugated_and_negated(lazy):
    assert relative_error(lazy(torch.randn(100, dtype=torch.complex64))) < 1e-6


def test_thousands_of_tensors_keep_their_order():
    tensors = [torch.randn(i % 17, dtype=(torch.float32, torch.float64, torch.bfloat16)[i % 3]) for i in range(5000)]
    tensors[1234] = torch.randn(100_000)

    result = squared_norms(tensors)

    assert (result.shape, result.dtype) == ((5000,), torch.float64)
    expected = torch.tensor([exact(t) for t in tensors], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sizes", [[0], [0, 0, 3], [0, 600_000], [600_000, 0, 5, 0, 262_144, 262_145]], ids=str)
def test_empty_beside_large(sizes):
    tensors = [torch.randn(size) for size in sizes]
    expected = torch.tensor([exact(t) for t in tensors], dtype=torch.float64)

    torch.testing.assert_close(squared_norms(tensors), expected, rtol=1e-6, atol=0)


def test_more_elements_than_32_bits_count():
    tensor = torch.from_numpy(np.zeros((1 << 31) + 4099, dtype=np.float32))  # memory that is only read takes no room
    tensor[0], tensor[1 << 31], tensor[-1] = 1.0, 2.0, 4.0

    assert squared_norms([tensor, torch.ones(4)]).tolist() == pytest.approx([21.0, 4.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_number_of_threads_changes_no_bit(dtype):
    """Replicas with different numbers of threads must not drift apart."""
    sizes = (3_000_001, 5, 262_144, 4099, 12_345, 0, *range(600_000, 600_040))
    tensors = [*(torch.randn(size, dtype=dtype) for size in sizes), torch.randn(3000, 100, dtype=dtype)[:, ::2]]
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            results.append(squared_norms(tensors))
    finally:
        torch.set_num_threads(threads)

    assert all(torch.equal(result, results[0]) for result in results)


def test_no_tensors():
    assert squared_norms([]).shape == (0,)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("numel", [3, 100_000])
def test_not_finite_stays_not_finite_and_alone(numel, value):
    tensor, other = torch.randn(numel), torch.ones(4)
    tensor[numel // 2] = value

    bad, good = squared_norms([tensor, other]).tolist()

    assert math.isnan(bad) if math.isnan(value) else bad == math.inf
    assert good == 4.0


def test_tensors_are_left_alone():
    tensors = [torch.randn(100_001), torch.randn(300, 400).t(), torch.randn(5, dtype=torch.complex64)]
    kept = [t.clone() for t in tensors]

    squared_norms(tensors)

    assert all(torch.equal(t, k) for t, k in zip(tensors, kept, strict=True))


@st.composite
def views(draw) -> torch.Tensor:
    """A view of random memory: random dtype, shape, order of dimensions, steps, offsets and expanded dimensions."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]))
    shape = draw(st.lists(st.integers(0, 40), max_size=4))
    tensor = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    for dim in range(tensor.dim()):
        start, step = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dim + (slice(start, None, step),)]
        if tensor.shape[dim] == 1 and draw(st.booleans()):
            tensor = tensor.expand(*tensor.shape[:dim], draw(st.integers(0, 5)), *tensor.shape[dim + 1 :])
    return tensor


@examples(150)
@given(st.lists(views(), min_size=1, max_size=3))
def test_any_view(tensors):
    expected = torch.tensor([exact(t) for t in tensors], dtype=torch.float64)

    torch.testing.assert_close(squared_norms(tensors), expected, rtol=1e-6, atol=0)

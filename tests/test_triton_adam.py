"""The Triton kernel against torch's fused AdamW: on CPU in Triton's interpreter, and for real where there is a GPU."""

from __future__ import annotations

import copy
import importlib
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lockstep import LockStep, parameters
from torch.optim.adamw import adamw

from hf_swd import AdamS, triton_adam


triton = pytest.importorskip("triton")

# The interpreter also divides what is then not stored: beyond the end of a tensor, and in a skipped first step.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DECAY = 0.5
OPTIONS = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "amsgrad": False,
    "maximize": False,
    "grad_scale": None,
    "found_inf": None,
}


@pytest.fixture(scope="module")
def interpreter():
    """Triton decides when the kernel is made whether it is interpreted; blocks are short, so that small tensors have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.reload(triton_adam)
        triton_adam._BLOCK = 128
        yield
    importlib.reload(triton_adam)


@pytest.fixture
def compiled():
    importlib.reload(triton_adam)


def tensor(shape, dtype, layout="contiguous", device="cpu", fill=torch.randn):
    """A tensor without gaps, whose memory may start 2 bytes or more after a multiple of 16, or whose first dimension may be the fastest."""
    values = fill(shape, dtype=torch.float64).to(dtype)
    if layout == "misaligned":
        memory = torch.zeros(math.prod(shape) + 1, dtype=dtype, device=device)[1:]
        return memory.view(shape).copy_(values)
    if layout == "transposed" and len(shape) == 2:
        return values.to(device).t().contiguous().t()
    return values.to(device)


def state(specs, dtypes=None, amsgrad=False, device="cpu", step=0.0):
    """Lists as torch's functional AdamW takes them, for `specs` of (shape, dtype, layout); `dtypes` are those of g, m and v."""

    def tensors(i, fill=torch.randn):
        return [tensor(s, d if dtypes is None else dtypes[i], layout, device, fill) for s, d, layout in specs]

    params = [tensor(*spec, device=device) for spec in specs]
    steps = [torch.tensor(step, device=device) for _ in specs]
    largest = tensors(2, torch.zeros) if amsgrad else []
    return [params, tensors(0), tensors(1, torch.zeros), tensors(2, torch.zeros), largest, steps]


def clone(lists):
    """A copy of the same strides and alignment."""
    return copy.deepcopy(lists)


def new_gradients(*states):
    for grads in zip(*(lists[1] for lists in states), strict=True):
        values = torch.randn(grads[0].shape, dtype=torch.float64) * 3
        for grad in grads:
            grad.copy_(values)


def torch_step(lists, **options):
    adamw(*lists[:4], lists[4], lists[5], fused=True, weight_decay=DECAY, **{**OPTIONS, **options})


def triton_step(lists, decay=DECAY, **options):
    device = lists[0][0].device
    triton_adam.adamw_(*lists, decay=torch.tensor(decay, dtype=torch.float64, device=device), **{**OPTIONS, **options})


def assert_equal(mine, theirs, float32=1e-6):
    for i, (xs, ys) in enumerate(zip(mine, theirs, strict=True)):
        for x, y in zip(xs, ys, strict=True):
            if y.numel():
                relative = {torch.float64: 1e-12, torch.float32: float32}.get(y.dtype, torch.finfo(y.dtype).eps)
                # Weights and first moments are sums that may cancel: relative to their addends, about.
                scale = max(y.double().abs().max().item(), 0.1 if i in (0, 2) else 0.0)
                # Half precision: neighbours of each element, which for a sum that cancels means of its addends.
                wide = y.dtype in (torch.float64, torch.float32)
                rtol, atol = (0.0, relative * scale) if wide else (relative, 1e-3 * relative * scale)
                torch.testing.assert_close(
                    x.double(), y.double(), rtol=rtol, atol=atol, msg=lambda text, i=i: f"list {i}: {text}"
                )


def one_element(value, dtype, device="cpu"):
    return None if value is None else torch.tensor(value, dtype=dtype, device=device)


SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from([0, 1, 7, 127, 128, 129, 260])),
    st.tuples(st.integers(1, 9), st.integers(1, 20)),
)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=st.lists(
        st.tuples(SHAPES, st.sampled_from(["contiguous", "misaligned", "transposed"])), min_size=1, max_size=5
    ),
    dtypes=st.lists(
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), min_size=1, max_size=2
    ),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    lr=st.sampled_from([1e-2, 0.0, "tensor"]),
    grad_scale=st.sampled_from([None, 1.0, 8.0, 0.3]),
    found_inf=st.sampled_from([None, 0.0, 0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_torch(interpreter, shapes, dtypes, amsgrad, maximize, lr, grad_scale, found_inf, seed):
    torch.manual_seed(seed)
    mine = state([(s, dtypes[i % len(dtypes)], layout) for i, (s, layout) in enumerate(shapes)], amsgrad=amsgrad)
    theirs = clone(mine)
    options = {
        "amsgrad": amsgrad,
        "maximize": maximize,
        "lr": torch.tensor(1e-2, dtype=torch.float64) if lr == "tensor" else lr,
        "grad_scale": one_element(grad_scale, torch.float32),
        "found_inf": one_element(found_inf, torch.float32),
    }
    for _ in range(2):
        new_gradients(mine, theirs)
        torch_step(theirs, **options)
        triton_step(mine, **options)
        assert_equal(mine, theirs)
        # Half precision is rounded elsewhere in the interpreter than in torch; it shall not add up.
        for xs, ys in zip(mine, theirs, strict=True):
            for x, y in zip(xs, ys, strict=True):
                x.copy_(y)


def test_gradients_elsewhere_in_each_step(interpreter):
    mine = state([((100,), torch.float64, "contiguous"), ((), torch.float64, "contiguous")])
    theirs = clone(mine)
    kept = []
    for _ in range(4):
        kept.append(mine[1])
        mine[1] = [torch.empty_like(grad) for grad in mine[1]]
        new_gradients(mine, theirs)
        torch_step(theirs)
        triton_step(mine)
    assert_equal(mine, theirs)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64, torch.float32),
    ],
    ids=["bf16-grads", "half-moments", "bf16-weights", "float64-weights"],
)
def test_mixed_dtypes(interpreter, dtypes):
    """Computed in wide numbers and rounded once at the end, whatever is stored."""
    mine = state([((70,), dtypes[0], "contiguous")], dtypes[1:])
    new_gradients(mine)
    wide = [[t.double() for t in ts] for ts in mine[:5]] + clone(mine[5:])
    torch_step(wide)
    triton_step(mine)
    rounded = [[y.to(x.dtype) for x, y in zip(xs, ys, strict=True)] for xs, ys in zip(mine, wide, strict=True)]
    assert_equal(mine, rounded)


def test_mixes_of_dtypes_in_one_call(interpreter):
    """Float32 weights with gradients of two dtypes and moments of two others."""
    kinds = [
        (torch.float32,) * 3,
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float64),
    ]
    apart = [state([((9,), torch.float32, "contiguous")], dtypes) for dtypes in kinds]
    together = [[t for lists in clone(apart) for t in lists[i]] for i in range(6)]
    for lists in apart:
        triton_step(lists)
    triton_step(together)
    for i, tensors in enumerate(together):
        assert all(torch.equal(t, ts) for t, ts in zip(tensors, [t for lists in apart for t in lists[i]], strict=True))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.95, 0.9999999), (0.61, 0.6)])
@pytest.mark.parametrize("step", [1, 2, 10, 6931, 1_000_000])
def test_bias_corrections(interpreter, betas, step):
    """With moments 1 and eps=0, the weight moves by lr * sqrt(1 - beta2^t) / (1 - beta1^t)."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-9)):
        mine = state([((1,), dtype, "contiguous")], step=step - 1.0)
        for ts, value in zip(mine[:4], (0.0, 1.0, 1.0, 1.0), strict=True):
            ts[0].fill_(value)
        triton_step(mine, lr=1.0, eps=0.0, beta1=betas[0], beta2=betas[1])
        corrections = [-math.expm1(step * math.log(beta)) if beta else 1.0 for beta in betas]
        assert mine[0][0].item() == pytest.approx(-math.sqrt(corrections[1]) / corrections[0], rel=tolerance)


def test_small_steps_of_float64_are_not_rounded_to_float32(interpreter):
    mine = state([((3,), torch.float64, "contiguous")])
    theirs = clone(mine)
    options = {"lr": 1 / 3, "beta1": 1 / 7, "beta2": 1 - 1 / 3000, "eps": 1 / 9}
    for _ in range(3):
        new_gradients(mine, theirs)
        triton_step(mine, **options)
        torch_step(theirs, **options)
    assert_equal(mine, theirs)


@pytest.mark.parametrize("found_inf", [1.0, 2.0])
def test_a_skipped_step_changes_nothing(interpreter, found_inf):
    mine = state([((70,), torch.float32, "contiguous"), ((), torch.float32, "contiguous")], amsgrad=True, step=3.0)
    mine[1][0][5] = math.inf
    before = clone(mine)
    triton_step(mine, amsgrad=True, grad_scale=torch.tensor(4.0), found_inf=torch.tensor([found_inf]))
    for xs, ys in zip(mine, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_infinite_second_moments_stay(interpreter):
    """They stop a weight, and are no reason to lose it."""
    mine = state([((2,), torch.float16, "contiguous")])
    mine[1][0][0] = 30_000.0  # a thousandth of its square is above float16
    for _ in range(2):
        triton_step(mine, decay=0.0)
    assert mine[3][0][0] == math.inf
    assert mine[0][0].isfinite().all()


def test_half_precision_weights_lose_the_right_share(interpreter):
    """A factor 1 - 0.0003 rounded to float16 would be 1 - 0.00049."""
    mine = state([((20_000,), torch.float16, "contiguous")])
    mine[0][0].copy_(1 + torch.rand(20_000))
    mine[1][0].zero_()
    rounded_once = (mine[0][0].double() * (1 - 0.0003)).half()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_adam, "_BLOCK", 32768)
        triton_step(mine, lr=1e-3, decay=0.3)
    assert (mine[0][0] == rounded_once).double().mean() > 0.999


def test_the_decay_is_read_from_a_tensor_of_any_dtype_and_shape(interpreter):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((), (1,)):
            mine = state([((5,), torch.float32, "contiguous")])
            theirs = clone(mine)
            torch_step(theirs)
            triton_adam.adamw_(*mine, decay=torch.full(shape, DECAY, dtype=dtype), **OPTIONS)
            assert_equal(mine, theirs)


def test_autograd_hears_of_the_change(interpreter):
    mine = state([((5,), torch.float32, "contiguous")])
    versions = [ts[0]._version for ts in mine[:4]]
    triton_step(mine)
    assert [ts[0]._version > version for ts, version in zip(mine[:4], versions, strict=True)] == [
        True,
        False,
        True,
        True,
    ]
    version = mine[1][0]._version
    triton_step(mine, grad_scale=torch.tensor(2.0))
    assert mine[1][0]._version > version


def test_other_dtypes_are_refused(interpreter):
    mine = state([((5,), torch.float32, "contiguous")], (torch.float8_e5m2, torch.float32, torch.float32))
    with pytest.raises(TypeError, match="float8_e5m2"):
        triton_step(mine)


def test_empty_lists_and_tensors(interpreter):
    triton_adam.adamw_([], [], [], [], [], [], decay=torch.tensor(0.1), **OPTIONS)
    mine = state([((0,), torch.float32, "contiguous")])
    triton_step(mine)
    assert mine[5][0] == 1


@pytest.mark.parametrize("clip", [False, True], ids=["step", "clipped_in_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adams_on_this_kernel_equals_the_reference(interpreter, monkeypatch, dtype, clip, amsgrad):
    calls = []
    kernel = triton_adam.adamw_
    monkeypatch.setattr(triton_adam, "adamw_", lambda *args, **kwargs: (calls.append(1), kernel(*args, **kwargs)))
    monkeypatch.setattr(AdamS, "use_triton", True)
    params = parameters(dtype=dtype)
    pair = LockStep([{"params": params[:2]}, {"params": params[2:], "lr": 1e-3}], amsgrad=amsgrad)
    pair.optimizer.schedule.host_decay = False  # as on an accelerator
    for _ in range(5):
        gradients = pair.gradients()
        pair.set_gradients(gradients)
        if clip:
            pair.optimizer.clip_grad_norm_(0.2, defer=True)
            norm = math.sqrt(sum(g.double().square().sum().item() for group in gradients for g in group))
            gradients = [[g * (0.2 / (norm + 1e-6)) for g in group] for group in gradients]
        pair.optimizer.step()
        pair.step_reference(gradients)
    assert len(calls) == 10


def test_available_in_the_interpreter(interpreter):
    assert triton_adam.is_available(torch.device("cpu"))
    assert not triton_adam.is_available(torch.device("cuda"))  # the interpreter would follow its pointers on the host


def test_not_available_on_cpu_otherwise(compiled, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_adam.is_available(torch.device("cpu"))
    assert not triton_adam.is_available(torch.device("meta"))


def test_triton_is_imported_late():
    code = "import hf_swd.triton_adam, sys; raise SystemExit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiles_to_accesses_of_16_bytes(compiled, dtype, monkeypatch):
    """What no interpreter shows: needs Triton's compiler, but no GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel = triton_adam._compiled()
    tl = triton_adam.tl
    stored = {"fp32": tl.float32, "bf16": tl.bfloat16}[dtype]
    constants = dict.fromkeys(["lr_tensor", "grad_scale", "found_inf"])
    constants |= dict.fromkeys(["PARAM", "GRAD", "AVG", "AVG_SQ", "MAX"], stored)
    constants |= {"STEP": tl.float32, "COMPUTE": tl.float32, "AMSGRAD": False, "MAXIMIZE": False, "ALIGNED": True}
    constants["BLOCK"] = triton_adam._BLOCK
    types = {"table": "*i64", "tensors": "i32", "decay": "*fp64"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i64") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 8, "enable_fp_fusion": True}).asm["ptx"]
    per_thread = 2 if dtype == "fp32" else 1  # 8 elements
    assert ptx.count("ld.global.v4.b32") == 4 * per_thread
    assert ptx.count("st.global.v4.b32") == 3 * per_thread
    assert "bar.sync" not in ptx
    assert "sqrt.approx" not in ptx
    assert not any(f"{operation}.f64" in ptx for operation in ("mul", "add", "fma.rn", "div.rn"))


class TestGPU:
    pytestmark = gpu
    SPECS = (
        ((768, 770), torch.float32, "contiguous"),
        ((4097,), torch.float32, "misaligned"),
        ((300, 200), torch.bfloat16, "transposed"),
        ((), torch.float32, "contiguous"),
        ((0,), torch.float16, "contiguous"),
        ((12_345,), torch.float16, "contiguous"),
        ((5000,), torch.float64, "contiguous"),
    )

    @pytest.fixture(autouse=True)
    def not_interpreted(self, compiled, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert triton_adam.is_available(torch.device("cuda"))

    @staticmethod
    def gradients(lists, step):
        generator = torch.Generator(lists[0][0].device).manual_seed(step)
        for grad in lists[1]:
            grad.copy_(torch.randn(grad.shape, generator=generator, device=grad.device))

    @pytest.mark.parametrize("grad_scale", [None, 0.3])
    @pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
    @pytest.mark.parametrize("lr", ["tensor", 1e-2])
    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_equals_torch(self, amsgrad, lr, found_inf, grad_scale):
        mine = state(self.SPECS, amsgrad=amsgrad, device="cuda")
        theirs = clone(mine)
        options = {
            "amsgrad": amsgrad,
            "lr": torch.tensor(1e-2, device="cuda") if lr == "tensor" else lr,
            "grad_scale": one_element(grad_scale, torch.float32, "cuda"),
            "found_inf": one_element(found_inf, torch.float32, "cuda"),
        }
        for step in range(3):
            self.gradients(mine, step)
            self.gradients(theirs, step)
            triton_step(mine, **options)
            torch_step(theirs, **options)
            # torch's kernel takes 1 - beta2 of the float32 beta2, which is 1.3e-5 off.
            for i in (0, 1, 2, 3, 4, 5):
                for x, y in zip(mine[i], theirs[i], strict=True):
                    if y.numel():
                        half = y.dtype in (torch.float16, torch.bfloat16)
                        relative = 2 * torch.finfo(y.dtype).eps if half else {torch.float64: 1e-7}.get(y.dtype, 2e-5)
                        scale = y.double().abs().max().item()
                        torch.testing.assert_close(x.double(), y.double(), rtol=relative, atol=relative * 1e-2 * scale)
                        x.copy_(y)

    def test_the_host_does_not_wait(self):
        mine = state(self.SPECS, device="cuda")
        decay, lr = torch.tensor(0.1, device="cuda", dtype=torch.float64), torch.tensor(1e-2, device="cuda")
        flags = {"grad_scale": torch.tensor(2.0, device="cuda"), "found_inf": torch.tensor(0.0, device="cuda")}
        torch.cuda.set_sync_debug_mode("error")
        try:
            for options in ({}, {"lr": lr, **flags}):
                for _ in range(2):
                    mine[1] = [grad.clone() for grad in mine[1]]
                    triton_adam.adamw_(*mine, decay=decay, **{**OPTIONS, **options})
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("warm", [True, False])
    def test_capture_and_replay(self, warm):
        """Two graphs on different gradients, with eager steps between that push every table out of the cache."""
        eager = state(self.SPECS, device="cuda")
        captured = clone(eager)
        decay = torch.tensor(DECAY, device="cuda", dtype=torch.float64)
        other = state([((3000,), torch.float32, "contiguous")], device="cuda")
        triton_adam.adamw_(*other, decay=decay, **OPTIONS)
        gradients = [captured[1], [grad.clone() for grad in captured[1]]]
        if warm:
            self.gradients(eager, 99)
            self.gradients(captured, 99)
            for lists in (eager, captured):
                triton_adam.adamw_(*lists, decay=decay, **OPTIONS)
        else:  # at least compiled
            triton_adam.adamw_(*clone(eager), decay=decay, **OPTIONS)
        graphs = []
        before = clone(captured)
        for grads in gradients:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                triton_adam.adamw_(captured[0], grads, *captured[2:], decay=decay, **OPTIONS)
            graphs.append(graph)
        for xs, ys in zip(captured, before, strict=True):  # a capture runs nothing
            assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
        for step in range(6):
            decay.fill_(0.1 * step)
            for _ in range(20):
                other[1] = [torch.randn_like(grad) for grad in other[1]]
                triton_adam.adamw_(*other, decay=decay, **OPTIONS)
            if step == 2:
                triton_adam._device_table.cache_clear()
            self.gradients(eager, step)
            for grads in gradients:
                self.gradients([captured[0], grads], step if grads is gradients[step % 2] else -1)
            triton_adam.adamw_(*eager, decay=decay, **OPTIONS)
            graphs[step % 2].replay()
            for i in (0, 2, 3, 5):
                assert all(torch.equal(x, y) for x, y in zip(captured[i], eager[i], strict=True))

    def test_tables_are_reused_and_few(self):
        mine = state([((3000,), torch.float32, "contiguous")], device="cuda")
        triton_adam._device_table.cache_clear()
        for _ in range(5):
            triton_step(mine)
        assert triton_adam._device_table.cache_info().misses == 1
        kept = []
        for _ in range(100):
            kept.append(torch.randn_like(mine[1][0]))
            mine[1] = kept[-1:]
            triton_step(mine)
        assert triton_adam._device_table.cache_info().currsize <= 64
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        misses = triton_adam._device_table.cache_info().misses
        with torch.cuda.stream(side):
            triton_step(mine)
        torch.cuda.current_stream().wait_stream(side)
        assert triton_adam._device_table.cache_info().misses == misses + 1

    def test_subnormal_second_moments(self):
        mine = state([((4096,), torch.float32, "contiguous")], device="cuda")
        before = mine[0][0].clone()
        mine[1][0].fill_(1e-19)
        triton_step(mine, eps=0.0, decay=0.0)
        step = before - mine[0][0]
        torch.testing.assert_close(step, torch.full_like(step, 1e-2), rtol=1e-3, atol=0)

    def test_more_than_2_to_the_31_elements(self):
        numel = 2**31 + 5000
        if torch.cuda.mem_get_info()[0] < 10 * numel:
            pytest.skip("needs 20 GiB")
        mine = [[torch.zeros(numel, dtype=torch.bfloat16, device="cuda")] for _ in range(4)]
        mine[1][0].fill_(1.0)
        mine[0][0][-1] = 1.0
        triton_step([*mine, [], [torch.zeros((), device="cuda")]])
        assert mine[0][0][-2].item() == pytest.approx(-0.01, rel=1e-2)
        assert mine[0][0][-1].item() == pytest.approx(1 - 0.005 - 0.01, rel=1e-2)
        assert (mine[0][0][:-1] == mine[0][0][0]).all()

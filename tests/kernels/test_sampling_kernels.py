"""What parity cases do not say of the sampling kernels: the noise, the distribution, batches, real sizes."""

import math

import pytest
import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.logprobs import packed_logprobs, unpack_logprobs
from halimede.kernels.gpu.sampling_adjust import adjust_logits, pack_allowed
from halimede.kernels.gpu.sampling_draw import _mix, draw_tokens, log_noise, make_draw_workspace, stream_start
from halimede.kernels.gpu.sampling_select import image_to_float, order_image
from halimede.kernels.gpu.sampling_threshold import sampling_threshold, sampling_threshold_reference
from halimede.kernels.launch import launch
from halimede.kernels.random_stream import stream_keys, torch_bits
from halimede.kernels.tuning import KernelConfig

CPU = torch.device("cpu")
ONE_PROGRAM = KernelConfig({})
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 123456789)


@triton.jit
def _noise_kernel(keys_ptr, bits_ptr, noise_ptr, first, SIZE: tl.constexpr):
    row = tl.program_id(0)
    start = stream_start(tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1))
    lanes = tl.arange(0, SIZE)
    ids = first + lanes
    bits = _mix(ids.to(tl.uint64) * 0x9E3779B97F4A7C15 + start) >> 32
    tl.store(bits_ptr + row * SIZE + lanes, bits.to(tl.int64))
    tl.store(noise_ptr + row * SIZE + lanes, log_noise(start, ids))


@triton.jit
def _image_kernel(x_ptr, image_ptr, back_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    image = order_image(tl.load(x_ptr + lanes))
    tl.store(image_ptr + lanes, image)
    tl.store(back_ptr + lanes, image_to_float(image))


def exact_bits(seed: int, position: int, token: int) -> int:
    """The stream's definition in Python integers."""
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    start = mix(mix((seed + gamma) & mask) ^ position)
    return mix((token * gamma + start) & mask) >> 32


@pytest.mark.parametrize("first", [0, 200_000])
def test_the_noise_is_the_random_streams(first: int) -> None:
    keys = torch.tensor([(seed, position) for seed in SEEDS for position in (0, 5, 2**31)])
    size = 1024
    bits = torch.empty(len(keys), size, dtype=torch.int64)
    noise = torch.empty(len(keys), size)
    launch(_noise_kernel, (len(keys),), keys, bits, noise, first, config=ONE_PROGRAM, SIZE=size)
    ids = first + torch.arange(size)
    starts = stream_keys(keys.numpy(), CPU)
    assert torch.equal(bits.float(), torch_bits(starts[:, None], ids))
    for row in (0, 7, 17):
        seed, position = keys[row].tolist()
        assert bits[row, 3].item() == exact_bits(seed, position, first + 3)
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    exact = torch.log(-torch.log1p(-uniform.double()))
    torch.testing.assert_close(noise.double(), exact, rtol=0, atol=2e-6)
    assert noise.min() < -9  # small noise, which decides who wins, is among it


def test_images_have_the_order_of_floats() -> None:
    x = torch.tensor([-math.inf, -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 0.5, 3e38, math.inf] + [7.0] * 6)
    image, back = torch.empty(16, dtype=torch.int32), torch.empty(16)
    launch(_image_kernel, (1,), x, image, back, config=ONE_PROGRAM, SIZE=16)
    assert torch.equal(back, x)
    assert (image[:9].diff() > 0).sum() == 7  # all but -0.0 and 0.0
    assert image[4] == image[5] == 0


def draw(logits: torch.Tensor, keys: torch.Tensor, top_p: float = 1.0, top_k: int = 1 << 20) -> torch.Tensor:
    rows = len(logits)
    temperature = torch.full((rows,), 0.8)
    threshold = None
    if top_p < 1 or top_k < logits.shape[1]:
        k = torch.full((rows,), top_k, dtype=torch.int32)
        threshold = sampling_threshold(logits, temperature, torch.zeros(rows), k, torch.full((rows,), top_p))
    workspace = make_draw_workspace(rows, CPU)
    return draw_tokens(logits, workspace, temperature=temperature, keys=keys, threshold=threshold)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_draws_follow_the_distribution(top_p: float) -> None:
    draws = 300
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.4, -1.0])
    probabilities = (logits / 0.8).softmax(0)
    if top_p < 1:
        order = probabilities.argsort(descending=True)
        kept = order[: 1 + int((probabilities[order].cumsum(0) < top_p).sum())]
        probabilities = torch.zeros(6).index_put_((kept,), probabilities[kept])
        probabilities /= probabilities.sum()
    keys = torch.stack([torch.arange(draws), torch.arange(draws) % 7], dim=1)
    # One threshold serves all: the rows are equal.
    temperature, zeros = torch.full((draws,), 0.8), torch.zeros(1)
    threshold = None
    if top_p < 1:
        k = torch.tensor([6], dtype=torch.int32)
        cut, last = sampling_threshold(logits[None], temperature[:1], zeros, k, torch.tensor([top_p]))
        threshold = cut.repeat(draws), last.repeat(draws)
    tokens = draw_tokens(
        logits.repeat(draws, 1),
        make_draw_workspace(draws, CPU),
        temperature=temperature,
        keys=keys,
        threshold=threshold,
    )
    counts = torch.bincount(tokens, minlength=6).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = (probabilities * draws)[possible]
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    assert chi_square < (15.09 if top_p == 1 else 11.34)  # the 99th percentile of at most 5 and 3 degrees


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 200).bfloat16()
    keys = torch.stack([torch.arange(4) * 3, torch.arange(4)], dim=1)
    together = draw(logits, keys, top_p=0.8, top_k=100)
    order = [3, 0]
    assert torch.equal(draw(logits[order], keys[order], top_p=0.8, top_k=100), together[order])
    for row in (1, 2):
        alone = draw(logits[row : row + 1], keys[row : row + 1], top_p=0.8, top_k=100)
        assert alone[0] == together[row]


@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
def test_the_cut_of_a_real_vocabulary(spread: float) -> None:
    """Flat rows have more left than is ever copied out, steep ones less."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(2, 32000, generator=generator) * spread).bfloat16()
    given = {
        "temperature": torch.tensor([1.0, 0.7]),
        "min_p": torch.zeros(2),
        "top_k": torch.tensor([1 << 20, 20000], dtype=torch.int32),
        "top_p": torch.tensor([0.9, 0.95]),
    }
    cut, last = sampling_threshold(logits, **given)
    expected_cut, expected_last = sampling_threshold_reference(logits, **given)
    assert torch.equal(cut, expected_cut)
    # Of thousands of equal logits one more or less is within the rounding of the sum of probabilities.
    assert (last - expected_last).abs().max() <= 100
    exact = last == expected_last
    assert spread < 1 or exact.all()


def test_logprobs_of_a_real_vocabulary() -> None:
    logits = (torch.randn(2, 32000, generator=torch.Generator().manual_seed(2)) * 4).bfloat16()
    tokens = torch.tensor([31999, 17])
    own, rank, ids, values, ranks = unpack_logprobs(packed_logprobs(logits, tokens, 100))
    exact = logits.double().log_softmax(1)
    order = exact.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, order.indices[:, :100].int())
    torch.testing.assert_close(values.double(), order.values[:, :100], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(own.double(), exact.gather(1, tokens[:, None])[:, 0], rtol=1e-6, atol=3e-6)
    assert rank.tolist() == [1 + int((exact[row] > exact[row, tokens[row]]).sum()) for row in range(2)]
    assert (ranks[:, 0] == 1).all()


def test_the_bitmask_has_xgrammars_layout() -> None:
    allowed = torch.zeros(1, 70, dtype=torch.bool)
    allowed[0, [0, 31, 33, 69]] = True
    assert pack_allowed(allowed).tolist() == [[1 - 2**31, 2, 32]]


def test_what_does_not_fit_is_refused() -> None:
    logits = torch.zeros(2, 8)
    with pytest.raises(KernelError, match="float32"):
        adjust_logits(logits.bfloat16())
    with pytest.raises(KernelError, match=r"\(1, 1\) int32"):
        adjust_logits(logits, masks=(torch.zeros(1).int(), torch.zeros(1, 2).int()))
    with pytest.raises(KernelError, match="workspace"):
        draw_tokens(logits, make_draw_workspace(1, CPU))
    with pytest.raises(KernelError, match="unit stride"):
        sampling_threshold(logits.T, *([torch.zeros(8)] * 4))
    with pytest.raises(KernelError, match="up to 128"):
        packed_logprobs(logits, torch.zeros(2).long(), 129)

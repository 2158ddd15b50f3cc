"""The KV codecs: what is lost, how much it takes, what is refused, and that the bytes are those of docs/codecs.md."""

import itertools
import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_rag.errors import EngineError
from edge_rag.native import kv_codec
from edge_rag.native.kv_codec import CODECS, Codec, Decoder, Sections, encode

QUANTISED: tuple[Codec, ...] = ("q8", "q5", "q4")
BITS = {"q8": 8, "q5": 5, "q4": 4}
ROUNDING = 2.0**-10  # what float16 scales, zeros and results may add, relative to the largest number
FLOOR = 2.0**-16  # below it float16 has no scale fine enough for 256 codes

Shape = tuple[int, int, int, int]


def passage(shape: Shape = (3, 20, 16, 32), seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as models make them: some key channels are large, and large for every token."""
    layers, tokens, k_width, v_width = shape
    random = np.random.default_rng(seed)
    k = random.normal(size=(layers, tokens, k_width))
    k[:, :, ::7] = 30 * random.choice([-1, 1], size=k[:, :1, ::7].shape) + 4 * k[:, :, ::7]
    return k.astype(np.float32), random.normal(size=(layers, tokens, v_width)).astype(np.float16)


def decoder(codec: Codec, sections: Sections, k: np.ndarray, v: np.ndarray) -> Decoder:
    layers, tokens, k_width = k.shape
    stored = {name: section.tobytes() for name, section in sections.items()}
    return Decoder(codec, stored, layers=layers, tokens=tokens, k_width=k_width, v_width=v.shape[2])


def decoded(reader: Decoder, k: np.ndarray, v: np.ndarray, layers: slice = slice(None)) -> tuple[np.ndarray, ...]:
    keys = np.full_like(k[layers], np.nan, dtype=np.float32)
    values = np.full_like(v[layers], np.nan, dtype=np.float16)
    reader.keys(layers, keys)
    reader.values(layers, values)
    return keys, values


def round_trip(codec: Codec, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    return decoded(decoder(codec, encode(codec, k, v), k, v), k, v)


def size(sections: Sections) -> int:
    return sum(section.nbytes for section in sections.values())


def groups_of(k: np.ndarray, v: np.ndarray, codec: Codec) -> tuple[list[np.ndarray], np.ndarray]:
    """Keys and values by the groups that share a scale: the numbers of a group on the second axis."""
    count = math.ceil(k.shape[1] / 128)
    channels = math.gcd({"q8": 64, "q5": 32, "q4": 32}[codec], v.shape[2])
    return np.array_split(k, count, axis=1), v.reshape(-1, channels)[:, :, None]


def assert_close(original: np.ndarray, result: np.ndarray, codec: Codec) -> None:
    """Within a group, errors are as those of even steps over its range, in root mean square."""
    original, result = original.astype(np.float64), result.astype(np.float64)
    step = np.ptp(original, axis=1) / (2 ** BITS[codec] - 1)
    error = np.sqrt(((original - result) ** 2).mean(axis=1))
    assert (error <= step / 2 + ROUNDING * np.abs(original).max(axis=1) + FLOOR).all()


def assert_all_close(codec: Codec, k: np.ndarray, v: np.ndarray) -> None:
    keys, values = round_trip(codec, k, v)
    k_groups, v_groups = groups_of(k, v, codec)
    key_groups, value_groups = groups_of(keys, values, codec)
    for original, result in zip([*k_groups, v_groups], [*key_groups, value_groups], strict=True):
        assert_close(original, result, codec)


numbers = st.floats(-32768, 32768, width=16)


@pytest.mark.parametrize("codec", QUANTISED)
@given(data=st.data())
@settings(max_examples=60)
def test_errors_stay_within_half_a_step(codec: Codec, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 9))
    k = data.draw(arrays.arrays(np.float32, (1, tokens, 8), elements=numbers))
    v = data.draw(arrays.arrays(np.float16, (1, tokens, 16), elements=numbers))
    assert_all_close(codec, k, v)


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("tokens", [1, 2, 60, 128, 129, 300])
def test_passages_of_any_length_are_kept(codec: Codec, tokens: int) -> None:
    assert_all_close(codec, *passage((2, tokens, 24, 96)))


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("scale", [2.0**-22, 2.0**-15, 1e-4, 1.0, 500.0])
def test_tiny_and_huge_numbers_are_kept(codec: Codec, scale: float) -> None:
    k, v = passage()
    assert_all_close(codec, (k * scale).astype(np.float32), (v.astype(np.float32) * scale).astype(np.float16))


def test_f16_keeps_values_bit_by_bit_and_keys_to_the_nearest_float16() -> None:
    k, v = passage((2, 130, 16, 24))
    keys, values = round_trip("f16", k, v)
    np.testing.assert_array_equal(values.view(np.uint16), v.view(np.uint16))
    np.testing.assert_array_equal(keys, k.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("number", [0.0, 0.1, -31.25, 32768.0])
def test_constant_channels_come_back_exactly(codec: Codec, number: float) -> None:
    exact = np.float16(number)
    k, v = passage()
    k[:, :, 3] = exact
    v[:, 5] = exact
    keys, values = round_trip(codec, k, v)
    assert (keys[:, :, 3] == exact).all()
    assert (values[:, 5] == exact).all()


@pytest.mark.parametrize("codec", QUANTISED)
def test_the_largest_numbers_decode_to_finite_ones(codec: Codec) -> None:
    k, v = passage()
    k[:, ::2], k[:, 1::2] = 32768, -32768
    v[:, :, ::2], v[:, :, 1::2] = 32768, -32768
    v[:, :, 0] = 3
    keys, values = round_trip(codec, k, v)
    assert np.isfinite(keys.astype(np.float16)).all()
    assert np.isfinite(values).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 32800, -32800])
def test_numbers_that_cannot_be_kept_are_refused(codec: Codec, side: str, number: float) -> None:
    k, v = passage()
    (k if side == "k" else v)[1, 4, 2] = number
    with pytest.raises(EngineError, match="too large"):
        encode(codec, k, v)


@pytest.mark.parametrize(
    ("codec", "most"),
    [("f16", 1.0), ("q8", 0.53), ("q5", 0.36), ("q4", 0.3)],
)
@pytest.mark.parametrize("shape", [(24, 220, 128, 128), (30, 220, 192, 192), (2, 140, 1024, 1024)])
def test_a_codec_takes_no_more_than_its_share_of_f16(codec: Codec, most: float, shape: Shape) -> None:
    k, v = passage(shape)
    assert size(encode(codec, k, v)) <= most * (2 * k.size + v.nbytes)


def test_more_bits_lose_less() -> None:
    k, v = passage((4, 140, 64, 64))
    losses = [np.square(round_trip(codec, k, v)[0] - k).mean() for codec in ("q4", "q5", "q8", "f16")]
    assert losses[0] > 3 * losses[1] > 100 * losses[2] > 300 * losses[3]


@pytest.mark.parametrize("codec", QUANTISED)
def test_the_fitted_line_loses_less_than_even_steps_over_the_range(codec: Codec) -> None:
    _, v = passage((4, 64, 8, 256))
    wide = v.astype(np.float32)
    _, values = round_trip(codec, np.zeros((4, 64, 8), np.float32), v)
    groups = groups_of(wide, wide, codec)[1]
    step = np.ptp(groups, axis=1, keepdims=True) / (2 ** BITS[codec] - 1)
    low = groups.min(axis=1, keepdims=True)
    plain = np.square(low + np.rint((groups - low) / step) * step - groups).mean()
    assert np.square(values.astype(np.float32) - wide).mean() < 0.97 * plain


@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (128, 1), (129, 2), (256, 2), (257, 3)])
def test_a_group_has_128_tokens_at_most(tokens: int, groups: int) -> None:
    shapes = kv_codec.section_shapes("q4", layers=1, tokens=tokens, k_width=8, v_width=8)
    assert shapes["k_scales"][1] == (1, groups, 8)


def test_tokens_are_grouped_evenly() -> None:
    k = np.zeros((1, 140, 8), np.float32)
    k[0, 69], k[0, 139] = 1000, -1000  # one in each half: the halves must not disturb each other
    assert encode("q4", k, passage((1, 140, 8, 8))[1])["k_scales"].shape == (1, 2, 8)
    keys, _ = round_trip("q4", k, np.zeros((1, 140, 8), np.float16))
    assert keys[0, :70].min() > -70
    assert keys[0, 70:].max() < 70


@pytest.mark.parametrize("codec", CODECS)
def test_blocks_of_layers_are_those_of_the_whole(codec: Codec) -> None:
    k, v = passage((5, 130, 16, 48))
    reader = decoder(codec, encode(codec, k, v), k, v)
    keys, values = decoded(reader, k, v)
    for layers in (slice(0, 2), slice(2, 5), slice(4, 5)):
        some_keys, some_values = decoded(reader, k, v, layers)
        np.testing.assert_array_equal(some_keys, keys[layers])
        np.testing.assert_array_equal(some_values, values[layers])


@pytest.mark.parametrize("codec", CODECS)
def test_values_are_written_into_rows_that_lie_apart(codec: Codec) -> None:
    k, v = passage()
    reader = decoder(codec, encode(codec, k, v), k, v)
    around = np.zeros((3, 24, 32), np.float16)  # 20 tokens of a longer prompt
    reader.values(slice(0, 3), around[:, 2:22])
    np.testing.assert_array_equal(around[:, 2:22], decoded(reader, k, v)[1])
    assert not around[:, :2].any()
    assert not around[:, 22:].any()


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_passage_gives_the_same_bytes_wherever_its_arrays_lie(codec: Codec) -> None:
    k, v = passage()
    strided_k, strided_v = np.repeat(k, 2, axis=2)[:, :, ::2], np.repeat(v, 2, axis=1)[:, ::2]
    first, second = encode(codec, k, v), encode(codec, strided_k, strided_v)
    assert {name: section.tobytes() for name, section in first.items()} == {
        name: section.tobytes() for name, section in second.items()
    }
    np.testing.assert_array_equal(k, passage()[0])  # and what was given is left as it was


@pytest.mark.parametrize("codec", CODECS)
def test_threads_may_share_a_decoder(codec: Codec) -> None:
    k, v = passage((8, 200, 64, 64))
    reader = decoder(codec, encode(codec, k, v), k, v)
    keys, values = decoded(reader, k, v)
    wrong: list[int] = []

    def read(layer: int) -> None:
        for _ in range(20):
            some_keys, some_values = decoded(reader, k, v, slice(layer, layer + 1))
            if not (np.array_equal(some_keys[0], keys[layer]) and np.array_equal(some_values[0], values[layer])):
                wrong.append(layer)

    threads = [threading.Thread(target=read, args=(layer,)) for layer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("codec", CODECS)
def test_sections_of_a_wrong_length_are_refused(codec: Codec) -> None:
    k, v = passage()
    sections = encode(codec, k, v)
    for name in sections:
        for change in (lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""):
            broken = {other: section.tobytes() for other, section in sections.items()}
            broken[name] = change(broken[name])
            with pytest.raises(EngineError, match=name):
                Decoder(codec, broken, layers=3, tokens=20, k_width=16, v_width=32)
        rest = {other: section for other, section in sections.items() if other != name}
        with pytest.raises(EngineError, match=name):
            Decoder(codec, rest, layers=3, tokens=20, k_width=16, v_width=32)


def test_sections_of_another_passage_are_refused() -> None:
    sections = encode("q5", *passage((3, 20, 16, 32)))
    with pytest.raises(EngineError):
        Decoder("q5", sections, layers=3, tokens=21, k_width=16, v_width=32)


@pytest.mark.parametrize("shape", [(0, 20, 16, 32), (3, 0, 16, 32), (3, 20, 0, 32), (3, 20, 12, 32), (3, 20, 16, 33)])
def test_sizes_that_no_codec_has_are_refused(shape: Shape) -> None:
    layers, tokens, k_width, v_width = shape
    with pytest.raises(EngineError, match="no codec"):
        encode("q4", np.zeros((layers, tokens, k_width), np.float32), np.zeros((layers, tokens, v_width), np.float16))


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(EngineError, match="q3"):
        encode("q3", *passage())  # type: ignore[arg-type]


def test_keys_and_values_of_different_passages_are_refused() -> None:
    with pytest.raises(EngineError, match="same passage"):
        encode("q8", passage((3, 20, 16, 32))[0], passage((3, 19, 16, 32))[1])


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("tokens", [3, 131])
def test_the_bytes_are_those_of_the_format_document(codec: Codec, tokens: int) -> None:
    k, v = passage((2, tokens, 8, 40))
    sections = encode(codec, k, v)
    keys, values = decoded(decoder(codec, sections, k, v), k, v)
    k_codes, v_codes = (plain_codes(codec, sections, side, 2, tokens) for side in "kv")
    count = -(-tokens // 128)
    size, longer = divmod(tokens, count)
    channels = math.gcd(64 if codec == "q8" else 32, 40)
    for layer, token in itertools.product(range(2), range(tokens)):
        group = token // (size + 1) if token < longer * (size + 1) else (token - longer) // size
        scales, zeros = (sections[f"k_{part}"][layer, group].astype(np.float32) for part in ("scales", "zeros"))
        np.testing.assert_array_equal(keys[layer, token], k_codes[layer, token] * scales + zeros)
        scales, zeros = (
            sections[f"v_{part}"][layer, token].astype(np.float32).repeat(channels) for part in ("scales", "zeros")
        )
        np.testing.assert_array_equal(values[layer, token], (v_codes[layer, token] * scales + zeros).astype(np.float16))


def plain_codes(codec: Codec, sections: Sections, side: str, layers: int, tokens: int) -> np.ndarray:
    """Codes [layers, tokens, width] as float32, one by one, as the format document says it."""
    codes = sections[f"{side}_codes"]
    if codec != "q8":
        codes = np.concatenate([codes % 16, codes // 16], axis=1)
    if codec == "q5":
        bits = sections[f"{side}_bits"]
        codes = codes + 16 * np.stack([bits >> (7 - place) & 1 for place in range(8)], axis=2).reshape(layers, -1)
    return codes.reshape(layers, tokens, -1).astype(np.float32)


def test_section_shapes_tell_the_size_before_encoding() -> None:
    shapes = kv_codec.section_shapes("q5", layers=3, tokens=20, k_width=16, v_width=32)
    sections = encode("q5", *passage((3, 20, 16, 32)))
    assert {name: (section.dtype, section.shape) for name, section in sections.items()} == {
        name: (np.dtype(kind), shape) for name, (kind, shape) in shapes.items()
    }

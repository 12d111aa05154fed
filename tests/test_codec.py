from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import reference_body_sizes, reference_varint

from sam_ds.errors import InputError
from sam_ds.wire.checksum import crc32c
from sam_ds.wire.codec import DTYPES, CodecError, decode, encode, read_header
from sam_ds.wire.payload import (
    STYPE,
    ByteCount,
    ExpertUnit,
    RejectedUpdate,
    SharedUnit,
    decode_units,
    encode_units,
    parse_unit,
    unit_name,
)
from sam_ds.wire.values import row_count
from sam_ds.wire.varint import decode_varints, encode_varints
from sam_ds.wire.zeros import Encoding

HEADER = 28
ENCODINGS = {
    Encoding.DENSE: "dense",
    Encoding.RLE: "rle",
    Encoding.BITMAP: "bitmap",
    Encoding.DELTA_VARINT: "delta-varint",
}


def bits(array):
    return array.tobytes(), array.shape, array.dtype


def resealed(blob):
    """The blob with the checksum of what it now holds: as a forger would send it."""
    return blob[:4] + struct.pack("<I", crc32c(blob[8:])) + blob[8:]


def with_body(array, body, encoding=None):
    """The header of `array` in front of another body."""
    blob = bytearray(encode(array)[: HEADER + 8 * array.ndim])
    blob[18:26] = struct.pack("<Q", len(body))
    if encoding is not None:
        blob[9] = encoding
    return resealed(bytes(blob) + body)


@st.composite
def sparse_arrays(draw, dtypes=DTYPES):
    """All dtypes and bit patterns, in shapes from () on, with runs and scatterings of zeros."""
    dtype = draw(st.sampled_from(dtypes))
    array = draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keep = draw(st.sampled_from([0.0, 0.03, 0.3, 1.0]))
    mask = rng.random(array.shape) < keep
    if draw(st.booleans()):
        mask = np.sort(mask.reshape(-1)).reshape(array.shape)
    return np.where(mask, array, dtype.type(0)).astype(dtype)


@settings(max_examples=300)
@given(sparse_arrays(), st.integers(0, 2**32 - 1), st.booleans())
def test_raw_round_trip_keeps_every_bit(array, base_round, compress):
    blob = encode(array, base_round=base_round, compress=compress)
    got, got_round = decode(blob)
    assert bits(got) == bits(array) and got_round == base_round
    assert got.flags.writeable
    assert bits(decode(memoryview(blob))[0]) == bits(array)


@given(hnp.arrays(np.uint32, 20))
def test_raw_keeps_nan_payloads_and_minus_zero(patterns):
    patterns[:3] = [0x80000000, 0x7FC12345, 0xFF800001]
    array = patterns.view(np.float32)
    assert bits(decode(encode(array))[0]) == bits(array)


def test_layouts_that_are_not_contiguous_or_not_native():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (array.T, array[::2, ::-1], array.astype(">f4")):
        got, _ = decode(encode(view))
        assert got.shape == view.shape and got.dtype == np.float32 and (got == view).all()


@settings(max_examples=200)
@given(sparse_arrays(tuple(dtype for dtype in DTYPES if dtype.kind in "fb")))
def test_encoder_picks_the_smallest(array):
    codes = array.reshape(-1) if array.dtype.kind == "b" else array.reshape(-1).view(f"u{array.itemsize}")
    sizes = reference_body_sizes(codes.tolist(), 0 if array.dtype.kind == "b" else array.itemsize)
    if array.dtype.kind == "b":
        del sizes["dense"]
    header = read_header(encode(array))
    assert len(header.body) == min(sizes.values()) == sizes[ENCODINGS[header.encoding]]


def test_sizes_by_hand():
    def body(array, **options):
        header = read_header(encode(array, **options))
        return ENCODINGS[header.encoding], header.values.name, len(header.body)

    assert len(encode(np.ones((2, 3), np.float32))) == 28 + 2 * 8 + 6 * 4
    assert len(encode(np.float64(1.0).reshape(()))) == 28 + 8
    assert body(np.ones(100, np.float32)) == ("dense", "RAW", 400)
    # 1000 zeros: a length of 0 bytes.
    assert body(np.zeros(1000, np.float32)) == ("delta-varint", "RAW", 1)
    x = np.zeros(1000, np.float32)
    x[::2] = 1
    assert body(x) == ("bitmap", "RAW", 125 + 2000)
    x = np.zeros(1000, np.float32)
    x[300:700] = 1
    # Length 1; runs 300, 400, 300 of two bytes each; values.
    assert body(x) == ("rle", "RAW", 1 + 6 + 1600)
    x = np.zeros(1000, np.float32)
    x[[5, 133, 700]] = 1
    # Length 1; gaps 5, 127 (one byte), 566 (two bytes); values.
    assert body(x) == ("delta-varint", "RAW", 1 + 4 + 12)
    x = np.repeat(np.arange(16) % 2, 8).astype(np.float32)
    # Length 1; 16 runs: one byte more than the bitmap. 14 runs: one byte less.
    assert body(x) == ("bitmap", "RAW", 16 + 256)
    x[:16] = 0
    assert body(x) == ("rle", "RAW", 1 + 14 + 224)
    assert body(np.ones(100, np.float32), values="bf16") == ("dense", "BF16", 200)
    assert body(np.ones((4, 25), np.float32), values="int8") == ("dense", "INT8", 4 + 100)  # one scale for 64 or more
    assert body(np.ones((4, 64), np.float32), values="int8") == ("dense", "INT8", 4 * 4 + 256)
    assert body(np.ones((3, 25), np.float32), values="int4") == ("dense", "INT4", 4 + 38)
    # Zigzag: -64..63 take one byte.
    assert body(np.array([-64, 63, 1, -1], np.int64)) == ("dense", "VARINT", 4)
    assert body(np.array([-65, 64, 1, -1], np.int64)) == ("dense", "VARINT", 6)
    assert body(np.full(4, 2**31 - 1, np.int32)) == ("dense", "RAW", 16)
    assert body(np.arange(100) % 2 == 0) == ("bitmap", "RAW", 13)
    assert body(np.ones(1000, bool)) == ("rle", "RAW", 1 + 1 + 2)


def test_counters_are_exact_and_small():
    counts = np.random.default_rng(0).poisson(0.4, (64, 64)).astype(np.int64)
    blob = encode(counts)
    assert len(blob) < counts.nbytes / 8
    assert (decode(blob)[0] == counts).all()
    for dtype in (np.int32, np.int64):
        edges = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max, -1, 0], dtype)
        assert (decode(encode(edges))[0] == edges).all()


numbers = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))


@given(hnp.arrays(np.uint64, st.integers(0, 50), elements=numbers))
def test_varints_are_leb128(values):
    data = encode_varints(values)
    assert data == b"".join(reference_varint(int(v)) for v in values)
    assert (decode_varints(data) == values).all()


@pytest.mark.parametrize(
    "data", [b"\x80", b"\x01\xff", b"\xff" * 9 + b"\x02", b"\xff" * 10 + b"\x01", b"\x80\x00"]
)
def test_varints_cut_off_too_large_or_too_long(data):
    with pytest.raises(CodecError):
        decode_varints(data)


@given(hnp.arrays(np.float32, st.integers(0, 30)), st.booleans())
def test_bf16_rounds_to_nearest_even_as_torch(array, double):
    torch = pytest.importorskip("torch")
    want = torch.from_numpy(array.copy()).to(torch.bfloat16).to(torch.float32).numpy()
    got, _ = decode(encode(array.astype(np.float64) if double else array, values="bf16"))
    assert got.dtype == (np.float64 if double else np.float32)
    np.testing.assert_array_equal(got, want)
    assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()


def test_bf16_by_hand():
    patterns = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x80000000]
    want = [0x3F800000, 0x3F820000, 0x3F810000, 0x7F800000, 0x7FC00000, 0xFFFF0000, 0x80000000]
    got, _ = decode(encode(np.array(patterns, np.uint32).view(np.float32), values="bf16"))
    assert got.view(np.uint32).tolist() == want


def test_bf16_takes_signalling_nans_without_a_warning():
    patterns = np.array([0x7FF0000000000001, 0xFFF0000000000001], np.uint64)
    assert np.isnan(decode(encode(patterns.view(np.float64), values="bf16"))[0]).all()
    blob = encode(np.array([1.0]), values="bf16")
    assert np.isnan(decode(resealed(blob[:-2] + b"\x81\x7f"))[0]).all()


LARGEST = float(np.finfo(np.float32).max)
floats = st.one_of(st.floats(-LARGEST, LARGEST, width=32), st.floats(-1, 1, width=32))


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6), elements=floats),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.booleans(),
    st.sampled_from(["int8", "int4"]),
)
def test_codes_stay_within_a_step(array, dtype, stochastic, values):
    assume(dtype is not np.float16 or (np.abs(array) < 65504).all())
    array = array.astype(dtype)
    got, _ = decode(encode(array, values=values, rng=np.random.default_rng(0) if stochastic else None))
    assert got.shape == array.shape and got.dtype == array.dtype and np.isfinite(got).all()
    exact = array.astype(np.float64)
    rows = np.abs(exact).reshape(max(row_count(exact.shape, exact.size), 1), -1)
    absmax = np.broadcast_to(rows.max(axis=-1, keepdims=True, initial=0), rows.shape).reshape(exact.shape)
    step = absmax / {"int8": 127, "int4": 7}[values] * (1 + 1e-6) + 1e-44
    rounding = np.abs(exact) * float(np.finfo(dtype).eps) + float(np.finfo(dtype).smallest_subnormal)
    assert (np.abs(got - exact) <= step * (1 if stochastic else 0.5) + rounding + 1e-45).all()


@pytest.mark.parametrize(("values", "steps"), [("int8", 127), ("int4", 7)])
def test_stochastic_rounding_is_unbiased(values, steps):
    rng = np.random.default_rng(3)
    row = np.array([1.0, -1.0, 0.3, -0.77, 0.001, 0.0, 0.5 / steps], np.float32)
    draws = 20_000
    got, _ = decode(encode(np.tile(row, (draws, 1)), values=values, rng=rng))
    # A code is one of two neighbours: at most a quarter of a squared step of variance.
    bound = 4.5 * (1 / steps) * 0.5 / np.sqrt(draws)
    assert (np.abs(got.astype(np.float64).mean(axis=0) - row) < bound).all()
    assert len(np.unique(got[:, 2])) == 2 and len(np.unique(got[:, 5])) == 1
    nearest, _ = decode(encode(row[None], values=values))
    assert np.abs(nearest[0] - row).max() > 5 * bound, "nearest rounding would fail the test above"
    assert encode(row, values=values, rng=np.random.default_rng(1)) == encode(
        row, values=values, rng=np.random.default_rng(1)
    )


def test_what_cannot_be_sent():
    x = np.ones(3, np.float32)
    for array, options, message in (
        (np.ones(3, np.complex64), {}, "complex64"),
        (np.array(["a"]), {}, "dtype"),
        (x, {"values": "int6"}, "did you mean 'int"),
        (x, {"base_round": 2**32}, "base_round"),
        (x, {"base_round": -1}, "base_round"),
        (x.astype(np.float16), {"values": "bf16"}, "saves nothing"),
        (np.array([1, np.nan], np.float32), {"values": "int8"}, "finite"),
        (np.array([1e300]), {"values": "int8"}, "finite"),
        (np.ones((1,) * 33, np.float32), {}, "ndim"),
    ):
        with pytest.raises(InputError, match=message):
            encode(array, **options)


def small_blobs():
    rng = np.random.default_rng(0)
    run, few, half = np.zeros(60, np.float32), np.zeros(60, np.float32), np.zeros(40, np.float16)
    run[20:40], few[[3, 50]], half[::2] = rng.normal(size=20), 1.5, 2
    counts = np.zeros((5, 5), np.int64)
    counts[1, 2:4] = 1000, -3
    x = rng.normal(size=(3, 4)).astype(np.float32)
    return {
        "dense": encode(x, base_round=3),
        "rle": encode(run),
        "delta": encode(few),
        "bitmap": encode(half),
        "bf16": encode(x, values="bf16"),
        "int8": encode(x, values="int8"),
        "int4": encode(x[:, :3], values="int4"),
        "counts": encode(counts),
        "bool": encode(rng.random((4, 5)) < 0.5),
        "bool-rle": encode(np.ones(500, bool)),
        "scalar": encode(np.array(2.0)),
        "empty": encode(np.zeros((0, 4), np.float32)),
        "zstd": encode(np.tile(np.arange(1, 9, dtype=np.float32), 20), compress=True),
    }


def test_small_blobs_cover_every_encoding():
    headers = [read_header(blob) for blob in small_blobs().values()]
    assert {h.encoding for h in headers} == set(Encoding)
    assert len({h.values for h in headers}) == 5 and any(h.compressed for h in headers)


@pytest.mark.parametrize("name", small_blobs())
def test_damage_is_always_found(name):
    blob = small_blobs()[name]
    decode(blob)
    # What a checksum finds depends on the place and the change, not on the bytes: all changes of a byte for one blob.
    flips = range(1, 256) if name == "dense" else [1 << bit for bit in range(8)]
    for k in range(len(blob)):
        with pytest.raises(CodecError):
            decode(blob[:k])
        for flip in flips:
            with pytest.raises(CodecError):
                decode(blob[:k] + bytes([blob[k] ^ flip]) + blob[k + 1 :])
    with pytest.raises(CodecError):
        decode(blob + b"\x00")


@pytest.mark.parametrize("name", small_blobs())
def test_forgeries_raise_codec_error_or_decode_within_bounds(name):
    """With the checksum made right every check behind it is on its own."""
    blob = small_blobs()[name]
    refused = 0
    for k in range(8, len(blob)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            forged = resealed(blob[:k] + bytes([blob[k] ^ flip]) + blob[k + 1 :])
            try:
                array, _ = decode(forged, max_bytes=4096)
            except CodecError:
                refused += 1
            else:
                assert array.nbytes <= 4096
        with pytest.raises(CodecError):
            decode(resealed(blob[:k]))
    assert refused > 100


def test_forged_headers():
    x = np.ones((2, 3), np.float32)
    blob = encode(x)

    def forged(at, data):
        return resealed(blob[:at] + data + blob[at + len(data) :])

    for at, data in (
        (18, struct.pack("<Q", 2**63)),  # length of the body
        (18, struct.pack("<Q", 23)),
        (28, struct.pack("<QQ", 2**62, 2**62)),  # shape
        (28, struct.pack("<QQ", 0, 2**63)),
        (28, struct.pack("<QQ", 3, 3)),
        (13, b"\xff"),  # ndim
        (8, b"\x02"),  # version
        (26, b"\x01"),  # what is zero
        (9, b"\x04"),  # encoding
        (10, b"\x03"),  # varint values of a float
        (11, bytes([len(DTYPES)])),
        (12, b"\x02"),  # flags
    ):
        with pytest.raises(CodecError):
            decode(forged(at, data))
    decode(blob, max_bytes=24)
    with pytest.raises(CodecError, match="at most 23"):
        decode(blob, max_bytes=23)


def test_forged_bodies():
    x = np.zeros(1000, np.float32)
    x[0] = 1
    value = struct.pack("<f", 1.0)

    def section(*numbers):
        body = encode_varints(np.array(numbers, dtype=np.uint64))
        return encode_varints(np.array([len(body)], dtype=np.uint64)) + body

    good = {Encoding.DELTA_VARINT: section(7) + value, Encoding.RLE: section(7, 1, 992) + value}
    for encoding, body in good.items():
        assert decode(with_body(x, body, encoding))[0].nonzero()[0].tolist() == [7]
    for encoding, body in (
        (Encoding.DELTA_VARINT, section(1000) + value),  # outside
        (Encoding.DELTA_VARINT, section(999, 0) + value * 2),  # the second outside
        (Encoding.DELTA_VARINT, section(5, 2**64 - 3) + value * 2),  # wraps around
        (Encoding.DELTA_VARINT, section(2**64 - 1) + value),
        (Encoding.DELTA_VARINT, section(7)),  # no value
        (Encoding.DELTA_VARINT, section(7) + value + b"\x00"),  # trailing byte
        (Encoding.DELTA_VARINT, b"\x7f\x01" + value),  # section longer than the body
        (Encoding.DELTA_VARINT, b"\xff" * 12),
        (Encoding.DELTA_VARINT, b""),
        (Encoding.RLE, section(7, 1, 991) + value),  # too short
        (Encoding.RLE, section(7, 1, 993) + value),  # too long
        (Encoding.RLE, section(7, 1, 0, 1, 991) + value * 2),  # empty run
        (Encoding.RLE, section(7, 2**64 - 1, 994)),  # wraps around
        (Encoding.RLE, section()),
        (Encoding.RLE, section(999, 1)),  # no value
        (Encoding.BITMAP, b"\x01" + bytes(124)),  # no value
        (Encoding.BITMAP, bytes(124)),  # too short
        (Encoding.DENSE, bytes(3999)),
        (Encoding.DENSE, bytes(4001)),
    ):
        with pytest.raises(CodecError):
            decode(with_body(x, body, encoding))
    nine = np.arange(9) % 2 == 0
    with pytest.raises(CodecError, match="padding"):
        decode(with_body(nine, b"\x55\x03"))
    with pytest.raises(CodecError, match="not written"):
        decode(with_body(nine, b"\x55\x01", Encoding.DENSE))
    ones = np.ones(16, np.float32)
    with pytest.raises(CodecError, match="always do"):
        decode(with_body(ones, b"\xff\xff" + ones.tobytes(), Encoding.BITMAP))
    few = np.arange(4, dtype=np.int32)
    for third, message in ((2**32, "does not fit"), (2**32 - 1, None)):
        forged = with_body(few, encode_varints(np.array([1, 2, third, 4], np.uint64)), Encoding.DENSE)
        if message is None:
            assert decode(forged)[0].tolist() == [-1, 1, -(2**31), 2]
        else:
            with pytest.raises(CodecError, match=message):
                decode(forged)
    halves = bytearray(encode(np.ones((1, 3), np.float32), values="int4"))
    assert halves[-2:] == b"\x77\x07"
    for position, value in ((-1, 0x17), (-2, 0x78)):  # more codes than announced; -8, which no code is
        forged = bytes(halves[:position]) + bytes([value]) + bytes(halves[len(halves) + position + 1 :])
        with pytest.raises(CodecError, match="half byte"):
            decode(resealed(forged))
    codes = encode(np.ones((1, 4), np.float32), values="int8")
    with pytest.raises(CodecError, match="no code"):  # -128
        decode(resealed(codes[:-1] + b"\x80"))
    scales = bytearray(codes)
    scales[44:48] = struct.pack("<f", float("nan"))
    with pytest.raises(CodecError, match="scale"):
        decode(resealed(bytes(scales)))


def test_zstd_is_bounded_and_kept_only_if_smaller(monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    x = np.tile(np.arange(1, 9, dtype=np.float32), 200)
    assert len(encode(x, compress=True)) < len(encode(x)) / 10
    noise = np.random.default_rng(0).normal(size=50)
    assert encode(noise, compress=True) == encode(noise)

    blob = encode(x, compress=True)

    def with_frame(frame):
        return resealed(blob[:18] + struct.pack("<Q", len(frame)) + blob[26:36] + frame)

    unknown_size = zstandard.ZstdCompressor(write_content_size=False).compress(x.tobytes())
    for frame in (
        zstandard.compress(bytes(10**8)),  # a bomb of a few kB
        unknown_size,
        zstandard.compress(x.tobytes()) + b"\x00",
        zstandard.compress(x.tobytes())[:-1],
        b"no frame",
        b"",
    ):
        with pytest.raises(CodecError):
            decode(with_frame(frame))

    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match=r"sam-ds\[zstd\]"):
        encode(x, compress=True)
    with pytest.raises(CodecError, match=r"sam-ds\[zstd\]"):
        decode(blob)


def test_unit_names():
    assert unit_name(ExpertUnit(3, 7, "up")) == "expert/3/7/up"
    assert unit_name(SharedUnit("layers.3.gate.wg")) == "shared/layers.3.gate.wg"
    assert parse_unit("expert/3/7/up.lora_B") == ExpertUnit(3, 7, "up.lora_B")
    assert parse_unit("shared/counters/used") == SharedUnit("counters/used")
    units = [SharedUnit("a"), ExpertUnit(10, 0, "up"), ExpertUnit(2, 1, "up"), ExpertUnit(2, 1, "down")]
    assert sorted(units) == [units[3], units[2], units[1], units[0]]
    assert len({*units, ExpertUnit(10, 0, "up")}) == 4
    assert STYPE == "sam-ds.codec.v3"


names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,40}", fullmatch=True)


@given(st.integers(0, 99_999), st.integers(0, 99_999), names)
def test_every_unit_has_one_name(layer, expert, tensor):
    try:
        units = [ExpertUnit(layer, expert, tensor), SharedUnit(tensor)]
    except InputError:
        assert "." in tensor
        return
    assert [parse_unit(unit_name(unit)) for unit in units] == units


@pytest.mark.parametrize(
    "name",
    [
        "",
        "expert",
        "expert/3/7",
        "expert/3/7/",
        "expert/3/7/up/",
        "expert/3/7/a/b",
        "expert/03/7/up",
        "expert/-1/7/up",
        "expert/+1/7/up",
        "expert/1e3/7/up",
        "expert/100000/7/up",
        "expert/" + "9" * 5000 + "/7/up",
        "expert/³/7/up",
        "expert/٣/7/up",
        "expert/3/7/up\n",
        "expert/3/7/../up",
        "expert/3/7/..",
        "Expert/3/7/up",
        "shared/",
        "shared//etc/passwd",
        "shared/../x",
        "shared/a..b",
        "shared/a/./b",
        "shared/a/",
        "shared/a\\b",
        "shared/a\x00",
        "shared/-rf",
        "shared/" + "a" * 300,
        "/shared/a",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(InputError):
        parse_unit(name)


UP, GATE = ExpertUnit(0, 1, "up"), SharedUnit("gate")
UPDATE = {GATE: np.arange(3, dtype=np.float32), UP: np.ones((2, 4), np.float32)}
SHAPES = {UP: (2, 4), GATE: (3,)}


def test_an_update_round_trips():
    blobs = encode_units(UPDATE, base_round=5)
    assert list(blobs) == ["expert/0/1/up", "shared/gate"]
    for options in ({"expected": SHAPES, "base_round": 5}, {}):
        got = decode_units(blobs, **options)
        assert got.keys() == UPDATE.keys()
        assert all(bits(got[unit]) == bits(UPDATE[unit]) for unit in UPDATE)
    shuffled = dict(reversed(UPDATE.items()))
    options = {"values": "int8"}
    assert encode_units(UPDATE, rng=np.random.default_rng(0), **options) == encode_units(
        shuffled, rng=np.random.default_rng(0), **options
    )
    with pytest.raises(InputError, match="shared/gate.*complex"):
        encode_units({GATE: np.ones(1, np.complex64)})


@pytest.mark.parametrize("values", ["raw", "bf16", "int8"])
def test_an_array_may_be_a_view_of_its_blob(values):
    whole, part = np.ones((2, 4), np.float32), np.zeros((3, 40), np.float32)
    part[1] = 2.0
    blobs = encode_units({UP: whole, GATE: part}, values=values)
    apart = decode_units(blobs)
    got = decode_units(blobs, copy=False)
    assert all(bits(got[unit]) == bits(apart[unit]) for unit in apart)
    assert got[UP].flags.writeable == (values != "raw")
    assert all(value.flags.writeable and value.flags.aligned for value in (got[GATE], *apart.values()))
    # A blob that lies askew is copied: what reads arrays may want them aligned.
    askew = memoryview(b"-" + blobs["expert/0/1/up"])[1:]
    assert decode_units({"expert/0/1/up": askew}, copy=False)[UP].flags.aligned


@pytest.mark.parametrize("size", [1e25, -1e25, 9e29])
def test_numbers_whose_squares_float32_cannot_hold_are_accepted(size):
    update = {GATE: np.array([1, size, 0], np.float32)}
    assert bits(decode_units(encode_units(update))[GATE]) == bits(update[GATE])


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("unknown-unit", {"expert/0/2/up": encode(np.ones((2, 4), np.float32), base_round=5)}),
        ("unknown-unit", {"expert/../up": b""}),
        ("missing-unit", {"shared/gate": None}),
        ("wrong-shape", {"shared/gate": encode(np.ones((3, 1), np.float32), base_round=5)}),
        ("wrong-shape", {"shared/gate": encode(np.zeros(10**7, np.float32), base_round=5)}),
        ("wrong-round", {"shared/gate": encode(np.ones(3, np.float32), base_round=4)}),
        ("not-finite", {"shared/gate": encode(np.array([1, np.inf, 0], np.float32), base_round=5)}),
        ("not-finite", {"shared/gate": encode(np.array([1, np.nan, 0], np.float32), base_round=5)}),
        ("not-finite", {"shared/gate": encode(np.array([1, -1.1e30, 0], np.float32), base_round=5)}),
        ("corrupt", {"shared/gate": encode(np.ones(3, np.float32), base_round=5)[:-1]}),
        ("corrupt", {"shared/gate": b""}),
    ],
)
def test_updates_are_refused_with_a_reason(reason, change):
    blobs = encode_units(UPDATE, base_round=5) | change
    blobs = {name: blob for name, blob in blobs.items() if blob is not None}
    with pytest.raises(RejectedUpdate, match=reason) as refused:
        decode_units(blobs, expected=SHAPES, base_round=5)
    assert refused.value.reason == reason


def test_the_bound_is_on_the_sum():
    blobs = encode_units(UPDATE)
    decode_units(blobs, max_bytes=44)
    with pytest.raises(RejectedUpdate, match="corrupt"):
        decode_units(blobs, max_bytes=43)


def test_byte_counts_add():
    counts = [ByteCount(raw=4, encoded=3, message=10), ByteCount(raw=1, encoded=1, message=1)]
    assert sum(counts, ByteCount()) == ByteCount(raw=5, encoded=4, message=11)

"""Device code that the kernels share: Philox, normals, and tiles whose threads own whole quads of noise.

The noise of a sample is addressed by elements in H, W, C order, four to a Philox counter, while memory may be in
either order and mirrored. A thread therefore owns a *group*: PIXELS neighbouring pixels times C channels, that is
PIXELS C / 4 whole quads, held as a tuple of [GROUPS] tensors in element order. Mirroring and the change between NHWC
and NCHW are then choices of which register goes where, made at compile time: no shuffle, no shared memory.

LAYOUT "nhwc": a group is PIXELS C elements in a row of memory (with C = 1 and all elements as pixels it serves any
tensor whose memory is in element order). "nchw": a group is C rows of PIXELS elements. PIXELS = 1: a group is one quad
whose elements are addressed and masked one by one, for sizes that nothing divides and for many channels.

FAST picks what only NVIDIA's PTX has (inline assembly); without it the same code runs on AMD, Intel and in the
interpreter, with the same words and normals equal to a few units of the last place.
"""

# Tuples grow in unrolled loops, which Triton types and mypy cannot.
# mypy: disable-error-code="assignment, var-annotated"
from __future__ import annotations

from ._triton import tl, triton

TWO_LN_2 = tl.constexpr(1.3862943611198906)
LOG2_ASM = tl.constexpr("lg2.approx.ftz.f32 $0, $1;")
# sin and cos of 2 pi u for the uint32 word u 2^32. The funnel shift makes the float 1 + (the word's top 23 bits) 2^-23
# without the conversion unit; 2 pi f - 3 pi is the angle less pi, because sin.approx is accurate within [-pi, pi] only.
# Both results have the wrong sign, which costs nothing to change in the multiply-add that follows.
SIN_COS_ASM = tl.constexpr("""{
    .reg .b32 bits; .reg .f32 turn;
    shf.r.wrap.b32 bits, $2, 127, 9;
    mov.b32 turn, bits;
    fma.rn.f32 turn, turn, 0f40C90FDB, 0fC116CBE4;
    cos.approx.ftz.f32 $0, turn;
    sin.approx.ftz.f32 $1, turn;
}""")
# A byte in bits 16-23 of a float is the number byte * 2^-133 exactly (denormal below 128): one PRMT, and the conversion
# unit (16 lanes a clock before sm_89) is left to the special functions. The factor 2^133 goes into the coefficient of
# the fused multiply-add that reads it; those honour denormals unless they are marked .ftz.
BYTE_0_ASM = tl.constexpr("prmt.b32 $0, $1, 0, 0x4044;")
BYTE_1_ASM = tl.constexpr("prmt.b32 $0, $1, 0, 0x4144;")
BYTE_2_ASM = tl.constexpr("prmt.b32 $0, $1, 0, 0x4244;")
BYTE_3_ASM = tl.constexpr("prmt.b32 $0, $1, 0, 0x4344;")


@triton.jit
def philox(c0, c1, c2, c3, key_0, key_1):
    """Philox4x32-10 on uint32 values; one 64-bit product per multiply is one IMAD.WIDE where tl.philox emits two."""
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ key_0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ key_1
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        key_0 = key_0 + 0x9E3779B9
        key_1 = key_1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normal_pair(word_0, word_1, factor, FAST: tl.constexpr):
    """Two normals times sqrt(factor / 2 ln 2): sigma is folded into the radius, factor = 2 ln 2 sigma^2."""
    u_1 = word_0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    if FAST:
        log2_u = tl.inline_asm_elementwise(LOG2_ASM, "=f,f", [u_1], dtype=tl.float32, is_pure=True, pack=1)
        cos, sin = tl.inline_asm_elementwise(
            SIN_COS_ASM, "=f,=f,r", [word_1], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
        # abs: lg2.approx may return a small positive number for u_1 near 1.
        radius = -tl.sqrt(tl.abs(log2_u * factor))
    else:
        theta = word_1.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
        cos = tl.cos(theta)
        sin = tl.sin(theta)
        radius = tl.sqrt(tl.abs(tl.log2(u_1) * factor))
    return radius * cos, radius * sin


@triton.jit
def normals(groups, c1, c2, c3, key_0, key_1, factor, QUADS: tl.constexpr, FAST: tl.constexpr):
    """The normals of each group's QUADS quads in element order: a tuple of 4 QUADS tensors [GROUPS], times sigma."""
    values = ()
    for i in tl.static_range(QUADS):
        quads = (groups * QUADS + i).to(tl.uint32)
        word_0, word_1, word_2, word_3 = philox(quads, c1, c2, c3, key_0, key_1)
        first_0, first_1 = normal_pair(word_0, word_1, factor, FAST)
        second_0, second_1 = normal_pair(word_2, word_3, factor, FAST)
        values += (first_0, first_1, second_0, second_1)
    return values


@triton.jit
def split_ordinal(ordinal):
    """Counter words c1, c2 of a 64-bit ordinal."""
    return ordinal.to(tl.uint32), (ordinal >> 32).to(tl.uint32)


@triton.jit
def mirrored(groups, WIDTH: tl.constexpr, PIXELS: tl.constexpr):
    """The group of the mirror image's pixels: same row, columns counted from the right."""
    columns = groups % (WIDTH // PIXELS)
    return groups - columns + (WIDTH // PIXELS - 1 - columns)


@triton.jit
def split_4(x, GROUPS: tl.constexpr):
    """The four columns of x [GROUPS, 4]."""
    even, odd = tl.split(tl.reshape(x, (GROUPS, 2, 2)))
    column_0, column_2 = tl.split(even)
    column_1, column_3 = tl.split(odd)
    return column_0, column_1, column_2, column_3


@triton.jit
def join_4(column_0, column_1, column_2, column_3, GROUPS: tl.constexpr):
    """[GROUPS, 4] of four columns."""
    return tl.reshape(tl.join(tl.join(column_0, column_2), tl.join(column_1, column_3)), (GROUPS, 4))


@triton.jit
def load_run(ptr, offs, mask, PIXELS: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """PIXELS neighbours from each offset, as a tuple of fp32 [GROUPS]."""
    offs_2d = offs[:, None] + tl.arange(0, PIXELS)[None, :]
    x = tl.load(ptr + offs_2d) if EVEN else tl.load(ptr + offs_2d, mask=mask[:, None], other=0)
    if PIXELS == 4:
        values = split_4(x.to(tl.float32), GROUPS)
    else:
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (GROUPS, 4, 2)))
        even_0, even_1, even_2, even_3 = split_4(even, GROUPS)
        odd_0, odd_1, odd_2, odd_3 = split_4(odd, GROUPS)
        values = (even_0, odd_0, even_1, odd_1, even_2, odd_2, even_3, odd_3)
    return values


@triton.jit
def split_word(word):
    """The bytes of int32 words as fp32 tensors holding byte * 2^-133."""
    byte_0 = tl.inline_asm_elementwise(BYTE_0_ASM, "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1)
    byte_1 = tl.inline_asm_elementwise(BYTE_1_ASM, "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1)
    byte_2 = tl.inline_asm_elementwise(BYTE_2_ASM, "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1)
    byte_3 = tl.inline_asm_elementwise(BYTE_3_ASM, "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1)
    return byte_0, byte_1, byte_2, byte_3


@triton.jit
def load_bytes(ptr, offs, mask, PIXELS: tl.constexpr, EVEN: tl.constexpr):
    """`load_run` of uint8 as whole words; offs must be multiples of PIXELS. Values are byte * 2^-133."""
    WORD: tl.constexpr = tl.int32 if PIXELS == 4 else tl.int64
    offs_word = offs // PIXELS
    word_ptr = ptr.to(tl.pointer_type(WORD))
    word = tl.load(word_ptr + offs_word) if EVEN else tl.load(word_ptr + offs_word, mask=mask, other=0)
    return split_word(word) if PIXELS == 4 else split_word(word.to(tl.int32)) + split_word((word >> 32).to(tl.int32))


@triton.jit
def store_run(ptr, offs, mask, values, PIXELS: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """Write a tuple of PIXELS tensors [GROUPS] as neighbours from each offset, in ptr's dtype."""
    if PIXELS == 4:
        x = join_4(values[0], values[1], values[2], values[3], GROUPS)
    else:
        even = join_4(values[0], values[2], values[4], values[6], GROUPS)
        odd = join_4(values[1], values[3], values[5], values[7], GROUPS)
        x = tl.reshape(tl.join(even, odd), (GROUPS, 8))
    offs_2d = offs[:, None] + tl.arange(0, PIXELS)[None, :]
    if EVEN:
        tl.store(ptr + offs_2d, x.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + offs_2d, x.to(ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def element_offsets(
    groups,
    i: tl.constexpr,
    flip,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Memory offset and mask of element i of each quad; mirrored where flip is 1."""
    elements = groups * 4 + i
    pixels = elements // C
    channels = elements % C
    pixels = pixels + flip * (WIDTH - 1 - 2 * (pixels % WIDTH))
    offs = pixels * C + channels if LAYOUT == "nhwc" else channels * PLANE + pixels
    return offs, elements < C * PLANE


@triton.jit
def load_group(
    ptr,
    groups,
    mask,
    flip,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    MIRROR: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Each group's elements in element order: a tuple of fp32 [GROUPS]. BYTES: uint8 read as words, times 2^-133.

    The mirror image is read where MIRROR is set (or, with PIXELS = 1, where flip is 1).
    """
    values = ()
    if PIXELS == 1:
        for i in tl.static_range(4):
            offs, mask_i = element_offsets(groups, i, flip, C, PLANE, WIDTH, LAYOUT)
            values += (tl.load(ptr + offs, mask=mask_i, other=0).to(tl.float32),)
    else:
        source = mirrored(groups, WIDTH, PIXELS) if MIRROR else groups
        runs = ()
        for i in tl.static_range(C):
            offs = source * (PIXELS * C) + i * PIXELS if LAYOUT == "nhwc" else source * PIXELS + i * PLANE
            if BYTES:
                runs += load_bytes(ptr, offs, mask, PIXELS, EVEN)
            else:
                runs += load_run(ptr, offs, mask, PIXELS, GROUPS, EVEN)
        for pixel in tl.static_range(PIXELS):
            for channel in tl.static_range(C):
                if LAYOUT == "nhwc":
                    values += (runs[(PIXELS - 1 - pixel if MIRROR else pixel) * C + channel],)
                else:
                    values += (runs[channel * PIXELS + (PIXELS - 1 - pixel if MIRROR else pixel)],)
    return values


@triton.jit
def store_group(
    ptr,
    groups,
    mask,
    values,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Write each group's elements, given in element order, in ptr's dtype."""
    if PIXELS == 1:
        for i in tl.static_range(4):
            offs, mask_i = element_offsets(groups, i, 0, C, PLANE, WIDTH, LAYOUT)
            tl.store(ptr + offs, values[i].to(ptr.dtype.element_ty), mask=mask_i)
    else:
        for i in tl.static_range(C):
            run = ()
            for k in tl.static_range(PIXELS):
                run += (values[i * PIXELS + k] if LAYOUT == "nhwc" else values[k * C + i],)
            offs = groups * (PIXELS * C) + i * PIXELS if LAYOUT == "nhwc" else groups * PIXELS + i * PLANE
            store_run(ptr, offs, mask, run, PIXELS, GROUPS, EVEN)

"""How K and V of a block lie in memory, and how a tile of them becomes numbers: the one place that knows the packing.

A side (K or V of a block) is *lines* of *columns*: a line is what shares scales, a channel of all tokens (`by_channel`) or a
token with all channels. kvfold.store.pack cuts a line of C codes into runs: byte j holds codes j, j + W, j + 2W … for W bytes a
line. Unpacked in registers they come out as j's codes side by side: column n of a tile holds code (n % per_word) * W + n //
per_word. Nothing is shuffled for that: who needs the order (queries, token masks, the output) asks `code_of_column`.

Scales are applied here, on pairs of half precision numbers, as a tensor core multiplies 16 query rows at the price of one:
folding a group's scales into 16 padded queries would take as many instructions as a fused multiply-add on the codes. What
is one number per segment (the rotation, the query's scale) is folded outside.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from kvfold.kernels.triton import interpreted

INTERPRETED = tl.constexpr(interpreted())
"""The interpreter knows neither assembly nor products of bfloat16."""


@dataclass(frozen=True)
class Side:
    """K or V of a block, as a kernel's compile-time constant.

    Attributes:
        kind: `dense` numbers, `float8`, `affine` codes, or codes of a `table`.
        bits: of a code; unused for dense numbers.
        by_channel: lines are channels, columns tokens; otherwise the other way round.
        lines, columns: T and D, or D and T.
        group: columns that share a scale; the largest power of two that both it and a line's bytes divide by makes a chunk.
        scales: `none`, `half`, or `log8` (see kvfold.store.affine).
        symmetric: no zero point.
        by_bits: e4m3 numbers get half precision by their bits, as devices before compute capability 8.9 can't convert them.
    """

    kind: str
    bits: int
    by_channel: bool
    lines: int
    columns: int
    group: int
    scales: str = "none"
    symmetric: bool = True
    by_bits: bool = False

    @property
    def per_word(self) -> int:
        """Codes in a word, which is a byte, or 16 bits of two whole bytes; 1 for dense numbers, whatever their size."""
        return {"dense": 1, "float8": 2}.get(self.kind, max(2, 8 // self.bits))

    @property
    def width(self) -> int:
        """Words (dense: numbers) a line."""
        return self.columns // self.per_word

    @property
    def runs(self) -> int:
        """Codes in a byte: the runs that a line is cut into."""
        return 8 // self.bits

    @property
    def neighbours(self) -> bool:
        """Whether a word is 16 bits with two whole bytes, which are neighbours; otherwise it has one code from each run."""
        return self.kind == "float8" or (self.kind != "dense" and self.bits == 8)

    @property
    def block_lines(self) -> int:
        return _power(self.lines)

    @property
    def block_width(self) -> int:
        return _power(self.width)

    @property
    def padded(self) -> bool:
        return self.block_width != self.width or self.block_lines != self.lines

    @property
    def num_groups(self) -> int:
        return self.columns // self.group

    @property
    def chunk(self) -> int:
        """Words side by side whose i-th codes share a group, for every i."""
        words = self.group // self.per_word if self.neighbours else self.group
        if words % self.width == 0:
            return self.block_width
        common = self.width | words
        return common & -common

    @property
    def num_chunks(self) -> int:
        return self.block_width // self.chunk

    @property
    def largest_step(self) -> float:
        """With which the largest code is still a half precision number."""
        return 65504.0 / (2**self.bits - 1)

    @property
    def middle(self) -> float:
        return (2**self.bits - 1) / 2


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@triton.jit
def code_of_column(SIDE: tl.constexpr, column):
    """Which of a line's codes a tile's column holds; beyond `columns` where the line is padded."""
    if SIDE.per_word == 1 or SIDE.neighbours:
        code = column
    else:
        byte = column // SIDE.per_word
        code = tl.where(byte < SIDE.width, (column % SIDE.per_word) * SIDE.width + byte, SIDE.columns)
    return code


@triton.jit
def fetch(SIDE: tl.constexpr, start, line_stride, block, line, codes, scale, zero, base):
    """What is stored of the lines `line [N]`: words `[N, W]`, scales and zero points `[N, chunks, per_word]`.

    Args:
        start: where the block's first line starts, in elements of `codes`.
        line_stride: elements between lines.
        block: the block's place in the pool, by which scales are found.
    """
    word = tl.arange(0, SIDE.block_width)
    if SIDE.neighbours:
        codes = codes.to(tl.pointer_type(tl.uint16))
    address = codes + start + line[:, None] * line_stride + word[None, :]
    if SIDE.padded:
        raw = tl.load(address, mask=(line[:, None] < SIDE.lines) & (word[None, :] < SIDE.width), other=0)
    else:
        raw = tl.load(address)
    if SIDE.scales == "none":
        factor, offset = raw, raw
    else:
        at, inside = _scale_places(SIDE, block, line)
        factor = tl.load(scale + at, mask=inside, other=0)
        if SIDE.scales == "log8":
            if SIDE.by_channel:
                factor = tl.exp2(factor.to(tl.float32) * (-1.0 / 24.0)) * tl.load(base + block).to(tl.float32)
            else:
                # Places that no token has come to yet say 2^12; what they hold must stay finite, as 0 times it is added.
                factor = tl.minimum(tl.exp2(12.0 - factor.to(tl.float32) * 0.125), SIDE.largest_step)
        if SIDE.symmetric:
            offset = factor
        else:
            offset = tl.load(zero + at, mask=inside, other=0)
    return raw, factor, offset


@triton.jit
def numbers(SIDE: tl.constexpr, line, raw, factor, offset, levels):
    """`[N, W * per_word]` numbers from what `fetch` returned, in half precision or, dense, their own; 0 where padded."""
    if SIDE.kind == "dense":
        x = raw
    else:
        x = _decoded(SIDE, raw, levels)
        if SIDE.scales != "none":
            x = _scaled(SIDE, x, factor, offset)
        if SIDE.padded:
            code = code_of_column(SIDE, tl.arange(0, SIDE.block_width * SIDE.per_word))
            x = tl.where((line[:, None] < SIDE.lines) & (code[None, :] < SIDE.columns), x, 0.0)
    return x


@triton.jit
def _scale_places(SIDE: tl.constexpr, block, line):
    """Where the scales of a tile are, `[N, chunks, per_word]`, and which of them exist."""
    chunk = tl.arange(0, SIDE.num_chunks)[None, :, None]
    code = tl.arange(0, SIDE.per_word)[None, None, :]
    if SIDE.neighbours:
        group = (chunk * (SIDE.chunk * SIDE.per_word) + code * 0) // SIDE.group
    else:
        group = (code * SIDE.width + chunk * SIDE.chunk) // SIDE.group
    first = block * (SIDE.num_groups * SIDE.lines)
    if SIDE.by_channel:
        at = first + group * SIDE.lines + line[:, None, None]
    else:
        at = first + line[:, None, None] * SIDE.num_groups + group
    return at, (line[:, None, None] < SIDE.lines) & (group < SIDE.num_groups)


@triton.jit
def _scaled(SIDE: tl.constexpr, x, factor, offset):
    """x * scale + zero, where a line's scales are those of its groups."""
    num_lines: tl.constexpr = x.shape[0]
    x = x.reshape(num_lines, SIDE.num_chunks, SIDE.chunk, SIDE.per_word) * factor.to(tl.float16)[:, :, None, :]
    if not SIDE.symmetric:
        x += offset[:, :, None, :]
    x = x.reshape(num_lines, SIDE.block_width * SIDE.per_word)
    if SIDE.per_word == 4 and not INTERPRETED:
        # Triton 3.9 would move this reshape behind the copy to shared memory and fail ("Illegal shared layout", Hopper):
        # something has to stand between them. The assembler leaves it out.
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    return x


@triton.jit
def _decoded(SIDE: tl.constexpr, raw, levels):
    """From stored words to half precision numbers, before scales: `[N, W]` to `[N, W * per_word]`."""
    if SIDE.kind == "table":
        x = tl.load(levels + _interleaved(SIDE, _codes(SIDE, raw)).to(tl.int32))
    elif SIDE.kind == "float8":
        codes = _interleaved(SIDE, (raw.to(tl.uint8), (raw >> 8).to(tl.uint8)))
        if SIDE.bits == 5:  # of the exponent
            x = codes.to(tl.float8e5, bitcast=True).to(tl.float16)
        elif SIDE.by_bits:  # the same fields further up; exponents count from 7, and from 15
            word = codes.to(tl.uint16)
            x = ((word & 0x80) << 8 | (word & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
        else:
            x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        if INTERPRETED:
            x = _interleaved(SIDE, _halves(SIDE, raw))
        else:
            x = _interleaved(SIDE, _halves_assembly(SIDE, raw))
        if SIDE.symmetric:
            x -= SIDE.middle
    return x


@triton.jit
def _codes(SIDE: tl.constexpr, raw):
    """The codes of a word, the lowest bits first: a tuple of `[N, W]` each."""
    if SIDE.bits == 8:
        codes = (raw & 255, raw >> 8)
    elif SIDE.bits == 4:
        codes = (raw & 15, raw >> 4)
    else:
        codes = (raw & 3, (raw >> 2) & 3, (raw >> 4) & 3, raw >> 6)
    return codes


@triton.jit
def _interleaved(SIDE: tl.constexpr, parts):
    """`[N, W]` each to `[N, W * per_word]`, those of a word side by side."""
    if SIDE.per_word == 2:
        x = tl.join(parts[0], parts[1])
    else:
        x = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    return x.reshape(parts[0].shape[0], SIDE.block_width * SIDE.per_word)


@triton.jit
def _half(bits):
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _halves(SIDE: tl.constexpr, raw):
    """The codes of a word as half precision numbers, exactly.

    0x6400 is 1024 in half precision, where a unit of the last place is 1: or-ing bits in adds them. A word is written twice
    into 32 bits, so that two of its codes are masked, or-ed and multiplied at once; a code that stands higher by k bits comes
    out 2^k times as large.
    """
    if SIDE.bits == 8:
        x = (_half((raw & 255) | 0x6400) - 1024.0, _half((raw >> 8) | 0x6400) - 1024.0)
    elif SIDE.bits == 4:
        y = ((raw.to(tl.int32) * 0x10001) & 0x00F0000F) | 0x64006400
        x = (_half(y) - 1024.0, _half(y >> 16) * 0.0625 - 64.0)
    else:
        twice = raw.to(tl.int32) * 0x10001
        y = (twice & 0x000C0003) | 0x64006400
        z = (twice & 0x00C00030) | 0x64006400
        x = (
            _half(y) - 1024.0,
            _half(y >> 16) * 0.25 - 256.0,
            _half(z) * 0.0625 - 64.0,
            _half(z >> 16) * 0.015625 - 16.0,
        )
    return x


@triton.jit
def _halves_assembly(SIDE: tl.constexpr, raw):
    """The same with the instructions that `_halves` has in mind: a permutation of bytes, a masked or, and a fused multiply-add
    on two numbers. The compiler finds them only in part."""
    if SIDE.bits == 8:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, m;
            mov.b32 m, 0x64646464;
            prmt.b32 $0, $2, m, 0x5150;
            prmt.b32 $1, $2, m, 0x5352;
            mov.b32 m, 0x64006400;
            sub.f16x2 $0, $0, m;
            sub.f16x2 $1, $1, m;
            }""",
            "=&r,=&r,r",
            [raw],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        x = (_half(y), _half(y >> 16))
    elif SIDE.bits == 4:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, f, g;
            mov.b32 f, 0x2C003C00;
            mov.b32 g, 0xD400E400;
            prmt.b32 t, $4, 0, 0x4040;
            lop3.b32 t, t, 0x00F0000F, 0x64006400, 0xEA;
            fma.rn.f16x2 $0, t, f, g;
            prmt.b32 t, $4, 0, 0x4141;
            lop3.b32 t, t, 0x00F0000F, 0x64006400, 0xEA;
            fma.rn.f16x2 $1, t, f, g;
            prmt.b32 t, $4, 0, 0x4242;
            lop3.b32 t, t, 0x00F0000F, 0x64006400, 0xEA;
            fma.rn.f16x2 $2, t, f, g;
            prmt.b32 t, $4, 0, 0x4343;
            lop3.b32 t, t, 0x00F0000F, 0x64006400, 0xEA;
            fma.rn.f16x2 $3, t, f, g;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [raw],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
        x = (_half(y), _half(y >> 16))
    else:
        y, z = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, f, g, h, i;
            mov.b32 f, 0x34003C00;
            mov.b32 g, 0xDC00E400;
            mov.b32 h, 0x24002C00;
            mov.b32 i, 0xCC00D400;
            prmt.b32 t, $8, 0, 0x4040;
            lop3.b32 u, t, 0x000C0003, 0x64006400, 0xEA;
            lop3.b32 t, t, 0x00C00030, 0x64006400, 0xEA;
            fma.rn.f16x2 $0, u, f, g;
            fma.rn.f16x2 $4, t, h, i;
            prmt.b32 t, $8, 0, 0x4141;
            lop3.b32 u, t, 0x000C0003, 0x64006400, 0xEA;
            lop3.b32 t, t, 0x00C00030, 0x64006400, 0xEA;
            fma.rn.f16x2 $1, u, f, g;
            fma.rn.f16x2 $5, t, h, i;
            prmt.b32 t, $8, 0, 0x4242;
            lop3.b32 u, t, 0x000C0003, 0x64006400, 0xEA;
            lop3.b32 t, t, 0x00C00030, 0x64006400, 0xEA;
            fma.rn.f16x2 $2, u, f, g;
            fma.rn.f16x2 $6, t, h, i;
            prmt.b32 t, $8, 0, 0x4343;
            lop3.b32 u, t, 0x000C0003, 0x64006400, 0xEA;
            lop3.b32 t, t, 0x00C00030, 0x64006400, 0xEA;
            fma.rn.f16x2 $3, u, f, g;
            fma.rn.f16x2 $7, t, h, i;
            }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [raw],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=4,
        )
        x = (_half(y), _half(y >> 16), _half(z), _half(z >> 16))
    return x

//! With AVX2 and FMA, for most CPUs without AVX-512: 32 weights in a register.
//!
//! `maddubs` multiplies unsigned by signed bytes and adds pairs to 16 bits, which limits what the unsigned side may
//! be. Bits of a quant and small values fit; where they are moved up by an offset, the prepared activation holds what
//! that adds, negated. Of iq4's values and whole bytes one side goes in without its signs, which the other takes over.

use std::arch::x86_64::*;

use super::{BLOCK, IQ4_VALUES, MXFP4_VALUES, Numerics, Q4_0_OFFSET, Q8_0_BYTES, Quantized, RowKernel};
use crate::ggml;

pub fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

pub fn kernel(ty: i32, numerics: Numerics) -> Option<RowKernel> {
    Some(match ty as u32 {
        ggml::GGML_TYPE_Q4_0 if numerics == Numerics::Cuda => of::<Q4_0AsCuda>("q4_0 avx2"),
        ggml::GGML_TYPE_Q4_0 => of::<Q4_0>("q4_0 avx2"),
        ggml::GGML_TYPE_IQ4_NL => of::<Iq4Nl>("iq4_nl avx2"),
        ggml::GGML_TYPE_MXFP4 => of::<Mxfp4>("mxfp4 avx2"),
        ggml::GGML_TYPE_Q8_0 => of::<Q8_0>("q8_0 avx2"),
        ggml::GGML_TYPE_Q4_K => of::<Q4K>("q4_K avx2"),
        ggml::GGML_TYPE_Q5_K => of::<Q5K>("q5_K avx2"),
        ggml::GGML_TYPE_Q6_K => of::<Q6K>("q6_K avx2"),
        ggml::GGML_TYPE_IQ4_XS => of::<Iq4Xs>("iq4_xs avx2"),
        _ => return None,
    })
}

super::row_loops!("avx2,fma,f16c");

/// Rounds a block of an activation; its scale.
///
/// # Safety
/// There are 32 elements, and room for them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize(x: *const f32, q: *mut i8) -> f32 {
    // SAFETY: passed on.
    let x: [__m256; 4] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(x.add(i * 8)) });
    // by their bits, so that what is no number is the largest
    let size = |i: usize| _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0), x[i]));
    let most = _mm256_max_epi32(_mm256_max_epi32(size(0), size(1)), _mm256_max_epi32(size(2), size(3)));
    let four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
    let two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    let most = _mm_max_epi32(two, _mm_shuffle_epi32::<0b01>(two));
    let scale = f32::from_bits(_mm_cvtsi128_si32(most) as u32) / 127.0;
    if scale.is_normal() {
        let by = _mm256_set1_ps(1.0 / scale);
        let rounded = |i: usize| {
            let x = _mm256_mul_ps(x[i], by);
            // halves away from zero
            let half = _mm256_or_ps(_mm256_set1_ps(0.5), _mm256_and_ps(x, _mm256_set1_ps(-0.0)));
            _mm256_cvttps_epi32(_mm256_add_ps(x, half))
        };
        let bytes = _mm256_packs_epi16(
            _mm256_packs_epi32(rounded(0), rounded(1)),
            _mm256_packs_epi32(rounded(2), rounded(3)),
        );
        // packs work on halves of registers: fours of each come alternately
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        // SAFETY: passed on.
        unsafe { _mm256_storeu_si256(q.cast(), _mm256_permutevar8x32_epi32(bytes, order)) };
    }
    scale
}

/// A row's product with an activation, so far.
#[derive(Clone, Copy)]
struct Sum {
    products: __m256,
    /// What the minimums of a type take away; kept apart, since it is as large as what remains.
    mins: __m256,
}

impl Sum {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn zero() -> Self {
        Sum { products: _mm256_setzero_ps(), mins: _mm256_setzero_ps() }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add(self, products: __m256, scale: __m256) -> Self {
        Sum { products: _mm256_fmadd_ps(products, scale, self.products), ..self }
    }

    /// Adds two products to each other first: the chain of sums is half as long, and so is what it rounds away.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_both(self, products: [__m256; 2], scales: [__m256; 2]) -> Self {
        let both = _mm256_fmadd_ps(products[0], scales[0], _mm256_mul_ps(products[1], scales[1]));
        Sum { products: _mm256_add_ps(self.products, both), ..self }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn total(self) -> f32 {
        // in double precision, since products and minimums nearly cancel each other
        let low = |x| _mm256_cvtps_pd(_mm256_castps256_ps128(x));
        let high = |x| _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(x));
        let four = _mm256_sub_pd(
            _mm256_add_pd(low(self.products), high(self.products)),
            _mm256_add_pd(low(self.mins), high(self.mins)),
        );
        let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
        _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two))) as f32
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn floats(x: [__m256i; 2]) -> [__m256; 2] {
    [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(at: *const u8) -> __m256i {
    // SAFETY: the caller has 32 bytes.
    unsafe { _mm256_loadu_si256(at.cast()) }
}

/// Two pieces of 16 bytes, `STRIDE` apart.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pieces<const STRIDE: usize>(at: *const u8) -> __m256i {
    // SAFETY: the caller has the bytes.
    unsafe {
        let low = _mm256_castsi128_si256(_mm_loadu_si128(at.cast()));
        _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(at.add(STRIDE).cast()))
    }
}

/// The low and the high nibbles of all bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(x: __m256i) -> [__m256i; 2] {
    let low = _mm256_set1_epi8(0x0f);
    [_mm256_and_si256(x, low), _mm256_and_si256(_mm256_srli_epi16::<4>(x), low)]
}

/// The values that nibbles stand for, moved up by `offset`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn values(table: &[i8; 16], offset: i8, nibbles: [__m256i; 2]) -> [__m256i; 2] {
    // SAFETY: the table has 16 bytes.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let table = _mm256_add_epi8(table, _mm256_set1_epi8(offset));
    [_mm256_shuffle_epi8(table, nibbles[0]), _mm256_shuffle_epi8(table, nibbles[1])]
}

/// Sums of neighbouring 16-bit numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pairs(x: __m256i) -> __m256i {
    _mm256_madd_epi16(x, _mm256_set1_epi16(1))
}

/// A number in half precision for all lanes. Not for one: that would be inserted into the register of the one before,
/// and wait for it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half(at: *const u8) -> __m256 {
    // SAFETY: the caller has two bytes.
    _mm256_cvtph_ps(_mm_set1_epi16(unsafe { at.cast::<i16>().read_unaligned() }))
}

/// Two numbers in half precision, `STRIDE` bytes apart, each for a half of the lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn two_halves<const STRIDE: usize>(at: *const u8) -> __m256 {
    // SAFETY: the caller has the bytes.
    let words = |i: usize| _mm_set1_epi16(unsafe { at.add(i * STRIDE).cast::<i16>().read_unaligned() });
    _mm256_cvtph_ps(_mm_unpacklo_epi64(words(0), words(1)))
}

/// The nibbles of four blocks of 32, or the values that they stand for. A block's 16 bytes are a half of a register,
/// their low nibbles its first 16 weights, the high ones the others.
struct Nibbles {
    q: [[__m256i; 2]; 2],
    scale: [__m256; 2],
}

/// Two numbers, each for a half of the lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn lanes(low: f32, high: f32) -> __m256 {
    _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low))
}

/// Activations in the order of `Nibbles`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn four_blocks(act: &Quantized) -> ([[__m256i; 2]; 2], [__m256; 2]) {
    let q: *const u8 = act.q.as_ptr().cast();
    // SAFETY: these are the first four blocks.
    let two = |i: usize| unsafe {
        let at = q.add(i * 2 * BLOCK);
        [pieces::<BLOCK>(at), pieces::<BLOCK>(at.add(16))]
    };
    let [a, b, c, d, ..] = act.scale;
    ([two(0), two(1)], [lanes(a, b), lanes(c, d)])
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scales(w: &[__m256; 2], act: &[__m256; 2]) -> [__m256; 2] {
    [_mm256_mul_ps(w[0], act[0]), _mm256_mul_ps(w[1], act[1])]
}

/// For weights moved up to unsigned numbers that are small: the pairs of two registers still fit 16 bits.
#[repr(C, align(64))]
struct Moved {
    q: [[__m256i; 2]; 2],
    /// What the offset of the weights adds, negated.
    correction: [__m256i; 2],
    scale: [__m256; 2],
}

impl Moved {
    /// The largest weight.
    const MAX: i32 = i16::MAX as i32 / (4 * 127);

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn pair_sums(w: [__m256i; 2], act: [__m256i; 2]) -> __m256i {
        pairs(_mm256_add_epi16(_mm256_maddubs_epi16(w[0], act[0]), _mm256_maddubs_epi16(w[1], act[1])))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(act: &Quantized, offset: i8) -> Self {
        let (q, scale) = four_blocks(act);
        let ones = [_mm256_set1_epi8(1); 2];
        let less = _mm256_set1_epi32(-i32::from(offset));
        let correction = [
            _mm256_mullo_epi32(Moved::pair_sums(ones, q[0]), less),
            _mm256_mullo_epi32(Moved::pair_sums(ones, q[1]), less),
        ];
        Moved { q, correction, scale }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn dot(&self, w: &Nibbles, sum: Sum) -> Sum {
        let products = [
            _mm256_add_epi32(Moved::pair_sums(w.q[0], self.q[0]), self.correction[0]),
            _mm256_add_epi32(Moved::pair_sums(w.q[1], self.q[1]), self.correction[1]),
        ];
        sum.add_both(floats(products), scales(&w.scale, &self.scale))
    }
}

/// Activations for weights of up to +-127.
#[derive(Clone, Copy)]
struct Signed {
    size: __m256i,
    signs: __m256i,
}

impl Signed {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(q: __m256i) -> Self {
        Signed { size: _mm256_abs_epi8(q), signs: q }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn both(q: [__m256i; 2]) -> [Self; 2] {
        [Signed::new(q[0]), Signed::new(q[1])]
    }

    /// Sums of two products, times 16-bit numbers, and of neighbours.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn products(&self, w: __m256i, scale: __m256i) -> __m256i {
        _mm256_madd_epi16(_mm256_maddubs_epi16(self.size, _mm256_sign_epi8(w, self.signs)), scale)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn products_of_both(both: &[Self; 2], w: &[__m256i; 2], scale: __m256i) -> __m256i {
        _mm256_add_epi32(both[0].products(w[0], scale), both[1].products(w[1], scale))
    }
}

/// q4_0 and iq4_nl: a scale in half precision, then 16 bytes.
const Q4_BYTES: usize = 2 + 16;
/// mxfp4: an exponent, then 16 bytes.
const MXFP4_BYTES: usize = 1 + 16;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4_scales(w: *const u8) -> [__m256; 2] {
    // SAFETY: the caller has four blocks.
    unsafe { [two_halves::<Q4_BYTES>(w), two_halves::<Q4_BYTES>(w.add(2 * Q4_BYTES))] }
}

/// The nibbles of four blocks whose first 16 are at `at`, two blocks to a register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn four_nibbles<const STRIDE: usize>(at: *const u8) -> [[__m256i; 2]; 2] {
    // SAFETY: the caller has the bytes.
    unsafe { [nibbles(pieces::<STRIDE>(at)), nibbles(pieces::<STRIDE>(at.add(2 * STRIDE)))] }
}

struct Q4_0;

impl Format for Q4_0 {
    const N: usize = 4 * 32;
    const BYTES: usize = 4 * Q4_BYTES;
    type Act = Moved;
    type Weights = Nibbles;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: &Quantized) -> Moved {
        const { assert!(15 <= Moved::MAX) };
        Moved::new(act, Q4_0_OFFSET)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> Nibbles {
        // SAFETY: the caller has four blocks.
        unsafe { Nibbles { q: four_nibbles::<Q4_BYTES>(w.add(2)), scale: q4_scales(w) } }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &Nibbles, act: &Moved, sum: Sum) -> Sum {
        act.dot(w, sum)
    }
}

/// q4_0 with the sums of CUDA's kernel.
struct Q4_0AsCuda;

/// As `Moved`, for weights that are taken as they are.
#[repr(C, align(64))]
struct MovedAsCuda {
    q: [[__m256i; 2]; 2],
    scale: [__m256; 2],
    /// What the offset of the weights adds to a lane, negated.
    correction: [__m256; 2],
}

impl Format for Q4_0AsCuda {
    const N: usize = Q4_0::N;
    const BYTES: usize = Q4_0::BYTES;
    const ELEMENT_SUMS: bool = true;
    type Act = MovedAsCuda;
    type Weights = Nibbles;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: &Quantized) -> MovedAsCuda {
        let (q, scale) = four_blocks(act);
        let [a, b, c, d, ..] = act.q4_0_corrections();
        MovedAsCuda { q, scale, correction: [lanes(a, b), lanes(c, d)] }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> Nibbles {
        // SAFETY: passed on.
        unsafe { Q4_0::decode(w) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &Nibbles, act: &MovedAsCuda, sum: Sum) -> Sum {
        let [a, b] = floats([Moved::pair_sums(w.q[0], act.q[0]), Moved::pair_sums(w.q[1], act.q[1])]);
        let products = [
            _mm256_fmadd_ps(a, act.scale[0], act.correction[0]),
            _mm256_fmadd_ps(b, act.scale[1], act.correction[1]),
        ];
        sum.add_both(products, w.scale)
    }
}

struct Mxfp4;

impl Mxfp4 {
    const OFFSET: i8 = 12;
}

impl Format for Mxfp4 {
    const N: usize = 4 * 32;
    const BYTES: usize = 4 * MXFP4_BYTES;
    type Act = Moved;
    type Weights = Nibbles;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: &Quantized) -> Moved {
        const { assert!(2 * Mxfp4::OFFSET as i32 <= Moved::MAX) };
        Moved::new(act, Mxfp4::OFFSET)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> Nibbles {
        // SAFETY: the caller has four blocks.
        unsafe {
            let [a, b] = four_nibbles::<MXFP4_BYTES>(w.add(1));
            let q = [values(&MXFP4_VALUES, Mxfp4::OFFSET, a), values(&MXFP4_VALUES, Mxfp4::OFFSET, b)];
            let exponent = |i: usize| _mm_set1_ps(EXPONENTS[usize::from(*w.add(i * MXFP4_BYTES))]);
            let scale =
                [_mm256_set_m128(exponent(1), exponent(0)), _mm256_set_m128(exponent(3), exponent(2))];
            Nibbles { q, scale }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &Nibbles, act: &Moved, sum: Sum) -> Sum {
        act.dot(w, sum)
    }
}

/// Half of what exponents say, since the table's values are doubled: 2^(e - 128), the two smallest denormal.
static EXPONENTS: [f32; 256] = {
    let mut out = [0.0; 256];
    let mut e = 0;
    while e < 256 {
        out[e] = f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e as u32 - 1) << 23 });
        e += 1;
    }
    out
};

struct Iq4Nl;

/// As `Moved`, for values with signs.
#[repr(C, align(64))]
struct FourBlocks {
    q: [[Signed; 2]; 2],
    scale: [__m256; 2],
}

impl Format for Iq4Nl {
    const N: usize = 4 * 32;
    const BYTES: usize = 4 * Q4_BYTES;
    type Act = FourBlocks;
    type Weights = Nibbles;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: &Quantized) -> FourBlocks {
        let ([a, b], scale) = four_blocks(act);
        FourBlocks { q: [Signed::both(a), Signed::both(b)], scale }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> Nibbles {
        // SAFETY: the caller has four blocks.
        unsafe {
            let [a, b] = four_nibbles::<Q4_BYTES>(w.add(2));
            Nibbles { q: [values(&IQ4_VALUES, 0, a), values(&IQ4_VALUES, 0, b)], scale: q4_scales(w) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &Nibbles, act: &FourBlocks, sum: Sum) -> Sum {
        let ones = _mm256_set1_epi16(1);
        let products = [
            Signed::products_of_both(&act.q[0], &w.q[0], ones),
            Signed::products_of_both(&act.q[1], &w.q[1], ones),
        ];
        sum.add_both(floats(products), scales(&w.scale, &act.scale))
    }
}

/// q8_0 by q8_0, two blocks.
struct Q8_0;

#[repr(C, align(64))]
struct TwoBlocks {
    q: [__m256i; 2],
    scale: [f32; 2],
}

struct Bytes {
    q: [__m256i; 2],
    scale: [__m256; 2],
}

impl Format for Q8_0 {
    const N: usize = 2 * 32;
    const BYTES: usize = 2 * Q8_0_BYTES;
    type Act = TwoBlocks;
    type Weights = Bytes;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: &Quantized) -> TwoBlocks {
        let q: *const u8 = act.q.as_ptr().cast();
        // SAFETY: there are two blocks, and more.
        let q = unsafe { [load(q), load(q.add(BLOCK))] };
        TwoBlocks { q, scale: [act.scale[0], act.scale[1]] }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> Bytes {
        // SAFETY: the caller has two blocks.
        unsafe {
            let second = w.add(Q8_0_BYTES);
            Bytes { q: [load(w.add(2)), load(second.add(2))], scale: [half(w), half(second)] }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &Bytes, act: &TwoBlocks, sum: Sum) -> Sum {
        // the weights without signs, unlike `Signed`: they may be -128, activations are not
        let products = |i: usize| {
            pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(w.q[i]), _mm256_sign_epi8(act.q[i], w.q[i])))
        };
        let act_scale = [_mm256_set1_ps(act.scale[0]), _mm256_set1_ps(act.scale[1])];
        sum.add_both(floats([products(0), products(1)]), scales(&w.scale, &act_scale))
    }
}

/// The activation of 256 weights of q4_K or q5_K.
#[repr(C, align(64))]
struct WithSums {
    q: [__m256i; 8],
    scale: __m256,
    /// What a block adds up to is what its minimum is multiplied with.
    sums: __m256,
}

/// The weights of q4_K or q5_K. Scales and minimums are those of blocks.
struct WithMins {
    q: [__m256i; 8],
    scale: __m256,
    mins: __m256,
    d: __m256,
    d_min: __m256,
}

/// What q4_K and q5_K begin with: two scales in half precision, eight 6-bit scales and minimums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode_q45_k(w: *const u8, q: [__m256i; 8]) -> WithMins {
    // SAFETY: the caller has a block.
    unsafe {
        let [a, b, c] = w.add(4).cast::<[u32; 3]>().read_unaligned();
        let pair = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32) as i64;
        let scales = pair(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030);
        let mins = pair(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030);
        let floats = |x: i64| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(x)));
        WithMins { q, scale: floats(scales), mins: floats(mins), d: half(w), d_min: half(w.add(2)) }
    }
}

macro_rules! with_mins {
    ($name:ident, $bytes:expr, |$w:ident| $decode:expr) => {
        struct $name;

        impl Format for $name {
            const N: usize = 256;
            const BYTES: usize = $bytes;
            type Act = WithSums;
            type Weights = WithMins;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn prepare(act: &Quantized) -> WithSums {
                // SAFETY: there are 8 blocks, scales and sums.
                unsafe {
                    WithSums {
                        q: act.q.as_ptr().cast::<[__m256i; 8]>().read_unaligned(),
                        scale: _mm256_loadu_ps(act.scale.as_ptr()),
                        sums: _mm256_loadu_ps(act.sums().as_ptr()),
                    }
                }
            }

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn decode($w: *const u8) -> WithMins {
                // SAFETY: passed on.
                unsafe { decode_q45_k($w, $decode) }
            }

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn dot(w: &WithMins, act: &WithSums, sum: Sum) -> Sum {
                // through memory, from where one is a whole register at no cost
                let mut scales = [0.0; 8];
                // SAFETY: there are 8.
                unsafe { _mm256_storeu_ps(scales.as_mut_ptr(), _mm256_mul_ps(w.scale, act.scale)) };
                let term = |i: usize| _mm256_cvtepi32_ps(pairs(_mm256_maddubs_epi16(w.q[i], act.q[i])));
                // two chains of sums are half as long
                let first = |i: usize| _mm256_mul_ps(term(i), _mm256_set1_ps(scales[i]));
                let mut sums = [first(0), first(1)];
                for i in 2..8 {
                    sums[i % 2] = _mm256_fmadd_ps(term(i), _mm256_set1_ps(scales[i]), sums[i % 2]);
                }
                Sum {
                    products: _mm256_fmadd_ps(_mm256_add_ps(sums[0], sums[1]), w.d, sum.products),
                    mins: _mm256_fmadd_ps(_mm256_mul_ps(w.mins, act.sums), w.d_min, sum.mins),
                }
            }
        }
    };
}

/// Before the weights of q4_K, and before the high bits of those of q5_K.
const HEAD: usize = 2 + 2 + 12;

with_mins!(Q4K, HEAD + 128, |w| {
    let [a, b] = nibbles(load(w.add(HEAD)));
    let [c, d] = nibbles(load(w.add(HEAD + 32)));
    let [e, f] = nibbles(load(w.add(HEAD + 64)));
    let [g, h] = nibbles(load(w.add(HEAD + 96)));
    [a, b, c, d, e, f, g, h]
});

/// Adds the fifth bits that a shift brought to where they belong.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fifth(q: __m256i, shifted: __m256i) -> __m256i {
    _mm256_or_si256(q, _mm256_and_si256(shifted, _mm256_set1_epi8(1 << 4)))
}

with_mins!(Q5K, HEAD + 32 + 128, |w| {
    // bit i of byte k: the fifth of weight 32 * i + k
    let high = load(w.add(HEAD));
    let at = w.add(HEAD + 32);
    let [a, b] = nibbles(load(at));
    let [c, d] = nibbles(load(at.add(32)));
    let [e, f] = nibbles(load(at.add(64)));
    let [g, h] = nibbles(load(at.add(96)));
    [
        fifth(a, _mm256_slli_epi16::<4>(high)),
        fifth(b, _mm256_slli_epi16::<3>(high)),
        fifth(c, _mm256_slli_epi16::<2>(high)),
        fifth(d, _mm256_slli_epi16::<1>(high)),
        fifth(e, high),
        fifth(f, _mm256_srli_epi16::<1>(high)),
        fifth(g, _mm256_srli_epi16::<2>(high)),
        fifth(h, _mm256_srli_epi16::<3>(high)),
    ]
});

/// The scales of q6_K in the order of `Scaled`: those for the first halves of 32 weights, then those for the others.
const EVEN_FIRST: [u8; 16] = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15];

struct Q6K;

/// The activation of 256 weights of q6_K.
#[repr(C, align(64))]
struct WithOffset {
    q: [__m256i; 8],
    scale: [f32; 8],
    /// Weights are 32 less than their bits say, which takes this away from pairs of products, in 16 bits.
    less: [__m256i; 8],
}

/// The weights of q6_K and their scales.
struct Scaled {
    q: [__m256i; 8],
    /// 16 bits each: in each half of the register those of that half of each `q`.
    scales: __m256i,
    d: __m256,
}

/// Bytes of one 16-bit number for all of a half of a register.
const WORD: [[i8; 32]; 8] = {
    let mut out = [[0; 32]; 8];
    let mut i = 0;
    while i < 8 * 32 {
        out[i / 32][i % 32] = (i / 32 * 2 + i % 2) as i8;
        i += 1;
    }
    out
};

/// 128 weights of q6_K: low nibbles of 64 bytes, then their high ones; the two bits above them of weight k of each
/// 32 in byte k, from the lowest up.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half_of_q6_k(low: *const u8, high: *const u8) -> [__m256i; 4] {
    // SAFETY: the caller has 64 and 32 bytes.
    let (x, y, high) = unsafe { (load(low), load(low.add(32)), load(high)) };
    let two_bits = |x| _mm256_and_si256(x, _mm256_set1_epi8(0x30));
    let [a, c] = nibbles(x);
    let [b, d] = nibbles(y);
    [
        _mm256_or_si256(a, two_bits(_mm256_slli_epi16::<4>(high))),
        _mm256_or_si256(b, two_bits(_mm256_slli_epi16::<2>(high))),
        _mm256_or_si256(c, two_bits(high)),
        _mm256_or_si256(d, two_bits(_mm256_srli_epi16::<2>(high))),
    ]
}

impl Format for Q6K {
    const N: usize = 256;
    const BYTES: usize = 128 + 64 + 16 + 2;
    type Act = WithOffset;
    type Weights = Scaled;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: &Quantized) -> WithOffset {
        // SAFETY: there are 8 blocks.
        let q = unsafe { act.q.as_ptr().cast::<[__m256i; 8]>().read_unaligned() };
        let mut less = q;
        for less in &mut less {
            *less = _mm256_maddubs_epi16(_mm256_set1_epi8(32), *less);
        }
        WithOffset { q, scale: act.scale, less }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> Scaled {
        // SAFETY: the caller has a block.
        unsafe {
            let [a, b, c, d] = half_of_q6_k(w, w.add(128));
            let [e, f, g, h] = half_of_q6_k(w.add(64), w.add(128 + 32));
            let even_first = _mm_loadu_si128(EVEN_FIRST.as_ptr().cast());
            let scales = _mm_shuffle_epi8(_mm_loadu_si128(w.add(128 + 64).cast()), even_first);
            Scaled {
                q: [a, b, c, d, e, f, g, h],
                scales: _mm256_cvtepi8_epi16(scales),
                d: half(w.add(128 + 64 + 16)),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &Scaled, act: &WithOffset, sum: Sum) -> Sum {
        // two chains of sums are half as long
        let mut sums = [_mm256_setzero_ps(); 2];
        for i in 0..8 {
            let pairs = _mm256_sub_epi16(_mm256_maddubs_epi16(w.q[i], act.q[i]), act.less[i]);
            // SAFETY: the index has 32 bytes.
            let scale = _mm256_shuffle_epi8(w.scales, unsafe { load(WORD[i].as_ptr().cast()) });
            let term = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, scale));
            sums[i % 2] = _mm256_fmadd_ps(term, _mm256_set1_ps(act.scale[i]), sums[i % 2]);
        }
        sum.add(_mm256_add_ps(sums[0], sums[1]), w.d)
    }
}

struct Iq4Xs;

/// Activations in the order of `Nibbles`, four times two sub-blocks of 32.
#[repr(C, align(64))]
struct EightBlocks {
    q: [[Signed; 2]; 4],
    /// Of one sub-block for each half of the lanes.
    scale: [__m256; 4],
}

struct SubBlocks {
    q: [[__m256i; 2]; 4],
    /// 16 bits each, of one sub-block for each half of a register.
    scales: [__m256i; 4],
    d: __m256,
}

impl Format for Iq4Xs {
    const N: usize = 256;
    const BYTES: usize = 2 + 2 + 4 + 128;
    type Act = EightBlocks;
    type Weights = SubBlocks;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: &Quantized) -> EightBlocks {
        let mut q = [[Signed::new(_mm256_setzero_si256()); 2]; 4];
        let mut scale = [_mm256_setzero_ps(); 4];
        for i in 0..4 {
            let at: *const u8 = act.q[2 * i * BLOCK..].as_ptr().cast();
            // SAFETY: there are two blocks.
            q[i] = Signed::both(unsafe { [pieces::<BLOCK>(at), pieces::<BLOCK>(at.add(16))] });
            scale[i] = lanes(act.scale[2 * i], act.scale[2 * i + 1]);
        }
        EightBlocks { q, scale }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> SubBlocks {
        // of a sub-block's scale, four bits and two bits more; the even ones first
        const LOW: [i32; 8] = [0, 8, 16, 24, 4, 12, 20, 28];
        const HIGH: [i32; 8] = [0, 4, 8, 12, 2, 6, 10, 14];
        // SAFETY: the caller has a block.
        unsafe {
            let low = _mm256_set1_epi32(w.add(4).cast::<i32>().read_unaligned());
            let high = _mm256_set1_epi32(i32::from(w.add(2).cast::<u16>().read_unaligned()) << 4);
            let bits = _mm256_or_si256(
                _mm256_and_si256(_mm256_srlv_epi32(low, load(LOW.as_ptr().cast())), _mm256_set1_epi32(0x0f)),
                _mm256_and_si256(
                    _mm256_srlv_epi32(high, load(HIGH.as_ptr().cast())),
                    _mm256_set1_epi32(0x30),
                ),
            );
            let twice = _mm256_or_si256(bits, _mm256_slli_epi32::<16>(bits));
            let all = _mm256_sub_epi16(twice, _mm256_set1_epi16(32));
            let mut q = [[_mm256_setzero_si256(); 2]; 4];
            for (i, q) in q.iter_mut().enumerate() {
                *q = values(&IQ4_VALUES, 0, nibbles(load(w.add(8 + i * 32))));
            }
            SubBlocks {
                q,
                scales: [
                    _mm256_shuffle_epi32::<0b00_00_00_00>(all),
                    _mm256_shuffle_epi32::<0b01_01_01_01>(all),
                    _mm256_shuffle_epi32::<0b10_10_10_10>(all),
                    _mm256_shuffle_epi32::<0b11_11_11_11>(all),
                ],
                d: half(w),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &SubBlocks, act: &EightBlocks, sum: Sum) -> Sum {
        let mut sums = [_mm256_setzero_ps(); 2];
        for i in 0..4 {
            let products = Signed::products_of_both(&act.q[i], &w.q[i], w.scales[i]);
            sums[i % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), act.scale[i], sums[i % 2]);
        }
        sum.add(_mm256_add_ps(sums[0], sums[1]), w.d)
    }
}

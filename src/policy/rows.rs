//! Loops over long rows, with AVX2 where the CPU has it. Written out, since the compiler makes vectors of
//! loops in optimised builds only and tests replay a lot. Lanes are independent and nothing is fused, so
//! the results are the same on every machine.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128i, __m256i, _mm_loadu_si128, _mm256_add_epi16, _mm256_add_pd, _mm256_add_ps, _mm256_cvtepi8_epi16,
    _mm256_loadu_pd, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_mul_pd, _mm256_mul_ps, _mm256_set1_pd,
    _mm256_set1_ps, _mm256_storeu_pd, _mm256_storeu_ps, _mm256_storeu_si256,
};

/// A function that does with vectors what its tail does one by one.
macro_rules! row_fn {
    ($(#[$doc:meta])* $name:ident($out:ident: [$o:ty], $x:ident: [$xt:ty] $(, $arg:ident: $at:ty)*), $lanes:literal,
     |$op:ident, $xp:ident| $vector:expr, |$o1:ident, $x1:ident| $scalar:expr) => {
        $(#[$doc])*
        pub fn $name($out: &mut [$o], $x: &[$xt] $(, $arg: $at)*) {
            fn one_by_one($out: &mut [$o], $x: &[$xt] $(, $arg: $at)*) {
                for ($o1, $x1) in $out.iter_mut().zip($x) {
                    *$o1 = $scalar;
                }
            }
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($out: &mut [$o], $x: &[$xt] $(, $arg: $at)*) {
                    let (whole, rest) = $out.as_chunks_mut::<$lanes>();
                    let (x_whole, x_rest) = $x.as_chunks::<$lanes>();
                    for (o, x) in whole.iter_mut().zip(x_whole) {
                        let ($op, $xp) = (o.as_mut_ptr(), x.as_ptr());
                        // SAFETY: both point to as many elements as the vectors have
                        unsafe { $vector }
                    }
                    one_by_one(rest, x_rest $(, $arg)*);
                }
                if is_x86_feature_detected!("avx2") {
                    assert_eq!($out.len(), $x.len());
                    // SAFETY: the CPU has it
                    return unsafe { avx2($out, $x $(, $arg)*) };
                }
            }
            one_by_one($out, $x $(, $arg)*);
        }
    };
}

row_fn! {
    /// `out[i] += a * x[i]`.
    add_scaled(out: [f32], x: [f32], a: f32), 8,
    |o, x| _mm256_storeu_ps(
        o,
        _mm256_add_ps(_mm256_loadu_ps(o), _mm256_mul_ps(_mm256_set1_ps(a), _mm256_loadu_ps(x))),
    ),
    |o, x| *o + a * x
}

row_fn! {
    /// `out[i] += a * x[i]`.
    add_scaled_f64(out: [f64], x: [f64], a: f64), 4,
    |o, x| _mm256_storeu_pd(
        o,
        _mm256_add_pd(_mm256_loadu_pd(o), _mm256_mul_pd(_mm256_set1_pd(a), _mm256_loadu_pd(x))),
    ),
    |o, x| *o + a * x
}

/// Rows that are read in one pass.
pub const ROWS: usize = 8;

/// A function of a row and [`ROWS`] others, which are added to it one after the other, so that the sums are those of
/// one pass for each.
macro_rules! rows_fn {
    ($(#[$doc:meta])* $name:ident([$t:ty] $(, $arg:ident: $at:ty)*), $lanes:literal, $load:ident, $store:ident, $set:ident,
     $add:ident, $mul:ident, |$v:ident| $vector:expr, |$s:ident| $scalar:expr) => {
        $(#[$doc])*
        pub fn $name(out: &mut [$t], rows: [&[$t]; ROWS], factors: [$t; ROWS] $(, $arg: $at)*) {
            fn one_by_one(out: &mut [$t], from: usize, rows: [&[$t]; ROWS], factors: [$t; ROWS] $(, $arg: $at)*) {
                for (i, o) in out.iter_mut().enumerate().skip(from) {
                    let $s = rows.iter().zip(factors).fold(*o, |sum, (row, f)| sum + f * row[i]);
                    *o = $scalar;
                }
            }
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2(out: &mut [$t], rows: [&[$t]; ROWS], factors: [$t; ROWS] $(, $arg: $at)*) {
                    let whole = out.len() / $lanes * $lanes;
                    let of = factors.map(|f| $set(f));
                    for i in (0..whole).step_by($lanes) {
                        // SAFETY: all rows have as many elements as `out`, and `i + lanes` is within them
                        unsafe {
                            let o = out.as_mut_ptr().add(i);
                            let mut $v = $load(o);
                            for (row, f) in rows.iter().zip(of) {
                                $v = $add($v, $mul(f, $load(row.as_ptr().add(i))));
                            }
                            $store(o, $vector);
                        }
                    }
                    one_by_one(out, whole, rows, factors $(, $arg)*);
                }
                if is_x86_feature_detected!("avx2") {
                    rows.iter().for_each(|row| assert_eq!(out.len(), row.len()));
                    // SAFETY: the CPU has it
                    return unsafe { avx2(out, rows, factors $(, $arg)*) };
                }
            }
            one_by_one(out, 0, rows, factors $(, $arg)*);
        }
    };
}

rows_fn! {
    /// `out[i] += factors[0] * rows[0][i]`, then the next row.
    add_rows([f32]), 8, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_add_ps, _mm256_mul_ps, |v| v, |s| s
}

rows_fn! {
    /// `out[i] += factors[0] * rows[0][i]`, then the next row.
    add_rows_f64([f64]), 4, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_set1_pd, _mm256_add_pd, _mm256_mul_pd, |v| v, |s| s
}

rows_fn! {
    /// As [`add_rows_f64`], and the sum times `grow`.
    add_rows_and_grow([f64], grow: f64), 4, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_set1_pd, _mm256_add_pd, _mm256_mul_pd,
    |v| _mm256_mul_pd(v, _mm256_set1_pd(grow)), |s| s * grow
}

row_fn! {
    /// `out[i] += x[i]`.
    add_signs(out: [i16], x: [i8]), 16,
    |o, x| {
        let x = _mm256_cvtepi8_epi16(_mm_loadu_si128(x.cast::<__m128i>()));
        _mm256_storeu_si256(
            o.cast::<__m256i>(),
            _mm256_add_epi16(_mm256_loadu_si256(o.cast_const().cast::<__m256i>()), x),
        );
    },
    |o, x| *o + i16::from(*x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_and_their_tails_do_what_single_elements_do() {
        for n in [1, 7, 16, 37] {
            let x: Vec<f64> = (0..n).map(|i| f64::from(i) * 0.37 - 3.0).collect();
            let narrow: Vec<f32> = x.iter().map(|x| *x as f32).collect();
            let signs: Vec<i8> = (0..n).map(|i| if i % 3 == 0 { -1 } else { 1 }).collect();
            let (mut a, mut b, mut c, mut d) = (narrow.clone(), x.clone(), x.clone(), vec![5i16; n as usize]);
            add_scaled(&mut a, &narrow, 0.1);
            add_scaled_f64(&mut b, &x, 0.1);
            let factors = std::array::from_fn(|k| k as f64 * 0.3 - 1.0);
            add_rows_and_grow(&mut c, [&x; ROWS], factors, 1.7);
            let mut e = narrow.clone();
            add_rows(&mut e, [&narrow; ROWS], factors.map(|f| f as f32));
            add_signs(&mut d, &signs);
            for i in 0..n as usize {
                assert_eq!(a[i], narrow[i] + 0.1 * narrow[i]);
                assert_eq!(b[i], x[i] + 0.1 * x[i]);
                assert_eq!(c[i], factors.iter().fold(x[i], |sum, f| sum + f * x[i]) * 1.7);
                assert_eq!(e[i], factors.iter().fold(narrow[i], |sum, f| sum + *f as f32 * narrow[i]));
                assert_eq!(d[i], 5 + i16::from(signs[i]));
            }
        }
    }
}

//! A few rows times a large matrix: what an iteration on its singular vectors consists of.
//!
//! `Y = XM` and `Y = XMᵀ` for X of a dozen rows or two and M in bfloat16 or float32, again and
//! again with the same M. Libraries lay M out or widen it for each such product, which then takes
//! longer than its arithmetic. [`Packed`] does so once, for both directions, in the order in which
//! registers take it up and as narrow as it was stored: a product reads it from front to back.
//!
//! An element of Y is one chain of fused multiply-adds in float32, in order, so neither tiles,
//! threads nor the width of registers change a bit of it.

#![allow(clippy::inline_always, reason = "a Kernel is only as wide as what is inlined into it")]

use half::bf16;
use half::slice::HalfBitsSliceExt;
use rayon::prelude::*;

use crate::sensitivity::Values;
use crate::simd::{self, Kernel, Width};
use crate::{Error, Result};

/// Rows of a panel that stay in a core's L1 cache while all rows of X use them.
const DEPTH: usize = 128;
/// Columns of M that are packed by one task: whole cache lines.
const COLUMNS: usize = 256;
/// Columns of M that are turned at once: a cache line of each of a panel's rows.
const TURNED: usize = 32;

/// What a panel holds.
trait Stored: Copy + Send + Sync {
    /// Itself, exactly.
    fn single(self) -> f32;
}

impl Stored for f32 {
    #[inline(always)]
    fn single(self) -> f32 {
        self
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn single(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// A matrix M (n, m), ready to be multiplied from the left by a few rows.
#[derive(Clone, Debug)]
pub struct Packed {
    rows: usize,
    columns: usize,
    panels: Panels,
}

/// The panels of M, a few columns wide and side by side, and those of Mᵀ; the last of either is
/// filled up with zeros.
#[derive(Clone, Debug)]
enum Panels {
    /// The bits of bfloat16.
    Half([Vec<u16>; 2]),
    Single([Vec<f32>; 2]),
}

impl Packed {
    /// Lays out `matrix` (n, m), row-major. Memory: twice that of `matrix`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are not n · m elements, n or m is zero, or they are float16.
    pub fn new(matrix: Values, rows: usize, columns: usize) -> Result<Self> {
        if rows == 0 || columns == 0 || rows.checked_mul(columns) != Some(matrix.len()) {
            return Err(Error::Invalid(format!(
                "thin product: expected a matrix of {rows} > 0 rows and {columns} > 0 columns, \
                 found {} elements",
                matrix.len()
            )));
        }
        let (wide, high) = (columns.next_multiple_of(width()), rows.next_multiple_of(width()));
        let panels = match matrix {
            Values::Bf16(matrix) => {
                let (mut across, mut down) = (vec![0; rows * wide], vec![0; high * columns]);
                let both = [across.reinterpret_cast_mut(), down.reinterpret_cast_mut()];
                lay_out(matrix, columns, both);
                Panels::Half([across, down])
            }
            Values::F32(matrix) => {
                let (mut across, mut down) = (vec![0.0; rows * wide], vec![0.0; high * columns]);
                lay_out(matrix, columns, [&mut across, &mut down]);
                Panels::Single([across, down])
            }
            Values::F16(_) => {
                let what = "thin product: expected bfloat16 or float32, found float16";
                return Err(Error::Invalid(what.into()));
            }
        };
        Ok(Self { rows, columns, panels })
    }

    /// Sets `products` (b, m) to `rows` (b, n) times M.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the shapes do not fit each other; `products` are then untouched.
    pub fn multiply(&self, rows: &[f32], products: &mut [f32]) -> Result<()> {
        self.run(0, rows, self.rows, products, self.columns)
    }

    /// Sets `products` (b, n) to `rows` (b, m) times Mᵀ.
    ///
    /// # Errors
    /// As those of [`Packed::multiply`].
    pub fn multiply_turned(&self, rows: &[f32], products: &mut [f32]) -> Result<()> {
        self.run(1, rows, self.columns, products, self.rows)
    }

    fn run(
        &self,
        side: usize,
        rows: &[f32],
        depth: usize,
        products: &mut [f32],
        columns: usize,
    ) -> Result<()> {
        let count = rows.len() / depth;
        if rows.len() != count * depth || products.len() != count * columns {
            return Err(Error::Invalid(format!(
                "thin product: expected (b, {depth}) rows and (b, {columns}) products, found {} \
                 and {} elements",
                rows.len(),
                products.len()
            )));
        }
        match &self.panels {
            Panels::Half(panels) => {
                let panels: &[bf16] = panels[side].reinterpret_cast();
                by_panels(panels, rows, depth, products, columns);
            }
            Panels::Single(panels) => by_panels(&panels[side], rows, depth, products, columns),
        }
        Ok(())
    }
}

/// Columns of a panel: two registers.
fn width() -> usize {
    match simd::width() {
        Width::Avx512Bf16 | Width::Avx512 => 32,
        _ => 16,
    }
}

fn lay_out<E: Stored>(matrix: &[E], columns: usize, [across, down]: [&mut [E]; 2]) {
    match simd::width() {
        Width::Avx512Bf16 | Width::Avx512 => pack::<E, 32>(matrix, columns, across, down),
        _ => pack::<E, 16>(matrix, columns, across, down),
    }
}

/// Panels of C columns of M, and of C of its rows: where those lack, what lies there stays.
fn pack<E: Stored, const C: usize>(matrix: &[E], columns: usize, across: &mut [E], down: &mut [E]) {
    let rows = matrix.len() / columns;
    across.par_chunks_mut(rows * COLUMNS).enumerate().for_each(|(task, panels)| {
        let (panels, first) = (panels.as_chunks_mut::<C>().0, task * COLUMNS);
        for (row, values) in matrix.chunks_exact(columns).enumerate() {
            let values = &values[first..columns.min(first + COLUMNS)];
            let (whole, rest) = values.as_chunks();
            let mut places = panels[row..].iter_mut().step_by(rows);
            whole.iter().zip(&mut places).for_each(|(&values, panel)| *panel = values);
            if let Some(panel) = places.next() {
                panel[..rest.len()].copy_from_slice(rest);
            }
        }
    });
    let tasks = matrix.par_chunks(C * columns).zip(down.par_chunks_mut(columns * C));
    tasks.for_each(|(rows, panel)| {
        for first in (0..columns).step_by(TURNED) {
            let panel = &mut panel.as_chunks_mut::<C>().0[first..columns.min(first + TURNED)];
            for (place, values) in rows.chunks_exact(columns).enumerate() {
                panel.iter_mut().zip(&values[first..]).for_each(|(to, &value)| to[place] = value);
            }
        }
    });
}

fn by_panels<E: Stored>(
    panels: &[E],
    rows: &[f32],
    depth: usize,
    products: &mut [f32],
    columns: usize,
) {
    match simd::width() {
        Width::Avx512Bf16 | Width::Avx512 => {
            // 12 rows, or 9 where fewer of the last tile stay empty so: 18 are twice 9.
            let count = rows.len() / depth;
            let tiles = if count.next_multiple_of(9) < count.next_multiple_of(12) {
                tiled::<E, 9, 32>
            } else {
                tiled::<E, 12, 32>
            };
            tiles(panels, rows, depth, products, columns);
        }
        _ => tiled::<E, 6, 16>(panels, rows, depth, products, columns),
    }
}

/// Products in tiles of R × C, from panels of C columns.
fn tiled<E: Stored, const R: usize, const C: usize>(
    panels: &[E],
    rows: &[f32],
    depth: usize,
    products: &mut [f32],
    columns: usize,
) {
    let blocks = turn::<R>(rows, depth);
    let mut parts = Vec::new();
    parts.resize_with(columns.div_ceil(C), Vec::new);
    for row in products.chunks_exact_mut(columns) {
        parts.iter_mut().zip(row.chunks_mut(C)).for_each(|(part, row)| part.push(row));
    }
    let tasks = panels.par_chunks_exact(depth * C).zip(parts);
    tasks.for_each(|(panel, products)| {
        let panel = panel.as_chunks().0;
        simd::on(simd::width(), Task::<_, R, C> { blocks: &blocks, panel, products });
    });
}

/// Blocks of R rows, each turned: as many times R numbers as a row is long, zeros for rows that
/// the last block lacks.
fn turn<const R: usize>(rows: &[f32], length: usize) -> Vec<[f32; R]> {
    let mut turned = vec![[0.0; R]; (rows.len() / length).div_ceil(R) * length];
    for (number, row) in rows.chunks_exact(length).enumerate() {
        let block = &mut turned[number / R * length..][..length];
        block.iter_mut().zip(row).for_each(|(to, &value)| to[number % R] = value);
    }
    turned
}

/// A panel, every row of X, and their products.
struct Task<'a, E, const R: usize, const C: usize> {
    blocks: &'a [[f32; R]],
    panel: &'a [[E; C]],
    /// C columns of Y, or what is left of them: row by row.
    products: Vec<&'a mut [f32]>,
}

impl<E: Stored, const R: usize, const C: usize> Kernel for Task<'_, E, R, C> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let depth = self.panel.len();
        for start in (0..depth).step_by(DEPTH) {
            let steps = start..depth.min(start + DEPTH);
            let blocks = self.blocks.chunks_exact(depth).zip(self.products.chunks_mut(R));
            for (block, products) in blocks {
                let mut sums = [[0.0; C]; R];
                if start > 0 {
                    for (sums, row) in sums.iter_mut().zip(products.iter()) {
                        sums[..row.len()].copy_from_slice(row);
                    }
                }
                add(&block[steps.clone()], &self.panel[steps.clone()], &mut sums);
                for (sums, row) in sums.iter().zip(products) {
                    row.copy_from_slice(&sums[..row.len()]);
                }
            }
        }
    }
}

/// Adds the products of a block with a panel to `sums`.
#[inline(always)]
fn add<E: Stored, const R: usize, const C: usize>(
    block: &[[f32; R]],
    panel: &[[E; C]],
    sums: &mut [[f32; C]; R],
) {
    let mut held = *sums;
    for (factors, values) in block.iter().zip(panel) {
        let values = values.map(E::single);
        for (row, &factor) in held.iter_mut().zip(factors) {
            for (sum, &value) in row.iter_mut().zip(&values) {
                *sum = factor.mul_add(value, *sum);
            }
        }
    }
    *sums = held;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::simd::every;
    use crate::{cases, numbers};

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// The formula, element by element: rows (b, k) by what `matrix` says is at (k, n).
    fn reference(
        rows: &[f32],
        k: usize,
        n: usize,
        matrix: impl Fn(usize, usize) -> f32,
    ) -> Vec<u32> {
        let element = |row: &[f32], column| {
            (0..k).fold(0f32, |sum, at| row[at].mul_add(matrix(at, column), sum)).to_bits()
        };
        rows.chunks_exact(k)
            .flat_map(|row| (0..n).map(move |column| element(row, column)))
            .collect()
    }

    fn check(b: usize, n: usize, m: usize, seed: u32) {
        let (matrix, forth, back) =
            (numbers(seed)(n * m), numbers(seed ^ 5)(b * n), numbers(seed ^ 9)(b * m));
        let halves: Vec<bf16> = matrix.iter().map(|&value| bf16::from_f32(value)).collect();
        let stored = |half: bool, at: usize| if half { halves[at].to_f32() } else { matrix[at] };
        for (half, values) in [(true, Values::Bf16(&halves)), (false, Values::F32(&matrix))] {
            let packed = Packed::new(values, n, m).unwrap();
            let (mut there, mut again) = (vec![f32::NAN; b * m], vec![f32::NAN; b * n]);
            packed.multiply(&forth, &mut there).unwrap();
            packed.multiply_turned(&back, &mut again).unwrap();
            let expected = reference(&forth, n, m, |row, column| stored(half, row * m + column));
            assert!(bits(&there) == expected, "({b}, {n}) · ({n}, {m})");
            let expected = reference(&back, m, n, |row, column| stored(half, column * m + row));
            assert!(bits(&again) == expected, "({b}, {m}) · ({m}, {n})");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(100)))]

        #[test]
        fn products_are_the_formula(b in 0usize..15, n in 1usize..50, m in 1usize..50, seed: u32) {
            check(b, n, m, seed);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "minutes")]
    fn more_than_a_panel_and_a_task_is_the_formula() {
        check(25, 2 * DEPTH + 1, COLUMNS + 3, 7);
        check(7, COLUMNS + 35, DEPTH, 8);
    }

    #[test]
    fn every_width_and_number_of_threads_gives_the_same_bits() {
        let (b, k, n) = (13, 150, 70);
        let (matrix, rows) = (numbers(1)(k * n), numbers(3)(b * k));
        let found = every::thread_count(|| {
            let mut products = vec![0.0; b * n];
            let packed = Packed::new(Values::F32(&matrix), k, n).unwrap();
            packed.multiply(&rows, &mut products).unwrap();
            bits(&products)
        });
        let expected = reference(&rows, k, n, |row, column| matrix[row * n + column]);
        assert!(found.iter().all(|found| found == &expected));
        let panel: Vec<[f32; 16]> = matrix.as_chunks().0[..k].to_vec();
        let block: Vec<[f32; 6]> = rows.as_chunks().0[..k].to_vec();
        let tile = Tile { block: &block, panel: &panel };
        let tiles = every::width(&tile);
        assert!(tiles.iter().all(|sums| sums == &tiles[0]));
    }

    /// One call of [`add`].
    #[derive(Clone)]
    struct Tile<'a> {
        block: &'a [[f32; 6]],
        panel: &'a [[f32; 16]],
    }

    impl Kernel for Tile<'_> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn run(self) -> Vec<u32> {
            let mut sums = [[0.0; 16]; 6];
            add(self.block, self.panel, &mut sums);
            bits(sums.as_flattened())
        }
    }

    /// Panels and tiles of every processor, on whichever this is.
    #[test]
    fn narrow_and_wide_tiles_give_the_same_bits() {
        let (b, k, n) = (13, 150, 70);
        let (matrix, rows) = (numbers(5)(k * n), numbers(7)(b * k));
        let expected = reference(&rows, k, n, |row, column| matrix[row * n + column]);
        let turned: Vec<f32> = (0..k * n).map(|at| matrix[at % k * n + at / k]).collect();
        for matrix in [(&matrix[..], n, 0), (&turned[..], k, 1)] {
            assert!(by_tiles::<6, 16>(matrix, &rows, k, n) == expected);
            assert!(by_tiles::<9, 32>(matrix, &rows, k, n) == expected);
            assert!(by_tiles::<12, 32>(matrix, &rows, k, n) == expected);
        }
    }

    /// Products with one side of what is laid out: of rows or of columns, whichever `side` says.
    fn by_tiles<const R: usize, const C: usize>(
        (matrix, stride, side): (&[f32], usize, usize),
        rows: &[f32],
        k: usize,
        n: usize,
    ) -> Vec<u32> {
        let high = matrix.len() / stride;
        let mut across = vec![0.0; high * stride.next_multiple_of(C)];
        let mut down = vec![0.0; stride * high.next_multiple_of(C)];
        pack::<f32, C>(matrix, stride, &mut across, &mut down);
        let mut products = vec![f32::NAN; rows.len() / k * n];
        let panels = if side == 0 { &across } else { &down };
        tiled::<f32, R, C>(panels, rows, k, &mut products, n);
        bits(&products)
    }

    #[test]
    fn what_is_not_finite_stays_where_it_is() {
        let mut matrix = vec![bf16::ONE; 20 * 40];
        matrix[3 * 40 + 39] = bf16::NAN;
        let packed = Packed::new(Values::Bf16(&matrix), 20, 40).unwrap();
        let mut products = vec![0.0; 40];
        packed.multiply(&[1.0; 20], &mut products).unwrap();
        assert!(products[39].is_nan());
        assert!(bits(&products[..39]) == bits(&[20.0; 39]));
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let refused = |rows, columns| {
            Packed::new(Values::F32(&[1.0; 6]), rows, columns).unwrap_err().to_string()
        };
        assert!(refused(0, 6).contains("0 > 0 rows"));
        assert!(refused(6, 0).contains("0 > 0 columns"));
        assert!(refused(2, 4).contains("found 6"));
        assert!(refused(usize::MAX, 2).contains("found 6"));
        let error = Packed::new(Values::F16(&[half::f16::ONE; 6]), 2, 3).unwrap_err();
        assert!(error.to_string().contains("found float16"));
        let packed = Packed::new(Values::F32(&[1.0; 6]), 2, 3).unwrap();
        let mut products = [7.0; 6];
        let error = packed.multiply(&[1.0; 3], &mut products).unwrap_err().to_string();
        assert!(error.contains("(b, 2) rows and (b, 3) products, found 3"), "{error}");
        let error = packed.multiply_turned(&[1.0; 6], &mut products).unwrap_err().to_string();
        assert!(error.contains("(b, 3) rows and (b, 2) products, found 6 and 6"), "{error}");
        assert!(bits(&products) == bits(&[7.0; 6]));
    }
}

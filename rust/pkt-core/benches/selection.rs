//! The best 4096 × 4096 window of 8192 × 8192 scores, and the other selections.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use pkt_core::selection::{
    Matrix, best_window, bin_means, mask_score, random_weights, top_columns, top_rows, top_weights,
};

const SIDE: usize = 8192;
const WINDOW: usize = 4096;

fn selecting(criterion: &mut Criterion) {
    let scores: Vec<f32> =
        (0..SIDE * SIDE).map(|i| (i as u32).wrapping_mul(2_654_435_761) as f32 * 1e-9).collect();
    let matrix = Matrix::new(&scores, SIDE, None, 1).unwrap();
    let shared = Matrix::new(&scores, SIDE, None, 3).unwrap();
    let mask = top_weights(&matrix, WINDOW * WINDOW).unwrap();

    let mut group = criterion.benchmark_group("8192x8192");
    group.sample_size(10);
    group.bench_function("new", |bencher| {
        bencher.iter(|| Matrix::new(black_box(&scores), SIDE, None, 1).unwrap());
    });
    group.bench_function("best_window", |bencher| {
        bencher.iter(|| best_window(black_box(&matrix), WINDOW, WINDOW).unwrap());
    });
    group.bench_function("best_window, shared", |bencher| {
        bencher.iter(|| best_window(black_box(&shared), WINDOW, WINDOW).unwrap());
    });
    group.bench_function("top_rows and top_columns", |bencher| {
        bencher
            .iter(|| (top_rows(&matrix, WINDOW).unwrap(), top_columns(&matrix, WINDOW).unwrap()));
    });
    group.bench_function("top_weights", |bencher| {
        bencher.iter(|| top_weights(black_box(&matrix), WINDOW * WINDOW).unwrap());
    });
    group.bench_function("mask_score", |bencher| {
        bencher.iter(|| mask_score(black_box(&matrix), &mask).unwrap());
    });
    group.bench_function("random_weights", |bencher| {
        bencher.iter(|| random_weights(SIDE * SIDE, WINDOW * WINDOW, black_box(1)).unwrap());
    });
    group.bench_function("bin_means", |bencher| {
        bencher.iter(|| bin_means(black_box(&matrix), 64, 64).unwrap());
    });
}

criterion_group!(benches, selecting);
criterion_main!(benches);

//! Scoring against a parallel copy of the same byte volume, in and out of cache.
//!
//! Bytes are those that a kernel must move: read weights, gradients and scores, write scores; a
//! copy reads one half of them and writes the other.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use pkt_core::sensitivity::{Values, accumulate, accumulate_columns, sum};
use rayon::prelude::*;

const BYTES: usize = 2 + 2 + 4 + 4;

/// A small value that differs from element to element.
fn value(index: usize) -> f32 {
    (index % 251) as f32 * 1e-3 - 0.1
}

fn scoring(criterion: &mut Criterion) {
    for (name, count) in [("4096x11008", 4096 * 11008), ("1M", 1 << 20), ("32K", 1 << 15)] {
        let mut group = criterion.benchmark_group("scoring");
        group.sample_size(20).throughput(Throughput::Bytes((BYTES * count) as u64));

        let source = vec![1u8; BYTES / 2 * count];
        let mut target = vec![2u8; source.len()];
        let part = source.len().div_ceil(rayon::current_num_threads());
        group.bench_function(BenchmarkId::new("copy", name), |bencher| {
            bencher.iter(|| {
                let parts = target.par_chunks_mut(part).zip(source.par_chunks(part));
                parts.for_each(|(target, source)| target.copy_from_slice(source));
                black_box(&mut target);
            });
        });
        drop((source, target));

        let weights: Vec<bf16> = (0..count).map(|i| bf16::from_f32(value(i))).collect();
        let gradients: Vec<bf16> = (0..count).map(|i| bf16::from_f32(value(i + 7))).collect();
        let mut scores = vec![0f32; count];
        group.bench_function(BenchmarkId::new("bf16", name), |bencher| {
            let (weights, gradients) = (Values::Bf16(&weights), Values::Bf16(&gradients));
            bencher.iter(|| accumulate(weights, black_box(gradients), &mut scores).unwrap());
        });

        let weights: Vec<f16> = (0..count).map(|i| f16::from_f32(value(i))).collect();
        let gradients: Vec<f16> = (0..count).map(|i| f16::from_f32(value(i + 7))).collect();
        group.bench_function(BenchmarkId::new("f16", name), |bencher| {
            let (weights, gradients) = (Values::F16(&weights), Values::F16(&gradients));
            bencher.iter(|| accumulate(weights, black_box(gradients), &mut scores).unwrap());
        });
    }
}

fn sums(criterion: &mut Criterion) {
    let (rows, columns) = (11008, 4096);
    let count = rows * columns;
    let weights: Vec<bf16> = (0..count).map(|i| bf16::from_f32(value(i))).collect();
    let scores: Vec<f32> = (0..count).map(|i| value(i).abs()).collect();
    let mut totals = vec![0f64; columns];
    let mut group = criterion.benchmark_group("sums");
    group.sample_size(20).throughput(Throughput::Bytes((4 * count) as u64));
    group.bench_function("columns of bf16", |bencher| {
        let values = Values::Bf16(&weights);
        bencher.iter(|| accumulate_columns(values, values, columns, &mut totals).unwrap());
    });
    group.bench_function("scores", |bencher| bencher.iter(|| sum(black_box(&scores))));
}

criterion_group!(benches, scoring, sums);
criterion_main!(benches);

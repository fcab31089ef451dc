//! Scoring from X and dY against what it replaces: gradients in memory, scored one sample at a time.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use pkt_core::gradient::{Sample, accumulate_products};
use pkt_core::sensitivity::Values;

fn main() {
    let value = |index: usize| bf16::from_f32((index % 251) as f32 * 1e-3 - 0.1);
    for (rows, columns, tokens, count) in
        [(8192, 8192, 128, 4), (8192, 8192, 512, 1), (4096, 4096, 2048, 1)]
    {
        let weights: Vec<bf16> = (0..rows * columns).map(value).collect();
        let inputs: Vec<bf16> = (0..count * tokens * columns).map(value).collect();
        let upstream: Vec<bf16> = (0..count * tokens * rows).map(value).collect();
        let samples: Vec<Sample> = (inputs.chunks(tokens * columns))
            .zip(upstream.chunks(tokens * rows))
            .map(|(inputs, upstream)| Sample { inputs, upstream })
            .collect();
        let mut scores = vec![0f32; rows * columns];
        for _ in 0..4 {
            let start = Instant::now();
            let weights = Values::Bf16(&weights);
            black_box(accumulate_products(weights, columns, &samples, &mut scores, true).unwrap());
            let seconds = start.elapsed().as_secs_f64();
            let flop = 2.0 * (rows * columns * tokens * count) as f64;
            println!(
                "{rows}x{columns} {count}x{tokens}: {seconds:.3} s {:.1} GFLOP/s",
                flop / seconds / 1e9
            );
        }
    }
}

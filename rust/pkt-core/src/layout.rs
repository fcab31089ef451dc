//! Where tensors lie in a slot, and the reads that bring them there.
//!
//! A layer is some dozen tensors, scattered over one or more shards. [`layout`] turns them into
//! few long [`Range`]s and says where in a slot each tensor will lie.
//!
//! - A range lies in the slot at its file offset modulo 4096. In a slot aligned to 4096, direct
//!   reads therefore land in place: no bounce buffer, no page cache, no copy.
//! - The layout does not depend on how files are read, so neither does anything computed from the
//!   bytes.

use std::ops;

use crate::{Error, Result};

/// What direct reads align file offset, length and address to: a page, and the largest block
/// that common disks have.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// The longest gap between two tensors that is read along, being cheaper than a second read.
const GAP_BYTES: u64 = 64 << 10;
/// Where a tensor starts in the slot that cannot lie congruent to its file offset.
const PLACE_BYTES: usize = 64;

/// The bytes `begin..end` of one tensor, which its header has been checked to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Index of the [`File`](crate::reader::File).
    pub file: usize,
    /// Offset of the first byte in the file.
    pub begin: u64,
    /// Offset behind the last byte, at least `begin`.
    pub end: u64,
    /// Bytes of one element, a power of two: what a view of the tensor must be aligned to.
    pub align: usize,
}

impl Extent {
    /// Whether a place congruent to the file offset is one where the tensor can be viewed.
    fn lies_in_place(&self) -> bool {
        let align = self.align as u64;
        PAGE_BYTES.is_multiple_of(align) && self.begin.is_multiple_of(align)
    }
}

/// One positional read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    /// Index of the [`File`](crate::reader::File).
    pub file: usize,
    /// Offset in the file.
    pub begin: u64,
    /// How many bytes.
    pub bytes: usize,
    /// Offset in the target.
    pub at: usize,
}

/// Where tensors lie in a slot, and the reads that bring them there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Offset in the slot of each extent, in the order given.
    pub places: Vec<usize>,
    /// The reads, sorted by file and offset; in the slot they do not overlap.
    pub ranges: Vec<Range>,
    /// Bytes the slot must have.
    pub bytes: usize,
    /// Bytes of small gaps, read although no extent holds them.
    pub gap_bytes: u64,
}

/// Places `extents` in a slot.
///
/// Neighbours at most 64 KiB apart are read as one range, which lies in the slot congruent to its
/// file offset modulo 4096. Equal extents (tied weights) share one place. A tensor that its file
/// holds at an offset which `align` does not divide, as safetensors allows, could not be viewed
/// there: it gets a range and a place of its own, aligned to 64.
#[must_use]
pub fn layout(extents: &[Extent]) -> Layout {
    let mut order: Vec<usize> = (0..extents.len()).collect();
    order.sort_by_key(|&i| {
        let extent = &extents[i];
        (!extent.lies_in_place(), extent.file, extent.begin, extent.end, extent.align)
    });

    let mut layout = Layout { places: vec![0; extents.len()], ..Layout::default() };
    let mut runs: Vec<(Extent, Vec<usize>)> = Vec::new();
    for i in order {
        let extent = extents[i];
        match runs.last_mut() {
            Some((run, members)) if joins(run, &extent) => {
                layout.gap_bytes += extent.begin.saturating_sub(run.end);
                run.end = run.end.max(extent.end);
                members.push(i);
            }
            _ => runs.push((extent, vec![i])),
        }
    }
    runs.sort_by_key(|(run, _)| (run.file, run.begin));
    for (run, members) in runs {
        let at = if run.lies_in_place() {
            let ahead = run.begin.wrapping_sub(layout.bytes as u64) % PAGE_BYTES;
            layout.bytes + ahead as usize
        } else {
            layout.bytes.next_multiple_of(PLACE_BYTES)
        };
        for i in members {
            layout.places[i] = at + (extents[i].begin - run.begin) as usize;
        }
        let bytes = run.end.saturating_sub(run.begin) as usize;
        if bytes > 0 {
            layout.ranges.push(Range { file: run.file, begin: run.begin, bytes, at });
        }
        layout.bytes = at + bytes;
    }
    layout
}

/// Whether `next`, which does not begin before `run`, is read with it.
fn joins(run: &Extent, next: &Extent) -> bool {
    if next.lies_in_place() {
        let near = next.begin <= run.end.saturating_add(GAP_BYTES);
        run.file == next.file && run.begin <= next.begin && near
    } else {
        run == next
    }
}

/// The ranges of a window of a row-major matrix, dense in a target of `target_bytes`: no more
/// ranges than it has bytes.
pub(crate) fn window(
    matrix: &Extent,
    (height, width): (u64, u64),
    rows: &ops::Range<u64>,
    columns: &ops::Range<u64>,
    target_bytes: usize,
) -> Result<Vec<Range>> {
    let element = matrix.align as u64;
    let bytes = height.checked_mul(width).and_then(|elements| elements.checked_mul(element));
    if bytes.is_none() || matrix.end.checked_sub(matrix.begin) != bytes {
        return Err(Error::Invalid(format!(
            "a matrix of shape ({height}, {width}) in elements of {element} bytes does not fill \
             bytes {}..{}",
            matrix.begin, matrix.end
        )));
    }
    let inside = |part: &ops::Range<u64>, whole| part.start <= part.end && part.end <= whole;
    if !inside(rows, height) || !inside(columns, width) {
        return Err(Error::Invalid(format!(
            "rows {rows:?} and columns {columns:?} leave a matrix of shape ({height}, {width})"
        )));
    }
    // Not more than the matrix, whose bytes fit.
    let bytes = (rows.end - rows.start) * (columns.end - columns.start) * element;
    if bytes != target_bytes as u64 {
        return Err(Error::Invalid(format!(
            "rows {rows:?} and columns {columns:?} take {bytes} bytes, the target has {target_bytes}"
        )));
    }
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let (pitch, row) = (width * element, (columns.end - columns.start) * element);
    let first = matrix.begin + rows.start * pitch + columns.start * element;
    let count = rows.end - rows.start;
    let (count, row) = if row == pitch { (1, row * count) } else { (count, row) };
    let range = |i| Range {
        file: matrix.file,
        begin: first + i * pitch,
        bytes: row as usize,
        at: (i * row) as usize,
    };
    Ok((0..count).map(range).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::cases;

    pub(crate) fn extent(begin: u64, end: u64, align: usize) -> Extent {
        Extent { file: 0, begin, end, align }
    }

    #[test]
    fn neighbours_are_one_range_congruent_to_the_file() {
        let far = 9000 + GAP_BYTES + 1;
        let found =
            layout(&[extent(far, far + 8, 1), extent(1000, 5000, 4), extent(6000, 9000, 2)]);
        let first = Range { file: 0, begin: 1000, bytes: 8000, at: 1000 };
        let at = 9000 + ((far - 9000) % PAGE_BYTES) as usize;
        assert_eq!(found.ranges, [first, Range { file: 0, begin: far, bytes: 8, at }]);
        assert_eq!(found.places, [at, 1000, 6000]);
        assert_eq!((found.bytes, found.gap_bytes), (at + 8, 1000));
    }

    #[test]
    fn a_gap_of_64_kib_is_read_along_and_one_byte_more_is_not() {
        for (gap, ranges) in [(GAP_BYTES, 1), (GAP_BYTES + 1, 2)] {
            let found = layout(&[extent(0, 8, 1), extent(8 + gap, 16 + gap, 1)]);
            assert_eq!(found.ranges.len(), ranges);
        }
    }

    #[test]
    fn an_unaligned_tensor_lies_alone_at_a_multiple_of_64() {
        let found = layout(&[extent(8, 16, 8), extent(17, 33, 8), extent(40, 48, 8)]);
        assert_eq!(found.ranges.len(), 2);
        assert_eq!(found.places, [8, 64, 40]);
    }

    #[test]
    fn tied_tensors_share_place_and_read_aligned_or_not() {
        for begin in [8, 9] {
            let tied = extent(begin, begin + 16, 4);
            let found = layout(&[tied, extent(begin, begin + 16, 8), tied]);
            assert_eq!(found.places[0], found.places[2]);
            assert!(found.ranges.len() <= 2);
        }
    }

    #[test]
    fn nothing_and_empty_tensors_need_no_reads() {
        assert_eq!(layout(&[]), Layout::default());
        let found = layout(&[extent(12, 12, 4), extent(13, 13, 4)]);
        assert!(found.ranges.is_empty());
        assert!(found.places.iter().all(|&place| place <= found.bytes && place % 4 == 0));
    }

    /// Up to three files and extents in them, some aligned, some not, some twice.
    pub(crate) fn files_and_extents() -> impl Strategy<Value = (Vec<usize>, Vec<Extent>)> {
        let extent = (any::<prop::sample::Index>(), any::<u64>(), any::<u64>(), 0..4_u32);
        let extents = vec((extent, any::<bool>(), 1..3_usize), 0..12);
        let longest: usize = if cfg!(miri) { 2_000 } else { 200_000 };
        (vec(0..longest, 1..4), extents).prop_map(|(lengths, drawn)| {
            let extents = drawn.into_iter().flat_map(|((file, a, b, power), aligned, times)| {
                let (file, align) = (file.index(lengths.len()), 1 << power);
                let (a, b) = (a % (lengths[file] as u64 + 1), b % (lengths[file] as u64 + 1));
                let begin = if aligned { a.min(b) / align * align } else { a.min(b) };
                let extent = Extent { file, begin, end: a.max(b), align: align as usize };
                std::iter::repeat_n(extent, times)
            });
            let extents = extents.collect();
            (lengths, extents)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(48)))]

        #[test]
        fn a_layout_is_disjoint_aligned_and_complete((_, extents) in files_and_extents()) {
            let found = layout(&extents);
            prop_assert!(found.ranges.is_sorted_by_key(|range| (range.file, range.begin)));
            let mut free = 0;
            for range in &found.ranges {
                prop_assert!(range.at >= free);
                free = range.at + range.bytes;
            }
            prop_assert!(free <= found.bytes);
            for (extent, &place) in extents.iter().zip(&found.places) {
                prop_assert!(place.is_multiple_of(extent.align));
                let bytes = (extent.end - extent.begin) as usize;
                prop_assert!(place + bytes <= found.bytes);
                let holds = |range: &Range| {
                    range.file == extent.file
                        && range.begin <= extent.begin
                        && range.begin + range.bytes as u64 >= extent.end
                        && place as u64 - range.at as u64 == extent.begin - range.begin
                };
                prop_assert!(bytes == 0 || found.ranges.iter().any(holds));
            }
        }
    }
}

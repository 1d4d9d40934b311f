//! Strided f32 matrices over slices, and their product by the `gemm` crate.

use gemm::Parallelism;

/// A matrix read from a slice: element (i, j) at `i · row_stride + j · column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major with rows `row_stride` elements apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Matrix { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// Row-major and contiguous.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// The transpose, by exchanging strides.
    pub(crate) fn t(self) -> Self {
        Matrix {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    fn in_bounds(&self) -> bool {
        self.rows == 0
            || self.columns == 0
            || (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride < self.data.len()
    }
}

/// A row-major matrix to write, rows `row_stride` elements apart.
pub(crate) struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// With rows `row_stride` elements apart.
    pub(crate) fn strided(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        MatrixMut { data, rows, columns, row_stride }
    }

    /// Contiguous.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }
}

/// Products of fewer multiplications than this run on the calling thread: waking others would take longer.
const PARALLEL_FROM: usize = 1 << 19;

/// `out = scale · a · b`, or `out += …` when `add`. Deterministic: the inner dimension is never split over threads.
///
/// # Panics
/// The shapes do not fit or reach outside of their slices; callers have checked the tensors.
pub(crate) fn product(a: Matrix, b: Matrix, scale: f32, out: MatrixMut, add: bool, threads: bool) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert!(b.rows == k && out.rows == m && out.columns == n, "product of {m}x{k} and {}x{n}", b.rows);
    let last = Matrix::strided(out.data, m, n, out.row_stride);
    assert!(a.in_bounds() && b.in_bounds() && last.in_bounds() && out.row_stride >= n, "matrix outside of its slice");
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = if threads && m * n * k >= PARALLEL_FROM { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: the pointers and strides describe elements inside of the three slices (asserted above); `out` is borrowed
    // exclusively and its rows do not overlap (`row_stride >= n`); the destination is read only if `add`, and a f32
    // slice is always initialized.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.data.as_mut_ptr(),
            1,
            out.row_stride as isize,
            add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

//! Strided f32 matrices over slices, and their product by the `gemm` crate.

use gemm::Parallelism;
use std::marker::PhantomData;

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

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    fn in_bounds(&self) -> bool {
        self.rows == 0
            || self.columns == 0
            || (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride < self.data.len()
    }
}

/// A row-major matrix to write, or a strip of one's columns: element (i, j) at `i · row_stride + j` from `data`.
pub(crate) struct MatrixMut<'a> {
    data: *mut f32,
    rows: usize,
    first_column: usize,
    columns: usize,
    row_stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: a matrix owns the exclusive borrow of its elements, as a `&mut [f32]` would.
unsafe impl Send for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// Contiguous.
    ///
    /// # Panics
    /// The slice is too short.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert!(rows * columns <= data.len(), "{rows}x{columns} matrix in {} elements", data.len());
        MatrixMut {
            data: data.as_mut_ptr(),
            rows,
            first_column: 0,
            columns,
            row_stride: columns,
            borrowed: PhantomData,
        }
    }

    /// Its columns, `width` at a time. No element is in two strips.
    pub(crate) fn strips(self, width: usize) -> Vec<MatrixMut<'a>> {
        let strip = |first: usize| MatrixMut {
            data: self.data.wrapping_add(first),
            first_column: self.first_column + first,
            columns: width.min(self.columns - first),
            ..self
        };
        (0..self.columns).step_by(width).map(strip).collect()
    }

    /// The matrix, borrowed for less long.
    pub(crate) fn reborrow(&mut self) -> MatrixMut<'_> {
        MatrixMut { ..*self }
    }

    /// Number of the first column within the matrix that this is a strip of.
    pub(crate) fn first_column(&self) -> usize {
        self.first_column
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
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
    assert!(a.in_bounds() && b.in_bounds(), "matrix outside of its slice");
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = if threads && m * n * k >= PARALLEL_FROM { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: the pointers and strides describe elements inside of the slices (asserted above and by `MatrixMut`); `out`
    // is borrowed exclusively and its rows do not overlap; the destination is read only if `add`, and a f32 slice is
    // always initialized.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.data,
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

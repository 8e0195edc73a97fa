//! The honest baseline of an autoencoder: principal component analysis with as many components as the code has values.
//!
//! On the rows it is fitted to, no linear autoencoder has a smaller squared error, and it has no hyper-parameters to
//! tune badly: a network whose error on held-out rows is not below PCA's has gained nothing from being a network.
//!
//! For rows x with mean μ and orthonormal components C, (k, features), the reconstruction is μ + (x − μ)·Cᵀ·C. C holds
//! the eigenvectors of the k largest eigenvalues of the scatter matrix S = Σ (x − μ)ᵀ(x − μ), which are found
//!
//! * up to 1024 features exactly, from S itself;
//! * beyond by subspace iteration with oversampling (Halko, Martinsson and Tropp, "Finding structure with randomness",
//!   SIAM Review 53(2), 2011, algorithm 4.4), which needs only products with S, taken as Xᵀ(X·V) over blocks of rows.
//!
//! All arithmetic is in f64. On one machine the result has the same bits for any number of threads; it is a yardstick
//! and no part of a run, so that it is not under the numerics contract and may differ in the last bits between ISAs.

use nalgebra::DMatrix;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};
use rayon::prelude::*;
use thiserror::Error;

/// The most features for which the scatter matrix is formed: 1024² f64 are 8 MiB, and decomposing them takes about a
/// second. Both grow fast (12,288 features would need 1.2 GiB and, by the cube, half an hour); subspace iteration grows
/// only linearly.
const MAX_SCATTER_FEATURES: usize = 1024;

/// The most values that a fit looks at in one pass; of more, every n-th row is used. 2²⁷ are 171,000 rows of 784
/// features, or 10,900 of 12,288. A pass of subspace iteration for 128 components, with 192 directions, then takes
/// 4·2²⁷·192 ≈ 10¹¹ operations, a few seconds.
const MAX_FITTED_VALUES: usize = 1 << 27;

/// The fewest rows for each component that thinning leaves: components fitted on fewer describe their noise.
const MIN_ROWS_PER_COMPONENT: usize = 8;

/// The most values in the components that subspace iteration finds: 64 MiB of f64, or 682 components of 12,288
/// features. The iteration holds about four matrices half as large again.
const MAX_COMPONENT_VALUES: usize = 1 << 23;

/// The fewest directions more than asked for that the subspace carries; else it is half as many again. The last
/// directions converge slowest and are thrown away.
const MIN_OVERSAMPLING: usize = 10;

/// How often the subspace is multiplied by S before its best directions are picked. Measured on Fashion-MNIST with k of
/// 16, 64, 128 and 576: the error on the test set is at most 0.07 % above that of the exact components.
const POWER_PASSES: usize = 4;

/// The values in one block of centred rows: 4 MiB of f64, enough rows to keep matrix products busy.
const BLOCK_VALUES: usize = 1 << 19;

/// The rows of a result that one task computes. A constant, so that how sums are grouped never depends on threads.
const TASK_ROWS: usize = 64;

/// What can go wrong when a baseline is fitted or evaluated.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum PcaError {
    /// There is nothing to take a mean of.
    #[error("PCA needs at least one row with at least one feature, but was given {count} rows of {features} features")]
    Empty {
        /// The number of rows given.
        count: usize,
        /// The number of features of each.
        features: usize,
    },
    /// A row has an infinite value or a NaN, which would spread to every component.
    #[error("PCA needs finite values, but feature {feature} of row {row} is {value}")]
    NotFinite {
        /// The row's number.
        row: usize,
        /// The feature's number in the row.
        feature: usize,
        /// The value found.
        value: f32,
    },
    /// The rows to evaluate have another width than those that were fitted.
    #[error("PCA was fitted on rows of {fitted} features and cannot reconstruct rows of {given}")]
    FeatureMismatch {
        /// The number of features of the rows fitted.
        fitted: usize,
        /// The number of features of the rows given.
        given: usize,
    },
    /// The components would need an unreasonable amount of time and memory.
    #[error("PCA of rows with {features} features can have at most {limit} components, not {components}")]
    TooLarge {
        /// The number of components asked for.
        components: usize,
        /// The number of features of each.
        features: usize,
        /// The most components of so many features.
        limit: usize,
    },
}

/// The rows of a data set, read one at a time, so that the set need not be converted to `f32` as a whole.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The number of rows.
    pub count: usize,
    /// The number of values in each row.
    pub features: usize,
    /// Writes the row of the given number, less than `count`, to a buffer of `features` values. Fitting reads rows
    /// several times, from one thread, and expects the same values each time.
    pub read: &'a dyn Fn(usize, &mut [f32]),
}

/// The components of a fit.
#[derive(Clone, Debug)]
enum Components {
    /// As many as there are features: every row is its own reconstruction.
    All,
    /// (k, features): orthonormal rows, by falling variance.
    Leading(Array2<f64>),
}

/// Principal components of a set of rows.
#[derive(Clone, Debug)]
pub struct Pca {
    /// (features)
    mean: Array1<f64>,
    components: Components,
    fitted_rows: usize,
}

impl Pca {
    /// Fits `k` components to `rows`.
    ///
    /// Of n rows at most n − 1 components are kept, since more directions than that have no variance to choose them
    /// by. With `k` of at least `features` there is nothing to compress and reconstruction is exact, as it is for a
    /// network whose code is as wide as its input. With `k` zero every row is reconstructed as the mean.
    ///
    /// Of very large sets only every n-th row is read, see [`Pca::fitted_rows`]: rows whose order repeats itself with
    /// such a period should be given shuffled.
    ///
    /// # Errors
    ///
    /// [`PcaError::Empty`] without rows or features, [`PcaError::NotFinite`] at the first value that is not finite, and
    /// [`PcaError::TooLarge`] if there are more than 1024 features and the components would need more than 64 MiB.
    pub fn fit(rows: Rows<'_>, k: usize) -> Result<Self, PcaError> {
        rows.check_not_empty()?;
        let sample = Thinned::new(rows, k);
        let mean = sample.mean()?;
        let rank = k.min(sample.count() - 1);
        let components = if k >= rows.features {
            Components::All
        } else if rank == 0 {
            Components::Leading(Array2::zeros((0, rows.features)))
        } else if rows.features <= MAX_SCATTER_FEATURES {
            Components::Leading(exact_components(&sample, &mean, rank)?)
        } else {
            Components::Leading(subspace_components(&sample, &mean, rank)?)
        };
        Ok(Self { mean, components, fitted_rows: sample.count() })
    }

    /// About how many floating-point operations it takes to fit `k` components to `count` rows of `features` values, or
    /// to find out that there would be too many.
    pub fn fit_operations(count: usize, features: usize, k: usize) -> f64 {
        let rows = count.div_ceil(stride(count, features, k));
        let rank = k.min(rows.saturating_sub(1));
        let directions = subspace_width(rank, features, rows);
        let subspace = features > MAX_SCATTER_FEATURES;
        let nothing_to_do = k >= features || rank == 0 || (subspace && rank > max_components(features));
        let [rows, features, width] = [rows, features, directions].map(|size| size as f64);
        match subspace {
            _ if nothing_to_do => rows * features,
            false => rows * features.powi(2) + 10.0 * features.powi(3),
            true => {
                let passes = POWER_PASSES as f64 + 1.0;
                passes * (4.0 * rows * features * width + 2.0 * features * width.powi(2)) + 10.0 * width.powi(3)
            }
        }
    }

    /// The mean squared error, over all values of all `rows`, of reconstructing them from their components.
    ///
    /// # Errors
    ///
    /// [`PcaError::Empty`] without rows, [`PcaError::FeatureMismatch`] if they are not as wide as those fitted, and
    /// [`PcaError::NotFinite`] at the first value that is not finite.
    pub fn reconstruction_mse(&self, rows: Rows<'_>) -> Result<f64, PcaError> {
        rows.check_not_empty()?;
        if rows.features != self.mean.len() {
            return Err(PcaError::FeatureMismatch { fitted: self.mean.len(), given: rows.features });
        }
        let mut squared_error = 0.0;
        Thinned { rows, stride: 1 }.for_each_block(self.mean.view(), |block| {
            let tasks: Vec<_> = block.axis_chunks_iter(Axis(0), TASK_ROWS).collect();
            let errors: Vec<f64> = tasks.into_par_iter().map(|rows| self.squared_error(rows)).collect();
            squared_error += errors.iter().sum::<f64>();
        })?;
        Ok(squared_error / (rows.count as f64 * rows.features as f64))
    }

    /// The number of components kept, at most the `k` asked for.
    pub fn component_count(&self) -> usize {
        match &self.components {
            Components::All => self.mean.len(),
            Components::Leading(components) => components.nrows(),
        }
    }

    /// The number of rows that were looked at: all, or an even selection if there are more than 2²⁷ values in them.
    pub fn fitted_rows(&self) -> usize {
        self.fitted_rows
    }

    /// ‖x − x·Cᵀ·C‖² for the centred rows x: (rows, features).
    ///
    /// The shorter ‖x‖² − ‖x·Cᵀ‖² cancels badly where PCA is nearly exact, and trusts C to be orthonormal.
    fn squared_error(&self, centred: ArrayView2<'_, f64>) -> f64 {
        match &self.components {
            Components::All => 0.0,
            Components::Leading(components) => {
                let scores = centred.dot(&components.t());
                let mut residual = centred.to_owned();
                general_mat_mul(-1.0, &scores, components, 1.0, &mut residual);
                residual.iter().map(|error| error * error).sum()
            }
        }
    }
}

impl Rows<'_> {
    fn check_not_empty(&self) -> Result<(), PcaError> {
        if self.count == 0 || self.features == 0 {
            return Err(PcaError::Empty { count: self.count, features: self.features });
        }
        Ok(())
    }

    fn read_finite(&self, row: usize, values: &mut [f32]) -> Result<(), PcaError> {
        (self.read)(row, values);
        match values.iter().position(|value| !value.is_finite()) {
            Some(feature) => Err(PcaError::NotFinite { row, feature, value: values[feature] }),
            None => Ok(()),
        }
    }
}

/// Of so many rows, every how many-th one is looked at to fit `k` components.
fn stride(count: usize, features: usize, k: usize) -> usize {
    let most = (MAX_FITTED_VALUES / features.max(1)).max(k.saturating_mul(MIN_ROWS_PER_COMPONENT)).max(1);
    count.div_ceil(most).max(1)
}

/// The most components that subspace iteration finds.
fn max_components(features: usize) -> usize {
    MAX_COMPONENT_VALUES / features
}

/// Directions that subspace iteration carries for `rank` components.
fn subspace_width(rank: usize, features: usize, rows: usize) -> usize {
    (rank + MIN_OVERSAMPLING.max(rank.div_ceil(2))).min(features).min(rows)
}

/// Every `stride`-th row of a set.
#[derive(Clone, Copy)]
struct Thinned<'a> {
    rows: Rows<'a>,
    stride: usize,
}

impl<'a> Thinned<'a> {
    /// As many of `rows` as fitting `k` components may look at.
    fn new(rows: Rows<'a>, k: usize) -> Self {
        Self { rows, stride: stride(rows.count, rows.features, k) }
    }

    fn count(&self) -> usize {
        self.rows.count.div_ceil(self.stride)
    }

    /// Returns (features).
    fn mean(&self) -> Result<Array1<f64>, PcaError> {
        let mut mean = Array1::zeros(self.rows.features);
        let zero = Array1::zeros(self.rows.features);
        self.for_each_block(zero.view(), |block| mean += &block.sum_axis(Axis(0)))?;
        mean /= self.count() as f64;
        Ok(mean)
    }

    /// Calls `visit` with all rows less `mean`, in order, in blocks of (rows, features).
    fn for_each_block(
        &self,
        mean: ArrayView1<'_, f64>,
        mut visit: impl FnMut(ArrayView2<'_, f64>),
    ) -> Result<(), PcaError> {
        let features = self.rows.features;
        let block_rows = (BLOCK_VALUES / features).clamp(1, self.count());
        let mut values = vec![0f32; features];
        let mut block = Array2::zeros((block_rows, features));
        for first in (0..self.count()).step_by(block_rows) {
            let mut block = block.slice_mut(s![..block_rows.min(self.count() - first), ..]);
            for (index, mut centred) in block.rows_mut().into_iter().enumerate() {
                self.rows.read_finite((first + index) * self.stride, &mut values)?;
                for ((centred, &value), &mean) in centred.iter_mut().zip(&values).zip(mean) {
                    *centred = f64::from(value) - mean;
                }
            }
            visit(block.view());
        }
        Ok(())
    }
}

/// The `k` leading eigenvectors of the scatter matrix, by decomposing it. Returns (k, features).
fn exact_components(sample: &Thinned<'_>, mean: &Array1<f64>, k: usize) -> Result<Array2<f64>, PcaError> {
    let features = mean.len();
    let mut scatter = Array2::<f64>::zeros((features, features));
    sample.for_each_block(mean.view(), |block| {
        let tasks: Vec<_> = scatter.axis_chunks_iter_mut(Axis(0), TASK_ROWS).enumerate().collect();
        tasks.into_par_iter().for_each(|(task, mut scatter)| {
            // The matrix is symmetric: what lies left of the task's diagonal is filled in at the end.
            let first = task * TASK_ROWS;
            let left = block.slice(s![.., first..first + scatter.nrows()]);
            let right = block.slice(s![.., first..]);
            general_mat_mul(1.0, &left.t(), &right, 1.0, &mut scatter.slice_mut(s![.., first..]));
        });
    })?;
    for row in 0..features {
        for column in 0..row {
            scatter[[row, column]] = scatter[[column, row]];
        }
    }
    Ok(leading_eigenvectors(&scatter, k))
}

/// About the `k` leading eigenvectors of the scatter matrix, by subspace iteration. Returns (k, features).
fn subspace_components(sample: &Thinned<'_>, mean: &Array1<f64>, k: usize) -> Result<Array2<f64>, PcaError> {
    let features = mean.len();
    let limit = max_components(features);
    if k > limit {
        return Err(PcaError::TooLarge { components: k, features, limit });
    }
    let width = subspace_width(k, features, sample.count());
    let start = Array2::from_shape_fn((width, features), |(row, column)| noise((row * features + column) as u64));
    let mut basis = orthonormal_rows(&start);
    for _ in 0..POWER_PASSES {
        basis = orthonormal_rows(&scatter_times(sample, mean, &basis)?);
    }
    // Rayleigh-Ritz: within the subspace, the scatter is a small matrix, V·S·Vᵀ, and is decomposed exactly.
    let within = basis.dot(&scatter_times(sample, mean, &basis)?.t());
    Ok(leading_eigenvectors(&within, k).dot(&basis))
}

/// V·S for the scatter matrix S and `basis`, V: (width, features), without ever forming S. Returns (width, features).
fn scatter_times(sample: &Thinned<'_>, mean: &Array1<f64>, basis: &Array2<f64>) -> Result<Array2<f64>, PcaError> {
    let mut product = Array2::<f64>::zeros(basis.dim());
    sample.for_each_block(mean.view(), |block| {
        let products = product.axis_chunks_iter_mut(Axis(0), TASK_ROWS);
        let tasks: Vec<_> = products.zip(basis.axis_chunks_iter(Axis(0), TASK_ROWS)).collect();
        tasks.into_par_iter().for_each(|(mut product, basis)| {
            let scores = block.dot(&basis.t());
            general_mat_mul(1.0, &scores.t(), &block, 1.0, &mut product);
        });
    })?;
    Ok(product)
}

/// Orthonormal rows that span at least the rows of `rows`: (width, features) with width at most features. Returns the
/// same shape. Householder reflections stay orthonormal even where rows depend on each other, as they do if the data
/// has fewer dimensions than the subspace.
fn orthonormal_rows(rows: &Array2<f64>) -> Array2<f64> {
    let (width, features) = rows.dim();
    // Row-major (width, features) is column-major (features, width): the values change hands in order, both ways.
    let q = DMatrix::from_iterator(features, width, rows.iter().copied()).qr().q();
    Array2::from_shape_fn((width, features), |(row, column)| q[(column, row)])
}

/// Eigenvectors of the `k` largest eigenvalues of `symmetric`: (n, n), largest first. Returns (k, n).
fn leading_eigenvectors(symmetric: &Array2<f64>, k: usize) -> Array2<f64> {
    let n = symmetric.nrows();
    let eigen = DMatrix::from_iterator(n, n, symmetric.iter().copied()).symmetric_eigen();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&left, &right| eigen.eigenvalues[right].total_cmp(&eigen.eigenvalues[left]));
    Array2::from_shape_fn((k, n), |(row, column)| eigen.eigenvectors[(column, order[row])])
}

/// The `index`-th value of a fixed pseudo-random sequence (SplitMix64), from −0.5 to 0.5. Where subspace iteration
/// starts does not matter as long as no data is orthogonal to it, so the seed is nobody's choice.
fn noise(index: u64) -> f64 {
    let mut bits = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    (bits >> 11) as f64 / (1u64 << 53) as f64 - 0.5
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test data of any size: a function of (row, feature).
    fn mse_of(k: usize, fitted: (usize, usize), value: impl Fn(usize, usize) -> f64) -> f64 {
        let read = reader(&value);
        let (count, features) = fitted;
        let pca = Pca::fit(Rows { count, features, read: &read }, k).unwrap();
        // Rows that were not fitted, of the same kind.
        let held_out = |row: usize, values: &mut [f32]| read(row + count, values);
        pca.reconstruction_mse(Rows { count: 50, features, read: &held_out }).unwrap()
    }

    fn reader(value: impl Fn(usize, usize) -> f64) -> impl Fn(usize, &mut [f32]) {
        move |row, values| {
            for (feature, target) in values.iter_mut().enumerate() {
                *target = value(row, feature) as f32;
            }
        }
    }

    /// Rows in a plane of `rank` dimensions that does not pass through the origin. Multiples of 1/64 below 2¹⁷ are
    /// exact in f32, so that rounding adds no further dimension.
    fn low_rank(rank: usize) -> impl Fn(usize, usize) -> f64 {
        let coarse = |index: usize| (noise(index as u64) * 64.0).round() / 8.0;
        move |row, feature| {
            let plane = (0..rank).map(|axis| coarse(row * rank + axis) * coarse((1 << 20) + feature * rank + axis));
            3.0 + plane.sum::<f64>()
        }
    }

    /// Independent values with standard deviations that fall from feature to feature.
    fn full_rank(row: usize, feature: usize) -> f64 {
        noise((row * 4096 + feature) as u64) / (1.0 + 0.1 * feature as f64)
    }

    #[test]
    fn rows_in_a_plane_need_no_more_components_than_it_has_dimensions() {
        for features in [20, 70, MAX_SCATTER_FEATURES + 10] {
            for k in [4, 5, 19] {
                let mse = mse_of(k, (100, features), low_rank(4));
                assert!(mse < 1e-18, "{features} features, k = {k}: {mse}");
            }
            assert!(mse_of(3, (100, features), low_rank(4)) > 0.1, "{features} features");
        }
    }

    #[test]
    fn a_code_as_wide_as_the_rows_loses_nothing() {
        assert_eq!(mse_of(12, (100, 12), full_rank), 0.0);
        assert_eq!(mse_of(13, (1, 12), full_rank), 0.0);
        assert_eq!(mse_of(5000, (3, 3000), full_rank), 0.0);
        assert!(mse_of(11, (100, 12), full_rank) > 1e-4);
    }

    #[test]
    fn without_components_the_error_is_the_variance_about_the_fitted_mean() {
        // Column means of the fitted rows are 1 and 6; the squared distances of (2, 9) to them are 1 and 9.
        let fitted = reader(|row, feature| [[0.0, 4.0], [2.0, 8.0]][row][feature]);
        let pca = Pca::fit(Rows { count: 2, features: 2, read: &fitted }, 0).unwrap();
        let evaluated = reader(|_, feature| [2.0, 9.0][feature]);
        assert_eq!(pca.reconstruction_mse(Rows { count: 3, features: 2, read: &evaluated }).unwrap(), 5.0);
    }

    #[test]
    fn the_direction_of_most_variance_comes_first() {
        // Fitted along (3, 4), so the held-out point (4, -3) + mean is all error and (3, 4) + mean is none.
        let fitted = reader(|row, feature| (row as f64 - 2.0) * [3.0, 4.0][feature]);
        let pca = Pca::fit(Rows { count: 5, features: 2, read: &fitted }, 1).unwrap();
        let mse = |point: [f64; 2]| {
            let read = reader(|_, feature| point[feature]);
            pca.reconstruction_mse(Rows { count: 1, features: 2, read: &read }).unwrap()
        };
        assert!(mse([3.0, 4.0]) < 1e-28);
        assert!((mse([4.0, -3.0]) - 12.5).abs() < 1e-12);
    }

    #[test]
    fn few_rows_give_no_more_components_than_they_span() {
        for features in [20, MAX_SCATTER_FEATURES + 10] {
            let read = reader(full_rank);
            let rows = Rows { count: 5, features, read: &read };
            let pca = Pca::fit(rows, 19).unwrap();
            assert_eq!(pca.component_count(), 4, "{features} features");
            assert!(pca.reconstruction_mse(rows).unwrap() < 1e-20, "what was fitted lies in its own span");
            assert_eq!(Pca::fit(Rows { count: 1, ..rows }, 19).unwrap().component_count(), 0);
        }
    }

    #[test]
    fn constant_rows_are_reconstructed_exactly() {
        for features in [20, MAX_SCATTER_FEATURES + 10] {
            assert_eq!(mse_of(3, (30, features), |_, feature| feature as f64), 0.0, "{features} features");
        }
    }

    /// Scenario: data with a slowly falling spectrum, the hard case for subspace iteration, decomposed both ways.
    /// Property: the error of the approximate components is that of the exact ones, or hardly more.
    #[test]
    fn both_decompositions_explain_the_data_equally_well() {
        let read = reader(full_rank);
        let rows = Rows { count: 400, features: 90, read: &read };
        for k in [1, 7, 30, 64, 89] {
            let sample = Thinned::new(rows, k);
            let mean = sample.mean().unwrap();
            let mse = |components| {
                let fit = Pca { mean: mean.clone(), components: Components::Leading(components), fitted_rows: 400 };
                fit.reconstruction_mse(rows).unwrap()
            };
            let exact = mse(exact_components(&sample, &mean, k).unwrap());
            let subspace = mse(subspace_components(&sample, &mean, k).unwrap());
            assert!(exact <= subspace * (1.0 + 1e-12), "k = {k}: {exact} is not the least error, {subspace} is less");
            assert!(subspace <= exact * 1.005, "k = {k}: {subspace} instead of {exact}");
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        for features in [150, MAX_SCATTER_FEATURES + 10] {
            let with_threads = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| mse_of(70, (200, features), full_rank)).to_bits()
            };
            assert_eq!(with_threads(1), with_threads(3), "{features} features");
        }
    }

    #[test]
    fn what_takes_long_is_known_before() {
        assert_eq!(Pca::fit_operations(100, 8, 8), 800.0, "a pass for the mean, and nothing to compress");
        let images = Pca::fit_operations(60_000, 784, 64);
        assert!((4e10..5e10).contains(&images), "{images}");
        // A convolutional code of a color image has most of its values.
        let colors = Pca::fit_operations(10_000, 3072, 2048);
        assert!((2e12..4e12).contains(&colors), "{colors}");
        assert_eq!(Pca::fit_operations(10_000, 12_288, 5000), 10_000.0 * 12_288.0, "too many are refused at once");
        assert_eq!(Pca::fit_operations(0, 0, 3), 0.0);
    }

    #[test]
    fn large_sets_are_thinned_evenly_but_never_below_the_needs_of_the_components() {
        let read = |_: usize, _: &mut [f32]| {};
        let kept = |count, features, k| Thinned::new(Rows { count, features, read: &read }, k).count();
        assert_eq!(kept(60_000, 784, 576), 60_000);
        assert_eq!(kept(60_000, 12_288, 64), 10_000);
        assert_eq!(kept(2_000, 1 << 24, 64), 500);
        assert_eq!(kept(3, usize::MAX, 1), 3);
        assert_eq!(Thinned::new(Rows { count: 60_000, features: 12_288, read: &read }, 64).stride, 6);
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let fit = |count, features, k| {
            let read = reader(|row, feature| if (row, feature) == (7, 2) { f64::NAN } else { full_rank(row, feature) });
            Pca::fit(Rows { count, features, read: &read }, k)
        };
        assert_eq!(fit(0, 3, 1).unwrap_err(), PcaError::Empty { count: 0, features: 3 });
        assert_eq!(fit(3, 0, 1).unwrap_err(), PcaError::Empty { count: 3, features: 0 });
        assert_eq!(fit(9, 3, 1).unwrap_err().to_string(), "PCA needs finite values, but feature 2 of row 7 is NaN");
        let read = reader(full_rank);
        let pca = fit(7, 3, 1).unwrap();
        assert_eq!(
            pca.reconstruction_mse(Rows { count: 1, features: 4, read: &read }).unwrap_err(),
            PcaError::FeatureMismatch { fitted: 3, given: 4 }
        );
        assert_eq!(
            pca.reconstruction_mse(Rows { count: 0, features: 3, read: &read }).unwrap_err(),
            PcaError::Empty { count: 0, features: 3 }
        );
        let rows = Rows { count: 5, features: 1 << 22, read: &|_, values| values.fill(1.0) };
        assert_eq!(
            Pca::fit(rows, 4).unwrap_err().to_string(),
            "PCA of rows with 4194304 features can have at most 2 components, not 4"
        );
    }
}
